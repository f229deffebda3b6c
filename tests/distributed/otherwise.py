"""The real job; its process of rank OTHER_RANK is started with OTHER, more arguments, as on a node with another configuration."""

from __future__ import annotations

import os
import sys

from elastic_train import main

if __name__ == "__main__":
    more = os.environ["OTHER"].split() if os.environ.get("RANK", "0") == os.environ["OTHER_RANK"] else []
    sys.exit(main([*sys.argv[1:], *more]))
