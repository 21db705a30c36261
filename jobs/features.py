"""Feature records of finished SAEs. `python -m jobs.features CONFIG|SWEEP|SAE [--store URI] [--features.key value]`

Ray Data runs actors over chunks of stored activations, a read of each block for all SAEs of its hook. Each actor writes
one part per SAE to the store and returns nothing else; then a task per SAE merges its parts and writes the records,
manifest last. A kill costs the chunks that were open; a second run makes nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import ray

from jobs.board import Board, Event, watched
from jobs.halving import in_parts
from jobs.harvest import commit_manifests, ensure_corpus, harvest
from jobs.progress import Bars
from jobs.readers import Reading
from jobs.runtime import Cluster, Slots, last_line, model_slots, own_error, ray_data, ray_session, run_main
from midiscover import tables
from midiscover.config import FeaturesConfig, ResourcesConfig, RunConfig
from midiscover.configio import build_config, to_tree
from midiscover.cores import compute_on
from midiscover.corpus import Corpus, standing_corpus
from midiscover.errors import ConfigError, StageError, TrackingError
from midiscover.features.collect import Part, collect_chunk, merged
from midiscover.features.finish import Finisher
from midiscover.features.plan import Plan, plan_features
from midiscover.features.records import open_features
from midiscover.hooknames import is_residual
from midiscover.ids import features_id
from midiscover.launch import JobArgs, Prepared, TargetArgs, parse_target
from midiscover.lm import load_tokenizer
from midiscover.models import ModelIdentity, model_type
from midiscover.origin import resolve_origin, run_config
from midiscover.resolve import resolve
from midiscover.saes import load_trained
from midiscover.source import harvested
from midiscover.store import layout
from midiscover.store.blocks import is_harvested
from midiscover.store.documents import read_json
from midiscover.store.manifest import BlockRow
from midiscover.store.storage import Storage, open_store
from midiscover.targets import Target, find_target
from midiscover.tokens import TokenStrings
from midiscover.tracking import Tracker
from midiscover.tracking.rows import FEATURE_COLUMNS
from midiscover.unembedding import read_unembedding

Record = Mapping[str, Any]

ANNOUNCE_SECONDS = 3600
"""How often it is said again that activations are read, which keeps them for a day."""
MOST_FINISHING = 8
"""Tasks that write records at once: each holds all examples of an SAE, 350 MB at 20,480 features."""


class Site(NamedTuple):
    """SAEs that read the same stored rows."""

    harvest_id: str
    corpus_id: str
    hook: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What the records of this run are made with; travels to the actors."""

    storage: Storage
    settings: FeaturesConfig

    @property
    def features_id(self) -> str:
        """Under which the records stand in the folder of each SAE."""
        return features_id(self.settings)

    def plan(self, site: Site) -> Plan:
        """The rows that are read of a site."""
        return plan_features(harvested(self.storage, site.harvest_id, site.hook), self.settings)

    def part_key(self, sae_id: str, chunk: int, chunks: int) -> str:
        """Where the part of a chunk lies. Another number of chunks has other names."""
        return layout.features_file(sae_id, self.features_id, f"parts/{chunk:05d}-of-{chunks:05d}.safetensors")

    def remove_parts(self, sae_id: str) -> None:
        """Of an SAE whose records stand."""
        for key in self.storage.list(layout.features_file(sae_id, self.features_id, "parts")):
            self.storage.delete(key)


class FeatureActor:
    """Takes chunks; writes a part for each SAE that has none yet."""

    def __init__(self, run: Run, threads: int, gpu: bool, board: Board) -> None:
        self.run, self.threads, self.device, self.board = run, threads, "cuda" if gpu else "cpu", board

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """One chunk in; out come how many SAEs have their part, and how many rows were read for them."""
        compute_on(self.threads)
        for text in batch["chunk"]:
            item = json.loads(text)
            site, number, count = Site(*item["site"]), item["chunk"], item["chunks"]
            keys = {sae: self.run.part_key(sae, number, count) for sae in item["saes"]}
            missing = {sae: key for sae, key in keys.items() if not self.run.storage.exists(key)}
            plan = self.run.plan(site)
            blocks = plan.chunks(count)[number]
            if missing:
                self._collect(missing, plan, blocks)
            yield {"parts": [len(keys)], "rows": [sum(block.rows for block in blocks) if missing else 0]}

    def _collect(self, missing: Mapping[str, str], plan: Plan, blocks: Sequence[BlockRow]) -> None:
        """Write one chunk's parts: SAE id -> key. Where a card's memory ends, some of the SAEs after the others."""

        def collect(some: Sequence[str]) -> None:
            parts = collect_chunk(
                self.run.storage,
                {sae: load_trained(self.run.storage, sae) for sae in some},
                plan,
                blocks,
                device=self.device,
                progress=lambda rows: self.board.post("tokens", "features", rows * len(some) / len(missing)),
            )
            for sae, part in parts.items():
                self.run.storage.write(missing[sae], part.to_bytes())

        in_parts([[*missing]], collect)


