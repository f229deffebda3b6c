"""Asks a metadata service over HTTP: never for longer than was said, never more than was said, and it can be cut short."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.message import Message
from typing import Any, cast
from urllib.parse import urlsplit

from gai_yolo.errors import ConfigError

ANSWER_SECONDS = 2.0
"""A whole answer takes no longer, however slowly it trickles."""
MOST_BYTES = 256 * 1024
"""Of an answer. Azure's list names every machine of a scale set; all others fit in 1 KiB."""
FAILURES = (OSError, http.client.HTTPException, ValueError, RecursionError)
"""All that asking and understanding may end with; RecursionError comes of JSON that is too deep."""


@dataclass(frozen=True)
class Answer:
    """What the service has sent, whole."""

    status: int
    headers: Message
    body: bytes

    def text(self) -> str:
        """The body of an answer with status 200.

        Raises:
            ValueError: the status is another one, or the body is no UTF-8.
        """
        if self.status != 200:
            raise ValueError(f"status {self.status}")
        return self.body.decode()

    def record(self) -> dict[str, Any]:
        """The JSON object in the body of an answer with status 200.

        Raises:
            ValueError, RecursionError: it is none.
        """
        content = json.loads(self.text())
        if not isinstance(content, dict):
            raise ValueError("JSON of another kind")
        return content


class HttpClient:
    """Asks over HTTP, one question at a time, through no proxy, following no redirection.

    Raises:
        ConfigError: the endpoint is no address.
    """

    def __init__(self, endpoint: str) -> None:
        try:
            address = urlsplit(endpoint)
            host, port = address.hostname, address.port
        except ValueError:
            host, port = None, None
        if not host or address.scheme not in ("http", "https"):
            raise ConfigError(f"elastic.notices_endpoint: {endpoint!r} is no address such as http://10.0.0.1:8080.")
        self._host, self._port, self._prefix = host, port, address.path.rstrip("/")
        self._kind = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
        self._socket: socket.socket | None = None
        self._hung_up = False

    def ask(self, method: str, path: str, headers: Mapping[str, str], seconds: float = ANSWER_SECONDS) -> Answer:
        """Ask and return what is answered, whatever the status.

        Raises:
            OSError, HTTPException, ValueError: there is no answer, or it is not HTTP, too long, too slow, or cut off.
        """
        deadline = time.monotonic() + seconds
        with contextlib.closing(self._kind(self._host, self._port, timeout=seconds)) as connection:
            connection.connect()
            self._socket = connection.sock
            if self._hung_up:  # looked at after the socket was shown to the other thread, so that one of the two sees the other
                raise ConnectionAbortedError
            connection.request(method, self._prefix + path, headers={**headers, "Connection": "close"})
            response = http.client.HTTPResponse(cast(socket.socket, _Timed(connection.sock, deadline)), method=method)
            response.begin()
            body = response.read(MOST_BYTES + 1)
            if len(body) > MOST_BYTES or response.length:
                raise ValueError("an answer that is too long or was cut off")
            return Answer(response.status, response.headers, body)

    def hang_up(self) -> None:
        """End the question under way, and those to come; from another thread."""
        self._hung_up = True
        if self._socket is not None:
            with contextlib.suppress(OSError):  # it is closed already
                self._socket.shutdown(socket.SHUT_RDWR)


class _Timed(io.RawIOBase):
    """What comes out of a socket until a point in time. A socket's own timeout begins anew with every byte."""

    def __init__(self, source: socket.socket, deadline: float) -> None:
        self._source, self._deadline = source, deadline

    def makefile(self, mode: str) -> io.BufferedReader:
        """What HTTPResponse reads from."""
        assert mode == "rb"
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("no answer in time")
        self._source.settimeout(left)
        return self._source.recv_into(buffer)
