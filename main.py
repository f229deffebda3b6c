"""The same job under the name of the first guide: `uv run main.py --config configs/config.yaml [--resume]`."""

import sys

from elastic_train import main

if __name__ == "__main__":
    sys.exit(main())
