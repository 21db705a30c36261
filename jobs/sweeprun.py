"""One run of a sweep: corpus, activation blocks, packs of SAEs under Tune, held-out evaluation, records, report.

Every step finds its committed results and does only the rest, so the same line continues a sweep that was interrupted.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from jobs.board import Event, watched
from jobs.evaluation import measure
from jobs.harvest import commit_manifests, ensure_corpus, harvest
from jobs.leases import Leases
from jobs.packs import run_packs
from jobs.packworker import PackJob
from jobs.progress import Bars
from jobs.recorder import Recorder
from jobs.runtime import Cluster, RayLater, model_slots, on_cards, pack_slots
from jobs.stopwatch import Stopwatch
from jobs.ways import streams_activations
from midiscover import lineage, upkeep
from midiscover.cards import default_device
from midiscover.config import UNTIL_DONE
from midiscover.configio import to_tree
from midiscover.corpus import CorpusManifest
from midiscover.errors import ConfigError, CorpusError, CorruptError, MiDiscoverError, StoreError
from midiscover.launch import Prepared
from midiscover.plannotes import idle_resampling, long_warmup
from midiscover.resolve import Crew, PlannedSae, auto_pack_size, by_site, make_crews, make_packs
from midiscover.results import Results, sae_results, sae_stability
from midiscover.saes import WEIGHTS, commit_record, harvest_lineage, has_ended
from midiscover.store import layout
from midiscover.store.documents import dump, read_json
from midiscover.tracking import Tracker
from midiscover.tracking.annotations import annotations_key, read_annotations
from midiscover.tracking.sweepfiles import retired_reason, stability_document


class SweepRun:
    """One run of a sweep's driver."""

    def __init__(self, prepared: Prepared, bars: Bars, session: RayLater) -> None:
        self.prepared, self.bars, self.session = prepared, bars, session
        self.resolved, self.storage = prepared.resolved, prepared.storage
        self.id = self.resolved.sweep_id
        self.stopwatch = Stopwatch(self.storage, self.id)
        self.recorder = Recorder(self.id, prepared.tracker, self.storage, bars)

    def run(self) -> Results:
        """Do what is missing; returns what the sweep found."""
        self._check_warmup()
        self._start()
        try:
            corpus = ensure_corpus(self.prepared, self.bars)
            self._check_held_out(corpus)
            untrained = self._untrained()
            self._check_resampling(untrained, corpus)
            if untrained or self._unmeasured():
                self.stopwatch.start(first=len(untrained) == len(self.resolved.saes))
                cluster = self.session.cluster()
                if untrained:  # what fits no node is refused before a harvest
                    pack_slots(cluster, self.resolved.config.resources, 1)
                streams = streams_activations(self.resolved, self.storage, corpus, cluster, self.bars.say)
                for part in self.resolved.parts() if not streams or self._lacks_mean() else ():
                    harvest(replace(self.prepared, resolved=part), corpus, cluster, self.bars)
                    commit_manifests(part, corpus, self.storage)
                self._train(corpus, cluster, streams)
                self._evaluate(cluster)
            self.session.end()
            self._commit()
            results = self._finish()
        except BaseException as error:
            status = "interrupted" if isinstance(error, (KeyboardInterrupt, SystemExit)) else "failed"
            self.recorder.track(lambda tracker: tracker.finish_sweep(self.id, status))
            if not isinstance(error, StoreError):  # which would be waited for once more
                with suppress(StoreError):
                    self.stopwatch.stop()
            raise
        finally:
            self.recorder.settle()
            self.recorder.mirror.end()
        return results

    def _start(self) -> None:
        args, resolved = self.prepared.args, self.resolved
        if args.force:
            self._forget()
        else:
            self._end_forgetting()
        sweep = {
            "v": 1,
            "id": self.id,
            "name": resolved.config.name,
            "created": lineage.now(),
            "owner": lineage.owner(),
            "tags": list(args.tags),
            "note": args.note,
            "config": to_tree(resolved.config),
            "sae_ids": [sae.id for sae in resolved.saes],
            "saes": [sae.row() for sae in resolved.saes],
            "evaluation_id": resolved.evaluation_id,
            "corpus": resolved.corpus_id,
            "harvest": resolved.harvest_id,
            "harvests": [part.harvest_id for part in resolved.parts()],
            "lineage": harvest_lineage(resolved),
        }
        sweep = self._put(sweep)
        self.recorder.track(lambda tracker: tracker.start_sweep(sweep))
        if args.tags or args.note:
            self.recorder.track(self._annotate)
        self.bars.say(f"{self.id}: {len(resolved.saes)} SAEs of {resolved.model.name} in {self.storage.uri}")

    def _annotate(self, tracker: Tracker) -> None:
        try:
            tracker.annotate(self.id, self.prepared.args.note, add_tags=self.prepared.args.tags)
        except CorruptError as error:
            self.bars.say(f"{error} The sweep goes on without its note and tags.")

    def _put(self, sweep: dict[str, Any]) -> dict[str, Any]:
        """Write sweep.json and return it; one that stands takes on the settings of this run.

        They may differ in what is no part of the sweep's id, such as `resources.keep_activations`.
        """
        key, new, standing = layout.sweep_record(self.id), sweep, None
        while not self.storage.replace(key, standing, dump(new)):
            standing = self.storage.read(key)
            new = (read_json(self.storage, key) or {}) | {name: sweep[name] for name in ("config", "harvests")}
        return new

    def _forget(self) -> None:
        """--force: the SAEs of this sweep are made anew; corpus and blocks stay, and so do people's notes and tags."""
        for sae in self.resolved.saes:
            self._forget_sae(sae)
        for key in self.storage.list(layout.sweep_folder(self.id)):
            if key != annotations_key("sweep", self.id):
                self.storage.delete(key)

    def _forget_sae(self, sae: PlannedSae) -> None:
        """The record goes first, which makes others believe in the rest. Without its weights an SAE that is said to be
        trained is one that was not forgotten to the end, so that word goes last."""
        first, last = [layout.record(sae.id), layout.sae_file(sae.id, WEIGHTS)], layout.training(sae.id)
        rest = set(self.storage.list(layout.sae_folder(sae.id))).difference(first, {last})
        for key in [*first, *sorted(rest - {annotations_key("sae", sae.id)}), last]:
            self.storage.delete(key)

    def _end_forgetting(self) -> None:
        """Forget what a --force that was ended began to: trained anew, it would keep what was measured before."""
        for sae in self.resolved.saes:
            is_open = not self.storage.exists(layout.record(sae.id)) and self.storage.exists(layout.training(sae.id))
            if is_open and not self.storage.exists(layout.sae_file(sae.id, WEIGHTS)):
                self._forget_sae(sae)

    def _check_warmup(self) -> None:
        """Before anything is written, or forgotten. What has been trained so stands."""
        saes = [sae for sae in self.resolved.saes if long_warmup([sae]) is not None]
        if not self.prepared.args.force:
            saes = [sae for sae in saes if not has_ended(self.storage, self.id, sae)]
        wrong = long_warmup(saes)
        if wrong is not None:
            raise ConfigError(f"{wrong}.")

    def _check_held_out(self, corpus: CorpusManifest) -> None:
        if corpus.windows["held_out"] == 0:
            raise CorpusError(
                f"The corpus {corpus.id} has no held-out window, so nothing can be measured; raise corpus.held_out or "
                "give more text."
            )

    def _check_resampling(self, untrained: Sequence[PlannedSae], corpus: CorpusManifest) -> None:
        idle = idle_resampling(untrained, corpus.tokens["train"])
        if idle is not None:
            raise ConfigError(f"{idle}.")

    def _untrained(self) -> list[PlannedSae]:
        return [sae for sae in self.resolved.saes if not has_ended(self.storage, self.id, sae)]

    def retired(self) -> dict[str, str]:
        """SAE id -> why it was dropped, in this run of the sweep or an earlier one, of those not trained since."""
        asked = [sae for sae in self.resolved.saes if sae.point.train.retire_after is not None]
        words = {sae.id: read_json(self.storage, layout.retired(self.id, sae.id)) for sae in asked}
        return {
            sae_id: retired_reason(word)
            for sae_id, word in words.items()
            if word is not None and not self.storage.exists(layout.training(sae_id))
        }

    def missing(self, results: Results) -> set[str]:
        """Ids of the SAEs of the grid that have no result and were not dropped on purpose."""
        return {sae.id for sae in self.resolved.saes} - {row["sae_id"] for row in results.rows} - self.retired().keys()

    def _unmeasured(self) -> list[PlannedSae]:
        key = self.resolved.evaluation_id
        return [
            sae
            for sae in self.resolved.saes
            if self.storage.exists(layout.training(sae.id)) and not self.storage.exists(layout.evaluation(sae.id, key))
        ]

    def _lacks_mean(self) -> bool:
        """Whether something is to be measured that was trained from blocks, whose manifest has the mean for its FVU."""
        records = (read_json(self.storage, layout.training(sae.id)) or {} for sae in self._unmeasured())
        return any("output_mean" not in record for record in records)

    def _train(self, corpus: CorpusManifest, cluster: Cluster, streams: bool) -> None:
        resources = self.resolved.config.resources
        missing = self._untrained()
        packs = make_packs(self.resolved.saes, self._pack_size(cluster), {sae.id for sae in missing})
        if not packs:
            self.bars.say("every SAE of the grid is trained")
            return
        self.recorder.name_packs(packs)
        crews: list[Crew] = [(pack,) for pack in packs]
        if streams:
            # On CPUs a model for each node; several on one would only share its cores.
            count = pack_slots(cluster, resources, len(packs)).count if cluster.gpus else len(cluster.nodes)
            crews = make_crews(packs, count, list(self.resolved.table.hooks))
            self.recorder.expect_reading(corpus.windows["train"] * corpus.context_size * len(crews))
        slots = pack_slots(cluster, resources, len(crews))
        for sae in missing:
            self.recorder.track(lambda tracker, sae=sae: tracker.sae_status(sae.id, "training"))
        leases = Leases(resources.stall_seconds, self.recorder.say_of)

        def on_event(event: Event) -> bool:
            leases.on_event(event)
            return self.recorder.on_event(event)

        # Twice as long: a pack that hangs is seen to before the stage is given up.
        stall_seconds = 2 * resources.stall_seconds
        with watched("sweep", on_event, stall_seconds=stall_seconds, look=leases.reap) as board:
            run_packs(
                PackJob(
                    resolved=self.resolved,
                    crews=tuple(crews),
                    streams=streams,
                    storage=self.storage,
                    board=board,
                    slots=slots,
                    trainer=resources.trainer_on(gpus=bool(cluster.gpus)),
                    prepend_bos=corpus.bos_id is not None,
                )
            )

    def _pack_size(self, cluster: Cluster) -> int | None:
        """SAEs at most in a pack. The first run of a sweep decides, so that later ones find its checkpoints."""
        resources = self.resolved.config.resources
        key = layout.sweep_file(self.id, "packs.json")
        if resources.pack_size is not None:
            return resources.pack_size
        slots = on_cards(cluster, resources.pack_share()) // resources.workers if cluster.gpus else 1
        size = auto_pack_size(self.resolved.saes, max(1, slots))
        self.storage.create(key, dump({"v": 1, "pack_size": size}))
        return (read_json(self.storage, key) or {})["pack_size"]

    def _evaluate(self, cluster: Cluster) -> None:
        groups = by_site(self._unmeasured())
        if groups:
            slots = model_slots(cluster, self.resolved.config.resources)
            try:
                measure(self.resolved, self.storage, groups, slots, self.bars)
            except MiDiscoverError as error:
                # Another run of this sweep may have ended first, and removed the activations that this one reads.
                if self._unmeasured():
                    raise
                self.bars.say(f"{error} Every SAE is measured all the same, by another run of this sweep.")

    def _commit(self) -> None:
        """Write the record of every SAE that is measured, and tell the tracker."""
        for sae in self.resolved.saes:
            evaluation = read_json(self.storage, layout.evaluation(sae.id, self.resolved.evaluation_id))
            if evaluation is None:
                continue
            metrics = evaluation["metrics"]
            record = read_json(self.storage, layout.record(sae.id))
            training = read_json(self.storage, layout.training(sae.id)) or {}
            if record is None:
                record = commit_record(self.storage, sae, self.resolved.part_of(sae), metrics=metrics)
                self.recorder.mirror.final(record, training["history"])
            self.recorder.track(lambda tracker, record=record: tracker.record_sae(record))
            self.recorder.track(
                lambda tracker, sae=sae, history=training["history"]: tracker.record_steps(sae.id, history)
            )
            if record["evaluation_id"] != self.resolved.evaluation_id:
                self.recorder.track(
                    lambda tracker, sae=sae, metrics=metrics: tracker.record_metrics(
                        sae.id, self.resolved.evaluation_id, metrics
                    )
                )

    def _stability(self, results: Results) -> list[dict[str, Any]]:
        """Which features neighbours on the grid have in common; measured once for the SAEs that stand."""
        key = layout.sweep_file(self.id, "stability.json")
        ids = [row["sae_id"] for row in results.rows]
        standing = read_json(self.storage, key)
        if standing is not None and standing["saes"] == ids:
            return standing["pairs"]
        began = time.monotonic()
        try:
            pairs = sae_stability(self.storage, results.rows, device=default_device())
        except MiDiscoverError as error:
            self.bars.say(f"features in common were not measured: {error}")
            return []
        self.storage.write(key, dump(stability_document(pairs) | {"saes": ids}))
        if pairs:
            self.bars.say(f"features in common: {len(pairs)} pairs of SAEs in {time.monotonic() - began:.1f} s")
        return pairs

    def _report(self, sweep: dict[str, Any], results: Results) -> None:
        from midiscover import figures  # Altair takes half a second to import, and the first step should not wait
        from midiscover.report import write_report

        stability = self._stability(results)
        page = write_report(
            results.rows,
            results.curves,
            results.densities,
            sweep,
            results.records,
            self.recorder.failures,
            minutes=self.stopwatch.minutes(),
            stability=stability,
            retired=self.retired(),
        )
        files = {"report.html": page}
        if results.rows:
            files["frontier.png"] = figures.png(figures.frontier_chart(results.rows))
        for name, data in files.items():
            key = layout.sweep_file(self.id, name)
            self.storage.write(key, data)
            facts = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
            self.recorder.track(
                lambda tracker, name=name, key=key, facts=facts: tracker.add_artifact(
                    "sweep", self.id, name, key, **facts
                )
            )

    def _finish(self) -> Results:
        failures = self.recorder.failures
        key = layout.sweep_file(self.id, "failures.json")
        if failures:
            self.storage.write(key, dump(failures))
        else:
            self.storage.delete(key)
        results = sae_results(self.storage, self.resolved.saes, self.resolved.evaluation_id)
        self.stopwatch.stop()
        sweep = read_json(self.storage, layout.sweep_record(self.id)) or {}
        try:
            said = read_annotations(self.storage, "sweep", self.id)
        except CorruptError as error:
            self.bars.say(f"{error} The report goes without them.")
            said = None
        self._report(sweep if said is None else sweep | said._asdict(), results)
        status = "failed" if failures or self.missing(results) else "done"
        self.recorder.track(lambda tracker: tracker.finish_sweep(self.id, status))
        if status == "done" and self.resolved.config.resources.keep_activations == UNTIL_DONE:
            self._let_go()
        return results

    def _let_go(self) -> None:
        """Remove the activations, unless another sweep keeps them or another job has begun to read them.

        The sweep is done by then, so an error is no failure of it.
        """
        try:
            found = upkeep.survey(self.storage)
            size = upkeep.remove(found, upkeep.spent_by(found, self.id))
        except StoreError as error:
            self.bars.say(f"activations were not removed: {error}")
            return
        if size:
            self.bars.say(f"{size / 1e6:,.1f} MB of activations removed: resources.keep_activations is {UNTIL_DONE}")
