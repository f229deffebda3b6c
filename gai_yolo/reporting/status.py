"""`gai-yolo status`: where a run is, and what its interruptions have cost. Reads files only, so it may run anywhere the folder is seen."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gai_yolo.errors import Refusal
from gai_yolo.goodput.causes import KILLED
from gai_yolo.goodput.record import read_records
from gai_yolo.goodput.report import REPORT_FILE, Interruption, Report, as_json, from_json, report
from gai_yolo.store.run_folder import RunFolder

REPORT_WIDTH = 80
"""Columns of a report that goes to a file or a pipe."""
REFRESH = 1.0
"""Seconds between two views."""
LINGER = 600.0
"""Seconds that a live view waits for a job that is silent to come back."""
LATE = 5.0
"""Seconds without an entry that deserve a word."""
LABELS = {
    "useful": "useful steps",
    "replayed": "replayed steps",
    "lost": "interrupted steps",
    "data": "waiting for data",
    "snapshot": "snapshot stalls",
    "evaluation": "evaluation",
    "import": "imports",
    "rendezvous": "rendezvous",
    "load": "loading",
    "reporting": "reporting",
    "closing": "closing",
    "downtime": "downtime",
}
"""Names of the parts of the time for people."""


@dataclass(frozen=True)
class Status:
    """What a run folder says."""

    run: Path
    report: Report
    notes: tuple[str, ...] = ()
    """What somebody should know who reads the numbers; one sentence each."""
    stored: bool = False
    """Whether it is what the job wrote when it last did so."""


def status_of(run: Path, now: float) -> Status:
    """Read a run folder: the records of its starts, or the account that the job itself wrote where there are none.

    Raises:
        Refusal: neither is there.
    """
    records, damaged = read_records(RunFolder(run).goodput)
    notes = [f"{path.parent.name}/{path.name} is damaged; its start may be counted as downtime" for path in damaged]
    if records:
        found = report(records, now)
        return Status(run, found, (*notes, *_doubts(found)))
    path = run / REPORT_FILE
    try:
        found = from_json(path.read_text())
    except FileNotFoundError:
        raise Refusal(
            f"{run}: holds no records of a job ({RunFolder(run).goodput.name}/*.json, {REPORT_FILE}); give the folder of a run, "
            "such as experiments/shapes."
        ) from None
    except (OSError, ValueError):
        raise Refusal(f"{path}: cannot be read as the account of a run, and there are no records of its starts beside it.") from None
    notes.append(f"there are no records of starts; this is {REPORT_FILE} as of {_moment(found.as_of)}")
    return Status(run, found, tuple(notes), stored=True)


def show_status(run: Path, as_json_text: bool, once: bool) -> None:
    """Print the status, on a terminal again and again until the run is over or Ctrl-C; raises as `status_of`."""
    status = status_of(run, time.time())
    if as_json_text:
        print(as_json(status.report), end="")
        return
    console = Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else REPORT_WIDTH)
    if not console.is_terminal:
        with console.capture() as captured:
            console.print(view(status))
        print("\n".join(line.rstrip() for line in captured.get().splitlines()))
        return
    if once or not _may_go_on(status.report):
        console.print(view(status))
        return
    with contextlib.suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        while True:
            live.update(view(status, most=max(3, console.height - 34)), refresh=True)
            if not _may_go_on(status.report):
                return
            time.sleep(REFRESH)
            status = status_of(run, time.time())


def view(status: Status, most: int | None = None) -> RenderableType:
    """The whole picture; of the interruptions the `most` latest only."""
    found = status.report
    parts: list[RenderableType] = [Text(str(status.run), style="bold", overflow="fold"), _facts(status), _bars(found)]
    if found.interruptions:
        parts.append(_interruptions(found.interruptions, most))
    if status.notes:
        parts += [Text(), *(Text(f"note: {note}", style="yellow") for note in status.notes)]
    return Group(*parts)


def duration(seconds: float) -> str:
    """For people, two figures or two units: `0.41 s`, `12 s`, `3 min 5 s`, `2 h 13 min`, `3 d 4 h`."""
    if seconds < 9.95:
        return f"{max(0.0, seconds):.2g} s" if seconds >= 0.001 else "0 s"
    whole = round(seconds)
    for length, unit, part, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= length:
            rest = whole % length // part
            return f"{whole // length} {unit}" + (f" {rest} {small}" if rest else "")
    return f"{whole} s"


def _may_go_on(found: Report) -> bool:
    return not found.finished and found.silence is not None and found.silence < LINGER


def _doubts(found: Report) -> Iterator[str]:
    """What makes the numbers less certain than they look."""
    if found.silence is not None and found.silence < -LATE:
        yield f"the clock of the job is {duration(-found.silence)} ahead of this host's"
    if found.counted_once > 1.0:
        yield (
            f"{duration(found.counted_once)} are in the records of two starts and were counted once: a node that was cut off "
            "trained on, or the clocks of the hosts differ"
        )
    silent = {node: quiet for node, quiet in found.nodes.items() if quiet is not None and quiet > LATE}
    if found.running and silent:
        yield "no sign of life: " + ", ".join(f"{node} for {duration(quiet)}" for node, quiet in silent.items())


def _state(status: Status) -> Text:
    found, quiet = status.report, status.report.silence
    since = "" if quiet is None or status.stored else f", {duration(quiet)} ago"
    if found.running and (quiet is None or quiet <= LATE):
        state, style = f"running ({found.phase})", "bold green"
    elif found.running:
        state, style = f"running ({found.phase}), no sign of life for {duration(quiet or 0.0)}", "bold yellow"
    elif found.finished:
        early = found.epochs is not None and found.epoch < found.epochs
        state, style = f"finished{' early (training.patience or time_budget)' if early else ''}{since}", "bold green"
    elif found.outcome is not None:
        state, style = f"not running: {found.outcome}{since}", "bold yellow"
    else:
        state, style = "not running: killed without notice" + since, "bold red"
    when = f"{_moment(found.as_of)}: " if status.stored else ""
    return Text(when + state, style=style)


def _facts(status: Status) -> RenderableType:
    found = status.report
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column()
    of_epochs = "" if found.epochs is None else f" of {found.epochs}"
    of_steps = "" if found.total_steps is None else f" of {found.total_steps} ({100 * found.step / max(1, found.total_steps):.0f} %)"
    rows.add_row("state", _state(status))
    rows.add_row("position", f"epoch {found.epoch}{of_epochs}, step {found.step}{of_steps}")
    if not found.finished:
        pace = "no step yet" if found.pace is None else f"{duration(found.pace)} a step"
        left = "" if found.eta is None else f", {duration(found.eta)} left" + ("" if found.running else " once it runs")
        rows.add_row("pace", pace + left)
    names = list(found.nodes)
    more = f" and {len(names) - 4} more" if len(names) > 5 else ""
    shown = names if not more else names[:4]
    rows.add_row("processes", f"{found.world_size} on {', '.join(shown)}{more}; start {found.starts} of the run")
    count = len(found.interruptions)
    again = f"{found.replayed_steps} replayed, {found.lost_steps} lost to {count} interruption{'' if count == 1 else 's'}"
    rows.add_row("steps", f"{found.useful_steps} done; {again}" if count else f"{found.useful_steps} done, no interruption")
    rows.add_row("goodput", Text(f"{100 * found.goodput:.1f} % of {duration(found.wall)}", style="bold"))
    return Padding(rows, (1, 0, 1, 2))


def _bars(found: Report) -> RenderableType:
    """The split of the wall time; parts that took none are left out."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("where the time went", no_wrap=True)
    for title in ("time", "share"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("")
    for part, label in LABELS.items():
        seconds = found.seconds.get(part, 0.0)
        if seconds > 0:
            share = seconds / found.wall
            style = "green" if label == "useful steps" else "yellow"
            bar = ProgressBar(total=1.0, completed=share, width=30, complete_style=style, finished_style=style)
            table.add_row(label, duration(seconds), f"{100 * share:.1f} %", bar)
    return Padding(table, (0, 0, 0, 2))


def _interruptions(all_of_them: tuple[Interruption, ...], most: int | None) -> RenderableType:
    shown = all_of_them[-most:] if most is not None else all_of_them
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("interruption", no_wrap=True)
    table.add_column("cause", ratio=1, min_width=16, overflow="fold")
    for title in ("at step", "on from", "lost", "down", "world"):
        table.add_column(title, justify="right", no_wrap=True)
    for one in shown:
        node = "" if one.node is None else f" ({one.node})"
        doing = f", in {one.phase}" if one.cause == KILLED and one.phase != "step" else ""
        world = f"{one.world_before}" if one.world_after in (None, one.world_before) else f"{one.world_before} > {one.world_after}"
        table.add_row(
            _moment(one.time),
            Text(f"{one.cause}{node}{doing}"),
            "-" if one.step is None else str(one.step),
            "-" if one.resumed_from is None else str(one.resumed_from),
            str(one.lost_steps),
            duration(one.downtime) if one.world_after is not None else "-",
            world,
        )
    earlier = len(all_of_them) - len(shown)
    lines: list[RenderableType] = [table] if not earlier else [table, Text(f"and {earlier} earlier ones (--once shows all)", style="dim")]
    return Padding(Group(*lines), (1, 0, 0, 2))


def _moment(seconds: float) -> str:
    return time.strftime("%m-%d %H:%M:%S", time.localtime(seconds))
