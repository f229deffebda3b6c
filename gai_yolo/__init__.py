"""gai-yolo: a fault-tolerant elastic training job for the YOLOv12 detector."""

from gai_yolo.machine import wait_briefly

__version__ = "0.1.0"

wait_briefly()  # here, because nothing of this package can import PyTorch earlier, however the job is started
