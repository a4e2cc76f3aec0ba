"""Images with a label for every pixel: the data sets of `layouts.LABELED`, opened.

Labels are for measuring and fine-tuning only: train.py uses nothing from this file.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import toy
from engine.images import BadImage, ImageFiles, find_images
from measures.layouts import COARSE_NAMES, FIRST_STUFF, IGNORE, LABELED, WRONG

UNSEEN = 2**32  # a seed of toy scenes that no run trains on: those of runs end at 2^31

# sha256 of PiCIE's list for val2017: 2,175 ids of 12 digits, one per line [P: PiCIE].
PUBLISHED_LIST = "7c629734c88f1a74bba6311e01d4d9fe976df84f07cb4fc86452ce5116e51655"


@dataclass(frozen=True)
class Labeled:
    """A sequence of (image (3 y x) uint8, label (y x) int64 with IGNORE where there is none).

    class_names: of the ids 0..t-1; empty if the labels are segments without classes, where an id
    means something else in every image.
    """

    images: ImageFiles | toy.ToyImages
    label_of: Callable[[int], Tensor]  # index -> (y x) classes
    class_names: tuple[str, ...]
    notice: str = ""  # what the reader of the numbers should know
    indices: tuple[int, ...] | None = None  # the images of a subset

    def __len__(self) -> int:
        return len(self.places())

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Raises ValueError, one line: an unreadable file, unequal sizes, ids that are no class."""
        place = self.places()[index]
        try:
            image = self.images[place]
        except BadImage as bad:
            raise ValueError(f"cannot read {bad.name}: {bad.reason}") from None
        label = self.label_of(place)
        if label.shape != image.shape[-2:]:
            size, found = (f"{x} x {y}" for y, x in (image.shape[-2:], label.shape))
            raise ValueError(f"{self.images.name(place)} is {size} but its label is {found}")
        return image, label.long()

    def places(self) -> Sequence[int]:
        """The images of this sequence, as indices of `images`."""
        return range(len(self.images)) if self.indices is None else self.indices

    def subset(self, indices: Sequence[int]) -> Labeled:
        """The images at these places of the sequence."""
        own = self.places()
        return replace(self, indices=tuple(own[index] for index in indices))

    def files(self) -> set[Path]:
        """The image files; of toy scenes, which are drawn, none."""
        if isinstance(self.images, toy.ToyImages):
            return set()
        return {Path(self.images.root, self.images.name(place)) for place in self.places()}


def open_labeled(
    dataset: str, data_dir: str | Path | None = None, split: str | None = None, **options: Any
) -> Labeled:
    """The labeled images of one split of a data set.

    dataset: a key of `LABELED`; split: None for what is usually measured, val, of a folder
    everything. options: those of `draw_toy` or `open_files`. Raises ValueError with one line.
    """
    if dataset not in LABELED:
        names = ", ".join(LABELED)
        raise ValueError(f"unknown labeled data set {dataset!r}: choose one of {names}")
    if dataset == "toy":
        return draw_toy(split, **options)
    if not data_dir:
        tree = LABELED[dataset].tree
        raise ValueError(f"--data-dir is missing: the folder of {dataset}, which holds {tree}")
    return open_files(dataset, Path(data_dir), split, **options)


def draw_toy(
    split: str | None, count: int = 256, seed: int = UNSEEN, preset: str = "scene", **dials: Any
) -> Labeled:
    """Toy scenes with their 8 classes; the split train has the next seed."""
    scenes = toy.ToyImages(seed + (split == "train"), count, preset, **dials)
    return Labeled(scenes, scenes.semantic.__getitem__, toy.CLASS_NAMES)


def open_files(
    dataset: str,
    root: Path,
    given: str | None = None,
    list_file: str | Path | None = None,
    num_classes: int | None = None,
) -> Labeled:
    """`open_labeled` of files. list_file: names of the images to take, one per line; num_classes:
    of a folder without classes.txt.
    """
    layout = LABELED[dataset]
    root = next((root / top for top in layout.tops if (root / top).is_dir()), root)
    of_folder = layout.classes is None
    split = folder_split(root, given) if of_folder else given or "val"
    images = root / layout.images.format(split=layout.splits.get(split, split))
    if not images.is_dir():
        raise wrong_tree(dataset, root, f"no folder {images}")
    paths, files = paired(dataset, root, images, split, list_file)
    names, notice = layout.classes, ""
    if of_folder:
        names, notice = folder_classes(root, files, num_classes)
    if layout.curated:
        bar = tqdm(zip(paths, files), "curated list", len(files), disable=None, leave=False)
        kept = [pair for pair in bar if list_file or curated(pair[1])]
        if not kept:
            raise ValueError(f"no image of {images} is curated: 360 px on both sides, 3/4 stuff")
        paths, files = zip(*kept)
        notice = curated_notice(paths, split)
    label_of = partial(read_label, files, layout.ids, len(names))
    found = Labeled(ImageFiles(images, paths), label_of, names, notice)
    return fifth(found, given) if of_folder and split == "." and given else found


