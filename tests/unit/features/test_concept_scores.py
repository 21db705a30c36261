"""Texts through features and what stands beside them, and the command, against a pass by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from midiscover.cli import main
from midiscover.config import TrainConfig
from midiscover.configio import to_tree
from midiscover.features import concept_scores
from midiscover.features.concept_scores import as_it_began, encoded_scores, score_texts
from midiscover.ids import recorded_settings
from midiscover.interpret import ENCODED_TOKENS, encode_texts
from midiscover.lm import LanguageModel
from midiscover.member import Member, Slot
from midiscover.sae.base import Normalisation
from midiscover.sae.registry import make_sae
from midiscover.saeconfig import (
    BatchTopKConfig,
    GatedConfig,
    JumpReluConfig,
    SaeConfig,
    StandardConfig,
    TopKConfig,
    TranscoderConfig,
)
from midiscover.saes import LoadedSae

HOOK, OTHER = "model.layers.1.mlp.down_proj", "model.layers.0.mlp"
TEXTS = [f"{word} {end}" for word in ("The river", "A lamp", "Every stone", "Rain") for end in ("ran.", "is", "a: b")]


def sae(config: SaeConfig, *, hook: str = HOOK, seed: int = 3, d_sae: int = 48) -> LoadedSae:
    module = make_sae(config, 24, d_sae, 24)
    module.initialise_(9)
    record = {"hook": hook, "sae": to_tree(config), "train": {"seed": seed}}
    return LoadedSae(module=module.eval().requires_grad_(False), cfg={}, record=record)


def test_scores_are_those_of_a_loop(model: LanguageModel) -> None:
    saes = {"topk": sae(TopKConfig(k=4)), "plain": sae(StandardConfig(), hook=OTHER)}
    scored = score_texts(model, saes, TEXTS)
    for i, text in enumerate(encode_texts(model, saes, TEXTS, activations=True)):
        assert scored.tokens[i] == text.tokens
        for name, hook in (("topk", HOOK), ("plain", OTHER)):
            mine, neurons, codes = scored.of[name]["sae_scores"], scored.of[name]["neurons"], text.codes[name]
            assert mine.peak is not None
            x = text.activations[hook]
            for f in range(48):
                column = codes[:, f].tolist()
                assert float(mine.max[i, f]) == max(column)
                assert float(mine.mean[i, f]) == pytest.approx(sum(column) / len(column), abs=1e-6)
                assert column[int(mine.peak[i, f])] == max(column)
            for d in range(24):
                column = x[:, d].tolist()
                assert (float(neurons.max[i, d]), float(neurons.max[i, 24 + d])) == (max(column), -min(column))
                mean = pytest.approx(sum(column) / len(column), abs=1e-6)
                assert (float(neurons.mean[i, d]), -float(neurons.mean[i, 24 + d])) == (mean, mean)
            lengths = scored.of[name]["length"]
            assert lengths.max[i].tolist() == lengths.mean[i].tolist() == [len(text.tokens)]
    bare = score_texts(model, saes, TEXTS, baselines=False)
    assert [list(groups) for groups in bare.of.values()] == [["sae_scores"]] * 2
    rows = [text.activations[HOOK] for text in encode_texts(model, saes, TEXTS, activations=True)]
    alone, beside = encoded_scores(saes["topk"].encode, rows, with_peak=True), scored.of["topk"]["sae_scores"]
    for mine, theirs in zip(alone, beside, strict=True):
        assert torch.equal(mine, theirs)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "config",
    [
        StandardConfig(l1_coefficient=2),
        StandardConfig(initial_density=None, decoder="unit_norm"),
        GatedConfig(),
        JumpReluConfig(),
        TopKConfig(k=5),
        BatchTopKConfig(k=5),
        TranscoderConfig(output_hook=HOOK),
    ],
    ids=lambda config: config.kind,
)
def test_an_untrained_sae_is_that_of_the_control(config: SaeConfig) -> None:
    """Against the training loop's own member with `control: untrained`, given the same rows as its first batch."""
    rows = torch.randn(300, 24, generator=torch.Generator().manual_seed(0)) * 3 + torch.linspace(-5, 5, 24)
    began = as_it_began(sae(config), rows, seed=3)
    scale = 24**0.5 / float((rows - rows.mean(0)).norm(dim=1).mean())
    assert began.scale == pytest.approx(scale, rel=1e-5)
    norm = Normalisation(rows.mean(0), scale, 1.0)
    member = Member(id="x", config=replace(config, control="untrained"), train=TrainConfig(seed=3), d_sae=48)
    slot = Slot(member, norm, norm, rows_per_epoch=300, steps=1, device=torch.device("cpu"))
    slot.sae.calibrate_(scale * (rows - norm.mean))
    for name, value in slot.sae.state_dict().items():
        torch.testing.assert_close(began.sae.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        began.scores([rows[:7], rows[7:9]], activated=True).max,
        torch.stack([slot.sae.eval().encode(scale * (part - norm.mean)).amax(0) for part in (rows[:7], rows[7:9])]),
        rtol=1e-4,
        atol=1e-4,
    )
    bare = began.scores([rows[:7]], activated=False)
    want = scale * (rows[:7] - norm.mean) @ slot.sae.W_enc
    torch.testing.assert_close(bare.mean[0], want.mean(0).detach(), rtol=1e-4, atol=1e-4)


