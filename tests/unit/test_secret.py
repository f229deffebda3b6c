"""Who may take part in a rendezvous: the job's secret, connections and files of those who do not know it, and what is read of them."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import pickle
import secrets
import shutil
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.rendezvous import RendezvousParameters, RendezvousStateError, dynamic_rendezvous

from gai_yolo.cli.main import main
from gai_yolo.distributed.network import Endpoint
from gai_yolo.errors import Ending
from gai_yolo.launcher.arguments import RENDEZVOUS, add_arguments, settings_from
from gai_yolo.launcher.command import BACKEND
from gai_yolo.launcher.rendezvous import tcp_store as served
from gai_yolo.launcher.rendezvous.channel import (
    ANSWER_BYTES,
    GREETING,
    GREETING_BYTES,
    HEAD_BYTES,
    MOST_MESSAGE_BYTES,
    NO_PROOF,
    NONCE_BYTES,
    Channel,
    Greeting,
    Stranger,
)
from gai_yolo.launcher.rendezvous.client import EndpointRendezvousClient, Host
from gai_yolo.launcher.rendezvous.file_store import (
    FILE_MAGIC,
    FIRST_SLOT,
    SLOT_BYTES,
    SLOT_HEADER,
    FileKeyValueStore,
    StoreRefused,
)
from gai_yolo.launcher.rendezvous.handler import StoreRendezvous
from gai_yolo.launcher.rendezvous.key_values import InMemoryKeyValueStore
from gai_yolo.launcher.rendezvous.secret import (
    SECRET_FILE_VARIABLE,
    SECRET_VARIABLE,
    Secret,
    SecretError,
    given_secret,
    read_secret,
    secret_for,
    shared_secret,
)
from gai_yolo.launcher.rendezvous.state import StateBackend, decode, encode, unknown_torch
from gai_yolo.launcher.rendezvous.tcp_store import MOST_STRANGERS, KeyValueServer, TcpKeyValueStore
from gai_yolo.launcher.supervisor import Launcher
from gai_yolo.launcher.torchrun import run as be_agent
from gai_yolo.launcher.verdict import FAILED, RestartCounter
from gai_yolo.supervision.outcome import VARIABLE as OUTCOME_VARIABLE
from gai_yolo.supervision.outcome import read_outcome

SECRET, ANOTHER = Secret("0123456789abcdef" * 2), Secret("fedcba9876543210" * 2)
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give files away")


class Exploit:
    """Touches a file in whoever unpickles it."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return os.mkdir, (str(self._marker),)


@pytest.fixture
def endpoint() -> Endpoint:
    """A free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return Endpoint("127.0.0.1", probe.getsockname()[1])


@pytest.fixture
def server(endpoint: Endpoint) -> Iterator[KeyValueServer]:
    """A served store."""
    server = KeyValueServer(endpoint, SECRET)
    yield server
    server.close()


def connect(endpoint: Endpoint) -> socket.socket:
    """A stranger's connection, past the greeting."""
    client = socket.create_connection((endpoint.host, endpoint.port), 5.0)
    assert client.recv(GREETING_BYTES, socket.MSG_WAITALL).startswith(GREETING)
    return client


def is_hung_up(client: socket.socket) -> bool:
    """Whether the server ends a connection, without another word than that the secret is wrong."""
    try:
        return client.recv(len(NO_PROOF) + 1, socket.MSG_WAITALL) in (b"", NO_PROOF)
    except ConnectionError:
        return True


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize(
    "sent",
    [
        b'{"do": "write", "notes": {"torch.rendezvous.run": "x"}}\n' * 4,
        b"x" * ANSWER_BYTES,
        b"0" * (2 * NONCE_BYTES) + b" " + b"0" * 64 + b"\n",
        secrets.token_bytes(100_000),
        b"A" * (1 << 20),
    ],
    ids=["f7abd05's request", "letters", "a MAC of zeros", "random bytes", "a mebibyte"],
)
def test_stranger_is_hung_up_on_before_anything_is_read(sent: bytes, endpoint: Endpoint) -> None:
    """Loss: whoever reaches the port writes into the rendezvous, and owns every node."""
    with connect(endpoint) as client:
        try:
            client.sendall(sent)
        except ConnectionError:
            return
        assert is_hung_up(client)
    assert TcpKeyValueStore(endpoint, SECRET, 5.0).read(["torch.rendezvous.run"]) == [None]


