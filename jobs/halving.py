"""What a card's memory can't hold at once, done in parts: those that fit by reckoning, then halves of them."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch

from midiscover.cards import is_out_of_memory
from midiscover.errors import ModelError
from midiscover.memory import USABLE
from midiscover.sae.replay import end_pools

Part = TypeVar("Part", bound=Sequence[Any])


def room_of_card(share: float) -> int:
    """Bytes that a process with `share` of this card (or with whole ones) may use on it; cards of a cluster differ.

    Asked between two pieces of work: what the one before has left in this process is free again.
    """
    give_back()
    free, total = torch.cuda.mem_get_info()
    return int(USABLE * min(free, total * min(1.0, share)))


def give_back() -> None:
    """Give the card what PyTorch keeps of work that is over."""
    gc.collect()
    end_pools()
    torch.cuda.empty_cache()


def _halves(part: Part) -> tuple[Part, Part] | None:
    middle = len(part) // 2
    return (part[:middle], part[middle:]) if middle else None  # type: ignore[return-value]  # slices are of its type


def in_parts(
    parts: Iterable[Part],
    work: Callable[[Part], Any],
    on_halving: Callable[[Part], Any] = lambda _part: None,
    halves: Callable[[Part], tuple[Part, Part] | None] = _halves,
) -> None:
    """Do `work` on each part, or on halves of a part that was too much, one after another; `on_halving` is told of it.

    The error of a memory that ran out (`is_out_of_memory`) where what has no halves is too much.
    """
    left = deque(parts)
    while left:
        part = left.popleft()
        try:
            work(part)
            continue
        except (RuntimeError, ModelError) as error:
            # A language model that finds no room beside the part says so by a ModelError.
            two = halves(part) if is_out_of_memory(error) or is_out_of_memory(error.__cause__) else None
            if two is None:
                raise
        # Outside the handler, so that what the error's traceback held is free by now.
        give_back()
        on_halving(part)
        left.extendleft(reversed(two))
