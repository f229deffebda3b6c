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


def install(faults):
    descriptors = {}
    count = 0
    kinds = {}

    def strike(name, path):
        nonlocal count
        count += 1
        # Cleaning up behind a failed try is not retention.
        temp = name == "unlink" and os.path.basename(str(path)).startswith(".")
        what = f"{name} {'draft' if temp else role(path)}"
        kinds[what] = kinds.get(what, 0) + 1
        struck = count in faults["at"] or [what, kinds[what]] in faults["at"]
        with open(faults["log"], "a") as log:
            log.write(f"{os.getpid()} {int(struck)} {what}\n")
        if not struck:
            return
        if faults["action"] == "kill":
            os.killpg(0, signal.SIGKILL)
            signal.pause()
        elif faults["action"] == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            raise OSError(faults["action"], os.strerror(faults["action"]), str(path))

    def concerns(path):
        return str(path).startswith(faults["root"])

    def by_path(name):
        original = getattr(os, name)

        def call(*arguments, **more):
            path = arguments[-1]
            if more.get("dir_fd") in descriptors:
                path = f"{descriptors[more['dir_fd']]}/{path}"
            if concerns(path):
                strike(name, path)
            return original(*arguments, **more)

        setattr(os, name, call)

    def by_descriptor(name):
        original = getattr(os, name)

        def call(descriptor, *arguments):
            if descriptor in descriptors:
                strike(name, descriptors[descriptor])
                if name == "close":
                    del descriptors[descriptor]
            return original(descriptor, *arguments)

        setattr(os, name, call)

    original_open = os.open

    def open_(path, flags, *arguments, **more):
        ours = concerns(path) and flags & (os.O_CREAT | os.O_DIRECTORY)
        if ours:
            strike("open", path)
        descriptor = original_open(path, flags, *arguments, **more)
        if ours:
            descriptors[descriptor] = path
        return descriptor

    os.open = open_
    for name in ("rename", "link", "unlink"):
        by_path(name)
    for name in ("write", "fsync", "close"):
        by_descriptor(name)


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


is_writer = any(WRITER in part for part in sys.orig_argv)
if "GAI_YOLO_FAULTS" in os.environ and is_writer:
    install(read("GAI_YOLO_FAULTS"))
if "GAI_YOLO_STRACE" in os.environ and not is_writer:
    trace(read("GAI_YOLO_STRACE"))
