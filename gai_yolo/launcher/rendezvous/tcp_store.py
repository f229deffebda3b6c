"""A key-value store that one process serves to the others over TCP, and which launchers go by it.

Who connects proves that it knows the job's secret before anything of it is read as a request (`channel.py`). Until then a connection is a
stranger's: it may send 98 bytes within some seconds, and of strangers there are only so many at a time, those of one address first
in line to be dropped. One thread serves all, so that nobody's slowness is anybody else's.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import resource
import socket
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

from gai_yolo.distributed.network import Endpoint, listen
from gai_yolo.launcher.rendezvous.channel import ANSWER_BYTES, HEAD_BYTES, NO_PROOF, Channel, Greeting, Stranger
from gai_yolo.launcher.rendezvous.key_values import ANSWERS, REQUESTS, Answer, Count, InMemoryKeyValueStore, KeyValueStore, Request
from gai_yolo.launcher.rendezvous.secret import Secret

LIVE_SECONDS = 4.0
"""A launcher that was not heard of for so long is not counted. Each is heard of every second."""
IDLE_SECONDS = 60.0
"""A connection that says nothing for so long has lost its client."""
PROVEN_WITHIN = 5.0
"""Seconds to prove that the secret is known."""
MOST_STRANGERS = 64
"""Connections that have not proven it yet. One more, and the oldest goes of the address that has the most."""
MOST_CONNECTIONS = 20_000
"""Of those that have, where this process may open so many files; 4 or so for each node."""
SPARE_FILES = 128
"""Files that are left to the rest of this process."""
BACKLOG = 256


class KeyValueServer:
    """Serves a store for as long as this process lives, in a thread.

    Args:
        addresses: on which to listen; the endpoint's host, as this machine resolves it, if there are none. Those that cannot be bound now
            are passed over if others can; see `listen`.

    Raises:
        OSError: the port is taken on one of the addresses, or none of them can be bound.
    """

    def __init__(
        self, endpoint: Endpoint, secret: Secret, addresses: Sequence[str] = (), clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store, self._secret, self._clock = InMemoryKeyValueStore(), secret, clock
        self._seen: dict[str, dict[str, float]] = defaultdict(dict)
        self._lock = threading.RLock()
        self._strangers: dict[asyncio.Task[None], str] = {}
        self._members = 0
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = MOST_CONNECTIONS if files == resource.RLIM_INFINITY else min(MOST_CONNECTIONS, files - SPARE_FILES - MOST_STRANGERS)
        self._port = endpoint.port
        self._sockets = listen(addresses or [endpoint.host], self._port, BACKLOG)
        self._servers: list[asyncio.Server] = []
        self._loop = asyncio.new_event_loop()
        self._closing = self._loop.create_future()
        # Its own list: `listen` may add to the other before this thread has begun, and a socket is served once.
        self._thread = threading.Thread(target=self._serve, args=(list(self._sockets),), name="store", daemon=True)
        self._thread.start()

    @property
    def addresses(self) -> list[str]:
        return [str(one.getsockname()[0]) for one in self._sockets]

    def listen(self, addresses: Sequence[str]) -> list[str]:
        """Listen on those of the addresses that it does not listen on yet; who is connected stays so, and no address is given up. To be
        asked now and then, by one thread at a time and not after `close`: an address that cannot be bound yet is passed over.

        Returns:
            Addresses whose port another process has.
        """
        made: list[socket.socket] = []
        taken: list[str] = []
        for address in addresses:
            try:
                made += listen([address], self._port, BACKLOG, [*self._sockets, *made])
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    taken.append(address)
        if made:
            self._sockets += made
            asyncio.run_coroutine_threadsafe(self._open(made), self._loop)  # not waited for: who connects before is in the backlog
        return taken

    def launchers(self, job: str) -> int:
        """How many launchers of a job go by it."""
        with self._lock:
            now = self._clock()
            return sum(now - at < LIVE_SECONDS for at in self._seen[job].values())

    def close(self) -> None:
        """Take no more connections, and end those that there are."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._closing.set_result, None)
            self._thread.join()
        for one in self._sockets:  # those too that were not served yet
            one.close()

    def _serve(self, sockets: Sequence[socket.socket]) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._accept(sockets))
        self._loop.close()

    async def _accept(self, sockets: Sequence[socket.socket]) -> None:
        await self._open(sockets)
        await self._closing
        for server in self._servers:
            server.close()
        talks = asyncio.all_tasks() - {asyncio.current_task()}
        for talk in talks:
            talk.cancel()
        await asyncio.gather(*talks, return_exceptions=True)

    async def _open(self, sockets: Sequence[socket.socket]) -> None:
        for one in sockets:
            self._servers.append(await asyncio.start_server(self._meet, sock=one, backlog=BACKLOG))

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A client that goes in the middle of a message, or sends something else, is no news.
        with contextlib.suppress(OSError, EOFError, ValueError, asyncio.CancelledError, KeyError):
            await self._talk(reader, writer)
        writer.transport.abort()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._admit(task, str(writer.get_extra_info("peername")[0]))
        try:
            greeting = Greeting(self._secret)
            writer.write(greeting.line)
            async with asyncio.timeout(PROVEN_WITHIN):  # not wait_for, which before Python 3.12 may swallow being cancelled
                answer = await reader.readexactly(ANSWER_BYTES)
            proof, messages = greeting.accept(answer)
        except Stranger:
            writer.write(NO_PROOF)
            raise
        finally:
            self._strangers.pop(task, None)
        if self._members >= self._most:
            return
        self._members += 1
        try:
            writer.write(proof)
            while True:
                async with asyncio.timeout(IDLE_SECONDS):
                    head = await reader.readexactly(HEAD_BYTES)
                    content = await reader.readexactly(messages.length(head))
                    answered = self._answer(REQUESTS.validate_json(messages.unwrap(head, content)))
                    writer.write(messages.wrap(ANSWERS.dump_json(answered)))
                    await writer.drain()
        finally:
            self._members -= 1

    def _admit(self, task: asyncio.Task[None], address: str) -> None:
        """Make room for one more stranger, so that a flood from one address is in its own way only."""
        while len(self._strangers) >= MOST_STRANGERS:
            ((most, _),) = Counter(self._strangers.values()).most_common(1)
            oldest = next(one for one, its_address in self._strangers.items() if its_address == most)
            del self._strangers[oldest]
            oldest.cancel()
        self._strangers[task] = address

    def _answer(self, asked: Request) -> Answer:
        with self._lock:
            if not isinstance(asked, Count):
                return self._store.answer(asked)
            if asked.do == "beat":
                self._seen[asked.job][asked.launcher] = self._clock()
            else:
                self._seen[asked.job].pop(asked.launcher, None)
            return self.launchers(asked.job)


class TcpKeyValueStore(KeyValueStore):
    """A store that is served elsewhere. It lives as long as its connection: who finds the server gone, or started anew with an
    empty store, has lost what it stood on.

    Args:
        timeout: seconds for a connection, and for each answer.

    Raises:
        Stranger: who answers does not know the secret.
        OSError: nobody answers.
    """

    def __init__(self, endpoint: Endpoint, secret: Secret, timeout: float) -> None:
        self._endpoint = endpoint
        self._lock = threading.Lock()
        self._channel: Channel | None = Channel((endpoint.host, endpoint.port), secret, timeout)

    def answer(self, asked: Request) -> Answer:
        with self._lock:
            if self._channel is None:
                raise ConnectionError(f"the connection to {self._endpoint} was lost")
            try:
                return ANSWERS.validate_json(self._channel.ask(asked.model_dump_json().encode()), strict=True)
            except BaseException:  # whatever came in between, a signal's exception too: the next answer would be this one's
                self.close()
                raise

    def launchers(self, job: str, me: str, goes_by_it: bool) -> int:
        """How many launchers of a job go by this store; this one from now on, or no more."""
        return self._ask(int, Count(do="beat" if goes_by_it else "leave", job=job, launcher=me))

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None
