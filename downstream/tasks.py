"""What differs between the two tasks: data, views, model, and how it is judged.

Slides: tables 2, 3, 4 and 7. Paper: section 4.2. Differs: nothing known.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from downstream import datasets, detection, scores, segmentation, views
from downstream.settings import Detection, Segmentation, Shared, shorts
from engine import loader


@dataclass(frozen=True)
class Task:
    """A model to fine-tune, and all that goes with it."""

    train: Any  # labeled images to learn from: a sequence of pairs
    test: Any  # and those that the scores are of
    view: Callable  # what a step sees of a pair
    collate: Callable  # what makes a batch of it
    black: Any  # a pair for a rank that has none
    model: nn.Module  # a batch -> loss, the numbers of `losses`
    groups: list[dict]  # parameters, for the optimizer
    losses: tuple[str, ...]
    judge: Callable  # (test images, device, rank, world size, workers) -> scores, details
    score: str  # the one that decides which weights are the best
    sizes_vary: bool  # of images, from step to step
    notice: str = ""  # what the reader of the numbers should know about the data


def make_task(c: Shared, trunk: nn.Module) -> Task:
    """The task that the configuration is of, on this trunk. Raises ValueError for a wrong tree."""
    return make_detection(c, trunk) if isinstance(c, Detection) else make_segmentation(c, trunk)


def make_detection(c: Detection, trunk: nn.Module) -> Task:
    """Mask R-CNN on COCO's objects: table 2."""
    seen = datasets.CocoObjects(c.data_dir, "train", trained=True, judged=c.test_on == "train")
    seen = seen.subset(datasets.some_of(len(seen), c.labeled, c.seed))
    unseen = seen
    if c.test_on == "val":
        unseen = datasets.CocoObjects(c.data_dir, "val", trained=False, judged=True)
    network = detection.mask_rcnn(
        trunk, len(seen.categories), c.test_short, c.longest, c.smallest_anchor, c.regions
    )
    model = detection.Detector(network)
    return Task(
        datasets.Training(seen), unseen, views.ObjectView(shorts(c), c.longest), views.objects,
        views.black_objects(), model, detection.parameter_groups(model, c.weight_decay),
        detection.LOSSES, functools.partial(scores.coco_precision, model.predict), "box_ap",
        sizes_vary=True,
    )  # fmt: skip


def make_segmentation(c: Segmentation, trunk: nn.Module) -> Task:
    """An FCN on images whose every pixel is labeled: tables 2 and 4."""
    seen = datasets.open_segmentation(c.dataset, c.data_dir, "train", c.train_list, c.scenes)
    seen = seen.subset(datasets.some_of(len(seen), c.labeled, c.seed))
    unseen, notice = seen, ""
    if c.test_on == "val":
        unseen = datasets.open_segmentation(c.dataset, c.data_dir, "val")
        seen, unseen, notice = datasets.with_equal_classes(seen, unseen)
    model = segmentation.Segmenter(
        trunk, len(seen.class_names), c.output_stride, c.head_width, c.head_convs, c.head_dilation,
        c.head_concat, c.dropout, c.aux_weight,
    )  # fmt: skip
    frame = c.frame if c.frame[0] else ()
    predict = functools.partial(
        segmentation.predict, model, scale=frame, window=c.window, stride=c.window_stride
    )
    return Task(
        datasets.Training(seen), unseen, views.CropView(c.crop, frame, c.scale, c.most, c.distort),
        loader.collate, views.black_pixels(), model,
        [dict(params=list(model.parameters()), weight_decay=c.weight_decay)], model.losses,
        functools.partial(scores.mean_iou, predict), "miou", sizes_vary=False,
        notice=notice,
    )  # fmt: skip