@pytest.mark.usefixtures("server")
def test_launcher_with_another_secret_is_refused_and_says_so(endpoint: Endpoint, told: list[str]) -> None:
    """Loss: a job that waits for hours for a node whose secret was mistyped."""
    with pytest.raises(Stranger, match="has another secret than this one"):
        TcpKeyValueStore(endpoint, ANOTHER, 5.0)
    rendezvous = EndpointRendezvousClient([endpoint], ANOTHER, "job", "nobody", 60.0)
    deadline = time.monotonic() + 30
    while not told and time.monotonic() < deadline:
        rendezvous.target()
        time.sleep(0.05)
    rendezvous.close(False, lambda: False)
    assert told == [f"{endpoint}: its launcher has another secret than this one; all launchers of a job must be given the same secret"]


def serve_once(answer: Callable[[socket.socket], None]) -> tuple[Endpoint, threading.Thread]:
    """A false server, for one connection."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with listener, listener.accept()[0] as client:
            client.settimeout(10.0)
            answer(client)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    return Endpoint("127.0.0.1", listener.getsockname()[1]), thread


def test_false_server_is_refused() -> None:
    """Loss: a stranger at an endpoint's address tells the agents where rank 0 is."""

    def pretend(client: socket.socket) -> None:
        client.sendall(Greeting(SECRET).line)
        client.recv(ANSWER_BYTES, socket.MSG_WAITALL)
        client.sendall(b"0" * 64 + b"\n")

    def reflect(client: socket.socket) -> None:
        client.sendall(Greeting(SECRET).line)
        client.sendall(client.recv(ANSWER_BYTES, socket.MSG_WAITALL)[2 * NONCE_BYTES + 1 :])

    for answer in (pretend, reflect):
        endpoint, thread = serve_once(answer)
        with pytest.raises(Stranger, match="does not know this job's secret"):
            TcpKeyValueStore(endpoint, SECRET, 5.0)
        thread.join()
    endpoint, thread = serve_once(lambda client: client.sendall(b"SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3 and more\r\n" * 2))
    with pytest.raises(Stranger, match="no rendezvous of gai-yolo"):
        TcpKeyValueStore(endpoint, SECRET, 5.0)


def test_false_server_that_drips_is_not_waited_for() -> None:
    """Loss: a launcher that looks at one endpoint for an hour, a byte at a time."""

    def drip(client: socket.socket) -> None:
        try:
            for byte in GREETING * 20:
                client.sendall(bytes([byte]))
                time.sleep(0.05)
        except OSError:
            pass

    endpoint, _ = serve_once(drip)
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        TcpKeyValueStore(endpoint, SECRET, 0.3)
    assert time.monotonic() - began < 5.0


class Wire:
    """A connection of somebody who knows the secret, at the level of bytes."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.channel = Channel((endpoint.host, endpoint.port), SECRET, 5.0)
        self.socket: socket.socket = vars(self.channel)["_socket"]
        self.messages: Any = vars(self.channel)["_messages"]

    def ask(self, frame: bytes) -> bytes:
        self.socket.sendall(frame)
        head = self.socket.recv(HEAD_BYTES, socket.MSG_WAITALL)
        return head and self.socket.recv(self.messages.length(head), socket.MSG_WAITALL)


ADD = b'{"do":"add","name":"n","amount":1}'


@pytest.mark.usefixtures("server")
def test_message_counts_once_in_its_connection_and_in_its_place(endpoint: Endpoint) -> None:
    """Loss: what was said yesterday is said again by somebody who has listened."""
    first, second = Wire(endpoint), Wire(endpoint)
    frame = first.messages.wrap(ADD)
    assert first.ask(frame) == b"1"
    assert is_hung_up_after(second, frame), "of another connection"
    assert is_hung_up_after(first, frame), "sent again"
    third = Wire(endpoint)
    third.messages.wrap(ADD)
    assert is_hung_up_after(third, third.messages.wrap(ADD)), "out of its place"
    fourth = Wire(endpoint)
    changed = bytearray(fourth.messages.wrap(ADD))
    changed[-2] ^= 1
    assert is_hung_up_after(fourth, bytes(changed)), "changed"
    assert TcpKeyValueStore(endpoint, SECRET, 5.0).read(["n"]) == [b"1"]


def is_hung_up_after(wire: Wire, frame: bytes) -> bool:
    try:
        return wire.ask(frame) == b""
    except ConnectionError:
        return True


@pytest.mark.usefixtures("server")
def test_message_that_is_cut_short_or_too_long_is_none(endpoint: Endpoint) -> None:
    """Loss: memory of the launcher, or a change that was half said."""
    cut = Wire(endpoint)
    cut.socket.sendall(cut.messages.wrap(ADD)[:-1])
    cut.socket.shutdown(socket.SHUT_WR)
    assert is_hung_up(cut.socket)
    long = Wire(endpoint)
    assert is_hung_up_after(long, (MOST_MESSAGE_BYTES + 1).to_bytes(4, "big") + bytes(32))
    with pytest.raises(ValueError, match="more than"):
        TcpKeyValueStore(endpoint, SECRET, 5.0).write({"n": bytes(MOST_MESSAGE_BYTES)})
    assert TcpKeyValueStore(endpoint, SECRET, 5.0).read(["n"]) == [None]


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b'{"do":"dance"}', b'{"do":"add","name":"n","amount":"1"}', b'{"do":"add","name":"n","amount":1,"x":0}', b"[" * 9999],
)
def test_request_of_another_form_is_none(content: bytes, endpoint: Endpoint) -> None:
    """Loss: a server that dies of a newer launcher's request."""
    wire = Wire(endpoint)
    assert is_hung_up_after(wire, wire.messages.wrap(content))
    assert TcpKeyValueStore(endpoint, SECRET, 5.0).read(["n"]) == [None]


