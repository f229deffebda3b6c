"""Metadata services of three clouds that do as they are told: give notice, withdraw it, or lie.

In a test: `with AwsServer() as server: server.give()`. As a process, for a node in a network namespace of its own:

    python -m tests.faults.metadata_servers aws --host 169.254.169.254 --port 80

prints its address, then `served` once a notice has been given out; it is told on stdin, a line each: `give`, `advise`, `withdraw`,
`lie KIND`, `honest`, and ends with its stdin.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import ClassVar, Literal, Self, get_args
from urllib.parse import parse_qs, urlsplit

Lie = Literal[
    "error", "nonsense", "no http", "truncated", "cut off", "wrong", "nested", "hang", "drip", "drop", "redirect", "flood", "continue"
]
LIES: tuple[Lie, ...] = get_args(Lie)
TIME = "2026-11-25T03:00:00Z"
MACHINE = "machine_7"
FLOOD_BYTES = 32 * 1024 * 1024
"""More than fits into the buffers between client and server."""


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]


@dataclass(frozen=True)
class Reply:
    status: int
    body: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    is_notice: bool = False


class MetadataServer(ABC):
    """One cloud's service, answering in threads until `close`.

    Args:
        host: to listen at.
        port: 0 for any that is free.
    """

    provider: ClassVar[Literal["aws", "gcp", "azure"]]
    wrong: ClassVar[tuple[str, ...]]
    """Bodies that are almost a notice."""
    introduction: ClassVar[tuple[str, ...]]
    """Beginnings of the paths by which the service makes itself known."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self.lie: Lie | None = None
        """How the service lies about notices; None: it does not."""
        self.lies_always = False
        """Whether it also lies while it introduces itself."""
        self.requests: list[Request] = []
        self.served = threading.Event()
        """A notice or advice was given out in full."""
        self.lied = 0
        """Answers that were lies; of those that take their time, the begun ones."""
        self.flooded = 0
        """Bytes of the longest flood that were taken."""
        self.changed = threading.Condition()
        self.closing = threading.Event()
        self._server = _Server((host, port), _Handler)
        self._server.owner = self
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Where it answers."""
        host, port = self._server.server_address[:2]
        return f"http://{host!s}:{port}"

    @abstractmethod
    def give(self) -> None:
        """Give notice that the machine goes away."""

    @abstractmethod
    def advise(self) -> None:
        """Announce something that is not yet the end of the machine."""

    @abstractmethod
    def withdraw(self) -> None:
        """Take back what was announced."""

    @abstractmethod
    def answer(self, request: Request) -> Reply:
        """The honest answer."""

    def count(self, part: str) -> int:
        """Requests so far whose path contains this."""
        return sum(part in request.path for request in list(self.requests))

    def close(self) -> None:
        """Stop to listen, and let go of those who wait."""
        self.closing.set()
        with self.changed:
            self.changed.notify_all()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class AwsServer(MetadataServer):
    """IMDSv2: without a valid token everything is 401."""

    provider = "aws"
    introduction = ("/latest/api/token",)
    wrong = (
        "null",
        "[]",
        '"terminate"',
        '{"action": "terminate"}',
        '{"action": "party", "time": "2026-11-25T03:00:00Z"}',
        '{"action": ["terminate"], "time": "2026-11-25T03:00:00Z"}',
        '{"action": "terminate", "time": 5}',
        '{"action": "terminate", "time": "soon"}',
        '{"noticeTime": {}}',
    )

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self.action: str | None = None
        self.rebalance = False
        self.tokens_given = 0
        self._tokens: set[str] = set()
        super().__init__(host, port)

    def give(self, action: str = "terminate") -> None:
        self.action = action

    def advise(self) -> None:
        self.rebalance = True

    def withdraw(self) -> None:
        self.action, self.rebalance = None, False

    def expire_tokens(self) -> None:
        """No token that was given out is valid any more."""
        self._tokens.clear()

    def answer(self, request: Request) -> Reply:
        if request.path == "/latest/api/token":
            return self._token(request)
        if request.headers.get("x-aws-ec2-metadata-token") not in self._tokens:
            return Reply(401)
        if request.path == "/latest/meta-data/spot/instance-action" and self.action:
            return Reply(200, json.dumps({"action": self.action, "time": TIME}), is_notice=True)
        if request.path == "/latest/meta-data/events/recommendations/rebalance" and self.rebalance:
            return Reply(200, json.dumps({"noticeTime": TIME}), is_notice=True)
        return Reply(404, "<html>Not Found</html>")

    def _token(self, request: Request) -> Reply:
        seconds = request.headers.get("x-aws-ec2-metadata-token-ttl-seconds", "")
        if request.method != "PUT" or not seconds.isdigit() or not 1 <= int(seconds) <= 21600:
            return Reply(405 if request.method != "PUT" else 400)
        self.tokens_given += 1
        token = f"AQAEA{self.tokens_given}=="
        self._tokens.add(token)
        return Reply(200, token, {"X-aws-ec2-metadata-token-ttl-seconds": seconds})


class GcpServer(MetadataServer):
    """Values with versions; `wait_for_change` waits for another version than `last_etag`, or for `timeout_sec`."""

    provider = "gcp"
    introduction = ("/computeMetadata/v1/?",)
    wrong = ("", "true", "YES", "TRUE TRUE", "1", '{"preempted": true}', "TERMINATE", "NULL")

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self._values = {"instance/preempted": "FALSE", "instance/maintenance-event": "NONE"}
        super().__init__(host, port)

    def give(self) -> None:
        self._change("instance/preempted", "TRUE")

    def advise(self) -> None:
        self._change("instance/maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE")

    def withdraw(self) -> None:
        self._change("instance/preempted", "FALSE")
        self._change("instance/maintenance-event", "NONE")

    def migrate(self) -> None:
        """Announce that the machine moves to another host while it runs, which is none of the job's business."""
        self._change("instance/maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE")

    def _change(self, key: str, value: str) -> None:
        with self.changed:
            self._values[key] = value
            self.changed.notify_all()

    def answer(self, request: Request) -> Reply:
        ours = {"Metadata-Flavor": "Google"}
        if request.headers.get("metadata-flavor") != "Google":
            return Reply(403, "Missing Metadata-Flavor:Google header.", ours)
        if request.path == "/computeMetadata/v1/":
            return Reply(200, "instance/\nproject/\n", ours)
        key = request.path.removeprefix("/computeMetadata/v1/")
        if key not in self._values:
            return Reply(404, "", ours)
        with self.changed:
            if request.query.get("wait_for_change") == "true":
                last = request.query.get("last_etag") or _version(self._values[key])
                seconds = float(request.query.get("timeout_sec", "3600"))
                self.changed.wait_for(lambda: self.closing.is_set() or _version(self._values[key]) != last, seconds)
            value = self._values[key]
        return Reply(200, value, {**ours, "ETag": _version(value)}, is_notice=value.startswith("T"))


