"""Splicing against a plain loop, and the ends of the scale: a perfect SAE recovers all, zeros nothing."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
from torch import Tensor

from midiscover import memory
from midiscover.corpus import Corpus
from midiscover.errors import ModelError
from midiscover.evaluate import SplicedSums, SpliceResult, reconstruction_metrics, splice_metrics
from midiscover.lm import LanguageModel
from midiscover.memory import spliced_bytes, spliced_windows
from midiscover.sae.base import Sae
from midiscover.sae.registry import make_sae
from midiscover.saeconfig import SkipTranscoderConfig, StandardConfig
from midiscover.train import Pair
from tests.unit.test_harvest import CONTEXT

HOOK, D_IN = "model.layers.0.mlp.down_proj", 24
WIDE = 2 * D_IN + 8  # of `model.layers.0.mlp.down_proj:in`


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


def test_windows_are_taken_from_all_of_the_held_out_text(model: LanguageModel, corpus: Corpus) -> None:
    """Part of them: the clean cross-entropy is that of the windows evenly spread over the split, by a plain pass."""
    start, n = corpus.manifest.windows["train"], corpus.manifest.windows["held_out"]
    assert n >= 8
    found = splice_metrics(model, corpus, HOOK, {}, max_tokens=4 * CONTEXT, mask_first=True, outlier_norm=10)
    clean, tokens = 0.0, 0
    for place in (0, n // 4, n // 2, 3 * n // 4):
        ids, doc = (torch.from_numpy(part.copy()).long() for part in corpus.windows(start + place, start + place + 1))
        text = ids[:, : int((doc != -1).sum())]
        with torch.inference_mode():
            log_p = torch.log_softmax(model.model(text).logits[0, :-1].double(), dim=-1)
        clean -= float(log_p[torch.arange(len(log_p)), text[0, 1:]].sum())
        tokens += len(log_p)
    assert found.tokens == tokens
    assert sum(found.clean) == pytest.approx(clean, rel=1e-5)


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


def test_the_logits_of_a_large_vocabulary_are_made_of_fewer_windows(
    model: LanguageModel, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sums are those of eight windows at a time, for each window is added up by itself and in its turn."""

    def found() -> tuple[SpliceResult, list[int]]:
        seen: list[int] = []
        how = {"max_tokens": 16 * CONTEXT, "mask_first": True, "outlier_norm": 10, "on_tokens": seen.append}
        return splice_metrics(model, corpus, HOOK, {"s": random_sae()}, **how), seen

    eight, wide = found()
    monkeypatch.setattr(memory, "SPLICED_LOGITS", 3 * CONTEXT * model.vocab_size)
    three, narrow = found()
    assert (max(wide), max(narrow)) == (8 * CONTEXT, 3 * CONTEXT)
    assert three.clean == pytest.approx(eight.clean, rel=1e-6)
    assert three.metrics("s") == pytest.approx(eight.metrics("s"), rel=1e-4)


def test_windows_of_a_pass_by_hand() -> None:
    """Those of phi-2's sweep are eight still; a table of 2**28 numbers is Gemma's of two windows of 512."""
    assert spliced_windows(512, 51_200) == 8
    assert spliced_windows(512, 256_000) == 2
    assert spliced_windows(8192, 256_000) == 1
    assert spliced_bytes(512, 256_000) == 4 * (2 + 2 + 2) * 512 * 256_000