def test_texts_of_any_length_are_encoded_a_few_tokens_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [200, 1, 300, 30, 700, 2, 2, 64] + [9] * 80
    texts = [torch.randn(length, 24, generator=torch.Generator().manual_seed(length)) for length in lengths]
    began = as_it_began(sae(StandardConfig()), torch.cat(texts), seed=3)
    alone = [began.scores([text], activated=True) for text in texts]
    seen: list[int] = []
    encode = began.sae.encode
    monkeypatch.setattr(began.sae, "encode", lambda x: seen.append(len(x)) or encode(x))
    together = began.scores(texts, activated=True)
    assert sum(seen) == sum(lengths)
    assert max(seen) == 700, "one text is at least one part"
    assert sorted(seen)[-2] <= ENCODED_TOKENS
    torch.testing.assert_close(together.max, torch.cat([scores.max for scores in alone]))
    torch.testing.assert_close(together.mean, torch.cat([scores.mean for scores in alone]))


def test_saes_that_began_alike_share_their_baselines(model: LanguageModel) -> None:
    saes = {
        "l1 1": sae(StandardConfig(l1_coefficient=1)),
        "l1 2": sae(StandardConfig(l1_coefficient=2)),
        "seed": sae(StandardConfig(l1_coefficient=1), seed=4),
        "density": sae(StandardConfig(l1_coefficient=1, initial_density=0.3)),
        "wide": sae(StandardConfig(l1_coefficient=1), d_sae=64),
        "k 4": sae(TopKConfig(k=4)),
        "k 8": sae(TopKConfig(k=8)),
        "layer": sae(StandardConfig(l1_coefficient=1), hook=OTHER),
    }
    of = score_texts(model, saes, TEXTS).of
    assert of["l1 1"]["untrained"] is of["l1 2"]["untrained"]
    assert len({id(groups["untrained"]) for groups in of.values()}) == 7
    assert len({id(groups["neurons"]) for groups in of.values()}) == 2


def test_settings_that_wait_are_settings() -> None:
    known = {
        name for kind in ("standard", "gated", "topk", "matryoshka_batchtopk", "jumprelu") for name in fields(kind)
    }
    assert set(concept_scores.LATER) <= known


def fields(kind: str) -> list[str]:
    return list(to_tree(recorded_settings({"kind": kind})))


def test_an_sae_of_another_origin_has_baselines_too(model: LanguageModel) -> None:
    foreign = sae(TopKConfig(k=4))
    foreign = LoadedSae(module=foreign.module, cfg={"metadata": {"hook_name": HOOK}}, record=None)
    groups = score_texts(model, {"foreign": foreign}, TEXTS).of["foreign"]
    assert int((groups["untrained"].max > 0).sum(1).max()) <= 4 * 8  # k of the cfg.json, tokens of a text
    assert groups["untrained"].max.shape == (len(TEXTS), 48)


