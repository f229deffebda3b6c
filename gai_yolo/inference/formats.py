"""Formats of exported networks: how a file of each is written, and how it is run by the program that it is made for."""

from __future__ import annotations

import errno
import io
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from gai_yolo.detector import YOLO12
from gai_yolo.detector.postprocess import MAX_CANDIDATES
from gai_yolo.detector.weights import METADATA
from gai_yolo.errors import ExportError
from gai_yolo.inference.graph import PredictingAnywhere, Selecting, Selection, number_format
from gai_yolo.inference.onnx_file import OLDEST_OPSET, onnx_graph, with_selection

Format = Literal["onnx", "torchscript", "openvino"]
SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torchscript": ".torchscript", "openvino": ".xml"}
LIBRARIES: dict[Format, tuple[str, ...]] = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "torchscript": (),
    "openvino": ("onnx", "onnxscript", "openvino"),
}
"""That a format needs, and that come with the extra of its name."""
Run = Callable[[NDArray[np.float32]], list[NDArray[Any]]]
"""Images `(B, 3, H, W)` float32 in 0..1 to a file's outputs, in their order."""
Write = Callable[[Path, Selection | None, dict[str, Any]], None]
"""Write a file, with a selection or without, that says this about itself."""


@dataclass(frozen=True)
class Layout:
    """What a file takes."""

    batch: int | None = None
    """Images at a time; None for any number."""
    sides: tuple[int, int] | None = None
    """Height and width of the input in pixels; None for all multiples of 32."""
    half: bool = False
    """Computes in fp16, and takes images in it."""
    opset: int = OLDEST_OPSET
    """Of ONNX, and what is made of it."""


def missing(format: Format) -> list[str]:
    """Names of the libraries that a format needs and that cannot be imported."""
    from importlib.util import find_spec

    return [name for name in LIBRARIES[format] if find_spec(name) is None]


def must_be_there(format: Format) -> None:
    """Raises `ExportError` if a library is missing."""
    absent = missing(format)
    if absent:
        raise ExportError(f'{format} needs what is not installed here ({", ".join(absent)}); pip install "gai-yolo[{format}]".')


def prepared(format: Format, network: YOLO12, layout: Layout) -> Write:
    """What can write a network's files; the slow part of the work is done here, once.

    Args:
        network: of `deployable`, in the number format of the layout.
    """
    if format == "torchscript":
        return _as_torchscript(network, layout)
    graph = onnx_graph(network, layout.batch, layout.sides, layout.opset)

    def finished(selection: Selection | None, about: dict[str, Any]) -> Any:
        from onnx import helper

        whole = graph if selection is None else with_selection(graph, selection, network.num_classes)
        whole.producer_name, whole.producer_version = "gai-yolo", about["version"]
        helper.set_model_props(whole, {METADATA: json.dumps(about)})
        return whole

    def write_onnx(path: Path, selection: Selection | None, about: dict[str, Any]) -> None:
        path.write_bytes(finished(selection, about).SerializeToString())

    def write_openvino(path: Path, selection: Selection | None, about: dict[str, Any]) -> None:
        import openvino

        model = openvino.Core().read_model(io.BytesIO(finished(selection, about).SerializeToString()))
        model.set_rt_info(json.dumps(about), [METADATA])
        try:
            openvino.save_model(model, path, compress_to_fp16=False)
        except RuntimeError as error:  # a full disk, in C++'s words
            raise OSError(errno.EIO, f"OpenVINO cannot write there ({error})") from error

    return write_onnx if format == "onnx" else write_openvino


def _as_torchscript(network: YOLO12, layout: Layout) -> Write:
    height, width = layout.sides or (96, 160)
    example = torch.zeros(layout.batch or 2, 3, height, width, dtype=number_format(network))
    with warnings.catch_warnings(), torch.no_grad():
        _pass_over_deprecation()
        # Anything else that the trace would take for a constant is a file that is wrong for other sizes.
        warnings.simplefilter("error", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        warnings.filterwarnings("ignore", "Converting a tensor to a Python boolean", module=r"gai_yolo\.detector\.network")
        module = PredictingAnywhere(network).eval()
        traced = torch.jit.trace(module, (example,), check_trace=False)  # type: ignore[no-untyped-call]

    def write(path: Path, selection: Selection | None, about: dict[str, Any]) -> None:
        module = traced
        with warnings.catch_warnings():
            _pass_over_deprecation()
            if selection is not None:
                module = torch.jit.script(Selecting(traced, selection, MAX_CANDIDATES).eval())
            # On a full disk PyTorch's own writer ends the process.
            content = io.BytesIO()
            torch.jit.save(module, content, _extra_files={f"{METADATA}.json": json.dumps(about)})
        path.write_bytes(content.getbuffer())

    return write


def _pass_over_deprecation() -> None:
    """What somebody who asks for TorchScript is told in our words."""
    warnings.filterwarnings("ignore", r".*torch\.jit\.\w+` is (deprecated|not supported)", FutureWarning)
    warnings.filterwarnings("ignore", r".*torch\.jit\.\w+` is (deprecated|not supported)", DeprecationWarning)


def opened(format: Format, path: Path) -> Run:
    """A file, run on the CPU by its own program, with as many threads as PyTorch has here."""
    return {"onnx": _open_onnx, "torchscript": _open_torchscript, "openvino": _open_openvino}[format](path)


def of_network(network: YOLO12, autocast: torch.dtype | None = None) -> Run:
    """PyTorch itself, in the network's number format or in another one where that does no harm."""
    kind = number_format(network)

    def run(images: NDArray[np.float32]) -> list[NDArray[Any]]:
        with torch.inference_mode(), torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            boxes, scores = network(torch.from_numpy(images).to(kind))
        return [boxes.numpy(), scores.numpy()]

    return run


def _open_torchscript(path: Path) -> Run:
    with warnings.catch_warnings():
        _pass_over_deprecation()
        module = torch.jit.load(path)  # type: ignore[no-untyped-call]
    kind = number_format(module)

    def run(images: NDArray[np.float32]) -> list[NDArray[Any]]:
        with torch.inference_mode():
            return [one.numpy() for one in module(torch.from_numpy(images).to(kind))]

    return run


def _open_onnx(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    kind = np.float16 if session.get_inputs()[0].type == "tensor(float16)" else np.float32
    return lambda images: list(session.run(None, {"images": images.astype(kind, copy=False)}))


def _open_openvino(path: Path) -> Run:
    import openvino

    # In the numbers of the file; by itself the plugin takes bf16 where the processor has it.
    options = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    model = openvino.Core().compile_model(path, "CPU", options)
    kind = np.float16 if model.input(0).element_type == openvino.Type.f16 else np.float32

    def run(images: NDArray[np.float32]) -> list[NDArray[Any]]:
        found = model(images.astype(kind, copy=False))
        return [np.array(found[output]) for output in model.outputs]

    return run
