"""Pictures in which every pixel has a label: COCO-Stuff's 27 classes and other data sets to measure grouping on.

Slide: "Understanding the semantic grouping ability: unsupervised semantic segmentation". Paper: table 5.
Differs: the authors released no evaluation code; the COCO-Stuff part is PiCIE's published protocol [P], the rest [U].
Read next: segments.py.

Labels are for measuring only: nothing here is seen by training.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.v2.functional as transforms
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from tqdm import tqdm

import toy
from engine.images import BadImage, ImageFiles, find_images
from measures.metrics import IGNORE

# ------------------------------------------------------------------- the table of COCO-Stuff

# Things first: 0..11, then stuff: 12..26. Food and furniture occur as both [P].
COARSE_NAMES = (
    "electronic", "appliance", "food (thing)", "furniture (thing)", "indoor", "kitchen", "accessory", "animal",
    "outdoor", "person", "sports", "vehicle", "ceiling", "floor", "food", "furniture", "raw material", "textile",
    "wall", "window", "building", "ground", "plant", "sky", "solid", "structural", "water",
)  # fmt: skip
FIRST_STUFF = 12


def _fine_to_coarse() -> np.ndarray:
    """The coarse class of the 182 fine ones; IGNORE stays, and every other id becomes -1. Returns (256) int64."""
    # Fine 0..90 are COCO's category ids minus one, in runs (coarse class, length); 91..181 one by one [P].
    runs = ((9, 1), (11, 8), (8, 6), (7, 10), (6, 8), (10, 10), (5, 8), (2, 10), (3, 10), (0, 6), (1, 6), (4, 8))
    things = [coarse for coarse, length in runs for _ in range(length)]
    stuff = [
        17, 17, 22, 20, 20, 22, 15, 25, 16, 13, 12, 12, 17, 17, 23, 15, 15, 17, 15, 21, 15, 25, 13, 13, 13, 13, 13, 22,
        26, 14, 14, 15, 22, 21, 21, 24, 20, 22, 15, 17, 16, 15, 22, 24, 21, 17, 25, 16, 21, 17, 22, 16, 21, 21, 25, 21,
        26, 21, 24, 20, 17, 14, 21, 26, 15, 23, 20, 21, 24, 15, 24, 22, 25, 15, 20, 17, 17, 22, 14, 18, 18, 18, 18, 18,
        18, 18, 26, 26, 19, 19, 24,
    ]  # fmt: skip
    table = np.full(256, -1)
    table[: len(things) + len(stuff)] = things + stuff
    table[IGNORE] = IGNORE
    return table


FINE_TO_COARSE = _fine_to_coarse()

# sha256 of PiCIE's list for val2017: 2,175 ids of 12 digits, one per line [P].
PUBLISHED_LIST = "7c629734c88f1a74bba6311e01d4d9fe976df84f07cb4fc86452ce5116e51655"


def is_curated(fine: np.ndarray) -> bool:
    """PiCIE's rule [P]: at least 360 pixels high and wide, and at least 3/4 of all pixels are stuff. fine (y x)."""
    coarse = FINE_TO_COARSE[fine]
    stuff = (coarse >= FIRST_STUFF) & (coarse != IGNORE)
    return min(fine.shape) >= 360 and stuff.mean() >= 0.75


def list_digest(names: Sequence[str]) -> str:
    """sha256 of a list of picture ids, one per line with a line end after each."""
    return hashlib.sha256("".join(f"{name}\n" for name in names).encode()).hexdigest()


# -------------------------------------------------------------------------- labelled pictures


