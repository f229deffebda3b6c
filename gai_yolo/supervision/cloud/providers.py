"""How the clouds announce that a machine goes away: what is asked, and what is a notice.

Only a well-formed notice is one, and only an explicit "nothing" is none; all else raises one of `FAILURES`.
"""

from __future__ import annotations

import contextlib
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any, ClassVar, Literal

from gai_yolo.supervision.cloud.http import ANSWER_SECONDS, FAILURES, Answer, HttpClient

Provider = Literal["aws", "gcp", "azure"]

CLOUD_NAMES: dict[Provider, str] = {"aws": "AWS", "gcp": "Google Cloud", "azure": "Azure"}
FINDING_SECONDS = 1.0
"""An answer takes no longer while it is not known whether there is a cloud."""


@dataclass(frozen=True)
class CloudNotice:
    """What the cloud has announced for this machine."""

    provider: Provider
    what: str
    """For people: `spot interruption (terminate) at 2026-11-25T03:00:00Z`."""
    leave: bool
    """True: the machine goes away in seconds or minutes. False: advice; a snapshot is worth taking, nobody leaves."""


class Cloud(ABC):
    """How one cloud is asked.

    Args:
        poll_seconds: between two times that the questions are asked; one of them may wait so long for news.
    """

    provider: ClassVar[Provider]

    def __init__(self, client: HttpClient, poll_seconds: float) -> None:
        self._client, self._poll_seconds = client, poll_seconds

    @staticmethod
    @abstractmethod
    def is_here(client: HttpClient) -> bool:
        """Whether it is this cloud's service that answers; may raise any of `FAILURES` if not."""

    @abstractmethod
    def questions(self) -> list[Callable[[], CloudNotice | None]]:
        """What to ask, again and again. Each may raise any of `FAILURES`."""


