"""One process or many: where this one runs, in what precision, how many readers it has."""

import contextlib
import datetime
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from engine.log import say
from engine.norms import SummedNorm, SyncedNorm, converted
from engine.program import PATIENCE

SILENT = datetime.timedelta(minutes=30)  # then a process counts as lost; a test may be long [U]


class Place(NamedTuple):
    """Where this process runs."""

    device: torch.device
    rank: int = 0  # 0: the main process, which writes
    world_size: int = 1
    dtype: torch.dtype | None = None  # of autocast; None: float32


def start(device: str, amp: str = "off") -> Place:
    """Find the device and, under torchrun or srun, the other processes.

    device: auto, cpu, cuda or mps; amp: auto, bf16, fp16 or off. Raises ValueError.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    found = pick_device(device)
    if found.type == "cuda":
        if local_rank >= (count := torch.cuda.device_count()):
            advice = "start fewer processes, or use --device cpu"
            raise ValueError(f"process asks for GPU {local_rank}, found {count}: {advice}")
        found = torch.device("cuda", local_rank)
        torch.cuda.set_device(found)
        torch.backends.cudnn.benchmark = True  # the sizes of a pretraining never change
    if world_size > 1:
        gpu = found if found.type == "cuda" else None
        backend = "nccl" if gpu else "gloo"
        with waiting(world_size):
            dist.init_process_group(backend=backend, device_id=gpu, timeout=SILENT)
    return Place(found, rank, world_size, precision(amp, found))


@contextlib.contextmanager
def waiting(world_size: int) -> Iterator[None]:
    """Until all processes have started. A line says so where it takes long, and Ctrl-C and SIGTERM
    end it at once: PyTorch hears no handler of Python's meanwhile.
    """
    place = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    line = f"waits for all of {world_size} processes at {place}, up to {SILENT} h"
    timer = threading.Timer(PATIENCE, say, [line])
    timer.daemon = True
    timer.start()
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    try:
        yield
    finally:
        timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)


def pick_device(device: str) -> torch.device:
    """auto is a CUDA GPU where there is one, else the CPU. Raises ValueError."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    available = dict(cuda=torch.cuda.is_available, mps=torch.backends.mps.is_available)
    if device in available and not available[device]():
        raise ValueError(f"--device {device}, but this machine has none: use --device auto")
    return torch.device(device)


def precision(amp: str, device: torch.device) -> torch.dtype | None:
    """The type of --amp on this device, None for float32."""
    if amp == "off" or (amp == "auto" and device.type != "cuda"):
        return None
    if amp == "auto":
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}[amp]


def synchronized(model: nn.Module, place: Place, sync_norm: str = "torch") -> nn.Module:
    """The model on its device, channels last; on several GPUs batch norms see all ranks' rows.

    sync_norm: torch, or ours, which does so on several CPU processes too.
    """
    model = model.to(place.device, memory_format=torch.channels_last)
    if place.world_size > 1 and sync_norm == "ours":
        return converted(model, SummedNorm)
    if place.world_size > 1 and place.device.type == "cuda":  # on a CPU it raises
        return converted(model, SyncedNorm)
    return model


def wrap(model: nn.Module, place: Place) -> nn.Module:
    """The model as all processes train it."""
    if place.world_size == 1:
        return model
    ids = [place.device.index] if place.device.type == "cuda" else None
    wrapped = nn.parallel.DistributedDataParallel(model, ids, gradient_as_bucket_view=True)
    # Buffers stay each rank's own: with SyncBN they are equal, and without it rank 0's are saved.
    # As a parameter it has another name in newer versions of torch
    wrapped.broadcast_buffers = False
    return wrapped


def describe(place: Place) -> str:
    """One line for a person: device, processes, precision."""
    half = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "float32"}[place.dtype]
    name = f"{place.device.type}, {torch.get_num_threads()} thread(s)"
    if place.device.type == "cuda":
        name = torch.cuda.get_device_name(place.device)
    processes = "1 process" if place.world_size == 1 else f"{place.world_size} processes"
    return f"{name}, {processes}, {half}"


def workers_of(workers: int) -> int:
    """How many processes read images for this one; -1: its share of the cores, at most 8."""
    if workers >= 0:
        return workers
    return max(1, min(8, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def cores() -> int:
    """How many cores this process may use."""
    known = hasattr(os, "sched_getaffinity")  # on Linux
    return len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1


def has_spare_core(place: Place) -> bool:
    """Whether a thread beside this one is quicker: one CPU process, one thread of PyTorch, float32
    (a thread has its own precision), and more cores.
    """
    alone = place.world_size == 1 and place.device.type == "cpu" and place.dtype is None
    return alone and torch.get_num_threads() == 1 < cores()


def peak_memory_gb(device: torch.device) -> float:
    """The most memory this process ever held, GB (1e9 bytes): of the GPU, else of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 1e9
    try:
        import resource  # not on Windows
    except ImportError:
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
