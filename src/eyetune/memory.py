"""The most memory that work took: of the GPU, or of this process."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import platform
import resource
import sys
from pathlib import Path

import torch


def start_anew(device: str) -> bool:
    """Give back what is free, and let :func:`peak` count from now; False where the system does not allow that.

    On a processor that takes Linux (`/proc/self/clear_refs`); there memory that is merely kept for later is returned
    first, so that what earlier work needed does not count.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return True
    if device == "mps":
        torch.mps.empty_cache()
        return True
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return True
    return False


def peak(device: str) -> int:
    """Most bytes so far: of the GPU since the last start, else of this process, the interpreter included."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    if device == "mps":
        return torch.mps.driver_allocated_memory()  # what the driver once gave stays until the cache is emptied
    try:
        # (Not getrusage: on Linux its maximum begins with that of the process that started this one.)
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