class Aws(Cloud):
    """Spot interruptions and rebalance recommendations, with a token of IMDSv2."""

    provider = "aws"
    _token: str | None = None

    @staticmethod
    def is_here(client: HttpClient) -> bool:
        answer = Aws._ask_token(client, FINDING_SECONDS)
        # The header tells it from servers that say yes to everything.
        return answer.status == 200 and answer.headers.get("X-aws-ec2-metadata-token-ttl-seconds", "").isdigit()

    def questions(self) -> list[Callable[[], CloudNotice | None]]:
        return [self._interruption, self._rebalance]

    def _interruption(self) -> CloudNotice | None:
        content = self._get("/latest/meta-data/spot/instance-action")
        if content is None:
            return None
        action, moment = content.get("action"), _moment(content.get("time"))
        if action not in ("terminate", "stop", "hibernate"):
            raise ValueError("an action that there is not")
        return CloudNotice("aws", f"spot interruption ({action}) at {moment}", leave=True)

    def _rebalance(self) -> CloudNotice | None:
        content = self._get("/latest/meta-data/events/recommendations/rebalance")
        if content is None:
            return None
        return CloudNotice("aws", f"rebalance recommendation of {_moment(content.get('noticeTime'))}", leave=False)

    def _get(self, path: str) -> dict[str, Any] | None:
        """What is there; None if explicitly nothing."""
        for _ in range(2):
            answer = self._get_with_token(path)
            if answer.status != 401:
                break
            self._token = None  # it has expired
        return None if answer.status == 404 else answer.record()

    def _get_with_token(self, path: str) -> Answer:
        if self._token is None:
            token = self._ask_token(self._client, ANSWER_SECONDS).text()
            if not re.fullmatch(r"[!-~]{1,1024}", token):
                raise ValueError("a token that is none")
            self._token = token
        return self._client.ask("GET", path, {"X-aws-ec2-metadata-token": self._token})

    @staticmethod
    def _ask_token(client: HttpClient, seconds: float) -> Answer:
        return client.ask("PUT", "/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "21600"}, seconds)


class Gcp(Cloud):
    """Google Cloud. A stop for host maintenance counts as advice: machines with a GPU hear of it an hour before, and come back."""

    provider = "gcp"
    _version: str | None = None

    @staticmethod
    def is_here(client: HttpClient) -> bool:
        return Gcp._get(client, "", FINDING_SECONDS).status == 200

    def questions(self) -> list[Callable[[], CloudNotice | None]]:
        return [self._preempted, self._maintenance]

    def _preempted(self) -> CloudNotice | None:
        path, seconds = "instance/preempted", ANSWER_SECONDS
        if self._version is not None:
            # Answered as soon as the value is another than that of this version, so that nothing slips through in between.
            wait_seconds = max(1, math.ceil(self._poll_seconds))
            path += f"?wait_for_change=true&timeout_sec={wait_seconds}&last_etag={self._version}"
            seconds += wait_seconds
        answer = self._get(self._client, path, seconds)
        value = answer.text().strip()
        if value not in ("TRUE", "FALSE"):
            raise ValueError("instance/preempted is neither TRUE nor FALSE")
        version = answer.headers.get("ETag", "")
        self._version = version if re.fullmatch(r"[0-9A-Za-z]{1,64}", version) else None
        return CloudNotice("gcp", "preemption", leave=True) if value == "TRUE" else None

    def _maintenance(self) -> CloudNotice | None:
        value = self._get(self._client, "instance/maintenance-event").text().strip()
        if value not in ("NONE", "MIGRATE_ON_HOST_MAINTENANCE", "TERMINATE_ON_HOST_MAINTENANCE"):
            raise ValueError("instance/maintenance-event has a value that there is not")
        return CloudNotice("gcp", "host maintenance that stops the machine", leave=False) if value.startswith("TERMINATE") else None

    @staticmethod
    def _get(client: HttpClient, path: str, seconds: float = ANSWER_SECONDS) -> Answer:
        answer = client.ask("GET", f"/computeMetadata/v1/{path}", {"Metadata-Flavor": "Google"}, seconds)
        if answer.headers.get("Metadata-Flavor") != "Google":
            raise ValueError("it is not Google that answers")
        return answer


class Azure(Cloud):
    """Scheduled events. Reboot and Redeploy count as advice: they may be days ahead, and the machine comes back."""

    provider = "azure"
    _name: str | None = None

    @staticmethod
    def is_here(client: HttpClient) -> bool:
        answer = client.ask("GET", "/metadata/versions", {"Metadata": "true"}, FINDING_SECONDS)
        return isinstance(answer.record().get("apiVersions"), list)

    def questions(self) -> list[Callable[[], CloudNotice | None]]:
        return [self._events]

    def _events(self) -> CloudNotice | None:
        if self._name is None:
            with contextlib.suppress(*FAILURES):
                self._name = self._ask_name()
        events = self._get("scheduledevents?api-version=2020-07-01").record().get("Events")
        if not isinstance(events, list):
            raise ValueError("a list of events that is none")
        found, malformed = [], False
        for event in events:
            try:
                if notice := self._notice_of(event):
                    found.append(notice)
            except ValueError:  # another machine's, perhaps: it must not hide ours
                malformed = True
        if malformed and not found:
            raise ValueError("an event that is none")
        return max(found, key=lambda notice: notice.leave, default=None)

    def _ask_name(self) -> str | None:
        name = self._get("instance/compute/name?api-version=2021-02-01&format=text").text().strip()
        return name.casefold() if re.fullmatch(r"[\w.-]{1,80}", name) else None

    def _get(self, path: str) -> Answer:
        return self._client.ask("GET", f"/metadata/{path}", {"Metadata": "true"})

    def _notice_of(self, event: object) -> CloudNotice | None:
        """The notice that an event is to this machine, if any."""
        if not isinstance(event, dict) or not isinstance(event.get("EventType"), str):
            raise ValueError("an event that is none")
        kind, resources, moment = event["EventType"], event.get("Resources"), event.get("NotBefore")
        if not isinstance(resources, list) or not all(isinstance(name, str) for name in resources):
            raise ValueError("resources that are none")
        if kind not in ("Preempt", "Terminate", "Reboot", "Redeploy"):
            return None  # Freeze: the machine stands still for seconds and loses nothing
        if self._name is not None and resources and self._name not in (name.casefold() for name in resources):
            return None
        when = "now" if moment == "" else f"at {_moment(moment)}"  # empty once it has begun
        return CloudNotice("azure", f"scheduled event {kind} {when}", leave=kind in ("Preempt", "Terminate"))


def _moment(text: object) -> str:
    """A point in time in ISO 8601, from ISO 8601 or the format of HTTP.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(text, str):
        raise ValueError("a time that is none")
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        try:
            moment = parsedate_to_datetime(text)
        except (TypeError, LookupError, ArithmeticError) as error:
            raise ValueError("a time that is none") from error
    return moment.isoformat(timespec="seconds").replace("+00:00", "Z")


CLOUDS: tuple[type[Cloud], ...] = (Gcp, Azure, Aws)
"""In the order in which they are told apart: by what only they answer."""
