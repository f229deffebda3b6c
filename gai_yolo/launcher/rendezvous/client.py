"""Where the nodes of a job meet, as the launcher of one of them sees it."""

from __future__ import annotations

import contextlib
import errno
import logging
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from gai_yolo.distributed.network import Endpoint, all_addresses, is_loopback, own_addresses, source_address
from gai_yolo.launcher.rendezvous.channel import Stranger
from gai_yolo.launcher.rendezvous.election import EndpointElection, Look, Target
from gai_yolo.launcher.rendezvous.file_store import FileKeyValueStore
from gai_yolo.launcher.rendezvous.key_values import KeyValueStore
from gai_yolo.launcher.rendezvous.run_name import claim_run
from gai_yolo.launcher.rendezvous.secret import Secret
from gai_yolo.launcher.rendezvous.tcp_store import KeyValueServer, TcpKeyValueStore
from gai_yolo.log import ONCE

logger = logging.getLogger(__name__)

LOOK_EVERY = 1.0
"""Seconds."""
LOOK_WITHIN = 2.0
"""Seconds; an endpoint that takes longer has not answered."""
HOST_LINGER = 60.0
"""Seconds that a host waits, after the job's success, for the others to hear of it."""


class FileRendezvousClient:
    """All nodes share a file."""

    def __init__(self, path: Path, secret: Secret, local_address: str | None) -> None:
        self._path, self._secret, self._local_address = path, secret, local_address

    def target(self) -> Target | None:
        """Where this node's agent is to go now; None: nowhere. To be asked often."""
        return Target(0, 0, answers=True)

    def address(self, _target: Target) -> str:
        """What the agent is told."""
        return str(self._path.resolve())

    def local_address(self, _target: Target) -> str | None:
        """Under which name the other nodes reach this one; None: its host name."""
        return self._local_address

    def store(self, _target: Target) -> KeyValueStore:
        """The key-value store there; raises `OSError` if it cannot be reached."""
        return FileKeyValueStore(self._path, self._secret)

    def remember(self, run: str) -> None:
        """The run that this launcher is in; the file remembers."""

    def close(self, done: bool, go_on: Callable[[], bool]) -> None:
        """Leave. After the job's success (`done`) a host waits for the others while `go_on` says so."""


class EndpointRendezvousClient:
    """One key-value store or more, each served by the launcher on its host; asked as `FileRendezvousClient` is.

    The stores are served and looked at by threads of this process: an agent that imports torch, hangs or is killed has nothing to
    do with them, and they end when the launcher does, as when the node is lost.

    Args:
        host_name: the name of this machine among the endpoints, and for the other nodes; None: found out.
        patience: see `EndpointElection`.
    """

    def __init__(self, endpoints: Sequence[Endpoint], secret: Secret, job: str, host_name: str | None, patience: float) -> None:
        self._endpoints, self._secret, self._job, self._host_name = endpoints, secret, job, host_name
        self._own = [index for index, endpoint in enumerate(endpoints) if is_here(endpoint.host, host_name)]
        self._election = EndpointElection(patience, time.monotonic())
        self._target: Target | None = None
        self._next_look = 0.0
        others = [one for at, one in enumerate(endpoints) if at not in self._own]
        self._hosts = [Host(endpoints[index], others, secret) for index in self._own]
        for host in self._hosts:
            host.serve()  # before the first look
            host.start()
        me = secrets.token_hex(8)
        self._watchers = [_Watcher(endpoint, secret, job, me) for endpoint in endpoints]
        for watcher in self._watchers:
            watcher.start()

    def target(self) -> Target | None:
        now = time.monotonic()
        if now >= self._next_look:
            self._next_look = now + LOOK_EVERY
            before = self._target
            self._target = self._election.update([watcher.look for watcher in self._watchers], now)
            for index, watcher in enumerate(self._watchers):
                watcher.goes_by_it = self._target is not None and self._target.index == index
            if self._target is not None and (before is None or before.number != self._target.number):
                logger.info(f"rendezvous at {self._endpoints[self._target.index]}")
            elif before is not None and self._target is None:
                logger.warning(f"{self._endpoints[before.index]} does not answer any more")
        return self._target

    def address(self, target: Target) -> str:
        return str(self._endpoints[target.index])

    def local_address(self, target: Target) -> str | None:
        """The name by which an endpoint calls this machine, or the address from which it reaches the endpoint."""
        if self._host_name is not None:
            return self._host_name
        if self._own:
            return self._endpoints[target.index if target.index in self._own else self._own[0]].host
        endpoint = self._endpoints[target.index]
        return source_address(endpoint.host, endpoint.port)

    def store(self, target: Target) -> KeyValueStore:
        return TcpKeyValueStore(self._endpoints[target.index], self._secret, LOOK_WITHIN)

    def remember(self, run: str) -> None:
        """The run that this launcher is in: a store that starts anew is told."""
        for watcher in self._watchers:
            watcher.run_name = run

    def close(self, done: bool, go_on: Callable[[], bool]) -> None:
        for watcher in self._watchers:
            watcher.goes_by_it = False
            watcher.stopped.set()
        for watcher in self._watchers:
            watcher.join(LOOK_WITHIN)
        deadline = time.monotonic() + HOST_LINGER
        while done and time.monotonic() < deadline and go_on() and any(host.launchers(self._job) for host in self._hosts):
            time.sleep(0.1)
        for host in self._hosts:
            host.close()


