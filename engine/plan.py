"""What a run will need, said before it starts: a few steps are measured, the rest is counted.

Slide: none.
Paper: none.
Differs: not in the released code.

Bytes on the wire are what one process sends in one step, by the ring that gloo and NCCL use: a sum
over n processes sends 2 (n - 1) / n of the tensor, a gather n - 1 times this process's piece.
"""

from __future__ import annotations

import io
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from engine import processes
from engine.images import Photograph
from engine.keeper import megabytes

FLOAT, LONG = 4, 8  # bytes
FEWEST_STEPS, MOST_STEPS, SECONDS = 3, 50, 20.0  # of a measurement [U]
PIXELS_ON_CPU = 8 * 224**2  # of the largest batch that a CPU is asked to measure [U]
READ = 16  # images that are read to time the reading [U]

# ------------------------------------------------------------------------------ what is counted


class Traffic(NamedTuple):
    """Bytes that one process sends per step."""

    gradient: float
    norms: float  # statistics of synchronized batch norms, forward and backward
    keys: float  # slots (and image vectors) that are contrasted with those of all processes
    votes: float  # the verdict, the center, how many pixels and queries there are

    @property
    def total(self) -> float:
        """All of it."""
        return sum(self)


def sent_by_sum(size: float, processes: int) -> float:
    """Bytes that each process sends where `size` bytes are summed over all."""
    return 2 * (processes - 1) / processes * size


def sent_by_gather(size: float, processes: int) -> float:
    """Bytes that each process sends where every one holds `size` bytes and gets those of all."""
    return (processes - 1) * size


def traffic(
    processes: int,
    weights: int,
    norms: Sequence[tuple[int, bool]],
    rows: float,
    dim: int,
    prototypes: int,
    parts: int = 1,
    contrasted: bool = True,
) -> Traffic:
    """Of one step. weights: trained numbers; norms: what `Norms` counted in a step; rows: vectors
    of length dim that a process gives to a gather, in all parts together; prototypes: k; parts:
    passes per step; contrasted: there is a slot loss.
    """
    counts = sent_by_gather(4 * LONG, processes) if contrasted else 0  # 2 directions, 2 numbers
    per_part = sent_by_sum(prototypes * FLOAT, processes) + 2 * sent_by_sum(LONG, processes)
    return Traffic(
        gradient=sent_by_sum(weights * FLOAT, processes),
        norms=sum(
            sent_by_gather((2 * width + 1) * FLOAT, processes)
            + backward * sent_by_sum(2 * width * FLOAT, processes)
            for width, backward in norms
        ),
        keys=sent_by_gather(rows * dim * FLOAT, processes),
        votes=parts * (per_part + counts) + sent_by_sum(6 * FLOAT, processes),
    )


class Norms:
    """Counts the batch norms of a model that run while this is open: (channels, whether a backward
    follows).
    """

    def __init__(self, model: nn.Module):
        self.model, self.found = model, []

    def __enter__(self) -> list[tuple[int, bool]]:
        kind = nn.modules.batchnorm._BatchNorm
        norms = [module for module in self.model.modules() if isinstance(module, kind)]
        self.hooks = [norm.register_forward_hook(self._count) for norm in norms]
        return self.found

    def _count(self, norm: nn.Module, _inputs: tuple, output: Tensor) -> None:
        self.found.append((norm.num_features, output.requires_grad))

    def __exit__(self, *_error: object) -> None:
        for hook in self.hooks:
            hook.remove()


# ----------------------------------------------------------------------------- what is measured


class DrawnPhotographs:
    """So many times the same photograph of 640 x 480 px, drawn here and coded as a JPEG in memory:
    it stands for images that are not at hand.
    """

    def __init__(self, count: int):
        generator = torch.Generator().manual_seed(0)
        coarse = torch.randint(0, 256, (24, 32, 3), generator=generator, dtype=torch.uint8)
        smooth = Image.fromarray(coarse.numpy()).resize((640, 480), Image.Resampling.BICUBIC)
        noise = torch.randint(0, 256, (480, 640, 3), generator=generator, dtype=torch.uint8)
        self.count, file = count, io.BytesIO()
        Image.blend(smooth, Image.fromarray(noise.numpy()), 0.1).save(file, "JPEG", quality=90)
        self.content = file.getvalue()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Photograph:
        return Photograph(io.BytesIO(self.content), "a drawn photograph")


