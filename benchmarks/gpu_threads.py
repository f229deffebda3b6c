"""Why a fork would not be as good as a new process: `python -m benchmarks.gpu_threads steps|server|writer`, each in a process of its own.

`steps` tells what each import leaves: threads, a touched GPU, and who asked for GPUs or looked at a worker's variables. `server` does what
the fork server does, and says what its `forks_well` is made of; `writer` makes a spare writer where a job does.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

from gai_yolo.launcher.fork_server import OF_WORKER, Noting

STEPS = (
    *("numpy", "yaml", "pydantic", "rich.console", "cv2", "pycocotools.mask", "torch", "torchvision", "torchvision.ops", "tensorboard"),
    *("torch.utils.tensorboard", "torch.distributed", "torch.nn.parallel", "torch._dynamo", "gai_yolo.job.run", "elastic_train"),
)


def names_of_threads() -> Counter[str]:
    """Of this process."""
    return Counter((path / "comm").read_text().strip() for path in Path("/proc/self/task").iterdir())


def where() -> str:
    """Who called, innermost last."""
    frames = [frame for frame in traceback.extract_stack() if "importlib" not in frame.filename and "gpu_threads" not in frame.filename]
    return " > ".join(f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno}" for frame in frames[-6:])


class Tracing(Noting):
    """Environment variables; who asks for one of a worker's by its name is noted."""

    asked: ClassVar[list[str]] = []

    def __getitem__(self, name: str) -> str:
        if id(name) not in self.listed and OF_WORKER.fullmatch(name):
            self.asked.append(f"{name}: {where()}")
        return super().__getitem__(name)


def watch_gpu(asked: list[str]) -> None:
    """Note who asks PyTorch for GPUs: the driver is touched then, and a fork spoilt."""
    functions: Any = sys.modules["torch._C"]
    for name in ("_cuda_getDeviceCount", "_cuda_init"):
        inner = getattr(functions, name, None)
        if inner is not None and not hasattr(inner, "watched"):

            def asking(*arguments: Any, name: str = name, inner: Any = inner) -> Any:
                asked.append(f"{name}: {where()}")
                return inner(*arguments)

            vars(asking)["watched"] = True
            setattr(functions, name, asking)


def after_fork() -> dict[str, Any]:
    """Whether a fork finds the GPU spoilt, and this process's threads after it."""
    pid = os.fork()
    if pid == 0:
        torch = sys.modules.get("torch")
        os._exit(int(torch is not None and getattr(torch.cuda, "_is_in_bad_fork", lambda: True)()))
    found: dict[str, Any] = {"threads at once": sum(names_of_threads().values())}
    found["spoilt"] = os.waitpid(pid, 0)[1] != 0
    for seconds in (0.0, 0.01, 0.2):
        time.sleep(seconds)
        found[f"{seconds:g} s after the child"] = dict(names_of_threads())
    return found


def steps() -> None:
    """Import one thing after the other."""
    asked: list[str] = []
    os.environ.__class__ = Tracing
    for name in STEPS:
        before = names_of_threads()
        seen = len(Tracing.asked)
        try:
            importlib.import_module(name)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}")
        after = names_of_threads()
        print(f"--- {name}: threads {dict(after)}, new {dict(after - before)}; {after_fork()}")
        for line in (*Tracing.asked[seen:], *asked):
            print(f"      {line}")
        asked.clear()
        if "torch._C" in sys.modules:
            watch_gpu(asked)
    libraries = sorted({line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if ".so" in line})
    print(
        "libraries:", [Path(one).name for one in libraries if any(word in one for word in ("blas", "omp", "cuda.so", "nvidia-ml", "tbb"))]
    )


def server() -> None:
    """As the fork server prepares itself."""
    from gai_yolo.launcher import fork_server
    from gai_yolo.launcher.script import Script

    script = Script(["elastic_train.py"])
    script.prepare()
    os.environ.__class__ = Tracing
    script.preload()
    os.environ.__class__ = os._Environ
    print("--- server: forks_well", fork_server.forks_well(), after_fork())
    print("matched:", *Tracing.asked, sep="\n      ")
    own = dict(os.environ)
    print("OMP_NUM_THREADS", own.get("OMP_NUM_THREADS"), "torch", getattr(sys.modules.get("torch"), "__version__", None))


def writer() -> None:
    """As a job makes its spare writer."""
    began = time.monotonic()
    import elastic_train  # noqa: F401

    print(f"--- writer: imports {time.monotonic() - began:.1f} s, threads {dict(names_of_threads())}")
    import torch

    from gai_yolo.checkpointing import writer_process, writer_start
    from gai_yolo.processes import has_one_thread

    print(f"CUDA initialised {bool(vars(torch.cuda)['_initialized'])}")
    for _ in range(3):
        began = time.monotonic()
        spare = writer_start.SpareWriter(writer_process.main)
        taken = spare.take()
        print(f"spare: {'a fork' if taken else 'NONE'}, {1e3 * (time.monotonic() - began):.1f} ms, one thread {has_one_thread()}")
        if taken:
            time.sleep(0.3)
            status = Path(f"/proc/{taken[0].pid}/status").read_text().splitlines()
            print("      ", [line.replace("\t", " ") for line in status if line.startswith(("Name", "State", "Threads", "VmRSS"))])
            taken[1].close()
            print("      ended with", taken[0].wait(5.0))
    print(after_fork())
    print(f"GPU seen after: {torch.cuda.is_available()}; then a fork: {after_fork()}")


if __name__ == "__main__":
    {"steps": steps, "server": server, "writer": writer}[sys.argv[1]]()