@pytest.fixture
def store(tmp_path: Path, model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep of two SAEs, as far as the command looks at it."""
    monkeypatch.setenv("COLUMNS", "120")
    folder = tmp_path / "store"
    configs: dict[str, SaeConfig] = {"l1.a.topk-48.k-4.0": TopKConfig(k=4), "l1.a.topk-48.k-8.1": TopKConfig(k=8)}
    for name in configs:
        (folder / "saes" / name).mkdir(parents=True)
        (folder / "saes" / name / "record.json").write_text("{}")
    (folder / "sweeps" / "tiny.0").mkdir(parents=True)
    sweep = {"id": "tiny.0", "sae_ids": list(configs), "config": {"name": "tiny"}}
    (folder / "sweeps" / "tiny.0" / "sweep.json").write_text(json.dumps(sweep))

    def load(name: str, **_: Any) -> LoadedSae:
        loaded = sae(configs[name])
        extra = {"id": name, "layer": 1, "d_sae": 48, "lineage": {"model": {"digest": "d"}}}
        return replace(loaded, record=(loaded.record or {}) | extra)

    monkeypatch.setattr("midiscover.saes.load_sae", load)
    monkeypatch.setattr("midiscover.interpret.load_language_model", lambda *_, **__: model)
    return folder


def run(store: Path, *arguments: str) -> int:
    return main(["concepts", *arguments, "--store", str(store), "--shuffles", "50"])


def own(tmp_path: Path) -> tuple[Path, Path]:
    texts, controls = tmp_path / "rivers.txt", tmp_path / "lamps.txt"
    texts.write_text("\n".join(f"The river ran for {i} days." for i in range(12)))
    controls.write_text("\n".join(f"A lamp was lit at {i} again." for i in range(14)))
    return texts, controls


def test_the_command_scores_writes_and_draws(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts, controls = own(tmp_path)
    pictures = tmp_path / "pictures"
    words = ("--texts", str(texts), "--controls", str(controls))
    assert run(store, "l1.a.topk-48.k-4", *words, "--json", "--out", str(pictures)) == 0
    (document,) = json.loads(capsys.readouterr().out)
    stored = store / "saes" / "l1.a.topk-48.k-4.0" / "concepts" / f"{document['concept']}.json"
    assert json.loads(stored.read_text()) == document
    assert document["texts"] == texts.read_text().splitlines()
    assert len(document["sae_scores"]["features"]) == 10
    assert document["of"]["hook"] == HOOK
    assert {path.suffix for path in pictures.iterdir()} == {".png", ".html"}
    assert run(store, "l1.a.topk-48.k-4", *words, "--top-features", "3", "--no-baselines") == 0
    out = capsys.readouterr().out
    assert "12 texts, 14 controls (the texts of lamps.txt)" in out
    assert "baselines were left out" in out
    assert run(store, "l1.a.topk-48.k-4", "--texts", str(texts)) == 0
    out = capsys.readouterr().out
    assert "12 texts, 12 controls (controls of all modules, alike in length but not in topic)" in out
    assert "raw neurons: first " in out
    assert max(map(len, out.splitlines())) <= 120


def test_a_sweep_has_a_map_and_its_best(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts, controls = own(tmp_path)
    assert run(store, "tiny.0", "--texts", str(texts), "--controls", str(controls), "--out", str(tmp_path / "p")) == 0
    out = capsys.readouterr().out
    assert [line.split() for line in out.splitlines() if "k 4" in line] == [["concept", "k", "4", "k", "8"]]
    assert "Where each concept is carried best" in out
    assert "Of 2 pairs of SAE and concept, the first feature beats the first of raw neurons on" in out
    assert len(list((tmp_path / "p").glob("concept-map.*"))) == 2
    assert len(list((store / "saes").glob("*/concepts/rivers-*.json"))) == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--module", "joy"), "'joy' is no concept module; known are commands, conversational"),
        (("--controls", "x.txt"), "--controls goes with --texts"),
        (("--module", "numbers", "--texts", "x.txt"), "Give either --module or --texts."),
        (("--texts", "nowhere.txt"), "The texts in 'nowhere.txt' can't be read: No such file or directory."),
        (("--texts", "empty.txt"), "'empty.txt' holds 0 texts; a concept needs 8 at least"),
        (("--texts", "twice.txt"), "'twice.txt' holds 1 texts; a concept needs 8 at least"),
        (("--texts", "latin.txt"), "it is not UTF-8 text"),
        (("--texts", "long.txt"), "Text 9 of 18, 'river river river"),
        (("--top-features", "0"), "--top-features is 0; it must be a whole number above 0."),
        (("--shuffles", "-1"), "--shuffles is -1; it must be a whole number above 0."),
        (("--module", "numbers", "--out", "empty.txt/x"), "The folder of --out, 'empty.txt/x', can't be made"),
    ],
)
def test_wrong_input_is_told(
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n  \n")
    (tmp_path / "twice.txt").write_text("The river ran.\n" * 9)
    (tmp_path / "latin.txt").write_bytes("Größe\n".encode("latin-1") * 9)
    (tmp_path / "long.txt").write_text("\n".join([*(f"river {i}" for i in range(8)), "river " * 300]))
    assert main(["concepts", "l1.a.topk-48.k-4", "--store", str(store), *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert "Traceback" not in error
    assert not list(store.rglob("concepts/*.json"))


def test_an_sae_that_is_not_there(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(store, "l9") == 2
    assert "There is no config, sweep or SAE 'l9'" in capsys.readouterr().err
