"""Two workers (pytest-xdist) share two cores: one thread each, or they would fight over them."""

import atexit
import gc
import os
import shutil
import tempfile

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by torch when it is imported, also in child processes

# Never the user's own cache, in child processes neither.
os.environ["EYETUNE_CACHE"] = tempfile.mkdtemp(prefix="eyetune-tests-")
atexit.register(shutil.rmtree, os.environ["EYETUNE_CACHE"], ignore_errors=True)
atexit.register(gc.unfreeze)  # else libraries complain at the end that their objects were left behind

# No test pulls the plug: what is written is there for every process without waiting for the disk to hold it.
os.fsync = lambda handle: None


@pytest.fixture(scope="module", autouse=True)
def _light() -> None:
    """What costs every run of a tiny network more than its training, and checks nothing.

    The end of every training collects garbage, and would go through a million objects of the libraries imported so
    far: these are set aside. Pictures are drawn with a quarter of the pixels.
    """
    from eyetune.metrics import plots

    plots.DPI = 100
    gc.collect()
    gc.freeze()


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """For runs whose plots nobody looks at: half of the time of scoring a tiny run is drawing them."""
    monkeypatch.setattr("eyetune.train.results._draw", lambda *_: None)
