"""The command `gai-yolo`.

`gai-yolo snapshots ls | verify | prune | adopt | rollback RUN_FOLDER` shows, checks, thins out and repairs the checkpoints of a run, and
goes back to an older one; `gai-yolo digest RUN_FOLDER ...` prints what its state is, to compare runs; `gai-yolo status RUN_FOLDER` says
where it is and what its interruptions cost; `gai-yolo launch -- SCRIPT ...` keeps a job going on this node; `gai-yolo data check PATH`
looks at a data set. Exit codes: 0 all is well, 1 `verify` found a bad one, the runs of `digest` differ or training would refuse the data
set, 2 refused with one line that says why; those of `launch` are in its `--help`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from calendar import timegm
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from gai_yolo.config import load_config
from gai_yolo.data_check import command as data_check
from gai_yolo.errors import CheckpointError, Refusal
from gai_yolo.launcher.arguments import add_arguments
from gai_yolo.launcher.supervisor import main as launch
from gai_yolo.store.best import read_record
from gai_yolo.store.catalogue import NO_MANIFEST, Catalogue
from gai_yolo.store.manifest import FOLDERS, Kind, Manifest
from gai_yolo.store.retention import Policy, decide
from gai_yolo.store.run_folder import RunFolder

PLAIN_WIDTH = 160
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run one command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="gai-yolo", description="Tools around runs of elastic_train.py.")
    tools = parser.add_subparsers(dest="tool", required=True)
    snapshots = tools.add_parser("snapshots", help="the checkpoints of a run")
    commands = snapshots.add_subparsers(dest="command", required=True)
    for name, (command, text) in COMMANDS.items():
        one = commands.add_parser(name, help=text, description=text)
        one.add_argument("runs", type=Path, nargs=1, metavar="RUN_FOLDER", help="experiments/NAME")
        if name == "prune":
            one.add_argument("--dry-run", action="store_true", help="say what would be removed, and remove nothing")
        if name == "rollback":
            one.add_argument("--to", required=True, metavar="epoch:N|step:N", help="the state that the next start is to go on from")
        one.set_defaults(function=lambda given, command=command: _on_snapshots(given, command))
    text = "print the SHA-256 of the parts of a run's newest state; of several runs, and whether they are equal"
    digest = tools.add_parser("digest", help=text, description=text)
    digest.add_argument("runs", type=Path, nargs="+", metavar="RUN_FOLDER", help="experiments/NAME")
    digest.add_argument("--checkpoint", metavar="NAME", help="epoch_010 or step_00000123, in place of the newest")
    digest.set_defaults(function=digests)
    text = "show where a run is, its interruptions and where its time went; on a terminal a live view"
    status = tools.add_parser("status", help=text, description=text)
    status.add_argument("runs", type=Path, nargs=1, metavar="RUN_FOLDER", help="experiments/NAME")
    status.add_argument("--once", action="store_true", help="print one report on a terminal too")
    status.set_defaults(function=_status)
    text = "run a training job on this node, and keep it going"
    launching = tools.add_parser("launch", help=text, description=text)
    add_arguments(launching)
    launching.set_defaults(function=launch, runs=[])
    data = tools.add_parser("data", help="the data set of a training").add_subparsers(dest="command", required=True)
    text = "read a data set as training would; show what is in it and what is wrong with it, in tables, report.json and pictures"
    checking = data.add_parser("check", help=text, description=text)
    data_check.add_arguments(checking)
    checking.set_defaults(function=data_check.check, runs=[])
    for one in (*commands.choices.values(), digest, status, checking):
        one.add_argument("--json", action="store_true", help="print JSON in place of a table")
    given = parser.parse_args(arguments)
    try:
        for run in given.runs:
            if given.tool != "status" and not (run / FOLDERS["epoch"]).is_dir():
                raise CheckpointError(
                    f"{run}: not the folder of a run; give one that holds {FOLDERS['epoch']}/, such as experiments/shapes."
                )
        code: int = given.function(given)
    except Refusal as refusal:
        print(f"error: {refusal}", file=sys.stderr)
        return refusal.exit_code
    except OSError as error:
        print(
            f"error: {error.filename or next(iter(given.runs), 'output')}: {error.strerror or error}; nothing complete was lost.",
            file=sys.stderr,
        )
        return Refusal.exit_code
    return code


def _on_snapshots(given: argparse.Namespace, command: Callable[[argparse.Namespace], list[Row]]) -> int:
    (given.run,) = given.runs
    rows = command(given)
    show(rows, given.json, NOTHING[given.command])
    bad = [row for row in rows if row.state == "bad"]
    if given.command == "adopt":
        for row in bad:
            print(f"error: {row.note}", file=sys.stderr)
        return Refusal.exit_code if bad else 0
    return 1 if given.command == "verify" and bad else 0


def _status(given: argparse.Namespace) -> int:
    from gai_yolo.reporting.status import show_status  # loads rich, which JSON of the other commands does without

    show_status(given.runs[0], given.json, given.once)
    return 0


def digests(given: argparse.Namespace) -> int:
    """Print the digests of the states of runs."""
    from gai_yolo.checkpointing.digest import part_digests  # loads torch, which the other commands do without
    from gai_yolo.checkpointing.recovery import load, newest

    found = []
    for run in given.runs:
        catalogue = Catalogue(run)
        one, passed_over = (load(catalogue, given.checkpoint), []) if given.checkpoint is not None else newest(catalogue)
        for text in passed_over:
            print(text, file=sys.stderr)
        if one is None:
            raise CheckpointError(f"{run}: holds no complete checkpoint.")
        try:
            found.append((run, one.path, part_digests(one.content)))
        except (KeyError, TypeError, AttributeError, ValueError):
            raise CheckpointError(f"{one.path}: does not hold a whole training state; it was not written by this program.") from None
    parts = found[0][2].keys()
    differing = [part for part in parts if len({of_parts[part] for _, _, of_parts in found}) > 1]
    if given.json:
        print(json.dumps([{"run": str(run), "checkpoint": str(path), "digests": of_parts} for run, path, of_parts in found], indent=1))
        return 1 if differing else 0
    for run, path, of_parts in found:
        print(f"{run}: {path.relative_to(run)}")
        for part in parts:
            print(f"  {part:<10} {of_parts[part]}{'   differs' if part in differing else ''}")
    if len(found) > 1:
        print(f"differ in {', '.join(differing)}" if differing else "equal, to the last bit")
    return 1 if differing else 0


def ls(given: argparse.Namespace) -> list[Row]:
    """What is there, by names and sizes."""
    return _rows(Catalogue(given.run), _policy(given.run), verify=False)


def verify(given: argparse.Namespace) -> list[Row]:
    """What is there, every byte read."""
    return _rows(Catalogue(given.run), _policy(given.run), verify=True)


def prune(given: argparse.Namespace) -> list[Row]:
    """Remove what retention lets go, as the run's own configuration says."""
    policy = _policy(given.run)
    if given.dry_run:
        going = [decision for decision in Catalogue(given.run).plan_pruning(policy) if not decision.keep]
        return [_row(decision.manifest, "would be removed", decision.reason) for decision in going]
    return _locked(given.run, lambda folder: [_row(d.manifest, "removed", d.reason) for d in folder.store.prune(policy)])


