"""One process or many: where this one runs, in what precision, which signals it was sent, what it
has lost.

Slide: none. Paper: section 4.1 (8 GPUs, mixed precision).
Differs: needs no launcher and no environment variables; `torchrun` is recognized where it is used.
"""

from __future__ import annotations

import contextlib
import datetime
import inspect
import multiprocessing
import os
import re
import signal
import sys
from types import FrameType
from typing import NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import nn

SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1")  # what clusters and people send


class Place(NamedTuple):
    """Where this process runs."""

    device: torch.device
    rank: int
    world_size: int


def start(device: str, timeout: float) -> Place:
    """Find the device, and under `torchrun` the other processes.

    device: auto, cpu, cuda or mps; timeout: seconds after which a silent process counts as lost.
    Raises ValueError with one line where the device is not there.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device == "auto":
        device = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if mps_available() and world_size == 1
            else "cpu"
        )
    if device == "cuda":
        found = torch.cuda.device_count()
        if local_rank >= found:
            raise ValueError(
                f"process {local_rank} of this machine asks for GPU {local_rank}, found {found}: "
                "use --device cpu" + (", or fewer processes" if found else "")
            )
        torch.cuda.set_device(local_rank)
        torch.backends.cudnn.benchmark = True  # sizes never change during a run
    if device == "mps" and not mps_available():
        raise ValueError("--device mps, but this machine has no Apple GPU: use --device auto")
    place = Place(torch.device(device, local_rank if device == "cuda" else None), rank, world_size)
    if world_size > 1:
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo", timeout=datetime.timedelta(seconds=timeout)
        )
    return place


def mps_available() -> bool:
    """Whether this machine has an Apple GPU."""
    return torch.backends.mps.is_available()


def precision(amp: str, device: torch.device) -> torch.dtype | None:
    """The half-precision type of --amp on this device, None for float32.

    Raises ValueError for bf16 on a GPU without it.
    """
    if amp == "auto":
        if device.type != "cuda":
            return None
        return (
            torch.bfloat16
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else torch.float16
        )
    if (
        amp == "bf16"
        and device.type == "cuda"
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        raise ValueError(
            f"--amp bf16, but {torch.cuda.get_device_name()} has no bf16: use --amp fp16"
        )
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]


def wrap(model: nn.Module, place: Place) -> nn.Module:
    """The model as all processes train it: gradients averaged, batch norms synchronised where they
    can be.
    """
    if place.world_size == 1:
        return model
    ids = [place.device.index] if place.device.type == "cuda" else None
    # Buffers stay each rank's own: with SyncBN they are equal, and without it (CPU) rank 0's are
    # saved.
    ddp = nn.parallel.DistributedDataParallel
    renamed = "forward_sync_buffers" in inspect.signature(ddp).parameters  # torch 2.15 and newer
    buffers = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return ddp(model, ids, gradient_as_bucket_view=True, **buffers)


def exchange(model: nn.Module, last: bool) -> contextlib.AbstractContextManager:
    """Of several backward passes into one gradient only the last one averages over processes."""
    return (
        model.no_sync()
        if isinstance(model, nn.parallel.DistributedDataParallel) and not last
        else (contextlib.nullcontext())
    )


class StopSignals:
    """SIGTERM, SIGINT and SIGUSR1 ask the run to end after its step; a second SIGINT ends it at
    once.

    Used as `with StopSignals() as signals`, after which signals mean what they did before.
    """

    def __init__(self):
        self.received, self.interrupted = "", False

    def __enter__(self) -> StopSignals:
        there = [
            getattr(signal, name) for name in SIGNALS if hasattr(signal, name)
        ]  # Windows has no SIGUSR1
        self.before = {number: signal.signal(number, self.note) for number in there}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, _frame: FrameType | None) -> None:
        """A signal has arrived: the first one counts, and a second SIGINT ends the process."""
        if self.interrupted and number == signal.SIGINT:
            end_now(130)
        self.interrupted = self.interrupted or number == signal.SIGINT
        self.received = self.received or signal.Signals(number).name


# What the libraries below say when another process is gone; their error is a plain RuntimeError.
GONE = re.compile(
    r"gloo|nccl|connection|connect|socket|timed out|broken pipe|TCPStore|DistStore", re.IGNORECASE
)


def lost(error: RuntimeError) -> str:
    """What is lost, in a few words, if this error says that another process is; else nothing."""
    line = re.sub(r"\[\S*/\S*\] *", "", str(error).strip().splitlines()[0])[
        :120
    ]  # without the place in C++
    if line.startswith("DataLoader worker"):
        return reader_died(line)
    many = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if many and (isinstance(error, dist.DistError) or GONE.search(line)):
        return f"process {os.environ['RANK']} has lost contact with another process ({line})"
    return ""


def out_of_memory(error: RuntimeError) -> str:
    """What did not fit into the memory of a GPU or of the machine, in a few words, if this error
    says so.
    """
    if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
        return ""
    wanted = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
    return "out of memory" + (f" ({wanted[1]} more were wanted)" if wanted else "")


def reader_died(line: str) -> str:
    """The same for a process that reads images, said once: PyTorch would repeat it with a trace."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return (
        "a process that reads images has died, often for want of memory: try fewer --workers "
        f"({line})"
    )


def finish() -> None:
    """Part from the other processes at the end of a run."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def end_now(status: int) -> NoReturn:
    """End this process and those that read images for it, and wait for nobody: other processes may
    be gone.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(status)


def describe(place: Place, dtype: torch.dtype | None) -> str:
    """One line for a person: device, processes, precision."""
    precision_name = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "float32"}[dtype]
    name = (
        torch.cuda.get_device_name(place.device)
        if place.device.type == "cuda"
        else (
            f"{place.device.type}, {torch.get_num_threads()} threads"
            if place.device.type == "cpu"
            else place.device.type
        )
    )
    processes = "1 process" if place.world_size == 1 else f"{place.world_size} processes"
    return f"{name}, {processes}, {precision_name}"


def cores_per_process(most: int = 8) -> int:
    """How many cores this process may use, between 1 and `most`: those it is allowed, shared with
    its neighbours.
    """
    allowed = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(1, min(most, allowed // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def workers_of(workers: int) -> int:
    """How many processes read images for this one; -1: one per core."""
    return cores_per_process() if workers < 0 else workers


def peak_memory_gb(device: torch.device) -> float:
    """The most memory this process ever held: of the GPU where there is one, else of the machine.
    In GB (1e9 bytes).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource  # not on Windows
    except ImportError:
        return float("nan")
    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024)
        / 1e9
    )
