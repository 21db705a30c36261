"""What a deployment keeps of features in memory, and when it looks again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from midiscover.errors import CorruptError
from midiscover.features.explanations import Explanations
from midiscover.features.records import FeatureRecords
from midiscover.store.local import LocalStorage
from serve.catalog import ROW_BYTES, Catalog
from tests.unit.features.naive import D_SAE, finish, make_world, whole
from tests.unit.serve.test_catalog import PLACES, looked, write_record


@pytest.fixture
def described(tmp_path: Path) -> Catalog:
    """Three SAEs with feature records."""
    world = make_world(tmp_path)
    part = whole(world)
    for sae, (hook, fvu) in PLACES.items():
        write_record(world.storage, sae, hook, fvu)
        finish(world, part, None, sae)
    return looked(world.storage)


def files_of(catalog: Catalog, sae: str) -> tuple[int, int]:
    """Bytes of features.parquet, and of contexts.parquet."""
    folder = Path(catalog.storage.uri) / "saes" / sae / "features"
    features, contexts = ((next(folder.glob(f"*/{name}.parquet"))).stat().st_size for name in ("features", "contexts"))
    return features, contexts


def test_contexts_make_room_before_rows_do(described: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    saes = list(PLACES)
    rows = sum(files_of(described, sae)[0] + ROW_BYTES * D_SAE for sae in saes)
    contexts = {sae: files_of(described, sae)[1] for sae in saes}
    monkeypatch.setattr("serve.catalog.FEATURES_BYTES", rows + 2 * max(contexts.values()))
    for sae in saes:
        described.rows(sae)
        described.features(sae).contexts(9)
    held = {sae: described.features(sae) for sae in saes}  # "a" comes back before "b" is asked again
    assert [held[sae].bytes - files_of(described, sae)[0] for sae in saes] == [contexts["a"], 0, contexts["c"]]
    assert all(described.known_rows(sae) for sae in saes)
    assert held["b"].contexts(9) == held["a"].contexts(9), "they are read again"
    assert described.features("c").bytes > files_of(described, "c")[0]
    assert held["a"].bytes == files_of(described, "a")[0]
    monkeypatch.setattr("serve.catalog.FEATURES_BYTES", rows - 1)
    described.features("c")
    assert [sae for sae in saes if described.known_rows(sae)] == ["b", "c"]


def test_sizes_are_added_up_once_and_only_where_something_was_read(
    described: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, saes = Path(described.storage.uri) / "saes", [f"a{number}" for number in range(30)]
    for sae in saes:
        shutil.copytree(folder / "a", folder / sae)
        described.listing(sae)
        described.features(sae).contexts(9)
    asked: list[FeatureRecords] = []
    size = FeatureRecords.bytes.fget
    assert size is not None
    monkeypatch.setattr(FeatureRecords, "bytes", property(lambda self: asked.append(self) or size(self)))
    for sae in saes:
        described.listing(sae)
    assert asked == [], "a search of what is in memory"
    described.features(saes[0])
    assert len(asked) == len(saes)
    asked.clear()
    monkeypatch.setattr("serve.catalog.FEATURES_BYTES", 0)
    described.features(saes[7])
    assert [sae for sae in saes if described.known_rows(sae)] == [saes[7]]
    assert len(asked) < 4 * len(saes)


def test_what_is_said_of_features_later_is_seen(described: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.catalog.FEATURES_FRESH_SECONDS", -1.0)
    before = described.features("b")
    fired = next(row["index"] for row in described.rows("b") if row["count"])
    described.renew_features()
    assert described.features("b") is before
    said = Explanations(described.storage, "b", before.features_id, "some-model", {})
    said.add({fired: {"text": "Words about Rain", "made": "2026"}})
    opened: list[str] = []
    read = LocalStorage.read
    monkeypatch.setattr(LocalStorage, "read", lambda self, key, *given: opened.append(key) or read(self, key, *given))
    described.renew_features()
    listing = described.listing("b")
    assert listing.labels[fired] == "words about rain"
    assert listing.rows[fired]["explanation"] == "Words about Rain"
    assert described.features("b").feature(fired)["explanation"] == "Words about Rain"
    assert "explanation" not in described.rows("a")[fired]
    assert not [key for key in opened if key.endswith("b/features.parquet")], "what was read is read no second time"


def test_damaged_features_are_told_of_until_they_are_whole(described: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.catalog.FEATURES_FRESH_SECONDS", -1.0)
    folder = Path(described.storage.uri) / "saes" / "b" / "features"
    (file,), (manifest,) = folder.glob("*/features.parquet"), folder.glob("*/manifest.json")
    whole = {path: path.read_bytes() for path in (file, manifest)}
    file.write_bytes(b"not " + whole[file])
    with pytest.raises(CorruptError, match="differs from what was written"):
        described.listing("b")
    described.renew_features()
    assert described.damaged == {"b"}
    file.write_bytes(whole[file])
    assert len(described.listing("b").rows) == D_SAE
    assert described.damaged == set()
    manifest.write_bytes(b"{")
    described.renew_features()
    assert described.damaged == {"b"}
    assert len(described.listing("b").rows) == D_SAE, "what is in memory goes on being served"
    manifest.write_bytes(whole[manifest])
    described.renew_features()
    assert described.damaged == set()
    described._damaged.add("gone")
    assert described.damaged == set(), "it is not hosted"
