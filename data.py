"""Photographs: finding them, reading them, cutting two views of each, and batching those for a whole run.

Slide "Overview of the training datasets" and "Prior 1: geometric covariance, photometric invariance".
Differs from the released code: photographs are turned upright as their camera noted; views leave the workers as one
uint8 tensor per image and get their photometric changes on the device; an unreadable file is replaced by its
neighbour and named, instead of ending the run; crops depend on (seed, epoch, index) alone, not on workers or ranks.
Read next: views.py, what is done to a view.
"""

import collections
import contextlib
import itertools
import math
import multiprocessing
import os
import random
import re
import signal
import stat
import threading
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, default_collate

from views import (  # noqa: F401  Photometric and normalize for those who look for all that is done to images here
    Photometric,
    centre_square,
    draw_crop,
    normalize,
    overlap_boxes,
    resized_crop,
)

# --------------------------------------------------------------------------------------- finding photographs

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif")
LAYOUTS = {  # the folders in which each data set's images lie; * stands for one level of any name
    "coco": ("train2017",),
    "cocoplus": ("train2017", "unlabeled2017"),
    "imagenet": ("train/*",),
    "bdd100k": ("images/100k/train", "images/100k/test"),  # the slide's 90K images = train + test
    "folder": (".",),  # any folder, flat or nested
    "list": (),  # a text file with one path per line, absolute or seen from the file's folder
}
PROBES = 16  # files that are tried before a folder counts as unreadable [U]


def find_images(data_dir, layout="folder", strict=True):
    """The images of a data set, in an order that does not depend on the file system.

    layout: a key of LAYOUTS. strict: False takes a folder with another layout as a plain folder and says so.
    Returns root (Path), paths (array of str, relative to root, sorted: one compact block of memory, which
    worker processes share without copying, unlike a list), notice (str, empty if there is nothing to say).
    Raises ValueError if there is no such folder, no image in it, or none that can be read.
    """
    data_dir = Path(os.path.abspath(Path(data_dir).expanduser()))
    if layout not in LAYOUTS:
        raise ValueError(f"unknown data set layout {layout!r}: choose from {', '.join(LAYOUTS)}")
    if not data_dir.exists():
        raise ValueError(f"no such folder or file: {data_dir}; {_found(data_dir)}; {_expected(data_dir, layout)}")
    if layout == "list" or data_dir.is_file():
        root, names, layout = data_dir.parent, _read_list(data_dir), "list"
    else:
        root, names = data_dir, _search(data_dir, layout)
    notice = hint = ""
    if not names and layout not in ("list", "folder"):
        plain = _search(data_dir, "folder")
        if plain and strict:
            hint = "; there are images, though: the layout 'folder' takes them as they lie"
        elif plain:
            names, notice = plain, f"{data_dir} is not laid out as {layout}: taken as a plain folder of images"
    if not names:
        raise ValueError(f"no images in {data_dir}: {_expected(data_dir, layout)}; {_found(data_dir)}{hint}")
    paths = np.sort(np.array(names))
    _require_readable(ImageFiles(root, paths))
    return root, paths, notice


def _search(data_dir, layout):
    """Relative paths of everything that is called like an image, [] unless all folders of the layout have some."""
    names, prefix = [], len(os.path.join(data_dir, ""))
    for folder in LAYOUTS[layout]:
        tops = [data_dir] if folder == "." else sorted(path for path in data_dir.glob(folder) if path.is_dir())
        found = [path[prefix:] for top in tops for path in _walk(top, deep=folder == ".")]
        if not found:
            return []
        names += found
    return names


def _walk(top, deep):
    """Paths under top by name alone: hidden ones are left out, links followed, a circle of links walked once.

    What is called like an image counts as one, even a folder: reading it will say what is wrong with it.
    """
    pending, seen, found = [os.fspath(top)], set(), []
    while pending:
        folder = pending.pop()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))
        except OSError as error:
            raise ValueError(f"cannot look into {folder}: {error.strerror}") from None
        paths = [os.path.join(folder, name) for name in entries]
        images = [path for path in paths if path.lower().endswith(SUFFIXES)]
        found += images
        if deep:
            pending += [path for path in set(paths).difference(images) if os.path.isdir(path)]
    return found


