"""Splicing against a plain loop, and the ends of the scale: a perfect SAE recovers all, zeros nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from midiscover.config import ModelConfig, StandardConfig
from midiscover.corpus import Corpus
from midiscover.evaluate import reconstruction_metrics, splice_metrics
from midiscover.lm import LanguageModel
from midiscover.models import resolve_model
from midiscover.sae.base import Sae
from midiscover.sae.registry import make_sae
from midiscover.store.storage import open_store
from tests.tiny import make_tiny_model
from tests.unit.test_harvest import CONTEXT, tiny_corpus

HOOK, D_IN = "model.layers.0.mlp.down_proj", 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    folder = make_tiny_model("llama", tmp_path_factory.mktemp("model") / "llama")
    return LanguageModel.load(resolve_model(ModelConfig(id=str(folder))), dtype="float32")


@pytest.fixture
def corpus(tmp_path: Path, model: LanguageModel) -> Corpus:
    return tiny_corpus(tmp_path, model, open_store(str(tmp_path / "store")))


def identity_sae() -> Sae:
    """relu(x) - relu(-x) = x."""
    sae = make_sae(StandardConfig(), D_IN, 2 * D_IN)
    eye = torch.eye(D_IN)
    sae.load_state_dict(
        {
            "W_enc": torch.cat([eye, -eye], dim=1),
            "b_enc": torch.zeros(2 * D_IN),
            "W_dec": torch.cat([eye, -eye]),
            "b_dec": torch.zeros(D_IN),
        }
    )
    return sae


def random_sae() -> Sae:
    sae = make_sae(StandardConfig(), D_IN, 40)
    sae.initialise_(0)
    return sae


def test_the_ends_of_the_scale(model: LanguageModel, corpus: Corpus) -> None:
    zero = make_sae(StandardConfig(), D_IN, 8)
    saes = {"identity": identity_sae(), "zero": zero}
    found = splice_metrics(model, corpus, HOOK, saes, max_tokens=10**6, mask_first=True, outlier_norm=10)
    perfect, nothing = found.metrics("identity"), found.metrics("zero")
    assert perfect["ce_recovered"] == pytest.approx(1, abs=1e-4)
    assert perfect["kl_recovered"] == pytest.approx(1, abs=1e-4)
    assert nothing["ce_sae"] == pytest.approx(nothing["ce_zero"])
    assert nothing["kl_recovered"] == pytest.approx(0, abs=1e-6)


def test_splicing_equals_a_plain_loop_over_windows(model: LanguageModel, corpus: Corpus) -> None:
    sae = random_sae()
    found = splice_metrics(model, corpus, HOOK, {"s": sae}, max_tokens=10**6, mask_first=True, outlier_norm=1e9)
    start, n = corpus.manifest.windows["train"], corpus.manifest.windows["held_out"]
    ids, doc = (torch.from_numpy(part.copy()).long() for part in corpus.windows(start, start + n))
    module = model.model.model.layers[0].mlp.down_proj
    special = set(model.tokenizer.all_special_ids)
    totals = dict.fromkeys(("clean", "zero", "sae", "kl_zero", "kl_sae"), 0.0)
    tokens = 0
    for window, docs in zip(ids, doc, strict=True):
        length = int((docs != -1).sum())
        window = window[:length][None]
        keep = torch.tensor([i == 0 or int(t) in special for i, t in enumerate(window[0])])

        def run(edit: object, window: Tensor = window, keep: Tensor = keep) -> Tensor:
            def hook(_module: object, _args: object, out: Tensor) -> Tensor | None:
                if edit is None:
                    return None
                new = torch.zeros_like(out) if edit == "zero" else sae(out)
                return torch.where(keep[None, :, None], out, new)

            handle = module.register_forward_hook(hook)
            with torch.inference_mode():
                logits = model.model(window).logits[0, :-1]
            handle.remove()
            return torch.log_softmax(logits.double(), dim=-1)

        clean, zero, spliced = run(None), run("zero"), run("sae")
        tokens += length - 1
        for name, log_q in (("clean", clean), ("zero", zero), ("sae", spliced)):
            totals[name] -= float(log_q[torch.arange(length - 1), window[0, 1:]].sum())
        totals["kl_zero"] += float((clean.exp() * (clean - zero)).sum())
        totals["kl_sae"] += float((clean.exp() * (clean - spliced)).sum())
    metrics = found.metrics("s")
    assert metrics["ce_tokens"] == tokens
    for name, key in (("clean", "ce_clean"), ("zero", "ce_zero"), ("sae", "ce_sae"), ("kl_zero",) * 2, ("kl_sae",) * 2):
        assert metrics[key] == pytest.approx(totals[name] / tokens, rel=1e-4)


def test_the_token_budget_is_kept(model: LanguageModel, corpus: Corpus) -> None:
    seen: list[int] = []
    splice_metrics(
        model,
        corpus,
        HOOK,
        {"s": random_sae()},
        max_tokens=3 * CONTEXT,
        mask_first=True,
        outlier_norm=10,
        on_tokens=seen.append,
    )
    assert sum(seen) == 3 * CONTEXT * 3  # clean, zero, one SAE


def test_reconstruction_metrics_see_every_row_once() -> None:
    x = torch.randn(100, D_IN)
    sums = reconstruction_metrics({"i": identity_sae(), "r": random_sae()}, x.split(33), x.mean(0))
    assert sums["i"].result()["fvu"] == pytest.approx(0, abs=1e-9)
    assert sums["i"].result()["l0"] == D_IN
    assert sums["r"].tokens == 100