# --------------------------------------------------------------------------- the files of a split


def paired(
    dataset: str, root: Path, images: Path, split: str, list_file: str | Path | None
) -> tuple[list[str], list[Path]]:
    """Paths of the images below their folder, in order, and the label file of each.

    Raises ValueError where there are none, and where some are missing.
    """
    layout = LABELED[dataset]
    if layout.listed and not list_file:
        list_file = root / layout.listed.format(split=split)
        if not list_file.is_file():
            raise wrong_tree(dataset, list_file.parent, f"no {list_file}")
    if list_file:
        # Some lists name paths from the top: "/JPEGImages/x.jpg /SegmentationClassAug/x.png".
        names = [Path(line.split()[0]).stem for line in lines_of(list_file) if line.strip()]
        paths = [f"{name}{layout.suffix}" for name in names]
    else:
        paths = [path for path in find_images(images)[1].tolist() if path.endswith(layout.suffix)]
        names = [path.removesuffix(layout.suffix or Path(path).suffix) for path in paths]
    if not paths:
        raise wrong_tree(dataset, root, f"no {images}/*{layout.suffix}")
    labels, folder = layout.other_labels.get(split, layout.labels), layout.splits.get(split, split)
    files = [root / labels.format(split=folder, name=name) for name in names]
    for kind, expected in (("image", [images / path for path in paths]), ("label", files)):
        missing = missing_of(expected)
        if missing:
            count = f"{len(missing)} of {len(expected)} {kind}s are missing"
            raise wrong_tree(dataset, root, f"{count}, first {missing[0]}")
    return paths, files


def missing_of(files: Sequence[Path]) -> list[Path]:
    """Those that are not there: one look into each folder, not one per file."""
    folders = {file.parent for file in files}
    there = {each: set(os.listdir(each)) if each.is_dir() else set() for each in folders}
    return [file for file in files if file.name not in there[file.parent]]


def wrong_tree(dataset: str, root: Path, reason: str, tree: str = "") -> ValueError:
    """The complaint about a folder: what is wrong, what is expected, what was found.

    tree: what is expected, for a data set that is no row of `LABELED`.
    """
    top = next(folder for folder in (root, *root.absolute().parents) if folder.is_dir())
    names = sorted(entry.name + "/" * entry.is_dir() for entry in os.scandir(top))
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    found = f"found in {top}: {', '.join(names[:8]) or 'nothing'}{more}"
    tree = tree or LABELED[dataset].tree
    return ValueError(f"{reason}; --dataset {dataset} expects in --data-dir: {tree}; {found}")


def lines_of(file: str | Path) -> list[str]:
    """The lines of a text file. Raises ValueError where it is none."""
    try:  # "-sig": some editors begin a file with a mark, which is no part of the first name
        return Path(file).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror.lower()}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not a text file: one name per line is expected") from None


# --------------------------------------------------------------------------- label maps


def read_label(files: Sequence[Path], ids: Sequence[int], num_classes: int, index: int) -> Tensor:
    """One label map as classes, (y x) int64 with IGNORE: the guard of every label file.

    ids: id in the file -> class, (): they are classes. num_classes: 0 for segments without classes.
    Raises ValueError with one line for an id that is no class, and as `read_ids`.
    """
    numbers = read_ids(files[index])
    table = np.array([*ids, WRONG])
    classes = table[np.clip(numbers, -1, len(ids))] if len(ids) else numbers
    wrong = (classes != IGNORE) & ((classes < 0) | (classes >= num_classes))
    if num_classes and wrong.any():
        found = f"the label {files[index]} has id {numbers[wrong][0]}"
        raise ValueError(f"{found}, which is none of its {num_classes} classes")
    return torch.from_numpy(classes)


def read_ids(file: Path) -> np.ndarray:
    """The ids in a label file, (y x) int64. Raises ValueError: unreadable, or colors, not ids."""
    try:
        with Image.open(file) as image:
            mode, ids = image.mode, np.asarray(image)
    except (OSError, SyntaxError):
        raise ValueError(f"cannot read the label {file}") from None
    if mode not in ("L", "P", "1", "I", "I;16"):
        raise ValueError(f"{file} holds colors ({mode}), not class ids: one gray value per class")
    return ids.astype(np.int64)