@dataclass(frozen=True)
class Labelled:
    """A sequence of (image (3 y x) uint8, label (y x) int64 with IGNORE where there is none).

    class_names: of the ids 0..t-1; empty if the labels are segments without names, unlike from picture to picture.
    """

    images: Sequence[Tensor]
    read_label: Callable[[int], np.ndarray]  # index -> (y x) of ids
    class_names: tuple[str, ...]
    notice: str = ""  # what the reader of the numbers should know
    indices: tuple[int, ...] | None = None  # the pictures of a subset

    def __len__(self) -> int:
        return len(self.images if self.indices is None else self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Raises ValueError with one line: unreadable picture, unlike sizes, ids outside the classes."""
        index = index if self.indices is None else self.indices[index]
        try:
            image = self.images[index]
        except BadImage as bad:
            raise ValueError(f"cannot read {bad.name}: {bad.reason}") from None
        label, name = self.read_label(index), self.images.name(index)
        if label.shape != image.shape[-2:]:
            height, width = image.shape[-2:]
            found = " x ".join(str(side) for side in label.shape[::-1])
            raise ValueError(f"{name} is {width} x {height} but its label is {found}: they must show the same pixels")
        if self.class_names:
            ids = np.unique(label[label != IGNORE])
            if ids.size and not 0 <= ids[0] <= ids[-1] < len(self.class_names):
                wrong = ids[(ids < 0) | (ids >= len(self.class_names))][0]
                raise ValueError(f"the label of {name} has id {wrong}, outside 0..{len(self.class_names) - 1} and not "
                                 f"{IGNORE} (no label)")
        return image, torch.from_numpy(label.astype(np.int64))

    def subset(self, indices: Sequence[int]) -> Labelled:
        """The pictures at these places of the sequence."""
        own = range(len(self)) if self.indices is None else self.indices
        return replace(self, indices=tuple(own[i] for i in indices))


def read_ids(path: Path) -> np.ndarray:
    """The ids in a label picture, (y x) int64. Raises ValueError: unreadable, or colours instead of ids."""
    try:
        with Image.open(path) as picture:
            if picture.mode not in ("L", "P", "1", "I", "I;16"):
                raise ValueError(f"{path} holds colours ({picture.mode}), not class ids: one grey value per class")
            return np.asarray(picture).astype(np.int64)
    except (OSError, SyntaxError):
        raise ValueError(f"cannot read the label {path}") from None


def square(pair: tuple[Tensor, Tensor], size: int) -> tuple[Tensor, Tensor]:
    """Short side to `size`, centre cut out: (image (3 y x) bilinear, label (y x) nearest) -> sides of `size` [P]."""
    image, label = pair
    image = transforms.resize(image, [size], InterpolationMode.BILINEAR, antialias=True)
    # PIL's nearest, which the protocol used, takes the pixel under the centre: that is torchvision's "exact".
    label = transforms.resize(label[None], [size], InterpolationMode.NEAREST_EXACT)
    return transforms.center_crop(image, [size]), transforms.center_crop(label, [size])[0]


# ------------------------------------------------------------------------- the known data sets


def open_labelled(dataset: str, data_dir: str | Path | None, split: str | None = None, **options) -> Labelled:
    """The labelled pictures of a data set.

    dataset: a key of `DATASETS`; split: None for what is usually measured. options, each for one data set only: see
    its function. Raises ValueError with one line for a wrong tree.
    """
    if dataset not in DATASETS:
        raise ValueError(f"unknown labelled data set {dataset!r}: choose one of {', '.join(DATASETS)}")
    if dataset == "toy":
        return _toy(split, **options)
    if data_dir is None:
        raise ValueError(f"--data-dir is missing: the folder of {dataset}, laid out as {TREES[dataset]}")
    return DATASETS[dataset](Path(data_dir), split, **options)


def _coco_stuff(root: Path, split: str | None, list_file: str | Path | None = None) -> Labelled:
    """COCO-Stuff 27 on PiCIE's curated pictures; list_file: their ids one per line, else rebuilt by the rule."""
    split = _year(split)
    labels = root / "stuffthingmaps_trainval2017" / split
    if not labels.is_dir():
        raise ValueError(f"no labels in {labels}: expected {TREES['coco_stuff']}")
    if list_file is None:
        names = _curated(sorted(path for path in os.listdir(labels) if path.endswith(".png")), labels)
    else:
        names = [Path(line.strip()).stem for line in _lines(list_file) if line.strip()]
    if not names:
        raise ValueError(f"no picture of {labels} is curated: 360 px on both sides and 3/4 stuff")
    notice = "curated pictures"
    if split == "val2017" and list_digest(names) != PUBLISHED_LIST:
        notice += ", NOT the published list of 2,175: the numbers compare with no paper"
    fine = [labels / f"{name}.png" for name in names]
    images = _pictures(root / split, [f"{name}.jpg" for name in names], fine)
    return Labelled(images, partial(_coarse_of, fine), COARSE_NAMES, notice)


def _curated(files: Sequence[str], folder: Path) -> list[str]:
    """Ids of the label maps that the rule keeps, sorted. The size stands in a file's header, so it is asked first."""
    kept = []
    for name in tqdm(files, "curated list", unit="label", disable=None, leave=False):
        with contextlib.suppress(OSError), Image.open(folder / name) as picture:
            if min(picture.size) < 360:
                continue
        if is_curated(_fine_ids(folder / name)):
            kept.append(Path(name).stem)
    return kept


def _coco_things(root: Path, split: str | None) -> Labelled:
    """The 12 coarse thing classes painted from COCO's instance annotations; everything else is ignored [U]."""
    from pycocotools.coco import COCO

    split = _year(split)
    file = root / "annotations" / f"instances_{split}.json"
    if not file.is_file():
        raise ValueError(f"no {file}: expected {TREES['coco_things']}")
    with contextlib.redirect_stdout(None):  # it reports its progress to stdout, where our result goes
        coco = COCO(file)
    pictures = sorted((p for p in coco.imgs.values() if coco.imgToAnns[p["id"]]), key=lambda p: p["file_name"])
    images = _pictures(root / split, [picture["file_name"] for picture in pictures])
    paint = partial(_things_of, coco, pictures)
    return Labelled(images, paint, COARSE_NAMES[:FIRST_STUFF], "things only, everything else is left out")


VOC_NAMES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


def _voc(root: Path, split: str | None) -> Labelled:
    """PASCAL VOC 2012, 21 classes with the background; root is VOCdevkit or VOC2012."""
    root = root / "VOC2012" if (root / "VOC2012").is_dir() else root
    listed = root / "ImageSets" / "Segmentation" / f"{split or 'val'}.txt"
    if not listed.is_file():
        raise ValueError(f"no {listed}: expected {TREES['voc']}")
    names = [line.strip() for line in _lines(listed) if line.strip()]
    labels = [root / "SegmentationClass" / f"{name}.png" for name in names]
    images = _pictures(root / "JPEGImages", [f"{name}.jpg" for name in names], labels)
    return Labelled(images, partial(_ids_of, labels), VOC_NAMES)


def _bsds(root: Path, split: str | None) -> Labelled:
    """Berkeley's photographs, cut into segments by one person each; the segments have no names."""
    split = split or "val"
    folder, paths = _found(root / "images" / split, "bsds")
    labels = [root / "segments" / split / f"{Path(path).stem}.png" for path in paths]
    return Labelled(_pictures(folder, paths, labels), partial(_ids_of, labels), ())


def _folder(root: Path, split: str | None, num_classes: int | None = None) -> Labelled:
    """Any images/ + labels/ with equal names; classes.txt, one name per line, or num_classes says what the ids mean.

    split: a folder within both, if they have it; else "train" and "val" are four fifths and one fifth, and None all.
    """
    inner = split if split and (root / "images" / split).is_dir() else "."
    folder, paths = _found(root / "images" / inner, "folder")
    labels = [root / "labels" / inner / Path(path).with_suffix(".png") for path in paths]
    images = _pictures(folder, paths, labels)
    names = [line.strip() for line in _lines(root / "classes.txt")] if (root / "classes.txt").is_file() else []
    if num_classes is None and not names:
        ids = [read_ids(label) for label in tqdm(labels, "classes", unit="label", disable=None, leave=False)]
        num_classes = 1 + max((int(each[each != IGNORE].max(initial=0)) for each in ids), default=0)
    names = names or [f"class {number}" for number in range(num_classes)]
    whole = Labelled(images, partial(_ids_of, labels), tuple(names))
    if inner != "." or split is None:
        return whole
    if split not in ("train", "val"):
        raise ValueError(f"no folder {root / 'images' / split}, and without it a split is train or val")
    return whole.subset([i for i in range(len(whole)) if (i % 5 == 0) == (split == "val")])


UNSEEN = 2**32  # seeds of training runs end at 2^31


class ToyScenes:
    """Scenes drawn when they are asked for, by default with a seed that no training run can have."""

    def __init__(self, count: int, seed: int = UNSEEN, preset: str = "scene", **dials):
        self.seed, self.count, self.preset, self.dials = seed, count, preset, dials

    def __len__(self) -> int:
        return self.count

    def scene(self, index: int) -> toy.Scene:
        return toy.scene(self.seed, index, self.preset, **self.dials)

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(self.scene(index).image).permute(2, 0, 1)

    def name(self, index: int) -> str:
        return f"toy scene {index} of seed {self.seed}"


def _toy(split: str | None, count: int = 256, seed: int = UNSEEN, preset: str = "scene", **dials) -> Labelled:
    """Toy scenes with their 8 classes; split "train" is the next seed."""
    scenes = ToyScenes(count, seed + (split == "train"), preset, **dials)
    return Labelled(scenes, partial(_semantic_of, scenes), toy.CLASS_NAMES)


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


# Labels by index. Module-level functions, since worker processes of a data loader may have to pickle them.
def _ids_of(files: Sequence[Path], index: int) -> np.ndarray:
    return read_ids(files[index])


def _coarse_of(files: Sequence[Path], index: int) -> np.ndarray:
    return FINE_TO_COARSE[_fine_ids(files[index])]


def _things_of(coco, pictures: Sequence[dict], index: int) -> np.ndarray:
    label = np.full((pictures[index]["height"], pictures[index]["width"]), IGNORE)
    shapes = coco.imgToAnns[pictures[index]["id"]]
    for shape in sorted(shapes, key=lambda shape: -shape["area"]):  # small over large, or the plate hides the food
        label[coco.annToMask(shape) > 0] = FINE_TO_COARSE[shape["category_id"] - 1]
    return label


def _semantic_of(scenes: ToyScenes, index: int) -> np.ndarray:
    return scenes.scene(index).semantic


def _pictures(folder: Path, paths: Sequence[str], labels: Sequence[Path] = ()) -> ImageFiles:
    """The pictures, once all of them and all of their labels are seen to be there."""
    for kind, files in (("picture", [folder / path for path in paths]), ("label", labels)):
        missing = [file for file in files if not file.is_file()]
        if missing:
            raise ValueError(f"{len(missing)} of {len(files)} {kind}s are missing, first {missing[0]}")
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
    try:
        return Path(file).read_text().splitlines()
    except OSError as error:
        raise ValueError(f"cannot read {file}: {error.strerror.lower()}") from None


def _year(split: str | None) -> str:
    """train -> train2017, as COCO names its folders."""
    split = split or "val"
    return split if split[-4:].isdigit() else f"{split}2017"