@ray.remote(max_retries=3)
def finish_sae(
    run: Run, site: Site, sae_id: str, chunks: int, identity: ModelIdentity, threads: int, gpu: bool
) -> dict[str, Any]:
    """Merge the parts of one SAE, write its records, remove the parts; returns the manifest."""
    storage = run.storage
    standing = read_json(storage, layout.features_manifest(sae_id, run.features_id))
    if standing is not None:  # of a try whose process died while it removed the parts
        run.remove_parts(sae_id)
        return standing
    compute_on(threads)
    keys = [run.part_key(sae_id, chunk, chunks) for chunk in range(chunks)]
    sae = load_trained(storage, sae_id)
    record = _record(storage, sae_id)
    # The matrix of a model whose weights were shuffled in memory is in no file, and would name no tokens.
    shuffled = record["lineage"]["model"].get("weights") == "shuffled"
    legible = is_residual(record.get("output_hook") or record["hook"], model_type(identity))
    manifest = Finisher(
        storage=storage,
        sae_id=sae_id,
        sae=sae,
        plan=run.plan(site),
        corpus=Corpus.open(storage, site.corpus_id),
        strings=TokenStrings(load_tokenizer(identity)),
        unembedding=read_unembedding(identity) if legible and not shuffled else None,
        device="cuda" if gpu else "cpu",
    ).finish(merged(Part.from_bytes(storage.read(key)) for key in keys))
    run.remove_parts(sae_id)
    return manifest


