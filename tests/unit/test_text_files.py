"""Text files that change, that hold nothing, that are many, and that are packed in another way."""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from midiscover import corpus, text_files
from midiscover.config import CorpusConfig
from midiscover.errors import CorpusError
from midiscover.store.local import LocalStorage
from midiscover.store.storage import Bytes, Entry, open_store
from midiscover.texts import SourceIdentity, documents, resolve_source
from tests.unit.test_corpus import make_texts, make_tokenizer


def test_a_text_that_changes_in_between_is_not_taken_for_the_one_that_was_seen(tmp_path: Path) -> None:
    """A node of a cluster may be waited for meanwhile; the corpus would stand under the id of the old text."""
    (tmp_path / "a.txt").write_text("the first")
    cfg = CorpusConfig(source=str(tmp_path))
    seen = resolve_source(cfg)
    assert [list(part) for part in documents(cfg, seen)] == [["the first"]]
    (tmp_path / "b.txt").write_text("another")
    with pytest.raises(CorpusError, match="has changed since it was looked at; run the same command again"):
        documents(cfg, seen)


def test_a_parquet_file_without_any_text_is_passed_over(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.nulls(3)}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["some"]}), tmp_path / "b.parquet")
    cfg = CorpusConfig(source=str(tmp_path))
    assert [list(part) for part in documents(cfg, resolve_source(cfg))] == [["some"]]


def test_a_prefix_of_a_bucket_is_known_from_its_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many objects it holds: none is asked for by itself."""
    for name in range(300):
        (tmp_path / f"{name}.txt").write_text(str(name))
    (tmp_path / "named.parquet").mkdir()
    pq.write_table(pa.table({"text": ["some"]}), tmp_path / "named.parquet" / "part-0.parquet")
    listed: list[list[Entry]] = []

    class Bucket(LocalStorage):
        def entries(self, prefix: str) -> list[Entry]:
            listed.append(super().entries(prefix))
            return listed[-1]

        def version(self, key: str) -> str:
            raise AssertionError(f"{key} is asked for")

    def opened(address: str, **_: Any) -> LocalStorage:
        return Bucket(tmp_path / address.removeprefix("s3://bucket").strip("/"))

    monkeypatch.setattr(text_files, "open_store", opened)
    files = text_files.find("s3://bucket/")
    assert files is not None
    assert len(files) == 301
    assert len(listed) == 1
    assert {file.name: file.version for file in files} == {one.key: one.version for one in listed[0]}
    inside = text_files.find("s3://bucket/named.parquet")
    assert inside is not None
    assert [file.name for file in inside] == ["part-0.parquet"]


def test_files_of_a_hub_data_set_may_be_packed_by_zstd(tmp_path: Path) -> None:
    """As The Pile's: with the package that `datasets` asks for."""
    import datasets

    rows = [{"text": "one"}, {"text": "two"}]
    data = zstandard.compress("\n".join(map(json.dumps, rows)).encode())
    (tmp_path / "00.jsonl.zst").write_bytes(data)
    found = datasets.load_dataset(
        "json", data_files=str(tmp_path / "*.zst"), split="train", streaming=True, cache_dir=str(tmp_path / "cache")
    )
    assert list(found) == rows


@pytest.mark.parametrize(("name", "value"), [("split", "test"), ("subset", "en"), ("revision", "main")])
def test_settings_of_a_hub_data_set_are_refused_for_other_sources(tmp_path: Path, name: str, value: str) -> None:
    """A folder that was downloaded from the hub has its splits as files, and all of them would be read."""
    settings: dict[str, Any] = {name: value}
    (tmp_path / "test-0.txt").write_text("some")
    for source in (str(tmp_path), str(tmp_path / "test-0.txt"), "builtin"):
        resolve_source(CorpusConfig(source=source))
        with pytest.raises(CorpusError, match=rf"corpus\.{name} is {value}, but {source} is no hub data set"):
            resolve_source(CorpusConfig(source=source, **settings))


