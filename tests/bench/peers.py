"""Every peer's training step beside ours, from a clean clone by one command.

    python -m tests.bench.peers [--out peers.json] [--repeats 3] [...]

Makes an environment for each peer (SAELens, dictionary_learning, sparsify), once a machine, and then runs
tests.bench.step, whose arguments it takes: all sides in turn, two threads each, medians, spread and the bound; every
repeat goes to the JSON file. On a machine with a GPU tests.bench.gpu_step is run instead, with its own arguments and
defaults and always in bfloat16; the peers must then be installed beside its PyTorch, as is said there. Judges nothing:
the exit code is 0.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from tests.bench import gpu_step


def main(argv: Sequence[str] | None = None) -> int:
    """Make the environments, run the bench."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="peers.json", help="where every repeat is written")
    args, rest = parser.parse_known_args(argv)
    if torch.cuda.is_available():
        return gpu_step.main([*rest, "--json", args.out])
    # Here, as they need more packages than a machine with a GPU of somebody else's may have.
    from tests.bench import step
    from tests.bench.frontier import RUNNERS, python_of

    for side in RUNNERS:
        print(f"{side}: {python_of(side)}", flush=True)
    return step.main([*rest, "--json", args.out])


if __name__ == "__main__":
    sys.exit(main())