RendezvousClient = FileRendezvousClient | EndpointRendezvousClient


class Host(threading.Thread):
    """Serves the key-value store of one of this machine's endpoints for as long as the job runs, or tries to.

    Where the machine is reached is looked at again and again: a job that is started at boot is there before the network. In a thread of its
    own, since a name server that is away keeps who asks for many seconds, and a launcher that was told to end has 30. `others` are the
    endpoints that are not this machine's.
    """

    def __init__(self, endpoint: Endpoint, others: Sequence[Endpoint], secret: Secret) -> None:
        super().__init__(name=f"host {endpoint}", daemon=True)
        self._endpoint, self._others, self._secret = endpoint, others, secret
        self._ways: list[str] = []
        self._server: KeyValueServer | None = None
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def run(self) -> None:
        while not self._closed.wait(LOOK_EVERY):
            self.serve()

    def serve(self) -> None:
        """Listen where this machine is reached now."""
        taken: list[str] = []
        try:
            addresses = self.addresses()
            with self._lock:
                if self._closed.is_set():
                    return
                if self._server is None:
                    self._server = KeyValueServer(self._endpoint, self._secret, addresses)
                else:
                    taken = self._server.listen(addresses)
        except OSError as error:
            what = "another process listens there" if error.errno == errno.EADDRINUSE else error.strerror or str(error)
            self._say_obstacle("here", what)
        if taken:  # its members would be lost with it: it is served where it was
            self._say_obstacle(", ".join(taken), "another process listens there")

    def addresses(self) -> list[str]:
        """Where it is to be served: at the endpoint's own address only.

        On Debian a machine's own name leads to 127.0.1.1 on itself, and with NAT to an address that no machine has. There it is the
        addresses from which this machine reaches the others' endpoints; where there are no others, each of its addresses, one by one. And
        the loopback one, for this machine itself.
        """
        own = own_addresses(self._endpoint.host)
        outside = [address for address in own if not is_loopback(address)]
        if self._endpoint.is_loopback or outside:
            return outside or own
        ways = [way for other in self._others if (way := source_address(other.host, other.port)) is not None and not is_loopback(way)]
        # Kept: a name server that is away must not open the port on all networks.
        self._ways = list(dict.fromkeys([*self._ways, *ways]))
        return own + (self._ways or list(dict.fromkeys(address for address in all_addresses() if not is_loopback(address))))

    def launchers(self, job: str) -> int:
        return 0 if self._server is None else self._server.launchers(job)

    def close(self) -> None:
        with self._lock:
            self._closed.set()
            if self._server is not None:
                self._server.close()

    def _say_obstacle(self, where: str, what: str) -> None:
        logger.warning(f"{self._endpoint} cannot be served from {where} ({what}); trying again as long as the job runs", extra=ONCE)


class _Watcher(threading.Thread):
    """Looks at one endpoint, and is counted there while this launcher goes by it."""

    def __init__(self, endpoint: Endpoint, secret: Secret, job: str, me: str) -> None:
        super().__init__(name=f"watcher {endpoint}", daemon=True)
        self._endpoint, self._secret, self._job, self._me = endpoint, secret, job, me
        self.look: Look | None = None
        self.goes_by_it = False
        self.run_name: str | None = None
        self.stopped = threading.Event()

    def run(self) -> None:
        store: TcpKeyValueStore | None = None
        failures = 0
        while not self.stopped.is_set():
            try:
                if store is None:
                    store = TcpKeyValueStore(self._endpoint, self._secret, LOOK_WITHIN)
                if self.goes_by_it and self.run_name is not None:
                    claim_run(store, self._job, self.run_name)
                launchers = store.launchers(self._job, self._me, self.goes_by_it)
                failures = 0
                self.look = Look(launchers, 0)
            except (OSError, ValueError) as error:  # ValueError: what answers there is no store of ours
                if isinstance(error, Stranger):
                    logger.warning(f"{self._endpoint}: {error}; all launchers of a job must be given the same secret", extra=ONCE)
                store = None
                failures += 1
                self.look = Look(0, failures)
            self.stopped.wait(LOOK_EVERY / 2)
        if store is not None:
            with contextlib.suppress(OSError, ValueError):
                store.launchers(self._job, self._me, goes_by_it=False)
            store.close()


def is_here(host: str, host_name: str | None) -> bool:
    """Whether a host's name or address is this machine's. If the machine was told its name, that alone counts."""
    if host_name is not None:
        return host == host_name
    return bool(own_addresses(host))
