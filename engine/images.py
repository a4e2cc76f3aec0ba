"""Photographs on disk: finding them in a folder, and decoding whatever is called an image.

Slide: "Overview of the training datasets" (table 1).
Paper: section 4.1.
Differs: any folder will do; photographs are turned upright as their camera noted, and large ones
are decoded at a smaller scale where that suffices; a bad file has a name and a reason.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import os
import stat
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

# ------------------------------------------------------------------------------ finding photographs

SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
    ".jp2",
    ".avif",
)
LAYOUTS = {  # the folders in which each data set's images lie; * stands for one level of any name
    "coco": ("train2017",),
    "cocoplus": ("train2017", "unlabeled2017"),
    "imagenet": ("train/*",),
    "bdd100k": ("images/100k/train", "images/100k/test"),  # the slide's 90K images = train + test
    "folder": (".",),  # any folder, flat or nested
    "list": (),  # a text file with one path per line, absolute or seen from the file's folder
}
REDUCIBLE = ("JPEG", "MPO")  # formats, in Pillow's words, that can be decoded at a smaller scale
PROBES = 16  # files that are tried before a folder counts as unreadable [U]


def find_images(
    data_dir: str | Path, layout: str = "folder", strict: bool = True
) -> tuple[Path, np.ndarray, str]:
    """The images of a data set, in an order that does not depend on the file system.

    layout: a key of LAYOUTS. strict: False takes a folder with another layout as a plain folder and
    says so. Returns root (Path), paths (array of str, relative to root, sorted: one compact block
    of memory, which worker processes share without copying, unlike a list), notice (str, empty if
    there is nothing to say). Raises ValueError if there is no such folder, no image in it, or none
    that can be read.
    """
    data_dir = Path(os.path.abspath(Path(data_dir).expanduser()))
    if layout not in LAYOUTS:
        raise ValueError(f"unknown data set layout {layout!r}: choose from {', '.join(LAYOUTS)}")
    if not data_dir.exists():
        raise ValueError(
            f"no such folder or file: {data_dir}; {_found(data_dir)}; {_expected(data_dir, layout)}"
        )
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
            names, notice = (
                plain,
                f"{data_dir} is not laid out as {layout}: taken as a plain folder of images",
            )
    if not names:
        raise ValueError(
            f"no images in {data_dir}: {_expected(data_dir, layout)}; {_found(data_dir)}{hint}"
        )
    paths = np.sort(np.array(names))
    _require_readable(ImageFiles(root, paths))
    return root, paths, notice


def _search(data_dir: Path, layout: str) -> list[str]:
    """Relative paths of everything that is called like an image, [] unless all folders of the
    layout have some.
    """
    names, prefix = [], len(os.path.join(data_dir, ""))
    for folder in LAYOUTS[layout]:
        tops = (
            [data_dir]
            if folder == "."
            else sorted(path for path in data_dir.glob(folder) if path.is_dir())
        )
        found = [path[prefix:] for top in tops for path in _walk(top, deep=folder == ".")]
        if not found:
            return []
        names += found
    return names


def _walk(top: Path, deep: bool) -> list[str]:
    """Paths under top by name alone: hidden ones are left out, links followed, a circle of links
    walked once. Deep: the folders of runs are left out, whose figures are no photographs.

    What is called like an image counts as one, even a folder: reading it will say what is wrong
    with it.
    """
    pending, seen, found = [os.fspath(top)], set(), []
    while pending:
        folder = pending.pop()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = sorted(
                entry.name for entry in os.scandir(folder) if not entry.name.startswith(".")
            )
        except OSError as error:
            raise ValueError(f"cannot look into {folder}: {error.strerror}") from None
        if deep and folder != os.fspath(top) and {"config.json", "log.jsonl"} <= set(entries):
            continue  # a run's own figures
        paths = [os.path.join(folder, name) for name in entries]
        images = [path for path in paths if path.lower().endswith(SUFFIXES)]
        found += images
        if deep:
            pending += [path for path in set(paths).difference(images) if os.path.isdir(path)]
    return found


def _read_list(file: Path) -> list[str]:
    """The paths in a text file, without blank lines and remarks, which begin with "# ".

    Raises ValueError where it is none.
    """
    if file.suffix.lower() in SUFFIXES:
        raise ValueError(
            f"{file} is one image: give the folder that it lies in, or a text file of image paths"
        )
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{file} is not a text file of image paths, one per line: {error}"
        ) from None
    lines = [line.strip() for line in lines]
    return [line for line in lines if line and line != "#" and not line.startswith("# ")]


def _expected(data_dir: Path, layout: str) -> str:
    """What a layout asks for, in a few words."""
    if layout == "list":
        return "expected a text file with one image path per line"
    folders = ["..." if folder == "." else folder for folder in LAYOUTS[layout]]
    return "expected " + " and ".join(f"{data_dir}/{folder}/*.jpg" for folder in folders)


def _found(path: Path) -> str:
    """What is at a path, or in the deepest folder on the way to it that exists, in a few words."""
    while not path.is_dir():
        path = path.parent
    names = sorted(entry.name + "/" * entry.is_dir() for entry in os.scandir(path))
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return f"found in {path}: {', '.join(names[:6]) or 'nothing'}{more}"


def _require_readable(images: ImageFiles) -> None:
    """Raises ValueError where none of a few images can be read."""
    reasons = []
    for index in np.linspace(0, len(images) - 1, min(PROBES, len(images))).astype(int):
        try:
            images[index]
        except BadImage as bad:
            reasons.append(str(bad))
        else:
            return
    raise ValueError(
        f"none of {len(reasons)} files tried in {images.root} is a readable image; {reasons[0]}"
    )


# ------------------------------------------------------------------------------ reading photographs


class BadImage(Exception):
    """A file that cannot be used, with the reason in a few words."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


