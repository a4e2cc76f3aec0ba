"""One batch per rank and position of the run, whatever dies; and the time that was spent waiting
for it.

Slide: none.
Paper: none.
Differs: in the released code a dead worker or an unreadable file ends the run.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch

from engine import processes, signals
from engine.journal import say
from engine.loader import (
    Failures,
    RunSampler,
    Samples,
    Skipped,
    collate,
    make_loader,
    moved,
    on_device,
)

Collate = Callable[[Sequence[tuple[Any, Failures]]], tuple[Any, Failures]]


def run_batches(
    images: Sequence[Any],
    view: Callable[[Any, random.Random], Any],
    batch_size: int,
    seed: int,
    position: int,
    place: processes.Place,
    workers: int,
    skipped: Skipped,
    black: Any = None,
    collate: Collate = collate,
) -> Batches:
    """This rank's batches of a run from a position on, without end, since a batch with bad numbers
    is made up for.

    view(image, rng): what a batch needs of an image; batch_size: of all ranks together; workers:
    processes that read for this one, -1: one per core; black: what `images` would hold for a black
    image, by default the image alone; collate: samples -> a batch and all failures.
    """
    sampler = RunSampler(
        len(images), batch_size, place.rank, place.world_size, seed, position, sys.maxsize
    )
    loader = make_loader(
        Samples(images, view, seed), sampler, processes.workers_of(workers), place.device, collate
    )

    def stand_in() -> Any:
        alone = torch.zeros(3, 64, 64, dtype=torch.uint8) if black is None else black
        sample = view(alone, random.Random(0)), []  # and no failures
        batch, _ = collate([sample] * (batch_size // place.world_size))
        return moved(batch, lambda tensor: tensor.to(place.device))

    return Batches(on_device(loader, place.device), skipped, stand_in, loader)


class Batches:
    """Never raises: trouble is a line that travels to the verdict, where all ranks agree to stop.

    batches: yields (batch, failures), on the device; skipped: counts unreadable files; stand_in():
    what a rank without a batch trains on, because the other ranks wait for it in the middle of the
    step; loader: what `batches` reads from, if it has processes.
    """

    # A process that was killed may have held a lock for which PyTorch, when it ends a loader, waits
    # without end. Such a loader is kept here to the end of this process, which ends its workers.
    abandoned: ClassVar[list[Any]] = []

    def __init__(
        self, batches: Iterator[tuple[Any, Failures]], skipped: Skipped,
        stand_in: Callable[[], Any], loader: Any = None,
    ):  # fmt: skip
        self.batches, self.skipped, self.stand_in, self.loader = batches, skipped, stand_in, loader
        self.trouble = ""  # why no batch can come, in one line
        self.waited = 0.0  # seconds since `waited_since` was last asked
        self.readers = signals.ReaderWatch()

    def next(self) -> Any:
        """The next batch, or the stand-in with `trouble` set."""
        began = time.perf_counter()
        try:
            with self.readers.waiting():
                batch, failures = next(self.batches)
        # EOFError: from a reader that dies while it hands over a batch
        except (
            ValueError, RuntimeError, OSError, EOFError, StopIteration, signals.ReaderDied
        ) as error:  # fmt: skip
            self.trouble = self.trouble or no_more_images(error)
            if not isinstance(error, ValueError) and self.loader not in self.abandoned:
                self.abandoned.append(self.loader)
            return self.stand_in()
        finally:
            self.waited += time.perf_counter() - began
        try:
            self.skipped.record(failures)
        except ValueError as error:
            self.trouble = self.trouble or str(error)
        except OSError as error:
            say(
                f"could not write to {self.skipped.file}: {error.strerror or error}; the run goes "
                "on"
            )
        return batch

    def waited_since(self) -> float:
        """Seconds waited since this was last asked."""
        waited, self.waited = self.waited, 0.0
        return waited

    def close(self) -> None:
        """End the worker processes."""
        self.readers.close()
        self.batches.close()


def no_more_images(error: BaseException) -> str:
    """What stopped the processes that read images: a ValueError is of the images, anything else of
    the processes.
    """
    text = str(error).strip() or type(error).__name__
    line = text.splitlines()[-1]  # of the trace that a process sends
    if isinstance(error, ValueError):
        return f"no more images: {line.partition('ValueError: ')[2] or line}"
    return signals.reader_died(line)
