"""A foreign text: the rows are those a harvest would store, and the text is spread over many documents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from midiscover import foreign
from midiscover.config import CorpusConfig, EvaluateConfig, HarvestConfig
from midiscover.corpus import Corpus
from midiscover.errors import CorpusError
from midiscover.foreign import foreign_rows, foreign_windows
from midiscover.harvest import Harvester, HarvestJob
from midiscover.ids import evaluation_id
from midiscover.lm import LanguageModel
from midiscover.mixing import mix
from midiscover.packing import Windows
from midiscover.reading import Reader
from midiscover.store.blocks import Mask, block_plan, read_block
from midiscover.texts import documents, foreign_config, resolve_foreign
from midiscover.train import Pair
from tests.unit.test_harvest import CONTEXT

HOOK, OUTPUT = "model.layers.0.mlp.down_proj:in", "model.layers.1.mlp"
HARVEST = HarvestConfig(hooks=(HOOK, OUTPUT), block_tokens=7 * CONTEXT, outlier_norm=1.5)


def test_rows_are_those_of_a_harvest_of_the_same_windows(model: LanguageModel, corpus: Corpus) -> None:
    n = corpus.manifest.windows["train"]
    windows = Windows(*corpus.windows(0, n))
    job = HarvestJob(harvest_id="h.0000000000", hooks={HOOK: 56, OUTPUT: 24}, config=HARVEST)
    plan = block_plan(n, 0, context_size=CONTEXT, block_tokens=HARVEST.block_tokens)
    blocks: dict[str, list] = {HOOK: [], OUTPUT: []}
    for _span, rows in Harvester(job, model, corpus, corpus.storage).run([(s, [HOOK, OUTPUT]) for s in plan]):
        for hook, row in rows.items():
            blocks[hook].append(read_block(corpus.storage, job.harvest_id, hook, row))
    acts = {hook: torch.cat([block.acts for block in read]) for hook, read in blocks.items()}
    mask = {hook: torch.cat([block.mask for block in read]) for hook, read in blocks.items()}
    assert all((codes == Mask.OUTLIER).any() for codes in mask.values())

    reader = Reader(model, job.hooks, HARVEST, CONTEXT)
    found = list(foreign_rows(reader, windows, (OUTPUT, OUTPUT), 20))
    assert max(map(len, found)) == 20
    assert torch.equal(torch.cat(found), acts[OUTPUT][mask[OUTPUT] == 0])

    reader.batch_windows = 2
    pairs = list(foreign_rows(reader, windows, (HOOK, OUTPUT), 1000))
    assert all(isinstance(pair, Pair) for pair in pairs)
    both = (mask[HOOK] == 0) & (mask[OUTPUT] == 0)
    for found, hook in zip(zip(*pairs, strict=True), (HOOK, OUTPUT), strict=True):
        torch.testing.assert_close(torch.cat(found), acts[hook][both])


def windows_of(folder: Path, model: LanguageModel, corpus: Corpus, tokens: int, texts: list[str]) -> Windows:
    for number, text in enumerate(texts):
        (folder / f"{number:03}.txt").write_text(text)
    evaluate = EvaluateConfig(foreign_source=str(folder), foreign_tokens=tokens)
    run = CorpusConfig(source="builtin", subset="other", max_samples=1, context_size=CONTEXT)
    cfg, source = foreign_config(run, evaluate), resolve_foreign(run, evaluate)
    assert cfg is not None
    assert source is not None
    return foreign_windows(cfg, source, model.tokenizer, corpus.manifest)


def test_a_short_text_takes_the_middle_of_many_long_documents(
    model: LanguageModel, corpus: Corpus, tmp_path: Path
) -> None:
    folder = tmp_path / "long"
    folder.mkdir()
    texts = [" ".join(f"{number}x{place}" for place in range(4000)) for number in range(30)]
    windows = windows_of(folder, model, corpus, 3000, texts)
    assert windows.ids.shape[1] == CONTEXT
    assert set(windows.ids[:, 0]) == {model.tokenizer.bos_token_id}, "as the corpus has it"
    inside = windows.doc >= 0
    used = windows.doc[inside].max() + 1
    assert int(inside.sum()) == 3000 + used - 1, "and an EOS between two documents"
    assert used >= 2
    for doc in range(used - 1):  # the last one is cut where the tokens end
        ids = windows.ids[windows.doc == doc]
        excerpt = model.tokenizer.decode(ids[ids != model.tokenizer.eos_token_id])
        assert len(excerpt) == 2000
        start = texts[doc].index(excerpt)
        assert start == (len(texts[doc]) - 2000) // 2
    again = windows_of(folder, model, corpus, 3000, texts)
    assert all(np.array_equal(a, b) for a, b in zip(windows, again, strict=True))


def test_a_text_that_ends_before_its_tokens(model: LanguageModel, corpus: Corpus, tmp_path: Path) -> None:
    folder = tmp_path / "short"
    folder.mkdir()
    windows = windows_of(folder, model, corpus, 10**6, ["One short text.", "And another, not a copy of it."])
    text = model.tokenizer.decode(windows.ids[windows.doc >= 0])
    assert text == f"One short text.{model.tokenizer.eos_token}And another, not a copy of it."


def test_a_text_that_changes_while_it_is_read_is_refused(
    model: LanguageModel, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()

    def mixed(*given: Any) -> Iterator[Any]:
        yield from mix(*given)
        (folder / "000.txt").write_text("Another text.")

    monkeypatch.setattr(foreign, "mix", mixed)
    with pytest.raises(CorpusError, match="has changed since it was looked at; run the same command again"):
        windows_of(folder, model, corpus, 10**6, ["One short text.", "And another, not a copy of it."])


def test_an_unknown_foreign_source_is_named_by_its_setting() -> None:
    with pytest.raises(CorpusError, match=r"nowhere\.parquet does not exist; evaluate\.foreign_source must"):
        resolve_foreign(CorpusConfig(), EvaluateConfig(foreign_source="nowhere.parquet"))
    assert resolve_foreign(CorpusConfig(), EvaluateConfig()) is None


def test_a_foreign_text_has_settings_of_its_own(tmp_path: Path) -> None:
    """Its column is that of the run's text where nothing is said; it is another text under another column."""
    path = tmp_path / "b.jsonl"
    path.write_text('{"text": "some", "other": "another"}\n')
    corpus = CorpusConfig(source="some/prose", subset="en", split="test", revision="main", text_field="body")

    def first(evaluate: EvaluateConfig) -> str:
        cfg, source = foreign_config(corpus, evaluate), resolve_foreign(corpus, evaluate)
        assert cfg is not None
        assert source is not None
        return next(documents(cfg, source)[0])

    plain = EvaluateConfig(foreign_source=str(path))
    with pytest.raises(CorpusError, match=r"no field 'body'.* evaluate\.foreign_text_field chooses"):
        resolve_foreign(corpus, plain)
    texts = [replace(plain, foreign_text_field=name) for name in ("text", "other")]
    assert [first(evaluate) for evaluate in texts] == ["some", "another"]
    assert len({evaluation_id(evaluate, foreign_digest="d") for evaluate in (plain, *texts)}) == 3
    for name, wrong in (
        ("subset", replace(texts[0], foreign_subset="en")),
        ("split", replace(texts[0], foreign_split="en")),
    ):
        with pytest.raises(CorpusError, match=rf"evaluate\.foreign_{name} is en, but .* is no hub data set"):
            resolve_foreign(corpus, wrong)
    assert evaluation_id(replace(EvaluateConfig(), foreign_text_field="text")) == evaluation_id(EvaluateConfig())
    hub = foreign_config(corpus, EvaluateConfig(foreign_source="other/prose", foreign_subset="de", foreign_split="dev"))
    assert hub == replace(corpus, source="other/prose", subset="de", split="dev", revision=None, max_tokens=8192)
