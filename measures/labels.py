"""Images whose every pixel has a label: COCO-Stuff's 27 classes, and other data sets to measure on.

Slide: "Understanding the semantic grouping ability: unsupervised semantic segmentation".
Paper: table 5.
Differs: the authors released no evaluation code; the COCO-Stuff part is PiCIE's published protocol
[P], the rest [U].

Labels are for measuring only: training uses nothing from this file.
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
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import center_crop, resize
from tqdm import tqdm

import toy
from engine.images import BadImage, ImageFiles, find_images
from measures.metrics import IGNORE

# ------------------------------------------------------------------- the table of COCO-Stuff

# Things first: 0..11, then stuff: 12..26. Food and furniture occur as both [P].
COARSE_NAMES = (
    "electronic", "appliance", "food (thing)", "furniture (thing)", "indoor", "kitchen",
    "accessory", "animal", "outdoor", "person", "sports", "vehicle", "ceiling", "floor", "food",
    "furniture", "raw material", "textile", "wall", "window", "building", "ground", "plant", "sky",
    "solid", "structural", "water",
)  # fmt: skip
FIRST_STUFF = 12


def _fine_to_coarse() -> np.ndarray:
    """The coarse class of the 182 fine ones; IGNORE stays, other ids become -1. (256) int64."""
    # Fine 0..90 are COCO's category ids minus one, in runs (coarse class, length); 91..181 are
    # listed one by one [P].
    runs = ((9, 1), (11, 8), (8, 6), (7, 10), (6, 8), (10, 10), (5, 8), (2, 10), (3, 10), (0, 6),
            (1, 6), (4, 8))  # fmt: skip
    things = [coarse for coarse, length in runs for _ in range(length)]
    stuff = [
        17, 17, 22, 20, 20, 22, 15, 25, 16, 13, 12, 12, 17, 17, 23, 15, 15, 17, 15, 21, 15, 25, 13,
        13, 13, 13, 13, 22, 26, 14, 14, 15, 22, 21, 21, 24, 20, 22, 15, 17, 16, 15, 22, 24, 21, 17,
        25, 16, 21, 17, 22, 16, 21, 21, 25, 21, 26, 21, 24, 20, 17, 14, 21, 26, 15, 23, 20, 21, 24,
        15, 24, 22, 25, 15, 20, 17, 17, 22, 14, 18, 18, 18, 18, 18, 18, 18, 26, 26, 19, 19, 24,
    ]  # fmt: skip
    table = np.full(256, -1)
    table[: len(things) + len(stuff)] = things + stuff
    table[IGNORE] = IGNORE
    return table


FINE_TO_COARSE = _fine_to_coarse()

# sha256 of PiCIE's list for val2017: 2,175 ids of 12 digits, one per line [P].
PUBLISHED_LIST = "7c629734c88f1a74bba6311e01d4d9fe976df84f07cb4fc86452ce5116e51655"


def is_curated(fine: np.ndarray) -> bool:
    """Whether PiCIE's rule keeps an image [P]: both sides at least 360 px, and 3/4 of it stuff.

    fine (y x): ids of the 182 fine classes.
    """
    coarse = FINE_TO_COARSE[fine]
    stuff = (coarse >= FIRST_STUFF) & (coarse != IGNORE)
    return min(fine.shape) >= 360 and stuff.mean() >= 0.75


def list_digest(names: Sequence[str]) -> str:
    """sha256 of a list of image ids, one per line with a line end after each."""
    return hashlib.sha256("".join(f"{name}\n" for name in names).encode()).hexdigest()


# ------------------------------------------------------------------------------ labeled images


@dataclass(frozen=True)
class Labeled:
    """A sequence of (image (3 y x) uint8, label (y x) int64 with IGNORE where there is none).

    class_names: of the ids 0..t-1; empty if the labels are segments without classes, where an id
    means something else in every image.
    """

    images: ImageFiles | ToyScenes
    read_label: Callable[[int], np.ndarray]  # index -> (y x) of ids
    class_names: tuple[str, ...]
    notice: str = ""  # what the reader of the numbers should know
    indices: tuple[int, ...] | None = None  # the images of a subset

    def __len__(self) -> int:
        return len(self.images if self.indices is None else self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Raises ValueError, one line: unreadable image, unequal sizes, ids outside the classes."""
        index = index if self.indices is None else self.indices[index]
        try:
            image = self.images[index]
        except BadImage as bad:
            raise ValueError(f"cannot read {bad.name}: {bad.reason}") from None
        label, name = self.read_label(index), self.images.name(index)
        if label.shape != image.shape[-2:]:
            height, width = image.shape[-2:]
            found = " x ".join(str(side) for side in label.shape[::-1])
            raise ValueError(f"{name} is {width} x {height} but its label is {found}: "
                             "they must show the same pixels")
        if self.class_names:
            ids = np.unique(label[label != IGNORE])
            if ids.size and not 0 <= ids[0] <= ids[-1] < len(self.class_names):
                wrong = ids[(ids < 0) | (ids >= len(self.class_names))][0]
                raise ValueError(f"the label of {name} has id {wrong}, outside "
                                 f"0..{len(self.class_names) - 1} and not {IGNORE} (no label)")
        return image, torch.from_numpy(label.astype(np.int64))

    def subset(self, indices: Sequence[int]) -> Labeled:
        """The images at these places of the sequence."""
        own = range(len(self)) if self.indices is None else self.indices
        return replace(self, indices=tuple(own[i] for i in indices))


