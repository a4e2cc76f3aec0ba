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
from tqdm import tqdm

from downstream.datasets import CocoObjects
from engine.loader import make_loader
from engine.ranks import gather_objects, sum_over_ranks
from measures import metrics
from measures.labels import Labeled

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
    """This rank's items, read by worker processes, with a bar on a terminal."""
    mine = [[index] for index in range(rank, len(data), world_size)]
    loader = make_loader(data, mine, workers, device, collate=only)
    return iter(
        tqdm(loader, "test", disable=rank > 0 or not sys.stderr.isatty(), leave=False, unit="image")
    )


def only(samples: Sequence[Any]) -> Any:
    """A batch of one is its sample."""
    return samples[0]