@pytest.mark.usefixtures("server")
def test_flood_of_slow_strangers_is_in_its_own_way_only(endpoint: Endpoint) -> None:
    """Loss: a port scanner that keeps connections open shuts the job's own launchers out."""
    strangers = []
    try:
        for _ in range(3 * MOST_STRANGERS):
            strangers.append(stranger := socket.create_connection((endpoint.host, endpoint.port), 5.0))
            stranger.sendall(b"0")
        store = TcpKeyValueStore(endpoint, SECRET, 5.0)
        assert store.add("n", 1) == 1
        ended = [is_hung_up_without_waiting(stranger) for stranger in strangers]
        assert 0 < ended.count(False) <= MOST_STRANGERS and all(ended[:MOST_STRANGERS])
    finally:
        for stranger in strangers:
            stranger.close()


def is_hung_up_without_waiting(client: socket.socket) -> bool:
    client.setblocking(False)
    try:
        while data := client.recv(4096):
            assert data.startswith(GREETING)
    except BlockingIOError:
        return False
    except ConnectionError:
        pass
    return True


@pytest.mark.usefixtures("server")
def test_stranger_has_seconds_and_no_more(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: connections that say a byte a minute, for ever."""
    monkeypatch.setattr(served, "PROVEN_WITHIN", 0.3)
    with connect(endpoint) as client:
        began = time.monotonic()
        while not is_hung_up_without_waiting(client):
            assert time.monotonic() - began < 5.0
            client.setblocking(True)
            try:
                client.sendall(b"0")
            except ConnectionError:
                break
            time.sleep(0.05)


def test_notes_do_not_grow_without_bound() -> None:
    """Loss: the launcher's memory, to a launcher that has lost its mind."""
    store = InMemoryKeyValueStore()
    for number in range(63):
        store.write({f"{number}": bytes(1 << 20)})
    with pytest.raises(OSError, match="too many keys"):
        store.write({"63": bytes(1 << 20)})
    store.write({"0": b""})
    store.write({"another": bytes(1 << 19)})


# ---------------------------------------------------------------------------------------------------------- the secret itself


def test_launchers_that_start_at_once_agree_on_a_secret(tmp_path: Path) -> None:
    """Loss: two halves of a job, each with a secret of its own."""
    path = tmp_path / "rendezvous.secret"
    ready = threading.Barrier(16)

    def start(_: int) -> str:
        ready.wait()
        return shared_secret(path).text

    with ThreadPoolExecutor(16) as launchers:
        found = set(launchers.map(start, range(16)))
    assert len(found) == 1 and len(found.pop()) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_launchers_agree_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: no job at all on a file system without them; or a launcher that reads a file which is just being written."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert shared_secret(tmp_path / "a").text == shared_secret(tmp_path / "a").text
    slow = tmp_path / "b"
    os.close(os.open(slow, os.O_CREAT | os.O_WRONLY, 0o600))
    threading.Timer(0.2, slow.write_text, [SECRET.text]).start()
    assert shared_secret(slow).text == SECRET.text


@pytest.mark.parametrize(
    ("content", "mode", "says"),
    [
        (SECRET.text, 0o644, "others can read or write it; chmod 600"),
        (SECRET.text, 0o620, "others can read or write it"),
        ("password", 0o600, "has 32 letters or more; make one with"),
        ("\n" * 99, 0o600, "has 32 letters or more"),
        (b"\xff" * 64, 0o600, "is no text"),
        (None, 0o600, "cannot be read (No such file or directory); make one with"),
    ],
)
def test_secret_that_is_none_is_refused(content: str | bytes | None, mode: int, says: str, tmp_path: Path) -> None:
    """Loss: a secret that everybody on the machine knows, or can guess."""
    path = tmp_path / "job.secret"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        path.chmod(mode)
    with pytest.raises(SecretError) as refusal:
        read_secret(path)
    assert says in str(refusal.value) and str(path) in str(refusal.value)


@AS_ROOT
def test_file_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: a secret, or a rendezvous, that somebody else has laid ready."""
    secret, store = tmp_path / "secret", tmp_path / "board"
    shared_secret(secret)
    FileKeyValueStore(store, SECRET).write({"a": b"1"})
    for path in (secret, store):
        os.chown(path, 12345, -1)
    with pytest.raises(SecretError, match="belongs to user 12345"):
        read_secret(secret)
    with pytest.raises(StoreRefused, match="belongs to user 12345"):
        FileKeyValueStore(store, SECRET).read(["a"])
    (tmp_path / "train.py").touch()
    monkeypatch.chdir(tmp_path)
    assert main(["launch", "--rendezvous", str(store), "--", "train.py"]) == 2
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert read_secret(secret).text
    os.chown(secret, 0, -1)
    secret.chmod(0o640)
    assert read_secret(secret).text, "root may give it to a group, as Kubernetes does"


def test_secret_comes_from_where_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: nodes of one job with different secrets; a secret in the list of processes."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = SECRET.keep(tmp_path / "given")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert given_secret(None, {}) is None
    assert given_secret(None, {SECRET_VARIABLE: f"{ANOTHER.text}\n"}) == ANOTHER
    for found in (given_secret(path, {SECRET_VARIABLE: ANOTHER.text}), given_secret(None, {SECRET_FILE_VARIABLE: str(path)})):
        assert found == Secret(SECRET.text, path)
        assert SECRET.text not in repr(found)
    beside = secret_for(tmp_path / "rendezvous", None)
    assert beside.source == tmp_path / "rendezvous.secret"
    loopback = [Endpoint("127.0.0.1", 1), Endpoint("localhost", 2)]
    assert secret_for(loopback, None) == secret_for(loopback, None)
    assert secret_for(loopback, SECRET) == SECRET
    with pytest.raises(SecretError, match="between hosts the launchers need a secret"):
        secret_for([*loopback, Endpoint("node1", 3)], None)


def be_told_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a script, and no secret in the environment."""
    monkeypatch.chdir(folder)
    for name in (SECRET_VARIABLE, SECRET_FILE_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    (folder / "train.py").touch()


def test_tcp_between_hosts_without_a_secret_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loss: a port on which everybody in the data centre is a node of the job."""
    be_told_nothing(tmp_path, monkeypatch)
    words = ["launch", "--nodes", "1:2", "--rendezvous", "node0:29400,node1:29400"]
    assert main([*words, "--", "train.py"]) == 2
    assert "openssl rand -hex 32" in capsys.readouterr().err
    assert main([*words, "--secret-file", "none", "--", "train.py"]) == 2
    assert "none: the secret cannot be read" in capsys.readouterr().err
    path = SECRET.keep(tmp_path / "job.secret")
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    settings = settings_from(parser.parse_args([*words[1:], "--secret-file", "job.secret", "--", "train.py"]))
    assert settings.secret == Secret(SECRET.text, path)


# --------------------------------------------------------------------------------------------------------------------- the file


def false_file(path: Path, marker: Path, signed_by: Secret | None) -> None:
    """A rendezvous file whose state touches a marker, written by somebody who may write but does not know the secret."""
    data = b'{"torch.rendezvous.run":"' + pickle.dumps(Exploit(marker), 0) + b'"}'
    number = 7
    mac = signed_by.mac("board", number.to_bytes(8, "big"), data) if signed_by else bytes(32)
    with path.open("wb") as file:
        file.write(FILE_MAGIC)
        file.seek(FIRST_SLOT + SLOT_BYTES)
        file.write(SLOT_HEADER.pack(number, len(data), mac) + data)
    path.chmod(0o600)


@pytest.mark.parametrize("signed_by", [None, ANOTHER], ids=["no MAC", "another secret"])
def test_file_that_was_not_written_with_the_secret_is_not_parsed(signed_by: Secret | None, tmp_path: Path) -> None:
    """Loss: one write into the rendezvous file runs code on every node."""
    false_file(tmp_path / "board", tmp_path / "marker", signed_by)
    before = (tmp_path / "board").read_bytes()
    with pytest.raises(StoreRefused, match="was not written with this job's secret"):
        FileKeyValueStore(tmp_path / "board", SECRET).write({"a": b"1"})
    assert (tmp_path / "board").read_bytes() == before and not (tmp_path / "marker").exists()


def test_first_change_with_another_secret_is_refused_and_one_that_was_cut_short_is_not(tmp_path: Path) -> None:
    """Loss: two launchers that write over each other for ever; or a file that a full disk has made useless."""
    path = tmp_path / "board"
    FileKeyValueStore(path, ANOTHER).write({"a": b"1"})
    with pytest.raises(StoreRefused):
        FileKeyValueStore(path, SECRET).read(["a"])
    path.write_bytes(path.read_bytes()[:-3])
    store = FileKeyValueStore(path, SECRET)
    assert store.read(["a"]) == [None]
    store.write({"a": b"2"})
    assert store.read(["a"]) == [b"2"]


def test_change_by_a_stranger_has_not_happened(tmp_path: Path) -> None:
    """Loss: the newest slot is taken for the truth, whoever has written it."""
    path = tmp_path / "board"
    store = FileKeyValueStore(path, SECRET)
    store.write({"a": b"1"})
    store.write({"a": b"2"})
    data = b'{"a":"3"}'
    with path.open("r+b") as file:
        file.seek(FIRST_SLOT + SLOT_BYTES)
        file.write(SLOT_HEADER.pack(3, len(data), ANOTHER.mac("board", (3).to_bytes(8, "big"), data)) + data)
    assert store.read(["a"]) == [b"2"]


def test_rendezvous_file_is_of_this_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Loss: a file in which every user of the cluster may write; one of an older version, whose content nobody has signed."""
    path = tmp_path / "board"
    before = os.umask(0)
    try:
        FileKeyValueStore(path, SECRET).write({"a": b"1"})
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (tmp_path / "train.py").touch()
    monkeypatch.chdir(tmp_path)
    for mode in (0o620, 0o602):
        path.chmod(mode)
        with pytest.raises(StoreRefused, match="can be written to by other users; chmod 600"):
            FileKeyValueStore(path, SECRET).read(["a"])
        assert main(["launch", "--rendezvous", str(path), "--", "train.py"]) == 2
        assert f"--rendezvous {path}: can be written to by other users" in capsys.readouterr().err
    path.chmod(0o600)
    path.write_bytes(b"gai-yolo board 1\n" + bytes(100))
    assert main(["launch", "--rendezvous", str(path), "--", "train.py"]) == 2
    assert "was left by an older version and is not signed; remove it" in capsys.readouterr().err


def test_launcher_ends_with_a_sentence_at_a_file_of_a_stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: list[str]) -> None:
    """Loss: endless restarts of what only a person can mend; or what stands there, believed."""
    be_told_nothing(tmp_path, monkeypatch)
    false_file(tmp_path / "board", tmp_path / "marker", ANOTHER)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    (tmp_path / "own").mkdir()
    monkeypatch.setattr("gai_yolo.launcher.supervisor.Signals", Untold)
    settings = settings_from(parser.parse_args(["--rendezvous", "board", "--", "train.py"]))
    assert isinstance(settings.rendezvous, Path)
    launcher = Launcher(settings, secret_for(settings.rendezvous, settings.secret), tmp_path / "own")
    assert launcher.run() == 2
    assert "was not written with this job's secret" in told[-1]
    assert not (tmp_path / "marker").exists()


class Untold:
    """No signals."""

    told, hurry = None, False


class Enough(Exception):
    """The test has seen it."""


def test_a_launcher_waits_for_a_disk_that_has_no_room_for_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loss: a job that is over for good because the share was full when its launchers came up; half a secret, refused for ever."""
    be_told_nothing(tmp_path, monkeypatch)
    write, tries = os.write, list[float]()

    def full(descriptor: int, data: bytes) -> int:
        if len(data) > 60 and not tries:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    def run(_launcher: Launcher) -> int:
        raise Enough

    monkeypatch.setattr(os, "write", full)
    monkeypatch.setattr("gai_yolo.launcher.supervisor.time.sleep", tries.append)
    monkeypatch.setattr(Launcher, "run", run)
    monkeypatch.setattr("gai_yolo.launcher.supervisor.Signals", Untold)
    with pytest.raises(Enough):
        main(["launch", "--rendezvous", "board", "--", "train.py"])
    told = capsys.readouterr().err
    assert len(tries) == 1
    assert told.startswith("launch: waiting: ") and "board.secret" in told and "No space left on device" in told
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["board.secret", "train.py"]
    assert read_secret(tmp_path / "board.secret").text


@AS_ROOT
def test_a_file_whose_owner_the_share_has_mapped_is_this_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: no job at all on EFS' access points, or on NFS with all_squash, where files belong to whom the share says."""
    (tmp_path / "secret").write_text(SECRET.text)
    (tmp_path / "secret").chmod(0o600)
    os.chown(tmp_path / "secret", 1234, -1)
    with pytest.raises(SecretError, match="belongs to user 1234"):
        read_secret(tmp_path / "secret")
    monkeypatch.setattr("gai_yolo.launcher.rendezvous.secret._uid_in", lambda _folder: 1234)
    assert read_secret(tmp_path / "secret").text == SECRET.text


def test_an_agents_secret_that_was_cleaned_away_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: a node that never trains again, because something tidies up /tmp every ten days."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").touch()
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    settings = settings_from(parser.parse_args(["--", "train.py"]))
    monkeypatch.setattr("gai_yolo.launcher.supervisor.Signals", Untold)
    (tmp_path / "own").mkdir()
    launcher = Launcher(settings, SECRET, tmp_path / "own")
    seen = list[str]()

    def child(_command: list[str], environment: dict[str, str]) -> object:
        seen.append(read_secret(Path(environment[SECRET_FILE_VARIABLE])).text)
        raise Enough

    monkeypatch.setattr("gai_yolo.launcher.supervisor.Child", child)
    shutil.rmtree(tmp_path / "own")
    (tmp_path / "own").mkdir()
    with pytest.raises(Enough):
        launcher.run()
    assert seen == [SECRET.text]


