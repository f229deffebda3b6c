"""Asks a metadata service over HTTP: never for longer than was said, never more than was said, and it can be cut short.

Each question is put by a daemon thread of its own, because the time limits of sockets begin anew with every byte: an answer that trickles,
or never comes, costs that thread and nobody else.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from email.message import Message
from typing import Any
from urllib.parse import urlsplit

from gai_yolo.errors import ConfigError

ANSWER_SECONDS = 2.0
"""A whole answer takes no longer, however slowly it trickles."""
MOST_ANSWER_BYTES = 256 * 1024
"""Of an answer. Azure's list names every machine of a scale set; all others fit in 1 KiB."""
MOST_UNANSWERED = 4
"""Questions that may be under way. One more is not put: their threads are not ended by any server, however it behaves."""
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
        self._room = threading.Semaphore(MOST_UNANSWERED)
        self._awaited = _Question()
        self._hung_up = False

    def ask(self, method: str, path: str, headers: Mapping[str, str], seconds: float = ANSWER_SECONDS) -> Answer:
        """Ask and return what is answered, whatever the status.

        Raises:
            OSError, HTTPException, ValueError: there is no answer, or it is not HTTP, too long, too slow, or cut off.
        """
        question = self._awaited = _Question()
        if self._hung_up:  # looked at after the question was shown to the other thread, so that one of the two sees the other
            raise ConnectionAbortedError
        if not self._room.acquire(blocking=False):
            raise TimeoutError(f"{MOST_UNANSWERED} questions are still without an answer")
        connection = self._kind(self._host, self._port, timeout=seconds)
        arguments = (connection, question, method, self._prefix + path, {**headers, "Connection": "close"})
        try:
            threading.Thread(target=self._put, args=arguments, name="cloud-question", daemon=True).start()
        except RuntimeError as error:
            self._room.release()
            raise OSError(str(error)) from None  # no more threads
        try:
            answer = question.answers.get(timeout=seconds)
        except queue.Empty:
            # Its thread is to end, too: who says "100 Continue" without end would have a core of this machine.
            if question.socket is not None:
                with contextlib.suppress(OSError):  # it is closed already
                    question.socket.shutdown(socket.SHUT_RDWR)
            raise TimeoutError("no answer in time") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def hang_up(self) -> None:
        """End the wait for an answer, and those to come; from another thread."""
        self._hung_up = True
        self._awaited.answers.put(ConnectionAbortedError())

    def _put(self, connection: http.client.HTTPConnection, question: _Question, method: str, path: str, headers: dict[str, str]) -> None:
        try:
            with contextlib.closing(connection):
                connection.connect()
                question.socket = connection.sock
                connection.request(method, path, headers=headers)
                with connection.getresponse() as response:
                    body = response.read(MOST_ANSWER_BYTES + 1)
                    if len(body) > MOST_ANSWER_BYTES or response.length:
                        raise ValueError("an answer that is too long or was cut off")
                    question.answers.put(Answer(response.status, response.headers, body))
        except FAILURES as error:
            question.answers.put(error)
        finally:
            self._room.release()


class _Question:
    """One that was put, and what has come of it."""

    def __init__(self) -> None:
        self.answers: queue.SimpleQueue[Answer | Exception] = queue.SimpleQueue()
        self.socket: socket.socket | None = None
