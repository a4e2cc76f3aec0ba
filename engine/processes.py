"""One process or many: where this one runs, in what precision, how many workers it has.

Slide: none.
Paper: section 4.1 (8 GPUs, mixed precision).
Differs: needs no launcher and no environment variables; `torchrun` is recognized where it is used.
"""

from __future__ import annotations

import contextlib
import datetime
import inspect
import os
import sys
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn


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


def leave_the_others(name: str) -> bool:
    """For a program of one process: the first process a launcher has started goes on as if alone,
    and says so; returns False in the others, whose end must not look like a failure.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        return True
    if int(os.environ.get("RANK", 0)):
        return False
    print(
        f"{name} works in one process: the other {world_size - 1} of the launcher have nothing to "
        "do",
        file=sys.stderr,
        flush=True,
    )
    for variable in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ.pop(variable, None)
    return True


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
    """The model as all processes train it: gradients averaged, batch norms synchronized where they
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
    if isinstance(model, nn.parallel.DistributedDataParallel) and not last:
        return model.no_sync()
    return contextlib.nullcontext()


def finish() -> None:
    """Part from the other processes at the end of a run."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def describe(place: Place, dtype: torch.dtype | None) -> str:
    """One line for a person: device, processes, precision."""
    half = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "float32"}[dtype]
    name = place.device.type
    if name == "cuda":
        name = torch.cuda.get_device_name(place.device)
    elif name == "cpu":
        name = f"cpu, {torch.get_num_threads()} threads"
    processes = "1 process" if place.world_size == 1 else f"{place.world_size} processes"
    return f"{name}, {processes}, {half}"


def cores_per_process(most: int = 8) -> int:
    """How many cores this process may use, 1 to `most`, shared with the others of this machine."""
    if hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
    else:
        allowed = os.cpu_count() or 1
    return max(1, min(most, allowed // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def workers_of(workers: int) -> int:
    """How many processes read images for this one; -1: one per core."""
    return cores_per_process() if workers < 0 else workers


def peak_memory_gb(device: torch.device) -> float:
    """The most memory this process ever held, GB (1e9 bytes): of the GPU if there is one, else of
    the machine.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource  # not on Windows
    except ImportError:
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
