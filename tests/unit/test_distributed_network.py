"""The interface for the other machines is found where the host's own name does not lead to it."""

from __future__ import annotations

import socket
import sys

import pytest

from gai_yolo.distributed import network as interfaces
from gai_yolo.distributed.network import choose_interface, interface_addresses, interface_for_peers, source_address

linux = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for its interfaces")
ADDRESSES = {"lo": "127.0.0.1", "docker0": "172.17.0.1", "eth0": "10.0.0.5"}


@pytest.mark.parametrize(
    ("addresses", "ways", "chosen"),
    [
        (ADDRESSES, ["10.0.0.5"], "eth0"),
        (ADDRESSES, ["172.17.0.1", "10.0.0.5"], "docker0"),
        (ADDRESSES, ["127.0.0.1", "10.0.0.5"], "eth0"),  # rank 0's machine is this one
        (ADDRESSES, ["127.0.0.1"], None),  # no default route, and nothing tells the two apart
        ({"lo": "127.0.0.1", "eth0": "10.0.0.5"}, [], "eth0"),
        ({"lo": "127.0.0.1"}, ["127.0.0.1"], None),
        ({"lo": "127.0.0.1", "eth0": "10.0.0.5"}, ["10.9.9.9"], "eth0"),  # gone meanwhile
    ],
)
def test_interface_is_that_of_the_way_out(addresses: dict[str, str], ways: list[str], chosen: str | None) -> None:
    assert choose_interface(addresses, ways) == chosen


@linux
def test_loopback_interface_has_its_address() -> None:
    found = interface_addresses()
    assert found[socket.if_indextoname(1)] == "127.0.0.1" and source_address("127.0.0.1", 9) == "127.0.0.1"


@linux
@pytest.mark.parametrize(("own", "chosen"), [("127.0.1.1", "eth0"), ("10.0.0.5", None), (None, None)])
def test_gloo_is_told_only_where_the_host_name_leads_astray(monkeypatch: pytest.MonkeyPatch, own: str | None, chosen: str | None) -> None:
    def resolve(host: str) -> str:
        if own is None:
            raise socket.gaierror
        return own if host == socket.gethostname() else "127.0.0.1"

    monkeypatch.setattr(socket, "gethostbyname", resolve)
    monkeypatch.setattr(interfaces, "interface_addresses", lambda: {"lo": "127.0.0.1", "eth0": "10.0.0.5"})
    assert interface_for_peers("first") == chosen
