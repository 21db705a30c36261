"""Which SAEs of a store a deployment hosts, and what is known of them. Loads no torch.

A thread looks again every few seconds. Where the store does not answer, what was known goes on being served, and
/health says since when. Records never change, so they are kept; features are read from the store's parquet when first
asked for, and again by the thread where they were written anew.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Container, Mapping, Sequence
from typing import Any, NamedTuple

from midiscover.errors import CorruptError, NotFoundError, StoreError, StoreFailedError, UserError
from midiscover.features.labels import label
from midiscover.features.records import FeatureRecords, open_features
from midiscover.frontier import is_control
from midiscover.promoted import promoted
from midiscover.serving import ALL, MIB, PROMOTED, ServeConfig
from midiscover.store import layout
from midiscover.store.documents import folders_with, read_json
from midiscover.store.storage import Storage
from midiscover.targets import find_target
from serve.hosted import Hosted, require_record, told_apart

FEATURES_BYTES = 2048 * MIB
"""Of all feature records that are kept in memory: enough for the rows of 24 SAEs with 20,480 features, and for the
contexts of some. Where that is too little, those of the SAEs that were asked longest ago make room, contexts first."""
ROW_BYTES = 2048
"""Of a feature's row and label in memory, besides the file."""
FEATURES_FRESH_SECONDS = 60.0
"""After which the watch looks whether they were written anew."""
ABSENT_SECONDS = 5.0
"""How long it is taken for granted that features which were not written down still are not."""
LISTED = ("index", "count", "firing_rate", "mean", "max", "std", "top_tokens", "pos_tokens")
log = logging.getLogger("midiscover.serve")


class Listing(NamedTuple):
    """What listings and searches read of an SAE's features, by index."""

    rows: list[dict[str, Any]]
    """With the columns `LISTED`."""
    labels: list[str]
    """In lower case, to be searched."""


