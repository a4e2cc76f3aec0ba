"""Labeled data sets to fine-tune on, in the layouts that their owners publish.

Slides: tables 2, 3 and 4. Paper: section 4.2.
Differs: read from the original files; Cityscapes' and ADE20K's numbers become class numbers here,
so nothing has to be prepared. A tree that is not as expected is refused with what was expected and
what was found.
"""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as encoding
from pycocotools.coco import COCO
from torch import Tensor

from engine.images import BadImage, ImageFiles
from measures import labels
from measures.labels import VOC_NAMES, Labeled, read_ids
from measures.metrics import IGNORE

TREES = {  # what --data-dir must hold
    "voc": "JPEGImages/*.jpg + SegmentationClassAug/*.png + SegmentationClass/*.png + "
    "ImageSets/Segmentation/{train_aug,val}.txt, in it or in its VOC2012 or VOCdevkit/VOC2012",
    "cityscapes": "leftImg8bit/{train,val}/CITY/*_leftImg8bit.png + "
    "gtFine/{train,val}/CITY/*_gtFine_labelIds.png",
    "ade20k": "images/{training,validation}/*.jpg + annotations/{training,validation}/*.png, "
    "in it or in its ADEChallengeData2016",
    "folder": "images/ + labels/ with equal names, labels as PNG, and classes.txt with a name per "
    "line; both may have folders train and val, else every fifth image is for testing",
    "coco": "{train2017,val2017}/*.jpg + annotations/instances_{train2017,val2017}.json",
}


def wrong_tree(dataset: str, root: Path, reason: str) -> ValueError:
    """The complaint about a folder: what is wrong, what was expected, what was found."""
    top = root
    while not top.is_dir() and top != top.parent:
        top = top.parent
    names = sorted(entry.name + "/" * entry.is_dir() for entry in os.scandir(top))
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ValueError(
        f"{reason}; --dataset {dataset} expects in --data-dir: {TREES[dataset]}; found in {top}: "
        f"{', '.join(names[:8]) or 'nothing'}{more}"
    )


# ------------------------------------------------------------------------ a class for every pixel


def open_segmentation(
    dataset: str,
    data_dir: str | Path,
    part: str,
    train_list: str = "train_aug",
    scenes: int = 768,
    seed: int = 0,
) -> Labeled:
    """The labeled images of one part, "train" or "val": pairs of image (3 y x) uint8 and label (y
    x) int64.

    train_list: VOC's list for training; scenes, seed: of toy scenes. Raises ValueError for a wrong
    tree.
    """
    root = Path(data_dir)
    if dataset == "toy":
        count = scenes if part == "train" else 256
        return labels.open_labeled("toy", None, part, count=count)
    if not root.is_dir():
        raise wrong_tree(dataset, root, f"no folder {root}")
    if dataset == "folder":
        for name in ("images", "labels"):
            if not (root / name).is_dir():
                raise wrong_tree(dataset, root, f"no folder {root / name}")
        return labels.open_labeled("folder", root, part)
    return {"voc": voc, "cityscapes": cityscapes, "ade20k": ade20k}[dataset](root, part, train_list)


def voc(root: Path, part: str, train_list: str) -> Labeled:
    """PASCAL VOC 2012, 21 classes with the background; `train_aug` is the 10,582 images of SBD and
    VOC together."""
    top = inside(root, "VOCdevkit/VOC2012", "VOC2012")
    names = {"train": (train_list, train_list.replace("_", "")), "val": ("val",)}[
        part
    ]  # some write trainaug.txt
    lists = [top / "ImageSets" / "Segmentation" / f"{name}.txt" for name in names]
    file = next((file for file in lists if file.is_file()), None)
    if file is None:
        hint = "; --train-list train takes VOC's own 1,464 images" if "aug" in names[0] else ""
        raise wrong_tree("voc", top, f"no {lists[0]}{hint}")
    names = [line.split()[0] for line in file.read_text().splitlines() if line.strip()]
    folder = top / ("SegmentationClassAug" if "aug" in file.stem else "SegmentationClass")
    # Some lists name paths from the top: "/JPEGImages/x.jpg /SegmentationClassAug/x.png".
    stems = [Path(name).stem for name in names]
    images = [f"{stem}.jpg" for stem in stems]
    return paired(
        "voc",
        top,
        top / "JPEGImages",
        images,
        [folder / f"{stem}.png" for stem in stems],
        VOC_NAMES,
        np.arange(256),
    )


