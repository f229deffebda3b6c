"""`gai-yolo snapshots`: shows, checks, thins out and repairs the checkpoints of a run, and goes back to an older one."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from calendar import timegm
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from gai_yolo.config import load_config
from gai_yolo.errors import REFUSED, CheckpointError
from gai_yolo.store.best import read_record
from gai_yolo.store.catalogue import NO_MANIFEST, Catalogue
from gai_yolo.store.manifest import FOLDERS, Kind, Manifest
from gai_yolo.store.retention import Policy, decide
from gai_yolo.store.run_folder import RunFolder

TABLE_WIDTH = 160
"""Columns of a table that goes to a file or a pipe."""


@dataclass(frozen=True)
class Row:
    """One checkpoint, or what lies under the name of one."""

    name: str
    """Relative to the run folder."""
    state: str
    """`complete` (digest verified), `present` (size checked), `bad`, `removed`, `adopted`."""
    epoch: int | None = None
    step: int | None = None
    samples: int | None = None
    size: int | None = None
    """Bytes."""
    age_seconds: float | None = None
    metric: float | None = None
    """mAP50-95."""
    note: str = ""
    """Why it is bad, or what retention says."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, text, _) in COMMANDS.items():
        one = commands.add_parser(name, help=text, description=text)
        one.add_argument("runs", type=Path, nargs=1, metavar="RUN_FOLDER", help="experiments/NAME")
        one.add_argument("--json", action="store_true", help="print JSON in place of a table")
        if name == "prune":
            one.add_argument("--dry-run", action="store_true", help="say what would be removed, and remove nothing")
        if name == "rollback":
            one.add_argument("--to", required=True, metavar="epoch:N|step:N", help="the state that the next start is to go on from")


def snapshots(given: argparse.Namespace) -> int:
    """Run a command; returns the exit code. Raises `Refusal`."""
    (given.run,) = given.runs
    must_be_run(given.run)
    command, _, nothing = COMMANDS[given.command]
    rows = command(given)
    show(rows, given.json, nothing)
    bad = [row for row in rows if row.state == "bad"]
    if given.command == "adopt":
        for row in bad:
            print(f"error: {row.note}", file=sys.stderr)
        return REFUSED if bad else 0
    return 1 if given.command == "verify" and bad else 0


def must_be_run(folder: Path) -> None:
    """Refuse what is not the folder of a run."""
    if not (folder / FOLDERS["epoch"]).is_dir():
        raise CheckpointError(f"{folder}: not the folder of a run; give one that holds {FOLDERS['epoch']}/, such as experiments/shapes.")


def ls(given: argparse.Namespace) -> list[Row]:
    """What is there, by names and sizes, to `verify` with every byte read."""
    catalogue, policy, verify = Catalogue(given.run), _policy(given.run), given.command == "verify"
    listing = catalogue.listing()
    reasons = {manifest: catalogue.defect_of(manifest) if verify else None for manifest in listing.present}
    good = [manifest for manifest in listing.present if reasons[manifest] is None]
    says = {d.manifest: ("" if d.keep else "would be removed: ") + d.reason for d in decide(good, policy)}
    rows = [
        _row(manifest, "bad", reason) if reason else _row(manifest, "complete" if verify else "present", says[manifest])
        for manifest, reason in reasons.items()
    ]
    return rows + [Row(f"{defect.path.parent.name}/{defect.path.name}", "bad", note=defect.reason) for defect in listing.defects]


def prune(given: argparse.Namespace) -> list[Row]:
    """Remove what retention lets go, as the run's own configuration says."""
    policy = _policy(given.run)
    if given.dry_run:
        going = [decision for decision in Catalogue(given.run).plan_pruning(policy) if not decision.keep]
        return [_row(decision.manifest, "would be removed", decision.reason) for decision in going]
    with _locked(given.run) as folder:
        return [_row(decision.manifest, "removed", decision.reason) for decision in folder.store.prune(policy)]


