"""What `runs show` prints of a sweep: complete at any width, with why an SAE failed and what is to be copied."""

from __future__ import annotations

import io
from typing import Any

import pytest

from midiscover.runview import details
from midiscover.tables import show

REASON = "loss is not finite at step 31"
IDS = [f"l{layer}.mlp-down_proj.standard-4608.l1-2.1c5da96e{layer}" for layer in (10, 15)]


def printed(data: dict[str, Any]) -> list[str]:
    file = io.StringIO()
    show(details(data), file)
    return [line.rstrip() for line in file.getvalue().splitlines()]


def sae(name: str, **told: Any) -> dict[str, Any]:
    """One of `Tracker.show`'s `saes`."""
    hook = f"model.layers.{name[1:3]}.mlp.down_proj"
    first = {"id": name, "hook": hook, "kind": "standard", "control": "none", "sparsity": "l1 2", "d_sae": 4608}
    return {**first, "seed": 0, "status": "done", "reason": None, "seconds": 11.719, **told}


def columns(lines: list[str], heading: str) -> list[str]:
    """What stands below a heading, without the spaces at which it was wrapped and without the ends of lines."""
    top = next(i for i, line in enumerate(lines) if line.startswith("─"))
    start = lines[top - 1].index(heading)
    later = [lines[top - 1].index(name) for name in lines[top - 1].split() if lines[top - 1].index(name) > start]
    return [line[start : min(later, default=None)].strip() for line in lines[top + 1 :]]


def test_details_show_every_value() -> None:
    data = {
        "id": "demo.01",
        "tags": ["a", "b"],
        "metrics": {"l0": 1 / 3, "fvu": None},
        "ok": True,
        "saes": [{"id": "x", "l1": 3.0}],
    }
    lines = printed(data)
    assert [line.split() for line in lines[:5]] == [
        ["id", "demo.01"],
        ["tags", "a,", "b"],
        ["metrics"],
        ["l0", "0.333333"],
        ["fvu", "-"],
    ]
    assert lines[-1].split() == ["x", "3"]


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_at_any_width_it_is_told_which_sae_failed_and_why(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    lines = printed({"saes": [sae(IDS[0]), sae(IDS[1], status="failed", reason=REASON)]})
    assert max(map(len, lines)) <= width
    ids = columns(lines, "id")
    assert "".join(ids) == "".join(IDS)
    assert width < 80 or set(IDS) <= set(ids), "in one line, to be copied"
    assert [cell for cell in columns(lines, "status") if cell] == ["done", "failed"]
    assert " ".join(cell for cell in columns(lines, "reason") if cell not in ("", "-")) == REASON


@pytest.mark.parametrize("width", [60, 80, 120])
def test_what_hooks_have_in_common_is_told_where_they_stand(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    lines = printed({"saes": [sae(IDS[0]), sae(IDS[1], status="failed", reason=REASON)]})
    assert lines[0].strip() == ("saes, hooks model.layers.*.mlp.down_proj" if "hook" in lines[1].split() else "saes")
    assert ("hook" in lines[1].split()) == (width == 120)


def test_a_narrow_table_leaves_out_what_tells_least(monkeypatch: pytest.MonkeyPatch) -> None:
    headings = {}
    for width in (80, 120, 200):
        monkeypatch.setenv("COLUMNS", str(width))
        lines = printed({"saes": [sae(IDS[0]), sae(IDS[1], status="failed", reason=REASON)]})
        headings[width] = lines[1].split()
    assert headings[80] == ["id", "status", "reason"]
    assert headings[120] == ["id", "hook", "kind", "sparsity", "status", "reason", "seconds"]
    assert headings[200] == list(sae(IDS[0]))
    monkeypatch.setenv("COLUMNS", "80")
    whole = printed({"saes": [sae(name) for name in IDS]})
    assert whole[1].split() == ["id", "hook", "sparsity", "status"], "no reason where nothing failed"
    assert whole[3].split() == [IDS[0], "layer", "10", "l1", "2", "done"]


@pytest.mark.parametrize("width", [80, 120, 160])
def test_where_a_file_is_and_its_digest_stay_whole(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    digests = ["5be858ad" * 8, "cc9e47cf" * 8]
    files = [
        {"name": name, "uri": f"sweeps/demo.76cd136373/{name}", "sha256": digest, "bytes": 218727}
        for name, digest in zip(("report.html", "frontier.png"), digests, strict=True)
    ]
    lines = printed({"artifacts": files})
    assert max(map(len, lines)) <= width
    assert {word for line in lines for word in line.split()} >= {*digests, *(file["uri"] for file in files)}
