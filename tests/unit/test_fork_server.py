"""Workers that are forks: as if they had been started, and the usual way where they cannot be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gai_yolo import processes
from gai_yolo.launcher.command import worker_command
from gai_yolo.launcher.fork_server import ForkServer, is_like
from gai_yolo.launcher.script import preload
from tests.harness import environment

linux = pytest.mark.skipif(sys.platform != "linux", reason="forks are adopted on Linux only")

SCRIPT = """
import heavy
import json, os, signal, sys
word = os.environ["RANK"]
if "end" in sys.argv:
    raise SystemExit(7)
if "raise" in sys.argv:
    raise ValueError("no")
if "wait" in sys.argv:
    signal.pause()
with open(f"said.{word}", "w") as file:
    json.dump({"argv": sys.argv, "name": __name__, "file": __file__, "path": sys.path[0], "imported": heavy.PID, "pid": os.getpid(),
               "parent": os.getppid(), "session": os.getsid(0), "set": os.environ.get("HEAVY"), "gone": os.environ.get("ONLY_HERE"),
               "sigterm": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
               "sigint": signal.getsignal(signal.SIGINT) is signal.default_int_handler}, file)
"""
HEAVY = """
import os
PID = os.getpid()
os.environ["HEAVY"] = "1"
"""
AGENT = """
import json, os, signal, subprocess, sys, time
from multiprocessing import Pipe
from pathlib import Path
from gai_yolo.launcher.fork_server import ForkServer, start_server
script, command = sys.argv[1], lambda *more: [sys.executable, "-u", sys.argv[1], *more]
start = dict(os.environ)
found = {"agent": os.getpid()}
servers = []
def start_noted(requests, command):
    servers.append(start_server(requests, command))
    return servers[-1]
def ask(server, args, rank, **more):
    return server.fork(args, {**start, "RANK": rank, "TORCHELASTIC_RESTART_COUNT": rank, **more})