CITYSCAPES = {  # name -> the number in *_labelIds.png; everything else is not evaluated
    "road": 7,
    "sidewalk": 8,
    "building": 11,
    "wall": 12,
    "fence": 13,
    "pole": 17,
    "traffic light": 19,
    "traffic sign": 20,
    "vegetation": 21,
    "terrain": 22,
    "sky": 23,
    "person": 24,
    "rider": 25,
    "car": 26,
    "truck": 27,
    "bus": 28,
    "train": 31,
    "motorcycle": 32,
    "bicycle": 33,
}


def cityscapes(root: Path, part: str, train_list: str = "") -> Labeled:
    """Cityscapes' fine annotations, 19 classes; 2,975 images to train on, 500 to test."""
    folder = root / "leftImg8bit" / part
    images = sorted(str(path.relative_to(folder)) for path in folder.glob("*/*_leftImg8bit.png"))
    if not images:
        raise wrong_tree(
            "cityscapes", folder if folder.is_dir() else root, f"no {folder}/CITY/*_leftImg8bit.png"
        )
    marks = root / "gtFine" / part
    files = [marks / name.replace("_leftImg8bit.png", "_gtFine_labelIds.png") for name in images]
    table = np.full(256, IGNORE)
    table[list(CITYSCAPES.values())] = range(len(CITYSCAPES))
    return paired("cityscapes", root, folder, images, files, tuple(CITYSCAPES), table)


def ade20k(root: Path, part: str, train_list: str = "") -> Labeled:
    """ADE20K's scene parsing, 150 classes; 0 in its files means none of them. 20,210 images to
    train on, 2,000 to test."""
    top = inside(root, "ADEChallengeData2016")
    part = {"train": "training", "val": "validation"}[part]
    folder = top / "images" / part
    images = sorted(path.name for path in folder.glob("*.jpg"))
    if not images:
        raise wrong_tree("ade20k", folder if folder.is_dir() else top, f"no {folder}/*.jpg")
    files = [top / "annotations" / part / f"{Path(name).stem}.png" for name in images]
    table = np.full(256, -1)  # a number above 150 is refused where it is read
    table[0], table[1:151] = IGNORE, range(150)
    return paired(
        "ade20k", top, folder, images, files, tuple(f"class {i + 1}" for i in range(150)), table
    )


def inside(root: Path, *names: str) -> Path:
    """The first of these folders under root that is there, else root."""
    return next((root / name for name in names if (root / name).is_dir()), root)


def paired(
    dataset: str,
    root: Path,
    folder: Path,
    images: Sequence[str],
    files: Sequence[Path],
    names: tuple[str, ...],
    table: np.ndarray,
) -> Labeled:
    """Images (paths under folder) with their label files; table (256): number in the file -> class
    or IGNORE."""
    for kind, paths in (("image", [folder / name for name in images]), ("label", files)):
        there: dict[Path, set[str]] = {}
        for parent in {path.parent for path in paths}:
            there[parent] = set(os.listdir(parent)) if parent.is_dir() else set()
        missing = [path for path in paths if path.name not in there[path.parent]]
        if missing:
            raise wrong_tree(
                dataset,
                root,
                f"{len(missing)} of {len(paths)} {kind}s are missing, first {missing[0]}",
            )
    return Labeled(
        ImageFiles(folder, np.array(images)), partial(classes_in, tuple(files), table), names
    )


def classes_in(files: Sequence[Path], table: np.ndarray, index: int) -> np.ndarray:
    """(y x) class numbers of one label file. Raises ValueError for a number that the table has not:
    it is -1 there, or beyond its end."""
    ids = read_ids(files[index])
    known = (ids >= 0) & (ids < len(table))
    classes = np.where(known, table[np.where(known, ids, 0)], -1)
    if (classes < 0).any():
        raise ValueError(f"{files[index]} has id {ids[classes < 0][0]}, which is no class")
    return classes


def with_equal_classes(seen: Labeled, unseen: Labeled) -> tuple[Labeled, Labeled, str]:
    """Both parts with the classes of the one that has more, and a line where they differed.

    Without classes.txt each part counts the ids of its own labels, and the network must have a
    score for every class of both.
    """
    counts = len(seen.class_names), len(unseen.class_names)
    if counts[0] == counts[1]:
        return seen, unseen, ""
    names = max(seen.class_names, unseen.class_names, key=len)
    notice = (
        f"{len(names)} of both parts together: the ids of train end at {counts[0] - 1}, those of "
        f"val at {counts[1] - 1}; a classes.txt would set their number"
    )
    return replace(seen, class_names=names), replace(unseen, class_names=names), notice


