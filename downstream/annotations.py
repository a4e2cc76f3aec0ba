"""The guard of annotation files in COCO's form: pycocotools checks nothing, and fails late or reads
memory that nobody has written.
"""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

FAR = 1e6  # px: pycocotools needs memory for every pixel of an outline, and all of it for nan
RULES = {  # whether a value v can be used, by its image and the known categories
    "images": {
        "file_name": lambda v, *_: isinstance(v, str),
        "height": lambda v, *_: 0 < v < FAR,
        "width": lambda v, *_: 0 < v < FAR,
    },
    "annotations": {
        "image_id": lambda v, image, known: image is not None,
        "category_id": lambda v, image, known: v in known,
        "bbox": lambda v, *_: are_px(v) and len(v) == 4 and min(v[2:]) >= 0,  # COCO has some of 0
        "area": lambda v, *_: 0 <= v < math.inf,
        "segmentation": lambda v, image, known: is_shape(v, image),
    },
}


def read_annotations(file: Path) -> dict[str, Any]:
    """The contents of a file in COCO's form. Raises ValueError for the first wrong thing."""
    try:
        contents = json.loads(file.read_bytes())
        kinds = ("categories", *RULES)
        ids = {kind: Counter(each.get("id") for each in contents[kind]) for kind in kinds}
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} holds no annotations in COCO's form: {error!r:.100}") from None
    for kind, counts in ids.items():
        for number, count in counts.items():
            if count > 1 or not isinstance(number, int):
                raise ValueError(f"{file}: {count} of its {kind} have the id {number}")
    images = {image["id"]: image for image in contents["images"]}
    for kind, rules in RULES.items():
        for entry in contents[kind]:
            for key, holds in rules.items():
                value = entry.get(key)
                try:
                    fine = holds(value, images.get(entry.get("image_id")), ids["categories"])
                except (TypeError, ValueError, LookupError):
                    fine = False
                if not fine:
                    about = f"{kind[:-1]} {entry['id']} in {file}"
                    raise ValueError(f"{about}: {key} cannot be {value!r:.60}")
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