"""


def agent(tmp_path: Path, scenario: str) -> dict[str, Any]:
    """Run a piece of an agent, in a folder with a script; returns what it found."""
    (tmp_path / "code").mkdir(exist_ok=True)
    (tmp_path / "code" / "script.py").write_text(SCRIPT)
    (tmp_path / "code" / "heavy.py").write_text(HEAVY)
    done = subprocess.run(
        [sys.executable, "-c", f"{AGENT}\n{scenario}\nprint(json.dumps(found))", "code/script.py"],
        cwd=tmp_path,
        env={**environment(), "PYTHONPATH": str(Path.cwd())},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**found, "stderr": done.stderr}


@linux
def test_fork_is_the_script_as_a_child_of_the_agent_with_imports_made_before(tmp_path: Path) -> None:
    found = agent(
        tmp_path,
        'server = ForkServer(command("a", "b"))\n'
        'ends = [ask(server, command("a", "b"), rank) for rank in "01"]\n'
        "found.update(codes=[one.wait(20) for one in ends], pids=[one.pid for one in ends], server=server.pid)",
    )
    assert found["codes"] == [0, 0]
    for rank in (0, 1):
        said = json.loads((tmp_path / f"said.{rank}").read_text())
        assert said == {
            **{
                "argv": [str(tmp_path / "code" / "script.py"), "a", "b"],
                "name": "__main__",
                "file": str(tmp_path / "code" / "script.py"),
                "path": str(tmp_path / "code"),
            },
            **{"imported": found["server"], "pid": found["pids"][rank], "parent": found["agent"], "session": found["pids"][rank]},
            **{"set": "1", "gone": None, "sigterm": True, "sigint": True},
        }


@linux
def test_ends_of_forks_are_those_of_processes(tmp_path: Path) -> None:
    found = agent(
        tmp_path,
        "def end(word, number=None):\n"
        "    server = ForkServer(command(word))\n"
        '    child = ask(server, command(word), "0")\n'
        "    if number:\n"
        "        assert child.poll() is None\n"
        "        try:\n"
        "            child.wait(0.1)\n"
        "        except subprocess.TimeoutExpired:\n"
        "            os.killpg(child.pid, number)\n"
        "    return child.wait(20)\n"
        'found["codes"] = [end("end"), end("raise"), end("wait", signal.SIGTERM), end("wait", signal.SIGKILL)]',
    )
    assert found["codes"] == [7, 1, -15, -9]
    assert "ValueError: no" in found["stderr"]


@linux
def test_another_command_or_environment_is_left_to_the_usual_way(tmp_path: Path) -> None:
    found = agent(
        tmp_path,
        'server = ForkServer(command("a"))\n'
        'found["none"] = [ask(server, command("b"), "0") is None, ask(server, command("a"), "0", ONLY_HERE="1") is None]\n'
        'found["code"] = ask(server, command("a"), "0").wait(20)',
    )
    assert found["none"] == [True, True] and found["code"] == 0


@linux
def test_dead_server_is_replaced(tmp_path: Path) -> None:
    found = agent(
        tmp_path,
        'server = ForkServer(command("a"))\n'
        'found["first"] = ask(server, command("a"), "0").wait(20)\n'
        "os.kill(server.pid, signal.SIGTERM)\n"  # meant for the workers
        'found["second"] = ask(server, command("a"), "1").wait(20)\n'
        "os.kill(server.pid, signal.SIGKILL)\n"
        'found["none"] = ask(server, command("a"), "2") is None\n'
        'found["third"] = ask(server, command("a"), "3").wait(20)',
    )
    assert (found["first"], found["second"], found["none"], found["third"]) == (0, 0, True, 0)


UNFIT = {
    "a GPU was touched": (
        "torch.py",
        "import os\nSERVER = os.getpid()\nclass cuda:\n    _is_in_bad_fork = lambda: os.getpid() != SERVER\nset_num_threads = print\n",
    ),
    "a thread is left": ("thread.py", "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"),
    "the rank was looked at": ("rank.py", "import os\nRANK = int(os.getenv('RANK', -1))\n"),
    "torchrun's settings were looked at": ("restarts.py", "from os import environ\nCOUNT = environ.get('TORCHELASTIC_RESTART_COUNT')\n"),
}


HARMLESS = (
    "harmless.py",
    "import os, pickle\nHOME = os.environ.get('HOME')\nSEEN = [dict(os.environ), os.environ.copy(), list(os.environ.items())]\n"
    "assert all('OMP_NUM_THREADS' in seen for seen in SEEN[:2]) and {type(name) for name in SEEN[0]} == {str}\n"
    "assert pickle.loads(pickle.dumps(SEEN)) == SEEN\n",
)
"""Goes through all variables, as tqdm and fsspec do; among them is one that differs between workers."""


@linux
@pytest.mark.parametrize("why", [*UNFIT, "none"])
def test_nothing_is_forked_where_a_fork_would_not_be_as_good(why: str, tmp_path: Path) -> None:
    """Loss: workers that hang in their first step, cannot use their GPU, or all take themselves for rank -1; and, on a machine with tqdm
    where somebody has set OMP_NUM_THREADS, that no worker is ever forked."""
    (tmp_path / "code").mkdir()
    name, text = UNFIT.get(why, HARMLESS)
    (tmp_path / "code" / name).write_text(text)
    found = agent(
        tmp_path,
        f'Path("code/script.py").write_text("import {name.removesuffix(".py")}\\n" + Path("code/script.py").read_text())\n'
        'server = ForkServer(command("a"), start_noted)\n'
        'found["forked"] = [ask(server, command("a"), rank) is not None for rank in "01"]\n'
        'found["ends"] = [one.poll() for one in servers]',
    )
    assert found["forked"] == [why == "none"] * 2
    assert found["ends"] == [None], "and it is not made ready again and again"


@linux
def test_fork_whose_id_was_lost_does_not_run_beside_its_successor(tmp_path: Path) -> None:
    """Loss: two processes of one rank, of which nobody knows the first."""
    found = agent(
        tmp_path,
        "import threading\n"
        "def relay(theirs, ours):\n"  # the first answer arrives, the second one is lost with the server
        "    ours.send(theirs.recv())\n"
        "    theirs.send(ours.recv())\n"
        "    ours.send(theirs.recv())\n"
        '    found["lost"] = ours.recv()\n'
        "    servers[0].kill()\n"
        "    theirs.close()\n"
        "def start_relayed(requests, command):\n"
        "    if servers:\n"
        "        return start_noted(requests, command)\n"
        "    ours, its = Pipe()\n"
        "    with its:\n"
        "        server = start_noted(its, command)\n"
        "    threading.Thread(target=relay, args=(type(requests)(os.dup(requests.fileno())), ours)).start()\n"
        "    return server\n"
        'server = ForkServer(command("wait"), start_relayed)\n'
        'known = ask(server, command("wait"), "0")\n'
        'found["none"] = ask(server, command("wait"), "1") is None\n'
        'found["ends"] = [os.waitstatus_to_exitcode(os.waitpid(found["lost"], 0)[1]), known.poll()]\n'
        "os.kill(known.pid, signal.SIGKILL)",
    )
    assert found["none"] and found["ends"] == [-9, None]


@linux
def test_ends_are_known_though_the_starter_ignores_its_children(tmp_path: Path) -> None:
    """Loss: a supervisor's habit, inherited through exec, and the server dies at its first fork."""
    found = agent(
        tmp_path,
        "signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
        'server = ForkServer(command("end"), start_noted)\n'
        "signal.signal(signal.SIGCHLD, signal.SIG_DFL)\n"
        'found["codes"] = [ask(server, command("end"), rank).wait(20) for rank in "01"]\n'
        'found["ends"] = [one.poll() for one in servers]',
    )
    assert found["codes"] == [7, 7] and found["ends"] == [None]


