"""Several processes of one command, as torchrun and `accelerate launch` start them, before PyTorch is imported.

What a process says goes to one terminal that all share: a message that all have is printed once, and one that a single
process has is printed by that process. They meet in the launcher's key-value store, which is there before the processes
are connected and outlives any of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import time
import traceback
import warnings
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

TOGETHER_SECONDS = 5.0
"""How long a process that fails waits for the others to fail alike, so that all leave with the same exit code."""

_STORE_SECONDS = 5.0


def rank() -> int:
    """This process's number among those of the command, from 0."""
    return _number("RANK", 0)


def count() -> int:
    """How many processes the command has; 1 without a launcher."""
    return _number("WORLD_SIZE", 1)


def quieten() -> None:
    """Let only the first process warn, and drop what PyTorch's C++ side would say in each of them.

    (DistributedDataParallel, asked to tolerate parameters without gradients, warns when there are none.)
    """
    if count() > 1:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        if rank() > 0:
            warnings.simplefilter("ignore")


def part() -> None:
    """Once all work is done: wait for the others and take the connections down, which an exit with open ones may not
    survive (gloo's threads abort it now and then)."""
    if count() > 1 and _connected():
        from torch import distributed

        distributed.barrier()
        distributed.destroy_process_group()


def fail(message: str, exit_code: int) -> int:
    """Print `message` to stderr, once however many processes say the same, and return the code to leave with."""
    store = _store()
    if store is None or store.add(_key("said", hashlib.sha256(message.encode()).hexdigest()), 1) == 1:
        print(message, file=sys.stderr, flush=True)
    if store is not None:
        _note(store, exit_code)
        _wait_for_others(store)
    return _leave(exit_code)


def crash(error: Exception) -> int | None:
    """What to do with an error that is nobody's mistake: None to let it escape with its traceback.

    Where it is only the echo of another process's end (a broken connection), one line says so, or none if that process
    has said what was wrong; the exit code is then that process's.
    """
    if count() == 1:
        return None
    store = _store()
    if _is_echo(error):
        code = _noted(store)
        if code is None:
            print(
                f"eyetune: process {rank()} of {count()} stops: another process of this run ended or was killed, or "
                f"did not answer. What that one said stands above.\n  ({_first_line(error)})",
                file=sys.stderr,
                flush=True,
            )
        return _leave(code or 1)
    with contextlib.suppress(Exception):
        # torchrun's summary then shows the traceback of the process that failed first.
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
    traceback.print_exception(error)
    if store is not None:
        _note(store, 1)
    return _leave(1)


def _leave(exit_code: int) -> int:
    """End here and now where processes are connected: half-way through an operation that others have left, neither
    taking the connections down nor an ordinary exit is sure to come to an end. Otherwise just return `exit_code`."""
    if count() > 1 and _connected():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    return exit_code


def _connected() -> bool:
    return "torch.distributed" in sys.modules and sys.modules["torch.distributed"].is_initialized()


def _is_echo(error: Exception) -> bool:
    """Whether a collective operation failed because of another process. gloo raises plain RuntimeErrors."""
    from torch.distributed import DistError

    words = ("gloo", "pair closure", "Connection closed", "Connection reset", "Broken pipe", "NCCL")
    return isinstance(error, DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _number(variable: str, otherwise: int) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else otherwise


def _key(*parts: object) -> str:
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return "/".join(["eyetune", restart, *map(str, parts)])


def _store() -> Store | None:
    """The launcher's store; None with one process, or when nobody answers."""
    if count() == 1:
        return None
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    try:
        return TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=_STORE_SECONDS),
        )
    except (KeyError, ValueError, RuntimeError):
        return None


def _note(store: Store, exit_code: int) -> None:
    with contextlib.suppress(RuntimeError):
        store.compare_set(_key("code"), "", str(exit_code))
        store.add(_key("failed"), 1)


def _noted(store: Store | None) -> int | None:
    """The exit code of the process that failed first, if one has said so."""
    if store is None:
        return None
    with contextlib.suppress(RuntimeError):
        if store.add(_key("failed"), 0):
            return int(store.get(_key("code")))
    return None


def _wait_for_others(store: Store) -> None:
    end = time.monotonic() + TOGETHER_SECONDS
    with contextlib.suppress(RuntimeError):
        while store.add(_key("failed"), 0) < count() and time.monotonic() < end:
            time.sleep(0.05)
