"""Progress for people: bars where there is a terminal, plain lines (also for logs of a cluster) where there is none."""

from __future__ import annotations

import re
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 10.0
_SAID = re.compile(
    r"(harvest|sweep|features|publish|pipeline|doctor|versions|error|midiscover): "
    r"|Running entrypoint for job |[\d: ,-]+\tINFO job_manager\.py"  # Ray's own, at the head of a job's log
)
PLAIN = re.compile(r"(?P<stage>[a-z]+): (?P<name>.+): +(?P<percent>\d+) %  (?P<note>.*)")


class Bars:
    """Named lines with a total, a position and a note. Use as a context manager."""

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.console = Console(stderr=True, highlight=False, markup=False)
        self.live: Progress | None = None
        self.tasks: dict[str, TaskID] = {}
        self.plain: dict[str, _Line] = {}

    def __enter__(self) -> Bars:
        if self.console.is_terminal:
            self.live = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                TaskProgressColumn(),
                TextColumn("{task.fields[note]}", markup=False),
                TimeRemainingColumn(compact=True),
                console=self.console,
            )
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live is not None:
            self.live.stop()

    def update(self, name: str, position: float, total: float, note: str = "") -> None:
        """Set a line's position; the first call makes the line."""
        if self.live is not None:
            if name not in self.tasks:
                self.tasks[name] = self.live.add_task(name, total=total, note=note)
            self.live.update(self.tasks[name], completed=position, total=total, note=note)
            return
        line = self.plain.setdefault(name, _Line())
        done = position >= total
        if (done and not line.done) or time.monotonic() - line.shown >= PLAIN_SECONDS:
            line.shown, line.done = time.monotonic(), done
            left = line.remaining(position, total)
            print(
                f"{self.stage}: {name}: {100 * position / max(total, 1):3.0f} %  {note}{left}",
                file=sys.stderr,
                flush=True,
            )

    def pause(self) -> None:
        """End the bars, so that a question can be asked."""
        if self.live is not None:
            self.live.stop()

    def line(self, text: str) -> None:
        """A line of output, above the bars where there are any; lines that a stage says of itself go to stderr."""
        if self.live is not None:
            self.console.print(text, soft_wrap=True)
        else:
            print(text, file=sys.stderr if _SAID.match(text) else sys.stdout, flush=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(f"{self.stage}: {text}", soft_wrap=True)


def replay(line: str, bars: Bars) -> None:
    """A line of another process's log: its plain progress becomes a bar where there is a terminal, the rest is printed.

    What a driver says of its progress goes to stderr and its results to stdout, as they would here.
    """
    found = PLAIN.fullmatch(line)
    if found is None:
        bars.line(line)
    elif bars.live is None:
        print(line, file=sys.stderr, flush=True)
    else:
        bars.update(f"{found['stage']}: {found['name']}", float(found["percent"]), 100, found["note"])


class _Line:
    def __init__(self) -> None:
        self.began = time.monotonic()
        self.shown = 0.0
        self.done = False

    def remaining(self, position: float, total: float) -> str:
        if self.done or position < 0.02 * total:
            return ""  # too early to tell
        left = (time.monotonic() - self.began) * (total - position) / position
        return f"  {left:.0f} s left"
