"""Watches the cloud's metadata service for the news that this machine is about to go away.

A daemon thread asks, and a flag holds what stands; nothing else happens here. A notice may come late, be withdrawn, or never
come, and whatever answers at that address may lie: only a well-formed notice is one, only an explicit "nothing" withdraws it, and all
else is a failure, after which what stood still stands and the question is put again.

Which of them is asked, the machine's firmware decides. 169.254.169.254 is an address of the link: where there is no such service, anybody
on the same link may answer there. On a machine of nobody's cloud nothing is asked.

Where it cannot see: with an IMDSv2 hop limit of 1 (the default of many AWS machines), containers without the host's network get no
token; GKE with Workload Identity hides `instance/preempted` from pods. SIGTERM is the notice there. Where the firmware's words are hidden
(gVisor, some ARM boards), `auto` asks nobody: name the cloud.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from gai_yolo.log import OF_NODE
from gai_yolo.supervision.cloud.http import FAILURES, HttpClient
from gai_yolo.supervision.cloud.providers import CLOUD_NAMES, CLOUDS, FINDING_SECONDS, Cloud, CloudNotice, Provider

logger = logging.getLogger(__name__)

ADDRESS = "http://169.254.169.254"
"""All three clouds answer here; Google's also by name, but a look-up of a name cannot be cut short."""
FINDING_ROUNDS = 3
"""So often is every cloud asked: a machine that is busy starting may miss the first time."""
FAILURES_UNTOLD = 20
"""Polls that may fail in a row before someone is told: Azure's first answer may take two minutes."""
DMI, HYPERVISOR = Path("/sys/class/dmi/id"), Path("/sys/hypervisor")
"""Linux; readable to all, in containers too."""
AZURE_TAG = "7783-7084-3265-9085-8269-3286-77"
"""Asset tag of the chassis of Azure's machines. Their vendor is that of every Hyper-V."""
MOST_LETTERS = 256


def machine_vendor(dmi: Path = DMI, hypervisor: Path = HYPERVISOR) -> Provider | None:
    """The cloud that this machine is part of; None: none of the three, or the firmware's words cannot be read."""
    vendors = {_said_in(dmi / name) for name in ("sys_vendor", "bios_vendor", "board_vendor")}
    # Older machines of AWS are Xen's, with the vendor's name in the version and in the machine's number.
    if "amazon ec2" in vendors or "amazon" in _said_in(dmi / "bios_version") or _said_in(hypervisor / "uuid").startswith("ec2"):
        return "aws"
    if _said_in(dmi / "product_name") == "google compute engine":
        return "gcp"
    return "azure" if _said_in(dmi / "chassis_asset_tag") == AZURE_TAG else None


def _said_in(path: Path) -> str:
    """What stands there, in small letters; empty if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(MOST_LETTERS).decode(errors="replace").strip().casefold()
    except OSError:
        return ""


class CloudWatch:
    """Knows the notice that stands now. `start` at the beginning of the job, `notice` at each step boundary, `close` at its end.

    Nothing of what the service answers, or does not answer, raises, or delays the job. People are told when a notice comes or goes, and
    once when the service cannot be read.

    Args:
        setting: whose service to ask; `auto` finds out, and stops for good without a word when there is none.
        endpoint: in place of the cloud's own address; somebody has vouched for it, so with `auto` all clouds are tried there.
        poll_seconds: between two polls. Google is asked to answer at once when something changes.
        vendor: whose machine this is.

    Raises:
        ConfigError: the endpoint is no address.
    """

    def __init__(
        self,
        setting: Literal["auto", "aws", "gcp", "azure", "none"],
        endpoint: str | None = None,
        poll_seconds: float = 5.0,
        vendor: Callable[[], Provider | None] = machine_vendor,
    ) -> None:
        assert poll_seconds > 0
        self._kinds = _kinds(setting, endpoint, vendor)
        self._setting, self._poll_seconds = setting, poll_seconds
        self._client = HttpClient(endpoint or ADDRESS)
        self._stop = threading.Event()
        self._notice: CloudNotice | None = None
        self._told_of_failure = False
        self._thread = threading.Thread(target=self._watch, name="cloud-notices", daemon=True)

    def start(self) -> None:
        """Begin to watch; to be called once."""
        if not self._kinds:
            return
        try:
            self._thread.start()
        except RuntimeError as error:  # no more threads
            _say(f"elastic.notices: the cloud's notices are not watched ({error}); SIGTERM is still heeded.")

    def notice(self) -> CloudNotice | None:
        """What is announced now, one that means leaving before advice; None when there is nothing, or it was withdrawn."""
        return self._notice

    def close(self) -> None:
        """End the thread, also while it waits for an answer. What was announced stays to be read."""
        self._stop.set()
        self._client.hang_up()
        if self._thread.ident is not None:
            self._thread.join(FINDING_SECONDS)  # longer only where people cannot be told; it will end by itself

    def _watch(self) -> None:
        cloud = self._find()
        if cloud is None:
            return
        questions = [_Question(ask) for ask in cloud.questions()]
        while not self._stop.is_set():
            began = time.monotonic()
            for question in questions:
                self._put(cloud.provider, question)
                standing = [each.standing for each in questions if each.standing]
                self._notice = max(standing, key=lambda notice: notice.leave, default=None)
                question.tell_of_change()
            self._stop.wait(max(0.0, began + self._poll_seconds - time.monotonic()))

    def _find(self) -> Cloud | None:
        if self._setting != "auto":
            return self._kinds[0](self._client, self._poll_seconds)
        for _ in range(FINDING_ROUNDS):
            for kind in self._kinds:
                with contextlib.suppress(*FAILURES):
                    if kind.is_here(self._client):
                        return kind(self._client, self._poll_seconds)
            if self._stop.wait(self._poll_seconds):
                break
        return None

    def _put(self, provider: Provider, question: _Question) -> None:
        try:
            question.standing = question.ask()
            question.failures = 0
        except FAILURES as error:
            question.failures += 1
            if question.failures > FAILURES_UNTOLD and not self._told_of_failure and not self._stop.is_set():
                self._told_of_failure = True
                reason = "".join(c for c in str(error)[:120] if c.isprintable()) or type(error).__name__
                _say(
                    f"elastic.notices: {CLOUD_NAMES[provider]}'s metadata service cannot be read ({reason}); it is asked again every "
                    f"{self._poll_seconds:g} s, and SIGTERM is still heeded. Set elastic.notices: none if there is no such service here."
                )


def _kinds(setting: str, endpoint: str | None, vendor: Callable[[], Provider | None]) -> list[type[Cloud]]:
    """The clouds that may be asked, in the order in which they are tried."""
    if setting == "auto" and endpoint is not None:
        return list(CLOUDS)
    wanted = vendor() if setting == "auto" else setting
    return [kind for kind in CLOUDS if kind.provider == wanted]


class _Question:
    """One thing that is asked again and again, and the last answer that could be understood."""

    def __init__(self, ask: Callable[[], CloudNotice | None]) -> None:
        self.ask = ask
        self.standing: CloudNotice | None = None
        self.failures = 0
        self._told: CloudNotice | None = None

    def tell_of_change(self) -> None:
        """Say what has come or gone since the last time."""
        if self.standing is not None and self.standing != self._told:
            _say(f"{CLOUD_NAMES[self.standing.provider]} announces: {self.standing.what}")
        if self.standing is None and self._told is not None:
            _say(f"{CLOUD_NAMES[self._told.provider]} has withdrawn its notice: {self._told.what}")
        self._told = self.standing


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # a closed terminal must not end the watch
        logger.warning(text, extra=OF_NODE)