def _read_list(file):
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not a text file of image paths, one per line: {error}") from None
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def _expected(data_dir, layout):
    if layout == "list":
        return "expected a text file with one image path per line"
    folders = ["..." if folder == "." else folder for folder in LAYOUTS[layout]]
    return "expected " + " and ".join(f"{data_dir}/{folder}/*.jpg" for folder in folders)


def _found(path):
    """What stands at a path, or at the deepest folder on the way to it that exists, in a few words."""
    while not path.is_dir():
        path = path.parent
    names = sorted(entry.name + "/" * entry.is_dir() for entry in os.scandir(path))
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return f"found in {path}: {', '.join(names[:6]) or 'nothing'}{more}"


def _require_readable(images):
    reasons = []
    for index in np.linspace(0, len(images) - 1, min(PROBES, len(images))).astype(int):
        try:
            images[index]
        except BadImage as bad:
            reasons.append(str(bad))
        else:
            return
    raise ValueError(f"none of {len(reasons)} files tried in {images.root} is a readable image; {reasons[0]}")


# --------------------------------------------------------------------------------- reading photographs

class BadImage(Exception):
    """A file that cannot be used, with the reason in a few words."""

    def __init__(self, name, reason):
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


class ImageFiles(Dataset):
    """Image files as uint8 tensors (3 y x) of any size; BadImage for what is none.

    root: folder. paths: array of str relative to it (absolute ones stand for themselves).
    """

    def __init__(self, root, paths):
        self.root, self.paths = os.fspath(root), paths

    def __len__(self):
        return len(self.paths)

    def name(self, index):
        return str(self.paths[index])

    def __getitem__(self, index):
        path = os.path.join(self.root, self.name(index))
        try:
            return decode(path)
        except Exception as error:  # decoders meet broken files with exceptions of every kind
            raise BadImage(self.name(index), _reason(error)) from None


def decode(path):
    """One file as a uint8 tensor (3 y x), upright, whatever kind of picture it is.

    Grey, palette and CMYK become RGB; 16-bit grey is divided by 257, other numbers are stretched from their smallest
    and largest to 0..255; what is transparent becomes white [U]; of an animation the first picture counts.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # asked first, because opening a pipe would wait forever
        raise ValueError("a folder, not a file" if stat.S_ISDIR(status.st_mode) else "not a regular file")
    if status.st_size == 0:
        raise ValueError("empty file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks about metadata, or that the tensor shares read-only memory
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path) as image:
            image.load()
            with contextlib.suppress(Exception):  # a photograph with broken metadata is still a photograph
                ImageOps.exif_transpose(image, in_place=True)
            pixels = torch.from_numpy(np.asarray(_as_rgb(image)))
    return pixels.permute(2, 0, 1)  # y x 3 -> 3 y x without moving a byte: crops are cut from rows as they lie


def _as_rgb(image):
    if image.mode.startswith(("I", "F")):  # convert() would cut these at 255
        values = np.asarray(image, dtype=np.float64)
        values = np.where(np.isfinite(values), values, 0)
        low, high = (0, 65535) if image.mode.startswith("I;16") else (values.min(), values.max())
        image = Image.fromarray(np.round((values - low) / max(high - low, 1e-12) * 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _reason(error):
    """Why a file could not be used, on one line and without its path, which stands beside it."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image that Pillow knows"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return " ".join(str(error).split()) or type(error).__name__


# ------------------------------------------------------------------------- two views of a photograph

NEIGHBOURS = 64  # unreadable files in a row before a run gives in [U]


