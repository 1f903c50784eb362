"""Two workers (pytest-xdist) share two cores: one thread each, or they would fight over them."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by torch when it is imported, also in child processes