class ImageFiles(Dataset):
    """Image files as uint8 tensors (3 y x) of any size; BadImage for what is none.

    root: folder. paths: array of str relative to it (absolute ones stand for themselves).
    """

    def __init__(self, root: str | Path, paths: np.ndarray):
        self.root, self.paths = os.fspath(root), paths

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """Path of an image, relative to root."""
        return str(self.paths[index])

    def open(self, index: int) -> Photograph:
        """One image, its size known and its pixels not decoded yet. Raises BadImage."""
        name = self.name(index)
        return Photograph(os.path.join(self.root, name), name)

    def __getitem__(self, index: int) -> Tensor | Photograph:
        return self.open(index).pixels().image


class Photographs(ImageFiles):
    """The same files, open and not decoded: who needs few pixels of a large one asks for few."""

    def __getitem__(self, index: int) -> Photograph:
        return self.open(index)


class Pixels(NamedTuple):
    """An image as it was decoded: whole, or reduced."""

    image: Tensor  # (3 y x) uint8, upright
    factor: int = 1  # px of the photograph that one pixel stands for, per side
    # px of the photograph by which the first row and the first column begin before it: where its
    # side is no multiple of factor, the decoder's last row or column sticks out, and turned upright
    # the last may be the first
    margin: tuple[int, int] = (0, 0)

    def resized_crop(self, top: int, left: int, height: int, width: int, size: int) -> Tensor:
        """A crop, in px of the photograph -> (3 size size) uint8: bicubic, antialiased.

        It may begin in the middle of a reduced pixel: Pillow resizes from there, torch cannot.
        """
        top, left = (top + self.margin[0]) / self.factor, (left + self.margin[1]) / self.factor
        bottom, right = top + height / self.factor, left + width / self.factor
        y, x = int(top), int(left)
        window = self.image[:, y : math.ceil(bottom), x : math.ceil(right)]
        whole = Image.fromarray(rearrange(window, "c y x -> y x c").numpy())
        box = (left - x, top - y, right - x, bottom - y)  # eighths of a pixel: no rounding
        resized = whole.resize((size, size), Image.Resampling.BICUBIC, box)
        return rearrange(torch.from_numpy(np.array(resized)), "y x c -> c y x")