class TwoCrops(Dataset):
    """Two views of each image, with their boxes and flips.

    images: any sequence of uint8 tensors (3 y x). min_area: of a crop, as share of the image. min_overlap: of the
    second crop with the first, as share of the second; 0: they may miss each other. flip: probability, per view.
    geometric=False: both views are the same centre square, unmirrored (slide: table 8e).
    """

    def __init__(self, images, image_size, seed, min_area=0.08, min_overlap=0.01, flip=0.5, geometric=True):
        if image_size < 1 or not 0 < min_area <= 1 or not 0 <= min_overlap <= 1 or not 0 <= flip <= 1:
            raise ValueError("image_size is at least 1, min_area in (0, 1], min_overlap and flip in [0, 1]; found "
                             f"{image_size}, {min_area}, {min_overlap}, {flip}")
        self.images, self.image_size, self.seed = images, image_size, seed
        self.min_area, self.min_overlap, self.flip, self.geometric = min_area, min_overlap, flip, geometric

    def __len__(self):
        return len(self.images)

    def __getitem__(self, sample):
        """sample = epoch * len(self) + index. Returns views (v 3 y x) uint8, boxes (v 4), flipped (v), failures.

        All luck is a function of (seed, epoch, index). failures: (name, reason) of each file that could not be read
        on the way to this image or to the next readable neighbour, which then takes its place.
        """
        epoch, index = divmod(int(sample), len(self))
        image, failures = self._image_or_neighbour(index)
        if not self.geometric:
            view = centre_square(image, self.image_size)
            whole, upright = torch.tensor([[0.0, 0, 1, 1]] * 2), torch.tensor([False, False])
            return torch.stack([view, view]), whole, upright, failures
        rng = random.Random(f"{self.seed} {epoch} {index}")  # text is hashed whole: no two streams are alike
        height, width = image.shape[1:]
        crop1 = draw_crop(height, width, rng, self.min_area)
        crop2 = draw_crop(height, width, rng, self.min_area, crop1, self.min_overlap)
        flipped = [rng.random() < self.flip for _ in range(2)]
        views = [resized_crop(image, crop, self.image_size, flip) for crop, flip in zip((crop1, crop2), flipped)]
        return torch.stack(views), overlap_boxes(crop1, crop2, flipped), torch.tensor(flipped), failures

    def _image_or_neighbour(self, index):
        failures = []
        while True:
            try:
                return self.images[(index + len(failures)) % len(self)], failures
            except BadImage as bad:
                failures.append((bad.name, bad.reason))
                if len(failures) == min(NEIGHBOURS, len(self)):
                    raise ValueError(f"{len(failures)} images in a row could not be read; {bad}") from None


# ------------------------------------------------------------------------------ from images to batches

class Batch(NamedTuple):
    """What a step gets: two views of b images, and where they overlap."""

    views: torch.Tensor  # (b v 3 y x) uint8
    boxes: torch.Tensor  # (b v 4) float32: x1 y1 x2 y2 in 0..1 of each view
    flipped: torch.Tensor  # (b v) bool
    failures: list  # (name, reason) of unreadable files


def collate(items):
    """Items of TwoCrops -> Batch."""
    views, boxes, flipped, failures = zip(*items)
    return Batch(default_collate(views), default_collate(boxes), default_collate(flipped),
                 list(itertools.chain(*failures)))


class RunSampler:
    """The images of a whole run, batch by batch: every epoch in an order of its own, its partial batch left out.

    Position p of the run, start <= p < stop, is batch p % steps_per_epoch of epoch p // steps_per_epoch. The order
    is a function of (seed, epoch): a run continues anywhere, and all ranks' parts together are the same total_batch
    images however many ranks there are. Yields lists of samples = epoch * num_images + index. Default: one epoch.
    """

    def __init__(self, num_images, total_batch, rank=0, world_size=1, seed=0, start=0, stop=None):
        if total_batch < 1 or total_batch % world_size:
            raise ValueError(f"a batch of {total_batch} images cannot be shared evenly by {world_size} processes: "
                             f"choose a multiple of {world_size}")
        if num_images < total_batch:
            raise ValueError(f"a batch of {total_batch} images is larger than the data set, which has {num_images}: "
                             "choose a smaller batch")
        self.num_images, self.total_batch, self.seed = num_images, total_batch, seed
        self.steps_per_epoch = num_images // total_batch
        self.start, self.stop = start, self.steps_per_epoch if stop is None else stop
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"a run cannot go from step {self.start} to step {self.stop}")
        share = total_batch // world_size
        self.part = slice(rank * share, (rank + 1) * share)

    def __len__(self):
        return self.stop - self.start

    def __iter__(self):
        order_of = -1
        for position in range(self.start, self.stop):
            epoch, step = divmod(position, self.steps_per_epoch)
            if epoch != order_of:
                order, order_of = np.random.default_rng([self.seed, epoch]).permutation(self.num_images), epoch
            batch = order[step * self.total_batch:(step + 1) * self.total_batch]
            yield (epoch * self.num_images + batch[self.part]).tolist()


