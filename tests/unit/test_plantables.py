"""What a plan's tables leave out where they are too wide: never what a line is of, nor what it costs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from midiscover.cli import main
from tests.runs import write_run


@pytest.mark.parametrize("width", [60, 80, 120])
def test_names_and_money_are_in_every_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    config, store = write_run(tmp_path, train={"epochs": 1, "batch_size": 128, "lr": 1e-3}), str(tmp_path / "none")
    command = ["plan", str(config), "--store", store, "--gpus", "64,512"]
    assert main([*command, "--price", "123456"]) == 0
    scaled, ways = capsys.readouterr().out.partition("On 64, 512 GPUs:")[2].split("Longest:")
    ways = ways.partition("resources.activations:")[2]
    for table, names in ((scaled, ["64", "512"]), (ways, ["store", "stream"])):
        assert max(len(line.rstrip()) for line in table.splitlines()) <= width
        lines = [line.split() for line in table.splitlines() if line.split()[:1] in [[name] for name in names]]
        assert [line[0] for line in lines] == names
        assert "US$" in table
        money = [[word for word in line if re.fullmatch(r"\d{1,3}(,\d{3})+\.\d\d", word)] for line in lines]
        assert all(len(words) == 1 for words in money), table
    assert ("TFLOP" in ways) == (width > 60)
