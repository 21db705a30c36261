"""An SAE of another maker becomes one like ours. `python -m jobs.imports SRC --from saelens|seed [--store URI]`

Read and folded, held against the model it is to be used on, then written, measured on held-out text, and committed with
a record, as a sweep does with what it trained. Everything that can be wrong with it is said before anything is written;
a run that is interrupted later goes on where it was.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jobs.evaluation import measure
from jobs.harvest import commit_manifests, ensure_corpus, harvest, missing_spans
from jobs.progress import Bars
from jobs.readers import Reading
from jobs.runtime import model_slots, ray_session, run_main
from midiscover import tables
from midiscover.config import CorpusConfig, ModelConfig, RunConfig
from midiscover.configio import build_config, find_config, load_config, set_path, to_tree
from midiscover.corpus import CorpusManifest
from midiscover.errors import ConfigError, CorpusError, CorruptError, ModelError, UserError
from midiscover.launch import ImportArgs, JobArgs, Prepared, parse_import
from midiscover.lm import load_tokenizer
from midiscover.member import HISTORY, Member, Trained
from midiscover.models import hook_table, model_type, resolve_model
from midiscover.publish.importers import Foreign, read_saelens, read_seed
from midiscover.publish.sourcehooks import find_hook
from midiscover.resolve import Resolved, by_site, resolve
from midiscover.sae.registry import folded_sae
from midiscover.saeconfig import TranscoderConfig
from midiscover.saes import commit_record, write_trained
from midiscover.source import harvested
from midiscover.store import layout
from midiscover.store.documents import read_json
from midiscover.store.loader import normalisation
from midiscover.store.storage import open_store
from midiscover.tracking import Tracker

TEXT_TOKENS = 120_000
"""Of the built-in text, where no config names another; about a tenth is held out."""
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """An SAE that may be taken in: it fits its model, and has its id."""

    foreign: Foreign
    resolved: Resolved
    """With the SAE as its only one."""

    @property
    def id(self) -> str:
        """`imp.<name>.<hash>`."""
        return self.resolved.saes[0].id


def plan(args: ImportArgs) -> Planned:
    """Read the source and find its place. UserError for damaged files, a wrong model or a wrong hook."""
    try:
        foreign = (read_saelens if args.form == "saelens" else read_seed)(Path(args.source))
    except CorruptError as error:
        raise UserError(str(error)) from None  # what is damaged was handed in, and is none of the store's
    name = args.name or re.sub(r"[^a-z0-9_-]+", "-", foreign.source.lower()).strip("-_") or args.form
    if _NAME.fullmatch(name) is None:
        raise ConfigError(f"--name {name} can't be part of an id: lower-case letters, digits, '-' and '_' only.")
    config = _config(args, foreign)
    try:
        identity = resolve_model(config.model, args.store)
    except ModelError as error:
        if args.model or args.config:
            raise
        raise ModelError(f"{error} --model names the model that the SAE belongs to.") from None
    table = hook_table(identity, context_size=config.corpus.context_size)
    vocabulary = load_tokenizer(identity).vocab_size  # without added tokens, of which Gemma-3 has one too many
    if vocabulary > table.vocab_size:
        raise ModelError(
            f"The tokenizer of {identity.name} has {vocabulary:,} tokens and the model {table.vocab_size:,} embedding "
            "rows: they do not belong together."
        )
    family = model_type(identity)
    hooks = foreign.hooks

    def find(given: str | None, path: str | None, name: str | None, flag: str) -> str:
        if given is not None:
            return given
        return find_hook(table, family, path=path, name=name, flag=flag)

    hook = output = find(args.hook, hooks.path, hooks.name, "--hook")
    settings = foreign.settings
    if isinstance(settings, TranscoderConfig):
        output = find(args.output_hook, hooks.output_path, hooks.output_name, "--output-hook")
        settings = replace(settings, output_hook=output)
    for what, path, width in (("reads", hook, foreign.d_in), ("reconstructs", output, foreign.d_out)):
        found = table.require(path).d_in
        if found != width:
            raise ModelError(
                f"The SAE {what} activations of width {width}, and '{path}' of {identity.name} has {found}: it belongs "
                "to another model or hook; --model and --hook name them."
            )
    config = replace(config, sae=settings, grid=(), harvest=replace(config.harvest, hooks=(hook,)))
    resolved = resolve(config, args.store)
    (sae,) = resolved.saes
    sae_id = foreign.id(name, hook=hook, output_hook=output, harvest=resolved.harvest_id)
    return Planned(foreign=foreign, resolved=replace(resolved, saes=(replace(sae, id=sae_id),)))


def _config(args: ImportArgs, foreign: Foreign) -> RunConfig:
    """Model and text: of --config, else the source's model on the built-in text; --model and settings go over both."""
    if args.config is not None:
        config = load_config(find_config(args.config))
    else:
        named: dict[str, Any] = {} if foreign.prepend_bos is None else {"prepend_bos": foreign.prepend_bos}
        if foreign.context_size is not None and foreign.context_size >= 8:
            named["context_size"] = foreign.context_size
        if foreign.model is None and args.model is None:
            raise ConfigError("The source does not say which model it belongs to; give --model.")
        other = args.model is not None or "model.id" in args.overrides
        if foreign.checkpoint is not None and not other and "model.revision" not in args.overrides:
            raise ConfigError(
                f"The source reads {foreign.model} as it was at {foreign.checkpoint} of its training, by a name that "
                "only TransformerLens has for it; give that revision by --model.revision, or --model."
            )
        config = RunConfig(
            name="import",
            model=ModelConfig(id=foreign.model or "", revision=None if other else foreign.revision, dtype="auto"),
            corpus=CorpusConfig(max_tokens=TEXT_TOKENS, **named),
        )
    tree = to_tree(replace(config, grid=()))
    if args.model is not None:
        tree["model"] |= {"id": args.model, "revision": None}
    for path, value in args.overrides.items():
        if path.partition(".")[0] not in ("model", "corpus", "harvest", "evaluate", "resources"):
            raise ConfigError(f"--{path} has no meaning for an import: the SAE is trained already.")
        set_path(tree, path, value)
    return build_config(tree)