def read_ids(path: Path) -> np.ndarray:
    """The ids in a label file, (y x) int64. Raises ValueError: unreadable, or colors, not ids."""
    try:
        with Image.open(path) as image:
            if image.mode not in ("L", "P", "1", "I", "I;16"):
                raise ValueError(f"{path} holds colors ({image.mode}), not class ids: "
                                 "one gray value per class")
            return np.asarray(image).astype(np.int64)
    except (OSError, SyntaxError):
        raise ValueError(f"cannot read the label {path}") from None


def square(pair: tuple[Tensor, Tensor], size: int) -> tuple[Tensor, Tensor]:
    """Short side to `size`, then the center: image (3 y x) bilinear, label (y x) nearest [P].

    Returns image (3 size size) and label (size size).
    """
    image, label = pair
    image = resize(image, [size], InterpolationMode.BILINEAR, antialias=True)
    # PIL's nearest, which the protocol used, takes the pixel under the center: torchvision calls
    # that "exact".
    label = resize(label[None], [size], InterpolationMode.NEAREST_EXACT)
    return center_crop(image, [size]), center_crop(label, [size])[0]


# ------------------------------------------------------------------------- the known data sets


def open_labeled(
    dataset: str, data_dir: str | Path | None, split: str | None = None, **options: Any
) -> Labeled:
    """The labeled images of a data set.

    dataset: a key of `DATASETS`; split: None for what is usually measured; options: each for one
    data set only, see its function. Raises ValueError with one line for a wrong folder.
    """
    if dataset not in DATASETS:
        raise ValueError(f"unknown labeled data set {dataset!r}: choose one of "
                         f"{', '.join(DATASETS)}")
    if dataset == "toy":
        return _toy(split, **options)
    if data_dir is None:
        raise ValueError(f"--data-dir is missing: the folder of {dataset}, laid out as "
                         f"{TREES[dataset]}")
    return DATASETS[dataset](Path(data_dir), split, **options)


def _coco_stuff(
    root: Path, split: str | None, list_file: str | Path | None = None,
    published: str = PUBLISHED_LIST,
) -> Labeled:  # fmt: skip
    """COCO-Stuff 27 on PiCIE's curated images.

    list_file: their ids one per line; without it the list is rebuilt by the rule. published: the
    digest of the list that papers use.
    """
    split = _year(split)
    folder = root / "stuffthingmaps_trainval2017" / split
    if not folder.is_dir():
        raise ValueError(f"no labels in {folder}: expected {TREES['coco_stuff']}")
    if list_file is None:
        files = sorted(name for name in os.listdir(folder) if name.endswith(".png"))
        names = _curated(files, folder)
    else:
        names = [Path(line.strip()).stem for line in _lines(list_file) if line.strip()]
    if not names:
        raise ValueError(f"no image of {folder} is curated: 360 px on both sides and 3/4 stuff")
    notice = "curated images"
    if split == "val2017" and list_digest(names) != published:
        notice += ", NOT the published list of 2,175: the numbers compare with no paper"
    fine = [folder / f"{name}.png" for name in names]
    images = _image_files(root / split, [f"{name}.jpg" for name in names], fine)
    return Labeled(images, partial(_coarse_of, fine), COARSE_NAMES, notice)


def _curated(files: Sequence[str], folder: Path) -> list[str]:
    """Ids of the label files that the rule keeps. The size is tested first: it is in the header."""
    kept = []
    for name in tqdm(files, "curated list", unit="label", disable=None, leave=False):
        with contextlib.suppress(OSError), Image.open(folder / name) as image:
            if min(image.size) < 360:
                continue
        if is_curated(_fine_ids(folder / name)):
            kept.append(Path(name).stem)
    return kept


