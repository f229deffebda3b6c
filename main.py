"""The same job under the name of the first guide: `uv run main.py --config configs/config.yaml [--resume]`."""

from elastic_train import main
from gai_yolo.supervision.outcome import leave
from gai_yolo.supervision.streams import forgive_lost_streams

if __name__ == "__main__":
    forgive_lost_streams()
    leave(main())