# --------------------------------------------------------------------------- COCO-Stuff


def curated(file: Path) -> bool:
    """Whether PiCIE's rule keeps an image [P]: both sides at least 360 px, and 3/4 of it stuff.

    file: its label map of the 182 fine classes. The size stands in the header: it is tested first.
    """
    with Image.open(file) as image:
        if min(image.size) < 360:
            return False
    coarse = read_label([file], LABELED["coco_stuff"].ids, len(COARSE_NAMES), 0)
    return float(((coarse >= FIRST_STUFF) & (coarse != IGNORE)).double().mean()) >= 0.75


def curated_notice(paths: Sequence[str], split: str) -> str:
    """Whether the images are those of the list that papers use."""
    names = "".join(f"{Path(path).stem}\n" for path in paths)
    published = hashlib.sha256(names.encode()).hexdigest() == PUBLISHED_LIST
    if published or not split.startswith("val"):
        return "curated images"
    return "curated images, NOT the published list of 2,175: the numbers compare with no paper"


# --------------------------------------------------------------------------- any other folder


def folder_split(root: Path, split: str | None) -> str:
    """The folder of a split within images/ and labels/; ".": there are none.

    Raises ValueError for the one of train and val that is missing where the other is there: a part
    of everything would share images with it.
    """
    if not split or (root / "images" / split).is_dir():
        return split or "."
    other = dict(train="val", val="train").get(split)
    if not other:
        raise ValueError(f"no folder {root}/images/{split}, and without it a split is train or val")
    if (root / "images" / other).is_dir():
        advice = "add it, or put all images into images/"
        raise ValueError(f"{root} has images/{other} but no images/{split}: {advice}")
    return "."


def fifth(labeled: Labeled, split: str) -> Labeled:
    """Every fifth image for val, the others for train."""
    return labeled.subset([i for i in range(len(labeled)) if (i % 5 == 0) == (split == "val")])


def folder_classes(
    root: Path, files: Sequence[Path], num_classes: int | None
) -> tuple[tuple[str, ...], str]:
    """The names of a folder's classes: classes.txt, else num_classes, else the ids are counted.

    Returns the names, and a line where the counted ids have a gap.
    """
    listed, notice = root / "classes.txt", ""
    names = class_names(listed) if listed.is_file() else []
    if not names and num_classes is None:
        num_classes, notice = count_classes(files)
    return tuple(names or [f"class {number}" for number in range(num_classes)]), notice


def class_names(file: Path) -> list[str]:
    """A name per line, line 1 is id 0; blank lines at the end are none. [] of an empty file.

    Raises ValueError for a blank line before a name, and for a name that stands there twice: tables
    and JSON hold classes by name, and would lose one.
    """
    names = "\n".join(line.strip() for line in lines_of(file)).rstrip().split("\n")
    for number, name in enumerate(names):
        if not name and any(names):
            raise ValueError(f"{file}: line {number + 1} is blank, but it names id {number}")
        if name in names[:number]:
            lines = f"lines {names.index(name) + 1} and {number + 1}"
            raise ValueError(f"{file}: {lines} are both {name!r}: every class needs another name")
    return names if any(names) else []


def count_classes(files: Sequence[Path]) -> tuple[int, str]:
    """The largest id in the label files + 1, and one line where smaller ids occur nowhere.

    One wrong pixel shows as a gap between the ids: the line names the first id after the widest
    gap, and the file that it is in. Raises ValueError where no pixel has a class.
    """
    first: dict[int, Path] = {}  # id -> the first file that has it
    for file in tqdm(files, "classes", unit="label", disable=None, leave=False):
        for number in np.unique(read_ids(file)).tolist():
            first.setdefault(number, file)
    ids = sorted(first.keys() - {IGNORE})
    if not ids:
        labels = f"all pixels of the {len(files)} label files are {IGNORE} (no class)"
        raise ValueError(f"nothing is labeled: {labels}")
    count = ids[-1] + 1
    if count == len(ids):
        return count, ""
    gap, before, after = max((b - a, a, b) for a, b in zip([-1, *ids], ids))
    missing = f"ids {before + 1} to {after - 1} occur" if gap > 2 else f"id {before + 1} occurs"
    return count, (
        f"{count} classes counted from the ids, but {missing} in no label, and {after} first in "
        f"{first[after]}: if that is a mistake, correct the file; --num-classes "
        f"{before + 1 or count} sets their number"
    )
