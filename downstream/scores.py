"""How good the fine-tuned network is: mean IoU over a whole data set, and COCO's average precision.

Slides: tables 2, 3, 4 and 7. Paper: section 4.2. Differs: nothing known; the precision is
pycocotools'.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from pycocotools import mask as encoding
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from downstream.datasets import CocoObjects
from engine.loader import make_loader
from engine.program import OfThisRank
from engine.ranks import gather_objects, sum_over_ranks
from measures import metrics
from measures.labels import Labeled, ToyScenes

PRECISION = (
    "ap",
    "ap50",
    "ap75",
    "ap_small",
    "ap_medium",
    "ap_large",
)  # COCOeval's first six numbers


def mean_iou(
    predict: Callable[[Tensor], Tensor],
    data: Labeled,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
) -> tuple[dict[str, float], dict[str, Any]]:
    """One confusion matrix over all images of all ranks, then the mean over classes that occur.

    predict(image (3 y x) uint8 on the device) -> (y x) classes. Returns miou and accuracy in [0,
    1], and the IoU of each class by name, None for one without a labeled pixel.
    """
    t = len(data.class_names)
    counts = torch.zeros(t, t, dtype=torch.long)
    for image, label in share(data, rank, world_size, workers, device):
        counts += metrics.confusion_matrix(predict(image.to(device)).cpu(), label, t, t)
    counts = sum_over_ranks(counts.to(device)).cpu()
    own = torch.arange(t)  # the network knows the classes by name
    each = metrics.iou(counts, own).tolist()
    by_class = {
        name: None if np.isnan(value) else value for name, value in zip(data.class_names, each)
    }
    scores = dict(miou=metrics.miou(counts, own), accuracy=metrics.pixel_accuracy(counts, own))
    return scores, dict(iou=by_class)


def coco_precision(
    predict: Callable[[Tensor], dict[str, Tensor]],
    data: CocoObjects,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
) -> tuple[dict[str, float], dict[str, Any]]:
    """COCO's AP of boxes and masks over all images of all ranks, in [0, 1].

    predict(image (3 y x) uint8 on the device) -> boxes, labels, scores, masks of
    `Detector.predict`.
    """
    results = []
    for image, target in share(data, rank, world_size, workers, device):
        results += as_results(predict(image.to(device)), int(target["image_id"]), data.categories)
    results = [result for part in gather_objects(results) for result in part]
    return average_precision(data, results), dict(detections=len(results))


def as_results(
    found: dict[str, Tensor], image_id: int, categories: Sequence[int]
) -> list[dict[str, Any]]:
    """Detections in one image as COCO's result format has them: box x y width height px, mask as
    run lengths."""
    corner, other = found["boxes"].float().cpu().split(2, dim=1)  # over x1 y1 x2 y2
    boxes = torch.cat([corner, other - corner], dim=1)
    masks = found["masks"].to("cpu", torch.uint8).numpy()
    results = []
    for box, label, score, mask in zip(
        boxes.tolist(), found["labels"].tolist(), found["scores"].tolist(), masks
    ):
        runs = encoding.encode(np.asfortranarray(mask))
        results.append(
            dict(
                image_id=image_id,
                category_id=categories[label - 1],
                bbox=box,
                score=score,
                segmentation={**runs, "counts": runs["counts"].decode()},
            )
        )
    return results


def average_precision(data: CocoObjects, results: list[dict[str, Any]]) -> dict[str, float]:
    """box_ap, box_ap50 ... mask_ap_large of results on these images; 0 without any, nan where
    nothing is to be found."""
    numbers = {}
    with contextlib.redirect_stdout(None):  # it prints its tables to stdout
        found = data.truth.loadRes(results) if results else None
        for kind, name in (("bbox", "box"), ("segm", "mask")):
            stats = [0.0] * len(PRECISION)
            if found:
                judge = COCOeval(data.truth, found, kind)
                judge.params.imgIds = data.ids
                judge.evaluate()
                judge.accumulate()
                judge.summarize()
                stats = [float("nan") if value < 0 else float(value) for value in judge.stats]
            numbers |= {f"{name}_{key}": value for key, value in zip(PRECISION, stats)}
    return numbers


def share(
    data: Any, rank: int, world_size: int, workers: int, device: torch.device
) -> Iterator[Any]:
    """This rank's items, read by worker processes, with a bar on a terminal.

    Raises ValueError, one line, for one that cannot be used: a score without it is of other images.
    """
    for item, reason in each_of(Tried(data), "test", rank, world_size, workers, device):
        if reason:
            raise OfThisRank(f"an image to test cannot be used: {reason}")
        yield item


def refuse_unusable(data: Any, rank: int = 0, world_size: int = 1, workers: int = 0) -> None:
    """Read all images and labels to test once; call it before the training, on all ranks.

    Raises ValueError, one line with the first, where some cannot be used: known at the first test
    only, they would cost the work until then.
    """
    if isinstance(getattr(data, "images", None), ToyScenes):
        return  # drawn, not read
    found = each_of(Complaints(data), "check", rank, world_size, workers, torch.device("cpu"))
    places = range(rank, len(data), world_size)
    bad = gather_objects([(place, reason) for place, reason in zip(places, found) if reason])
    bad = sorted(pair for part in bad for pair in part)
    if bad:
        raise ValueError(
            f"{len(bad)} of {len(data)} images to test cannot be used, first: {bad[0][1]}"
        )


def each_of(
    data: Dataset, what: str, rank: int, world_size: int, workers: int, device: torch.device
) -> Iterator[Any]:
    """This rank's items of the data; what: the name of the bar."""
    mine = [[index] for index in range(rank, len(data), world_size)]
    loader = make_loader(data, mine, workers, device, collate=only)
    silent = rank > 0 or not sys.stderr.isatty()
    return iter(tqdm(loader, what, disable=silent, leave=False, unit="image"))


class Tried(Dataset):
    """Pairs of an item and "", or None and why it cannot be used: what a worker raises would
    arrive as its trace."""

    def __init__(self, data: Any):
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Any, str]:
        try:
            return self.data[index], ""
        except ValueError as error:
            return None, str(error)


class Complaints(Tried):
    """Why each item cannot be used, or "": no pixel leaves the worker."""

    def __getitem__(self, index: int) -> str:
        return super().__getitem__(index)[1]


def only(samples: Sequence[Any]) -> Any:
    """A batch of one is its sample."""
    return samples[0]
