"""gai-yolo: a fault-tolerant elastic training job for the YOLOv12 detector."""

__version__ = "0.1.0"
