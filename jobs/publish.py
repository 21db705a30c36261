"""Exports of a sweep's SAEs. `python -m jobs.publish CONFIG|SWEEP|SAE [--store URI] [--publish.key value]`

Reads top to bottom: which SAEs, what each export needs, then one export after another: written with its manifest last,
verified as it lies there, and only then pushed to a hub. What stands already is not written again, but verified. It
starts no Ray: an export takes seconds.
"""

from __future__ import annotations

from jobs.progress import Bars
from jobs.runtime import run_main
from midiscover.config import PublishConfig
from midiscover.configio import build_config, set_path, to_tree
from midiscover.errors import ConfigError, StageError
from midiscover.launch import TargetArgs, parse_target
from midiscover.publish.choice import chosen, sweep_rows
from midiscover.publish.export import Export, export_files, prepare_export, write_export
from midiscover.publish.hub import push, repository_of, require_token
from midiscover.publish.names import refuse_namesakes
from midiscover.publish.verify import subject_of_export, verify
from midiscover.store import layout
from midiscover.store.storage import Storage, open_store
from midiscover.targets import Target, find_target


def main(argv: list[str]) -> int:
    """Write the exports; returns the exit code."""
    args = parse_target("publish", argv)
    storage = open_store(args.store, create=False)
    target, config = _target(storage, args)
    saes = list(target.saes)
    if target.record is not None:
        saes = chosen(sweep_rows(storage, target.record), config.saes)
    repository = repository_of(config.push) if config.push else None
    if repository:
        require_token()
    # All that can be wrong is said before the first file is written.
    exports = [
        prepare_export(storage, sae, kind, config.neuronpedia, repository=repository, licence=config.license)
        for sae in saes
        for kind in config.formats
    ]
    refuse_namesakes((one.record["id"], one.neuronpedia.folder) for one in exports if one.kind == "neuronpedia")
    with Bars("publish") as bars:
        bars.say(f"{len(saes)} SAEs as {', '.join(config.formats)}")
        for number, export in enumerate(exports, 1):
            place = _write(export, storage, config, repository, force=args.force)
            bars.update("exports", number, len(exports), export.record["id"])
            print(place, flush=True)
    return 0


def _write(export: Export, storage: Storage, config: PublishConfig, repository: str | None, *, force: bool) -> str:
    """Write and verify one export, and push it where that was asked; returns where it lies and what was found."""
    sae = export.record["id"]
    out, prefix = storage, layout.export_folder(sae, export.kind)
    if config.out:
        out, prefix = open_store(config.out), f"{sae}/{export.kind}"
    done = write_export(export, out, prefix, force=force)
    place = f"{out.uri}/{prefix}"
    report = verify(subject_of_export(out, prefix, export.kind))
    wrong = [f"{found.name}: {found.detail}" for found in report.outcomes if found.status == "fail"]
    if wrong:
        raise StageError(f"{place} does not verify: {'; '.join(wrong)}. `midiscover publish --force` writes it anew.")
    place += f"  {report.summary}"
    if repository and export.kind == "saelens":
        place += f"\n{push(export_files(out, prefix, done.manifest), sae, repository, config.license)}"
    return place


def _target(storage: Storage, args: TargetArgs) -> tuple[Target, PublishConfig]:
    """What is meant, and the settings; for an SAE by itself they are the flags' alone."""
    wrong = [path for path in args.overrides if path.split(".")[0] != "publish"]
    if wrong:
        raise ConfigError(f"--{wrong[0]} does not belong to publish; flags here begin with --publish.")
    target = find_target(storage, args.target)
    given = to_tree(target.config.publish) if target.config is not None else {}
    tree = {"name": "publish", "publish": given}
    for path, value in args.overrides.items():
        set_path(tree, path, value)
    return target, build_config(tree).publish


if __name__ == "__main__":
    run_main(main)
