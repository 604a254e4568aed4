"""Progress on stderr: bars with rate and time left on a terminal, a line about every tenth elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichBars
from rich.progress import Task as RichTask
from rich.text import Text

from prunekit.cli._interrupt import check

# Lines closer together than this tell nothing new.
_SECONDS_BETWEEN_LINES = 2.0


@contextmanager
def bars(console: Console) -> Iterator[BarProgress]:
    """Bars that go away when all tasks are done."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        _Done(),
        _Rate(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    )
    with RichBars(*columns, console=console, transient=True) as live:
        yield BarProgress(live)


class BarProgress:
    """Progress as bars, one a task."""

    def __init__(self, live: RichBars) -> None:
        self._live = live

    @contextmanager
    def task(self, name: str, total: float | None = None, unit: str = "") -> Iterator[BarTask]:
        """A bar until the work is done."""
        number = self._live.add_task(name, total=total, unit=unit)
        try:
            yield BarTask(self._live, number)
        finally:
            self._live.remove_task(number)


class BarTask:
    """One bar."""

    def __init__(self, live: RichBars, number: int) -> None:
        self._live = live
        self._number = number

    def advance(self, amount: float = 1) -> None:
        """Moves the bar."""
        check()
        self._live.advance(self._number, amount)  # type: ignore[arg-type]


class LineProgress:
    """Progress as plain lines.

    Args:
        say: prints one line.
        clock: seconds; monotonic.
    """

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._say = say
        self._clock = clock

    @contextmanager
    def task(self, name: str, total: float | None = None, unit: str = "") -> Iterator[LineTask]:
        """Lines about one piece of work, and one when it is done if it took long enough to wonder."""
        task = LineTask(self._say, self._clock, name, total, unit)
        yield task
        task.finish()


class LineTask:
    """One piece of work told in lines."""

    def __init__(
        self, say: Callable[[str], None], clock: Callable[[], float], name: str, total: float | None, unit: str
    ) -> None:
        self._say, self._clock = say, clock
        self._name, self._total, self._unit = name, total, unit
        self._start = self._last_line = clock()
        self._done = 0.0
        self._tenth = 0

    def advance(self, amount: float = 1) -> None:
        """Counts work that is done; says so when another tenth is."""
        check()
        self._done += amount
        if not self._total:
            return
        tenth = int(10 * self._done / self._total)
        now = self._clock()
        if tenth > self._tenth and self._done < self._total and now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._tenth, self._last_line = tenth, now
            rate = self._done / (now - self._start)
            left = (self._total - self._done) / rate
            percent = f"{100 * self._done / self._total:.0f} %"
            done = f"{amount_text(self._done, self._total, self._unit)} ({percent})"
            self._say(f"{self._name}: {done}, {rate_text(rate, self._unit)}, {seconds_text(left)} left")

    def finish(self) -> None:
        """The last line, left out where the work was over before anyone could wonder."""
        seconds = self._clock() - self._start
        if seconds >= _SECONDS_BETWEEN_LINES:
            self._say(f"{self._name}: {amount_text(self._done, None, self._unit)} in {seconds_text(seconds)}")


class _Done(ProgressColumn):
    def render(self, task: RichTask) -> Text:
        return Text(amount_text(task.completed, task.total, task.fields.get("unit", "")), "progress.download")


class _Rate(ProgressColumn):
    def render(self, task: RichTask) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else rate_text(speed, task.fields.get("unit", "")), "progress.data.speed")


def amount_text(done: float, total: float | None, unit: str) -> str:
    """`12/30 blocks`, `1.5/4.0 GiB`, `7 blocks` without a total."""
    if unit == "bytes":
        size, name = _binary(total or done)
        return f"{done / size:.1f}/{total / size:.1f} {name}" if total else f"{done / size:.1f} {name}"
    return (f"{done:,.0f}/{total:,.0f} {unit}" if total else f"{done:,.0f} {unit}").strip()


def rate_text(rate: float, unit: str) -> str:
    """`1.2 blocks/s`, `0.4 GiB/s`; slower than one in ten seconds reads `25 s/block` where the unit is a plural."""
    if unit == "bytes":
        size, name = _binary(rate)
        return f"{rate / size:.1f} {name}/s"
    if 0 < rate < 0.1:
        one = unit.removesuffix("es" if unit.endswith("sses") else "s")
        return f"{1 / rate:.0f} s/{one or 'step'}"
    return f"{rate:,.1f} {unit}/s" if rate < 100 else f"{rate:,.0f} {unit}/s"


def seconds_text(seconds: float) -> str:
    """`8 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _binary(value: float) -> tuple[float, str]:
    for power, name in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if value >= 1024.0**power:
            return 1024.0**power, name
    return 1.0, "bytes"
