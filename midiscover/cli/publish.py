"""`midiscover export`: an SAE as a SAELens folder with a model card, or as Neuronpedia imports it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from midiscover.errors import ConfigError
from midiscover.launch import Parser
from midiscover.store import layout
from midiscover.store.storage import open_store
from midiscover.targets import find_target

FORMATS = ("saelens", "neuronpedia")


def _export(argv: Sequence[str]) -> None:
    parser = Parser(
        prog="midiscover export",
        description="Write an SAE for other tools.",
        epilog="neuronpedia needs feature records (`midiscover features SAE`) and has not been imported into a running "
        "Neuronpedia: its files are checked against the importer's rules.",
    )
    parser.add_argument("sae", metavar="SAE", help="an SAE, or a unique beginning of its id")
    parser.add_argument("--to", required=True, metavar="FORMAT", help=", ".join(FORMATS))
    parser.add_argument("--out", metavar="DIR|s3://…", help="an empty place; else exports/FORMAT in the SAE's folder")
    parser.add_argument("--model-id", metavar="ID", help="Neuronpedia's id of the language model, such as phi-2")
    parser.add_argument("--source-set", metavar="NAME", help="Neuronpedia's source set, such as mdc-mlp-20k")
    parser.add_argument("--release", default="midiscover", metavar="NAME", help="Neuronpedia's release (midiscover)")
    parser.add_argument("--creator", default="miDiscover", metavar="NAME", help="who is shown as the creator")
    parser.add_argument("--url", help="where people read about the release")
    parser.add_argument("--store", metavar="URI", help="folder or s3://bucket/prefix; else $MIDISCOVER_STORE")
    known = parser.parse_args(list(argv))
    if known.to not in FORMATS:
        raise ConfigError(f"--to {known.to} is no format; known are {', '.join(FORMATS)}.")
    storage = open_store(known.store, create=False)
    target = find_target(storage, known.sae)
    if target.sweep_id is not None:
        raise ConfigError(f"'{known.sae}' is a sweep; give one of its SAEs, such as {target.saes[0]}.")
    (sae,) = target.saes
    from midiscover.publish.export import export_sae
    from midiscover.publish.neuronpedia import NeuronpediaNames

    names = NeuronpediaNames(
        model=known.model_id,
        release=known.release,
        source_set=known.source_set,
        creator_name=known.creator,
        url=known.url,
    )
    out, prefix = (open_store(known.out), "") if known.out else (storage, layout.export_folder(sae, known.to))
    manifest = export_sae(storage, sae, known.to, out, prefix, names)
    size = sum(file["bytes"] for file in manifest["files"].values()) / 1e6
    print(f"{len(manifest['files'])} files, {size:,.1f} MB\n{out.uri}{'/' if prefix else ''}{prefix}")


VERBS: dict[str, Callable[[Sequence[str]], None]] = {"export": _export}
