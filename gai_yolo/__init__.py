"""gai-yolo: a fault-tolerant elastic training job for the YOLOv12 detector.

`from gai_yolo import Detector` is the trained network for programs (docs/predict.md).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gai_yolo.machine import wait_briefly

if TYPE_CHECKING:
    from gai_yolo.predict.detector import Detector
    from gai_yolo.predict.result import Result

__all__ = ["Detector", "Result"]
__version__ = "0.1.0"

_PLACES = {"Detector": "gai_yolo.predict.detector", "Result": "gai_yolo.predict.result"}

wait_briefly()  # here, because nothing of this package can import PyTorch earlier, however the job is started


def __getattr__(name: str) -> Any:
    # Only when they are asked for: they import PyTorch, which the commands of this package do without where they can.
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