class ImportRun:
    """One run of the driver."""

    def __init__(self, args: ImportArgs, planned: Planned, bars: Bars) -> None:
        self.foreign, self.resolved, self.bars = planned.foreign, planned.resolved, bars
        (self.sae,) = planned.resolved.saes
        self.storage = open_store(args.store)
        self.prepared = Prepared(
            args=JobArgs(config=args.config or "", store=args.store),
            resolved=self.resolved,
            storage=self.storage,
            tracker=Tracker.for_store(self.storage),
        )

    def run(self) -> dict[str, Any]:
        """Do what is missing; returns the record."""
        record = read_json(self.storage, layout.record(self.sae.id))
        if record is not None:
            self.bars.say("it was imported already")
            self.prepared.tracker.record_sae(record)
            return record
        corpus = ensure_corpus(self.prepared, self.bars)
        if corpus.windows["held_out"] == 0:
            raise CorpusError(f"The corpus {corpus.id} has no held-out window to measure on; give more text.")
        evaluation = layout.evaluation(self.sae.id, self.resolved.evaluation_id)
        with Reading(self.storage, [self.resolved.harvest_id]):
            unread = bool(missing_spans(self.resolved, corpus, self.storage))
            if unread or not self.storage.exists(evaluation):
                with ray_session(self.resolved.config.resources.nodes, self.bars.say) as cluster:
                    harvest(self.prepared, corpus, cluster, self.bars)
                    commit_manifests(self.resolved, corpus, self.storage)
                    self._write(corpus)
                    slots = model_slots(cluster, self.resolved.config.resources)
                    measure(self.resolved, self.storage, by_site([self.sae]), slots, self.bars)
        self._write(corpus)
        metrics = (read_json(self.storage, evaluation) or {})["metrics"]
        origin, known = self._origin(), self.foreign.known
        record = commit_record(self.storage, self.sae, self.resolved, metrics=metrics, imported=origin, known=known)
        self.prepared.tracker.record_sae(record)
        return record

    def _write(self, corpus: CorpusManifest) -> None:
        """Weights, cfg.json and training.json, as of an SAE whose training took no step here."""
        if self.storage.exists(layout.training(self.sae.id)):
            return
        inputs, outputs = (
            normalisation(self.storage, harvested(self.storage, self.resolved.harvest_id, hook))
            for hook in (self.sae.point.hook, self.sae.output_hook)
        )
        point, widths = self.sae.point, {"d_in": self.sae.d_in, "d_sae": self.sae.d_sae, "d_out": self.sae.d_out}
        cfg = {"architecture": self.foreign.architecture, "k": getattr(point.sae, "k", None), **widths}
        trained = Trained(
            member=Member(id=self.sae.id, config=point.sae, train=point.train, d_sae=self.sae.d_sae),
            sae=folded_sae(cfg, self.foreign.weights),
            weights=self.foreign.weights,
            history={name: [] for name in HISTORY},
            steps=0,
            tokens=0,
            seconds=0.0,
            dead_in_window=None,
            scale=inputs.scale,
            output_scale=outputs.scale,
            output_mean=outputs.mean,
            lr=0.0,
            coefficient=0.0,
        )
        bos = corpus.bos_id is not None
        write_trained(
            self.storage,
            self.sae,
            self.resolved,
            trained,
            prepend_bos=bos,
            run={"trainer": "imported"},
            trained_as=self.foreign.trained_as,
        )

    def _origin(self) -> dict[str, Any]:
        told = {"from": self.foreign.form, "source": self.foreign.source, "sha256": self.foreign.sha256}
        return told | {"model": self.foreign.model, "hook": self.foreign.hooks.name} | self.foreign.about


def main(argv: list[str]) -> int:
    """Import, and print its line and its id."""
    args = parse_import(argv)
    began = time.monotonic()
    with Bars("import") as bars:
        planned = plan(args)
        run = ImportRun(args, planned, bars)
        bars.say(f"{planned.id}: {run.sae.d_sae:,} features on {run.sae.point.hook} of {run.resolved.model.name}")
        with run.prepared:
            record = run.run()
        bars.say(f"done in {time.monotonic() - began:.1f} s")
    measured = ("l0", "fvu", "mse", "cosine", "ce_recovered", "kl_recovered", "dead_share", "inactive_share")
    row = run.sae.row() | {name: record["metrics"].get(name) for name in measured} | {"seconds": record["seconds"]}
    tables.show(tables.sweep_table([row]))
    print(f"{record['id']}\n{run.storage.uri}/{layout.sae_folder(record['id'])}")
    return 0


if __name__ == "__main__":
    run_main(main)