def test_logits_are_gone_before_the_next_ones_are_made(
    model: LanguageModel, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    plain = LanguageModel.logits

    def logits(self: LanguageModel, *args: object, **how: object) -> Tensor:
        alive.append(sum(one() is not None for one in made))
        out = plain(self, *args, **how)  # type: ignore[arg-type]  # as they came
        made.append(weakref.ref(out))
        return out

    monkeypatch.setattr(LanguageModel, "logits", logits)
    splice_metrics(model, corpus, HOOK, {"s": random_sae()}, max_tokens=8 * CONTEXT, mask_first=True, outlier_norm=10)
    assert alive == [0] * 3, "clean, zero and one SAE"


def test_reconstruction_metrics_see_every_row_once() -> None:
    x = torch.randn(100, D_IN)
    sums = reconstruction_metrics({"i": identity_sae(), "r": random_sae()}, x.split(33), x.mean(0))
    assert sums["i"].result()["fvu"] == pytest.approx(0, abs=1e-9)
    assert sums["i"].result()["l0"] == D_IN
    assert sums["r"].tokens == 100


def skip_transcoder(skip: Tensor, *, seed: int | None = None) -> Sae:
    """y_hat = relu(x @ W_enc + b_enc) @ W_dec + x @ skip; without a seed the features are 0. skip: [d_in, d_out]."""
    d_in, d_out = skip.shape
    sae = make_sae(SkipTranscoderConfig(), d_in, 30, d_out)
    sae.get_parameter("W_skip").data = skip.T.contiguous()
    if seed is not None:
        g = torch.Generator().manual_seed(seed)
        sae.W_enc.data = torch.randn(d_in, 30, generator=g)
        sae.b_enc.data = torch.randn(30, generator=g)
        sae.W_dec.data = torch.randn(30, d_out, generator=g) / 10
    return sae


def test_a_transcoder_is_measured_on_what_it_predicts() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(90, WIDE, generator=g).bfloat16(), torch.randn(90, D_IN, generator=g).bfloat16() + 2
    skip, mean = torch.randn(WIDE, D_IN, generator=g) / 10, torch.ones(D_IN)
    transcoder = skip_transcoder(skip, seed=1)
    pairs = [Pair(a, b) for a, b in zip(x.split(40), y.split(40), strict=True)]
    found = reconstruction_metrics({"t": transcoder}, pairs, mean)["t"].result()
    with torch.no_grad():
        code = torch.relu(x.float() @ transcoder.W_enc + transcoder.b_enc)
        y_hat = code @ transcoder.W_dec + x.float() @ skip
    error, spread = (y_hat - y.float()).double(), y.double() - mean.double()
    assert found["tokens"] == 90
    assert found["fvu"] == pytest.approx(float(error.pow(2).sum() / spread.pow(2).sum()), rel=1e-5)
    assert found["mse"] == pytest.approx(float(error.pow(2).mean()), rel=1e-5)
    assert found["l0"] == pytest.approx(float((code > 0).sum()) / 90)


def test_a_transcoder_that_is_the_module_recovers_all(model: LanguageModel, corpus: Corpus) -> None:
    weight = model.model.get_submodule(HOOK).weight.T.contiguous()
    saes = {"module": skip_transcoder(weight), "nothing": skip_transcoder(torch.zeros(WIDE, D_IN))}
    found = splice_metrics(
        model, corpus, f"{HOOK}:in", saes, output_hook=HOOK, max_tokens=10**6, mask_first=True, outlier_norm=10
    )
    perfect, nothing = found.metrics("module"), found.metrics("nothing")
    assert perfect["ce_recovered"] == pytest.approx(1, abs=1e-4)
    assert perfect["kl_sae"] == pytest.approx(0, abs=1e-6)
    assert nothing["ce_sae"] == pytest.approx(nothing["ce_zero"])
    assert nothing["kl_recovered"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("outlier_norm", [1e9, 1.3])
def test_splicing_a_transcoder_equals_a_plain_loop(model: LanguageModel, corpus: Corpus, outlier_norm: float) -> None:
    """Across layers, with rows left alone that are outliers at either of the two hooks."""
    transcoder = skip_transcoder(torch.randn(WIDE, D_IN, generator=torch.Generator().manual_seed(3)) / 5, seed=2)
    layers = model.model.model.layers
    source, target = layers[0].mlp.down_proj, layers[1].mlp
    found = splice_metrics(
        model,
        corpus,
        f"{HOOK}:in",
        {"t": transcoder},
        output_hook="model.layers.1.mlp",
        max_tokens=10**6,
        mask_first=True,
        outlier_norm=outlier_norm,
    )
    start, n = corpus.manifest.windows["train"], corpus.manifest.windows["held_out"]
    ids, doc = (torch.from_numpy(part.copy()).long() for part in corpus.windows(start, start + n))
    special = set(model.tokenizer.all_special_ids)
    totals, tokens, by = dict.fromkeys(("clean", "zero", "t"), 0.0), 0, {"x": 0, "y": 0}
    for window, docs in zip(ids.split(8), doc.split(8), strict=True):
        held: dict[str, Tensor] = {}
        allowed = torch.tensor([[i > 0 and int(t) not in special for i, t in enumerate(row)] for row in window])
        allowed &= docs != -1

        def usable(name: str, value: Tensor, allowed: Tensor = allowed) -> Tensor:
            norm = value.norm(dim=-1)
            inside = norm <= outlier_norm * norm[allowed].median()
            by[name] += int((allowed & ~inside).sum())
            return allowed & inside

        def logits(edit: str, window: Tensor = window, docs: Tensor = docs, held: dict[str, Tensor] = held) -> Tensor:
            def hook(_module: object, _args: object, out: Tensor) -> Tensor | None:
                if edit == "clean":
                    return None
                keep = usable("x", held["x"]) & usable("y", out)
                new = transcoder(held["x"]) if edit == "t" else torch.zeros_like(out)
                return torch.where(keep[..., None], new, out)

            handles = [
                source.register_forward_pre_hook(lambda _module, args: held.update(x=args[0].clone())),
                target.register_forward_hook(hook),
            ]
            with torch.inference_mode():
                out = model.model(window, attention_mask=(docs != -1).long()).logits[:, :-1]
            for handle in handles:
                handle.remove()
            return torch.log_softmax(out.double(), dim=-1)

        counted = docs[:, 1:] != -1
        tokens += int(counted.sum())
        for edit in totals:
            chosen = logits(edit).gather(-1, window[:, 1:, None])[..., 0]
            totals[edit] -= float(chosen[counted].sum())
    metrics = found.metrics("t")
    assert metrics["ce_tokens"] == tokens
    assert (by["x"] > 0) == (by["y"] > 0) == (outlier_norm < 2), "outliers at both hooks, where there are any"
    for name, key in (("clean", "ce_clean"), ("zero", "ce_zero"), ("t", "ce_sae")):
        assert metrics[key] == pytest.approx(totals[name] / tokens, rel=1e-4)


def test_a_hook_that_runs_before_its_input_is_refused(model: LanguageModel, corpus: Corpus) -> None:
    with pytest.raises(ModelError, match="'model.layers.0.mlp' runs before 'model.layers.2.mlp'"):
        splice_metrics(
            model,
            corpus,
            "model.layers.2.mlp",
            {"t": skip_transcoder(torch.zeros(D_IN, D_IN))},
            output_hook="model.layers.0.mlp",
            max_tokens=100,
            mask_first=True,
            outlier_norm=10,
        )


def test_shares_follow_from_the_sums() -> None:
    """ce and kl are per predicted token; recovered is 1 for the clean model and 0 for zeros."""
    result = SpliceResult(
        tokens=50,
        clean=[40.0, 60.0],
        zero=SplicedSums(ce=[150.0, 250.0], kl=300.0),
        saes={"s": SplicedSums(ce=[70.0, 90.0], kl=75.0)},
    )
    # 80 of 110 and 160 of 190: 8 below and 8 above 0.8 of them.
    error = math.sqrt(2 * (8**2 + 8**2)) / 300
    assert result.metrics("s") == pytest.approx(
        {
            "ce_tokens": 50,
            "ce_clean": 2.0,
            "ce_zero": 8.0,
            "ce_sae": 3.2,
            "ce_recovered": 0.8,
            "ce_recovered_error": error,
            "kl_zero": 6.0,
            "kl_sae": 1.5,
            "kl_recovered": 0.75,
        }
    )
