"""The loop of `gai-yolo launch`."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import secrets
import signal
import tempfile
import time
from pathlib import Path
from types import FrameType

from gai_yolo.errors import REFUSED, Ending, Refusal, is_transient
from gai_yolo.launcher import on_stderr
from gai_yolo.launcher.arguments import LaunchError, Settings, settings_from
from gai_yolo.launcher.command import agent_command, agent_environment
from gai_yolo.launcher.processes import CHILD_TICK, Child, end_orphans, reap_orphans
from gai_yolo.launcher.rendezvous.client import EndpointRendezvousClient, FileRendezvousClient, RendezvousClient
from gai_yolo.launcher.rendezvous.election import Target
from gai_yolo.launcher.rendezvous.file_store import StoreRefused
from gai_yolo.launcher.rendezvous.run_name import UNNAMED, JobDone, agree_on_run, numbered, random_name
from gai_yolo.launcher.rendezvous.secret import Secret, SecretError, read_secret, secret_for
from gai_yolo.launcher.verdict import CLOSED, FAILED, OBSTRUCTED, RENDEZVOUS_LOST, End, History, Verdict, code_when_told
from gai_yolo.log import showing
from gai_yolo.processes import adopt_orphans
from gai_yolo.supervision.outcome import Outcome, clear_outcome, read_outcome
from gai_yolo.supervision.streams import forgive_lost_streams

logger = logging.getLogger(__name__)

AGENT_PATIENCE = 40.0
"""Seconds from SIGTERM to SIGKILL of the agent, which gives its workers 30."""
START_AGAIN = 5.0
"""Seconds between two tries to begin, where a disk does not let the launcher."""
KILLED_PATIENCE = 5.0
"""Seconds for the workers of an agent that had to be killed."""


def main(given: argparse.Namespace) -> int:
    """Run a job on this node until it is done, or must not go on; returns the exit code.

    Raises:
        LaunchError: what the user must mend.
    """
    forgive_lost_streams()  # a log on a full disk, a terminal that is gone: neither ends a job
    is_waiting = False
    with showing(on_stderr):
        while True:
            try:
                settings = settings_from(given)
                with tempfile.TemporaryDirectory(prefix="gai-yolo-launch-", ignore_cleanup_errors=True) as folder:
                    secret = secret_for(settings.rendezvous or Path(folder) / "rendezvous", settings.secret)
                    return Launcher(settings, secret, Path(folder)).run()
            except Refusal as refusal:
                if not refusal.is_transient:
                    raise
                obstacle = str(refusal)
            except OSError as error:
                obstacle = f"{error.filename or tempfile.gettempdir()}: {error.strerror or error}."
                if not is_transient(error):
                    raise LaunchError(obstacle) from None
            if not is_waiting:
                logger.info(f"waiting: {obstacle} Trying again every {START_AGAIN:.0f} s.")
            is_waiting = True
            time.sleep(START_AGAIN)


class Signals:
    """What this process is told to do: signals that are remembered, until the end of the process."""

    def __init__(self) -> None:
        self.told: signal.Signals | None = None
        """The first one."""
        self.hurry = False
        """Ctrl-C was pressed again."""
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # some supervisors leave it ignored, and every agent would seem to end with 0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.told is None:
            self.told = signal.Signals(number)
        elif number == signal.SIGINT == self.told:
            self.hurry = True


class Launcher:
    """Keeps one agent going; the folder is of this launcher alone."""

    def __init__(self, settings: Settings, secret: Secret, folder: Path) -> None:
        self._settings, self._secret, self._folder = settings, secret, folder
        self._secret_file = secret.source or secret.keep(folder / "secret")
        self._outcome = folder / "outcome.json"
        self._signals = Signals()
        self._history = History()
        self._run: str | None = None
        self._job = settings.job or UNNAMED
        self._rendezvous = self._join(folder)
        with contextlib.suppress(OSError):
            adopt_orphans()

    def run(self) -> int:
        code = FAILED
        try:
            while True:
                verdict = self._try_once()
                if verdict.reason:
                    logger.info(verdict.reason)
                if verdict.exit_code is not None:
                    code = verdict.exit_code
                    return code
                self._sleep(verdict.wait)
        finally:
            self._rendezvous.close(code == 0, go_on=lambda: self._signals.told is None)

    def _try_once(self) -> Verdict:
        try:
            return self._once()
        except OSError as error:
            if not is_transient(error):
                raise
            # No memory for a process, no room for a file: what ended a worker must not end the launcher as well.
            reason = f"{error.filename or 'the agent'}: {error.strerror}."
            return self._history.judge(End(OBSTRUCTED, 0.0, Outcome(Ending.WAITING, reason), self._signals.told))

    def _once(self) -> Verdict:
        """Find the others and run one agent to its end."""
        target = self._find_target()
        if isinstance(target, Verdict):
            return target
        try:
            name = numbered(self._job) if self._settings.job else random_name
            self._run = agree_on_run(self._rendezvous.store(target), self._job, self._run, name)
        except JobDone:
            return self._history.judge(End(CLOSED, 0.0))
        except StoreRefused as error:
            return Verdict(REFUSED, f"--rendezvous {self._rendezvous.address(target)}: {error.strerror}.")
        except (OSError, ValueError) as error:
            logger.warning(f"{self._rendezvous.address(target)}: {getattr(error, 'strerror', None) or error}")
            return self._history.judge(End(RENDEZVOUS_LOST, 0.0, told=self._signals.told))
        self._rendezvous.remember(self._run)
        return self._history.judge(self._run_agent(target, self._run))

    def _find_target(self) -> Target | Verdict:
        patience = self._settings.rendezvous_settings["join_timeout"]
        deadline = time.monotonic() + patience
        while self._signals.told is None:
            target = self._rendezvous.target()
            if target is not None and target.answers:
                return target
            if time.monotonic() > deadline:
                return Verdict(FAILED, f"no endpoint of --rendezvous has answered for {patience} s")
            time.sleep(CHILD_TICK)
        return code_when_told(self._signals.told, None)

    def _run_agent(self, target: Target, run: str) -> End:
        self._look_after_folder()
        clear_outcome(self._outcome)
        local_address = self._rendezvous.local_address(target)
        agent = Child(
            agent_command(self._settings, self._rendezvous.address(target), run, local_address),
            agent_environment(os.environ, self._job, str(self._outcome), os.getpid(), self._secret_file, self._settings.fork_server),
        )
        moved = False
        while (code := agent.poll()) is None:
            reap_orphans([agent.pid])
            now = self._rendezvous.target()
            moved = now is not None and now.number != target.number
            if moved or self._signals.told is not None:
                code = agent.end(AGENT_PATIENCE, lambda: self._signals.hurry)
                break
            time.sleep(CHILD_TICK)
        seconds = time.monotonic() - agent.started
        killed_by_us = code == -signal.SIGKILL and (moved or self._signals.told is not None)
        end_orphans(KILLED_PATIENCE if killed_by_us else AGENT_PATIENCE, lambda: self._signals.hurry)
        return End(code, seconds, read_outcome(self._outcome), self._signals.told, moved)

    def _look_after_folder(self) -> None:
        """Put back what somebody has cleaned away while the job ran: this launcher's folder, the file with the secret."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(SecretError):
            if read_secret(self._secret_file).text == self._secret.text:
                return
        self._secret_file = self._secret.keep(self._folder / f"secret-{secrets.token_hex(4)}")

    def _sleep(self, seconds: float) -> None:
        """Wait, while endpoints are still looked at; a signal ends it."""
        deadline = time.monotonic() + seconds
        while self._signals.told is None and time.monotonic() < deadline:
            self._rendezvous.target()
            time.sleep(CHILD_TICK)

    def _join(self, folder: Path) -> RendezvousClient:
        rendezvous = self._settings.rendezvous
        if rendezvous is None:
            return FileRendezvousClient(folder / "rendezvous", self._secret, self._settings.host_name or "localhost")
        if isinstance(rendezvous, Path):
            return FileRendezvousClient(rendezvous, self._secret, self._settings.host_name)
        return EndpointRendezvousClient(rendezvous, self._secret, self._job, self._settings.host_name, self._settings.patience)