class FeaturesRun:
    """One run of the driver."""

    def __init__(self, args: TargetArgs, bars: Bars) -> None:
        self.args, self.bars = args, bars
        self.storage = open_store(args.store, create=False)
        self.target, settings, self.resources = _target(self.storage, args)
        self.run = Run(storage=self.storage, settings=settings)
        self.records: dict[str, Record] = {sae: _record(self.storage, sae) for sae in self.target.saes}
        self.began = time.monotonic()

    def make(self) -> list[dict[str, Any]]:
        """Make what is missing; returns the manifests of all SAEs of the target."""
        if self.args.force:
            self._forget()
        todo = [sae for sae in self.target.saes if not self._stands(sae)]
        for sae in set(self.target.saes).difference(todo):
            self.run.remove_parts(sae)  # of a run that was killed after its last word
        if not todo:
            self.bars.say(f"the features of {len(self.target.saes)} SAEs stand already; nothing is read")
        else:
            # Models are looked up before Ray is started: what is wrong with them is said at once.
            identities = {sae: resolve_origin(self.records[sae], self.args.store) for sae in todo}
            sites: dict[Site, list[str]] = {}
            for sae in todo:
                sites.setdefault(_site(self.records[sae]), []).append(sae)
            with ray_session(self.resources.nodes, self.bars.say) as cluster:
                self._read(sites, identities, cluster)
        manifests = [open_features(self.storage, sae, self.run.features_id).manifest for sae in self.target.saes]
        self._track(todo)
        return manifests

    def _stands(self, sae: str) -> bool:
        return self.storage.exists(layout.features_manifest(sae, self.run.features_id))

    def _forget(self) -> None:
        for sae in self.target.saes:
            said = layout.explanations_folder(sae, self.run.features_id) + "/"  # which holds of the same records anew
            listed = self.storage.list(layout.features_folder(sae, self.run.features_id))
            keys = [key for key in listed if not key.startswith(said)]
            for key in sorted(keys, key=lambda key: not key.endswith("manifest.json")):
                self.storage.delete(key)

    def _read(self, sites: Mapping[Site, list[str]], identities: Mapping[str, ModelIdentity], cluster: Cluster) -> None:
        with Reading(self.storage, (site.harvest_id for site in sites)) as reading:
            self._ensure_rows(sites, cluster)
            reading.announce()  # a harvest may have taken more than a day
            self._collect(sites, identities, cluster, reading)

    def _ensure_rows(self, sites: Mapping[Site, list[str]], cluster: Cluster) -> None:
        """Harvest again what is gone, or was never there, as for SAEs from elsewhere."""
        lacking: dict[str, list[Record]] = {}
        for site, saes in sites.items():
            has_rows = is_harvested(self.storage, site.harvest_id, site.hook)
            if has_rows and standing_corpus(self.storage, site.corpus_id) is not None:
                continue
            gone = "the text" if has_rows else "its activations"
            self.bars.say(f"{site.hook}: {gone} can't be found in the store and will be made again")
            lacking.setdefault(site.harvest_id, []).append(self.records[saes[0]])
        for harvest_id, records in lacking.items():
            self._harvest(harvest_id, records, cluster)

    def _harvest(self, harvest_id: str, records: Sequence[Record], cluster: Cluster) -> None:
        """One pass of the language model for the hooks of all these SAEs, whose harvest is the same."""
        configs = [run_config(record) for record in records]
        hooks = dict.fromkeys(hook for config in configs for hook in config.harvest.hooks)
        config = replace(configs[0], harvest=replace(configs[0].harvest, hooks=tuple(hooks)), resources=self.resources)
        resolved = resolve(config, self.storage.uri)
        if resolved.harvest_id != harvest_id:
            raise StageError(
                f"The activations of {records[0]['id']} can't be had again: its settings lead to {resolved.harvest_id} "
                f"now, and its record names {harvest_id}; its text or model has changed."
            )
        with Tracker.for_store(self.storage) as tracker:
            args = JobArgs(config=records[0]["id"], store=self.args.store)
            prepared = Prepared(args=args, resolved=resolved, storage=self.storage, tracker=tracker)
            corpus = ensure_corpus(prepared, self.bars)
            harvest(prepared, corpus, cluster, self.bars)
            commit_manifests(resolved, corpus, self.storage)

    def _collect(
        self,
        sites: Mapping[Site, list[str]],
        identities: Mapping[str, ModelIdentity],
        cluster: Cluster,
        reading: Reading,
    ) -> None:
        slots = model_slots(cluster, replace(self.resources, gpus_per_model=1))  # no language model is loaded
        plans = {site: self.run.plan(site) for site in sites}
        counts = {site: len(plan.chunks(slots.count)) for site, plan in plans.items()}
        counter = _Rows(self.bars, sum(plan.rows for plan in plans.values()), reading.announce)
        with watched("features", counter.on_event, stall_seconds=self.resources.stall_seconds) as board:
            items = [
                json.dumps({"site": site, "chunk": chunk, "chunks": counts[site], "saes": saes})
                for site, saes in sites.items()
                for chunk in range(counts[site])
            ]
            counter.done(self._run_actors(items, slots, board))
            self._finish(sites, counts, identities, slots, board)

    def _run_actors(self, items: Sequence[str], slots: Slots, board: Board) -> int:
        """Read what is missing; returns the rows that were read."""
        data = ray_data()  # here: only where something is to be read
        rows = data.from_items([{"chunk": item} for item in items], override_num_blocks=len(items)).map_batches(
            FeatureActor,
            fn_constructor_kwargs={
                "run": self.run,
                "threads": slots.threads,
                "gpu": slots.gpus > 0,
                "board": board,
            },
            batch_size=1,
            compute=data.ActorPoolStrategy(size=min(slots.count, len(items))),
            num_cpus=slots.cpus,
            num_gpus=slots.gpus,
        )
        try:
            return sum(row["rows"] for row in rows.iter_rows())
        except Exception as error:
            raise own_error(error) or StageError(f"The features failed: {last_line(error)}") from error

    def _finish(
        self,
        sites: Mapping[Site, list[str]],
        counts: Mapping[Site, int],
        identities: Mapping[str, ModelIdentity],
        slots: Slots,
        board: Board,
    ) -> None:
        # Much of it runs in one thread, so on CPU as many go side by side as there are threads.
        side_by_side = slots.count if slots.gpus else max(1, min(slots.count * slots.threads, MOST_FINISHING))
        task = finish_sae.options(num_cpus=1, num_gpus=slots.gpus)  # type: ignore[attr-defined]  # ray adds it
        waiting = [(site, sae) for site, saes in sites.items() for sae in saes]
        total, running = len(waiting), []
        try:
            while waiting or running:
                while waiting and len(running) < side_by_side:
                    site, sae = waiting.pop(0)
                    place = (1, slots.gpus > 0)
                    running.append(task.remote(self.run, site, sae, counts[site], identities[sae], *place))
                done, running = ray.wait(running, num_returns=1)
                manifest = ray.get(done[0])
                board.post("finished", manifest["sae"], 0)
                ended = total - len(waiting) - len(running)
                self.bars.update("records", ended, total, f"{manifest['sae']}: {manifest['alive']:,} features alive")
        except Exception as error:
            raise own_error(error) or StageError(f"The features failed: {last_line(error)}") from error

    def _track(self, made: Sequence[str]) -> None:
        """Scalars into the tracker; a database that is away is caught up with by `runs reindex`."""
        try:
            with Tracker.for_store(self.storage) as tracker:
                for sae in made:
                    tracker.record_sae(self.records[sae])
                    found = open_features(self.storage, sae, self.run.features_id)
                    tracker.record_features(sae, self.run.features_id, found.table(FEATURE_COLUMNS).to_pylist())
        except TrackingError as error:
            self.bars.say(f"the tracker was not told: {error} `midiscover runs reindex` catches up.")