def _coco_things(root: Path, split: str | None) -> Labeled:
    """The 12 coarse thing classes drawn from COCO's instances; everything else is ignored [U]."""
    from pycocotools.coco import COCO

    split = _year(split)
    file = root / "annotations" / f"instances_{split}.json"
    if not file.is_file():
        raise ValueError(f"no {file}: expected {TREES['coco_things']}")
    with contextlib.redirect_stdout(None):  # it prints its progress to stdout, the place of results
        coco = COCO(file)
    annotated = sorted((each for each in coco.imgs.values() if coco.imgToAnns[each["id"]]),
                       key=lambda each: each["file_name"])
    images = _image_files(root / split, [each["file_name"] for each in annotated])
    return Labeled(images, partial(_things_of, coco, annotated), COARSE_NAMES[:FIRST_STUFF],
                   "things only, everything else is left out")


VOC_NAMES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
)  # fmt: skip


def _voc(root: Path, split: str | None) -> Labeled:
    """PASCAL VOC 2012, 21 classes with the background; root is VOCdevkit or VOC2012."""
    root = root / "VOC2012" if (root / "VOC2012").is_dir() else root
    listed = root / "ImageSets" / "Segmentation" / f"{split or 'val'}.txt"
    if not listed.is_file():
        raise ValueError(f"no {listed}: expected {TREES['voc']}")
    names = [line.strip() for line in _lines(listed) if line.strip()]
    files = [root / "SegmentationClass" / f"{name}.png" for name in names]
    images = _image_files(root / "JPEGImages", [f"{name}.jpg" for name in names], files)
    return Labeled(images, partial(_ids_of, files), VOC_NAMES)


def _bsds(root: Path, split: str | None) -> Labeled:
    """Berkeley's photographs, each cut into segments by one person; segments have no classes."""
    split = split or "val"
    folder, paths = _found(root / "images" / split, "bsds")
    files = [root / "segments" / split / f"{Path(path).stem}.png" for path in paths]
    return Labeled(_image_files(folder, paths, files), partial(_ids_of, files), ())


def _folder(root: Path, split: str | None, num_classes: int | None = None) -> Labeled:
    """Any images/ + labels/ with equal names.

    classes.txt (one name per line), else num_classes, defines the classes; without both the ids
    are counted. split: a folder within both, if they have it; else "train" and "val" are four
    fifths and one fifth, and None is all. Raises ValueError for the one of train and val that is
    missing where the other is there: a part of everything would share images with it.
    """
    inner = split if split and (root / "images" / split).is_dir() else "."
    other = dict(train="val", val="train").get(split or "", "")
    if inner == "." and other and (root / "images" / other).is_dir():
        raise ValueError(f"{root} has images/{other} but no images/{split}: add it, or put all "
                         "images into images/")
    folder, paths = _found(root / "images" / inner, "folder")
    files = [root / "labels" / inner / Path(path).with_suffix(".png") for path in paths]
    images = _image_files(folder, paths, files)
    listed = root / "classes.txt"
    names = _class_names(listed) if listed.is_file() else []
    notice = ""
    if num_classes is None and not names:
        num_classes, notice = count_classes(files)
    names = names or [f"class {number}" for number in range(num_classes)]
    whole = Labeled(images, partial(_ids_of, files), tuple(names), notice)
    if inner != "." or split is None:
        return whole
    if split not in ("train", "val"):
        raise ValueError(f"no folder {root / 'images' / split}, and without it a split is train or "
                         "val")
    return whole.subset([i for i in range(len(whole)) if (i % 5 == 0) == (split == "val")])


def _class_names(file: Path) -> list[str]:
    """A name per line, line 1 is id 0; blank lines at the end are none. [] of an empty file.

    Raises ValueError for a blank line before a name, and for a name that stands there twice: tables
    and JSON hold classes by name, and would lose one.
    """
    names = "\n".join(line.strip() for line in _lines(file)).rstrip().split("\n")
    if names == [""]:
        return []
    first: dict[str, int] = {}  # name -> its line
    for number, name in enumerate(names, 1):
        if not name:
            raise ValueError(f"{file}: line {number} is blank, but it names id {number - 1}: "
                             "write a name there, or remove the line")
        if name in first:
            raise ValueError(f"{file}: lines {first[name]} and {number} are both {name!r}: "
                             "every class needs a name of its own")
        first[name] = number
    return names


def count_classes(files: Sequence[Path]) -> tuple[int, str]:
    """The largest id in the label files + 1, and one line where smaller ids occur nowhere.

    One wrong pixel shows as a gap between the ids: the line names the first id after the widest
    gap, and the file that it is in. Raises ValueError where no pixel has a class.
    """
    first: dict[int, Path] = {}  # id -> the first file that has it
    for file in tqdm(files, "classes", unit="label", disable=None, leave=False):
        for number in np.unique(read_ids(file)).tolist():
            if number != IGNORE:
                first.setdefault(number, file)
    if not first:
        raise ValueError(f"nothing is labeled: all pixels of the {len(files)} label files are "
                         f"{IGNORE} (no class)")
    ids = sorted(first)
    count = ids[-1] + 1
    if count == len(ids):
        return count, ""
    gap, before, after = max((b - a, a, b) for a, b in zip([-1, *ids], ids))
    missing = f"ids {before + 1} to {after - 1} occur" if gap > 2 else f"id {before + 1} occurs"
    return count, (
        f"{count} classes counted from the ids, but {missing} in no label, and {after} first in "
        f"{first[after]}: if that is a mistake, correct the file; --num-classes "
        f"{before + 1 or count} sets their number")


