"""Finds image files in a folder, chooses some of them, and decodes files of every kind."""

import collections
import contextlib
import glob
import hashlib
import itertools
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from engine import LAYOUTS, SUFFIXES

PROBES = 16  # files that are tried before a folder counts as unreadable [U]


class BadImage(Exception):
    """A file that cannot be used."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


class Pixels(NamedTuple):
    """A decoded image, whole or reduced."""

    image: Tensor  # (3 y x) uint8, upright
    factor: int = 1  # px of the photograph that one pixel covers, per side

    def snapped(self, crop: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
        """A crop (top, left, height, width), px of the photograph -> the nearest, px of `image`."""
        top, left, height, width = crop
        edges = top, left, top + height, left + width
        y1, x1, y2, x2 = ((edge + self.factor // 2) // self.factor for edge in edges)
        return y1, x1, y2 - y1, x2 - x1


class Photograph:
    """An image file that is open, and that `pixels` decodes. Raises BadImage with this name.

    shape: (3, y, x) of the upright image, px. 16-bit gray is divided by 257, other numbers are
    stretched to 0..255. Transparent pixels become white, an animation its first image [U].
    """

    def __init__(self, path: str | Path, name: str):
        self.name, orientation = name, 1
        with _bad_image(name):
            if os.path.getsize(path) == 0:  # a pipe, too: to open one would wait forever
                raise ValueError("empty file")
            self.file = Image.open(path)
            if self.file.format not in ("JPEG", "MPO"):  # which can be decoded at a smaller scale
                self.file.load()  # before getexif: it loads a PNG, and hides that it is broken
        with contextlib.suppress(Exception):  # with broken metadata it is still a photograph
            orientation = self.file.getexif().get(ExifTags.Base.Orientation, 1)
        width, height = self.file.size
        self.shape = (3, width, height) if orientation in (5, 6, 7, 8) else (3, height, width)

    def pixels(self, most: float = 1) -> Pixels:
        """Decodes the image, once: a JPEG at the smallest of the scales that `most` allows.

        most: px of the photograph that one pixel may cover, per side. Raises BadImage.
        """
        factor = next(scale for scale in (8, 4, 2, 1) if scale <= max(most, 1))
        with _bad_image(self.name), self.file as file:
            if factor > 1 and not file.draft(None, tuple(side // factor for side in file.size)):
                factor = 1
            file.load()
            with contextlib.suppress(Exception):
                ImageOps.exif_transpose(file, in_place=True)
            image = torch.from_numpy(np.asarray(_as_rgb(file)))
        return Pixels(rearrange(image, "y x c -> c y x"), factor)


class ImageFiles:
    """Image files as tensors (3 y x) uint8; paths: relative to root, or not. Raises BadImage."""

    def __init__(self, root: str | Path, paths: Sequence[str] | np.ndarray):
        self.root, self.paths = os.fspath(root), np.asarray(paths, dtype=str)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """The path of an image, as it was given."""
        return str(self.paths[index])

    def open(self, index: int) -> Photograph:
        """One image: its size is known, its pixels are not decoded yet. Raises BadImage."""
        return Photograph(os.path.join(self.root, self.name(index)), self.name(index))

    def __getitem__(self, index: int) -> Tensor | Photograph:
        return self.open(index).pixels().image


class Photographs(ImageFiles):
    """The same files, open and not decoded: a small view needs few pixels of a large image."""

    def __getitem__(self, index: int) -> Photograph:
        return self.open(index)


@contextlib.contextmanager
def _bad_image(name: str) -> Iterator[None]:
    """Turns every exception into BadImage: on broken files decoders raise all kinds of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about metadata, and memory that is read-only
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            yield
        except Image.UnidentifiedImageError:
            raise BadImage(name, "not an image that Pillow knows") from None
        except Exception as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise BadImage(name, " ".join(reason.lower().split())) from None


