"""Images with a label for every pixel: the data sets of `layouts.LABELED`, opened."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import toy
from engine.files import found_in, read_lines
from engine.images import BadImage, Photographs, bad_image, find_images
from engine.log import progress
from measures.layouts import COARSE_NAMES, FIRST_STUFF, IGNORE, LABELED, WRONG

MANY = 150  # more classes than ADE20K has are believed only where classes.txt names them [U]
UNSEEN = 2**32  # a seed of toy scenes that no run trains on: those of runs end at 2^31

# sha256 of PiCIE's list of val2017: 2,175 ids of 12 digits, one per line [P].
PUBLISHED_LIST = "7c629734c88f1a74bba6311e01d4d9fe976df84f07cb4fc86452ce5116e51655"


@dataclass(frozen=True)
class Labeled:
    """A sequence of (image (3 y x) uint8, label (y x) int64 with IGNORE where there is none)."""

    images: Photographs | toy.ToyImages
    label_of: Callable[[int], Tensor]  # index -> (y x) classes
    places: Sequence[int]  # the chosen ones, as indices of `images`
    class_names: tuple[str, ...]  # of the ids 0..t-1; (): segments without classes
    notice: str = ""  # what the reader of the numbers should know

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Raises ValueError, one line: an unreadable file, unequal sizes, ids that are no class."""
        place = self.places[index]
        try:
            image, label = self.images[place], self.label_of(place).long()
            image = image if isinstance(image, Tensor) else image.labeled()
        except BadImage as bad:
            raise ValueError(f"cannot read {bad}") from None
        if label.shape != image.shape[-2:]:
            size, found = (f"{x} x {y}" for y, x in (image.shape[-2:], label.shape))
            raise ValueError(f"{self.images.paths[place]} is {size} but its label is {found}")
        return image, label

    def subset(self, indices: Sequence[int]) -> "Labeled":
        """The images at these places."""
        return replace(self, places=[self.places[index] for index in indices])

    @property
    def paths(self) -> list[str]:
        """Of the images, below their folder; of toy scenes, which are drawn, none."""
        places = self.places if isinstance(self.images, Photographs) else ()
        return [self.images.paths[place] for place in places]

    def files(self) -> set[Path]:
        """The image files."""
        return {Path(self.images.root, path) for path in self.paths}


def open_labeled(
    dataset: str, data_dir: str | Path | None = None, split: str | None = None, **options: Any
) -> Labeled:
    """One split; None: val, or all of a folder. Raises ValueError with one line.

    options: of toy scenes those of `toy.ToyImages`, of others those of `open_files`.
    """
    if dataset == "toy":  # the split train has the next seed
        given = dict(seed=UNSEEN, count=256) | options
        scenes = toy.ToyImages(given.pop("seed") + (split == "train"), **given)
        return Labeled(scenes, scenes.semantic.__getitem__, range(len(scenes)), toy.CLASS_NAMES)
    if not data_dir:
        raise ValueError(f"--data-dir is missing: the folder of {dataset}: {LABELED[dataset].tree}")
    return open_files(dataset, Path(data_dir), split, **options)


def open_files(dataset: str, root: Path, split: str | None, num_classes: int = 0) -> Labeled:
    """One split of a data set that is no toy; num_classes: of a folder, 0: count them."""
    layout = LABELED[dataset]
    root = next((root / top for top in layout.tops if (root / top).is_dir()), root)
    part = folder_part(root, split) if layout.classes is None else split or "val"
    folder = root / layout.images.format(split=layout.splits.get(part, part))
    paths, files = zip(*paired(dataset, root, folder, part))
    names, notice = layout.classes, curated_notice(paths, part) if layout.curated else ""
    if names is None:
        names = class_names(root / "classes.txt") or [f"class {t}" for t in range(num_classes)]
        count = count_classes(files, named=bool(names))
        names = names or [f"class {number}" for number in range(count)]
    places = range(len(paths))
    if part == "." and split:  # every fifth image is for val
        places = [i for i in places if (i % 5 == 0) == (split == "val")]
    label_of = partial(read_label, files, layout.ids, len(names))
    return Labeled(Photographs(folder, paths), label_of, places, tuple(names), notice)


def paired(dataset: str, root: Path, images: Path, split: str) -> list[tuple[str, Path]]:
    """The path of every image below the folder `images`, and its label file; in order."""
    layout = LABELED[dataset]
    if layout.listed:
        listed = root / layout.listed.format(split=split)
        require(dataset, [listed])
        # Some lists name paths from the top: "/JPEGImages/x.jpg /SegmentationClassAug/x.png".
        lines = [line.split()[0] for line in read_lines(listed) if line]
        paths = [f"{Path(line).stem}{layout.suffix}" for line in lines]
    else:
        require(dataset, [images])
        paths = [path for path in find_images(images)[1].tolist() if path.endswith(layout.suffix)]
    require(dataset, [images / path for path in paths or [f"*{layout.suffix}"]], "images")
    labels, folder = layout.other_labels.get(split, layout.labels), layout.splits.get(split, split)
    names = (path.removesuffix(layout.suffix or Path(path).suffix) for path in paths)
    files = [root / labels.format(split=folder, name=name) for name in names]
    require(dataset, files, "labels")
    pairs = list(zip(paths, files))
    return curated(pairs) if layout.curated else pairs


