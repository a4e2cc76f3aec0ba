"""The settings of a fine-tuning, and the released ones [O] of the slides' transfer tables."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine import options
from engine.options import option

BASE_BATCH = 16  # base_lr and base_steps are for this batch size [O]
MOMENTUM = 0.9  # of SGD [O]
LOWEST, POWER = 1e-4, 0.9  # where a polynomial schedule ends, and its shape [O]


# fmt: off
@dataclass(frozen=True)
class Shared:
    """What both tasks have, and the learning rate. Presets set the defaults."""

    dataset: str = option("", "layout of the data, and the settings that go with it")
    data_dir: str = option("", "folder of the data set; toy scenes need none", free=True)
    output_dir: str = option("", "where the run is written (default: runs/TASK-DATASET)", free=True)
    backbone: str = option("random", "last.pth, a released checkpoint, backbone.pth; or random")
    network: str = option("teacher", "of a SlotCon checkpoint", choices=("teacher", "student"))
    arch: str = option("resnet50", "of --backbone random; timm:NAME of a file that does not say it")
    labeled: int = option(0, "learn from N random labeled images only, 0: all", low=0)
    test_on: str = option("val", "train: can it memorize what it saw?", choices=("val", "train"))
    batch_size: int = option(16, "images per step, over all processes [O]", low=1)
    max_steps: int = option(0, "pause after N steps in all, 0: never", low=0, free=True)
    seed: int = option(0, "of heads, order, crops, and which images are labeled", low=0, high=2**31)

    base_lr: float = option(0.01, "at batch 16, in proportion to it otherwise", "optimizer", low=0)
    base_steps: int = option(90_000, "at batch 16; as many images at any other", "optimizer", low=1)
    warmup_steps: int = option(0, "the rate rises, from a thousandth", "optimizer", low=0)
    decay: str = option("steps", "to a tenth, twice", "optimizer", choices=("steps", "poly"))
    milestones: tuple[float, float] = option((0.7, 0.9), "shares of the run", "optimizer", 0, 1)
    weight_decay: float = option(1e-4, "L2; detection: not on batch norms [O]", "optimizer", low=0)
    accumulate: int = option(1, "passes per step; each pass sees less", "optimizer", low=1)

    device: str = option("auto", "auto: a CUDA GPU where there is one", "machine",
        choices=("auto", "cpu", "cuda", "mps"), free=True)
    amp: str = option("auto", "mixed precision; auto: on a GPU", "machine",
        choices=("auto", "bf16", "fp16", "off"), free=True)
    workers: int = option(-1, "readers per rank; -1: one per core", "machine", low=-1, free=True)

    resume: str = option("auto", "from OUTPUT_DIR/last.pth; force: although options changed; none",
        "files", choices=("auto", "force", "none"), free=True)
    log_every: int = option(50, "steps between lines of log.jsonl", "files", low=1, free=True)
    test_every: int = option(0, "steps between tests; 0: at the end", "files", low=0, free=True)
    save_minutes: float = option(10.0, "between writings of last.pth", "files", low=0, free=True)
    json: str = option("", "file for the result as JSON; -: the last line of stdout", "files",
        free=True)

    @property
    def total_steps(self) -> int:
        """Length of the schedule, in optimizer steps: as many images as at batch 16."""
        return max(1, round(self.base_steps * BASE_BATCH / self.batch_size))

    @property
    def last_step(self) -> int:
        """Where the run ends, which may be earlier."""
        return min(self.total_steps, self.max_steps or self.total_steps)

    def learning_rate(self, step: int) -> float:
        """Of step t, 0 .. T - 1; peak = base_lr batch_size / 16; both rise first, from 1/1000.

        steps: peak 0.1^(number of milestones passed)
        poly: lowest + (peak - lowest) (1 - t / T)^power
        """
        peak, rise = self.base_lr * self.batch_size / BASE_BATCH, 1.0
        if step < self.warmup_steps:
            rise = 1e-3 + (1 - 1e-3) * step / self.warmup_steps
        if self.decay == "poly":
            return rise * (LOWEST + (peak - LOWEST) * (1 - step / self.total_steps) ** POWER)
        passed = sum(step >= round(share * self.total_steps) for share in self.milestones)
        return rise * peak * 0.1**passed


@dataclass(frozen=True)
class Detection(Shared):
    """Mask R-CNN. Defaults: the 1x schedule of table 2."""

    task = "detection"
    shorts: tuple[int, int] = option((800, 640), "short side, px, in steps of 32", "views", low=32)
    longest: int = option(1333, "long side, px, at most [O]", "views", low=32)
    test_short: int = option(800, "test: short side, px [O]", "views", low=32)
    smallest_anchor: int = option(32, "px; four larger ones follow [O]", "method", low=2)
    regions: int = option(512, "proposals per image that the heads learn from [O]", "method", low=8)


@dataclass(frozen=True)
class Segmentation(Shared):
    """FCN; each data set has values of its own."""

    task = "segmentation"
    train_list: str = option("train_aug", "VOC: list in ImageSets/Segmentation to learn from [O]")
    frame: tuple[int, int] = option((2049, 1025), "long and short side, px, at most; "
        "0 0: the image's own size [O]", "views", low=0)
    scale: tuple[float, float] = option((0.5, 2.0), "training: times this [O]", "views", low=0.05)
    crop: int = option(769, "training: side of the square, px [O]", "views", low=16)
    distort: bool = option(False, "training: change brightness, contrast, saturation, hue", "views")
    window: tuple[int, int] = option((0, 0), "test: side and step, px, of a sliding square; 0 0: "
        "the whole image at once [O]", "views", low=0, free=True)
    output_stride: int = option(16, "of a ResNet; 0: as it is", "method", choices=(0, 8, 16, 32))
    head_width: int = option(256, "channels of the head [O]", "method", low=1)
    head_convs: int = option(2, "3x3 convolutions of the head [O]", "method", low=0)
    head_dilation: int = option(6, "their dilation [O]", "method", low=1)
    head_concat: bool = option(False, "the scores see the head's input once more", "method")
    dropout: float = option(0.0, "of whole channels before the scores", "method", low=0, high=0.99)
    aux_weight: float = option(0.0, "of a second head on a ResNet's C4, 0: none", "method", low=0)
# fmt: on


COCO = Detection(dataset="coco", base_lr=0.02, warmup_steps=1000, milestones=(2 / 3, 8 / 9))
CITYSCAPES = Segmentation(dataset="cityscapes", window=(769, 513))
VOC = Segmentation(dataset="voc", base_lr=0.003, base_steps=30_000, frame=(2049, 513), crop=513)
ADE20K = Segmentation(
    dataset="ade20k", base_steps=80_000, weight_decay=5e-4, decay="poly", frame=(2048, 512),
    crop=512, distort=True, output_stride=8, head_width=512, head_dilation=1, head_concat=True,
    dropout=0.1, aux_weight=0.4,
)  # fmt: skip
# Photographs as they are, of some 300 px; a short run, since there are few of them [U].
FOLDER = Segmentation(
    dataset="folder", base_steps=2000, decay="poly", frame=(0, 0), crop=224, test_every=500
)
# Scenes of 64 px: a map of stride 4, and a head that sees no farther than it must [U].
TOY = Segmentation(
    dataset="toy", arch="tiny", base_lr=0.05, base_steps=400, decay="poly", frame=(0, 0),
    scale=(1.0, 1.0), crop=64, output_stride=0, head_width=64, head_convs=1, head_dilation=1,
    workers=0, log_every=20,
)  # fmt: skip
PRESETS = {  # task -> data set -> settings
    "detection": {"coco": COCO},
    "segmentation": {c.dataset: c for c in (VOC, CITYSCAPES, ADE20K, FOLDER, TOY)},
}
RANDOM, OURS = "slides: random weights", "slides: SlotCon, COCO 800 epochs"
OWN = ("backbone", "network", "seed")  # of a run
AP = ("box_ap", "box_ap50", "box_ap75", "mask_ap", "mask_ap50", "mask_ap75")
SLIDES = {  # data set -> number of images that were tested, scores of RANDOM and of OURS
    "coco": (
        5000,
        dict(zip(AP, (0.328, 0.509, 0.353, 0.299, 0.479, 0.320))),
        dict(zip(AP, (0.410, 0.611, 0.450, 0.370, 0.583, 0.398))),
    ),
    "cityscapes": (500, {"miou": 0.653}, {"miou": 0.762}),
    "voc": (1449, {"miou": 0.395}, {"miou": 0.716}),
    "ade20k": (2000, {"miou": 0.294}, {"miou": 0.390}),
}


def slides_of(c: Shared, tested: int) -> Mapping[str, Mapping[str, float]]:
    """The slides' numbers, if c is what they measured: the released settings but for OWN, and as
    many images were tested.
    """
    released = dataclasses.asdict(PRESETS[c.task][c.dataset])
    changed = options.differences(c, {**released, **{n: getattr(c, n) for n in OWN}})
    images, *scores = SLIDES.get(c.dataset, (0,))
    return dict(zip((RANDOM, OURS), scores)) if tested == images and not changed else {}


def parse(argv: Sequence[str] | None, description: str) -> tuple[Shared, set[str]]:
    """The command line -> settings, and the names of the options given. Raises ValueError."""
    parser = options.Parser("transfer.py", description=description)
    commands = parser.add_subparsers(dest="task", required=True, metavar=" | ".join(PRESETS))
    for task, presets in PRESETS.items():
        text = f"fine-tune for {task}: {type(next(iter(presets.values()))).__doc__}"
        command = commands.add_parser(task, help=text, description=text)
        options.add_options(command, presets)
    args = parser.parse_args(argv)
    c, given = options.settle(PRESETS[args.task], args)
    for name in ("shorts", "frame", "window"):
        large, small = getattr(c, name, (0, 0))
        if not (0 < small <= large or large == small == 0):
            raise ValueError(f"--{name} {large} {small}: the larger number comes first, or 0 0")
    if c.json not in ("", "-"):
        options.check_writable(Path(c.json), "--json")
    output_dir = c.output_dir or f"runs/{c.task}-{c.dataset}"
    return dataclasses.replace(c, output_dir=output_dir), given


def differences(
    c: Shared, num_images: int, names: str, weights: str, saved: Mapping[str, Any]
) -> list[str]:
    """What a checkpoint was made with and this run is not. names, weights: hashes of those of the
    images and classes, and of the backbone.
    """
    task, images = saved["config"].get("task", "pretraining"), saved["num_images"]
    if task != c.task:
        return [f"task: {task} then, {c.task} now"]
    found = options.differences(c, saved["config"])
    if images != num_images:
        found.append(f"images: {images} then, {num_images} now")
    elif saved["config"].get("images", names) != names:
        found.append(f"images: as many then ({images}), but other ones, or other classes")
    moved = saved["config"]["backbone"] != c.backbone
    if saved["notes"].get("backbone", weights) != weights and not moved:
        found.append(f"backbone: {c.backbone} had other weights then")
    return found
