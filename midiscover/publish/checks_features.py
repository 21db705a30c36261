"""Feature records of an SAE, the newest: parquet files whose columns, rows and values belong together."""

from __future__ import annotations

import hashlib
import io
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from midiscover.features.records import CONTEXTS, FEATURES, VERSION
from midiscover.publish.checks import MANIFEST, RECORD, Failed, Skipped, Subject, check, expect, fail_for, parse_json

SAE = ("sae",)
_COLUMNS: dict[str, dict[str, str]] = {
    FEATURES: {
        "index": "int32",
        "count": "int64",
        "firing_rate": "double",
        **dict.fromkeys(("mean", "max", "std"), "float"),
        **dict.fromkeys(("hist_heights", "logit_hist_heights"), "list<int64>"),
        **dict.fromkeys(("pos_tokens", "neg_tokens", "top_tokens"), "list<string>"),
        **dict.fromkeys(
            ("pos_ids", "neg_ids", "neighbour_index", "coactive_index", "neuron_index", "input_index"), "list<int32>"
        ),
        **dict.fromkeys(
            (
                *("quantiles", "hist_values", "logit_hist_values", "pos_values", "neg_values", "neighbour_cosine"),
                *("coactive_pearson", "coactive_cosine", "neuron_value", "neuron_l1", "input_pearson", "input_cosine"),
            ),
            "list<float>",
        ),
    },
    CONTEXTS: {
        **dict.fromkeys(("feature", "rank", "window", "position", "document", "start"), "int32"),
        "kind": "string",
        **dict.fromkeys(("bin_min", "bin_max", "value"), "float"),
        "bin_share": "double",
        "token_ids": "list<int32>",
        "tokens": "list<string>",
        "values": "list<float>",
    },
}
_PAIRS = (
    ("hist_heights", "hist_values"),
    ("logit_hist_heights", "logit_hist_values"),
    ("pos_ids", "pos_tokens", "pos_values"),
    ("neg_ids", "neg_tokens", "neg_values"),
    ("neighbour_index", "neighbour_cosine"),
    ("coactive_index", "coactive_pearson", "coactive_cosine"),
    ("neuron_index", "neuron_value", "neuron_l1"),
    ("input_index", "input_pearson", "input_cosine"),
)
"""Columns of features.parquet whose lists are equally long."""


def _manifest(subject: Subject) -> dict[str, Any]:
    return subject.part("the manifest of the features", lambda: _newest(subject))


def _newest(subject: Subject) -> dict[str, Any]:
    names = [name for name in subject.names("features") if name.endswith(f"/{MANIFEST}")]
    if not names:
        raise Skipped("its features are not written down")
    found = [(parse_json(name, subject.read(name)), name.rpartition("/")[0]) for name in names]
    manifest, folder = max(found, key=lambda pair: (str(pair[0].get("created")), pair[1]))
    return manifest | {"folder": folder}


def _table(subject: Subject, name: str) -> pa.Table:
    path = f"{_manifest(subject)['folder']}/{name}"
    return subject.part(path, lambda: _parquet(path, subject.read(path)))


def _parquet(path: str, data: bytes) -> pa.Table:
    try:
        return pq.read_table(io.BytesIO(data))
    except (pa.ArrowInvalid, OSError) as error:
        raise Failed(f"{path} is no parquet file: {error}") from None


def _column(subject: Subject, file: str, name: str, type_name: str) -> pa.ChunkedArray:
    """A column; Skipped where it is missing or of another type, which another check says."""
    table = _table(subject, file)
    if name not in table.column_names or _type_name(table[name].type) != type_name:
        raise Skipped(f"{file} has no column {name} of type {type_name}")
    return table[name]


def _type_name(kind: pa.DataType) -> str:
    return f"list<{kind.value_type}>" if pa.types.is_list(kind) else str(kind)


def _lengths(lists: pa.ChunkedArray | pa.Array) -> Any:
    """Of each list."""
    return pc.call_function("list_value_length", [lists]).to_numpy()


def _of(file: str, subject: Subject, name: str) -> pa.ChunkedArray:
    return _column(subject, file, name, _COLUMNS[file][name])


@check("features", SAE)
def features_are_of_this_sae(subject: Subject) -> str:
    """The manifest is of this SAE and of a version that this miDiscover reads."""
    manifest = subject.require("the manifest of the features", lambda: _newest(subject))
    expect(manifest.get("v") == VERSION, f"v is {manifest.get('v')!r}, not {VERSION}")
    expect(manifest.get("sae") == subject.name, f"it is of {manifest.get('sae')!r}")
    return str(manifest["folder"]).rpartition("/")[2]


