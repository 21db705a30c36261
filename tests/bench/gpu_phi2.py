"""phi-2 at its real shape with random weights: harvest of five hooks in one pass.

    python -m tests.bench.gpu_phi2                 # on a GPU
    python -m tests.bench.gpu_phi2 --small         # the same program on a CPU, in seconds, to see that it runs

Plain torch, no Ray, nothing downloaded. Prints tokens/s and the share of the bfloat16 matrix rate that this very device
reaches in the same run; the harvest writes to a folder in memory (/dev/shm) where there is one. On a GPU once with the
model as transformers writes it, and once with attention compiled, as a harvest of 8 million tokens has it. What SAEs'
steps take there is `tests.bench.gpu_kinds`' matter.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from transformers import PhiConfig, PhiForCausalLM

from midiscover import tables
from midiscover.calibrate import timed
from midiscover.config import HarvestConfig
from midiscover.harvest import Harvester, HarvestJob
from midiscover.store.blocks import block_plan
from midiscover.store.storage import open_store
from tests.bench.step_sides import described, matrix_rate

LAYERS = (8, 12, 16, 20, 24)


class NoTokenizer:
    """The harvest asks a tokenizer for its special tokens and for nothing else."""

    all_special_ids = (50256,)


class RandomCorpus:
    """Windows of random token ids, in the shape of `midiscover.corpus.Corpus`."""

    def __init__(self, windows: int, context_size: int, vocabulary: int) -> None:
        self.manifest = self
        self.context_size = context_size
        self.ids = np.random.default_rng(0).integers(0, vocabulary, (windows, context_size), dtype=np.int32)

    def windows(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and document numbers [windows, context_size]."""
        ids = self.ids[start:stop]
        return ids, np.zeros_like(ids)


def model(small: bool, device: torch.device) -> tuple[object, PhiConfig]:
    """A random PhiForCausalLM of phi-2's shape, wrapped as the harvest takes it."""
    from midiscover.lm import LanguageModel
    from midiscover.models import ModelIdentity

    config = PhiConfig(
        vocab_size=512 if small else 51_200,
        hidden_size=64 if small else 2560,
        intermediate_size=256 if small else 10_240,
        num_hidden_layers=26 if small else 32,
        num_attention_heads=4 if small else 32,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.4},
    )
    config._attn_implementation = "sdpa"
    with torch.device(device):
        made = PhiForCausalLM(config)
    made.bfloat16()
    identity = ModelIdentity(name="random phi-2", digest="0", tokenizer_digest="0")
    return LanguageModel(identity, made, NoTokenizer()), config  # type: ignore[arg-type]  # see NoTokenizer


def flops_per_token(config: PhiConfig, layers: int, context_size: int) -> float:
    """Linear layers and causal attention of `layers` layers, the last without its attention's output."""
    d, f = config.hidden_size, config.intermediate_size
    return layers * (2 * (4 * d * d + 2 * d * f) + 2 * context_size * d)


def harvest_row(
    small: bool, tokens: int, context_size: int, device: torch.device, peak: float, *, compiled: bool
) -> tuple[str, ...]:
    """Tokens/s of the harvest of five hooks, after one span to warm up."""
    lm, config = model(small, device)
    if compiled:
        lm.compile()  # type: ignore[attr-defined]  # a LanguageModel
    hooks = {f"model.layers.{layer}.mlp.fc2": config.hidden_size for layer in LAYERS}
    settings = HarvestConfig(hooks=tuple(hooks), block_tokens=24 * context_size)
    windows = max(48, tokens // context_size)
    corpus = RandomCorpus(windows, context_size, min(50_000, config.vocab_size))
    spans = block_plan(windows, 0, context_size=context_size, block_tokens=settings.block_tokens)
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        job = HarvestJob(harvest_id="h.bench", hooks=hooks, config=settings)
        harvester = Harvester(job, lm, corpus, open_store(folder))  # type: ignore[arg-type]  # stand-ins of this bench
        list(harvester.run([(spans[0], list(hooks))]))
        rest = [(span, list(hooks)) for span in spans[1:]]
        seconds = timed(lambda: list(harvester.run(rest)), device)
    rate = sum(span.stop_window - span.start_window for span, _ in rest) * context_size / seconds
    share = rate * flops_per_token(config, max(LAYERS) + 1, context_size) / peak
    if lm.compiled is not None and lm.compiled.failed:  # type: ignore[attr-defined]  # a LanguageModel
        return "harvest, 5 hooks, written, attention could not be compiled", f"{rate:,.0f}", f"{100 * share:.0f} %", ""
    what = "harvest, 5 hooks, written" + (", attention compiled" if compiled else "")
    return what, f"{rate:,.0f}", f"{100 * share:.0f} %", "goal 65 %" if compiled else "goal 50 %"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a toy shape, for a CPU")
    parser.add_argument("--tokens", type=int, default=500_000)
    parser.add_argument("--context-size", type=int, default=512)
    known = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens, context = (20_000, 128) if known.small else (known.tokens, known.context_size)
    peak = matrix_rate(device, 512 if known.small else 8192)
    title = described(device, peak, small=device.type == "cpu")
    print(title, flush=True)
    table = Table("", "tokens/s", "share of measured peak", "", title=title)
    for compiled in (False, True) if device.type == "cuda" else (False,):
        row = harvest_row(known.small, tokens, context, device, peak, compiled=compiled)
        print(*row, sep="  ", flush=True)  # a run that is cut off has told what it knew
        table.add_row(*row)
    tables.show(table)


if __name__ == "__main__":
    main()
