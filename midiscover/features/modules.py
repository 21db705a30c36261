"""Concepts as text: sentences that hold one, each beside a control of the same topic and length that does not.

Ten modules ship in `midiscover/concepts/`; a user's own texts are one sentence a line.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from midiscover.errors import ConfigError, CorpusError

FOLDER = Path(__file__).resolve().parent.parent / "concepts"
LEAST = 8
"""Sentences that a concept needs: with fewer, no split leaves enough to tell anything."""
SHOWN = 60
"""Characters of a text that a sentence names at most."""


SAE, NEURONS, DIRECTIONS, UNTRAINED, LENGTH = "sae_scores", "neurons", "directions", "untrained", "length"
"""What is scored; all but the first are baselines. `neurons`: the hook's own dimensions, each with either sign.
`untrained`: the SAE as initialised, its random directions behind biases or thresholds. `directions`: the same ones
without, which tell more, as they give every text a score. `length`: the number of a text's tokens, which a maximum
over them grows with."""
BASELINES = {
    NEURONS: "raw neurons",
    DIRECTIONS: "random directions",
    UNTRAINED: "the untrained SAE",
    LENGTH: "the number of tokens",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Concept:
    """Texts with a concept and texts without."""

    name: str
    texts: tuple[str, ...]
    controls: tuple[str, ...]
    paired: bool
    """Whether control i is matched to text i."""
    source: str
    """What the controls are, for people."""


def module_names() -> list[str]:
    """The modules that ship, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.txt") if ".controls" not in path.name)


def read_module(name: str) -> Concept:
    """A module that ships. ConfigError names the known ones."""
    if name not in module_names():
        raise ConfigError(f"'{name}' is no concept module; known are {', '.join(module_names())}.")
    texts, controls = (_lines(FOLDER / f"{name}{end}.txt") for end in ("", ".controls"))
    return Concept(name=name, texts=texts, controls=controls, paired=True, source="matched controls of the module")


def read_own(texts: Path, controls: Path | None) -> Concept:
    """A user's texts. Without controls, they stand against those of all modules that are closest to them in length.

    CorpusError where a file can't be read, holds too few texts, or both hold the same one.
    """
    mine = _require_enough(texts, _lines(texts))
    if controls is not None:
        others = _require_enough(controls, _lines(controls))
        known = set(mine)
        shared = next((line for line in others if line in known), None)
        if shared is not None:  # it would be ranked by with one label and judged on with the other
            line = shared if len(shared) <= SHOWN else f"{shared[:SHOWN]}..."
            raise CorpusError(
                f"'{line}' stands in '{texts}' and in '{controls}'; a text has the concept or has it not."
            )
        name, source = _own_name(texts, [*mine, "", *others]), f"the texts of {controls.name}"
        return Concept(name=name, texts=mine, controls=others, paired=False, source=source)
    name, source = _own_name(texts, mine), "controls of all modules, alike in length but not in topic"
    return Concept(name=name, texts=mine, controls=_as_long(mine), paired=False, source=source)


def _own_name(file: Path, lines: Sequence[str]) -> str:
    """The same for the same lines alone: what is judged of them is kept under it."""
    return f"{file.stem}-{hashlib.sha256(chr(10).join(lines).encode()).hexdigest()[:8]}"


def _as_long(texts: Sequence[str]) -> tuple[str, ...]:
    """For each text the unused control of any module whose number of words is nearest."""
    pool = [line for name in module_names() for line in read_module(name).controls if line not in texts]
    chosen = []
    for text in texts:
        if not pool:
            break
        nearest = min(range(len(pool)), key=lambda i: abs(len(pool[i].split()) - len(text.split())))
        chosen.append(pool.pop(nearest))
    return tuple(chosen)


def text_lines(path: Path) -> list[str]:
    """Lines of a text file that hold something. CorpusError where it can't be read."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not at U+2028 and others that stand within a text
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise CorpusError(f"The texts in '{path}' can't be read: {reason}.") from None
    return [line.strip() for line in lines if line.strip()]


def _lines(path: Path) -> tuple[str, ...]:
    # One that stands twice would be ranked by and judged on.
    return tuple(dict.fromkeys(text_lines(path)))


def _require_enough(path: Path, lines: tuple[str, ...]) -> tuple[str, ...]:
    if len(lines) < LEAST:
        raise CorpusError(
            f"'{path}' holds {len(lines)} texts; a concept needs {LEAST} at least, one a line and none twice."
        )
    return lines
