"""The configuration of a run, the published recipes, and which option is which row of the slides'
tables.

Slides: tables 1, 6 and 8.
Paper: section 4.1 and the ablation studies.
Read next: train.py, which composes a run from these numbers.

Origins of a value: [P]aper, [O]fficial code, [U]s.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from engine import LAYOUTS, options
from engine.options import option

method, views, training, files = (
    functools.partial(option, group=name) for name in ("method", "views", "optimizer", "files")
)
machine = functools.partial(option, group="machine", free=True)


# fmt: off
@dataclass(frozen=True)
class Config:
    """Everything that can be set. Defaults: the published COCO recipe."""

    preset: str = option("coco-r50", "named recipe, which sets all other defaults", free=True)
    data_dir: str = option("", "folder of images, or a text file of paths", free=True)
    output_dir: str = option("", "where the run is written (default: runs/PRESET)", free=True)
    epochs: float = option(
        800, "length of the run and of all schedules [P]", low=0, high=1e6, unless="steps")
    steps: int = option(0, "the same in optimizer steps; 0: --epochs", low=0, high=10**9)
    batch_size: int = option(512, "images per step, over all processes [P]", low=2, high=10**6)
    arch: str = option("resnet50", "backbone, a row of backbone.py: ARCHITECTURES, or timm:NAME")
    image_size: int = option(224, "side of a view, px [P]", low=32, high=4096)
    num_prototypes: int = option(256, "k; 256 for COCO, 2048 for ImageNet [P]", low=2, high=10**6)
    init: str = option("", "start from these weights: a checkpoint, or a backbone")
    pretrained: bool = option(False, "of timm:NAME: start from timm's own weights")
    freeze_backbone: bool = option(
        False, "learn projector, prototypes and predictor only, on the backbone as it is [U]")
    max_steps: int = option(
        0, "pause after this many steps in all; schedules do not change", low=0, free=True)
    seed: int = option(0, "of weights, order, crops and colors", low=0, high=2**31)

    dim_hidden: int = method(
        4096, "hidden width of projector and predictor [O]", low=1, high=65_536)
    dim_out: int = method(256, "d, width of embeddings, prototypes, slots [O]", low=1, high=65_536)
    group_weight: float = method(
        0.5, "lambda; the slot loss has 1 - lambda, none at 1 [P]", low=0, high=1)
    temp_student: float = method(0.1, "temperature of the student's assignment [P]", low=1e-4)
    temp_teacher: float = method(0.07, "of the teacher's, well below the student's [P]", low=1e-4)
    temp_slot: float = method(0.2, "of the slot contrast [O]", low=1e-4)
    slot_loss: str = method(
        "ctr", "contrast slots, or regress them (table 8b)", choices=("ctr", "reg"))
    align: str = method(
        "asgn", "undo crop and flip on assignments or projections (table 8c)",
        choices=("asgn", "proj"))
    image_loss: bool = method(False, "add the image-level objective (table 8d)")
    momentum_center: float = method(0.9, "momentum of the center [O]", low=0, high=1)
    momentum_teacher: tuple[float, float] = method(
        (0.99, 1.0), "the teacher's at the first and the last step, along a cosine [P]",
        low=0, high=1)

    geometric: bool = views(True, "random crops and flips; off: the center (table 8e)")
    min_area: float = views(0.08, "smallest crop, as a share of the image [O]", low=0.001, high=1)
    jitter: tuple[float, float, float, float, float] = views(
        (0.4, 0.4, 0.2, 0.1, 0.8), "brightness, contrast, saturation, hue (turns), probability [O]",
        low=0, high=1)
    p_gray: float = views(0.2, "probability of gray [O]", low=0, high=1)
    p_blur: tuple[float, float] = views((1.0, 0.1), "of blur, in view 1 and 2 [O]", low=0, high=1)
    solarize: tuple[float, float, float] = views(
        (0.0, 0.2, 128.0), "probability in view 1 and 2, and the level from which it inverts [O]",
        low=0, high=256)

    optimizer: str = training(
        "lars", "LARS [O], or AdamW for small runs", choices=("lars", "adamw"))
    base_lr: float = training(1.0, "learning rate per 256 images of a batch [O]", low=0, high=100)
    weight_decay: float = training(1e-5, "L2, not on biases and norms [O]", low=0, high=10)
    warmup: float = training(
        5.0, "warm-up, in the unit of the length: epochs, or steps [O]", low=0, high=10**9,
        unless="steps")
    accumulate: int = training(1, "passes per step, for small memories; each pass sees less", low=1)

    device: str = machine(
        "auto", "auto: a CUDA GPU where there is one", choices=("auto", "cpu", "cuda", "mps"))
    amp: str = machine(
        "auto", "mixed precision; auto: on a GPU", choices=("auto", "bf16", "fp16", "off"))
    sync_norm: str = machine(
        "torch", "batch norms of several processes: torch's SyncBN, on GPUs only, or ours, which "
        "never waits and is not yet measured on GPUs", choices=("torch", "ours"))
    compile: bool = machine(False, "torch.compile both networks: minutes at first")
    workers: int = machine(
        -1, "processes per rank that read images; -1: one per core", low=-1, high=512)

    dataset: str = files("coco", "layout of --data-dir (docs/data.md)", choices=(*LAYOUTS, "toy"))
    subset: int = files(
        0, "learn from N images, 0: all; toy: scenes that are drawn (table 1)", low=0, high=10**9)
    long_tailed: bool = files(False, "the subset's classes follow a Pareto law (table 1)")
    held_out: int = files(0, "images kept out of training, for the result at the end", low=0)
    check_data: bool = files(
        False, "only read every image once; ends with status 1 where a run would stop", free=True)
    resume: str = files(
        "auto", "auto: from OUTPUT_DIR/last.pth; force: although options changed; none: start over",
        choices=("auto", "force", "none"), free=True)
    log_every: int = files(10, "steps between lines of log.jsonl", low=1, free=True)
    save_minutes: float = files(10.0, "minutes between two writings of last.pth", low=0, free=True)
    keep_every: int = files(100, "keep epoch_N.pth at every such epoch, 0: none", low=0, free=True)

    @property
    def threads(self) -> int:
        """Of a CPU process, 0: as torch chooses; small networks gain nothing from more."""
        return 0 if "OMP_NUM_THREADS" in os.environ else {"tiny": 1, "small": 2}.get(self.arch, 0)


COCO = Config()
CHANGES = {  # preset -> what it changes of COCO
    # For a laptop, and the paper's method as it is; only numbers differ from the published recipe.
    # All [U]; what it learns and what was tried: benchmarks/toy.md.
    # The networks: widths for 8 classes, a backbone that sees 17 px and averages over the period of
    #   a texture. A view has the size of a typical crop of a 64 px scene, so textures keep the
    #   scale that they have in whole scenes.
    # num_prototypes, momentum_center: more prototypes than classes, and a center quicker than the
    #   published 0.9: with 16 and 0.9 more seeds left two classes in one group.
    # min_area: a crop of 0.2 enlarges a texture 1.7 times, the published 0.08 would 2.7 times.
    # temp_teacher: a feature grows only if its correlation between the views exceeds temp_teacher /
    #   temp_student. An untrained backbone offers less than the published 0.7.
    # momentum_teacher: classes split off until the end, so the teacher stays quick.
    # jitter, p_blur, solarize: colors would be a shortcut, so they carry nothing: any hue, half of
    #   the views inverted (solarized from 0 up). The contrast changes little and nothing is
    #   blurred: contrast and detail are what untrained features see of a texture.
    # optimizer: many small steps of AdamW; LARS is made for large batches.
    "toy": dict(
        dataset="toy", subset=768, held_out=256, arch="tiny", image_size=48, num_prototypes=32,
        dim_hidden=64, dim_out=32, temp_teacher=0.03, momentum_center=0.8,
        momentum_teacher=(0.99, 0.99), min_area=0.2, jitter=(0.2, 0.2, 0.3, 0.5, 1.0),
        p_blur=(0.0, 0.0), solarize=(0.5, 0.5, 0.0), optimizer="adamw", batch_size=16,
        base_lr=0.16, weight_decay=0.01, epochs=32, warmup=0.625, workers=1, log_every=20,
        save_minutes=0.5, keep_every=0,
    ),
    # For a folder of about 300 photographs or more and one small machine. All [U]; measured in
    # benchmarks/photos.md.
    # arch, image_size: small views are many per second; the backbone is shown whole images
    #   afterwards.
    # num_prototypes: of 32 about half were never used.
    # temp_teacher, momentum_center, momentum_teacher, optimizer: as for toy scenes.
    # jitter, p_gray, solarize: mild or off. Grass is green and the sky is blue: in photographs
    #   color says what a thing is, and a network that must not use it learns less here.
    # steps: the length does not depend on the number of photographs.
    "photos": dict(
        dataset="folder", held_out=64, arch="small", image_size=64, num_prototypes=24,
        dim_hidden=256, dim_out=64, temp_teacher=0.03, momentum_center=0.8,
        momentum_teacher=(0.99, 0.99), min_area=0.2, jitter=(0.4, 0.4, 0.2, 0.05, 0.8), p_gray=0.0,
        p_blur=(0.2, 0.1), solarize=(0.0, 0.0, 128.0), optimizer="adamw", batch_size=32,
        base_lr=0.024, weight_decay=0.01, steps=3000, warmup=80, workers=1, log_every=20,
        save_minutes=2.0, keep_every=0,
    ),
    "coco-r50": {},
    "cocoplus-r50": dict(dataset="cocoplus"),
    "imagenet-r50-100ep": dict(dataset="imagenet", num_prototypes=2048, epochs=100, keep_every=20),
    "imagenet-r50-200ep": dict(dataset="imagenet", num_prototypes=2048, epochs=200, keep_every=20),
    "bdd100k-r50": dict(dataset="bdd100k"),  # length [U]: as COCO
}
PRESETS = {k: dataclasses.replace(COCO, preset=k, **changes) for k, changes in CHANGES.items()}
# fmt: on


def parse(argv: Sequence[str] | None, description: str = "") -> tuple[Config, set[str]]:
    """The command line -> configuration, and the names of the options given.

    Where the unit of the length changes, the warm-up keeps its share of the run. Raises ValueError
    with one line.
    """
    parser = options.Parser(description=description, usage="%(prog)s [options]")
    options.add_options(parser, PRESETS)
    c, given = options.settle(PRESETS, parser.parse_args(argv))
    check(c)
    if {"epochs", "steps"} <= given and c.steps:
        raise ValueError("--epochs and --steps are two units of one length: give one of them")
    preset, steps, warmup = PRESETS[c.preset], 0 if "epochs" in given else c.steps, c.warmup
    if bool(steps) != bool(preset.steps) and "warmup" not in given:
        warmup *= (steps or c.epochs) / (preset.steps or preset.epochs)
    output_dir = c.output_dir or f"runs/{c.preset}"
    return dataclasses.replace(c, output_dir=output_dir, steps=steps, warmup=warmup), given


def check(c: Config) -> None:
    """Options that do not go together. Raises ValueError with one line."""
    if c.dataset == "toy" and c.data_dir:
        raise ValueError(
            f"--data-dir {c.data_dir} with the preset {c.preset}, which draws its own scenes: add "
            "a preset for photographs, such as --preset photos or --preset coco-r50"
        )
    if c.dataset == "toy" and (c.subset < c.batch_size or c.check_data):
        raise ValueError(
            f"--preset {c.preset} draws its own scenes: --subset, how many, is at least "
            f"--batch-size {c.batch_size}, and --check-data has nothing to read"
        )
    if c.check_data and os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("--check-data needs one process: start it without torchrun")
    if c.dataset != "toy" and not c.data_dir:
        raise ValueError(f"the preset {c.preset} needs --data-dir, the folder with the images")
    if c.freeze_backbone and not (c.init or c.pretrained):
        raise ValueError("--freeze-backbone keeps random weights: add --init FILE or --pretrained")
    if c.long_tailed and not c.subset:
        raise ValueError("--long-tailed says how a subset is chosen: add --subset N")


# ---------------------------------------------------------------------------- the slides' ablations


class Row(NamedTuple):
    """One row of an ablation table: its label on the slide, and the options that make it."""

    label: str
    options: tuple[str, ...]  # of the published recipe, with which train.py is that row on COCO
    # Of its toy counterpart; where a number makes no sense on toy scenes, another one
    toy: tuple[str, ...]
    default: bool = False  # the gray row of the slide
    system: str = "slotcon"  # file of comparisons/ that compare.py runs
    arguments: Mapping[str, Any] = {}  # what train.py cannot do, of that system alone


def _row(label: str, words: str, toy: str | None = None, default: bool = False) -> Row:
    """A row whose options are words; toy: those of its toy counterpart, where they differ."""
    return Row(label, tuple(words.split()), tuple((words if toy is None else toy).split()), default)


def _rows(name: str, published: Sequence, toy: Sequence, default: Any) -> tuple[Row, ...]:
    """Rows that differ in the value of one option; default: the published value."""
    pairs = zip(published, toy)
    return tuple(_row(str(v), f"{name} {v}", f"{name} {small}", v == default) for v, small in pairs)


def _without(label: str, words: str, default: bool = False, **arguments: Any) -> Row:
    """A row without the slot loss, in which a way not to collapse is taken away."""
    options = ("--group-weight", "1", *words.split()) if not arguments else ()
    return Row(label, options, tuple(words.split()), default, "self_distillation", arguments)


LAMBDAS = (0.3, 0.5, 0.7, 1.0)
TABLES: dict[str, tuple[str, tuple[Row, ...]]] = {
    "6a": (
        "number of prototypes K",
        _rows("--num-prototypes", (128, 256, 512, 1024), (16, 32, 64, 128), 256),
    ),
    "6b": ("loss balancing lambda_g", _rows("--group-weight", LAMBDAS, LAMBDAS, 0.5)),
    "6c": ("teacher temperature tau_t", _rows("--temp-teacher", (0.04, 0.07), (0.02, 0.03), 0.07)),
    "8a": ("batch size B", _rows("--batch-size", (256, 512, 1024), (8, 16, 32), 512)),
    "8b": (
        "type of group-level loss",
        (_row("Reg.", "--slot-loss reg"), _row("Ctr.", "--slot-loss ctr", default=True)),
    ),
    "8c": (
        "where to apply inverse augmentation",
        (_row("Proj.", "--align proj"), _row("Asgn.", "--align asgn", default=True)),
    ),
    "8d": (
        "batch size and image-level objective",
        (
            _row("512, without", "--batch-size 512", "--batch-size 16", True),
            _row("512, with", "--batch-size 512 --image-loss", "--batch-size 16 --image-loss"),
            _row("1024, without", "--batch-size 1024", "--batch-size 32"),
            _row("1024, with", "--batch-size 1024 --image-loss", "--batch-size 32 --image-loss"),
        ),
    ),
    "8e": (
        "geometric augmentations",
        (_row("with", "--geometric", default=True), _row("without", "--no-geometric")),
    ),
    # Slide "Towards semantic prototypes: deep clustering": each way not to collapse, taken away.
    "collapse": (
        "ways not to collapse, taken away one at a time, without the slot loss",
        (
            _without("all kept", "", True),
            _without("no center", "--momentum-center 1"),
            _without("no sharpening", "--temp-teacher 0.1"),
            _without("no stop-gradient", "", stop_gradient=False),
            _without("no moving average", "--momentum-teacher 0 0"),
        ),
    ),
}