def seconds_of(work: Callable[[], Any], device: torch.device, seconds: float = SECONDS) -> float:
    """Median seconds of a piece of work on a device, after one that prepares: FEWEST_STEPS, or as
    many as fit into `seconds`, at most MOST_STEPS.
    """
    work()
    times: list[float] = []
    while len(times) < FEWEST_STEPS or (len(times) < MOST_STEPS and sum(times) < seconds):
        _wait_for(device)
        began = time.perf_counter()
        work()
        _wait_for(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reading_seconds(samples: Sequence[Any]) -> float:
    """Seconds of one core for one image, decoded and cut: the median of READ of them."""
    times = []
    for index in torch.linspace(0, len(samples) - 1, min(READ, len(samples))).long().tolist():
        began = time.process_time()
        samples[index]
        times.append(time.process_time() - began)
    return statistics.median(times)


class Cost(NamedTuple):
    """Of one pass over some images with all that belongs to a step."""

    seconds: float
    memory_gb: float  # the peak of the process
    how: str  # where the numbers are from


def sizes_to_measure(images: int, image_size: int, device: torch.device) -> list[int]:
    """Batches to measure for a pass over so many images: itself, or on a CPU, where a large one
    takes minutes and all memory, two smaller ones.
    """
    most = max(4, PIXELS_ON_CPU // image_size**2)
    return [images] if device.type != "cpu" or images <= most else [most // 2, most]


def cost_of(
    images: int,
    sizes: Sequence[int],
    step_of: Callable[[int], Callable],
    device: torch.device,
    state: Callable[[], Any] = dict,
) -> Cost:
    """Measure steps and conclude on one of `images`. sizes: of `sizes_to_measure`, rising, since a
    process only knows the most memory it ever had; step_of(size): takes a step of that size;
    state(): what a checkpoint holds, since the main process puts it together in memory.
    """
    found = []
    for size in sizes:
        seconds = seconds_of(step_of(size), device)
        torch.save(state(), io.BytesIO())
        found.append((seconds, processes.peak_memory_gb(device)))
    if len(found) == 1:
        return Cost(*found[0], "measured")
    (seconds, memory), (more_seconds, more_memory) = found
    times = (images - sizes[0]) / (sizes[1] - sizes[0])
    return Cost(
        seconds + times * (more_seconds - seconds),
        memory + times * (more_memory - memory),
        f"a line through what was measured with {sizes[0]} and {sizes[1]} images",
    )


# ------------------------------------------------------------------------------- what is said


class Plan(NamedTuple):
    """Everything that the lines of a plan are made of."""

    processes: int
    steps: int
    batch_size: int  # of all processes
    parts: int  # passes per step
    device: str
    cost: Cost  # of one pass of one process
    traffic: Traffic
    most_keys: float  # bytes of keys, if every slot that can be occupied is
    gradient_bytes: int
    synchronized: bool  # batch norms are: on GPUs
    checkpoint_bytes: int
    checkpoints: int  # that the disk holds at the end, and while one is written
    reading: float  # seconds of one core per image
    workers: int  # of each process

    def seconds_per_step(self) -> float:
        """Of one process, without the wire: the step, or the reading where that is slower."""
        step = self.cost.seconds * self.parts
        reading = self.reading * self.batch_size / self.processes
        return max(step, reading / self.workers) if self.workers else step + reading

    def lines(self) -> list[str]:
        """For a person, each number with where it is from."""
        step, share = self.cost.seconds * self.parts, self.batch_size // self.processes
        seconds = self.seconds_per_step()
        sent, many = self.traffic, self.processes > 1
        sent = sent if self.synchronized else sent._replace(norms=0)
        cores = self.reading * share / step
        waits = seconds > 1.05 * step
        found = [
            f"steps    {self.steps} of {self.batch_size} images, {share} on each of "
            f"{self.processes} process(es) (counted)",
            f"step     {seconds:.4g} s, {self.batch_size / seconds:.4g} images/s on {self.device} "
            f"({self.cost.how}, random images{', without the wire' * many}"
            f"{'; it waits for the images' * waits})",
            f"hours    {self.steps * seconds / 3600:.4g} (steps x step, on {self.device}"
            f"{'; for GPUs ask on one' * (many and self.device == 'cpu')})",
            f"memory   {self.cost.memory_gb:.3g} GB per process ({self.cost.how})"
            + f", and {megabytes(self.gradient_bytes)} more for the exchange (counted)" * many,
            f"wire     {megabytes(sent.total)} sent per step and process (counted)",
        ]
        if many:
            norms = f"batch norms {megabytes(self.traffic.norms)}"
            norms += "" if self.synchronized else " on GPUs, nothing on a CPU"
            found.append(
                f"         gradient {megabytes(sent.gradient)}, {norms}, keys "
                f"{megabytes(sent.keys)} (as in the first steps; at most "
                f"{megabytes(self.most_keys)}), votes {megabytes(sent.votes)}"
            )
        disk = self.checkpoint_bytes * self.checkpoints
        found.append(
            f"disk     {megabytes(self.checkpoint_bytes)} a checkpoint, {megabytes(disk)} in all "
            "(counted)"
        )
        found.append(
            f"loader   {1e3 * self.reading:.3g} ms of a core per image (measured): "
            f"{max(1, math.ceil(cores))} worker(s) per process keep up, {self.workers} are asked "
            "for"
        )
        return found
