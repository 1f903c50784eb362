"""Device, precision, seeds and processes: the only module that knows how many processes there are.

A thin wall around Accelerate. `torchrun` or `accelerate launch` around a command makes several processes; the rest of
EyeTune is written as if there were one and asks the :class:`Runtime` where it matters.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
import random
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, broadcast, gather_object
from torch import Tensor, nn

from eyetune import __version__
from eyetune.errors import RunError, UserError, did_you_mean

DeviceName = Literal["auto", "cpu", "cuda", "mps"]
PrecisionName = Literal["auto", "fp32", "bf16", "fp16"]
T = TypeVar("T")
Module = TypeVar("Module", bound=nn.Module)

#: A process that has waited this long for another gives up. Longer than a checkpoint of the largest network takes on a
#: slow disk; a process that ends is noticed at once, whatever this says.
ANSWER_WITHIN = timedelta(minutes=10)

#: Packages whose versions decide a number; recorded in every run.
PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "peft",
    "accelerate",
    "numpy",
    "opencv-python-headless",
    "pillow",
    "scikit-learn",
)


class Runtime:
    """Where and how the numbers are computed.

    Args:
        device: "auto" takes CUDA, then Apple's MPS, then the CPU.
        precision: "auto" is bf16 on a CUDA device or processor that multiplies bfloat16 in hardware, fp16 on older
            CUDA devices, else fp32. Parameters and optimizer state are float32 in every case; bf16 and fp16 are the
            precision of autocast regions.
        seed: the run's seed; see :meth:`seed_epoch`.

    Raises UserError for a device that is not there and for a precision the device does not have.
    """

    def __init__(self, device: str = "auto", precision: str = "auto", seed: int = 0) -> None:
        check_torch(torch.__version__)
        kind = choose_device(device)
        self.precision = choose_precision(precision, kind)
        self.seed = seed
        self.accelerator = _accelerator(kind, {"fp32": "no"}.get(self.precision, self.precision))
        self.device: torch.device = self.accelerator.device
        if kind == "cpu":
            _keep_freed_memory()
        if kind == "cuda":
            # TF32 for what stays float32 beside bf16 and fp16; whoever asks for fp32 gets all of float32.
            torch.backends.cuda.matmul.allow_tf32 = self.precision != "fp32"
            torch.backends.cudnn.allow_tf32 = self.precision != "fp32"

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks."""
        return bool(self.accelerator.is_main_process)

    @property
    def processes(self) -> int:
        """How many processes work together."""
        return int(self.accelerator.num_processes)

    @property
    def rank(self) -> int:
        """This process's number, from 0."""
        return int(self.accelerator.process_index)

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        """The loss scaler of fp16 (None in other precisions)."""
        scaler: torch.amp.GradScaler | None = self.accelerator.scaler
        return scaler

    def autocast(self) -> AbstractContextManager[None]:
        """The context in which a forward pass runs: `precision` for matrix products, float32 for the rest."""
        context: AbstractContextManager[None] = self.accelerator.autocast()
        return context

    def place(self, module: Module, move: bool = True) -> Module:
        """`module` on the device (without `move`, where it is), its attention computed the way that is fastest there;
        returned for convenience.

        On a processor in bf16 two plain matrix products beat PyTorch's fused kernel (by two or three times, see
        docs/benchmarks.md); everywhere else the fused one is faster and leaner.
        """
        fused = not (self.device.type == "cpu" and self.precision == "bf16")
        for part in module.modules():
            if isinstance(getattr(part, "fused_attn", None), bool):  # timm's attention layers
                part.fused_attn = fused  # type: ignore[assignment]
        if not move:
            return module
        # A GPU convolves faster with the channels innermost. Weights alone do it: what they make is laid out so too.
        if self.device.type == "cuda" and convolves(module):
            module.to(memory_format=torch.channels_last)
        return module.to(self.device)

    def prepare(self, module: nn.Module) -> nn.Module:
        """`module` on the device and, with several processes, wrapped so that gradients are averaged over them."""
        if hasattr(module, "unshard"):
            return module  # split: it averages its gradients itself
        module = module.to(self.device)
        if self.processes == 1 or not any(parameter.requires_grad for parameter in module.parameters()):
            return module
        prepared: nn.Module = self.accelerator.prepare_model(module)
        return prepared

    def shard(self, module: nn.Module, blocks: Sequence[nn.Module]) -> None:
        """Split every parameter of `module` over the processes, in place: FSDP2 ("fully sharded data parallel").

        Each of `blocks` is gathered when it computes and split again behind it; so are its gradients, and whatever an
        optimizer made afterwards keeps. Parameters become DTensors: see :func:`whole` and :func:`alike`. All processes
        take part in every forward pass from now on (:meth:`lockstep`).
        """
        # Not through Accelerate's plugin: it knows FSDP on accelerators only, and what is not tried on two processors
        # would never be tried here. This is the call it makes itself.
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(self.device.type, (self.processes,))
        for part in [*blocks, module]:
            fully_shard(part, mesh=mesh)

    def lockstep(self, network: nn.Module, batches: int) -> int:
        """Before `batches` forward passes of `network`, in every process: how many more of anything to do after them.

        Not 0 only where the network is split and another process has more batches, which could not go on alone.
        """
        return max(self.gather(batches)) - batches if hasattr(network, "unshard") else 0

    def unwrap(self, module: nn.Module) -> nn.Module:
        """The module that :meth:`prepare` was given, as it was."""
        plain: nn.Module = self.accelerator.unwrap_model(module, keep_fp32_wrapper=False)
        plain.__dict__.pop("forward", None)  # what is left of Accelerate's own autocast
        self.accelerator.free_memory()  # it would keep every network it ever prepared
        return plain

    def share_buffers(self, module: nn.Module) -> None:
        """Give every process the main one's buffers (the running statistics of batch norms), in place."""
        if self.processes > 1:
            broadcast(list(module.buffers()))

    def accumulating(self, module: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of one part of an accumulated step: only the `last` part exchanges gradients."""
        # Split, it keeps no whole gradient to wait with: that is what does not fit.
        if last or self.processes == 1 or hasattr(module, "unshard"):
            return contextlib.nullcontext()
        silent: AbstractContextManager[None] = self.accelerator.no_sync(module)
        return silent

    def backward(self, loss: Tensor) -> None:
        """`loss.backward()`, scaled in fp16."""
        self.accelerator.backward(loss)

    def to_device(self, batch: T) -> T:
        """A tensor, or a dict, list or tuple of them, on the device (without waiting where the memory allows)."""
        if isinstance(batch, Tensor):
            return batch.to(self.device, non_blocking=True)  # type: ignore[return-value]
        if isinstance(batch, dict):
            return {key: self.to_device(value) for key, value in batch.items()}  # type: ignore[return-value]
        if isinstance(batch, (list, tuple)):
            return type(batch)(self.to_device(value) for value in batch)
        return batch

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes, on the device, in every process."""
        total: Tensor = self.accelerator.reduce(value, "sum")
        return total

    def gather(self, value: T) -> list[T]:
        """What each process holds, in order of their ranks, in every process. `value` is any picklable CPU object."""
        gathered: list[T] = gather_object([value])
        return gathered

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in any process; the same answer in every process."""
        return flag if self.processes == 1 else bool(self.sum(torch.tensor(float(flag), device=self.device)) > 0)

    def random_state(self) -> dict[str, Tensor]:
        """The states of all generators that training draws from in this process, as integers and float64."""
        python, numpy = random.getstate(), cast(tuple[Any, ...], np.random.get_state())  # noqa: NPY002
        state = {
            "torch": torch.get_rng_state(),
            "python": torch.tensor(python[1]),
            "python_gauss": torch.tensor([] if python[2] is None else [python[2]], dtype=torch.float64),
            "numpy": torch.from_numpy(np.asarray(numpy[1], dtype=np.int64)),
            "numpy_place": torch.tensor(numpy[2:4]),
            "numpy_gauss": torch.tensor([numpy[4]], dtype=torch.float64),
        }
        if self.device.type == "cuda":
            state["device"] = torch.cuda.get_rng_state(self.device)
        elif self.device.type == "mps":
            state["device"] = torch.mps.get_rng_state()
        return state

    def set_random_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on drawing from :meth:`random_state`. Raises RunError when it is of another kind of device, or damaged."""
        try:
            torch.set_rng_state(state["torch"])
            gauss = state["python_gauss"].tolist()
            random.setstate((3, tuple(state["python"].tolist()), gauss[0] if gauss else None))
            place, has_gauss = state["numpy_place"].tolist()
            words = state["numpy"].numpy().astype(np.uint32)
            np.random.set_state(("MT19937", words, place, has_gauss, state["numpy_gauss"].item()))  # noqa: NPY002
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(state["device"], self.device)
            elif self.device.type == "mps":
                torch.mps.set_rng_state(state["device"])
        except (KeyError, ValueError, TypeError, IndexError, RuntimeError) as error:
            raise RunError(
                f"the saved random state does not fit ({error}): go on with the kind of device the run was stopped on."
            ) from error

    def wait(self) -> None:
        """Return when every process has come here."""
        self.accelerator.wait_for_everyone()

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process runs the block before the others do (writing what they then read)."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()

    def seed_epoch(self, epoch: int = 0) -> None:
        """Seed python, numpy and torch as a function of (seed, epoch, process) alone.

        An epoch is then the same whether the run came to it in one go or was resumed: no generator state is stored.
        """
        seed_everything(self.seed, epoch, self.rank)

    def describe(self) -> dict[str, Any]:
        """Content of `environment.json`: versions, device, precision, command, commit, day. No user or host names."""
        return {
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "command": command_line(sys.argv),
            "commit": _commit(),
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
            "device": device_name(self.device),
            "precision": self.precision,
            "processes": self.processes,
            "threads": torch.get_num_threads(),
            "seed": self.seed,
            "versions": {"eyetune": __version__} | {name: found for name in PACKAGES if (found := _version(name))},
            "cuda": torch.version.cuda if self.device.type == "cuda" else None,
        }


def check_torch(version: str) -> None:
    """Raise UserError for a PyTorch older than 2.10, whose `weights_only` could be made to run code."""
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if numbers < (2, 10):
        raise UserError(
            f"PyTorch {version} is too old: reading weights is safe from 2.10 on (pip install -U torch torchvision)."
        )


def convolves(module: nn.Module) -> bool:
    """Whether `module` is a convolutional network: more than the one or two convolutions that cut patches."""
    return sum(isinstance(part, nn.Conv2d) for part in module.modules()) > 2


def whole(tensor: Tensor) -> Tensor:
    """`tensor`, gathered from all processes where it is split over them: then all have to call this."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def alike(tensor: Tensor, target: Tensor) -> Tensor:
    """`tensor`, the same in all processes, split as `target` is; as it was where that is not split."""
    placements = getattr(target, "placements", None)
    if placements is None:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh = target.device_mesh  # type: ignore[attr-defined]
    return distribute_tensor(tensor.to(target.device), mesh, placements, src_data_rank=None)


def choose_device(name: str) -> str:
    """The device type behind `name`: "cpu", "cuda" or "mps". Raises UserError when it is not there."""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(kind for kind, present in here.items() if present)
    if name not in here:
        known = get_args(DeviceName)
        raise UserError(f"unknown device {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}.")
    if not here[name]:
        why = {
            "cuda": "PyTorch sees no CUDA device (is the driver installed, and is this a CUDA build of PyTorch?)",
            "mps": "PyTorch sees no Apple GPU here",
        }[name]
        raise UserError(f"--device {name}: {why}. Use --device cpu, or auto to take what there is.")
    return name


def choose_precision(name: str, device: str) -> str:
    """The precision behind `name` on a device type: "fp32", "bf16" or "fp16". Raises UserError when impossible."""
    known = get_args(PrecisionName)
    if name not in known:
        raise UserError(f"unknown precision {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}.")
    if name == "auto":
        if device == "cuda":
            return "bf16" if _cuda_multiplies_bf16() else "fp16"
        return "bf16" if device == "cpu" and cpu_multiplies_bf16() else "fp32"
    if name == "fp16" and device == "cpu":
        raise UserError("--precision fp16 needs a GPU. On the CPU use bf16 or fp32 (auto chooses).")
    if name == "bf16" and device == "cuda" and not _cuda_multiplies_bf16():
        raise UserError("--precision bf16: this GPU has no bfloat16 arithmetic. Use fp16 or fp32 (auto chooses).")
    return name


def cpu_multiplies_bf16() -> bool:
    """Whether the processor multiplies bfloat16 in hardware (AVX512-BF16 or AMX); emulated it is slower than fp32."""
    for test in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        supported = getattr(torch.cpu, test, None)
        if supported is not None and supported():
            return True
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore").split())
    except OSError:
        return False
    return bool(words & {"avx512_bf16", "amx_bf16"})


def seed_everything(seed: int, epoch: int = 0, rank: int = 0) -> None:
    """Seed python's, numpy's and torch's global generators from (seed, epoch, rank): non-negative integers."""
    words = np.random.SeedSequence([seed, epoch, rank]).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))  # noqa: NPY002 - third-party transforms draw from the global generator
    torch.manual_seed(int(words[2]) << 32 | int(words[3]))


