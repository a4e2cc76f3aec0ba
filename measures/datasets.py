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
from measures.layouts import COARSE_NAMES, FIRST_STUFF, IGNORE, LABELED, WRONG, unlabeled

UNSEEN = 2**32  # a seed of toy scenes that no run trains on: those of runs end at 2^31

# sha256 of PiCIE's list of val2017: 2,175 ids of 12 digits, one per line [P].
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
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Raises ValueError, one line: an unreadable file, unequal sizes, ids that are no class."""
        place = self.places[index]
        try:
            image, label = self.images[place], self.label_of(place).long()
        except BadImage as bad:
            raise ValueError(f"cannot read {bad}") from None
        if label.shape != image.shape[-2:]:
            size, found = (f"{x} x {y}" for y, x in (image.shape[-2:], label.shape))
            raise ValueError(f"{self.images.name(place)} is {size} but its label is {found}")
        return image, label

    @property
    def places(self) -> Sequence[int]:
        """The images of this sequence, as indices of `images`."""
        return range(len(self.images)) if self.indices is None else self.indices

    def subset(self, indices: Sequence[int]) -> Labeled:
        """The images at these places of the sequence."""
        return replace(self, indices=tuple(self.places[index] for index in indices))

    def files(self) -> set[Path]:
        """The image files; of toy scenes, which are drawn, none."""
        files = self.images if isinstance(self.images, ImageFiles) else None
        return {Path(files.root, files.name(place)) for place in self.places if files}


def open_labeled(
    dataset: str, data_dir: str | Path | None = None, split: str | None = None, **options: Any
) -> Labeled:
    """The labeled images of one split of a data set.

    split: None for val, of a folder for all images; options: of `draw_toy` or `open_files`. Raises
    ValueError with one line.
    """
    if dataset not in LABELED:
        raise ValueError(f"no labeled data set {dataset!r}: choose one of {', '.join(LABELED)}")
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
    dataset: str, root: Path, split: str | None, list_file: Path | None = None, num_classes: int = 0
) -> Labeled:
    """list_file: names of the images to take; num_classes: of a folder, 0: unknown."""
    layout = LABELED[dataset]
    root = next((root / top for top in layout.tops if (root / top).is_dir()), root)
    part = folder_part(root, split) if layout.classes is None else split or "val"
    images = root / layout.images.format(split=layout.splits.get(part, part))
    if not images.is_dir():
        raise wrong_tree(dataset, root, f"no folder {images}")
    paths, files = zip(*paired(dataset, root, images, part, list_file))
    names, notice = layout.classes, curated_notice(paths, part) if layout.curated else ""
    if names is None:
        names = class_names(root / "classes.txt")
        if not names and not num_classes:
            num_classes, notice = count_classes(files)
        names = tuple(names or [f"class {number}" for number in range(num_classes)])
    label_of = partial(read_label, files, layout.ids, len(names))
    found = Labeled(ImageFiles(images, paths), label_of, names, notice)
    if part == "." and split:  # no folders of splits: every fifth image is for val
        return found.subset([i for i in found.places if (i % 5 == 0) == (split == "val")])
    return found


# --------------------------------------------------------------------------- the files of a split


def paired(
    dataset: str, root: Path, images: Path, split: str, list_file: Path | None
) -> list[tuple[str, Path]]:
    """Of every image the path below the folder `images`, and the label file; in order."""
    layout = LABELED[dataset]
    if layout.listed and not list_file:
        list_file = root / layout.listed.format(split=split)
        if not list_file.is_file():
            raise wrong_tree(dataset, list_file.parent, f"no {list_file}")
    if list_file:
        # Some lists name paths from the top: "/JPEGImages/x.jpg /SegmentationClassAug/x.png".
        lines = [line.split()[0] for line in lines_of(list_file) if line.strip()]
        paths = [f"{Path(line).stem}{layout.suffix}" for line in lines]
    else:
        paths = [path for path in find_images(images)[1].tolist() if path.endswith(layout.suffix)]
    if not paths:
        raise wrong_tree(dataset, root, f"no {images}/*{layout.suffix}")
    names = (path.removesuffix(layout.suffix or os.path.splitext(path)[1]) for path in paths)
    labels, folder = layout.other_labels.get(split, layout.labels), layout.splits.get(split, split)
    files = [root / labels.format(split=folder, name=name) for name in names]
    require(dataset, root, "image", [images / path for path in paths])
    require(dataset, root, "label", files)
    pairs = list(zip(paths, files))
    return pairs if list_file or not layout.curated else curated(pairs)


def require(dataset: str, root: Path, kind: str, files: Sequence[Path]) -> None:
    """Raises ValueError, with their number and the first, where some files are not there."""
    folders = {file.parent for file in files}  # one look into each folder, not one per file
    there = {each: set(os.listdir(each)) if each.is_dir() else set() for each in folders}
    missing = [file for file in files if file.name not in there[file.parent]]
    if missing:
        count = f"{len(missing)} of {len(files)} {kind}s are missing"
        raise wrong_tree(dataset, root, f"{count}, first {missing[0]}")


def wrong_tree(dataset: str, root: Path, reason: str, tree: str = "") -> ValueError:
    """The complaint about a folder: what is wrong, expected and found. tree: what is expected, for
    a data set that is no row of `LABELED`.
    """
    top = next(folder for folder in (root, *root.absolute().parents) if folder.is_dir())
    names = sorted(entry.name + "/" * entry.is_dir() for entry in os.scandir(top))
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    found = f"found in {top}: {', '.join(names[:8]) or 'nothing'}{more}"
    tree = tree or LABELED[dataset].tree
    return ValueError(f"{reason}; --dataset {dataset} expects in --data-dir: {tree}; {found}")


def lines_of(file: Path) -> list[str]:
    """The lines of a text file. Raises ValueError where it is none."""
    try:  # "-sig": some editors begin a file with a mark, which is no part of the first name
        return file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError):
        raise ValueError(f"{file} is not a text file: one name per line is expected") from None


# ------------------------------------------------------------------------------------- label maps


def read_label(files: Sequence[Path], ids: Sequence[int], num_classes: int, index: int) -> Tensor:
    """One label map as classes, (y x) int64 with IGNORE: the guard of every label file.

    ids: id in the file -> class, (): they are classes; num_classes: 0 for segments without names.
    """
    numbers = read_ids(files[index])
    table = np.array([*ids, WRONG])
    classes = table[np.clip(numbers, -1, len(ids))] if ids else numbers
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


def curated(pairs: Sequence[tuple[str, Path]]) -> list[tuple[str, Path]]:
    """The images that PiCIE's rule keeps [P]: both sides at least 360 px, and 3/4 of it stuff."""
    kept, ids = [], LABELED["coco_stuff"].ids
    for pair in tqdm(pairs, "curated list", unit="label", disable=None, leave=False):
        with Image.open(pair[1]) as image:  # the size stands in the header
            if min(image.size) < 360:
                continue
        coarse = read_label([pair[1]], ids, len(COARSE_NAMES), 0)
        if ((coarse >= FIRST_STUFF) & (coarse != IGNORE)).double().mean() >= 0.75:
            kept.append(pair)
    if not kept:
        raise ValueError("no image is curated: 360 px on both sides and 3/4 stuff")
    return kept