def test_only_the_text_of_a_hub_data_set_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = pa.table({"body": ["one", "two"], "sound": pa.array([{"bytes": b"none", "path": None}] * 2, kind)})
    features = {"body": {"dtype": "string", "_type": "Value"}, "sound": {"_type": "Audio"}}
    rows = rows.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(rows, tmp_path / "a.parquet")
    real = datasets.load_dataset

    def load_dataset(*_: Any, **__: Any) -> Any:
        cache, files = str(tmp_path / "cache"), str(tmp_path / "a.parquet")
        return real("parquet", data_files=files, split="train", streaming=True, cache_dir=cache)

    with pytest.raises(Exception, match="decod"):
        list(load_dataset())
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    cfg = CorpusConfig(source="some/sound", text_field="body")
    (found,) = documents(cfg, SourceIdentity(name="some/sound", digest="c0ffee", revision="c0ffee"))
    assert list(found) == ["one", "two"]


@pytest.mark.parametrize("in_bucket", [False, True], ids=["a file", "an object"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "with a byte order mark"])
def test_a_byte_that_is_no_text_is_counted_from_the_beginning_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mark: bytes, in_bucket: bool
) -> None:
    data = mark + "über alles\n".encode() * 4001
    bad = len(data)
    (tmp_path / "a.txt").write_bytes(data + b"\xff tail\n" * 3)
    monkeypatch.setattr(text_files, "open_store", lambda *_, **__: LocalStorage(tmp_path))
    with pytest.raises(CorpusError, match=rf"a\.txt is not UTF-8 text: invalid start byte at byte {bad}\."):
        resolve_all("s3://bucket/a.txt" if in_bucket else str(tmp_path))


def resolve_all(source: str) -> list[str]:
    cfg = CorpusConfig(source=source)
    return list(documents(cfg, resolve_source(cfg))[0])


def test_lines_and_columns_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    deep = "[" * 100_000 + "]" * 100_000
    (tmp_path / "a.jsonl").write_text(f'{{"text": "some"}}\n{{"text": "some", "tree": {deep}}}\n')
    with pytest.raises(CorpusError, match=r"a\.jsonl, line 2 holds a field that is nested too deeply"):
        resolve_all(str(tmp_path / "a.jsonl"))
    columns = [pa.array(["one"]), pa.array(["two"])]
    pq.write_table(pa.Table.from_arrays(columns, names=["text", "text"]), tmp_path / "b.parquet")
    with pytest.raises(CorpusError, match=r"b\.parquet has several columns 'text'"):
        resolve_all(str(tmp_path / "b.parquet"))
    pq.write_table(pa.table({"text": pa.array([b"\xff"]).cast(pa.string(), safe=False)}), tmp_path / "c.parquet")
    with pytest.raises(CorpusError, match=r"c\.parquet: column 'text' holds text that is not UTF-8"):
        resolve_all(str(tmp_path / "c.parquet"))


def test_a_text_is_mapped_and_not_read_into_memory_while_it_is_put_into_a_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("some")
    storage = open_store(str(tmp_path / "store"))
    mapped: list[bool] = []
    real = LocalStorage.write

    def write(self: LocalStorage, key: str, data: Bytes) -> None:
        mapped.append(isinstance(data, memoryview) and isinstance(data.obj, mmap.mmap))
        real(self, key, data)

    monkeypatch.setattr(LocalStorage, "write", write)
    address, size, is_new = text_files.put(str(tmp_path / "a.txt"), storage)
    assert (size, is_new, mapped) == (4, True, [True])
    assert Path(address).read_text() == "some"


