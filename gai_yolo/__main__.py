"""`python -m gai_yolo`, also under torchrun."""

import sys

from gai_yolo.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