class _Rows:
    """Rows that all actors have read, as one bar; `announce` is called again and again, so long as they read."""

    def __init__(self, bars: Bars, total: int, announce: Callable[[], None]) -> None:
        self.bars, self.total, self.rows, self.began = bars, total, 0.0, time.monotonic()
        self.announce, self.announced = announce, self.began
        bars.update("features", 0, total, "starting")

    def on_event(self, event: Event) -> bool:
        if event.kind != "tokens":
            return True
        self.rows += event.data
        if time.monotonic() - self.announced > ANNOUNCE_SECONDS:
            self.announce()
            self.announced = time.monotonic()
        rate = self.rows / max(time.monotonic() - self.began, 1e-9)
        self.bars.update("features", min(self.rows, self.total), self.total, f"{self.rows:,.0f} tokens, {rate:,.0f}/s")
        return self.rows <= 2 * self.total

    def done(self, rows: int) -> None:
        """All is read; the last events may still be on their way, so the number comes from the actors themselves."""
        self.bars.update("features", self.total, self.total, f"{rows:,} tokens")


def _target(storage: Storage, args: TargetArgs) -> tuple[Target, FeaturesConfig, ResourcesConfig]:
    """What is meant, and the settings. For an SAE by itself they are the flags' alone."""
    wrong = [path for path in args.overrides if path.split(".")[0] not in ("features", "resources")]
    if wrong:
        raise ConfigError(f"--{wrong[0]} does not belong to features; flags here begin with --features or --resources.")
    target = find_target(storage, args.target)
    tree: dict[str, Any] = {"name": "features"}
    sections = {section: dict(_settings(target.config, section)) for section in ("features", "resources")}
    for path, value in args.overrides.items():
        section, _, name = path.partition(".")
        sections[section][name] = value
    config = build_config(tree | sections)
    return target, config.features, config.resources


def _settings(config: RunConfig | None, section: str) -> Mapping[str, Any]:
    return to_tree(getattr(config, section)) if config is not None else {}


def _record(storage: Storage, sae: str) -> Record:
    record = read_json(storage, layout.record(sae))
    assert record is not None, "a target's SAEs are committed"
    return record


def _site(record: Record) -> Site:
    origin = record["lineage"]
    return Site(origin["harvest"], origin["corpus"]["id"], record["hook"])


def main(argv: list[str]) -> int:
    """Run the stage; returns the exit code."""
    with Bars("features") as bars:
        run = FeaturesRun(parse_target("features", argv), bars)
        manifests = run.make()
    tables.show(tables.features_made(manifests))
    print(f"{run.storage.uri}/{layout.SAES}")
    return 0


if __name__ == "__main__":
    run_main(main)
