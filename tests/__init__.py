"""The tests. Imported before all of them."""

import atexit
import os
import shutil
import sys
import tempfile

if sys.dont_write_bytecode:
    # Every process that a test starts would compile PyTorch again, for 2 to 5 s. No bytecode is to lie beside sources; it goes elsewhere.
    sys.dont_write_bytecode, sys.pycache_prefix = False, tempfile.mkdtemp(prefix="gai-yolo-bytecode-")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
    atexit.register(shutil.rmtree, sys.pycache_prefix, ignore_errors=True)
