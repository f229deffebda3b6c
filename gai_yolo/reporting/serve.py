"""TensorBoard's own server beside the training, for as long as the training lives."""

from __future__ import annotations

import atexit
import socket
import subprocess
import sys
from pathlib import Path

# TensorBoard knows nothing of us. The child reads a pipe that nobody writes to: it ends when the parent does, by a signal too.
CHILD = """
import os, sys, threading
def watch():
    sys.stdin.buffer.read()
    os._exit(0)
threading.Thread(target=watch, daemon=True).start()
from tensorboard.main import run_main
run_main()
"""
SECONDS_TO_STOP = 5.0


def serve_tensorboard(folder: Path, port: int = 6006) -> str:
    """Start TensorBoard for the run folders under `folder`, reachable from this machine only.

    Returns at once; the server answers some seconds later. A port that is taken, `port` 0 included, is replaced by a free one.
    The child ends with this process, killed or not.

    Returns:
        The address to open in a browser.
    """
    port = _free_port(port)
    arguments = ["--logdir", str(folder), "--host", "localhost", "--port", str(port)]
    # -P keeps the current directory off the child's module path. A session of its own: Ctrl-C is for the training, which then
    # stops in good order and takes the server with it.
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", CHILD, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    atexit.register(_stop, child)
    return f"http://localhost:{port}/"


def _free_port(wanted: int) -> int:
    """`wanted` if nobody listens there, else a port the system picks; another process may still be faster."""
    for port in (wanted, 0):
        try:
            with socket.create_server(("127.0.0.1", port)) as server:
                return int(server.getsockname()[1])
        except OSError:
            continue
    return wanted


def _stop(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(SECONDS_TO_STOP)
    except subprocess.TimeoutExpired:
        child.kill()