# -------------------------------------------------------------------------------------------------------------- torchrun's state


def torchruns_state() -> Any:
    """With something in every field."""
    now = datetime.now(UTC)
    one, two, three = (dynamic_rendezvous._NodeDesc(f"node{number}.example.com", 100 + number, number) for number in range(3))
    state = dynamic_rendezvous._RendezvousState()
    state.round, state.complete, state.deadline = 7, True, now + timedelta(seconds=1.000001)
    state.participants, state.wait_list, state.redundancy_list = {two: 1, one: 0}, {three, one}, {two}
    state.last_heartbeats = {one: now, three: now - timedelta(microseconds=1)}
    return state


def test_state_of_torchrun_is_the_same_after_its_way_through_json() -> None:
    """Loss: a node that is dead to the others, because a microsecond of its heartbeat was lost; a torch with another state, unnoticed."""
    assert unknown_torch() is None
    for state in (torchruns_state(), dynamic_rendezvous._RendezvousState()):
        assert vars(decode(encode(state))) == vars(state)
        assert encode(decode(encode(state))) == encode(state)


def test_unknown_state_of_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: a field of a newer torch that is dropped on the way, and a job that behaves oddly."""

    class Newer(dynamic_rendezvous._RendezvousState):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self.generation = 1

    monkeypatch.setattr(dynamic_rendezvous, "_RendezvousState", Newer)
    assert "keeps a rendezvous state that is not known here" in (unknown_torch() or "")


def test_unknown_way_of_starting_workers_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Loss: workers whose ends nobody counts, started again and again though their script cannot run."""
    monkeypatch.delattr("torch.distributed.elastic.multiprocessing.api.get_subprocess_handler")
    monkeypatch.setenv(OUTCOME_VARIABLE, str(tmp_path / "outcome.json"))
    assert be_agent([]) == FAILED
    said = read_outcome(tmp_path / "outcome.json")
    assert said is not None and said.ending == Ending.REFUSED and "starts workers in a way that is not known here" in said.reason


