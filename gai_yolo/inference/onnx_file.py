"""The network as an ONNX graph, and non-maximum suppression in ONNX's own operators behind it (https://onnx.ai/onnx/operators)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gai_yolo.detector import YOLO12
from gai_yolo.detector.boxes import STRIDES
from gai_yolo.errors import ExportError, printable
from gai_yolo.inference.graph import Predicting, Selection, number_format

OLDEST_OPSET = 18
"""That PyTorch's exporter writes without rewriting its graph to an older one, which it does not promise to do."""
LATEST_OPSET = 21
"""Only the oldest is tried in tests; what a newer one makes is compared as every file is."""
COARSEST = max(STRIDES)


def onnx_graph(network: YOLO12, batch: int | None, sides: tuple[int, int] | None, opset: int) -> Any:
    """An `onnx.ModelProto` of `Predicting`; input `images`, outputs `boxes` and `scores`.

    PyTorch's newer exporter is used: the one that is built on TorchScript gives as good a graph in less time, and is deprecated.

    Args:
        network: of `deployable`.
        batch: None for any.
        sides: height and width; None for all multiples of 32.

    Raises:
        ExportError: PyTorch's exporter cannot do it in this opset.
    """
    import onnx

    height, width = sides or (3 * COARSEST, 5 * COARSEST)
    # Sizes that are no other number in the network, lest the exporter takes one for the other.
    example = torch.zeros(batch or 2, 3, height, width, dtype=number_format(network))
    free: dict[int, Any] = {} if batch else {0: torch.export.Dim("batch", min=1)}
    if sides is None:
        free |= {axis: COARSEST * torch.export.Dim(f"cells_{axis}") for axis in (2, 3)}
    graph = _exported(network, example, free, opset)
    # They name lines of files of the machine that this runs on.
    for node in graph.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    del graph.graph.value_info[:]
    points = "points" if sides is None else sum((height // stride) * (width // stride) for stride in STRIDES)
    _name_dimensions(graph.graph.input[0], [batch or "batch", 3, *(sides or ("height", "width"))])
    _name_dimensions(graph.graph.output[0], [batch or "batch", points, 4])
    _name_dimensions(graph.graph.output[1], [batch or "batch", points, network.num_classes])
    onnx.checker.check_model(graph)
    return graph


def _exported(network: YOLO12, example: torch.Tensor, free: dict[int, Any], opset: int) -> Any:
    try:
        program = torch.onnx.export(
            Predicting(network).eval(),
            (example,),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["boxes", "scores"],
            dynamic_shapes=(free,) if free else None,
            opset_version=opset,
        )
    except torch.onnx.OnnxExporterError as error:
        reason = printable(str(error).strip().partition("\n")[0])
        raise ExportError(f"onnx: PyTorch {torch.__version__} cannot write this network in opset {opset} ({reason}).") from error
    assert program is not None
    graph = program.model_proto
    written = next(one.version for one in graph.opset_import if not one.domain)
    if written != opset:  # where it cannot rewrite a graph it says so in a log, and leaves the graph as it is
        raise ExportError(f"onnx: PyTorch {torch.__version__} writes this network in opset {written}, not {opset}; give --opset {written}.")
    return graph


def _name_dimensions(value: Any, dimensions: list[int | str]) -> None:
    """The exporter's names are formulas of names of its own."""
    shape = value.type.tensor_type.shape
    del shape.dim[:]
    for dimension in dimensions:
        added = shape.dim.add()
        if isinstance(dimension, str):
            added.dim_param = dimension
        else:
            added.dim_value = dimension


def with_selection(graph: Any, selection: Selection, num_classes: int) -> Any:
    """A copy of `onnx_graph`'s graph that ends with the detections of each image, as `graph.Selecting` returns them.

    NonMaxSuppression lists what is kept of all images and classes; so that each image gets rows of its own, the scores of these are put
    back in their places, and the highest of each image are taken: of equal ones the first, as everywhere.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    graph = onnx.ModelProto.FromString(graph.SerializeToString())
    main, most = graph.graph, selection.max_detections
    raw_boxes, raw_scores = (_renamed(main, name, f"all_{name}") for name in ("boxes", "scores"))

    def constant(name: str, value: NDArray[Any]) -> str:
        main.initializer.append(numpy_helper.from_array(value, f"selection_{name}"))
        return f"selection_{name}"

    def node(kind: str, inputs: list[str], *outputs: str, **attributes: Any) -> str:
        outputs = tuple(name if name in FINAL_NAMES else f"selection_{name}" for name in outputs)
        main.node.append(helper.make_node(kind, inputs, list(outputs), name=f"selection_{outputs[0]}", **attributes))
        return outputs[0]

    last, zero, whole = (np.array(value, np.int64) for value in ([-1], 0, [0, -1]))
    limit = constant("max_detections", np.array([most], np.int64))
    thresholds = (constant(name, np.array([getattr(selection, name)], np.float32)) for name in ("iou", "confidence"))
    by_class = node("Transpose", [raw_scores], "scores_by_class", perm=[0, 2, 1])
    kept = node("NonMaxSuppression", [raw_boxes, by_class, limit, *thresholds], "kept")
    places = node("Gather", [kept, constant("order", np.array([0, 2, 1], np.int64))], "places", axis=1)
    values = node("GatherND", [raw_scores, places], "values")
    nothing = node("Expand", [constant("no_score", np.zeros((), np.float32)), node("Shape", [raw_scores], "shape")], "nothing")
    sparse = node("Reshape", [node("ScatterND", [nothing, places, values], "put"), constant("flat", whole)], "sparse")
    # Small images have fewer places than rows.
    padded = node("Pad", [sparse, constant("padding", np.array([0, 0, 0, most], np.int64))], "padded")
    scores = node("TopK", [padded, limit], "scores", "ranked", axis=1)
    found = node("Greater", [scores, constant("zero", np.zeros((), np.float32))], "found")
    ranked = node("Where", [found, "selection_ranked", constant("first", zero)], "ranked_or_first")
    classes = constant("num_classes", np.array(num_classes, np.int64))
    node("Mod", [ranked, classes], "classes")
    point = node("Unsqueeze", [node("Div", [ranked, classes], "point"), constant("last", last)], "point_column")
    sides = node("Expand", [point, constant("four", np.array([1, 1, 4], np.int64))], "sides")
    at_points = node("GatherElements", [raw_boxes, sides], "at_points", axis=1)
    as_float = node("Cast", [found], "as_float", to=TensorProto.FLOAT)
    node("Mul", [at_points, node("Unsqueeze", [as_float, "selection_last"], "mask")], "boxes")
    as_numbers = node("Cast", [found], "as_numbers", to=TensorProto.INT64)
    node("ReduceSum", [as_numbers, constant("rows", np.array([1], np.int64))], "count", keepdims=0)
    _declare_outputs(main, most)
    onnx.checker.check_model(graph)
    return graph


FINAL_NAMES = ("boxes", "scores", "classes", "count")


def _declare_outputs(main: Any, most: int) -> None:
    from onnx import TensorProto, helper

    size = main.input[0].type.tensor_type.shape.dim[0]
    batch: int | str = size.dim_value or size.dim_param
    del main.output[:]
    kinds = (TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.INT64, TensorProto.INT64)
    shapes: tuple[list[int | str], ...] = ([batch, most, 4], [batch, most], [batch, most], [batch])
    main.output.extend(helper.make_tensor_value_info(*of_one) for of_one in zip(FINAL_NAMES, kinds, shapes, strict=True))


def _renamed(main: Any, name: str, to: str) -> str:
    for one in main.node:
        for names in (one.input, one.output):
            for place, value in enumerate(names):
                if value == name:
                    names[place] = to
    return to
