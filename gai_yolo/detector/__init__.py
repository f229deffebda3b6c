"""The YOLOv12 network and its mathematics; knows no processes, and no files but weights."""

from gai_yolo.detector.network import YOLO12

__all__ = ["YOLO12"]