def adopt(given: argparse.Namespace) -> list[Row]:
    """Verify checkpoints without a manifest and give them one."""
    from gai_yolo.checkpointing.adoption import manifest_for  # loads torch, which the other commands do without

    rows = []
    with _locked(given.run) as folder:
        for defect in folder.store.listing().defects:
            kind: Kind = "epoch" if defect.path.parent.name == FOLDERS["epoch"] else "step"
            if defect.reason == NO_MANIFEST:
                try:
                    rows.append(_row(folder.store.adopt(manifest_for(defect.path, kind)), "adopted", "verified; it has a manifest now"))
                except CheckpointError as error:
                    rows.append(Row(f"{defect.path.parent.name}/{defect.path.name}", "bad", note=str(error)))
    return rows


def rollback(given: argparse.Namespace) -> list[Row]:
    """Move what is newer than a state aside, so that the next start goes on from it."""
    from gai_yolo.job.rollback import roll_back  # loads torch, which the other commands do without

    with _locked(given.run) as folder:
        done = roll_back(folder, given.to)
    where = done.aside.relative_to(folder.path)
    note = "the next start goes on from here; newer states in the memories and on the disks of nodes are moved aside then"
    return [_row(done.target, "newest", note), *(Row(name, "moved", note=f"now in {where}") for name in done.moved)]


COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], list[Row]], str, str]] = {
    "ls": (ls, "show position, size, age and state; reads no data", "no checkpoints"),
    "verify": (ls, "read everything and compare the digests; exit code 1 if anything is bad", "no checkpoints"),
    "prune": (prune, "remove what the run's configuration does not keep", "nothing to remove"),
    "adopt": (adopt, "verify checkpoints that have no manifest and give them one", "nothing to adopt"),
    "rollback": (rollback, "go back to an older state: move what is newer aside (nothing is deleted)", ""),
}
"""With what is said of each, and of an empty result."""


def show(rows: list[Row], as_json: bool, nothing: str) -> None:
    """Print a table, or JSON, or the words for nothing."""
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return
    if not rows:
        print(nothing)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("name", "epoch", "step", "MB", "age", "mAP50-95", "state"):
        table.add_column(title, justify="left" if title in ("name", "state") else "right", no_wrap=True)
    table.add_column("", min_width=20)
    for row in rows:
        size = "" if row.size is None else f"{row.size / 1e6:.1f}"
        metric = "" if row.metric is None else f"{row.metric:.4f}"
        state = f"[bold red]{row.state}[/]" if row.state == "bad" else row.state
        position = ["" if value is None else str(value) for value in (row.epoch, row.step)]
        table.add_row(row.name, *position, size, _age(row.age_seconds), metric, state, row.note.replace("[", r"\["))
    Console(highlight=False, width=None if sys.stdout.isatty() else TABLE_WIDTH).print(table)


def _row(manifest: Manifest, state: str, note: str) -> Row:
    position = manifest.position
    try:
        age = round(time.time() - timegm(time.strptime(manifest.time, "%Y-%m-%dT%H:%M:%SZ")), 1)
    except ValueError:
        age = None
    name = f"{FOLDERS[manifest.kind]}/{manifest.stem}.pt"
    return Row(name, state, position.epoch, position.step, position.samples, manifest.size, age, manifest.metric, note)


def _policy(run: Path) -> Policy:
    path = run / "config.yaml"
    if not path.exists():
        raise CheckpointError(f"{run}: has no config.yaml; give the folder of a run, such as experiments/shapes.")
    settings = load_config(path).snapshots
    record = read_record(Catalogue(run))
    return Policy(settings.keep, settings.keep_epochs, settings.keep_every, -1 if record is None else record.since)


@contextlib.contextmanager
def _locked(run: Path) -> Iterator[RunFolder]:
    """While something changes a run, which a running job must not see."""
    folder = RunFolder(run.resolve())
    folder.lock()
    try:
        yield folder
    finally:
        folder.release()


def _age(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
