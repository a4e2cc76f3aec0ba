"""Finds image files in a folder, chooses some of them, and decodes files of every kind."""

import collections
import contextlib
import glob
import hashlib
import itertools
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from engine import LAYOUTS
from engine.files import found_in, read_lines

SUFFIXES = (  # how the names of image files end
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp"),
    *(".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2", ".avif"),
)
HIDDEN = (".", "@eaDir")  # how the names begin of what is left out; @eaDir holds a NAS's thumbnails
# Folders that a run or evaluate.py wrote, by the files in them: these images are no photographs
OWN = {"runs": {"config.json", "log.jsonl"}, "masks": {"prototypes.json"}}
# How folders of label maps begin in VOC, Cityscapes, ADE20K and COCO-Stuff, and how their names end
LABELS = re.compile(
    r"(?i)(?:^|/)(?:segment|gt|ground.?truth|anno|stuffthing|label|mask)\w*(?=/)"
    r"|_(?:mask|label|labelids|seg|gt)s?\.\w+$"
)
# Those of 89 to 179 megapixels are photographs, larger ones are refused
warnings.simplefilter("ignore", Image.DecompressionBombWarning)
Left = collections.defaultdict[str, list[str]]  # what was left out: kind of files or folders, paths


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

    shape: (3, y, x) of the upright image, px. Gray of more than 8 bits is stretched to 0..255, each
    image by its own range. Transparent pixels become white, an animation its first image [U].
    """

    def __init__(self, path: str | Path, name: str):
        self.name, self.orientation = name, 1
        with bad_image(name):
            if os.path.getsize(path) == 0:  # a pipe, too: to open one would wait forever
                raise ValueError("empty file")
            self.file = Image.open(path)
            if self.file.format not in ("JPEG", "MPO"):  # which can be decoded at a smaller scale
                self.file.load()  # before getexif: it loads a PNG, and hides that it is broken
        with contextlib.suppress(Exception):  # with broken metadata it is still a photograph
            self.orientation = self.file.getexif().get(ExifTags.Base.Orientation, 1)
        width, height = self.file.size
        turned = self.orientation in (5, 6, 7, 8)
        self.shape = (3, width, height) if turned else (3, height, width)

    def pixels(self, most: float = 1) -> Pixels:
        """Decodes the image, once: a JPEG at the smallest of the scales that `most` allows.

        most: px of the photograph that one pixel may cover, per side. Raises BadImage.
        """
        factor = next(scale for scale in (8, 4, 2, 1) if scale <= max(most, 1))
        with bad_image(self.name), self.file as file:
            if factor > 1 and not file.draft(None, tuple(side // factor for side in file.size)):
                factor = 1
            file.load()
            with contextlib.suppress(Exception):
                ImageOps.exif_transpose(file, in_place=True)
            image = torch.from_numpy(np.asarray(_as_rgb(file)))
        return Pixels(rearrange(image, "y x c -> c y x"), factor)

    def labeled(self) -> Tensor:
        """All pixels (3 y x), to lie beside a label. Raises BadImage, also if viewers turn it."""
        if self.orientation in range(2, 9):
            found = f"its EXIF orientation is {self.orientation}: viewers turn it"
            advice = "and nothing says whether its label is turned; save it upright"
            raise BadImage(self.name, f"{found}, {advice}")
        return self.pixels().image


class Photographs:
    """Image files, open and not decoded: a small view needs few pixels of a large image.

    paths: relative to root, or not. An index raises BadImage.
    """

    def __init__(self, root: str | Path, paths: Sequence[str] | np.ndarray):
        self.root, self.paths = os.fspath(root), np.asarray(paths, dtype=str)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Photograph:
        return Photograph(os.path.join(self.root, self.paths[index]), self.paths[index])


@contextlib.contextmanager
def bad_image(name: str) -> Iterator[None]:
    """Turns every exception into BadImage: on broken files decoders raise all kinds of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of metadata, read-only memory, and 89 megapixels of 179
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
        values = (values - values.min()) / max(np.ptp(values), 1e-12) * 255
        image = Image.fromarray(np.round(values).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def find_images(
    data_dir: str | Path, layout: str = "folder", strict: bool = True
) -> tuple[Path, np.ndarray, str]:
    """The images of a data set -> root, paths (array of str, sorted, relative to root), notice.

    data_dir: a folder, or a list of images; layout: a key of LAYOUTS. strict: whether a folder with
    another layout is refused, or taken as a plain folder. notice: how the folder was read, and what
    was left out. Raises ValueError if there is no image, or none that can be read; OSError.
    """
    data_dir, left = Path(os.path.abspath(Path(data_dir).expanduser())), Left(list)
    if data_dir.suffix.lower() in SUFFIXES and data_dir.is_file():
        raise ValueError(f"{data_dir} is an image: give its folder, or a text file of paths")
    if data_dir.is_file():
        lines = read_lines(data_dir)
        named = (line for line in lines if line and not f"{line} ".startswith("# "))
        names = list(dict.fromkeys(map(os.path.normpath, named)))  # each once
        root, notice = data_dir.parent, f"the list {data_dir}"
    else:
        found = {folder: search(data_dir, folder, left) for folder in LAYOUTS[layout]}
        names = list(itertools.chain(*found.values())) if all(found.values()) else []
        if any(found.values()) and not names:
            lacking = next(folder for folder, some in found.items() if not some)
            reason = f"no images in {data_dir / lacking}, which the layout {layout} has"
            raise ValueError(f"{reason}: give another --dataset; {found_in(data_dir)}")
        root, notice = data_dir, f"{data_dir}, layout {layout}"
    if not names and not strict:
        left.clear()
        names = search(data_dir, ".", left)
        notice = f"{data_dir} is not laid out as {layout}: taken as a plain folder of images"
    if not names:
        what = "no images of a known kind in" if data_dir.exists() else "no such folder:"
        expected = f"; the layout {layout} has them in {' and '.join(LAYOUTS[layout])}"
        expected = "" if layout == "folder" else expected
        raise ValueError(f"{what} {data_dir}{expected}; {found_in(data_dir)}")
    if left:  # the most frequent kinds first
        kinds = sorted(left.items(), key=lambda item: -len(item[1]))
        words = [f"{len(paths)} {kind} (first {min(paths)})" for kind, paths in kinds[:4]]
        notice += f"; left out: {', '.join(words)}{', ...' * (len(kinds) > 4)}"
    images = Photographs(root, np.sort(names))
    require_readable(images)
    return root, images.paths, notice


def require_readable(images: Photographs) -> None:
    """Raises ValueError if none of a few images can be read."""
    tried = range(0, len(images), len(images) // 16 + 1)
    for index in tried:
        try:
            images[index].pixels()
            return
        except BadImage as bad:
            reason = f"none of {len(tried)} images tried in {images.root} can be read; {bad}"
    raise ValueError(reason)


def search(data_dir: Path, pattern: str, left: Left) -> list[str]:
    """Paths, relative to data_dir, of the images in a folder of a layout, without hidden ones.

    "." stands for all folders but those that programs here wrote; links are followed. left: gets
    what is left out.
    """
    deep, entered, images = pattern == ".", set(), []
    tops = [""] if deep else sorted(glob.glob(f"{pattern}/", root_dir=data_dir))
    note = lambda error: left["closed folders"].append(error.filename)
    walks = (os.walk(os.path.join(data_dir, top), onerror=note, followlinks=True) for top in tops)
    for place, folders, names in itertools.chain(*walks):
        real, folder = os.path.realpath(place), os.path.relpath(place, data_dir)
        own = next((kind for kind, files in OWN.items() if files <= {*names}), "")
        if own and folder != ".":
            left[f"folders of {own}"].append(folder)
        if (own and folder != ".") or real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if deep and not name.startswith(HIDDEN))
        before = len(images)
        for name in (name for name in names if not name.startswith(HIDDEN)):
            suffix = os.path.splitext(name)[1].lower()
            kind = images if suffix in SUFFIXES else left[suffix or "without a suffix"]
            kind.append(os.path.normpath(os.path.join(folder, name)))
        if len(images) == before and not deep:
            left["folders without an image"].append(folder)
    return images


def open_images(
    data_dir: str | Path, layout: str = "folder", strict: bool = True, subset: int = 0,
    long_tailed: bool = False, held_out: int = 0, seed: int = 0, output_dir: str = "",
) -> tuple[Photographs, Photographs, str]:  # fmt: skip
    """Images to learn from, others that are kept out for the result at the end, and what was found
    and chosen; a second line is a warning.

    subset, held_out: numbers of images, 0: all, none; at most a tenth is kept out. seed: of both
    choices. output_dir: refused where images lie. Raises ValueError, OSError.
    """
    root, paths, notice = find_images(data_dir, layout, strict)
    about = f"{len(paths)} images: {notice}"
    folders = {*map(os.path.dirname, paths)}
    if os.path.isdir(data_dir):  # the next search leaves out all below the folder of a run
        folders |= {str(above) for folder in folders for above in Path(folder, "x").parents}
    places = (os.path.realpath(os.path.join(root, folder)) for folder in folders)
    if output_dir and os.path.realpath(output_dir) in places:
        raise ValueError(f"--output-dir {output_dir} holds the images: give another folder")
    asked, held_out = held_out, min(held_out, len(paths) // 10)
    order = np.random.default_rng([seed, 10]).permutation(len(paths))
    out, paths = np.sort(paths[order[:held_out]]), np.sort(paths[order[held_out:]])
    if asked:
        about += f"; {held_out} are kept out for the result"
        about += f", a tenth at most instead of {asked}" * (held_out < asked)
    if subset:
        paths, how = choose_subset(paths, subset, seed, long_tailed)
        about += f"; {subset} of them are chosen, {how}"
    return Photographs(root, paths), Photographs(root, out), about + look_like_labels(paths)


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
    shares = np.ones(len(classes))
    if long_tailed:  # quantiles of the distribution; the seed says which class has which
        quantiles = (np.arange(len(classes)) + 0.5) / len(classes)
        shares = rng.permutation((1 - quantiles) ** (-1 / 6) - 1)
    # Image i of a class is taken at the time i / share
    places = [itertools.count() for _ in classes]
    times = np.array([next(places[index]) for index in class_of]) / shares[class_of]
    chosen = np.argsort(times, kind="stable")[:count]
    counts = np.bincount(class_of[chosen], minlength=len(classes))
    how = f"{'long-tailed' if long_tailed else 'uniform'} over {len(classes)} folders"
    return np.sort(paths[chosen]), f"{how} ({counts.min()} to {counts.max()} each)"


def digest_of(paths: Sequence[str]) -> str:
    """A hash of the names of the images and of their order."""
    return hashlib.sha256("\n".join(map(str, paths)).encode(errors="surrogateescape")).hexdigest()


def look_like_labels(paths: Sequence[str]) -> str:
    """A warning if the places of some images say that they are label maps of others; else ""."""
    found = filter(None, map(LABELS.search, map(str, paths)))
    places = collections.Counter(match[0].strip("/") for match in found)
    named = ", ".join(f"{count} of {place}" for place, count in places.most_common(4))
    advice = "give the folder of the photographs, or a list, as --data-dir"
    some = len(paths) / 20 < places.total() < len(paths)
    return f"\nwarning  label maps? {named}: {advice}" if some else ""