@pytest.mark.parametrize(
    "value",
    [
        b"{}",
        b"[]",
        b"\x80\x04",
        encode(torchruns_state()).replace(b'"complete":true', b'"complete":1'),
        encode(torchruns_state()).replace(b"node1", b"node 1;"),
        encode(torchruns_state())[:-1] + b',"more":1}',
        encode(dynamic_rendezvous._RendezvousState()).replace(b'"deadline":null', b'"deadline":"2026-11-26T07:00:00"'),
    ],
)
def test_value_of_another_form_is_no_state(value: bytes) -> None:
    """Loss: an agent that dies of a state it does not understand, with a traceback."""
    store = InMemoryKeyValueStore()
    store.write({"torch.rendezvous.run": value})
    with pytest.raises(RendezvousStateError, match="no state of torchrun"):
        StateBackend(store, "run").get_state()


def test_pickle_in_the_store_is_not_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: even who knows the secret of a job runs code on its nodes by way of the rendezvous; today's exploit."""
    monkeypatch.delenv(SECRET_VARIABLE, raising=False)
    monkeypatch.delenv(SECRET_FILE_VARIABLE, raising=False)
    from base64 import b64encode

    path = tmp_path / "board"
    secret = secret_for(path, None)
    data = pickle.dumps(Exploit(tmp_path / "marker"))
    for value in (data, b64encode(data)):
        FileKeyValueStore(path, secret).write({"torch.rendezvous.run": value})
        parameters = RendezvousParameters(BACKEND, str(path), "run", 1, 2, "localhost", **{**RENDEZVOUS, "join_timeout": 3})
        rendezvous = StoreRendezvous(parameters, "job", RestartCounter(tmp_path / "outcome.json", time.monotonic, list))
        assert isinstance(rendezvous, StoreRendezvous)
        with pytest.raises(RendezvousStateError):
            rendezvous.next_rendezvous()
        assert not (tmp_path / "marker").exists()
    assert pickle.loads(data) is None and (tmp_path / "marker").exists(), "the exploit is one"