def _version(value: str) -> str:
    return hashlib.sha256(value.encode()).hexdigest()[:16]


class AzureServer(MetadataServer):
    """Scheduled events of several machines; without the header `Metadata: true` everything is 400."""

    provider = "azure"
    introduction = ("/metadata/versions", "/metadata/instance")
    wrong = (
        "[]",
        "{}",
        '{"Events": {}}',
        '{"Events": "Preempt"}',
        '{"Events": [5]}',
        '{"Events": [{"EventType": ["Preempt"], "Resources": ["machine_7"], "NotBefore": ""}]}',
        '{"Events": [{"EventType": "Preempt", "Resources": "machine_7", "NotBefore": ""}]}',
        '{"Events": [{"EventType": "Preempt", "Resources": [7], "NotBefore": ""}]}',
        '{"Events": [{"EventType": "Preempt", "Resources": ["machine_7"], "NotBefore": {}}]}',
        '{"Events": [{"EventType": "Preempt", "Resources": ["machine_7"], "NotBefore": "soon"}]}',
        '{"Events": [{"EventType": "Preempt", "Resources": ["machine_7"]}]}',
    )

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self.events: list[object] = []
        self.name: str | None = MACHINE.upper()
        super().__init__(host, port)

    def give(self, kind: str = "Preempt", machine: str = MACHINE, begun: bool = False) -> None:
        self.events = [
            *self.events,
            {
                "EventId": f"event-{len(self.events)}",
                "EventType": kind,
                "ResourceType": "VirtualMachine",
                "Resources": ["another_1", machine],
                "EventStatus": "Started" if begun else "Scheduled",
                "NotBefore": "" if begun else "Wed, 25 Nov 2026 03:00:00 GMT",
                "Description": "",
                "EventSource": "Platform",
            },
        ]

    def advise(self) -> None:
        self.give("Redeploy")

    def withdraw(self) -> None:
        self.events = []

    def answer(self, request: Request) -> Reply:
        if request.headers.get("metadata") != "true":
            return Reply(400, '{"error": "Bad request. Required metadata header not specified"}')
        if request.path == "/metadata/versions":
            return Reply(200, json.dumps({"apiVersions": ["2020-07-01", "2021-02-01"]}))
        if "api-version" not in request.query:
            return Reply(400)
        if request.path == "/metadata/instance/compute/name" and self.name:
            return Reply(200, self.name)
        if request.path == "/metadata/scheduledevents":
            return Reply(200, json.dumps({"DocumentIncarnation": 1, "Events": self.events}), is_notice=bool(self.events))
        return Reply(404)


