"""Breaks the file system calls of a process of the job; Python imports this by itself where the folder is on PYTHONPATH.

GAI_YOLO_FAULTS names a JSON file: {"root": folder, "log": file, "at": [places], "action": "kill" | "stop" | errno}. Calls of
the writer process that create, change or sync something under the root are counted from 1 and logged with the role of their
file; at the given places the whole process group is killed, the writer stopped, or the call fails. A place is a number among
all calls, or ["fsync data", 2] for the second call of that kind.

GAI_YOLO_STRACE names another one, the options of strace: the training process runs its writer under it, and dies with it.
"""

import json
import os
import signal
import subprocess
import sys
import threading

WRITER = "gai_yolo.checkpointing.writer_process"


def role(path):
    name = os.path.basename(str(path))
    parts = {"best.pt": "best", ".best": "record", ".json": "manifest", ".pt": "data", "checkpoints": "folder", "snapshots": "folder"}
    for part, what in parts.items():
        if part in name:
            return what
    return name


class Injector:
    """Counts the calls of the writer that concern one folder, and strikes at some of them."""

    def __init__(self, faults):
        self.faults, self.descriptors, self.count, self.kinds = faults, {}, 0, {}

    def install(self):
        os.open = self.opening(os.open)
        for name in ("rename", "link", "unlink"):
            setattr(os, name, self.by_path(name, getattr(os, name)))
        for name in ("write", "fsync", "close"):
            setattr(os, name, self.by_descriptor(name, getattr(os, name)))

    def strike(self, name, path):
        self.count += 1
        # Cleaning up behind a failed try is not retention.
        temp = name == "unlink" and os.path.basename(str(path)).startswith(".")
        what = f"{name} {'draft' if temp else role(path)}"
        self.kinds[what] = self.kinds.get(what, 0) + 1
        struck = self.count in self.faults["at"] or [what, self.kinds[what]] in self.faults["at"]
        with open(self.faults["log"], "a") as log:
            log.write(f"{os.getpid()} {int(struck)} {what}\n")
        if not struck:
            return
        if self.faults["action"] == "kill":
            os.killpg(0, signal.SIGKILL)
            signal.pause()
        elif self.faults["action"] == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            raise OSError(self.faults["action"], os.strerror(self.faults["action"]), str(path))

    def concerns(self, path):
        return str(path).startswith(self.faults["root"])

    def opening(self, original):
        def call(path, flags, *arguments, **more):
            ours = self.concerns(path) and flags & (os.O_CREAT | os.O_DIRECTORY)
            if ours:
                self.strike("open", path)
            descriptor = original(path, flags, *arguments, **more)
            if ours:
                self.descriptors[descriptor] = path
            return descriptor

        return call

    def by_path(self, name, original):
        def call(*arguments, **more):
            path = arguments[-1]
            if more.get("dir_fd") in self.descriptors:
                path = f"{self.descriptors[more['dir_fd']]}/{path}"
            if self.concerns(path):
                self.strike(name, path)
            return original(*arguments, **more)

        return call

    def by_descriptor(self, name, original):
        def call(descriptor, *arguments):
            if descriptor in self.descriptors:
                self.strike(name, self.descriptors[descriptor])
                if name == "close":
                    del self.descriptors[descriptor]
            return original(descriptor, *arguments)

        return call


def trace(options):
    original = subprocess.Popen

    class Popen(original):
        def __init__(self, command, *arguments, **more):
            traced = any(WRITER in str(part) for part in command)
            super().__init__(["strace", "-f", "-qq", "-y", *options, *command] if traced else command, *arguments, **more)
            if traced:
                threading.Thread(target=self.die_with_it, daemon=True).start()

        def die_with_it(self):
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
            os.killpg(0, signal.SIGKILL)

    subprocess.Popen = Popen


def read(variable):
    with open(os.environ[variable]) as file:
        return json.load(file)


def wait_for_writer(injector):
    """The writer, be it a fork or a process of its own, is who gives way to all others."""
    original = os.nice

    def nice(increment):
        injector.install()
        return original(increment)

    os.nice = nice


def refuse():
    raise BlockingIOError("a writer of its own is to be started, which can be traced")


if "GAI_YOLO_FAULTS" in os.environ:
    wait_for_writer(Injector(read("GAI_YOLO_FAULTS")))
if "GAI_YOLO_STRACE" in os.environ and not any(WRITER in part for part in sys.orig_argv):
    trace(read("GAI_YOLO_STRACE"))
    os.fork = refuse