class Catalog:
    """What is hosted now. Safe to use from several threads."""

    def __init__(self, storage: Storage, config: ServeConfig) -> None:
        self.storage, self.config = storage, config
        self._records: dict[str, dict[str, Any]] = {}
        self._broken: dict[str, str] = {}
        self._chosen: Sequence[str] = ()
        self.missing: Mapping[str, str] = {}
        """What was to be hosted and is not in the store, and why."""
        self.promoted_wrong: Sequence[str] = ()
        """What is wrong with promoted.json."""
        self.stuck: str | None = None
        """Why what the store holds can't be looked through, though it answers."""
        self._damaged: set[str] = set()
        self._hosted: dict[str, Hosted] = {}
        self._features: OrderedDict[str, tuple[float, FeatureRecords]] = OrderedDict()
        self._listings: dict[str, tuple[FeatureRecords, Listing]] = {}
        self._absent: dict[str, tuple[float, str]] = {}
        self._sweeps: dict[str, tuple[str, ...]] = {}
        self._lock = threading.Lock()
        self.away_since: float | None = None
        self._ended = threading.Event()

    def refresh(self) -> None:
        """Look once. StoreErrors and OSErrors of a store that is away; what is wrong with an SAE is its own."""
        self._look_at_promoted()
        names, named = self._wanted()
        with self._lock:
            self._records = {name: record for name, record in self._records.items() if name in names}
            self._broken = {name: problem for name, problem in self._broken.items() if name in names}
        hosted = {}
        for name in sorted(names):
            record = self._record(name)
            if record is None or (is_control(record["sae"]) and name not in named):
                continue
            hosted[name] = Hosted(id=name, record=record, is_promoted=name in self._chosen)
        if self._hosted and not hosted:
            self._require_contents()
        with self._lock:
            self._hosted = told_apart(hosted)

    def _require_contents(self) -> None:
        """StoreFailedError where the store has lost all its folders, as one whose disk is no longer mounted."""
        if not any("/" in key for key in self.storage.list("")):
            raise StoreFailedError(f"The store {self.storage.uri} had SAEs and holds nothing now; is it mounted?")

    def watch(self) -> None:
        """Go on looking, in a thread of its own, until `close`."""
        threading.Thread(target=self._watch, name="catalog", daemon=True).start()

    def close(self) -> None:
        """Stop looking."""
        self._ended.set()

    @property
    def hosted(self) -> list[Hosted]:
        """In order of id."""
        with self._lock:
            return [self._hosted[name] for name in sorted(self._hosted)]

    @property
    def broken(self) -> dict[str, str]:
        """SAEs whose record can't be read, and why."""
        with self._lock:
            return dict(self._broken)

    @property
    def damaged(self) -> set[str]:
        """SAEs whose feature records were damaged when they were last read."""
        with self._lock:
            return self._damaged & self._hosted.keys()

    def find(self, prefix: str) -> Hosted:
        """The one hosted SAE whose id is, or begins with, `prefix`. NotFoundError else."""
        with self._lock:
            names = sorted(self._hosted)
            fits = [prefix] if prefix in self._hosted else [name for name in names if name.startswith(prefix)]
            found = self._hosted[fits[0]] if len(fits) == 1 else None
        if prefix and found is not None:
            return found
        if prefix and fits:
            raise NotFoundError(f"'{prefix}' fits {len(fits)} SAEs: {', '.join(fits[:3])}, …")
        more = ", …" if len(names) > 3 else ""
        listed = f"; hosted are {', '.join(names[:3])}{more}" if names else "; none is hosted"
        raise NotFoundError(f"There is no SAE '{prefix}' here{listed}.")

    def default(self, models: Container[tuple[str, str]] | None = None) -> Hosted:
        """The promoted SAE with the lowest FVU, else that of all. NotFoundError where none is hosted.

        models: the language models that run; an SAE of another one is taken only where there is no other SAE.
        """
        hosted = self.hosted
        pool = [one for one in hosted if models is None or one.model in models] or hosted
        pool = [one for one in pool if one.is_promoted] or pool
        if not pool:
            raise NotFoundError("No SAE is hosted; train one, or promote one that is there.")
        return min(pool, key=_by_fvu)

    def by_source(self, model: str, source: str) -> Hosted:
        """The SAE of this source. NotFoundError where there is none, UserError where several would have the name."""
        of_model = [one for one in self.hosted if one.neuronpedia_model == model]
        found = next((one for one in of_model if one.source == source), None)
        if found is not None:
            return found
        several = [one.id for one in of_model if one.usual_source == source]
        if several:
            raise UserError(f"'{source}' of '{model}' may be any of {', '.join(several)} here; ask for one by its id.")
        known = sorted({f"{one.neuronpedia_model}/{one.source}" for one in self.hosted})[:4]
        raise NotFoundError(f"There is no source '{source}' of '{model}' here; there is {', '.join(known) or 'none'}.")

    def members(self, name: str) -> list[str]:
        """The hosted SAEs whose ids begin with `name`, else those of the sweep whose id does; no other of the store.

        NotFoundError where it is the beginning of neither, or of several sweeps'.
        """
        hosted = [one.id for one in self.hosted]
        fits = [name] if name in hosted else [sae for sae in hosted if sae.startswith(name)]
        if fits:
            return fits
        try:
            self._sweeps[name] = self._sweep(name)
        except StoreFailedError:  # it is away, and what was known of the sweep goes on being so
            if name not in self._sweeps:
                raise
        return [sae for sae in self._sweeps[name] if sae in hosted]

    def _sweep(self, name: str) -> tuple[str, ...]:
        """The SAEs of a sweep, hosted or not."""
        sweeps = [one for one in folders_with(self.storage, layout.SWEEPS, "sweep.json") if one.startswith(name)]
        fits = [name] if name in sweeps else sweeps
        if len(fits) > 1:
            raise NotFoundError(f"'{name}' fits {len(fits)} sweeps here; give more of the id.")
        sweep = read_json(self.storage, layout.sweep_record(fits[0])) if fits else None
        if sweep is None:
            raise NotFoundError(f"There is no SAE or sweep '{name}' here; /saes and /runs list what there is.")
        return tuple(sweep["sae_ids"])

    def features(self, sae_id: str) -> FeatureRecords:
        """The feature records of an SAE; NotFoundError where they are not written down, for some seconds unasked."""
        with self._lock:
            held, absent = self._features.get(sae_id), self._absent.get(sae_id)
            if held is not None:
                self._features.move_to_end(sae_id)
                self._make_room()  # contexts may have been read since
                return held[1]
        if absent is not None and time.monotonic() - absent[0] < ABSENT_SECONDS:
            raise NotFoundError(absent[1])
        try:
            found = open_features(self.storage, sae_id)
        except NotFoundError as error:
            with self._lock:
                self._absent[sae_id] = (time.monotonic(), str(error))
            raise
        with self._lock:
            self._absent.pop(sae_id, None)
            self._features[sae_id] = (time.monotonic(), found)
            self._features.move_to_end(sae_id)
            self._make_room()
        return found

    def _make_room(self) -> None:
        """Let go of what is above FEATURES_BYTES, under the lock; the SAE that was asked last stays as it is."""
        above = sum(_in_memory(records) for _, records in self._features.values()) - FEATURES_BYTES
        older = [(name, records) for name, (_, records) in self._features.items()][:-1]
        for _, records in older:
            if above <= 0:
                break
            before = records.bytes
            records.let_contexts_go()
            above -= before - records.bytes
        for name, records in older:
            if above <= 0:
                break
            above -= _in_memory(records)
            del self._features[name]
        self._listings = {name: kept for name, kept in self._listings.items() if name in self._features}

    def listing(self, sae_id: str) -> Listing:
        """One row for each feature, and its label; read once. Errors as of `features`; CorruptError is remembered."""
        with self._lock:
            known = self._known_listing(sae_id)
            if known is not None:  # a search asks for all of them, so that nothing is added up here
                self._features.move_to_end(sae_id)
                return known
        try:
            records = self.features(sae_id)
            rows = records.rows(LISTED)
        except CorruptError as error:
            self._note_damage(sae_id, error)
            raise
        found = Listing(rows, [label(row).casefold() for row in rows])
        with self._lock:
            self._damaged.discard(sae_id)
            self._listings[sae_id] = (records, found)
            self._make_room()
        return found

    def rows(self, sae_id: str) -> list[dict[str, Any]]:
        """Those of `listing`."""
        return self.listing(sae_id).rows

    def known_rows(self, sae_id: str) -> list[dict[str, Any]] | None:
        """`rows` where they are in memory and nothing has to be read."""
        with self._lock:
            known = self._known_listing(sae_id)
        return known.rows if known is not None else None

    def _known_listing(self, sae_id: str) -> Listing | None:
        """That of the records in memory, under the lock."""
        features, held = self._features.get(sae_id), self._listings.get(sae_id)
        return held[1] if features is not None and held is not None and held[0] is features[1] else None

    def renew_features(self) -> None:
        """Look whether features that are in memory were written anew, so that no request has to wait for it."""
        now = time.monotonic()
        with self._lock:
            stale = [(name, held) for name, (at, held) in self._features.items() if now - at > FEATURES_FRESH_SECONDS]
        for name, held in stale:
            try:
                found: FeatureRecords | None = open_features(self.storage, name)
            except NotFoundError:
                found = None
            except CorruptError as error:  # of a manifest; what is in memory goes on being served
                self._note_damage(name, error)
                continue
            with self._lock:
                if name not in self._features:
                    continue
                if found is None:
                    del self._features[name]
                else:  # an unchanged one has its files open already
                    kept = held.renewed(found.explained) if held.manifest == found.manifest else found
                    self._features[name] = (now, kept)
                    if kept is found or name in self._listings:  # whose rows are whole
                        self._damaged.discard(name)

    def _note_damage(self, sae_id: str, error: CorruptError) -> None:
        with self._lock:
            is_new = sae_id not in self._damaged
            self._damaged.add(sae_id)
        if is_new:
            log.warning("features_damaged", extra={"fields": {"sae": sae_id, "reason": str(error)}})

    def _look_at_promoted(self) -> None:
        """Where promoted.json can't be read, what was promoted before stays so."""
        wrong: list[str] = []
        try:
            self._chosen = [entry["id"] for entry in promoted(self.storage, wrong.append)]
        except (StoreError, OSError):
            raise  # it says nothing of this file
        except Exception as error:  # whatever somebody else wrote there
            wrong = [str(error)]
        for told in wrong:
            if told not in self.promoted_wrong:
                log.warning("promoted_wrong", extra={"fields": {"reason": told}})
        self.promoted_wrong = wrong

    def _wanted(self) -> tuple[set[str], set[str]]:
        """What is to be hosted, of the SAEs that are there, and what of it is named; keeps why the rest is missing."""
        names: set[str] = set()
        named: set[str] = set()
        missing: dict[str, str] = {}
        for wanted in self.config.saes:
            if wanted == ALL:
                names |= set(folders_with(self.storage, layout.SAES, "record.json"))
            elif wanted == PROMOTED:
                there = {sae for sae in self._chosen if self.storage.exists(layout.record(sae))}
                names |= there
                missing |= {sae: f"{sae} is promoted and not in the store." for sae in set(self._chosen) - there}
            else:
                try:
                    named |= set(find_target(self.storage, wanted).saes)
                except (StoreError, OSError):
                    raise
                except Exception as error:  # of this one alone: it is gone, or its sweep.json is damaged
                    missing[wanted] = str(error)
        for name in missing.keys() - self.missing.keys():
            log.warning("sae_missing", extra={"fields": {"sae": name, "reason": missing[name]}})
        self.missing = missing
        return names | named, named

    def _record(self, name: str) -> dict[str, Any] | None:
        """None, with the reason kept, for one that makes no sense: the others go on."""
        if name in self._records:
            return self._records[name]
        record = None
        try:
            record = read_json(self.storage, layout.record(name))
            if record is None:
                return None
            require_record(record, name)
        except StoreError:
            raise  # it says nothing of this one
        except Exception as error:  # a record that somebody else wrote can hold anything
            problem = f"{name}: its record.json is not readable ({type(error).__name__})."
            reason = str(error)
        else:
            self._records[name] = record
            with self._lock:
                self._broken.pop(name, None)
            return record
        with self._lock:
            is_new = self._broken.get(name) != problem
            self._broken[name] = problem
        if is_new:
            log.warning("sae_broken", extra={"fields": {"sae": name, "reason": reason}})
        return None

    def _watch(self) -> None:
        while not self._ended.wait(self.config.refresh_seconds):
            stuck = None
            try:
                self.refresh()
                self.renew_features()
                self.away_since = None
            except (StoreError, OSError) as error:  # a store that is away must not end the thread
                if self.away_since is None:
                    self.away_since = time.time()
                    log.warning("store_away", extra={"fields": {"reason": str(error)}})
            except Exception as error:  # nor must what nobody foresaw
                self.away_since, stuck = None, f"{type(error).__name__}: {error}"
                if stuck != self.stuck:
                    log.exception("catalog_stuck", extra={"fields": {"reason": stuck}})
            self.stuck = stuck


def _by_fvu(one: Hosted) -> tuple[float, str]:
    fvu = one.record["metrics"].get("fvu")
    return float("inf") if fvu is None else fvu, one.id


def _in_memory(records: FeatureRecords) -> int:
    """Bytes."""
    return records.bytes + ROW_BYTES * records.d_sae
