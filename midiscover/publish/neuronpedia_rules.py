"""What Neuronpedia's importer asks of a bulk export, as checks on its files; nobody publishes a validator.

The rules are those of the importer's SQL and of the tables that it writes to: the first line of a file decides its
columns, ids and foreign keys must be there, and numbers must be numbers.
"""

from __future__ import annotations

import gzip
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

SINGLE = ("release", "model", "sourceset", "source")
TABLES = ("features", "activations", "explanations")
MOST_FILES = 1000
"""Batches of a table: the importer lists a folder once, and S3 lists no more."""
_REQUIRED: Mapping[str, tuple[str, ...]] = {
    "release": ("name", "description", "creatorName", "creatorId"),
    "model": ("id", "creatorId", "layers", "neuronsPerLayer", "owner"),
    "sourceset": ("modelId", "name", "description", "creatorName", "creatorId"),
    "source": ("id", "modelId", "setName", "creatorId", "saelensConfig"),
    "features": ("modelId", "layer", "index", "frac_nonzero", "hasVector", "sourceSetName"),
    "activations": (
        *("id", "modelId", "layer", "index", "creatorId"),
        *("maxValue", "maxValueTokenIndex", "minValue", "tokens", "values"),
    ),
    "explanations": ("id", "modelId", "layer", "index", "description", "authorId"),
}
_PAIRS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "features": (
        ("neg_str", "neg_values"),
        ("pos_str", "pos_values"),
        ("freq_hist_data_bar_heights", "freq_hist_data_bar_values"),
        ("logits_hist_data_bar_heights", "logits_hist_data_bar_values"),
        ("topkCosSimIndices", "topkCosSimValues"),
        ("neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1"),
        ("correlated_neurons_indices", "correlated_neurons_pearson", "correlated_neurons_l1"),
        ("correlated_features_indices", "correlated_features_pearson", "correlated_features_l1"),
    ),
    "activations": (("tokens", "values"),),
    "explanations": (),
}
_CUID = re.compile(r"c[^\s-]{8,}")


def violations(folder: Path) -> list[str]:
    """Sentences for what the importer would refuse or misread in the export whose `v1/` lies in `folder`."""
    sources = [path.parent for path in sorted(folder.glob("v1/*/*/source.jsonl"))]
    if not sources:
        return ["there is no v1/<model>/<source>/source.jsonl"]
    return [f"{source.parent.name}/{source.name}: {problem}" for source in sources for problem in _of_source(source)]


def _of_source(folder: Path) -> Iterator[str]:
    single: dict[str, Row] = {}
    for name in SINGLE:
        rows = list(_read(folder / f"{name}.jsonl"))
        if len(rows) != 1 or isinstance(rows[0], str):
            yield f"{name}.jsonl must hold one JSON object"
            return
        single[name] = rows[0]
        yield from _required(name, rows[0], f"{name}.jsonl")
        yield from _finite(rows[0], f"{name}.jsonl")
    yield from _names(folder, single)
    features: set[str] = set()
    seen: set[str] = set()
    for table in TABLES:
        files = sorted(
            (folder / table).glob("batch-*.jsonl.gz"), key=lambda path: int(re.findall(r"\d+", path.name)[0])
        )
        if table == "features" and not files:
            yield "features/ holds no batch"
        if len(files) > MOST_FILES:
            yield f"{table}/ holds {len(files)} batches; the importer sees {MOST_FILES}"
        for file in files:
            yield from _of_file(file, table, single, features, seen)


def _names(folder: Path, single: Mapping[str, Row]) -> Iterator[str]:
    model, chosen, source = single["model"], single["sourceset"], single["source"]
    if folder.parent.name != model.get("id") or folder.name != source.get("id"):
        yield "the folder is not named after the model and the source"
    if chosen.get("modelId") != model.get("id") or source.get("modelId") != model.get("id"):
        yield "modelId of source set or source is not the id of the model"
    if source.get("setName") != chosen.get("name"):
        yield "setName of the source is not the name of the source set"
    if str(source.get("id")).partition("-")[2].partition("__")[0] != chosen.get("name"):
        yield "the id of the source is not <layer>-<source set>"
    if chosen.get("releaseName") != single["release"].get("name"):
        yield "releaseName of the source set is not the name of the release"
    if not isinstance(source.get("saelensConfig"), dict):
        yield "saelensConfig of the source must be an object"


def _of_file(file: Path, table: str, single: Mapping[str, Row], features: set[str], seen: set[str]) -> Iterator[str]:
    place = f"{table}/{file.name}"
    batch = int(re.findall(r"\d+", file.name)[0])
    keys: list[str] | None = None
    for number, row in enumerate(_read(file), start=1):
        here = f"{place} line {number}"
        if isinstance(row, str):
            yield f"{here}: {row}"
            return
        keys = keys or list(row)
        if list(row) != keys:
            yield f"{here}: its keys are not those of the first line, which decides the columns"
        yield from _required(table, row, here)
        yield from _finite(row, here)
        yield from _of_row(table, row, here, single)
        index = str(row.get("index"))
        if table == "features":
            if index in features:
                yield f"{here}: feature {index} stands twice"
            features.add(index)
        else:
            yield from _belongs(row, here, features, seen)
            if table == "activations" and index.isdigit() and int(index) // 1024 != batch:
                yield f"{here}: feature {index} belongs into batch {int(index) // 1024}"


def _of_row(table: str, row: Row, here: str, single: Mapping[str, Row]) -> Iterator[str]:
    if row.get("modelId") != single["model"].get("id") or row.get("layer") != single["source"].get("id"):
        yield f"{here}: modelId and layer must name the model and the source"
    if not isinstance(row.get("index"), str):
        yield f"{here}: index must be a text"
    for names in _PAIRS[table]:
        if len({len(row.get(name) or ()) for name in names}) > 1:
            yield f"{here}: {' and '.join(names)} differ in length"
    if table == "features":
        if row.get("hasVector") is not False:
            yield f"{here}: hasVector must be false for a feature of an SAE"
        if row.get("sourceSetName") != single["sourceset"].get("name"):
            yield f"{here}: sourceSetName is not the source set"
    if table == "activations" and not row.get("values"):
        yield f"{here}: values is empty"
    if "\\u0000" in json.dumps(row):
        yield f"{here}: a text holds NUL"


def _belongs(row: Row, here: str, features: set[str], seen: set[str]) -> Iterator[str]:
    if row.get("index") not in features:
        yield f"{here}: there is no feature {row.get('index')}"
    name = str(row.get("id"))
    if not _CUID.fullmatch(name):
        yield f"{here}: id '{name}' is not a cuid"
    if name in seen:
        yield f"{here}: id '{name}' stands twice"
    seen.add(name)


def _required(table: str, row: Row, here: str) -> Iterator[str]:
    for name in _REQUIRED[table]:
        if row.get(name) is None:
            yield f"{here}: {name} is missing"


def _finite(value: Any, here: str) -> Iterator[str]:
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{here}: a number is not finite"
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _finite(inner, here)
    elif isinstance(value, list):
        for inner in value:
            yield from _finite(inner, here)


def _read(path: Path) -> Iterator[Row | str]:
    """Rows, or a sentence in place of what is none."""
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
        for line in text.removesuffix("\n").split("\n"):  # not splitlines: a token may be another line separator
            row = json.loads(line)
            yield row if isinstance(row, dict) else "not a JSON object"
    except (OSError, EOFError, ValueError) as error:
        yield f"can't be read: {error}"