UNSEEN = 2**32  # seeds of training runs end at 2^31


class ToyScenes:
    """A sequence of scenes (3 y x) uint8, each drawn when it is read.

    The default seed is one that no training run can have.
    """

    def __init__(self, count: int, seed: int = UNSEEN, preset: str = "scene", **dials: Any):
        self.seed, self.count, self.preset, self.dials = seed, count, preset, dials

    def __len__(self) -> int:
        return self.count

    def scene(self, index: int) -> toy.Scene:
        """One scene with its ground truth."""
        return toy.scene(self.seed, index, self.preset, **self.dials)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(self.scene(index).image).permute(2, 0, 1)

    def name(self, index: int) -> str:
        """What an error message calls it."""
        return f"toy scene {index} of seed {self.seed}"


def _toy(
    split: str | None, count: int = 256, seed: int = UNSEEN, preset: str = "scene", **dials: Any
) -> Labeled:
    """Toy scenes with their 8 classes; split "train" is the next seed."""
    scenes = ToyScenes(count, seed + (split == "train"), preset, **dials)
    return Labeled(scenes, partial(_semantic_of, scenes), toy.CLASS_NAMES)


DATASETS = {
    "coco_stuff": _coco_stuff,
    "coco_things": _coco_things,
    "voc": _voc,
    "bsds": _bsds,
    "folder": _folder,
    "toy": _toy,
}
TREES = {
    "coco_stuff": "val2017/*.jpg + stuffthingmaps_trainval2017/val2017/*.png",
    "coco_things": "val2017/*.jpg + annotations/instances_val2017.json",
    "voc": "VOC2012/{JPEGImages,SegmentationClass,ImageSets/Segmentation}",
    "bsds": "images/val/*.jpg + segments/val/*.png",
    "folder": "images/ + labels/ with equal names, labels as PNG",
}


# Labels by index. Functions of the module, since workers of a data loader may have to pickle them.
def _ids_of(files: Sequence[Path], index: int) -> np.ndarray:
    return read_ids(files[index])


def _coarse_of(files: Sequence[Path], index: int) -> np.ndarray:
    return FINE_TO_COARSE[_fine_ids(files[index])]


def _things_of(coco: Any, annotated: Sequence[dict], index: int) -> np.ndarray:
    label = np.full((annotated[index]["height"], annotated[index]["width"]), IGNORE)
    shapes = coco.imgToAnns[annotated[index]["id"]]
    for shape in sorted(shapes, key=lambda shape: -shape["area"]):  # small ones over large ones
        label[coco.annToMask(shape) > 0] = FINE_TO_COARSE[shape["category_id"] - 1]
    return label


def _semantic_of(scenes: ToyScenes, index: int) -> np.ndarray:
    return scenes.scene(index).semantic


def _image_files(folder: Path, paths: Sequence[str], files: Sequence[Path] = ()) -> ImageFiles:
    """The images, after a check that all of them and all of their label files are there."""
    for kind, expected in (("image", [folder / path for path in paths]), ("label", files)):
        missing = [file for file in expected if not file.is_file()]
        if missing:
            raise ValueError(f"{len(missing)} of {len(expected)} {kind}s are missing, "
                             f"first {missing[0]}")
    return ImageFiles(folder, np.array(paths))


def _found(folder: Path, dataset: str) -> tuple[Path, list[str]]:
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}: expected {TREES[dataset]}")
    root, paths, _ = find_images(folder)
    return root, paths.tolist()


def _fine_ids(path: Path) -> np.ndarray:
    ids = read_ids(path)
    if ids.size and not 0 <= ids.min() <= ids.max() <= IGNORE:
        raise ValueError(f"{path} has id {ids.max()}: COCO-Stuff goes from 0 to 181, and {IGNORE}")
    return ids


def _lines(file: str | Path) -> list[str]:
    try:  # "-sig": some editors begin a file with a mark, which is no part of the first name
        return Path(file).read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror.lower()}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not a text file: one name per line is expected") from None


def _year(split: str | None) -> str:
    """train -> train2017, as COCO names its folders."""
    split = split or "val"
    return split if split[-4:].isdigit() else f"{split}2017"
