"""Which of this machine's networks the other machines are on; needs no torch."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ANYWHERE = "192.0.2.1"
"""An address that no machine has (RFC 5737): the way there is the default route."""
ANY_PORT = 9
SIOCGIFADDR = 0x8915


@dataclass(frozen=True)
class Endpoint:
    """Where a service is reached."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        """Whether it can be reached from its own machine only."""
        return self.host == "localhost" or is_loopback(self.host)


def interface_for_peers(first_host: str) -> str | None:
    """Name of the interface that gloo has to be told (`GLOO_SOCKET_IFNAME`), because it would tell other machines the address that this
    one's own name leads to, and that is a loopback one, as on Debian (127.0.1.1). None: that address is right, or nothing better is known.
    `first_host` is the name or address of rank 0's machine, which may be this one."""
    own = ""
    with contextlib.suppress(OSError, UnicodeError):
        own = socket.gethostbyname(socket.gethostname())
    if not is_loopback(own):
        return None
    return choose_interface(interface_addresses(), [way for host in (first_host, ANYWHERE) if (way := source_address(host, ANY_PORT))])


def choose_interface(addresses: Mapping[str, str], ways: list[str]) -> str | None:
    """The interface of the first way that leads out of this machine; without such a way the only interface there is.

    Args:
        addresses: of each interface.
        ways: own addresses from which packets to others leave, the best one first.
    """
    outside = {address: name for name, address in addresses.items() if not is_loopback(address)}
    for way in ways:
        if way in outside:
            return outside[way]
    return next(iter(outside.values())) if len(outside) == 1 else None


def interface_addresses() -> dict[str, str]:
    """IPv4 address of each interface that has one. Linux; elsewhere nothing."""
    found: dict[str, str] = {}
    if sys.platform != "linux":
        return found
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found[name] = socket.inet_ntoa(answer[20:24])  # struct ifreq: 16 bytes of name, family, port, address
    return found


def source_address(host: str, port: int) -> str | None:
    """This machine's address from which packets to another one leave; None: there is no way."""
    with contextlib.suppress(OSError, UnicodeError):
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM):
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(address)  # sends nothing
                return str(probe.getsockname()[0])
    return None


def is_loopback(address: str) -> bool:
    """Whether an address leads to the own machine only."""
    return address == "::1" or address.startswith("127.")


def own_addresses(host: str) -> list[str]:
    """Those addresses of a host that are this machine's; none: it is another machine, or there is no such host."""
    found: list[str] = []
    with contextlib.suppress(OSError, UnicodeError):
        for family, kind, protocol, _, address in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
            with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.bind(address)  # an address of another machine cannot be bound to
                found.append(str(address[0]))
    return list(dict.fromkeys(found))


def all_addresses() -> list[str]:
    """This machine's addresses, those that only its own links know excepted. Linux; elsewhere nothing."""
    found = list(interface_addresses().values())
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            digits, _, _, scope, *_ = line.split()
            if scope in ("00", "10"):  # global, and the machine itself
                found.append(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits)))
    return found


def listen(addresses: Sequence[str], port: int, backlog: int, held: Sequence[socket.socket] = ()) -> list[socket.socket]:
    """Sockets on each of the addresses that are not held already, of one family each.

    Raises:
        OSError: the port is taken on one of them, or none of them can be bound.
    """
    made: list[socket.socket] = []
    obstacle: int | None = None
    with contextlib.ExitStack() as stack:
        for host in addresses:
            for family, _, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE):
                if address in [one.getsockname() for one in (*held, *made)]:
                    continue
                try:
                    made.append(stack.enter_context(socket.create_server(address, family=family, backlog=backlog)))
                except OSError as error:
                    obstacle = error.errno
                    # EADDRINUSE: another process serves there, and a second server beside it would divide those who come.
                    # All else is of this address: EADDRNOTAVAIL, where it went in this moment, or IPv6 still looks for its double.
                    if obstacle == errno.EADDRINUSE:
                        raise
        if obstacle is not None and not made:
            raise OSError(obstacle, os.strerror(obstacle))
        stack.pop_all()
    return made