SERVERS: dict[str, type[MetadataServer]] = {kind.provider: kind for kind in (AwsServer, GcpServer, AzureServer)}


class _Server(ThreadingHTTPServer):
    owner: MetadataServer
    daemon_threads = True
    request_queue_size = 32

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has gone is what the tests are about."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Silence."""

    def do_GET(self) -> None:
        self._handle()

    def do_PUT(self) -> None:
        self._handle()

    def _handle(self) -> None:
        owner, address = self.server.owner, urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(address.query).items()}
        request = Request(self.command, address.path, query, {name.lower(): value for name, value in self.headers.items()})
        owner.requests.append(request)
        introduces = (address.path + "?").startswith(owner.introduction)
        if owner.lie is not None and (owner.lies_always or not introduces):
            self.close_connection = True
            owner.lied += 1
            at_once = Request(request.method, request.path, {"api-version": "2020-07-01"}, request.headers)
            self._lie(owner.lie, owner.answer(at_once))
            return
        reply = owner.answer(request)
        self._send(reply)
        if reply.is_notice:
            owner.served.set()

    def _send(self, reply: Reply, length: int | None = None) -> None:
        """Send a reply, whatever length it says it has."""
        body = reply.body.encode()
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)

    def _lie(self, lie: Lie, honest: Reply) -> None:
        owner, half = self.server.owner, honest.body[: len(honest.body) // 2]
        ours = {"Metadata-Flavor": "Google"} if owner.provider == "gcp" else {}
        if lie == "error":
            self._send(Reply(500, owner.wrong[0], ours))
        elif lie == "nonsense":
            self._send(Reply(200, "<html><body>Please log in to TRUE WiFi</body></html>", ours))
        elif lie == "wrong":
            self._send(Reply(200, owner.wrong[owner.lied % len(owner.wrong)], ours))
        elif lie == "nested":
            self._send(Reply(200, "[" * 200_000, ours))
        elif lie == "truncated":
            self._send(Reply(200, half, ours))
        elif lie == "cut off":
            self._send(Reply(200, honest.body, ours), length=len(honest.body) + 5)
        elif lie == "redirect":
            self._send(Reply(302, "", {**ours, "Location": self.path}))
        else:
            self._lie_in_bytes(lie, honest)

    def _lie_in_bytes(self, lie: Lie, honest: Reply) -> None:
        closing = self.server.owner.closing
        if lie == "no http":
            self.wfile.write(b"\xff\x00\x1b[2J" * 100 + b"\n")
        elif lie == "hang":
            closing.wait()
        elif lie == "drip":
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
            while not closing.wait(0.05):
                self.wfile.write(b"x")
        elif lie == "continue":
            while not closing.wait(0.001):
                self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        elif lie == "flood":
            self._flood(honest)

    def _flood(self, honest: Reply) -> None:
        """The truth, and far too much of nothing after it."""
        self.wfile.write(
            "".join(["HTTP/1.1 200 OK\r\n", *(f"{name}: {value}\r\n" for name, value in honest.headers.items()), "\r\n"]).encode()
        )
        self.wfile.write(honest.body.encode())
        sent = 0
        while sent < FLOOD_BYTES:
            sent += self.wfile.write(b" " * 4096)
            self.server.owner.flooded = max(sent, self.server.owner.flooded)


def main() -> None:
    """Serve until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("provider", choices=sorted(SERVERS))
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args()
    with SERVERS[arguments.provider](arguments.host, arguments.port) as server:
        print(server.url, flush=True)
        threading.Thread(target=lambda: server.served.wait() and print("served", flush=True), daemon=True).start()
        for line in sys.stdin:
            _obey(server, line.strip())


def _obey(server: MetadataServer, order: str) -> None:
    lies = {f"lie {lie}": lie for lie in LIES}
    if order in ("give", "advise", "withdraw"):
        {"give": server.give, "advise": server.advise, "withdraw": server.withdraw}[order]()
    elif order in lies or order == "honest":
        server.lie = lies.get(order)
    else:
        print(f"{order!r} is not understood", file=sys.stderr)


if __name__ == "__main__":
    main()
