"""Images with a label for every pixel: the rows of `layouts.LAYOUTS`, opened.

Labels are for measuring and fine-tuning only: train.py uses nothing from this file.
"""

from __future__ import annotations

import contextlib
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
from measures.layouts import FIRST_STUFF, IGNORE, LAYOUTS, WRONG, Layout

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
            found, wanted = (
                " x ".join(map(str, reversed(shape))) for shape in (label.shape, image.shape[-2:])
            )
            raise ValueError(
                f"{self.images.name(place)} is {wanted} but its label is {found}: "
                "they must show the same pixels"
            )
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
        if not isinstance(self.images, ImageFiles):
            return set()
        return {Path(self.images.root, self.images.name(place)) for place in self.places()}


def open_labeled(
    dataset: str, data_dir: str | Path | None = None, split: str | None = None, **options: Any
) -> Labeled:
    """The labeled images of one split of a data set.

    dataset: a key of `LAYOUTS`; split: None for what is usually measured, val, of a folder
    everything. options: count, seed, preset and dials of toy scenes; list_file of coco_stuff and
    voc (names to read, one per line); num_classes of a folder. Raises ValueError with one line.
    """
    if dataset not in LAYOUTS:
        names = ", ".join(LAYOUTS)
        raise ValueError(f"unknown labeled data set {dataset!r}: choose one of {names}")
    if dataset == "toy":
        return draw_toy(split, **options)
    if not data_dir:
        raise ValueError(
            f"--data-dir is missing: the folder of {dataset}, which holds {LAYOUTS[dataset].tree}"
        )
    return open_files(dataset, Path(data_dir), split, **options)


def draw_toy(
    split: str | None, count: int = 256, seed: int = UNSEEN, preset: str = "scene", **dials: Any
) -> Labeled:
    """Toy scenes with their 8 classes; the split train has the next seed."""
    scenes = toy.ToyImages(seed + (split == "train"), count, preset, **dials)
    return Labeled(scenes, scenes.semantic.__getitem__, toy.CLASS_NAMES)


def open_files(
    dataset: str, root: Path, split: str | None = None, list_file: str | Path | None = None,
    num_classes: int | None = None,
) -> Labeled:  # fmt: skip
    """`open_labeled` of a data set that lies on the disk."""
    layout = LAYOUTS[dataset]
    root = next((root / top for top in layout.tops if (root / top).is_dir()), root)
    whole_folder = layout.classes is None
    part = folder_split(root, split) if whole_folder else split or "val"
    images = root / layout.images.format(split=layout.splits.get(part, part))
    if not images.is_dir():
        raise wrong_tree(dataset, root, f"no folder {images}")
    paths = image_paths(dataset, root, images, part, list_file)
    files = label_files(layout, root, part, paths)
    require_files(dataset, root, "image", [images / path for path in paths])
    require_files(dataset, root, "label", files)
    names, notice = layout.classes, ""
    if whole_folder:
        names, notice = folder_classes(root, files, num_classes)
    if layout.curated:
        kept = range(len(files)) if list_file else curated(files)
        paths, files = [paths[i] for i in kept], [files[i] for i in kept]
        notice = curated_notice(paths, part)
    label_of = partial(read_label, files, layout.ids, len(names))
    found = Labeled(ImageFiles(images, np.array(paths)), label_of, names, notice)
    if whole_folder and part == "." and split:
        return found.subset([i for i in range(len(found)) if (i % 5 == 0) == (split == "val")])
    return found


# ------------------------------------------------------------------------------ files of a split


def image_paths(
    dataset: str, root: Path, images: Path, split: str, list_file: str | Path | None
) -> list[str]:
    """Paths of the images below their folder, in order. Raises ValueError where there are none."""
    layout = LAYOUTS[dataset]
    if list_file or layout.listed:
        names = list_file or split_list(dataset, root, split)
        # Some lists name paths from the top: "/JPEGImages/x.jpg /SegmentationClassAug/x.png".
        stems = [Path(line.split()[0]).stem for line in lines_of(names) if line.strip()]
        paths = [f"{stem}{layout.suffix}" for stem in stems]
    else:
        paths = [path for path in find_images(images)[1].tolist() if path.endswith(layout.suffix)]
    if not paths:
        raise wrong_tree(dataset, root, f"no {images}/*{layout.suffix}")
    return paths


def split_list(dataset: str, root: Path, split: str) -> Path:
    """The text file that names the images of a split; some write trainaug.txt for train_aug."""
    listed = LAYOUTS[dataset].listed
    files = [root / listed.format(split=name) for name in (split, split.replace("_", ""))]
    for file in files:
        if file.is_file():
            return file
    raise wrong_tree(dataset, files[0].parent, f"no {files[0]}")


def label_files(layout: Layout, root: Path, split: str, paths: Sequence[str]) -> list[Path]:
    """The label map of every image."""
    labels = layout.other_labels.get(split, layout.labels)
    folder = layout.splits.get(split, split)
    names = [
        path.removesuffix(layout.suffix) if layout.suffix else os.path.splitext(path)[0]
        for path in paths
    ]
    return [root / labels.format(split=folder, name=name) for name in names]


def require_files(dataset: str, root: Path, kind: str, files: Sequence[Path]) -> None:
    """Raises ValueError, with their number and the first, where some files are not there."""
    there: dict[Path, set[str]] = {}
    for folder in {file.parent for file in files}:  # one look into a folder, not one per file
        there[folder] = set(os.listdir(folder)) if folder.is_dir() else set()
    missing = [file for file in files if file.name not in there[file.parent]]
    if missing:
        count = f"{len(missing)} of {len(files)} {kind}s are missing"
        raise wrong_tree(dataset, root, f"{count}, first {missing[0]}")