@check("features", SAE)
def feature_files_are_those_of_the_manifest(subject: Subject) -> None:
    """Both files are those that the manifest names, by sha256."""
    manifest = _manifest(subject)
    problems = []
    for name in (FEATURES, CONTEXTS):
        path, told = f"{manifest['folder']}/{name}", manifest.get("files", {}).get(name, {}).get("sha256")
        if not subject.has(path):
            problems.append(f"there is no {path}")
        elif hashlib.sha256(subject.read(path)).hexdigest() != told:
            problems.append(f"{path} is another one")
    fail_for(problems)


@check("features", SAE)
def feature_columns_have_their_types(subject: Subject) -> None:
    """Both files have their columns, each of its type."""
    problems = []
    for file, columns in _COLUMNS.items():
        path = f"{_manifest(subject)['folder']}/{file}"
        table = subject.require(path, lambda path=path: _parquet(path, subject.read(path)))
        for name, wanted in columns.items():
            if name not in table.column_names:
                problems.append(f"{file} has no {name}")
            elif _type_name(table[name].type) != wanted:
                problems.append(f"{name} is {_type_name(table[name].type)}, not {wanted}")
    fail_for(problems)


@check("features", SAE)
def each_feature_has_a_row(subject: Subject) -> str:
    """features.parquet has a row for each feature, in order."""
    index = _of(FEATURES, subject, "index").to_numpy()
    d_sae = subject.json(RECORD).get("d_sae")
    expect(index.tolist() == list(range(len(index))), "index does not count from 0")
    expect(len(index) == d_sae, f"{len(index)} rows for {d_sae} features")
    return f"{len(index):,} rows"


@check("features", SAE)
def firing_rates_are_shares(subject: Subject) -> None:
    """Firing rates lie between 0 and 1, and are count over tokens."""
    rate, count = _of(FEATURES, subject, "firing_rate").to_numpy(), _of(FEATURES, subject, "count").to_numpy()
    outside = ~((rate >= 0) & (rate <= 1))
    fail_for([f"feature {i}: {rate[i]:g}" for i in np.flatnonzero(outside)])
    tokens = max(1, int(_manifest(subject)["tokens"]))
    expect(np.allclose(rate, count / tokens, rtol=1e-9, atol=0), "firing_rate is not count / tokens of the manifest")


@check("features", SAE)
def maxima_fit_counts(subject: Subject) -> None:
    """A feature that never fires has a maximum of 0, every other one above."""
    count, maxima = _of(FEATURES, subject, "count").to_numpy(), _of(FEATURES, subject, "max").to_numpy()
    wrong = (count > 0) != (maxima > 0)
    fail_for([f"feature {i}: count {count[i]}, max {maxima[i]:g}" for i in np.flatnonzero(wrong)])


@check("features", SAE)
def feature_lists_are_equally_long(subject: Subject) -> None:
    """Lists that belong together are equally long."""
    problems = []
    for names in _PAIRS:
        lengths = [_lengths(_of(FEATURES, subject, name)) for name in names]
        wrong = np.flatnonzero((np.stack(lengths) != lengths[0]).any(axis=0))
        problems += [f"feature {i}: {' and '.join(names)}" for i in wrong]
    fail_for(problems)


@check("features", SAE)
def contexts_belong_to_features(subject: Subject) -> str:
    """Contexts are sorted by feature and belong to features that are there."""
    feature, rows = _of(CONTEXTS, subject, "feature").to_numpy(), int(_manifest(subject)["d_sae"])
    expect(
        not len(feature) or (feature.min() >= 0 and feature.max() < rows), f"features go beyond the {rows} there are"
    )
    expect(bool((np.diff(feature) >= 0).all()), "they are not in order")
    return f"{len(feature):,} contexts"


@check("features", SAE)
def context_lists_are_equally_long(subject: Subject) -> None:
    """Token ids, tokens and values of a context are equally long."""
    names = ("token_ids", "tokens", "values")
    lengths = np.stack([_lengths(_of(CONTEXTS, subject, name)) for name in names])
    fail_for([f"context {i}" for i in np.flatnonzero((lengths != lengths[0]).any(axis=0))])


@check("features", SAE)
def context_values_are_at_their_place(subject: Subject) -> None:
    """The value of a context is that at its place."""
    value = _of(CONTEXTS, subject, "value").to_numpy()
    at = _of(CONTEXTS, subject, "position").to_numpy() - _of(CONTEXTS, subject, "start").to_numpy()
    values = _of(CONTEXTS, subject, "values").combine_chunks()
    lengths = _lengths(values)
    outside = (at < 0) | (at >= lengths)
    fail_for([f"context {i}: its place is outside" for i in np.flatnonzero(outside)])
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]) if len(lengths) else lengths
    found = values.flatten().to_numpy()[starts + at]
    # A pre-activation is computed in batches of other sizes: float32 sums differ in the last digits.
    wrong = ~np.isclose(found, value, rtol=1e-4, atol=1e-5)
    fail_for([f"context {i}: {value[i]:g}, and {found[i]:g} there" for i in np.flatnonzero(wrong)])
