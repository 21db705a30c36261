"""What can be said of a feature in a line: what a language model said, else where it peaks and what it promotes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from midiscover.tokens import shown


def label(feature: Mapping[str, Any]) -> str:
    """From its row, as `FeatureRecords` gives it: `explanation` where there is one, else as `peaks`."""
    return feature.get("explanation") or peaks(feature)


def peaks(feature: Mapping[str, Any]) -> str:
    """Without a language model, from its row in features.parquet (`count`, `top_tokens`, `pos_tokens`)."""
    if not feature["count"]:
        return "never fired"
    peaks = ", ".join(f"'{shown(token)}'" for token in feature["top_tokens"][:3])
    promoted = ", ".join(f"'{shown(token)}'" for token in feature["pos_tokens"][:3])
    return f"peaks at {peaks}" + (f"; promotes {promoted}" if promoted else "")
