"""The configuration of a fine-tuning, and the released settings of the slides' transfer tables.

Slides: tables 2, 3, 4 and 7. Paper: section 4.2.
Differs: the settings are the released ones [O], read by programs that no longer install; numbers
for toy scenes and for a folder of photographs are ours [U].

Origins of a value: [P] the protocol's own published code (detectron2, mmsegmentation), [O]fficial
settings, [U]s.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from backbone import ARCHITECTURES
from downstream.schedules import FineTuning
from engine import options
from engine.options import option
from engine.run import Options

BASE_BATCH = 16  # base_lr and base_steps are for this batch size [O]


@dataclass(frozen=True)
class Shared:
    """What both tasks have. Defaults are set by the presets of each task."""

    # what is learned from
    dataset: str = option("", "layout of the data, and the settings that go with it")
    data_dir: str = option("", "folder of the data set; toy scenes need none", free=True)
    labeled: int = option(
        0,
        "learn from N random labeled images only, 0: all",
        low=0,
        high=10**9,
        also=("--labelled",),
    )
    test_on: str = option(
        "val",
        "images that the scores are of; train: can it memorize what it learns from?",
        choices=("val", "train"),
    )
    # the trunk
    backbone: str = option(
        "random",
        "file with a pretrained trunk: last.pth (paused or finished), a released "
        "checkpoint, backbone.pth, an exported file; or random",
    )
    network: str = option(
        "teacher", "which network of a SlotCon checkpoint", choices=("teacher", "student")
    )
    arch: str = option(
        "resnet50", "trunk of --backbone random; a file says its own", choices=ARCHITECTURES
    )
    # the optimizer
    batch_size: int = option(
        16, "images per optimizer step over all processes [O]", low=1, high=1_000_000
    )
    accumulate: int = option(
        1,
        "split each process's share into this many passes, for small memories; batch norm "
        "then sees less",
        low=1,
        high=10_000,
    )
    base_lr: float = option(
        0.01,
        "learning rate at batch 16; the actual one is base_lr * batch_size / 16",
        low=0,
        high=100,
    )
    base_steps: int = option(
        90_000,
        "steps at batch 16; the actual number is base_steps * 16 / batch_size",
        low=1,
        high=10**9,
    )
    warmup_steps: int = option(
        0, "steps over which the rate rises, from a thousandth", low=0, high=10**9
    )
    decay: str = option(
        "steps",
        "the rate falls to a tenth at two milestones, or as a polynomial",
        choices=("steps", "poly"),
    )
    milestones: tuple[float, float] = option(
        (0.7, 0.9), "where it falls, as shares of the run", low=0, high=1
    )
    momentum: float = option(0.9, "of SGD [O]", low=0, high=1)
    weight_decay: float = option(1e-4, "L2 [O]; detection: not on batch norms", low=0, high=10)
    seed: int = option(
        0, "of the heads' weights, order, crops, and which images are labeled", low=0, high=2**31
    )
    # the machine
    device: str = option(
        "auto",
        "auto takes a GPU where there is one",
        choices=("auto", "cpu", "cuda", "mps"),
        free=True,
    )
    amp: str = option(
        "auto",
        "mixed precision: auto is bf16 where the GPU has it, else fp16, off on a CPU",
        choices=("auto", "bf16", "fp16", "off"),
        free=True,
    )
    threads: int = option(
        0,
        "threads of a CPU process for arithmetic, 0: torch's choice; the last bits depend on it",
        low=0,
        high=4096,
        free=True,
    )
    workers: int = option(
        -1,
        "processes per rank that read images; 0: none, -1: one per core up to 8",
        low=-1,
        high=512,
        free=True,
    )
    timeout: float = option(
        3600.0,
        "seconds after which a silent process counts as lost; a test may be long",
        low=1,
        high=1e6,
        free=True,
    )
    # what is written
    output_dir: str = option("", "default: runs/TASK-DATASET", free=True)
    resume: str = option(
        "auto", "auto continues output-dir/last.pth if it is there; or a path; or none", free=True
    )
    force_resume: bool = option(
        False, "continue although options that matter have changed", free=True
    )
    log_every: int = option(50, "steps between lines of log.jsonl", low=1, high=10**6, free=True)
    save_every: int = option(
        1000, "steps between two writings of last.pth", low=1, high=10**9, free=True
    )
    test_every: int = option(
        0,
        "steps between two tests; best.pth is the best of them; 0: only at the end",
        low=0,
        high=10**9,
        free=True,
    )
    max_steps: int = option(
        0,
        "stop after this many steps in all, 0: at the end; the schedule does not change",
        low=0,
        high=10**9,
        free=True,
    )
    max_bad_share: float = option(
        0.01,
        "stop when more than this share of the images cannot be used",
        low=0,
        high=1,
        free=True,
    )
    max_bad_steps: int = option(
        20,
        "stop after this many steps in a row without a finite loss and gradient",
        low=1,
        high=10**6,
        free=True,
    )
    on_save_error: str = option(
        "continue", "when the disk refuses a checkpoint", choices=("continue", "stop"), free=True
    )
    tensorboard: bool = option(False, "also log to TensorBoard, if it is installed", free=True)


@dataclass(frozen=True)
class Detection(Shared):
    """Mask R-CNN. Defaults: the 1x schedule of table 2."""

    short_low: int = option(
        640,
        "training: shortest short side, px; one of every 32 up to the largest [O]",
        low=32,
        high=8192,
    )
    short_high: int = option(800, "training: largest short side, px [O]", low=32, high=8192)
    longest: int = option(1333, "longest long side, px [O]", low=32, high=8192)
    test_short: int = option(800, "test: short side, px [O]", low=32, high=8192)
    smallest_anchor: int = option(
        32,
        "px of the smallest of five anchor sizes [O]; smaller for smaller images",
        low=2,
        high=1024,
    )
    regions: int = option(
        512, "proposals per image that the heads learn from [O]", low=8, high=4096
    )


@dataclass(frozen=True)
class Segmentation(Shared):
    """FCN. Defaults: table 2's Cityscapes."""

    train_list: str = option(
        "train_aug", "VOC: the list in ImageSets/Segmentation to learn from [O]"
    )
    scenes: int = option(768, "toy: how many scenes to learn from", low=1, high=10**6)
    frame: tuple[int, int] = option(
        (2049, 1025),
        "long and short side, px, of the frame that an image is fitted into; 0 0: its own size",
        low=0,
        high=16384,
    )
    scale: tuple[float, float] = option(
        (0.5, 2.0), "training: times this, drawn evenly [O]", low=0.05, high=20
    )
    crop: int = option(769, "training: side of the square, px [O]", low=16, high=8192)
    most: float = option(
        0.75,
        "draw a crop again in which one class has more of the pixels; 1: never [P]",
        low=0,
        high=1,
    )
    distort: bool = option(False, "training: change brightness, contrast, saturation and hue")
    window: int = option(
        0,
        "test: side of a square that slides over the image, px; 0: the whole image",
        low=0,
        high=8192,
        free=True,
    )
    window_stride: int = option(513, "test: step of that square, px", low=1, high=8192, free=True)
    output_stride: int = option(
        16,
        "px per cell of the trunk's map, 8, 16 or 32 of a ResNet; 0: as the trunk is",
        choices=(0, 8, 16, 32),
    )
    head_width: int = option(256, "channels of the head [O]", low=1, high=65_536)
    head_convs: int = option(2, "3x3 convolutions of the head [O]", low=0, high=64)
    head_dilation: int = option(6, "their dilation [O]", low=1, high=64)
    head_concat: bool = option(
        False, "the head also sees its own input once more, before the scores"
    )
    dropout: float = option(0.0, "of whole channels before the scores", low=0, high=0.99)
    aux_weight: float = option(
        0.0, "weight of an auxiliary head on a ResNet's C4, 0: none", low=0, high=100
    )


