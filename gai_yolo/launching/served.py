"""A board that one process serves to the others over TCP, and who is attached to it.

One JSON object a line, each way. Without authentication, as all of torch.distributed: the nodes' network must be a trusted one.
"""

from __future__ import annotations

import json
import socket
import socketserver
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gai_yolo.launching.board import Notes, pack, unpack

LIVE_SECONDS = 4.0
"""A launcher that was not heard of for so long is not counted. Each is heard of every second."""
IDLE_SECONDS = 60.0
"""A connection that says nothing for so long has lost its client."""
MOST_BYTES = 64 << 20


@dataclass(frozen=True)
class Endpoint:
    """Where a board is served."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether it can be reached from its own machine only."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")


class BoardServer:
    """Serves a board for as long as this process lives, in threads.

    Raises:
        OSError: the port is taken.
    """

    def __init__(self, endpoint: Endpoint, clock: Callable[[], float] = time.monotonic) -> None:
        self._notes = Notes()
        self._seen: dict[str, dict[str, float]] = defaultdict(dict)
        self._clock = clock
        self._lock = threading.Lock()
        self._server = _Server(endpoint, self._answer)
        threading.Thread(target=self._server.serve_forever, args=(0.1,), name="board", daemon=True).start()

    def launchers(self, job: str) -> int:
        """How many launchers of a job are attached."""
        with self._lock:
            return self._count(job)

    def close(self) -> None:
        """Take no more connections."""
        self._server.shutdown()
        self._server.server_close()

    def _count(self, job: str) -> int:
        now = self._clock()
        return sum(now - at < LIVE_SECONDS for at in self._seen[job].values())

    def _answer(self, asked: dict[str, Any]) -> Any:
        with self._lock:
            match asked["do"]:
                case "read":
                    return [None if note is None else note.decode("latin-1") for note in self._notes.read(asked["names"])]
                case "write":
                    return self._notes.write(unpack(asked["notes"]))
                case "add":
                    return self._notes.add(asked["name"], asked["amount"])
                case "swap":
                    expected, value = (asked[part].encode("latin-1") for part in ("expected", "value"))
                    return self._notes.swap(asked["name"], expected, value).decode("latin-1")
                case "beat":
                    self._seen[asked["job"]][asked["launcher"]] = self._clock()
                case "leave":
                    self._seen[asked["job"]].pop(asked["launcher"], None)
                case "look":
                    pass
                case other:
                    raise ValueError(f"unknown request {other!r}")
            return self._count(asked["job"])


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def __init__(self, endpoint: Endpoint, answer: Callable[[dict[str, Any]], Any]) -> None:
        self.answer = answer
        # All addresses: a name may stand for a loopback one on its own machine (Debian: 127.0.1.1), where the others would not find it.
        everywhere = not endpoint.is_loopback
        self._both = everywhere and socket.has_dualstack_ipv6()
        self.address_family = socket.AF_INET6 if self._both or ":" in endpoint.host else socket.AF_INET
        super().__init__(("" if everywhere else endpoint.host, endpoint.port), _Connection)

    def server_bind(self) -> None:
        if self._both:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes in the middle of a line, or sends something else, is no news."""


class _Connection(socketserver.StreamRequestHandler):
    timeout = IDLE_SECONDS
    disable_nagle_algorithm = True

    def handle(self) -> None:
        assert isinstance(self.server, _Server)
        while (line := self.rfile.readline(MOST_BYTES)).endswith(b"\n"):
            self.wfile.write(json.dumps({"result": self.server.answer(json.loads(line))}).encode() + b"\n")


class RemoteBoard:
    """A board that is served elsewhere. It lives as long as its connection: who finds the server gone, or started anew with an
    empty board, has lost what it stood on.

    Args:
        timeout: seconds for a connection, and for each answer.

    Raises:
        OSError: nobody answers.
    """

    def __init__(self, endpoint: Endpoint, timeout: float) -> None:
        self._endpoint = endpoint
        self._lock = threading.Lock()
        self._socket: socket.socket | None = socket.create_connection((endpoint.host, endpoint.port), timeout)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._answers = self._socket.makefile("rb")

    def read(self, names: Sequence[str]) -> list[bytes | None]:
        """See `Board`."""
        return [None if note is None else note.encode("latin-1") for note in self._ask("read", names=list(names))]

    def write(self, notes: Mapping[str, bytes]) -> None:
        """See `Board`."""
        self._ask("write", notes=pack(notes))

    def add(self, name: str, amount: int) -> int:
        """See `Board`."""
        total: int = self._ask("add", name=name, amount=amount)
        return total

    def swap(self, name: str, expected: bytes, value: bytes) -> bytes:
        """See `Board`."""
        found: str = self._ask("swap", name=name, expected=expected.decode("latin-1"), value=value.decode("latin-1"))
        return found.encode("latin-1")

    def launchers(self, job: str, me: str, attached: bool) -> int:
        """How many launchers of a job are attached; this one from now on, or no more."""
        count: int = self._ask("beat" if attached else "leave", job=job, launcher=me)
        return count

    def close(self) -> None:
        """Give the connection up."""
        if self._socket is not None:
            self._answers.close()
            self._socket.close()
            self._socket = None

    def _ask(self, do: str, **more: Any) -> Any:
        with self._lock:
            if self._socket is None:
                raise ConnectionError(f"the connection to {self._endpoint} was lost")
            try:
                self._socket.sendall(json.dumps({"do": do, **more}).encode() + b"\n")
                line = self._answers.readline()
                if not line.endswith(b"\n"):
                    raise ConnectionError(f"{self._endpoint} has closed the connection")
                return json.loads(line)["result"]
            except BaseException:  # whatever came in between, a signal's exception too: the next answer would be this one's
                self.close()
                raise
