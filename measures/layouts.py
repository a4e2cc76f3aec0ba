"""The labeled data sets, one row each: a new data set is a new row. No torch is imported here."""

from collections.abc import Mapping
from typing import NamedTuple

import toy

IGNORE = 255  # a pixel without a class, in label files of COCO-Stuff, VOC, Cityscapes and ADE20K
WRONG = -1  # an id that no label file may have


class Layout(NamedTuple):
    """Where images and labels lie. {split}: a folder; {name}: of an image below `images`."""

    images: str  # folder of the images
    labels: str  # file of a label map
    classes: tuple[str, ...] | None  # (): segments without classes; None: the folder names them
    ids: tuple[int, ...] = ()  # id in a file -> class, IGNORE or WRONG; (): ids are classes
    suffix: str = ""  # of the image files; "": any image
    tops: tuple[str, ...] = ()  # folders of --data-dir in which the tree may stand
    listed: str = ""  # text file with the names of a split; "": all images of the folder
    splits: Mapping[str, str] = {}  # split -> its folder, where the two differ
    other_labels: Mapping[str, str] = {}  # split -> `labels`, where it has others
    curated: bool = False  # PiCIE's rule chooses the images

    @property
    def tree(self) -> str:
        """What --data-dir holds, in words."""
        parts = filter(None, (f"{self.images}/*{self.suffix}", self.labels, self.listed))
        folders = ",".join(self.splits.values()) or "train,val"
        tree = " + ".join(parts).replace("{split}", f"{{{folders}}}").replace("{name}", "*")
        tree += " (without train and val, too)" if self.classes is None else ""
        tree += " (transfer.py without train_aug: --train-list train)" * bool(self.other_labels)
        return " or in ".join([tree, *self.tops])


def unlabeled(what: str) -> ValueError:
    """The error where no pixel has a class; what: the labels, in words."""
    return ValueError(f"nothing is labeled: all pixels of {what} are {IGNORE} (no class)")


# COCO-Stuff 27. Things first, then stuff: 12..26. Food and furniture occur as both [P: PiCIE].
COARSE_NAMES = (
    "electronic", "appliance", "food (thing)", "furniture (thing)", "indoor", "kitchen",
    "accessory", "animal", "outdoor", "person", "sports", "vehicle", "ceiling", "floor", "food",
    "furniture", "raw material", "textile", "wall", "window", "building", "ground", "plant", "sky",
    "solid", "structural", "water",
)  # fmt: skip
FIRST_STUFF = 12

# Fine 0..90 are COCO's category ids minus one, in runs (coarse class, length); 91..181 are listed
# one by one [P: PiCIE].
_RUNS = (
    (9, 1), (11, 8), (8, 6), (7, 10), (6, 8), (10, 10), (5, 8), (2, 10), (3, 10), (0, 6), (1, 6),
    (4, 8),
)  # fmt: skip
_STUFF = (
    17, 17, 22, 20, 20, 22, 15, 25, 16, 13, 12, 12, 17, 17, 23, 15, 15, 17, 15, 21, 15, 25, 13,
    13, 13, 13, 13, 22, 26, 14, 14, 15, 22, 21, 21, 24, 20, 22, 15, 17, 16, 15, 22, 24, 21, 17,
    25, 16, 21, 17, 22, 16, 21, 21, 25, 21, 26, 21, 24, 20, 17, 14, 21, 26, 15, 23, 20, 21, 24,
    15, 24, 22, 25, 15, 20, 17, 17, 22, 14, 18, 18, 18, 18, 18, 18, 18, 26, 26, 19, 19, 24,
)  # fmt: skip
_FINE = (*(coarse for coarse, length in _RUNS for _ in range(length)), *_STUFF)
FINE_TO_COARSE = (*_FINE, *[WRONG] * (IGNORE - len(_FINE)), IGNORE)

VOC_NAMES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair",
    "cow", "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
    "train", "tvmonitor",
)  # fmt: skip

CITYSCAPES = {  # name -> id in *_labelIds.png; other ids are not evaluated
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17,
    "traffic light": 19, "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23,
    "person": 24, "rider": 25, "car": 26, "truck": 27, "bus": 28, "train": 31, "motorcycle": 32,
    "bicycle": 33,
}  # fmt: skip
_EVALUATED = tuple(CITYSCAPES.values())

# fmt: off
LABELED = {
    "toy": Layout("", "", toy.CLASS_NAMES),
    "folder": Layout("images/{split}", "labels/{split}/{name}.png", None),
    "coco_stuff": Layout(
        "{split}", "stuffthingmaps_trainval2017/{split}/{name}.png", COARSE_NAMES, FINE_TO_COARSE,
        suffix=".jpg", splits={"train": "train2017", "val": "val2017"}, curated=True),
    "voc": Layout(
        "JPEGImages", "SegmentationClass/{name}.png", VOC_NAMES,
        suffix=".jpg", tops=("VOC2012", "VOCdevkit/VOC2012"),
        listed="ImageSets/Segmentation/{split}.txt",
        other_labels=dict.fromkeys(("train_aug", "trainaug"), "SegmentationClassAug/{name}.png")),
    "cityscapes": Layout(
        "leftImg8bit/{split}", "gtFine/{split}/{name}_gtFine_labelIds.png", tuple(CITYSCAPES),
        tuple(_EVALUATED.index(i) if i in _EVALUATED else IGNORE for i in range(256)),
        suffix="_leftImg8bit.png"),
    "ade20k": Layout(
        "images/{split}", "annotations/{split}/{name}.png",
        tuple(f"class {number}" for number in range(1, 151)),
        (IGNORE, *range(150)),  # 0 is none of the classes
        suffix=".jpg", tops=("ADEChallengeData2016",),
        splits={"train": "training", "val": "validation"}),
    "bsds": Layout("images/{split}", "segments/{split}/{name}.png", ()),
}
# fmt: on
