"""The shipped modules: enough sentences, each with a control alike in length, none twice, with the marks they claim."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import mean

import pytest

from midiscover.errors import ConfigError, CorpusError
from midiscover.features.modules import module_names, read_module, read_own

NAMES = [
    "commands",
    "conversational",
    "emotions",
    "formal",
    "numbers",
    "punctuation",
    "questions",
    "statements",
    "technical",
    "temporal",
]


def test_ten_modules_ship() -> None:
    assert module_names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_sentences_and_controls_are_alike_in_number_and_length(name: str) -> None:
    concept = read_module(name)
    assert len(concept.texts) >= 60
    assert len(concept.controls) == len(concept.texts)
    lengths = [(len(a.split()), len(b.split())) for a, b in zip(concept.texts, concept.controls, strict=True)]
    assert max(abs(a - b) / min(a, b) for a, b in lengths) <= 0.2
    assert mean(a for a, _ in lengths) == pytest.approx(mean(b for _, b in lengths), rel=0.05)
    assert all(text == text.strip() and text for text in (*concept.texts, *concept.controls))


def test_no_sentence_stands_twice() -> None:
    lines = [line for name in NAMES for concept in [read_module(name)] for line in (*concept.texts, *concept.controls)]
    assert len(set(lines)) == len(lines) >= 1280


def test_what_can_be_told_by_its_marks() -> None:
    questions, numbers, statements = (read_module(name) for name in ("questions", "numbers", "statements"))
    assert all(line.endswith("?") for line in questions.texts)
    assert not any("?" in line for line in (*questions.controls, *statements.texts))
    ones = "one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen"
    more = "eighteen|nineteen|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|hundred|thousand|million|half|dozen"
    words = rf"\d|\b({ones}|{more}|thirds?|quarters?)\b"
    assert all(re.search(words, line, re.IGNORECASE) for line in numbers.texts)
    assert not any(re.search(words, line, re.IGNORECASE) for line in numbers.controls)
    assert all(line.endswith(".") for line in statements.texts)
    assert sum(line.endswith(("?", "!")) for line in statements.controls) >= len(statements.controls) / 2
    marks = [len(re.findall(r"[^\w\s]", line)) for line in read_module("punctuation").texts]
    assert min(marks) >= 4


def test_own_texts(tmp_path: Path) -> None:
    mine, others = tmp_path / "cats.txt", tmp_path / "dogs.txt"
    mine.write_text("\n".join(f"The cat number {i} sleeps on the sofa." for i in range(9)) + "\n\n")
    others.write_text("\n".join(f"The dog number {i} sleeps on the sofa." for i in range(11)))
    concept = read_own(mine, others)
    assert (len(concept.texts), len(concept.controls), concept.paired) == (9, 11, False)
    assert concept.name.startswith("cats-")
    pooled = read_own(mine, None)
    fewer = tmp_path / "fewer.txt"
    fewer.write_text("\n".join(concept.controls[:-1]))
    names = [read_own(mine, controls).name for controls in (others, fewer, None)]
    assert len({*names, concept.name}) == 3, "what is judged against other controls is kept beside"
    mine.write_bytes("\n".join(f"{line}\u2028and on" for line in concept.texts).encode("utf-8-sig"))
    assert read_own(mine, None).texts == tuple(f"{line}\u2028and on" for line in concept.texts)
    lengths = [len(line.split()) for name in module_names() for line in read_module(name).controls]
    nearest = sorted(abs(length - 8) for length in lengths)[:9]
    assert [abs(len(line.split()) - 8) for line in pooled.controls] == nearest
    assert len(set(pooled.controls)) == 9
    with pytest.raises(ConfigError, match="'joy' is no concept module; known are commands, "):
        read_module("joy")
    with pytest.raises(CorpusError, match="can't be read: No such file"):
        read_own(tmp_path / "none.txt", None)
    mine.write_text("Only one line.\n")
    with pytest.raises(CorpusError, match="holds 1 texts; a concept needs 8"):
        read_own(mine, None)


def test_no_text_is_its_own_control(tmp_path: Path) -> None:
    mine, others = tmp_path / "cats.txt", tmp_path / "dogs.txt"
    lines = [f"The cat number {i} sleeps on the sofa." for i in range(9)]
    mine.write_text("\n".join(lines))
    others.write_text("\n".join(f"The dog number {i} sleeps on the sofa." for i in range(9)) + f"\n  {lines[4]} \n")
    with pytest.raises(
        CorpusError, match=r"^'The cat number 4 sleeps on the sofa\.' stands in '.*cats.*' and in '.*dogs"
    ):
        read_own(mine, others)
    with pytest.raises(CorpusError, match="'The cat number 0 sleeps on the sofa.' stands in"):
        read_own(mine, mine)
    shared = "A sentence without an end " * 20
    for file in (mine, others):
        file.write_text(f"{file.read_text()}\n{shared}")
    others.write_text(others.read_text().replace(lines[4], ""))
    with pytest.raises(
        CorpusError, match=r"^'A sentence without an end A sentence without an end A senten\.\.\.' stands"
    ):
        read_own(mine, others)
    mine.write_text("\n".join(read_module("numbers").controls))
    pooled = read_own(mine, None)
    assert len(pooled.controls) == len(pooled.texts)
    assert not set(pooled.controls) & set(pooled.texts)