def some_of(count: int, wanted: int, seed: int) -> list[int]:
    """The indices of `wanted` random ones among `count`, sorted; all of them for wanted 0. Raises
    ValueError."""
    if wanted > count:
        raise ValueError(f"--labeled {wanted}, but there are {count} labeled images")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[: wanted or count].sort().values.tolist()


class Training:
    """Labeled images for the loader: one that cannot be used becomes a BadImage, which is replaced
    and named.

    labeled: a sequence that raises ValueError; name(index) of what it holds.
    """

    def __init__(self, labeled: Any):
        self.labeled = labeled

    def __len__(self) -> int:
        return len(self.labeled)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.labeled[index]
        except ValueError as error:
            raise BadImage(f"labeled image {index}", str(error)) from None


# ------------------------------------------------------------------------ boxes and masks


class Packed:
    """A list of plain values in one block of memory, which worker processes share: a list of
    dictionaries would be copied into each of them, page by page, as it is looked at."""

    def __init__(self, values: Iterable[Any]):
        pieces = [pickle.dumps(value, protocol=5) for value in values]
        self.ends = np.cumsum([len(piece) for piece in pieces])
        self.block = np.frombuffer(b"".join(pieces), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> Any:
        start = self.ends[index - 1] if index else 0
        return pickle.loads(self.block[start : self.ends[index]])  # our own, made above


class CocoObjects:
    """COCO's images with the boxes and masks of their objects.

    Items are (image (3 y x) uint8, target): boxes (n 4) float32 x1 y1 x2 y2 px, labels (n) int64 in
    1..t, masks (n y x) uint8, image_id () int64. Crowds are left out, as are boxes without an area.
    trained: only images that have an object left; judged: keep `truth`, what pycocotools needs to
    judge others, as large as the file. Raises ValueError for a wrong tree, and for an annotation
    that cannot be used, with its id.
    """

    def __init__(self, data_dir: str | Path, part: str, trained: bool, judged: bool):
        root, split = Path(data_dir), f"{part}2017"
        file = root / "annotations" / f"instances_{split}.json"
        if not file.is_file():
            raise wrong_tree("coco", root, f"no {file}")
        with contextlib.redirect_stdout(None):  # it reports its progress to stdout
            try:
                truth = COCO(file)
                self.categories = sorted(truth.getCatIds())  # label t is categories[t - 1]
            except (ValueError, KeyError, TypeError, AssertionError) as error:
                raise ValueError(f"{file} holds no annotations of COCO: {error!r}") from None
        refuse_annotations(truth, file, judged)
        self.truth = truth if judged else None
        ids = sorted(truth.getImgIds())
        self.ids = [i for i in ids if not trained or any(map(is_object, truth.imgToAnns[i]))]
        folder = root / split
        present = set(os.listdir(folder)) if folder.is_dir() else set()
        names = [truth.imgs[i]["file_name"] for i in self.ids]
        missing = [name for name in names if name not in present]
        if missing or not names:
            first = missing[0] if missing else "none is listed"
            reason = f"{len(missing)} of {len(names)} images are missing in {folder}, {first}"
            raise wrong_tree("coco", folder if folder.is_dir() else root, reason)
        self.images = ImageFiles(folder, np.array(names))
        self.about = Packed(self.summary(truth, i) for i in self.ids)
        self.places = range(len(self.ids))  # in images and about

    def summary(self, truth: COCO, image_id: int) -> tuple[int, int, list[tuple]]:
        """Height, width, and of each object: box x y width height px, label, outline or runs."""
        image, found = truth.imgs[image_id], filter(is_object, truth.imgToAnns[image_id])
        objects = [
            (a["bbox"], self.categories.index(a["category_id"]) + 1, a["segmentation"])
            for a in found
        ]
        return image["height"], image["width"], objects

    def __len__(self) -> int:
        return len(self.ids)

    def subset(self, indices: Sequence[int]) -> CocoObjects:
        """The images at these places of the sequence."""
        other = copy.copy(self)
        other.ids = [self.ids[i] for i in indices]
        other.places = [self.places[i] for i in indices]
        return other

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Raises ValueError: an unreadable image, or one of another size than its annotations."""
        place = self.places[index]
        try:
            image = self.images[place]
        except BadImage as bad:
            raise ValueError(f"cannot read {bad}") from None
        y, x, found = self.about[place]
        if image.shape[-2:] != (y, x):
            raise ValueError(
                f"{self.images.name(place)} is {image.shape[2]} x {image.shape[1]}, but its "
                f"annotations are of {x} x {y}"
            )
        boxes = torch.tensor([box for box, _, _ in found], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        try:
            masks = [mask_of(shape, y, x) for _, _, shape in found]
        except ValueError as error:
            raise ValueError(f"an object of {self.images.name(place)}: {error}") from None
        target = dict(
            boxes=boxes,
            labels=torch.tensor([label for _, label, _ in found], dtype=torch.long),
            masks=torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, y, x).byte(),
            image_id=torch.tensor(self.ids[index]),
        )
        return image, target


def is_object(annotation: dict[str, Any]) -> bool:
    """Whether it is learned from: no crowd, and a box that has an area."""
    _, _, width, height = annotation["bbox"]
    return not annotation.get("iscrowd") and width > 0 and height > 0


FAR = 1e6  # px; pycocotools needs memory for every pixel of an outline, and all of it for nan


def refuse_annotations(truth: COCO, file: Path, judged: bool) -> None:
    """Raises ValueError for the first annotation that cannot be used, with its id and the file.

    judged: crowds, and objects without an area, must be whole too, since pycocotools reads them.
    Where iscrowd is missing, it becomes 0.
    """
    categories = set(truth.getCatIds())
    for image_id in sorted(truth.getImgIds()):
        image = truth.imgs[image_id]
        lacks = [name for name in ("file_name", "height", "width") if name not in image]
        if lacks:
            raise ValueError(f"image {image_id} in {file} has no {lacks[0]}")
        for annotation in truth.imgToAnns[image_id]:
            reason = wrong_in(annotation, categories, image["height"], image["width"], judged)
            if reason:
                raise ValueError(f"annotation {annotation['id']} in {file} {reason}")
            annotation.setdefault("iscrowd", 0)


def wrong_in(
    annotation: dict[str, Any], categories: Collection[int], y: int, x: int, judged: bool
) -> str:
    """Why an annotation of an image of y x px cannot be used, in a few words, or ""."""
    box = annotation.get("bbox")
    if not (isinstance(box, list) and len(box) == 4 and are_px(box)):
        return f"has no bbox of four numbers: {box!r:.60}"
    if not judged and not is_object(annotation):
        return ""
    if judged and not isinstance(annotation.get("area"), (int, float)):
        return "has no area"
    category = annotation.get("category_id")
    if is_object(annotation) and category not in categories:
        return f"has category_id {category!r}, which is none of its categories"
    shape = annotation.get("segmentation")
    if isinstance(shape, dict):
        size = shape.get("size")
        if not isinstance(shape.get("counts"), (list, str)) or size != [y, x]:
            return f"has no runs of its image, which is {y} high and {x} wide: size is {size!r:.60}"
    elif not isinstance(shape, list) or not shape:
        return f"has no outline: its segmentation is {shape!r:.60}"
    elif not all(isinstance(part, list) and are_px(part) for part in shape):
        return f"has an outline that is no list of numbers: {shape!r:.60}"
    elif len(shape[0]) < 6:  # pycocotools looks at the first only
        return f"has an outline of {len(shape[0])} numbers: three corners need 6"
    return ""


def are_px(numbers: Sequence[Any]) -> bool:
    """Whether all of them are numbers of pixels: not nan, and not absurd."""
    try:
        return all(-FAR < number < FAR for number in numbers)
    except TypeError:
        return False


def mask_of(shape: Any, y: int, x: int) -> np.ndarray:
    """(y x) uint8 of an outline (lists of x1 y1 x2 y2 ... px), or of runs, compressed or not.

    Raises ValueError for what is neither.
    """
    try:
        if isinstance(shape, list):
            shape = encoding.merge(encoding.frPyObjects(shape, y, x))
        elif isinstance(shape["counts"], list):
            shape = encoding.frPyObjects(shape, y, x)
        return encoding.decode(shape)
    except Exception as error:  # pycocotools raises the class itself, among others
        raise ValueError(f"no usable outline ({error}): {shape!r:.60}") from None
