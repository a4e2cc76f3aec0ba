"""The guard of annotation files in COCO's form, for pycocotools checks nothing: it fails late, or
reads memory that nobody has written.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

FAR = 1e6  # px: pycocotools needs memory for every pixel of an outline, and all of it for nan
RULES = {  # of a value v, with its image and the categories: what it must be, and whether it is
    "images": {
        "file_name": ("a name", lambda v, *_: isinstance(v, str)),
        "height": ("a number of px", lambda v, *_: 0 < v < FAR),
        "width": ("a number of px", lambda v, *_: 0 < v < FAR),
    },
    "annotations": {
        "image_id": ("the id of one of its images", lambda v, image, known: image is not None),
        "category_id": ("the id of one of its categories", lambda v, image, known: v in known),
        "bbox": ("x y width height in px, the last two not negative",  # COCO has some that are 0
                 lambda v, *_: are_px(v) and len(v) == 4 and min(v[2:]) >= 0),
        "area": ("a number of px, 0 or more", lambda v, *_: 0 <= v < math.inf),
        "segmentation": ("outlines of three corners or more, or runs that fill its image",
                         lambda v, image, known: is_shape(v, image)),
    },
}  # fmt: skip


def read_annotations(file: Path) -> dict[str, Any]:
    """The contents of a file in COCO's form; iscrowd may be missing.

    Raises ValueError with one line for the first thing that cannot be used: its id and the file.
    """
    try:
        contents = json.loads(file.read_bytes())
        ids = {kind: Counter(each.get("id") for each in contents[kind])
               for kind in ("categories", *RULES)}  # fmt: skip
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} holds no annotations in COCO's form: {error!r:.100}") from None
    for kind, counts in ids.items():
        for number, count in counts.items():
            if count > 1 or not isinstance(number, int):
                raise ValueError(f"{file}: {count} of its {kind} have the id {number}")
    images = {image["id"]: image for image in contents["images"]}
    for kind, rules in RULES.items():
        for entry in contents[kind]:
            for key, (expected, holds) in rules.items():
                value = entry.get(key)
                try:
                    fine = holds(value, images.get(entry.get("image_id")), ids["categories"])
                except (TypeError, ValueError, LookupError):
                    fine = False
                if not fine:
                    wrong = f"{key} must be {expected}, found {value!r:.60}"
                    raise ValueError(f"{kind[:-1]} {entry['id']} in {file}: {wrong}")
    return contents


def are_px(numbers: list[float]) -> bool:
    """Whether all of them are numbers of pixels: not nan, and not absurd."""
    return all(-FAR < number < FAR for number in numbers)


def is_shape(shape: Any, image: dict[str, Any]) -> bool:
    """Outlines x1 y1 x2 y2 ..., or runs down the columns whose sum is the image."""
    if isinstance(shape, list):  # pycocotools decides by the first outline what all of them are
        return all(are_px(part) and part for part in shape) and len(shape[0]) >= 6
    y, x = image["height"], image["width"]
    runs = shape["counts"] if isinstance(shape["counts"], list) else unpacked(shape["counts"])
    return shape["size"] == [y, x] and min(runs) >= 0 and sum(runs) == y * x


def unpacked(text: str) -> list[int]:
    """The runs in COCO's compressed text: five bits a letter, from the third run on differences."""
    runs, value, shift = [], 0, 0
    for bits in (ord(letter) - 48 for letter in text):
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:  # the last letter of a run; 16 is its sign
            value -= (1 << shift) * bool(bits & 16)
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs
