"""From images to batches: reading processes, the order of a whole run, and bad files replaced."""

import contextlib
import itertools
import multiprocessing
import random
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from multiprocessing.reduction import ForkingPickler
from multiprocessing.util import get_temp_dir
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, default_collate

from engine.guards import end_with_parent
from engine.images import BadImage, Photographs
from engine.log import progress, say
from engine.processes import Place, workers_of

NEIGHBORS = 64  # unreadable files in a row before a run gives up [U]
BAD_SHARE = 0.01  # of all images: a run with more unreadable ones stops [U]
GLANCE = 1  # seconds between two looks at what else happens, while a batch is waited for [U]
PATIENCE = 300  # seconds without a batch before a run gives up; a slow disk may need some [U]
LOCKS = 2**20  # bytes of shared memory, more than the locks of all readers need [U]
TIMED_OUT = "DataLoader timed out"  # how PyTorch says it
# PyTorch waits for ever for the lock of a killed reader when it ends a loader, so none ends
ABANDONED: list[Any] = []
Failures = list[tuple[str, str]]  # (name, reason) of each file that could not be read
Collate = Callable[[Sequence[Any]], Any]  # samples -> a batch


class Samples:
    """view(image, rng) of each image in each epoch; images and view may raise BadImage."""

    def __init__(
        self, images: Sequence[Any], view: Callable[[Any, random.Random], Any], seed: int,
        collate: Collate = default_collate,
    ):  # fmt: skip
        self.images, self.view, self.seed, self.collate = images, view, seed, collate

    def batch(self, samples: Sequence[int]) -> tuple[Any, Failures]:
        """A batch of what these samples show, and all their failures."""
        views, failures = zip(*(self[sample] for sample in samples))
        return self.collate(views), list(itertools.chain(*failures))

    def __getitem__(self, sample: int) -> tuple[Any, Failures]:
        """sample = epoch * images + index -> the view of that image, or of the next one that can
        be read, and the failures. Raises ValueError after NEIGHBORS unreadable files in a row.
        """
        count, failures = len(self.images), []
        epoch, index = divmod(sample, count)
        for place in range(index, index + min(NEIGHBORS, count)):
            # Text is hashed whole: no two streams are alike
            rng = random.Random(f"{self.seed} {epoch} {index}")
            try:
                return self.view(self.images[place % count], rng), failures
            except BadImage as bad:
                failures.append((bad.name, bad.reason))
        last = ": ".join(failures[-1])
        raise ValueError(f"{len(failures)} images in a row could not be read; {last}")


def order_of(
    num_images: int, batch_size: int, place: Place, seed: int = 0, start: int = 0
) -> Iterator[list[int]]:
    """This rank's share of every batch of a run, from position `start` on, without end.

    Position p is batch p % steps_per_epoch of epoch p // steps_per_epoch, whose order is a function
    of (seed, epoch) alone. Yields lists of samples = epoch * num_images + index.
    """
    share, steps_per_epoch = batch_size // place.world_size, num_images // batch_size
    for epoch in itertools.count(start // steps_per_epoch):
        order = np.random.default_rng([seed, epoch]).permutation(num_images)
        for step in range(max(start - epoch * steps_per_epoch, 0), steps_per_epoch):
            begin = step * batch_size + place.rank * share
            yield (epoch * num_images + order[begin : begin + share]).tolist()


def name_skipped(file: Path, failures: Failures, num_images: int) -> None:
    """Name each unreadable image once in a file of all ranks.

    failures: at least one, repeated ones too. Raises ValueError once there are `too_many`.
    """
    lines = {" ".join(name.split()): reason for name, reason in failures}
    try:
        with file.open("a+", encoding="utf-8", errors="surrogateescape") as out:
            out.seek(0)  # an earlier part of this run, or another rank, may know more
            known = {line.split("\t")[0] for line in out}
            out.writelines(f"{name}\t{lines[name]}\n" for name in lines.keys() - known)
    except OSError as error:
        say(f"could not write to {file}: {error.strerror}; the run goes on")
        return
    if not known:
        say(f"{': '.join(failures[0])}: its neighbor takes its place; see {file}")
    count = len(known | lines.keys())
    if too_many(count, num_images):
        found = f"{count} of {num_images} images could not be read, more than {BAD_SHARE:.0%}"
        advice = "--check-data finds all: replace them, or remove them and add --resume force"
        raise ValueError(f"{found}; they are named in {file}, and {advice}")


def too_many(bad: int, num_images: int) -> bool:
    """Whether so many unreadable images stop a run: one never does."""
    return bad > max(1, BAD_SHARE * num_images)


class Items:
    """What DataLoader takes for data: each item as it is, for a function to read."""

    def __getitem__(self, item: Any) -> Any:
        return item


def load(
    read: Callable[[Any], Any], items: Iterable[Any], workers: int = 0,
    stopped: Callable[[], bool] = lambda: False, pin_memory: bool = False,
) -> Iterator[Any]:  # fmt: skip
    """read(item) of each item in order, by reading processes, until `stopped`. Raises ValueError
    with one line: about the images, or about processes that died or hand nothing over.
    """
    workers, others, readers = workers_of(workers), set(multiprocessing.active_children()), set()
    how = dict(batch_size=None, sampler=items, collate_fn=read, pin_memory=pin_memory)
    try:
        if workers:
            get_temp_dir()  # which this process removes at its end: a killed reader leaves its own
            # Here nothing is half made when it fails
            torch.empty(LOCKS, dtype=torch.uint8).share_memory_()
            how |= dict(num_workers=workers, worker_init_fn=begin_to_read, timeout=GLANCE)
            how["collate_fn"] = partial(shared, read)
        found = iter(DataLoader(Items(), **how))
        readers = set(multiprocessing.active_children()) - others
        # PyTorch raises the death of a reader anywhere, even in a save; without its handler the
        # death shows at the next item. There is none on Windows, nor in another thread
        with contextlib.suppress(AttributeError, ValueError):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        began = time.perf_counter()
        while not stopped():
            try:
                yield next(found)
                began = time.perf_counter()
            except StopIteration:
                readers.clear()  # they have ended
                return
            except RuntimeError as error:
                if TIMED_OUT not in str(error) or time.perf_counter() > began + PATIENCE:
                    raise
    except (ValueError, RuntimeError, OSError, EOFError) as error:
        if stopped():  # the readers got the signal, too
            return
        known = workers or isinstance(error, ValueError)
        raise (ValueError(why(error)) if known else error) from None
    finally:  # which waits for none of them: one may sit in a slow read
        for reader in readers:
            reader.kill()
        if readers:
            ABANDONED.append(found)


def begin_to_read(_worker: int) -> None:
    """In a reading process: signals reach every process of a job, and a run needs its readers until
    its step is done. Raises OSError where no tensor can be handed over: else a thread would.
    """
    end_with_parent()
    for name in ("SIGINT", "SIGUSR1", "SIGHUP"):
        if hasattr(signal, name):  # Windows lacks some
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    ForkingPickler.dumps(torch.zeros(1))


def shared(read: Callable[[Any], Any], item: Any) -> Any:
    """read(item) in shared memory: else a thread would put it there, and fail without an end."""
    return tree_map_only(Tensor, Tensor.share_memory_, read(item))


def why(error: BaseException) -> str:
    """Why there is no next batch: a ValueError is about the images, all else about the readers."""
    line = (str(error).strip() or type(error).__name__).splitlines()[-1]
    if isinstance(error, ValueError):
        return line.partition("ValueError: ")[2] or line
    line = f"nothing for {PATIENCE} s" if line.startswith(TIMED_OUT) else line
    advice = "a shorter TMPDIR, more shared memory (containers: --shm-size 8g), or --workers 0"
    return f"the processes that read images died or hand nothing over ({line}): try {advice}"


def remark(images: Photographs, index: int) -> tuple[str, str]:
    """("bad", why an image cannot be read), ("look at", what is odd about it) or ("", "")."""
    try:
        image = images[index].pixels().image
    except BadImage as bad:
        return "bad", bad.reason
    if torch.equal(image.amax((1, 2)), image.amin((1, 2))):  # over y, x
        return "look at", "one color"
    dark = (image > 15).count_nonzero() < 0.01 * image.numel()
    return ("look at", "almost black") if dark else ("", "")


def check_images(parts: Mapping[str, Photographs], workers: int = 0) -> bool:
    """Read every file of the parts once, print what was found -> whether a run would stop.

    parts: what they are for -> images; the first ones are those that a run learns from.
    """
    counts = []
    for what, images in parts.items():
        found = load(partial(remark, images), range(len(images)), workers)
        found = list(progress(found, len(images), "check"))
        for index, (kind, reason) in enumerate(found):
            if kind:
                print(f"{kind:<9}{images.paths[index]}: {reason}")
        bad = sum(kind == "bad" for kind, _ in found)
        print(f"checked  {len(found)} images {what}: {len(found) - bad} can be read, {bad} cannot")
        counts.append((bad, len(images)))
    stops = too_many(*counts[0])
    so = "would" if stops else "would not"
    print(f"result   a run {so} stop at so many bad images: its limit is {BAD_SHARE:.0%}, or one")
    return stops
