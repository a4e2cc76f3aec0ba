"""From images to batches: worker processes, the order of a whole run, replacements for bad files.

Slide: none.
Paper: none.
Differs: a file that cannot be read is replaced by its neighbor and named, instead of ending the
run; what is drawn at random depends on (seed, epoch, index) alone, not on workers or ranks.
"""

from __future__ import annotations

import collections
import itertools
import math
import multiprocessing
import os
import random
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm import tqdm

from engine.images import BadImage, ImageFiles
from engine.journal import say

NEIGHBORS = 64  # unreadable files in a row before a run gives up [U]
Failures = list[tuple[str, str]]  # (name, reason) of each file that could not be read

# --------------------------------------------------------------------------- samples of a whole run


class Samples(Dataset):
    """What a run sees of each image in each epoch.

    images: any sequence that `view` understands, such as uint8 tensors (3 y x) or Photographs;
    view(image, rng): cuts from an image what a batch needs; both may raise BadImage; seed: of the
    random numbers.
    """

    def __init__(self, images: Sequence[Any], view: Callable[[Any, random.Random], Any], seed: int):
        self.images, self.view, self.seed = images, view, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, sample: int) -> tuple[Any, Failures]:
        """sample = epoch * len(self) + index -> the view of that image, and the files that were
        skipped on the way.

        All random numbers are a function of (seed, epoch, index). A file that cannot be read is
        replaced by the next readable one. Raises ValueError after NEIGHBORS unreadable files in a
        row.
        """
        epoch, index = divmod(int(sample), len(self))
        failures: Failures = []
        while True:
            # Text is hashed whole: no two streams are alike
            rng = random.Random(f"{self.seed} {epoch} {index}")
            try:
                image = self.images[(index + len(failures)) % len(self)]
                return self.view(image, rng), failures
            except BadImage as bad:
                failures.append((bad.name, bad.reason))
                if len(failures) == min(NEIGHBORS, len(self)):
                    raise ValueError(
                        f"{len(failures)} images in a row could not be read; {bad}"
                    ) from None


def collate(samples: Sequence[tuple[Any, Failures]]) -> tuple[Any, Failures]:
    """Views with one more axis in front, and all failures."""
    views, failures = zip(*samples)
    return default_collate(views), list(itertools.chain(*failures))


class RunSampler:
    """The images of a whole run, batch by batch: every epoch in an order of its own, its partial
    batch left out.

    Position p of the run, start <= p < stop, is batch p % steps_per_epoch of epoch p //
    steps_per_epoch. The order is a function of (seed, epoch): a run continues anywhere, and all
    ranks' parts together are the same total_batch images however many ranks there are. Yields lists
    of samples = epoch * num_images + index. Default: one epoch. Raises ValueError for a batch that
    cannot be made.
    """

    def __init__(
        self,
        num_images: int,
        total_batch: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        start: int = 0,
        stop: int | None = None,
    ):
        if total_batch < 1 or total_batch % world_size:
            raise ValueError(
                f"a batch of {total_batch} images cannot be shared evenly by {world_size} "
                f"processes: choose a multiple of {world_size}"
            )
        if num_images < total_batch:
            raise ValueError(
                f"a batch of {total_batch} images is larger than the data set, which has "
                f"{num_images}: choose a smaller batch"
            )
        self.num_images, self.total_batch, self.seed = num_images, total_batch, seed
        self.steps_per_epoch = num_images // total_batch
        self.start, self.stop = start, self.steps_per_epoch if stop is None else stop
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"a run cannot go from step {self.start} to step {self.stop}")
        share = total_batch // world_size
        self.part = slice(rank * share, (rank + 1) * share)

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[int]]:
        order_of = -1
        for position in range(self.start, self.stop):
            epoch, step = divmod(position, self.steps_per_epoch)
            if epoch != order_of:
                order, order_of = (
                    np.random.default_rng([self.seed, epoch]).permutation(self.num_images),
                    epoch,
                )
            batch = order[step * self.total_batch : (step + 1) * self.total_batch]
            yield (epoch * self.num_images + batch[self.part]).tolist()


# --------------------------------------------------------------------------------- worker processes


def make_loader(
    samples: Dataset,
    sampler: Iterable[list[int]],
    workers: int,
    device: torch.device | str,
    collate: Callable[[Sequence[tuple[Any, Failures]]], tuple[Any, Failures]] = collate,
) -> DataLoader:
    """Batches in the sampler's order, made ahead by worker processes that live as long as the run
    (0: made here).
    """
    options: dict[str, Any] = {}
    if workers:
        options = dict(
            persistent_workers=True, prefetch_factor=4, worker_init_fn=_leave_signals_to_the_parent
        )
    return DataLoader(
        samples,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.device(device).type == "cuda",
        **options,
    )


def _leave_signals_to_the_parent(_worker: int) -> None:
    """A cluster signals every process of a job; the run finishes its step first, and needs its
    workers for that.
    """
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_the_parent_asks, daemon=True).start()