def adopt(given: argparse.Namespace) -> list[Row]:
    """Verify checkpoints without a manifest and give them one."""
    from gai_yolo.checkpointing.adoption import manifest_for  # loads torch, which the other commands do without

    def all_of(folder: RunFolder) -> list[Row]:
        rows = []
        for defect in folder.store.listing().defects:
            kind: Kind = "epoch" if defect.path.parent.name == FOLDERS["epoch"] else "step"
            if defect.reason == NO_MANIFEST:
                try:
                    rows.append(_row(folder.store.adopt(manifest_for(defect.path, kind)), "adopted", "verified; it has a manifest now"))
                except CheckpointError as error:
                    rows.append(Row(f"{defect.path.parent.name}/{defect.path.name}", "bad", note=str(error)))
        return rows

    return _locked(given.run, all_of)


def rollback(given: argparse.Namespace) -> list[Row]:
    """Move what is newer than a state aside, so that the next start goes on from it."""
    from gai_yolo.job.rollback import roll_back  # loads torch, which the other commands do without

    def back(folder: RunFolder) -> list[Row]:
        done = roll_back(folder, given.to, lambda text: print(f"warning: {text}", file=sys.stderr))
        where = done.aside.relative_to(folder.path)
        note = "the next start goes on from here; newer states in the memories and on the disks of nodes are moved aside then"
        return [_row(done.target, "newest", note), *(Row(name, "moved", note=f"now in {where}") for name in done.moved)]

    return _locked(given.run, back)


COMMANDS: dict[str, tuple[Callable[[argparse.Namespace], list[Row]], str]] = {
    "ls": (ls, "show position, size, age and state; reads no data"),
    "verify": (verify, "read everything and compare the digests; exit code 1 if anything is bad"),
    "prune": (prune, "remove what the run's configuration does not keep"),
    "adopt": (adopt, "verify checkpoints that have no manifest and give them one"),
    "rollback": (rollback, "go back to an older state: move what is newer aside (nothing is deleted)"),
}


NOTHING = {"ls": "no checkpoints", "verify": "no checkpoints", "prune": "nothing to remove", "adopt": "nothing to adopt", "rollback": ""}
"""What is said of an empty result."""


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
    Console(highlight=False, width=None if sys.stdout.isatty() else PLAIN_WIDTH).print(table)


def _rows(catalogue: Catalogue, policy: Policy, verify: bool) -> list[Row]:
    listing = catalogue.listing()
    reasons = {manifest: catalogue.defect_of(manifest) if verify else None for manifest in listing.present}
    good = [manifest for manifest in listing.present if reasons[manifest] is None]
    says = {d.manifest: ("" if d.keep else "would be removed: ") + d.reason for d in decide(good, policy)}
    rows = [
        _row(manifest, "bad", reason) if reason else _row(manifest, "complete" if verify else "present", says[manifest])
        for manifest, reason in reasons.items()
    ]
    return rows + [Row(f"{defect.path.parent.name}/{defect.path.name}", "bad", note=defect.reason) for defect in listing.defects]


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


def _locked(run: Path, action: Callable[[RunFolder], list[Row]]) -> list[Row]:
    """Do something that changes a run, which a running job must not see."""
    folder = RunFolder(run.resolve())
    folder.lock()
    try:
        return action(folder)
    finally:
        folder.release()


def _age(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


if __name__ == "__main__":
    sys.exit(main())
