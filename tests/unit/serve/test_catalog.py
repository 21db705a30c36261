"""What a deployment hosts, under which names, over a store with little in it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from midiscover.errors import NotFoundError, UserError
from midiscover.promoted import VERSION
from midiscover.publish.names import checked_model_id
from midiscover.serving import PROMOTED, ServeConfig
from midiscover.store import layout
from midiscover.store.documents import dump
from midiscover.store.local import LocalStorage
from midiscover.store.storage import Storage
from serve.catalog import Catalog
from serve.problems import of_error
from tests.unit.features.naive import D_SAE

PLACES = {
    "a": ("model.layers.15.self_attn.q_proj", 0.25),
    "b": ("model.layers.15.self_attn.o_proj", 0.5),
    "c": ("model.layers.14.self_attn.o_proj", 0.75),
}


def write_record(storage: Storage, sae: str, hook: str, fvu: float | None = None, name: str = "org/tiny") -> None:
    record: dict[str, Any] = {
        "id": sae,
        "created": "2026-11-25T10:00:00+00:00",
        "hook": hook,
        "output_hook": hook,
        "layer": 15,
        "kind": "standard",
        "d_in": 6,
        "d_sae": D_SAE,
        "sae": {"kind": "standard", "l1_coefficient": 4, "d_sae": D_SAE},
        "metrics": {"fvu": fvu},
        "lineage": {"model": {"name": name, "digest": "0a1b2c3d4e5f"}},
    }
    storage.write(layout.record(sae), dump(record))


def promote(storage: Storage, *saes: str) -> None:
    entries = [{"id": sae, "hook": PLACES[sae][0], "sweep": None} for sae in saes]
    storage.write(layout.PROMOTED, dump({"v": VERSION, "saes": entries, "updated": "now"}))


def looked(storage: Storage) -> Catalog:
    catalog = Catalog(storage, ServeConfig(store=storage.uri))
    catalog.refresh()
    return catalog


@pytest.mark.parametrize("name", ["\u043c\u043e\u0434\u0435\u043b\u044c", "5000", "m"])
def test_an_sae_is_hosted_whatever_its_model_is_called(tmp_path: Path, name: str) -> None:
    storage = LocalStorage(tmp_path)
    write_record(storage, "a", PLACES["a"][0], name=name)
    catalog = looked(storage)
    assert catalog.broken == {}
    (summary,) = (one.summary() for one in catalog.hosted)
    assert summary["model"] == name
    told = summary["neuronpedia"]
    assert told["modelId"] == checked_model_id("model-0a1b2c3d")
    assert catalog.by_source(told["modelId"], told["source"]).id == "a"


def test_saes_of_one_source_go_by_their_ids(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    for sae, (hook, fvu) in PLACES.items():
        write_record(storage, sae, hook, fvu)
    shared, own = "15-mdc-attn-40-l1-4", "14-mdc-attn-40-l1-4"

    def sources(catalog: Catalog) -> dict[str, str]:
        found = {one.id: one.summary()["neuronpedia"]["source"] for one in catalog.hosted}
        assert {catalog.by_source("tiny", source).id for source in found.values()} == set(found)
        return found

    catalog = looked(storage)
    assert sources(catalog) == {"a": "a", "b": "b", "c": own}
    with pytest.raises(UserError, match=f"'{shared}' of 'tiny' may be any of a, b here; ask for one by its id") as said:
        catalog.by_source("tiny", shared)
    assert of_error(said.value).status == 422
    with pytest.raises(NotFoundError, match=f"there is tiny/{own}, tiny/a, tiny/b"):
        catalog.by_source("tiny", "15-nothing")
    promote(storage, "b", "c")
    catalog.refresh()
    assert sources(catalog) == {"a": "a", "b": shared, "c": own}, "the worse one, which somebody chose"
    promote(storage, "a", "b")
    catalog.refresh()
    assert sources(catalog) == {"a": "a", "b": "b", "c": own}


ODD: dict[str, dict[str, Any]] = {
    "no metrics": {"metrics": None},
    "a list of metrics": {"metrics": [0.1]},
    "a text as FVU": {"metrics": {"fvu": "0.1"}},
    "a truth as L0": {"metrics": {"fvu": 0.1, "l0": True}},
    "a metric that is no number": {"metrics": {"fvu": 0.1, "dead_share": float("nan")}},
    "a text as width": {"d_in": "6"},
    "a number as hook": {"hook": 3},
}


@pytest.mark.parametrize("odd", ODD)
def test_a_record_that_makes_no_sense_is_told_of_and_the_others_go_on(tmp_path: Path, odd: str) -> None:
    storage = LocalStorage(tmp_path)
    for sae, (hook, fvu) in PLACES.items():
        write_record(storage, sae, hook, fvu)
    write_record(storage, "odd", PLACES["a"][0], 0.0)
    catalog = looked(storage)
    assert (catalog.default().id, catalog.broken) == ("odd", {}), "0 is the lowest of all"
    record = json.loads(storage.read(layout.record("odd")))
    (tmp_path / layout.record("odd")).write_text(json.dumps(record | ODD[odd]))
    catalog = looked(storage)
    assert set(catalog.broken) == {"odd"}
    assert [one.id for one in catalog.hosted] == list(PLACES)
    assert catalog.default().id == "a"
    record.pop("metrics")
    (tmp_path / layout.record("odd")).write_text(json.dumps(record))
    assert set(looked(storage).broken) == {"odd"}
    shutil.rmtree(tmp_path / "saes" / "odd")
    catalog.refresh()
    assert catalog.broken == {}


def test_the_default_reads_a_model_that_runs_where_there_is_one(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    for sae, (hook, fvu) in PLACES.items():
        write_record(storage, sae, hook, fvu)
    record = json.loads(storage.read(layout.record("a")))
    record["lineage"]["model"]["digest"] = "ffffffffffff"
    storage.write(layout.record("a"), dump(record))
    promote(storage, "a")
    catalog = looked(storage)
    assert catalog.default().id == "a"
    assert catalog.default({("0a1b2c3d4e5f", "trained"): "an interpreter"}).id == "b"
    assert catalog.default({}).id == "a"


def hosting(storage: Storage, *saes: str, **settings: Any) -> Catalog:
    catalog = Catalog(storage, ServeConfig(store=storage.uri, saes=saes, **settings))
    catalog.refresh()
    return catalog


def ids(catalog: Catalog) -> list[str]:
    return [one.id for one in catalog.hosted]


@pytest.fixture
def three(tmp_path: Path) -> LocalStorage:
    (tmp_path / "store").mkdir()
    storage = LocalStorage(tmp_path / "store")
    for sae, (hook, fvu) in PLACES.items():
        write_record(storage, sae, hook, fvu)
    return storage


def test_a_named_sae_that_is_gone_loses_no_other(three: LocalStorage) -> None:
    catalog = hosting(three, "a", "b", "z")
    assert (ids(catalog), set(catalog.missing)) == (["a", "b"], {"z"})
    assert "There is no config, sweep or SAE 'z'" in catalog.missing["z"]
    shutil.rmtree(three.root / "saes" / "a")
    for _ in range(2):  # as it runs, and as it starts again
        catalog.refresh()
        assert (ids(catalog), set(catalog.missing)) == (["b"], {"a", "z"})
        catalog = hosting(three, "a", "b", "z")
    assert (ids(hosting(three, "a")), set(hosting(three, "a").missing)) == ([], {"a"})


def test_a_control_is_hosted_where_it_is_named_and_not_with_all(three: LocalStorage) -> None:
    promote(three, "a")
    for sae in ("d", "e"):
        write_record(three, sae, PLACES["b"][0], 0.5)
        record = json.loads(three.read(layout.record(sae)))
        three.write(layout.record(sae), dump(record | {"sae": record["sae"] | {"control": "untrained"}}))
    assert ids(hosting(three, "all")) == ["a", "b", "c"]
    assert ids(hosting(three, "all", "d")) == ["a", "b", "c", "d"]
    assert ids(hosting(three, PROMOTED, "e")) == ["a", "e"]


def test_a_name_in_a_request_means_what_is_hosted_and_no_other_sae_of_the_store(three: LocalStorage) -> None:
    write_record(three, "bb", PLACES["b"][0])
    for sweep, saes in (("s.1", ["c", "b", "gone"]), ("s.2", ["c"])):
        three.write(layout.sweep_record(sweep), dump({"id": sweep, "sae_ids": saes}))
    catalog = hosting(three, "a", "bb")
    known = {"a": ["a"], "b": ["bb"], "s.1": [], "s.2": []}
    assert {name: catalog.members(name) for name in known} == known
    assert hosting(three, "b", "bb", "c").members("s.1") == ["c", "b"]
    for name, told in (
        ("c", "There is no SAE or sweep 'c' here"),
        ("s", "'s' fits 2 sweeps here; give more of the id"),
    ):
        with pytest.raises(NotFoundError, match=told) as said:
            catalog.members(name)
        assert three.uri not in str(said.value)
    assert hosting(three, "all").members("b") == ["b"]
    assert hosting(three, "a", "bb", "c").members("b") == ["bb"]


def test_a_promoted_sae_that_is_removed_is_hosted_no_more(three: LocalStorage) -> None:
    promote(three, "a", "b")
    catalog = hosting(three, PROMOTED)
    assert (ids(catalog), catalog.missing) == (["a", "b"], {})
    shutil.rmtree(three.root / "saes" / "a")
    catalog.refresh()
    assert (ids(catalog), set(catalog.missing)) == (["b"], {"a"})
    write_record(three, "a", PLACES["a"][0], 0.125)
    catalog.refresh()
    assert (ids(catalog), catalog.missing) == (["a", "b"], {})
    assert catalog.find("a").record["metrics"] == {"fvu": 0.125}


@pytest.mark.parametrize("entry", ['{"id": 1}', "{}", '{"id": "../../etc"}', '{"id": "a/b"}', '"a"', "7", "null"])
def test_an_entry_of_promoted_json_that_names_no_sae_is_left_out(three: LocalStorage, entry: str) -> None:
    promote(three, "a")
    catalog = hosting(three, PROMOTED)
    three.write(layout.PROMOTED, f'{{"v": 1, "saes": [{{"id": "b"}}, {entry}, {{"id": "c"}}]}}'.encode())
    catalog.refresh()
    assert ids(catalog) == ["b", "c"]
    (told,) = catalog.promoted_wrong
    assert told.startswith("Entry 2 of promoted.json")
    promote(three, "a")
    catalog.refresh()
    assert (ids(catalog), catalog.promoted_wrong) == (["a"], [])


@pytest.mark.parametrize("document", ["[]", "{", "", '{"v": 2, "saes": []}', '{"v": 1}', "[" * 100_000])
def test_what_was_promoted_stays_so_while_promoted_json_can_t_be_read(three: LocalStorage, document: str) -> None:
    promote(three, "a")
    catalog = hosting(three, "all")
    three.write(layout.PROMOTED, document.encode())
    write_record(three, "d", PLACES["b"][0], 0.1)
    catalog.refresh()
    assert ids(catalog) == ["a", "b", "c", "d"], "what comes is followed"
    assert [one.id for one in catalog.hosted if one.is_promoted] == ["a"]
    assert len(catalog.promoted_wrong) == 1
    assert ids(hosting(three, "all")) == ["a", "b", "c", "d"]


def until(holds: Callable[[], bool]) -> None:
    ends = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < ends
        time.sleep(0.01)


@pytest.mark.parametrize("wanted", [("all",), ("promoted",), ("a", "b")])
@pytest.mark.parametrize("left", ["nothing", "the mount point", "and a tracker"])
def test_a_store_that_goes_away_is_told_and_what_is_known_stays(
    three: LocalStorage, wanted: tuple[str, ...], left: str
) -> None:
    promote(three, "a", "b")
    catalog = hosting(three, *wanted, refresh_seconds=0.01)
    before = ids(catalog)
    catalog.watch()
    away = three.root.rename(three.root.with_name("away"))
    if left != "nothing":
        three.root.mkdir()
    if left == "and a tracker":
        (three.root / layout.TRACKER).write_bytes(b"")
    until(lambda: catalog.away_since is not None)
    assert ids(catalog) == before
    if left != "nothing":
        shutil.rmtree(three.root)
    away.rename(three.root)
    until(lambda: catalog.away_since is None)
    assert ids(catalog) == before
    catalog.close()


def test_a_store_whose_saes_were_removed_is_not_away(three: LocalStorage) -> None:
    catalog = hosting(three, "all")
    three.write(layout.corpus_manifest("c.1"), b"{}")
    shutil.rmtree(three.root / "saes")
    catalog.refresh()
    assert ids(catalog) == []


def test_what_nobody_foresaw_is_no_store_that_is_away_and_ends_nothing(
    three: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalog = hosting(three, "all", refresh_seconds=0.01)
    with monkeypatch.context() as patched:
        patched.setattr(Catalog, "renew_features", lambda _: 1 / 0)
        catalog.watch()
        until(lambda: catalog.stuck is not None)
        assert (catalog.stuck, catalog.away_since) == ("ZeroDivisionError: division by zero", None)
    until(lambda: catalog.stuck is None)
    write_record(three, "d", PLACES["b"][0])
    until(lambda: "d" in ids(catalog))
    catalog.close()
