"""All stages of a config, one after another. `python -m jobs.pipeline CONFIG [--store URI] [--key value]`

Sweep (with what is missing of corpus and harvest), features, exports. Each stage finds what it has committed, so the
same line goes on where it was interrupted; an SAE that failed does not keep the others from their features.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from jobs import features, publish, sweep
from jobs.runtime import run_main
from midiscover.configio import to_yaml
from midiscover.errors import NotFoundError
from midiscover.launch import parse_job, prepare
from midiscover.store.storage import store_uri


def main(argv: list[str]) -> int:
    """Run the stages; 1 where an SAE of the sweep failed."""
    args = parse_job("pipeline", argv)
    with prepare(args, publishes=True) as prepared:
        config = prepared.resolved.config
    with tempfile.TemporaryDirectory(prefix="midiscover-") as folder:
        # What the flags say stands in the file, so that every stage means the same sweep.
        path = Path(folder, f"{config.name}.yaml")
        path.write_text(to_yaml(config))
        common = [str(path), "--store", store_uri(args.store), *(["--force"] if args.force else [])]
        marks = [word for tag in args.tags for word in ("--tag", tag)] + (["--note", args.note] if args.note else [])
        code = sweep.main([*common, *marks])
        try:
            return max(code, features.main(common), publish.main(common))
        except NotFoundError:
            if code:
                return code  # no SAE was finished, and the sweep has said why
            raise


if __name__ == "__main__":
    run_main(main)