class Photograph:
    """An image file that is open, with its size; what its pixels are, `pixels` decodes.

    source: path of the file, or its bytes in memory; name: of it in complaints. shape: (3, y, x) of
    the upright image, px. Raises BadImage.

    Gray, palette and CMYK become RGB; 16-bit gray is divided by 257, other numbers are stretched
    from their smallest and largest to 0..255; what is transparent becomes white [U]; of an
    animation the first image counts.
    """

    def __init__(self, source: str | Path | io.BytesIO, name: str):
        self.name = name
        with _complaints_of(name):
            if not isinstance(source, io.BytesIO):
                _require_file(source)
            self.file = Image.open(source)
            if self.file.format not in REDUCIBLE:
                # A PNG may say only behind its pixels how it is to be turned
                with contextlib.ExitStack() as on_error:
                    on_error.callback(self.file.close)
                    self.file.load()
                    on_error.pop_all()
        self.orientation = _orientation(self.file)
        width, height = self.file.size
        turned = self.orientation in (5, 6, 7, 8)
        self.shape = (3, width, height) if turned else (3, height, width)

    def pixels(self, most: float = 1) -> Pixels:
        """Decode, once. most: px of the photograph that one pixel may stand for, per side.

        A JPEG is decoded at the smallest of its own scales (1, 1/2, 1/4, 1/8) that `most` allows,
        everything else whole. Raises BadImage.
        """
        factor = next(scale for scale in (8, 4, 2, 1) if scale <= max(most, 1))
        with _complaints_of(self.name), self.file as file:
            width, height = file.size
            if factor > 1 and not file.draft(None, (width // factor, height // factor)):
                factor = 1
            file.load()
            # A photograph with broken metadata is still a photograph
            with contextlib.suppress(Exception):
                ImageOps.exif_transpose(file, in_place=True)
            pixels = torch.from_numpy(np.asarray(_as_rgb(file)))
        below = -self.shape[1] % factor if self.orientation in (3, 4, 7, 8) else 0
        right = -self.shape[2] % factor if self.orientation in (2, 3, 6, 7) else 0
        # y x 3 -> 3 y x without moving a byte: crops are cut from rows as they lie
        return Pixels(pixels.permute(2, 0, 1), factor, (below, right))


@contextlib.contextmanager
def _complaints_of(name: str) -> Iterator[None]:
    """Whatever is raised inside becomes a BadImage of this name: decoders meet broken files with
    exceptions of every kind.
    """
    with warnings.catch_warnings():
        # Remarks about metadata, or that the tensor shares read-only memory
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            yield
        except Exception as error:
            raise BadImage(name, _reason(error)) from None


def _require_file(path: str | Path) -> None:
    """Raises ValueError for what holds no bytes, OSError."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # asked first, because opening a pipe would wait forever
        raise ValueError(
            "a folder, not a file" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        )
    if status.st_size == 0:
        raise ValueError("empty file")


def _orientation(file: Image.Image) -> int:
    """How the camera was held, as EXIF counts it (1: upright), 1 where nothing can be read."""
    with contextlib.suppress(Exception):
        return file.getexif().get(ExifTags.Base.Orientation, 1)
    return 1


def _as_rgb(image: Image.Image) -> Image.Image:
    """Any mode of Pillow as RGB, as `Photograph` says."""
    if image.mode.startswith(("I", "F")):  # convert() would cut these at 255
        values = np.asarray(image, dtype=np.float64)
        values = np.where(np.isfinite(values), values, 0)
        low, high = (0, 65535) if image.mode.startswith("I;16") else (values.min(), values.max())
        image = Image.fromarray(
            np.round((values - low) / max(high - low, 1e-12) * 255).astype(np.uint8)
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _reason(error: Exception) -> str:
    """Why a file could not be used, on one line and without its path, which stands beside it."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image that Pillow knows"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return " ".join(str(error).split()) or type(error).__name__


# -------------------------------------------------------------------------------------- subsets


def choose_subset(
    paths: np.ndarray, count: int, seed: int, long_tailed: bool = False
) -> tuple[np.ndarray, str]:
    """`count` of the paths, sorted, and in words how they were chosen; a function of the seed.

    Where the images lie in folders, the folders are the classes: each gives as many images, or, for
    a long tail, a number that follows a Pareto distribution of power 6. Else at random [U].
    Raises ValueError for more images than there are, and for a long tail without classes.
    """
    if count > len(paths):
        raise ValueError(f"--subset {count}, but there are {len(paths)} images: take fewer")
    rng = np.random.default_rng([seed, count])
    folders = np.array([os.path.dirname(path) for path in paths])
    classes = np.unique(folders)
    if len(classes) < 2:
        if long_tailed:
            raise ValueError(
                "--long-tailed needs folders that are classes, and all images lie in one"
            )
        return np.sort(rng.permutation(paths)[:count]), "at random"
    available = np.array([int((folders == name).sum()) for name in classes])
    shares = np.ones(len(classes))
    if long_tailed:  # quantiles of the distribution, in an order of the classes that the seed gives
        quantiles = (np.arange(len(classes)) + 0.5) / len(classes)
        shares = rng.permutation((1 - quantiles) ** (-1 / 6) - 1)
    counts = share_out(count, shares, available)
    chosen = [
        rng.permutation(paths[folders == name])[:n] for name, n in zip(classes, counts.tolist())
    ]
    how = "with a long tail" if long_tailed else "uniform"
    return np.sort(np.concatenate(chosen)), (
        f"{how} over {len(classes)} classes ({counts.min()} to {counts.max()} each)"
    )


def hold_out(paths: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The paths to learn from, and `count` to keep out, at most a tenth; a function of the seed."""
    count = min(count, len(paths) // 10)
    order = np.random.default_rng([seed, 10]).permutation(len(paths))
    return np.sort(paths[order[count:]]), np.sort(paths[order[:count]])


def share_out(count: int, shares: np.ndarray, available: np.ndarray) -> np.ndarray:
    """Whole numbers that sum to `count`, as near to the shares as what is available allows.

    Every class gets at least one where there are enough; what a class cannot give, the others do.
    """
    counts = np.minimum(available, 1 if count >= len(shares) else 0)
    while (left := count - counts.sum()) > 0:
        room = np.where(counts < available, shares, 0)
        wanted = left * room / room.sum()
        added = np.minimum(np.floor(wanted).astype(int), available - counts)
        if not added.any():  # less than one each: the largest remainders get one
            added[np.argsort(-wanted, kind="stable")[:left]] = 1
            added = np.minimum(added, available - counts)
        counts = counts + added
    return counts


def digest_of(paths: Sequence[str]) -> str:
    """A hash of the names of the images: another list of as many images is another list."""
    return hashlib.sha256("\n".join(map(str, paths)).encode(errors="surrogateescape")).hexdigest()


def look_like_labels(paths: Sequence[str]) -> str:
    """A line where many images have the names of others in another folder and another format: label
    maps beside photographs. Else nothing.
    """
    by_folder: dict[str, dict[str, str]] = {}
    for path in map(str, paths):
        folder, _, _ = path.partition("/")
        stem, suffix = os.path.splitext(os.path.basename(path))
        if folder != path:
            by_folder.setdefault(folder, {})[stem] = suffix.lower()
    for folder, files in by_folder.items():
        for other, others in by_folder.items():
            common = files.keys() & others.keys()
            labels = [stem for stem in common if files[stem] == ".png" and others[stem] != ".png"]
            if folder != other and len(labels) > len(files) / 2:
                return (
                    f"{len(labels)} files of {folder}/ have the names of images in {other}/ and "
                    f"may be label maps: give the folder {other} as --data-dir"
                )
    return ""