DETECTION = {
    "coco": Detection(
        dataset="coco", base_lr=0.02, warmup_steps=1000, milestones=(2 / 3, 8 / 9), save_every=2500
    )
}
CITYSCAPES = Segmentation(dataset="cityscapes", window=769, window_stride=513)
VOC = dataclasses.replace(
    CITYSCAPES,
    dataset="voc",
    base_lr=0.003,
    base_steps=30_000,
    frame=(2049, 513),
    crop=513,
    window=0,
)
SEGMENTATION = {
    "voc": VOC,
    "cityscapes": CITYSCAPES,
    "ade20k": dataclasses.replace(
        CITYSCAPES,
        dataset="ade20k",
        base_steps=80_000,
        weight_decay=5e-4,
        decay="poly",
        frame=(2048, 512),
        crop=512,
        distort=True,
        window=0,
        output_stride=8,
        head_width=512,
        head_dilation=1,
        head_concat=True,
        dropout=0.1,
        aux_weight=0.4,
    ),
    # Photographs as they are, of some 300 px; a short run, since there are few of them [U].
    "folder": dataclasses.replace(
        VOC,
        dataset="folder",
        base_lr=0.01,
        base_steps=2000,
        decay="poly",
        frame=(0, 0),
        crop=224,
        test_every=500,
        save_every=250,
    ),
    # Scenes of 64 px: a map of stride 4, and a head that sees no farther than it must [U].
    "toy": dataclasses.replace(
        VOC,
        dataset="toy",
        arch="tiny",
        base_lr=0.05,
        base_steps=400,
        decay="poly",
        frame=(0, 0),
        scale=(1.0, 1.0),
        crop=64,
        most=1.0,
        output_stride=0,
        head_width=64,
        head_convs=1,
        head_dilation=1,
        threads=1,
        workers=0,
        log_every=20,
        save_every=100,
    ),
}
# The slides' numbers, in percent: from random weights, and from SlotCon on COCO for 800 epochs.
TARGETS = {
    "coco": {
        "box_ap": (32.8, 41.0),
        "box_ap50": (50.9, 61.1),
        "box_ap75": (35.3, 45.0),
        "mask_ap": (29.9, 37.0),
        "mask_ap50": (47.9, 58.3),
        "mask_ap75": (32.0, 39.8),
    },
    "cityscapes": {"miou": (65.3, 76.2)},
    "voc": {"miou": (39.5, 71.6)},
    "ade20k": {"miou": (29.4, 39.0)},
}