def _as_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB, as `Photograph` describes."""
    if image.mode.startswith(("I", "F")):  # convert() would clip these at 255
        values = np.nan_to_num(np.asarray(image, np.float64), posinf=0, neginf=0)
        low, high = (0, 65535) if image.mode.startswith("I;16") else (values.min(), values.max())
        values = (values - low) / max(high - low, 1e-12) * 255
        image = Image.fromarray(np.round(values).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def find_images(
    data_dir: str | Path, layout: str = "folder", strict: bool = True
) -> tuple[Path, np.ndarray, str]:
    """The images of a data set -> root, paths (array of str, sorted, relative to root), notice.

    layout: a key of LAYOUTS. strict: whether a folder with another layout is refused, or taken as a
    plain folder. Raises ValueError if there is no image, or none that can be read; OSError.
    """
    data_dir = Path(os.path.abspath(Path(data_dir).expanduser()))
    layout = "list" if data_dir.is_file() else layout
    found = [_search(data_dir, folder) for folder in LAYOUTS[layout]]
    names, notice = list(itertools.chain(*found)) if all(found) else [], ""
    if layout == "list":
        names = _read_list(data_dir)
    if not names and not strict:
        names = _search(data_dir, ".")
        notice = f"{data_dir} is not laid out as {layout}: taken as a plain folder of images"
    if not names:
        what = "no images in" if data_dir.exists() else "no such folder:"
        raise ValueError(f"{what} {data_dir}; {_expected(data_dir, layout)}")
    images = ImageFiles(data_dir.parent if layout == "list" else data_dir, np.sort(names))
    _require_readable(images)
    return Path(images.root), images.paths, notice


def _search(data_dir: Path, pattern: str) -> list[str]:
    """Paths, relative to data_dir, of the images in a folder of a layout, without hidden ones.

    "." stands for all folders but those of runs, which hold figures; links are followed.
    """
    deep, entered, images = pattern == ".", set(), []
    pending = [""] if deep else sorted(glob.glob(pattern, root_dir=data_dir))
    for folder in pending:  # which grows on the way
        place = os.path.realpath(os.path.join(data_dir, folder))
        if place in entered or not os.path.isdir(place):
            continue
        entered.add(place)
        names = sorted(name for name in os.listdir(place) if not name.startswith("."))
        if folder and {"config.json", "log.jsonl"} <= set(names):
            continue
        paths = [os.path.join(folder, name) for name in names]
        images += [path for path in paths if path.lower().endswith(SUFFIXES)]
        pending += [path for path in paths if deep and not path.lower().endswith(SUFFIXES)]
    return images


def _read_list(file: Path) -> list[str]:
    """The paths in a text file, without empty lines and comments ("# ..."). Raises ValueError."""
    try:
        lines = map(str.strip, file.read_text(encoding="utf-8-sig").splitlines())
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not a text file of image paths, one per line") from None
    return [line for line in lines if line and not f"{line} ".startswith("# ")]


def _expected(data_dir: Path, layout: str) -> str:
    """The files that a layout asks for, and what is there instead."""
    folders = (folder.replace(".", "...") for folder in LAYOUTS[layout])
    trees = " and ".join(f"{data_dir}/{folder}/*.jpg" for folder in folders)
    expected = trees or "a text file with one image path per line"
    if layout not in ("list", "folder"):
        expected += ", or the layout 'folder', which takes any"
    there = next(path for path in (data_dir, *data_dir.parents) if path.is_dir())
    names = sorted(entry.name + "/" * entry.is_dir() for entry in os.scandir(there))
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return f"expected {expected}; found in {there}: {', '.join(names[:6]) or 'nothing'}{more}"


def _require_readable(images: ImageFiles) -> None:
    """Raises ValueError if none of a few images can be read."""
    tried = np.linspace(0, len(images) - 1, min(PROBES, len(images))).astype(int)
    for index in tried:
        try:
            images[index]
            return
        except BadImage as bad:
            what = f"none of {len(tried)} files tried in {images.root} is a readable image; {bad}"
    raise ValueError(what)


class TrainingImages(NamedTuple):
    """What a run learns from."""

    images: Photographs
    held_out: ImageFiles  # kept out of training, for the result at the end
    about: str  # what was found and chosen; a second line is a warning


def open_images(
    data_dir: str | Path, layout: str = "folder", strict: bool = True, subset: int = 0,
    long_tailed: bool = False, held_out: int = 0, seed: int = 0,
) -> TrainingImages:  # fmt: skip
    """`find_images`, then `hold_out`, then `choose_subset` of the others. Raises their errors.

    subset, held_out: numbers of images, 0: all, none. seed: of both choices.
    """
    root, paths, notice = find_images(data_dir, layout, strict)
    about = f"{len(paths)} images: " + (notice or f"{data_dir}, layout {layout}")
    paths, out = hold_out(paths, held_out, seed)
    if len(out):
        about += f"; {len(out)} are kept out for the result"
    if subset:
        paths, how = choose_subset(paths, subset, seed, long_tailed)
        about += f"; {len(paths)} of {'the others' if len(out) else 'them'}, {how}"
    if warning := look_like_labels(paths):
        about += f"\nwarning  {warning}"
    return TrainingImages(Photographs(root, paths), ImageFiles(root, out), about)


def hold_out(paths: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The paths to learn from, and `count` others, at most a tenth. A function of the seed."""
    count = min(count, len(paths) // 10)
    order = np.random.default_rng([seed, 10]).permutation(len(paths))
    return np.sort(paths[order[count:]]), np.sort(paths[order[:count]])


def choose_subset(
    paths: np.ndarray, count: int, seed: int, long_tailed: bool = False
) -> tuple[np.ndarray, str]:
    """Chooses `count` of the paths -> them, sorted, and how, in words. Raises ValueError.

    Folders are classes: each gives as many images, or, for a long tail, a number that follows a
    Pareto distribution of power 6; the others give what a class lacks [U].
    """
    if count > len(paths):
        raise ValueError(f"--subset {count}, but there are {len(paths)} images: take fewer")
    rng = np.random.default_rng([seed, count])
    paths = rng.permutation(paths)
    classes, class_of = np.unique([os.path.dirname(path) for path in paths], return_inverse=True)
    if long_tailed and len(classes) < 2:
        raise ValueError("--long-tailed needs folders that are classes, and all images lie in one")
    shares = np.ones(len(classes))
    if long_tailed:  # quantiles of the distribution; the seed says which class has which
        quantiles = (np.arange(len(classes)) + 0.5) / len(classes)
        shares = rng.permutation((1 - quantiles) ** (-1 / 6) - 1)
    # Image i of a class is taken at the time i / share
    places = [itertools.count() for _ in classes]
    times = np.array([next(places[index]) for index in class_of]) / shares[class_of]
    chosen = np.argsort(times, kind="stable")[:count]
    counts = np.bincount(class_of[chosen], minlength=len(classes))
    how = "with a long tail" if long_tailed else "uniform"
    how = f"{how} over {len(classes)} classes ({counts.min()} to {counts.max()} each)"
    return np.sort(paths[chosen]), how if len(classes) > 1 else "at random"


def digest_of(paths: Sequence[str]) -> str:
    """A hash of the names of the images and of their order."""
    return hashlib.sha256("\n".join(map(str, paths)).encode(errors="surrogateescape")).hexdigest()


def look_like_labels(paths: Sequence[str]) -> str:
    """A warning if most images of a folder may be the label maps of another; otherwise ""."""
    names = [os.path.splitext(path) for path in map(str, paths) if "/" in path]
    files = [(stem.partition("/")[0], os.path.basename(stem), end.lower()) for stem, end in names]
    sizes = collections.Counter(folder for folder, _, _ in files)
    photos = {stem: folder for folder, stem, end in files if end != ".png"}
    labels = [(folder, photos.get(stem, folder)) for folder, stem, end in files if end == ".png"]
    for (folder, other), count in collections.Counter(labels).items():
        if folder != other and count > sizes[folder] / 2:
            found = f"{count} files of {folder}/ have the names of images in {other}/"
            return f"{found} and may be label maps: give the folder {other} as --data-dir"
    return ""
