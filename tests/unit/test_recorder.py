"""What a sweep's driver tells a tracker that refuses an entry, or does not answer for a while. No Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

import jobs.recorder
from jobs.board import Event
from jobs.recorder import Recorder
from midiscover.errors import TrackingError
from midiscover.store.storage import open_store
from midiscover.tracking import Tracker
from tests.unit.tracking import samples


class Bars:
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def test_what_is_refused_holds_up_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is it taken for an outage, after which everything waits."""
    monkeypatch.setattr(jobs.recorder, "AGAIN_SECONDS", 0.0)
    storage, bars, sweep = open_store(str(tmp_path / "store")), Bars(), samples.sweep()
    with Tracker.open(f"sqlite:///{tmp_path / 'tracker.db'}", storage) as tracker:
        recorder = Recorder(sweep["id"], tracker, storage, bars)  # type: ignore[arg-type]
        recorder.track(lambda tracker: tracker.start_sweep(sweep))
        for name in ("nobody", "stranger"):
            recorder.track(lambda tracker, name=name: tracker.sae_status(name, "trained"))
        away = iter([True, True, False])

        def answers_later(tracker: Tracker) -> None:
            if next(away):
                raise TrackingError("it does not answer.")
            tracker.sae_status(sweep["sae_ids"][0], "trained")

        recorder.track(answers_later)
        recorder.on_event(Event("failed", sweep["sae_ids"][1], "no /data/caf\udce9.txt"))
        recorder.track(lambda tracker: tracker.finish_sweep(sweep["id"], "failed"))
        recorder.settle()
        assert [sae["status"] for sae in tracker.show(sweep["id"])["saes"]] == ["trained", "failed", *["planned"] * 4]
        assert tracker.show(sweep["id"])["status"] == "failed"
    refused = [text for text in bars.said if "goes on without this entry" in text]
    assert len(refused) == 1
    assert "no SAE 'nobody'" in refused[0]
    assert bars.said[-1] == "the tracker refused 2 entries"
    assert sum("waits until the database is back" in text for text in bars.said) == 1
    assert sum("the tracking database is back" in text for text in bars.said) == 1


def test_an_sae_that_fails_again_is_no_step_forward(tmp_path: Path) -> None:
    """So that the watchdog ends a stage in which nothing else happens."""
    storage, sweep = open_store(str(tmp_path / "store")), samples.sweep()
    with Tracker.open(f"sqlite:///{tmp_path / 'tracker.db'}", storage) as tracker:
        recorder = Recorder(sweep["id"], tracker, storage, Bars())  # type: ignore[arg-type]
        recorder.track(lambda tracker: tracker.start_sweep(sweep))
        first, second = sweep["sae_ids"][:2]
        told = [Event("failed", sae, f"try {i}") for i, sae in enumerate((first, first, second, first))]
        assert [recorder.on_event(event) for event in told] == [True, False, True, False]
    assert recorder.failures == {first: "try 3", second: "try 2"}
