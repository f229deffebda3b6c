"""A connection between two who know the job's secret. Authenticated, not encrypted: what is said here is no secret, but it must be true.

    server   gai-yolo rendezvous 2 NONCE
    client   NONCE MAC          over both nonces: it knows the secret, now, and not from an older connection
    server   MAC                so does the server; or a line of dashes
    then each way: 4 bytes of length, 32 bytes of MAC over direction, number of the message and content, content

Nothing is parsed before its MAC was verified. All that comes before that has a fixed length.
"""

from __future__ import annotations

import re
import secrets
import socket
import struct
import time

from gai_yolo.launcher.rendezvous.secret import MAC_BYTES, Secret

NONCE_BYTES = 16
GREETING = b"gai-yolo rendezvous 2 "
GREETING_BYTES = len(GREETING) + 2 * NONCE_BYTES + 1
ANSWER_BYTES = 2 * NONCE_BYTES + 1 + 2 * MAC_BYTES + 1
PROOF_BYTES = 2 * MAC_BYTES + 1
MESSAGE_LENGTH = struct.Struct(">I")
NO_PROOF = b"-" * (PROOF_BYTES - 1) + b"\n"
"""In place of the server's proof, so that people can be told what is wrong. Who merely hangs up may be busy."""
HEAD_BYTES = MESSAGE_LENGTH.size + MAC_BYTES
MOST_MESSAGE_BYTES = 8 << 20
"""Of a message: the state of some ten thousand nodes."""


class Stranger(ConnectionError):
    """Who is at the other end does not know this job's secret."""


class Greeting:
    """The server's side of the beginning of one connection."""

    def __init__(self, secret: Secret) -> None:
        self._secret, self._nonce = secret, secrets.token_hex(NONCE_BYTES).encode()
        self.line = GREETING + self._nonce + b"\n"
        """What is sent first; `GREETING_BYTES` bytes."""

    def accept(self, answer: bytes) -> tuple[bytes, Messages]:
        """Check a client's answer of `ANSWER_BYTES` bytes; what to send back, and the messages that follow.

        Raises:
            Stranger: it does not know the secret.
        """
        given, nonce = answer[2 * NONCE_BYTES + 1 : -1], answer[: 2 * NONCE_BYTES]
        if not self._secret.verifies(_unhex(given), "client", self._nonce, nonce):
            raise Stranger("another secret")
        proof = self._secret.mac("server", self._nonce, nonce).hex().encode() + b"\n"
        return proof, Messages(self._secret, self._nonce, nonce, is_server=True)


class Messages:
    """Puts messages into frames and takes them out: each is accepted once, in its place, in this connection and direction only."""

    def __init__(self, secret: Secret, server_nonce: bytes, client_nonce: bytes, is_server: bool) -> None:
        to_server, to_client = (Secret(secret.mac(way, server_nonce, client_nonce).hex()) for way in ("to server", "to client"))
        self._outgoing, self._incoming = (to_client, to_server) if is_server else (to_server, to_client)
        self._sent, self._received = 0, 0

    def wrap(self, content: bytes) -> bytes:
        """The next message to send.

        Raises:
            ValueError: it is too long.
        """
        if len(content) > MOST_MESSAGE_BYTES:
            raise ValueError(f"a message of {len(content)} bytes, more than {MOST_MESSAGE_BYTES}")
        number, self._sent = self._sent, self._sent + 1
        return MESSAGE_LENGTH.pack(len(content)) + self._outgoing.mac("message", number.to_bytes(8, "big"), content) + content

    def length(self, head: bytes) -> int:
        """Bytes that follow a head of `HEAD_BYTES` bytes.

        Raises:
            ValueError: too many.
        """
        (length,) = MESSAGE_LENGTH.unpack_from(head)
        if length > MOST_MESSAGE_BYTES:
            raise ValueError(f"a message of {length} bytes, more than {MOST_MESSAGE_BYTES}")
        return int(length)

    def unwrap(self, head: bytes, content: bytes) -> bytes:
        """The content, verified.

        Raises:
            Stranger: it is not the next message from the other end.
        """
        number, self._received = self._received, self._received + 1
        if not self._incoming.verifies(head[MESSAGE_LENGTH.size :], "message", number.to_bytes(8, "big"), content):
            raise Stranger("a message that was changed, sent again, or made up")
        return content


class Channel:
    """The client's end.

    Args:
        timeout: seconds for a connection, and for each answer as a whole, however slowly it comes.

    Raises:
        Stranger: who answers has another secret, or none.
        OSError: nobody answers.
    """

    def __init__(self, address: tuple[str, int], secret: Secret, timeout: float) -> None:
        self._timeout = timeout
        self._socket = socket.create_connection(address, timeout)
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._messages = self._greet(secret)
        except BaseException:
            self._socket.close()
            raise

    def ask(self, content: bytes) -> bytes:
        """Send a message and wait for the answer."""
        self._socket.settimeout(self._timeout)
        self._socket.sendall(self._messages.wrap(content))
        deadline = time.monotonic() + self._timeout
        head = self._read(HEAD_BYTES, deadline)
        return self._messages.unwrap(head, self._read(self._messages.length(head), deadline))

    def close(self) -> None:
        self._socket.close()

    def _greet(self, secret: Secret) -> Messages:
        deadline = time.monotonic() + self._timeout
        match = re.fullmatch(re.escape(GREETING) + rb"([0-9a-f]{%d})\n" % (2 * NONCE_BYTES), self._read(GREETING_BYTES, deadline))
        if match is None:
            raise Stranger("what answers there is no rendezvous of gai-yolo")
        nonce = secrets.token_hex(NONCE_BYTES).encode()
        self._socket.sendall(nonce + b" " + secret.mac("client", match[1], nonce).hex().encode() + b"\n")
        proof = self._read(PROOF_BYTES, deadline)
        if proof == NO_PROOF:
            raise Stranger("its launcher has another secret than this one")
        if not secret.verifies(_unhex(proof[:-1]), "server", match[1], nonce):
            raise Stranger("who answers there does not know this job's secret")
        return Messages(secret, match[1], nonce, is_server=False)

    def _read(self, count: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < count:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("timed out")
            self._socket.settimeout(left)
            piece = self._socket.recv(min(count - len(data), 1 << 16))
            if not piece:
                raise ConnectionError("has closed the connection")
            data += piece
        return bytes(data)


def _unhex(text: bytes) -> bytes:
    """Bytes of hexadecimal digits; none if they are something else."""
    try:
        return bytes.fromhex(text.decode("ascii"))
    except ValueError:
        return b""