def test_backend_swaps_as_torchrun_expects() -> None:
    """Loss: two nodes that both believe that their change has counted."""
    backend = StateBackend(InMemoryKeyValueStore(), "run")
    state = torchruns_state()
    assert backend.get_state() is None
    first = backend.set_state(pickle.dumps(state))
    assert first is not None and first[2]
    assert backend.set_state(pickle.dumps(dynamic_rendezvous._RendezvousState())) == (*first[:2], False), (
        "without a token only where nothing is"
    )
    state.round += 1
    second = backend.set_state(pickle.dumps(state), first[1])
    assert second is not None and second[2] and backend.get_state() == second[:2]
    third = backend.set_state(pickle.dumps(dynamic_rendezvous._RendezvousState()), first[1])
    assert third == (*second[:2], False), "an old token"


# ------------------------------------------------------------------------------------------------------------------ where it listens


def test_only_the_endpoints_own_address_is_listened_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: a port that is open on every network that a host has; or one that nobody but the host itself can reach."""
    named = {"own": ["127.0.1.1"], "plain": ["10.0.0.5"], "nat": [], "localhost": ["127.0.0.1", "::1"]}
    ways = {"other": "10.0.0.5", "far": "10.9.0.5", "self": "127.0.0.1", "gone": None}
    module = "gai_yolo.launcher.rendezvous.client."
    monkeypatch.setattr(f"{module}own_addresses", lambda host: named[host])
    monkeypatch.setattr(f"{module}source_address", lambda host, _: ways[host])
    monkeypatch.setattr(f"{module}all_addresses", lambda: ["127.0.0.1", "10.0.0.5", "10.9.0.5", "::1", "2001:db8::5"])

    def bound(host: str, *others: str) -> list[str]:
        return Host(Endpoint(host, 1), [Endpoint(other, 1) for other in others], SECRET).addresses()

    assert bound("plain", "other") == ["10.0.0.5"]
    assert bound("localhost") == ["127.0.0.1", "::1"]
    assert bound("own", "other", "far", "other", "gone") == ["127.0.1.1", "10.0.0.5", "10.9.0.5"]
    for alone in (bound("own"), bound("own", "gone"), bound("own", "self")):
        assert alone == ["127.0.1.1", "10.0.0.5", "10.9.0.5", "2001:db8::5"], "one by one, and none that comes later"
    assert bound("nat", "other") == ["10.0.0.5"]
    host = Host(Endpoint("own", 1), [Endpoint("other", 1)], SECRET)
    for way, addresses in (
        (None, ["127.0.1.1", "10.0.0.5", "10.9.0.5", "2001:db8::5"]),
        ("10.0.0.5", ["127.0.1.1", "10.0.0.5"]),
        (None, ["127.0.1.1", "10.0.0.5"]),
        ("10.9.0.5", ["127.0.1.1", "10.0.0.5", "10.9.0.5"]),
    ):
        ways["other"] = way
        assert host.addresses() == addresses, "a name server that is away opens the port nowhere else"


def eventually(true: Callable[[], bool], rendezvous: EndpointRendezvousClient) -> None:
    """Wait, as the launcher does."""
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        rendezvous.target()
        time.sleep(0.05)


def answers(host: str, port: int) -> bool:
    """Whether somebody takes connections there."""
    with contextlib.suppress(OSError), socket.create_connection((host, port), 5.0):
        return True
    return False


def test_addresses_that_come_later_are_listened_on_too(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, told: list[str]) -> None:
    """Loss: a job started at boot waits for ever for a first node that was there before its network."""
    port, own = endpoint.port, ["127.0.1.1"]
    monkeypatch.setattr("gai_yolo.launcher.rendezvous.client.own_addresses", lambda _: list(own))
    rendezvous = EndpointRendezvousClient([Endpoint("localhost", port)], SECRET, "job", "localhost", 60.0)
    try:
        early = TcpKeyValueStore(Endpoint("127.0.1.1", port), SECRET, 5.0)
        early.write({"a": b"1"})
        assert not answers("127.0.0.8", port) and not answers("127.0.0.9", port)
        with socket.create_server(("127.0.0.8", port)):
            own += ["127.0.0.8", "127.0.0.9"]
            eventually(lambda: answers("127.0.0.9", port), rendezvous)
            assert TcpKeyValueStore(Endpoint("127.0.0.9", port), SECRET, 5.0).read(["a"]) == [b"1"], "the same store"
            eventually(lambda: any("127.0.0.8" in line for line in told), rendezvous)
        eventually(lambda: answers("127.0.0.8", port), rendezvous)
        assert early.read(["a"]) == [b"1"], "who is connected stays so"
        assert [line for line in told if "cannot" in line] == [
            f"localhost:{port} cannot be served from 127.0.0.8 (another process listens there); trying again as long as the job runs"
        ]
    finally:
        rendezvous.close(False, lambda: False)
    assert not any(answers(host, port) for host in own)


def test_address_that_cannot_be_bound_closes_no_other(endpoint: Endpoint) -> None:
    """Loss: a node that serves nothing, because one of its addresses went while it started."""
    server = KeyValueServer(endpoint, SECRET, ["192.0.2.1", "127.0.0.2", "2001:db8::5"])
    try:
        assert server.addresses == ["127.0.0.2"]
        assert server.listen(["192.0.2.1", "127.0.0.2", "127.0.0.3"]) == [] and server.addresses == ["127.0.0.2", "127.0.0.3"]
        with pytest.raises(OSError, match="assign requested address"):
            KeyValueServer(endpoint, SECRET, ["192.0.2.1"])
        with pytest.raises(OSError, match="in use"):
            KeyValueServer(endpoint, SECRET, ["192.0.2.1", "127.0.0.4", "127.0.0.3"])
        assert server.listen(["127.0.0.4"]) == []
    finally:
        server.close()
    KeyValueServer(endpoint, SECRET, ["127.0.0.2", "127.0.0.3", "127.0.0.4"]).close()


def test_address_that_comes_before_the_thread_has_begun_is_served_once(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: on a busy machine the store ends with an exception of a socket that was closed twice."""
    late: list[threading.Thread] = []
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", lambda thread: late.append(thread))  # a function, so that it is bound
        server = KeyValueServer(endpoint, SECRET, ["127.0.0.2"])
        assert server.listen(["127.0.0.3"]) == []
    late[0].start()
    raised: list[object] = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    for host in ("127.0.0.2", "127.0.0.3"):
        assert TcpKeyValueStore(Endpoint(host, endpoint.port), SECRET, 5.0).read(["a"]) == [None]
    server.close()
    assert raised == []


def test_server_listens_where_it_was_told(endpoint: Endpoint) -> None:
    """Loss: `::` in the list of what listens."""
    server = KeyValueServer(endpoint, SECRET, ["127.0.0.2", "127.0.0.3"])
    try:
        assert server.addresses == ["127.0.0.2", "127.0.0.3"]
        assert TcpKeyValueStore(Endpoint("127.0.0.3", endpoint.port), SECRET, 5.0).read(["a"]) == [None]
        with pytest.raises(ConnectionRefusedError):
            TcpKeyValueStore(endpoint, SECRET, 5.0)
        with pytest.raises(OSError, match="in use"):
            KeyValueServer(endpoint, SECRET, ["127.0.0.4", "127.0.0.2"])
        KeyValueServer(endpoint, SECRET, ["127.0.0.4"]).close()
    finally:
        server.close()