def make_loader(dataset, sampler, workers, device):
    """Batches in the sampler's order, made ahead by worker processes that live as long as the run (0: made here)."""
    options = {}
    if workers:
        options = dict(persistent_workers=True, prefetch_factor=4, worker_init_fn=_leave_signals_to_the_parent)
    return DataLoader(dataset, batch_sampler=sampler, num_workers=workers, collate_fn=collate,
                      pin_memory=torch.device(device).type == "cuda", **options)


def _leave_signals_to_the_parent(_worker):
    """A cluster signals every process of a job; the run wants to finish its step, and needs its workers for that."""
    for name in ("SIGINT", "SIGUSR1"):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_on_the_parents_word, daemon=True).start()


def _end_on_the_parents_word():
    """SIGTERM counts if the parent sent it: that is how Python ends its workers, and it then waits for them."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != multiprocessing.parent_process().pid:
        pass
    os._exit(0)


def on_device(loader, device):
    """The loader's batches on the device. On a GPU the next one is copied while the caller works on this one."""
    device = torch.device(device)
    if device.type != "cuda":
        for batch in loader:
            yield Batch(*(tensor.to(device) for tensor in batch[:3]), batch.failures)
        return
    stream, waiting = torch.cuda.Stream(device), collections.deque()
    for batch in loader:
        with torch.cuda.stream(stream):
            copied = Batch(*(tensor.to(device, non_blocking=True) for tensor in batch[:3]), batch.failures)
        waiting.append((copied, stream.record_event()))
        if len(waiting) > 1:
            yield _arrived(*waiting.popleft(), device)
    while waiting:
        yield _arrived(*waiting.popleft(), device)


def _arrived(batch, copied, device):
    """The batch, once the device has it: what is launched from now on waits for the copy, the host does not."""
    current = torch.cuda.current_stream(device)
    current.wait_event(copied)
    for tensor in batch[:3]:
        tensor.record_stream(current)  # or its memory is given away too early
    return batch


# ------------------------------------------------------------------------------------- what was skipped

class Skipped:
    """The memory of unreadable files: each is named once in a text file, and too many of them stop the run.

    file: path of skipped.txt, made when the first one turns up; other processes may write to it too.
    max_share: of num_images.
    """

    def __init__(self, file, num_images, max_share=0.01):
        self.file, self.num_images, self.max_share = Path(file), num_images, max_share
        self.names = set()  # as bytes, since a name need not be valid text

    def record(self, failures):
        """failures: (name, reason) pairs, repeated ones too. Raises ValueError once more than max_share are bad."""
        reasons = {re.sub(rb"[\t\r\n]", b" ", os.fsencode(name)): reason.encode() for name, reason in failures}
        if not reasons.keys() - self.names:
            return
        if self.file.exists():  # written by a run that this one resumes, or by another process of it
            self.names |= {line.split(b"\t")[0] for line in self.file.read_bytes().splitlines()}
        with self.file.open("ab") as out:
            out.writelines(name + b"\t" + reason + b"\n" for name, reason in reasons.items() if name not in self.names)
        self.names |= reasons.keys()
        if len(self.names) > self.max_share * self.num_images:
            raise ValueError(f"{len(self.names)} of {self.num_images} images could not be read, more than the share "
                             f"of {self.max_share:g} that is allowed; they are named in {self.file}")


def check_images(root, paths, workers=0, progress=iter):
    """Reads every file once, in worker processes. progress: wraps the loader of results, say in a bar.

    Returns a dict: images, bad [(name, reason)], sizes {(height, width): count}, smallest and largest (by pixels).
    """
    results = list(progress(DataLoader(_SizeOrReason(root, paths), batch_size=None, num_workers=workers)))
    bad = [(str(name), result) for name, result in zip(paths, results) if isinstance(result, str)]
    sizes = collections.Counter(tuple(result) for result in results if not isinstance(result, str))
    by_pixels = sorted(sizes, key=math.prod) or [None]
    return dict(images=len(paths), bad=bad, sizes=dict(sizes.most_common()),
                smallest=by_pixels[0], largest=by_pixels[-1])


class _SizeOrReason(ImageFiles):
    def __getitem__(self, index):
        try:
            return super().__getitem__(index).shape[-2:]
        except BadImage as bad:
            return bad.reason