@linux
def test_server_ends_without_a_word_when_its_agent_has_not_read_the_answer(tmp_path: Path) -> None:
    """Loss: a traceback beside the one sentence that says what to mend."""
    found = agent(
        tmp_path,
        "from gai_yolo.processes import adopt_orphans\n"
        "adopt_orphans()\n"
        "ours, its = Pipe()\n"
        "with its:\n"
        '    server = start_server(its, command("end"))\n'
        'ours.send({**start, "RANK": "0"})\n'
        'found["code"] = os.waitstatus_to_exitcode(os.waitpid(ours.recv(), 0)[1])\n'
        'ours.send({**start, "RANK": "1"})\n'
        "assert ours.poll(20)\n"
        "ours.close()\n"
        'found["server"] = server.wait(20)',
    )
    assert (found["code"], found["server"], found["stderr"]) == (7, 0, "")


def test_no_fork_server_where_orphans_cannot_be_adopted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: workers that are children of another process: each seems to have ended at once."""
    monkeypatch.setattr(processes, "_prctl", lambda *_: -1)
    with pytest.raises(OSError, match="orphans"):
        ForkServer([sys.executable, "-u", "script.py"])


@linux
def test_server_ends_with_the_agent_and_its_forks_live_on(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "script.py").write_text(SCRIPT)
    (tmp_path / "code" / "heavy.py").write_text(HEAVY)
    scenario = (
        f'{AGENT}\nserver = ForkServer(command("wait"))\nchild = ask(server, command("wait"), "0")\n'
        "print(server.pid, child.pid, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    own = {**environment(), "PYTHONPATH": str(Path.cwd())}
    with (tmp_path / "out").open("w") as out:  # a pipe would be held open by the fork
        subprocess.run([sys.executable, "-c", scenario, "code/script.py"], cwd=tmp_path, env=own, stdout=out, timeout=60)
    server, child = map(int, (tmp_path / "out").read_text().split())
    try:
        deadline = time.monotonic() + 20
        while (state := _state(server)) not in ("", "Z") and time.monotonic() < deadline:
            time.sleep(0.05)
        assert state in ("", "Z")
        assert _state(child) == "S"
    finally:
        os.kill(child, 9)


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def test_imports_are_those_made_before_anything_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("plain", "first", "second", "package_of_one", "package_of_one.module", "late", "conditional", "inner", "broken")
    for name in names:
        path = tmp_path / f"early_{name.replace('.', '/')}.py"
        if name == "package_of_one":
            path = tmp_path / f"early_{name}" / "__init__.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text("raise ValueError" if name == "broken" else "")
    monkeypatch.syspath_prepend(tmp_path)
    preload(b"""'''Docs.'''
from __future__ import annotations
import early_broken
import early_plain, early_first as second
from early_package_of_one.module import run_job
from . import relative
from typing import *
import early_second
if True:
    import early_conditional
def f():
    import early_inner
os.environ["HOME"] = "elsewhere"
import early_late
""")
    found = {name for name in names if f"early_{name}" in sys.modules}
    assert found == {"plain", "first", "second", "package_of_one", "package_of_one.module"}


def test_module_does_not_take_the_place_of_a_function_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss: "module is not callable" in a script that is right."""
    package = tmp_path / "twofold_package"
    package.mkdir()
    (package / "__init__.py").write_text("def tool(): return 5\n")
    (package / "tool.py").write_text("")
    (package / "other.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    preload(b"from twofold_package import tool\nfrom twofold_package import other\nfrom twofold_package import missing")
    import twofold_package  # type: ignore[import-not-found]

    assert twofold_package.tool() == 5 and "twofold_package.other" in sys.modules


def test_only_torchruns_own_variables_may_differ() -> None:
    own = {"PATH": "/bin", "OMP_NUM_THREADS": "2"}
    assert is_like(own, {"PATH": "/bin", "OMP_NUM_THREADS": "1", "RANK": "0", "TORCHELASTIC_RUN_ID": "x"})
    assert not is_like(own, {"PATH": "/usr/bin"})
    assert not is_like(own, {**own, "CUDA_VISIBLE_DEVICES": "1"})
    assert not is_like({**own, "LD_PRELOAD": "x"}, own)


def test_command_of_workers_is_read_from_the_agents() -> None:
    assert worker_command(["--nnodes=1:2", "train.py", "--set", "a=b"]) == [sys.executable, "-u", "train.py", "--set", "a=b"]
    assert worker_command(["--nnodes=1", "--module", "train", "--module"]) == [sys.executable, "-u", "-m", "train", "--module"]