def require(dataset: str, needed: Sequence[Path], kind: str = "") -> None:
    """Raises ValueError where a path is missing. kind: of several, in words."""
    missing = [path for path in needed if not path.exists()]
    if missing:
        how = f"{len(missing)} of {len(needed)} {kind} are missing, first" if kind else "no"
        raise wrong_tree(dataset, missing[0].parent, f"{how} {missing[0]}")


def wrong_tree(dataset: str, folder: Path, reason: str, tree: str = "") -> ValueError:
    """What is wrong; what the data set should hold (tree: if not in `LABELED`); what is there."""
    expected = f"--dataset {dataset} expects in --data-dir: {tree or LABELED[dataset].tree}"
    return ValueError(f"{reason}; {expected}; {found_in(folder)}")


def read_label(files: Sequence[Path], ids: Sequence[int], num_classes: int, index: int) -> Tensor:
    """One label map (y x) int64 of classes or IGNORE; num_classes 0: any id. Raises ValueError."""
    numbers = read_ids(files[index])
    table = np.array([*ids, WRONG])
    classes = table[np.clip(numbers, -1, len(ids))] if ids else numbers
    wrong = (classes != IGNORE) & ((classes < 0) | (classes >= num_classes))
    if num_classes and wrong.any():
        found = f"the label {files[index]} has id {numbers[wrong][0]}"
        known = f"{num_classes} classes, of classes.txt or --num-classes"
        raise ValueError(f"{found}, which is none of its {known}")
    return torch.from_numpy(classes)


def read_ids(file: Path) -> np.ndarray:
    """The ids in a label file, (y x) int64. Raises ValueError: unreadable, or colors."""
    try:
        with bad_image(str(file)), Image.open(file) as image:
            mode, ids, form = image.mode, np.asarray(image), image.format
    except BadImage as bad:
        raise ValueError(f"cannot read the label {bad}") from None
    if form in ("JPEG", "MPO"):
        raise ValueError(f"{file} is a JPEG, whose values are no class ids: write labels as PNG")
    if mode not in ("L", "P", "1", "I", "I;16"):
        raise ValueError(f"{file} holds colors ({mode}), not class ids: one gray value per class")
    return ids.astype(np.int64)


def curated(pairs: Sequence[tuple[str, Path]]) -> list[tuple[str, Path]]:
    """The images that PiCIE's rule keeps [P]: both sides at least 360 px, and 3/4 of it stuff."""
    kept, ids = [], LABELED["coco_stuff"].ids
    for pair in progress(pairs, len(pairs), "labels, curated list"):
        coarse = read_label([pair[1]], ids, len(COARSE_NAMES), 0)
        stuff = (coarse >= FIRST_STUFF) & (coarse != IGNORE)
        if min(coarse.shape) >= 360 and stuff.double().mean() >= 0.75:
            kept.append(pair)
    if not kept:
        raise ValueError("no image is curated: 360 px on both sides and 3/4 stuff")
    return kept


def curated_notice(paths: Sequence[str], split: str) -> str:
    """Whether these are the images of the published list."""
    names = "".join(f"{Path(path).stem}\n" for path in paths)
    if hashlib.sha256(names.encode()).hexdigest() == PUBLISHED_LIST or "train" in split:
        return "curated images"
    return "curated images, NOT the published list of 2,175: the numbers compare with no paper"


def folder_part(root: Path, split: str | None) -> str:
    """The folder of a split within images/ and labels/; ".": no split, or none has a folder."""
    parts = any((root / "images" / part).is_dir() for part in ("train", "val"))
    return "." if not split or (split in ("train", "val") and not parts) else split


def class_names(file: Path) -> list[str]:
    """A name per line, none twice; line 1 is id 0. [] without the file. Raises ValueError."""
    names = read_lines(file) if file.is_file() else []
    while names and not names[-1]:
        names.pop()
    for i, name in enumerate(names):
        if not name or name in names[:i]:
            raise ValueError(f"{file}: line {i + 1} is blank, or its name stands there twice")
    return names


def count_classes(files: Sequence[Path], named: bool) -> int:
    """The largest id + 1. Raises ValueError where the labels can measure nothing."""
    first: dict[int, Path] = {}  # id -> the first file that has it
    for file in progress(files, len(files), "labels, classes"):
        for number in np.unique(read_ids(file)).tolist():
            first.setdefault(number, file)
    ids = sorted(first.keys() - {IGNORE})
    if len(ids) < 2:
        held = " and ".join(map(str, sorted(first)))
        found = f"the labels hold only {held}; {IGNORE} is no class"
        raise ValueError(f"{found}, and of one class every score is 100 %: write masks as 0 and 1")
    if len(ids) > MANY and not named:
        found = f"{len(ids)} ids occur in the labels, {ids[-1]} first in {first[ids[-1]]}"
        raise ValueError(f"{found}: name them in classes.txt, or write masks without smooth edges")
    return ids[-1] + 1
