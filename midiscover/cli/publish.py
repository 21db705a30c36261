"""`midiscover export` and `publish`: SAEs as other tools read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from midiscover.config import EXPORTS, NO_LICENCE, NeuronpediaConfig, is_licence
from midiscover.errors import ConfigError
from midiscover.launch import Parser, parse_target, run_job
from midiscover.store import layout
from midiscover.store.storage import open_store
from midiscover.targets import find_sae, find_target


def _export(argv: Sequence[str]) -> None:
    parser = Parser(
        prog="midiscover export",
        description="Write an SAE for other tools.",
        epilog="neuronpedia and bundle need feature records (`midiscover features SAE`). neuronpedia has not been "
        "imported into a running Neuronpedia: its files are checked against the importer's rules.",
    )
    parser.add_argument("sae", metavar="SAE", help="an SAE, or a unique beginning of its id")
    parser.add_argument("--to", required=True, metavar="FORMAT", help=", ".join(EXPORTS))
    parser.add_argument("--out", metavar="DIR|s3://…", help="an empty place; else exports/FORMAT in the SAE's folder")
    parser.add_argument("--push", metavar="hf://ORG/REPO", help="put a saelens export on a hub as well; needs HF_TOKEN")
    parser.add_argument("--license", metavar="NAME", help="of a saelens export, for its card, such as mit")
    parser.add_argument("--model", metavar="DIR", help="the language model, where its folder has moved")
    parser.add_argument("--model-id", metavar="ID", help="Neuronpedia's id of the language model, such as phi-2")
    parser.add_argument("--source-set", metavar="NAME", help="Neuronpedia's source set, such as mdc-mlp-20k")
    parser.add_argument("--release", default="midiscover", metavar="NAME", help="Neuronpedia's release (midiscover)")
    parser.add_argument("--creator", default="miDiscover", metavar="NAME", help="who is shown as the creator")
    parser.add_argument("--url", help="where people read about the release")
    parser.add_argument("--force", action="store_true", help="write anew what stands there already")
    parser.add_argument("--store", metavar="URI", help="folder or s3://bucket/prefix; else $MIDISCOVER_STORE")
    known = parser.parse_args(list(argv))
    if known.to not in EXPORTS:
        raise ConfigError(f"--to {known.to} is no format; known are {', '.join(EXPORTS)}.")
    if known.push and known.to != "saelens":
        raise ConfigError("--push goes with --to saelens.")
    if known.license is not None and known.to != "saelens":
        raise ConfigError("--license goes with --to saelens.")
    if known.license is not None and not is_licence(known.license):
        raise ConfigError(f"--license {NO_LICENCE}.")
    storage = open_store(known.store, create=False)
    sae = find_sae(storage, known.sae)
    from midiscover.publish.export import export_files, prepare_export, write_export
    from midiscover.publish.hub import push, repository_of, require_token

    repository = repository_of(known.push) if known.push else None
    if repository:
        require_token()  # before anything is written
    names = NeuronpediaConfig(
        model=known.model_id,
        release=known.release,
        source_set=known.source_set,
        creator_name=known.creator,
        url=known.url,
    )
    export = prepare_export(
        storage, sae, known.to, names, repository=repository, licence=known.license, model=known.model
    )
    out, prefix = (open_store(known.out), "") if known.out else (storage, layout.export_folder(sae, known.to))
    done = write_export(export, out, prefix, force=known.force)
    size = sum(file["bytes"] for file in done.manifest["files"].values()) / 1e6
    told = "" if done.is_new else ", which stand there already"
    print(f"{len(done.manifest['files'])} files, {size:,.1f} MB{told}\n{out.uri}{'/' if prefix else ''}{prefix}")
    if repository:
        print(push(export_files(out, prefix, done.manifest), sae, repository, known.license))


def _publish(argv: Sequence[str]) -> None:
    args = parse_target("publish", argv, prog="midiscover publish")
    find_target(open_store(args.store, create=False), args.target)  # what is wrong is said before torch is loaded
    run_job("publish", argv)


VERBS: dict[str, Callable[[Sequence[str]], None]] = {"export": _export, "publish": _publish}
