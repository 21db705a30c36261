"""The board of a stage in the test's own process, without a Ray."""

from __future__ import annotations

from typing import Any

from jobs.board import Board, BoardActor


class LocalBoard(Board):
    """Remembers what was told, and counts as the actor does."""

    def __init__(self) -> None:
        super().__init__(BoardActor.__ray_metadata__.modified_class())  # type: ignore[attr-defined]  # ray adds it
        self.told: list[tuple[str, str, Any]] = []

    def post(self, kind: str, key: str, data: Any = None) -> None:
        self.told.append((kind, key, data))

    def exchange(self, key: str, value: Any) -> Any:
        return self.actor.exchange(key, value)

    def recall(self, key: str) -> Any:
        return self.actor.recall(key)

    def start(self, work: str) -> int:
        return self.actor.start(work)

    def reach(self, work: str, part: str, step: int) -> None:
        self.actor.reach(work, part, step)

    def data(self, kind: str) -> list[Any]:
        """Of all events of a kind, in their order."""
        return [data for found, _, data in self.told if found == kind]