def device_name(device: torch.device) -> str:
    """What the device is called: the GPU's name, or the processor's model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="ignore").splitlines():
            if line.startswith("model name"):
                return f"{device.type} ({line.partition(':')[2].strip()})"
    return f"{device.type} ({platform.machine()})"


def _cuda_multiplies_bf16() -> bool:
    # `is_bf16_supported` also answers yes where bfloat16 is emulated: only Ampere (8.0) and later have it.
    return torch.cuda.get_device_capability()[0] >= 8


def _keep_freed_memory() -> None:
    """Let this process reuse the memory it frees, where the C library is glibc; elsewhere do nothing.

    glibc gives every block above 32 MiB back to the system when it is freed. The activations of a training step are
    such blocks: each step would have the system find and clear the same gigabytes of pages anew, for up to half of its
    time (docs/benchmarks.md).
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    mallopt(trim_threshold, -1)  # never
    mallopt(mmap_max, 0)


def _accelerator(kind: str, mixed_precision: str) -> Accelerator:
    # Accelerate keeps the first device and precision of a process for ever; a second Runtime may differ.
    if AcceleratorState._shared_state:
        alone = PartialState().num_processes == 1
        AcceleratorState._reset_state(reset_partial_state=alone)
    return Accelerator(
        cpu=kind == "cpu",
        mixed_precision=mixed_precision,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=ANSWER_WITHIN),
            # Pooling may leave a parameter (an unused norm, a class token) without gradient: that is not an error.
            DistributedDataParallelKwargs(find_unused_parameters=True, gradient_as_bucket_view=True),
        ],
    )


def command_line(arguments: Sequence[str]) -> str:
    """What was typed, from `sys.argv`; the home folder as `~`."""
    name = Path(arguments[0]).name if arguments else ""
    command = shlex.join(["eyetune" if name == "__main__.py" else name, *arguments[1:]])
    # Home folders carry user names, and run folders are shared.
    return command.replace(str(Path.home()), "~")


def _commit() -> str | None:
    here = Path(__file__).resolve().parent
    if "site-packages" in here.parts:
        return None

    def git(*words: str) -> str:
        done = subprocess.run(  # noqa: S603
            ["git", "-C", str(here), *words],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return f"{commit}-modified" if git("status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