def wrong_tree(dataset: str, root: Path, reason: str, tree: str = "") -> ValueError:
    """The complaint about a folder: what is wrong, what is expected, what was found.

    tree: what is expected, for a data set that is no row of `LAYOUTS`.
    """
    top = root
    while not top.is_dir() and top != top.parent:
        top = top.parent
    names = sorted(entry.name + "/" * entry.is_dir() for entry in os.scandir(top))
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    found = f"found in {top}: {', '.join(names[:8]) or 'nothing'}{more}"
    tree = tree or LAYOUTS[dataset].tree
    return ValueError(f"{reason}; --dataset {dataset} expects in --data-dir: {tree}; {found}")


# ----------------------------------------------------------------------------------- the label maps


def read_label(files: Sequence[Path], ids: tuple[int, ...], num_classes: int, index: int) -> Tensor:
    """One label map as classes, (y x) int64 with IGNORE; the guard of every label file.

    ids: id in the file -> class, (): they are classes. num_classes: 0 for segments without classes.
    Raises ValueError with one line for an id that is no class, and as `read_ids`.
    """
    numbers = read_ids(files[index])
    table = np.array([*ids, WRONG])
    classes = table[np.clip(numbers, -1, len(ids))] if ids else numbers
    wrong = (classes != IGNORE) & ((classes < 0) | (classes >= num_classes))
    if num_classes and wrong.any():
        raise ValueError(
            f"the label {files[index]} has id {numbers[wrong][0]}, which is none of "
            f"its {num_classes} classes"
        )
    return torch.from_numpy(classes)


def read_ids(file: Path) -> np.ndarray:
    """The ids in a label file, (y x) int64. Raises ValueError: unreadable, or colors, not ids."""
    try:
        with Image.open(file) as image:
            if image.mode not in ("L", "P", "1", "I", "I;16"):
                raise ValueError(
                    f"{file} holds colors ({image.mode}), not class ids: one gray value per class"
                )
            return np.asarray(image).astype(np.int64)
    except (OSError, SyntaxError):
        raise ValueError(f"cannot read the label {file}") from None


# --------------------------------------------------------------------------------------- COCO-Stuff


def is_curated(fine: np.ndarray) -> bool:
    """Whether PiCIE's rule keeps an image [P]: both sides at least 360 px, and 3/4 of it stuff.

    fine (y x): ids of the 182 fine classes.
    """
    coarse = np.array(LAYOUTS["coco_stuff"].ids)[np.clip(fine, 0, IGNORE)]
    stuff = (coarse >= FIRST_STUFF) & (coarse != IGNORE)
    return min(fine.shape) >= 360 and stuff.mean() >= 0.75


def curated(files: Sequence[Path]) -> list[int]:
    """Indices of the label maps that the rule keeps. The size is tested first: it is in the header.

    Raises ValueError where there are none.
    """
    kept = []
    for index, file in enumerate(tqdm(files, "curated list", disable=None, leave=False)):
        with contextlib.suppress(OSError), Image.open(file) as image:
            if min(image.size) < 360:
                continue
        if is_curated(read_ids(file)):
            kept.append(index)
    if not kept:
        raise ValueError(
            f"no image of {files[0].parent} is curated: 360 px on both sides and 3/4 stuff"
        )
    return kept


def curated_notice(paths: Sequence[str], split: str) -> str:
    """What to say about a list of images: whether it is the one that papers use."""
    published = list_digest([Path(path).stem for path in paths]) == PUBLISHED_LIST
    if published or split not in ("val", "val2017"):
        return "curated images"
    return "curated images, NOT the published list of 2,175: the numbers compare with no paper"


def list_digest(names: Sequence[str]) -> str:
    """sha256 of a list of image ids, one per line with a line end after each."""
    return hashlib.sha256("".join(f"{name}\n" for name in names).encode()).hexdigest()


# --------------------------------------------------------------------------------- any other folder


def folder_split(root: Path, split: str | None) -> str:
    """The folder of a split within images/ and labels/; ".": all images, or every fifth of them.

    Raises ValueError for the one of train and val that is missing where the other is there: a part
    of everything would share images with it.
    """
    if not split or (root / "images" / split).is_dir():
        return split or "."
    other = dict(train="val", val="train").get(split)
    if other is None:
        raise ValueError(
            f"no folder {root / 'images' / split}, and without it a split is train or val"
        )
    if (root / "images" / other).is_dir():
        raise ValueError(
            f"{root} has images/{other} but no images/{split}: add it, or put all "
            "images into images/"
        )
    return "."


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
    first: dict[str, int] = {}  # name -> its line
    for number, name in enumerate(names if any(names) else [], 1):
        if not name:
            raise ValueError(
                f"{file}: line {number} is blank, but it names id {number - 1}: "
                "write a name there, or remove the line"
            )
        if name in first:
            raise ValueError(
                f"{file}: lines {first[name]} and {number} are both {name!r}: "
                "every class needs a name of its own"
            )
        first[name] = number
    return list(first)


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
        raise ValueError(
            f"nothing is labeled: all pixels of the {len(files)} label files are "
            f"{IGNORE} (no class)"
        )
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


def lines_of(file: str | Path) -> list[str]:
    """The lines of a text file. Raises ValueError where it is none."""
    try:  # "-sig": some editors begin a file with a mark, which is no part of the first name
        return Path(file).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror.lower()}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not a text file: one name per line is expected") from None
