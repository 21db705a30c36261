"""What a card's memory can't hold at once, done in parts: those that fit by reckoning, then halves of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch

from midiscover.memory import USABLE

Item = TypeVar("Item")


def room_of_card(share: float) -> int:
    """Bytes that a process with `share` of this card (or with whole ones) may use on it; cards of a cluster differ."""
    free, total = torch.cuda.mem_get_info()
    return int(USABLE * min(free, total * min(1.0, share)))


def in_parts(
    parts: Iterable[Sequence[Item]],
    work: Callable[[Sequence[Item]], Any],
    on_halving: Callable[[Sequence[Item]], Any] = lambda _part: None,
) -> None:
    """Do `work` on each part, or on halves of a part that was too much, one after another; `on_halving` is told of it.

    OutOfMemoryError where one item alone is too much.
    """
    left = deque(parts)
    while left:
        part = left.popleft()
        try:
            work(part)
            continue
        except torch.OutOfMemoryError:
            if len(part) < 2:
                raise
        # Outside the handler, so that what the error's traceback held is free by now.
        torch.cuda.empty_cache()
        on_halving(part)
        middle = len(part) // 2
        left.extendleft((part[middle:], part[:middle]))