def curated_notice(paths: Sequence[str], split: str) -> str:
    """Whether these are the images of the published list."""
    names = "".join(f"{Path(path).stem}\n" for path in paths)
    published = hashlib.sha256(names.encode()).hexdigest() == PUBLISHED_LIST
    if published or not split.startswith("val"):
        return "curated images"
    return "curated images, NOT the published list of 2,175: the numbers compare with no paper"


# ------------------------------------------------------------------------------- any other folder


def folder_part(root: Path, split: str | None) -> str:
    """The folder of a split within images/ and labels/; ".": there are none. Of train and val the
    one that is missing is refused: a part of all images would share some with the other.
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


def class_names(file: Path) -> list[str]:
    """A name per line, line 1 is id 0; blank lines at the end are none. [] without the file.

    Raises ValueError for a blank line before a name, and for a name that stands there twice: tables
    and JSON hold classes by name, and would lose one.
    """
    text = "\n".join(map(str.strip, lines_of(file))).rstrip() if file.is_file() else ""
    names = text.split("\n") if text else []
    for number, name in enumerate(names):
        if not name or name in names[:number]:
            wrong = f"{file}: line {number + 1} is {name!r}, which is blank or stands there twice"
            raise ValueError(f"{wrong}: id {number} needs a name that no other has")
    return names


def count_classes(files: Sequence[Path]) -> tuple[int, str]:
    """The largest id in the label files + 1, and one line about the widest gap between the ids: a
    wrong pixel shows as the id after it. Raises ValueError where no pixel has a class.
    """
    first: dict[int, Path] = {}  # id -> the first file that has it
    for file in tqdm(files, "classes", unit="label", disable=None, leave=False):
        for number in np.unique(read_ids(file)).tolist():
            first.setdefault(number, file)
    ids = sorted(first.keys() - {IGNORE})
    if not ids:
        raise unlabeled(f"the {len(files)} label files")
    count = ids[-1] + 1
    if count == len(ids):
        return count, ""
    _, before, after = max((b - a, a, b) for a, b in zip([-1, *ids], ids))
    return count, (
        f"{count} classes counted from the ids, but ids {before + 1} to {after - 1} occur in no "
        f"label, and {after} first in {first[after]}: if that is a mistake, correct the file; "
        f"--num-classes {before + 1 or count} sets their number"
    )
