"""What Neuronpedia and TransformerLens call the things that we name by Hugging Face paths."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from midiscover.config import NeuronpediaConfig
from midiscover.errors import UserError
from midiscover.hooknames import block_part
from midiscover.ids import hook_label, hook_layer, recorded_seed, recorded_settings, sparsity_label

MODEL_ID_LENGTH = 32
_MODEL_ID = re.compile(r"[a-z](?!.*(--|\.\.))[a-z0-9.-]{0,30}[a-z0-9]")
_SOURCE_SET = re.compile(r"[a-z](?!.*--)[a-z0-9-]*[a-z0-9]")


class Names(NamedTuple):
    """What an SAE is called on Neuronpedia."""

    model: str
    set: str
    source: str

    @property
    def folder(self) -> str:
        """Within an export."""
        return f"v1/{self.model}/{self.source}"


def neuronpedia_names(record: Mapping[str, Any], model: str, wanted: NeuronpediaConfig) -> Names:
    """Those that are wanted, else those made of the record and of the name of its language model.

    UserError for names that Neuronpedia would not take.
    """
    chosen = checked_source_set(wanted.source_set) if wanted.source_set else source_set(record)
    named = checked_model_id(wanted.model) if wanted.model else model_id(model)
    return Names(named, chosen, source_id(record, chosen))


def refuse_namesakes(folders: Iterable[tuple[str, str]]) -> None:
    """UserError where two SAEs (id, `Names.folder`) that are exported for Neuronpedia have one name: it would take the
    second one for the first, and leave out its features."""
    names: dict[str, str] = {}
    for sae, name in folders:
        if names.setdefault(name, sae) != sae:
            raise UserError(
                f"{names[name]} and {sae} would both be {name.removeprefix('v1/')} on Neuronpedia; choose one of them "
                "with --publish.saes, leave neuronpedia out of --publish.formats, or export each with a "
                "--source-set of its own."
            )


def model_id(name: str) -> str:
    """Neuronpedia's id of a model: of `microsoft/phi-2`, `phi-2`. At most 32 characters.

    UserError where the name holds nothing to make one of, such as `1B`.
    """
    text = re.sub(r"[^a-z0-9.-]+", "-", name.rpartition("/")[2].lower())
    text = re.sub(r"-+", "-", re.sub(r"\.+", ".", text)).strip("-.")
    text = re.sub(r"^[^a-z]+", "", text)
    if len(text) > MODEL_ID_LENGTH:
        text = text[: MODEL_ID_LENGTH + 1].rpartition("-")[0] or text[:MODEL_ID_LENGTH]  # whole words
    text = text.rstrip("-.")
    if not _MODEL_ID.fullmatch(text):
        raise UserError(
            f"The model's name, '{name}', gives no id that Neuronpedia would take; give one by --model-id, or as "
            "publish.neuronpedia.model."
        )
    return text


def checked_model_id(text: str) -> str:
    """The id itself. UserError where Neuronpedia would not take it."""
    if _MODEL_ID.fullmatch(text):
        return text
    raise UserError(
        f"'{text}' can't be a model of Neuronpedia: 2 to 32 lower-case letters, digits, dots and hyphens, beginning "
        "with a letter and without -- or .., such as phi-2."
    )


def source_set(record: Mapping[str, Any]) -> str:
    """Name of a source set from hook, width and sparsity: `mdc-mlp-20k-l1-3`.

    Architecture, control and seed are named where they are not the usual ones, so that SAEs of a grid keep apart. A
    hook that is in no MLP, no attention and no block is named by its path.
    """
    settings = recorded_settings(record["sae"])
    part = block_part(record["hook"]) or hook_label(record["hook"]).rpartition(".")[2]
    width, seed = record["d_sae"], recorded_seed(record) or 0
    words = [
        "mdc",
        part,
        "" if settings.kind == "standard" else settings.kind,
        f"{width // 1024}k" if width % 1024 == 0 else str(width),
        sparsity_label(settings).replace(".", "p").replace("+", ""),
        "" if settings.control == "none" else settings.control,
        f"s{seed}" if seed else "",
    ]
    return checked_source_set(re.sub("[ _-]+", "-", "-".join(filter(None, words)).lower()))


def checked_source_set(text: str) -> str:
    """The name itself. UserError where Neuronpedia would not take it."""
    if _SOURCE_SET.fullmatch(text) and text != "neurons":
        return text
    raise UserError(
        f"'{text}' can't be a source set of Neuronpedia: lower-case letters, digits and single hyphens, beginning "
        "with a letter, such as mdc-mlp-20k."
    )


def source_id(record: Mapping[str, Any], set_name: str) -> str:
    """`16-mdc-mlp-20k`. The web application takes it apart at the first hyphen."""
    layer = hook_layer(record["hook"])
    return f"{layer if layer is not None else 0}-{set_name}"
