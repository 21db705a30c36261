"""What a replica keeps in memory: SAEs, loaded when they are first asked for, and activations it has computed.

Both are bounded by bytes, and what was asked for longest ago makes room.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from midiscover.errors import CorruptError, MiDiscoverError, NotFoundError, StoreError, UserError
from midiscover.saes import WEIGHTS, LoadedSae, load_stored
from midiscover.store import layout
from midiscover.store.storage import Storage

AGAIN_SECONDS = 5.0
"""How long an SAE that could not be loaded is left alone before it is tried again."""
log = logging.getLogger("midiscover.serve")


class SaeUnavailableError(MiDiscoverError):
    """An SAE that is hosted can't be loaded or asked this now; says why. The others are not harmed."""


class SaeShelf:
    """SAEs of one store. Safe to use from several threads; two that ask for one SAE load it once."""

    def __init__(self, storage: Storage, device: str, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        """limit: bytes of all that are kept; the one asked for is kept whatever its size, unless it alone is larger."""
        self._storage, self._device, self._limit, self._clock = storage, device, limit, clock
        self._saes: OrderedDict[str, tuple[LoadedSae, int]] = OrderedDict()
        self._failed: dict[str, tuple[float, str]] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()
        self.loads = 0

    def held(self, sae_id: str) -> LoadedSae | None:
        """The SAE where it is loaded."""
        with self._lock:
            if sae_id not in self._saes:
                return None
            self._saes.move_to_end(sae_id)
            return self._saes[sae_id][0]

    def get(self, sae_id: str) -> LoadedSae:
        """The SAE, loaded if need be. SaeUnavailableError, at once for some seconds after it failed."""
        found = self.held(sae_id)
        if found is not None:
            return found
        with self._lock:
            lock = self._locks.setdefault(sae_id, threading.Lock())
        with lock:
            found = self.held(sae_id)
            if found is not None:
                return found
            failed = self._failed.get(sae_id)
            if failed is not None and self._clock() - failed[0] < AGAIN_SECONDS:
                raise SaeUnavailableError(failed[1])
            try:
                loaded = self._load(sae_id)
            except Exception as error:  # whatever is in a folder that somebody else wrote
                log.warning("sae_not_loaded", extra={"fields": {"sae": sae_id, "reason": str(error)}})
                told = f"{sae_id} can't be loaded: {_reason(error).rstrip('.')}."
                self._failed[sae_id] = (self._clock(), told)
                raise SaeUnavailableError(told) from error
            self._failed.pop(sae_id, None)
            self._keep(sae_id, loaded)
            return loaded

    @property
    def bytes(self) -> int:
        """Of all that are loaded."""
        with self._lock:
            return sum(size for _, size in self._saes.values())

    @property
    def ids(self) -> list[str]:
        """Those that are loaded, the one asked for last at the end."""
        with self._lock:
            return list(self._saes)

    def require_room(self, sae_ids: Sequence[str]) -> None:
        """UserError for SAEs that can't all be in memory at once, before one is loaded."""
        total = sum(self._size(name) for name in sae_ids)
        if total > self._limit:
            raise UserError(
                f"These {len(sae_ids)} SAEs take {total / 1e6:,.1f} MB together, and sae_bytes allows "
                f"{self._limit / 1e6:,.1f}; ask fewer at once."
            )

    def _size(self, sae_id: str) -> int:
        """Bytes of an SAE's weights; 0 where there are none."""
        with self._lock:
            if sae_id in self._saes:
                return self._saes[sae_id][1]
        name = layout.sae_file(sae_id, WEIGHTS)
        return next((entry.bytes for entry in self._storage.entries(layout.sae_folder(sae_id)) if entry.key == name), 0)

    def _load(self, sae_id: str) -> LoadedSae:
        size = self._size(sae_id)
        if size > self._limit:
            raise SaeUnavailableError(f"its {size / 1e6:,.0f} MB are more than sae_bytes allows")
        return load_stored(self._storage, sae_id, device=self._device)

    def _keep(self, sae_id: str, loaded: LoadedSae) -> None:
        size = sum(tensor.numel() * tensor.element_size() for tensor in loaded.module.state_dict().values())
        with self._lock:
            self.loads += 1
            self._saes[sae_id] = (loaded, size)
            while sum(each for _, each in self._saes.values()) > self._limit and len(self._saes) > 1:
                self._saes.popitem(last=False)


def _reason(error: Exception) -> str:
    """For who asked; whose sentence names the store is in the log alone."""
    if isinstance(error, StoreError):
        return "the store does not answer now"
    if isinstance(error, (CorruptError, NotFoundError)):
        return "what the store holds of it is damaged"
    return str(error) if isinstance(error, MiDiscoverError) else type(error).__name__


class ActivationCache:
    """Activations by hook and token ids, as the model gave them. Used by one thread."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._rows: OrderedDict[tuple[str, bytes], Tensor] = OrderedDict()
        self.bytes = self.hits = self.misses = 0

    def get(self, hook: str, ids: Sequence[int]) -> Tensor | None:
        """[t, d_in] for these ids, or None."""
        key = hook, _digest(ids)
        found = self._rows.get(key)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self._rows.move_to_end(key)
        return found

    def put(self, hook: str, ids: Sequence[int], rows: Tensor) -> None:
        """Keep [t, d_in]; what was asked for longest ago goes. Nothing larger than a quarter of all is kept."""
        size = rows.numel() * rows.element_size()
        if size * 4 > self._limit:
            return
        key = hook, _digest(ids)
        old = self._rows.pop(key, None)
        self.bytes -= 0 if old is None else old.numel() * old.element_size()
        # A copy of its own: a slice would keep the whole batch.
        self._rows[key] = rows.clone()
        self.bytes += size
        while self.bytes > self._limit:
            _, gone = self._rows.popitem(last=False)
            self.bytes -= gone.numel() * gone.element_size()


def _digest(ids: Sequence[int]) -> bytes:
    return hashlib.blake2b(torch.tensor(ids, dtype=torch.int32).numpy().tobytes(), digest_size=16).digest()
