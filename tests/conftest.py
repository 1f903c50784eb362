"""Two workers (pytest-xdist) share two cores: one thread each, or they would fight over them."""

import atexit
import os
import shutil
import tempfile

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by torch when it is imported, also in child processes

# Never the user's own cache, in child processes neither.
os.environ["EYETUNE_CACHE"] = tempfile.mkdtemp(prefix="eyetune-tests-")
atexit.register(shutil.rmtree, os.environ["EYETUNE_CACHE"], ignore_errors=True)
