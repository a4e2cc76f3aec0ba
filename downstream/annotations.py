"""The guard of COCO's annotations: on wrong ones pycocotools waits for ever or reads any memory."""

import contextlib
import json
import math
from pathlib import Path
from typing import Any

from pycocotools import mask as encoding

from engine.log import progress

Known = dict[str, dict[int, dict]]  # kind -> id -> entry, of what was checked
OVERHANG = 2  # px that a box may leave its image [U]
OVERLAP = 0.2  # IoU of a box with the one around its mask, at least: corners and shares have less


def read_annotations(file: Path) -> dict[str, Any]:
    """The contents of a file in COCO's form; boxes below a pixel are left out, and annotations get
    ids from 1 on: COCOeval takes 0 for none. Raises ValueError for the first wrong thing; OSError.
    """
    try:
        contents = json.loads(file.read_bytes())
        entries = {kind: list(map(dict, contents[kind])) for kind in RULES}
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} holds no annotations in COCO's form: {error!r:.100}") from None
    known: Known = {}
    for kind, rules in RULES.items():
        known[kind] = known["own"] = {}
        for entry in progress(entries[kind], len(entries[kind]), f"{file.name}, {kind}"):
            for key, (expected, holds) in rules.items():
                value = entry.get(key)
                with contextlib.suppress(Exception):  # a value may be of any type
                    if holds(value, entry, known):
                        continue
                about = f"{file}, {kind}, id {entry.get('id')!r:.60}: {key} cannot be {value!r:.60}"
                raise ValueError(f"{about}; expected {expected.format_map(entry)}")
            known[kind][entry["id"]] = entry
    large = [entry for entry in entries["annotations"] if min(entry["bbox"][2:]) >= 1]
    if 2 * len(large) <= len(entries["annotations"]):
        found = f"{file}: only {len(large)} of {len(entries['annotations'])} boxes have a pixel"
        raise ValueError(f"{found}; expected x y width height in px")
    for number, entry in enumerate(large, 1):
        entry.update(id=number, iscrowd=entry.get("iscrowd") or 0)
    return {"info": {}, **entries, "annotations": large}  # pycocotools 2.0.10 reads "info"


def is_inside(box: Any, entry: dict, known: Known) -> bool:
    """Whether x y width height, px, lie in the image."""
    (x, y, w, h), image = box, known["images"][entry["image_id"]]
    right, bottom = image["width"] + OVERHANG, image["height"] + OVERHANG
    return min(w, h) >= 0 and min(x, y) >= -OVERHANG and x + w <= right and y + h <= bottom


def is_there(shape: Any, entry: dict, known: Known) -> bool:
    """Whether outlines x1 y1 x2 y2 ..., or runs down the columns that fill the image, are there."""
    image = known["images"][entry["image_id"]]
    y, x = size = [image["height"], image["width"]]
    if isinstance(shape, list):  # pycocotools decides by the first outline what all of them are
        xs, ys = ([v for part in shape for v in part[i::2]] for i in (0, 1))
        around = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
        sound = len(shape[0]) >= 6 and all(part and len(part) % 2 == 0 for part in shape)
        sound = sound and math.isfinite(sum(xs + ys))
    else:
        runs = shape["counts"] if isinstance(shape["counts"], list) else unpacked(shape["counts"])
        sound = all(isinstance(run, int) and run >= 0 for run in runs) and any(runs[1::2])
        sound = sound and sum(runs) == y * x and shape["size"] == size
        runs = dict(size=size, counts=runs if sound else [y * x])
        around = encoding.toBbox(encoding.frPyObjects(runs, y, x)).tolist()
    # Half a pixel wider to all sides: small masks are rounded
    one, other = ([[x - 0.5, y - 0.5, w + 1, h + 1]] for x, y, w, h in (entry["bbox"], around))
    return sound and encoding.iou(one, other, [0])[0][0] >= OVERLAP


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
    return runs if not shift and all("0" <= letter <= "o" for letter in text) else []


ID = ("a whole number, once", lambda v, _, known: type(v) is int and v not in known["own"])
PX = ("whole px", lambda v, *_: type(v) is int and v > 0)
TEXT = ("a path", lambda v, *_: v.strip())
RULES = {  # what is expected, and whether the value v of an entry is it
    "categories": {"id": ID},
    "images": {"id": ID, "height": PX, "width": PX, "file_name": TEXT},
    "annotations": {
        "id": ID,
        "image_id": ("an id of images", lambda v, _, known: v in known["images"]),
        "category_id": ("an id of categories", lambda v, _, known: v in known["categories"]),
        "iscrowd": ("0 or 1", lambda v, *_: v in (None, 0, 1)),
        "area": ("a number", lambda v, *_: 0 <= v < 1e10),  # COCOeval leaves out what is larger
        "bbox": ("x y width height in px, inside the image", is_inside),
        "segmentation": ("outlines or runs that fill the image, where bbox {bbox} is", is_there),
    },
}  # fmt: skip