def test_a_put_puts_back_what_a_text_in_a_store_has_lost(tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("a.txt", "b.txt"):
        (texts / name).write_text(name)
    storage = open_store(str(tmp_path / "store"))
    address, _, _ = text_files.put(str(texts), storage)
    (Path(address) / "b.txt").unlink()
    assert text_files.put(str(texts), storage) == (address, 10, True)
    assert (Path(address) / "b.txt").read_text() == "b.txt"
    assert text_files.put(str(texts), storage) == (address, 10, False)


def test_a_text_in_a_bucket_that_has_lost_a_file_is_no_other_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("a.txt", "b.txt"):
        (texts / name).write_text(name)
    address, _, _ = text_files.put(str(texts), open_store(str(tmp_path / "store")))
    monkeypatch.setattr(text_files, "open_store", lambda *_, **__: LocalStorage(Path(address)))
    assert resolve_all("s3://bucket/texts/some") == ["a.txt", "b.txt"]
    (Path(address) / "b.txt").unlink()
    with pytest.raises(CorpusError, match=r"s3://bucket/texts/some has lost b\.txt; submit again from the machine"):
        resolve_all("s3://bucket/texts/some")


@pytest.mark.parametrize("own", ['{"about": "my articles", "b.txt": "the second"}', '["a.txt"]'])
def test_contents_that_somebody_wrote_of_a_text_lose_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str
) -> None:
    (tmp_path / "a.txt").write_text("some")
    (tmp_path / "_contents.json").write_text(own)
    monkeypatch.setattr(text_files, "open_store", lambda *_, **__: LocalStorage(tmp_path))
    assert resolve_all("s3://bucket/texts") == resolve_all("s3://bucket/texts/a.txt") == ["some"]
    files = text_files.find("s3://bucket/texts") or []
    assert [file.version for file in files] == [LocalStorage(tmp_path).version("a.txt")]


def test_an_object_that_is_named_is_read_whatever_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a file of this machine is; among others such names are left out."""
    (tmp_path / "_train.jsonl").write_text('{"text": "some"}')
    monkeypatch.setattr(text_files, "open_store", lambda *_, **__: LocalStorage(tmp_path))
    assert resolve_all("s3://bucket/_train.jsonl") == resolve_all(str(tmp_path / "_train.jsonl")) == ["some"]
    with pytest.raises(CorpusError, match="s3://bucket holds no text files"):
        resolve_all("s3://bucket")


def test_a_link_that_leads_back_is_not_followed(tmp_path: Path) -> None:
    """Others are: as to a larger disk."""
    for name in ("texts/a.txt", "texts/sub/b.txt", "elsewhere/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    links = {"sub/up": "..", "sub/up2": "..", "sub/self": ".", "out": tmp_path, "disk": tmp_path / "elsewhere"}
    for name, place in links.items():
        (tmp_path / "texts" / name).symlink_to(place)
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "texts" / "sub")
    found = text_files.find(str(tmp_path / "texts"))
    assert found is not None
    assert [file.name for file in found] == ["a.txt", "disk/back/b.txt", "disk/c.txt", "sub/b.txt"]


@pytest.mark.parametrize("in_bucket", [False, True], ids=["a file", "an object"])
@pytest.mark.parametrize("max_tokens", [None, 500], ids=["all of it", "its beginning"])
def test_a_text_that_changes_while_it_is_read_makes_no_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_bucket: bool, max_tokens: int | None
) -> None:
    file = tmp_path / "texts" / "a.jsonl"
    file.parent.mkdir()
    texts = make_texts(40)
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    monkeypatch.setattr(text_files, "open_store", lambda *_, **__: LocalStorage(file.parent))
    cfg = CorpusConfig(source="s3://bucket/a.jsonl" if in_bucket else str(file), context_size=16, max_tokens=max_tokens)
    seen, storage = resolve_source(cfg), open_store(str(tmp_path / "store"))
    real = corpus.mix

    def mix(*how: Any) -> Any:
        for number, document in enumerate(real(*how)):
            if number == 1:
                with file.open("a") as stream:
                    stream.write(json.dumps({"text": "more"}))
            yield document

    monkeypatch.setattr(corpus, "mix", mix)
    with pytest.raises(CorpusError, match="has changed since it was looked at"):
        corpus.build_corpus(cfg, seen, make_tokenizer(), storage, "c.1", lineage={})
    assert corpus.find_corpus(storage, "c.1") is None
    monkeypatch.setattr(corpus, "mix", real)
    corpus.build_corpus(cfg, resolve_source(cfg), make_tokenizer(), storage, "c.1", lineage={})
    assert corpus.find_corpus(storage, "c.1") is not None