def check(c: Shared, world_size: int, num_images: int) -> None:
    """The options fit each other, the processes and the images. Raises ValueError."""
    parts = world_size * c.accumulate
    if c.batch_size % parts:
        raise ValueError(
            f"--batch-size {c.batch_size} must be divisible by {world_size} process(es) x "
            f"--accumulate {c.accumulate}: take {max(c.batch_size // parts, 1) * parts}"
        )
    if num_images < c.batch_size:
        raise ValueError(
            f"--batch-size {c.batch_size} is larger than the {num_images} images to learn from: "
            f"take at most {num_images // parts * parts}"
        )
    if isinstance(c, Detection) and c.short_low > c.short_high:
        raise ValueError(f"--short-low {c.short_low} is above --short-high {c.short_high}")
    if isinstance(c, Segmentation):
        if (c.frame[0] == 0) != (c.frame[1] == 0):
            raise ValueError(
                f"--frame {c.frame[0]} {c.frame[1]}: both sides, or 0 0 for an image's own size"
            )
        if c.scale[0] > c.scale[1]:
            raise ValueError(
                f"--scale {c.scale[0]:g} {c.scale[1]:g}: the smaller number comes first"
            )
        if c.window and c.window_stride > c.window:
            raise ValueError(
                f"--window-stride {c.window_stride} leaves gaps between squares of {c.window} px"
            )


def schedule_of(c: Shared) -> FineTuning:
    """What the run intends, in optimizer steps: as many images as at batch 16, a rate in proportion
    to the batch."""
    total = max(1, round(c.base_steps * BASE_BATCH / c.batch_size))
    last, peak = min(total, c.max_steps or total), c.base_lr * c.batch_size / BASE_BATCH
    return FineTuning(c.save_every, total, last, peak, c.decay, c.warmup_steps, c.milestones)


def run_options(c: Shared) -> Options:
    """The part of the configuration that is about any run; save_every is in the schedule."""
    names = {f.name for f in dataclasses.fields(Options)} & {f.name for f in dataclasses.fields(c)}
    return Options(**{name: getattr(c, name) for name in names - {"save_every"}})


def kept(c: Shared) -> dict[str, Any]:
    """What stands in config.json and in the checkpoint."""
    return dict(task=type(c).__name__.lower(), **dataclasses.asdict(c))


def shorts(c: Detection) -> range:
    """The short sides, px, that a training image may get."""
    return range(c.short_low, c.short_high + 1, 32)


def differences(c: Shared, num_images: int, saved: Mapping[str, Any]) -> list[str]:
    """What a checkpoint was made with and this run is not; empty where that is allowed by
    --force-resume."""
    task, then = type(c).__name__.lower(), saved["config"].get("task", "pretraining")
    if then != task:
        return [f"task: {then} then, {task} now"]
    changed = options.differences(c, saved["config"])
    if saved["num_images"] != num_images:
        changed.append(f"images: {saved['num_images']} then, {num_images} now")
    return [] if c.force_resume else changed


def describe(c: Shared, schedule: FineTuning, world_size: int) -> str:
    """The effective batch, length and rate, on two lines."""
    fall = (
        f"to {schedule.lowest:g} as a polynomial of power {schedule.power:g}"
        if c.decay == "poly"
        else (
            "x 0.1 at "
            + " and ".join(str(round(share * schedule.total_steps)) for share in c.milestones)
        )
    )
    return (
        f"batch    {c.batch_size} = {c.batch_size // world_size} x {world_size} process(es); "
        f"{schedule.total_steps} steps = {c.base_steps} x {BASE_BATCH} / {c.batch_size}\n"
        f"lr       {schedule.peak:g} = {c.base_lr:g} x {c.batch_size} / {BASE_BATCH}, warm-up "
        f"{schedule.warmup_steps} steps, {fall}"
    )
