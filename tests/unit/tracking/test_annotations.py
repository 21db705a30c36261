"""Notes and tags of people: in the store and in the tracker alike, whoever says them where and when."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from midiscover.errors import NotFoundError, StoreError, TrackingError
from midiscover.launch import parse_job
from midiscover.store.storage import Storage, open_store
from midiscover.tracking.annotations import Annotations, read_annotations
from midiscover.tracking.tracker import Tracker


def test_annotations_stand_in_the_tracker_and_in_the_store(tracker: Tracker, storage: Storage, demo: dict) -> None:
    note = 'it\'s "good"; -- DROP TABLE saes;\n日本 🙂'
    answer = tracker.annotate("demo", note, add_tags=["paper", "first"], remove_tags=["small", "absent"])
    assert answer == Annotations(note, ["first", "paper"]) == read_annotations(storage, "sweep", demo["id"])
    shown = tracker.show(demo["id"])
    assert (shown["note"], shown["tags"]) == (note, ["first", "paper"])
    assert tracker.annotate("demo", add_tags=["x"]).note == note
    assert tracker.annotate("demo", "").note is None
    tracker.annotate(demo["sae_ids"][0], "best so far")
    assert read_annotations(storage, "sae", demo["sae_ids"][0]) == Annotations("best so far", [])


@pytest.mark.parametrize("bad", ["a\0b", "half \ud83d"])
def test_text_that_no_database_takes_is_refused(tracker: Tracker, demo: dict, bad: str) -> None:
    with pytest.raises(TrackingError, match="The note holds"):
        tracker.annotate("demo", bad)
    with pytest.raises(TrackingError, match="A tag holds"):
        tracker.annotate("demo", add_tags=[bad])


def test_a_store_that_fails_takes_the_annotation_back(
    tracker: Tracker, storage: Storage, demo: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise StoreError("disk full")

    monkeypatch.setattr(type(storage), "write", full)
    with pytest.raises(StoreError):
        tracker.annotate("demo", "lost", add_tags=["lost"])
    shown = tracker.show("demo")
    assert (shown["note"], shown["tags"]) == ("a first look", ["first", "small"])


def test_a_tracker_that_knows_less_than_the_store_takes_nothing_back(
    tracker: Tracker, storage: Storage, demo: dict, tmp_path: Path
) -> None:
    """Another database, or one that was lost and begun anew, over the same store."""
    tracker.annotate("demo", "the run of the paper", add_tags=["paper"])
    with Tracker.open(f"sqlite:///{tmp_path / 'other.db'}", storage) as other:
        other.start_sweep(demo)
        said = Annotations("the run of the paper", ["first", "look", "paper"])
        assert other.annotate("demo", add_tags=["look"], remove_tags=["small"]) == said
        assert read_annotations(storage, "sweep", demo["id"]) == said
        shown = other.show("demo")
        assert (shown["note"], shown["tags"]) == said


def test_annotations_of_what_lies_in_another_store_are_refused(
    tracker: Tracker, storage: Storage, demo: dict, address: str, tmp_path: Path
) -> None:
    elsewhere = open_store(str(tmp_path / "elsewhere"))
    with Tracker.open(address, elsewhere) as other:
        for name in (demo["id"], demo["sae_ids"][0]):
            with pytest.raises(NotFoundError, match=rf"{name} does not lie in the store .*elsewhere; .* --store"):
                other.annotate(name, "stray")
    assert elsewhere.list("") == []
    assert tracker.show("demo")["note"] == "a first look"


def test_people_who_annotate_at_once_lose_nothing(tracker: Tracker, storage: Storage, demo: dict, address: str) -> None:
    with Tracker.open(address, storage) as other, ThreadPoolExecutor(8) as pool:
        work = [(each, f"tag {number}") for number in range(8) for each in (tracker, other)]
        list(pool.map(lambda job: job[0].annotate("demo", add_tags=[job[1]]), work))
    expected = sorted({"first", "small"} | {f"tag {number}" for number in range(8)})
    found = read_annotations(storage, "sweep", demo["id"])
    assert found is not None
    assert found.tags == expected == tracker.show("demo")["tags"]


def test_no_transaction_is_open_while_the_store_is_waited_for(
    tracker: Tracker, storage: Storage, demo: dict, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bucket may be away for minutes; PostgreSQL ends a session that holds a transaction for one."""
    real, waited = type(storage).replace, []

    def slow(self: Storage, key: str, old: bytes | None, new: bytes) -> bool:
        with Tracker.open(address) as other:
            other.annotate("demo", "meanwhile")
            waited.append(other.show("demo")["note"])
        return real(self, key, old, new)

    monkeypatch.setattr(type(storage), "replace", slow)
    assert tracker.annotate("demo", "after it").note == "after it"
    assert waited == ["meanwhile"]
    assert tracker.show("demo")["note"] == "after it"


@pytest.mark.parametrize("tag", ["", "  ", "t" * 201])
def test_tags_are_something_and_not_too_long(tracker: Tracker, demo: dict, tag: str) -> None:
    with pytest.raises(TrackingError, match=rf"A tag of {len(tag)} characters can't be kept"):
        tracker.annotate("demo", add_tags=[tag])
    with pytest.raises(TrackingError, match="A tag of"):
        parse_job("sweep", ["demo", "--tag", tag])
    longest = "\U0001f642" * 200
    assert longest in tracker.annotate("demo", add_tags=[longest]).tags