def _end_when_the_parent_asks() -> None:
    """SIGTERM counts if the parent sent it: that is how Python ends its workers, and it then waits
    for them.
    """
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != multiprocessing.parent_process().pid:
        pass
    os._exit(0)


def on_device(
    loader: Iterable[tuple[Any, Failures]], device: torch.device | str
) -> Iterator[tuple[Any, Failures]]:
    """The loader's batches on the device. On a GPU the next one is copied while the caller works on
    this one.
    """
    device = torch.device(device)
    if device.type != "cuda":
        for batch, failures in loader:
            yield moved(batch, lambda tensor: tensor.to(device)), failures
        return
    stream, waiting = torch.cuda.Stream(device), collections.deque()
    for batch, failures in loader:
        with torch.cuda.stream(stream):
            copied = moved(batch, lambda tensor: tensor.to(device, non_blocking=True))
        waiting.append((copied, stream.record_event(), failures))
        if len(waiting) > 1:
            yield _arrived(*waiting.popleft(), device)
    while waiting:
        yield _arrived(*waiting.popleft(), device)


def _arrived(
    batch: Any, copied: torch.cuda.Event, failures: Failures, device: torch.device
) -> tuple[Any, Failures]:
    """The batch, once the device has it: what is launched from now on waits for the copy, the host
    does not.
    """
    current = torch.cuda.current_stream(device)
    current.wait_event(copied)
    # Or its memory is given away too early
    moved(batch, lambda tensor: tensor.record_stream(current))
    return batch, failures


def moved(batch: Any, move: Callable[[Tensor], Any]) -> Any:
    """The same tuples, lists and dictionaries with move(tensor) in place of every tensor."""
    if isinstance(batch, Tensor):
        return move(batch)
    if isinstance(batch, dict):
        return {key: moved(value, move) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(moved(value, move) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(moved(value, move) for value in batch)
    return batch


# --------------------------------------------------------------------------------- what was skipped


class Skipped:
    """The memory of unreadable files: each is named once in a text file, and too many of them stop
    the run.

    file: path of skipped.txt, made when the first one turns up; other processes may write to it
    too. max_share: of num_images.
    """

    def __init__(self, file: str | Path, num_images: int, max_share: float = 0.01):
        self.file, self.num_images, self.max_share = Path(file), num_images, max_share
        self.names: set[bytes] = set()  # as bytes, since a name need not be valid text

    def record(self, failures: Failures) -> None:
        """failures: repeated ones too. Raises ValueError once more than max_share of all images are
        bad, OSError.
        """
        reasons = {
            re.sub(rb"[\t\r\n]", b" ", os.fsencode(name)): reason.encode()
            for name, reason in failures
        }
        if not reasons.keys() - self.names:
            return
        if (
            self.file.exists()
        ):  # written by a run that this one resumes, or by another process of it
            self.names |= {line.split(b"\t")[0] for line in self.file.read_bytes().splitlines()}
        with self.file.open("ab") as out:
            out.writelines(
                name + b"\t" + reason + b"\n"
                for name, reason in reasons.items()
                if name not in self.names
            )
        if not self.names:
            name, reason = failures[0]
            say(
                f"{name} could not be read ({reason}): its neighbor takes its place; this one and "
                f"all others are named in {self.file}"
            )
        self.names |= reasons.keys()
        if len(self.names) > self.max_share * self.num_images:
            raise ValueError(
                f"{len(self.names)} of {self.num_images} images could not be read, more than the "
                f"share of {self.max_share:g} that is allowed; they are named in {self.file}; "
                "--check-data finds all of them, a larger --max-bad-share lets the run go on"
            )


def report_check(images: ImageFiles, workers: int = 0) -> int:
    """Read every file once, in worker processes, and print what was found; returns how many cannot
    be read.
    """
    results = DataLoader(
        _SizeOrReason(images.root, images.paths), batch_size=None, num_workers=workers
    )
    results = list(tqdm(results, total=len(images), unit="image", disable=not sys.stderr.isatty()))
    bad = [
        (str(name), reason)
        for name, reason in zip(images.paths, results)
        if isinstance(reason, str)
    ]
    sizes = collections.Counter(tuple(size) for size in results if not isinstance(size, str))
    for name, reason in bad:
        print(f"bad      {name}: {reason}")
    if sizes:
        by_pixels = sorted(sizes, key=math.prod)
        (smallest, largest), [((height, width), times)] = (
            (by_pixels[0], by_pixels[-1]),
            sizes.most_common(1),
        )
        print(
            f"sizes    {len(sizes)} different, from {smallest[0]} x {smallest[1]} to {largest[0]} "
            f"x {largest[1]} (height x width); most often {height} x {width}, {times} times"
        )
    print(f"checked  {len(images)} images: {len(images) - len(bad)} can be read, {len(bad)} cannot")
    return len(bad)


class _SizeOrReason(ImageFiles):
    def __getitem__(self, index: int) -> torch.Size | str:
        try:
            return super().__getitem__(index).shape[-2:]
        except BadImage as bad:
            return bad.reason
