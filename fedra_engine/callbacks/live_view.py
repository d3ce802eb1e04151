"""The display of a run in a terminal: it never has more lines than the terminal, whose top stays in sight."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean

import psutil
import torch
from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult  # noqa: TID251 - none is made of it
from rich.text import Text

from fedra_engine.callbacks.meter import Meter
from fedra_engine.runtime.errors import count_of, printable
from fedra_engine.runtime.measure_text import measure_number, measure_title
from fedra_engine.runtime.spacing import evenly_spaced
from fedra_engine.runtime.stages import LOCAL_STEPS, Stage, running_stage
from fedra_engine.runtime.tables import bytes_text

_LABELS = 10
"""Columns of the titles of rows."""
_WIDEST_BAR = 30
_BESIDE_BAR = 34
"""Columns that a bar leaves to the text after it."""
_LONGEST_HISTORY = 24
"""Characters of a sparkline."""
_NUMBERS = 27
"""Columns of the three numbers in a row of accuracies, and of the space around them."""
_ENOUGH_DOMAINS = 6
_LEVELS = "▁▂▃▄▅▆▇█"


class LiveView:
    """Draws a `Meter` and the running stage, anew at each refresh; a renderable of rich.

    Attributes:
        header: texts of the rows on top, by title.
        lanes: clients that a process trains at a time.
        processes: of the job.
        device: of the model; None before it is loaded.
    """

    def __init__(self, meter: Meter, header: Mapping[str, str]) -> None:
        self._meter = meter
        self.header = header
        self.lanes = self.processes = 1
        self.device: torch.device | None = None
        self._notice = ""

    def show_notice(self, text: str) -> None:
        """Show `text` in place of the running stage from now on."""
        self._notice = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # Where the last line is used, too, the first one is out of reach when the display is cleared.
        yield from self.rows(options.max_width, options.size.height - 1)

    def rows(self, width: int, height: int) -> list[Text]:
        """At most `height` lines of at most `width` columns."""
        stage = running_stage()
        changing = [self._progress(stage, width), self._numbers(width)]
        # The header stays as it is: where lines are few, it is what a user can do without.
        above = [header_rows(self.header)[: max(height - sum(map(len, changing)), 0)], *changing]
        used = sum(map(len, above))
        # Blank lines are worth less than domains; two lines are those of the title and the average.
        spaced = height >= used + len(above) + min(len(self._meter.frozen), _ENOUGH_DOMAINS) + 2
        accuracies = accuracy_rows(self._meter, width, height - used - len(above) * spaced)
        rows = list[Text]()
        for part in above:
            rows += [*part, *([Text()] if spaced else [])]
        rows += accuracies
        for row in rows:
            row.truncate(width, overflow="ellipsis")
            row.no_wrap = True
        return rows[: max(height, 1)]

    def _progress(self, stage: Stage | None, width: int) -> list[Text]:
        meter, bar = self._meter, max(min(_WIDEST_BAR, width - _LABELS - _BESIDE_BAR), 4)
        part = meter.part_of_round(stage)
        done = meter.rounds_done + part * meter.in_round
        text = f"{meter.rounds_done:,} of {meter.rounds:,}, ETA {meter.time_left(part)}"
        rows = [_row("rounds", _bar(done / max(meter.rounds, 1), bar).append(f"  {text}"))]
        if meter.in_round or meter.clients:
            number, share = meter.rounds_done + meter.in_round, part
            if meter.participants:
                share = max(share, meter.clients / meter.participants)
            text = f"{meter.clients:,} of {meter.participants or '?'} clients"
            rows.append(_row(f"round {number}", _bar(share, bar).append(f"  {text}")))
        return [*rows, _row("now", Text(self._now(stage)))]

    def _now(self, stage: Stage | None) -> str:
        """What is being done."""
        if self._notice or stage is None:
            return self._notice
        if stage.what == LOCAL_STEPS:
            return f"{self._wave()}, {stage.done:,} of {stage.total:,} local steps"
        if stage.total is None:
            return f"{stage.what}, {stage.seconds:.0f} s"
        return f"{stage.what}, {stage.done:,} of {stage.total:,}"

    def _wave(self) -> str:
        """The wave of the round that is trained, and the lanes."""
        meter = self._meter
        if self.processes > 1:
            # How many clients each process has is not known here.
            return f"{count_of(self.lanes, 'lane')} here, {self.processes} processes"
        lanes = min(self.lanes, max(meter.participants, 1))
        waves = math.ceil(max(meter.participants, 1) / lanes)
        return f"wave {min(meter.clients // lanes + 1, waves):,} of {waves:,}, {count_of(lanes, 'lane')}"

    def _numbers(self, width: int) -> list[Text]:
        meter, history = self._meter, min(_LONGEST_HISTORY, width - _LABELS - 10)
        losses = [loss for loss in evenly_spaced(meter.losses, history) if math.isfinite(loss)]
        line = sparkline(losses, min(losses, default=0.0), max(losses, default=0.0))
        return [
            _row("loss", Text(f"{meter.loss_text()}  ").append(line, "cyan")),
            _row("speed", Text(meter.speed_text() if meter.speed else "–")),
            _row("memory", Text(memory_text(self.device))),
        ]


def header_rows(header: Mapping[str, str]) -> list[Text]:
    """One line for each entry of `header`."""
    return [_row(title, Text(printable(text), "bold")) for title, text in header.items()]


def accuracy_rows(meter: Meter, width: int, height: int) -> list[Text]:
    """A table of at most `height` lines, a domain each: accuracy before, now, their difference, and the way there.

    Of more domains than fit, the first ones are listed; the average is always the last line. All histories have the
    same scale, from the lowest to the highest accuracy of any domain in them.
    """
    if not meter.frozen or height < 2:
        return []
    names = list(meter.frozen)
    room = height - 2
    listed = names if len(names) <= room else names[: max(room - 1, 0)]
    longest = max((cell_len(printable(name)) for name in listed), default=0)
    title = measure_title("accuracy")
    column = max(min(longest, width - _NUMBERS - 8), len(title))
    # Of the frozen model there is always the first.
    shown = [meter.frozen, *evenly_spaced(meter.evaluations, min(_LONGEST_HISTORY, width - column - _NUMBERS) - 1)]
    every = [value for state in shown for value in state.values()]
    scale = (min(every), max(every))
    rows = [Text(f"{title:<{column}}  {'frozen':>6}  {'now':>6}  {'change':>7}", "dim")]
    rows += [_accuracy_row(name, [state[name] for state in shown], column, scale) for name in listed]
    if len(listed) < len(names) and room > 0:
        rows.append(Text(f"… and {len(names) - len(listed):,} more", "dim"))
    return [*rows, _accuracy_row("average", [mean(state.values()) for state in shown], column, scale)]


def _accuracy_row(name: str, values: Sequence[float], column: int, scale: tuple[float, float]) -> Text:
    """A line of the table; the name has `column` columns."""
    first, last = (measure_number("accuracy", values[place]) for place in (0, -1))
    row = Text(f"{set_cell_size(printable(name), column)}  {first:>6}  ")
    if len(values) == 1:
        return row.append(f"{'–':>6}")
    change = round(100 * (values[-1] - values[0]), 1)
    row.append(f"{last:>6}  ").append(f"{change:+7.1f}", "green" if change > 0 else "red" if change < 0 else "")
    return row.append("  ").append(sparkline(values, *scale), "cyan")


def sparkline(values: Sequence[float], low: float, high: float) -> str:
    """A character for each of the `values`, as high as it lies between `low` and `high`."""
    steps = (len(_LEVELS) - 1) / (high - low) if high > low else 0.0
    return "".join(_LEVELS[round((value - low) * steps)] for value in values)


def memory_text(device: torch.device | None) -> str:
    """The GPU's memory that this process has allocated, now and at most; without a GPU, the process's own memory."""
    if device is not None and device.type == "cuda":
        stats = torch.cuda.memory_stats(device)
        now, peak = (bytes_text(stats[f"allocated_bytes.all.{which}"]) for which in ("current", "peak"))
        return f"{now} of the GPU, peak {peak}"
    return f"{bytes_text(psutil.Process().memory_info().rss)} in this process"


def _row(title: str, text: Text) -> Text:
    return Text(f"{title:<{_LABELS - 1}} ", "dim").append_text(text)


def _bar(share: float, width: int) -> Text:
    done = round(max(0.0, min(share, 1.0)) * width)
    return Text("━" * done, "cyan").append("─" * (width - done), "dim")
