"""The configuration, the published recipes, and which option is which row of which table of the
slides.

Slides: tables 1, 6 and 8.
Paper: section 4.1 and the ablation studies.
Differs: hyper-parameters of `toy` are ours [U]; each number is explained where it stands.
Read next: train.py, which composes a run from these numbers.

Origins of a value: [P]aper, [O]fficial code, [U]s.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import toy
from backbone import ARCHITECTURES, RESNETS
from data import TwoCrops
from engine import options
from engine.images import (
    LAYOUTS,
    ImageFiles,
    Photograph,
    Photographs,
    choose_subset,
    find_images,
    hold_out,
    look_like_labels,
)
from engine.options import option
from engine.plan import DrawnPhotographs
from engine.run import Options
from engine.schedule import Schedule, warm_up
from photometric import Photometric
from slotcon import SlotCon

# ------------------------------------------------------------------------------------ configuration


# fmt: off
@dataclass(frozen=True)
class Config:
    """Everything that can be set. Defaults: the published COCO recipe."""

    # what is learned from
    preset: str = option("coco-r50", "named recipe that sets all other defaults", free=True)
    data_dir: str = option("", "folder of images, flat or nested, no labels needed, or a text "
        "file of paths", free=True)
    dataset: str = option("folder", "layout of the folder; a preset's layout falls back to a "
        "plain folder, and says so", choices=(*LAYOUTS, "toy"))
    subset: int = option(0, "learn from N images only, 0: all; uniform per class where folders are "
        "classes, else at random; the names are written to subset.txt (table 1)",
        low=0, high=10**9)
    long_tailed: bool = option(False, "the subset's classes follow a Pareto distribution of power "
        "6 (table 1, ImageNet-118K-LT)")
    held_out: int = option(0, "photographs that are kept out of training, for the result at the "
        "end; at most a tenth of them", low=0, high=10**6)
    toy_scenes: int = option(0, "toy scenes drawn for training, preset toy only", low=0)
    toy_test_scenes: int = option(256, "toy scenes of another seed, for the result at the end",
        low=8, free=True)
    # the networks
    arch: str = option("resnet50", "trunk; `tiny` is for toy images of about 64 px",
        choices=ARCHITECTURES)
    image_size: int = option(224, "side of a view, px [P]; the map is 32 times smaller (tiny 4, "
        "small 8)",
        low=32, high=4096)
    num_prototypes: int = option(256, "k; 256 for COCO and COCO+, 2048 for ImageNet [P]",
        low=2, high=1_000_000)
    dim_hidden: int = option(4096, "hidden width of projector and predictor [O]",
        low=1, high=65_536)
    dim_out: int = option(256, "d, width of embeddings, prototypes and slots [O]",
        low=1, high=65_536)
    group_starts: int = option(1, "how often projector, predictor and prototypes start, evenly "
        "over the run, from the second time on in clusters of the trunk's features; above 1 for "
        "toy scenes only [U]", low=1, high=1_000)
    group_clusters: int = option(9, "how many prototypes then start in a cluster, at most k; the "
        "others start at random [U]", low=2, high=1_000_000)
    # the losses
    group_weight: float = option(0.5, "lambda of the group loss; the slot loss has 1 - lambda; at "
        "1 it is skipped [P]", low=0, high=1)
    temp_student: float = option(0.1, "temperature of the student's assignment [P]",
        low=1e-4, high=100)
    temp_teacher: float = option(0.07, "temperature of the teacher's assignment [P]; learning "
        "needs it well below the student's", low=1e-4, high=100)
    temp_teacher_start: float = option(0.0, "the same at the first step, 0: no warm-up [U]",
        low=0, high=100)
    temp_teacher_epochs: float = option(0.0, "from there it changes along a line over these [U]",
        low=0, high=1_000_000)
    temp_pool: float = option(0.0, "temperature of attentive pooling, 0: the teacher's [O]",
        low=0, high=100)
    temp_slot: float = option(0.2, "temperature of the slot contrast [O]", low=1e-4, high=100)
    slot_loss: str = option("ctr", "contrast slots, or regress them (table 8b)",
        choices=("ctr", "reg"))
    align: str = option("asgn", "inverse augmentation on assignments or on projections (table "
        "8c)", choices=("asgn", "proj"))
    image_loss: bool = option(False, "add the image-level objective (table 8d)")
    momentum_center: float = option(0.9, "momentum of the center [O]", low=0, high=1)
    momentum_teacher: float = option(0.99, "the teacher's momentum at the first step [P]",
        low=0, high=1)
    momentum_teacher_end: float = option(1.0, "the teacher's momentum at the last step, reached "
        "along a cosine [P]", low=0, high=1)
    # the views
    geometric: bool = option(True, "random crops and flips; off: both views are the center square "
        "(table 8e)")
    min_area: float = option(0.08, "smallest crop, as a share of the image [O]", low=0.001, high=1)
    max_area: float = option(1.0, "largest crop, as a share of the image [O]", low=0.001, high=1)
    min_overlap: float = option(0.01, "least overlap, as a share of the second crop [O]",
        low=0, high=1)
    brightness: float = option(0.4, "strength of the brightness jitter: factor in 1 +- this [O]",
        low=0, high=1)
    contrast: float = option(0.4, "strength of the contrast jitter: factor in 1 +- this [O]",
        low=0, high=1)
    saturation: float = option(0.2, "strength of the saturation jitter: factor in 1 +- this [O]",
        low=0, high=1)
    hue: float = option(0.1, "largest rotation of the hue, in turns [O]", low=0, high=0.5)
    p_jitter: float = option(0.8, "probability of the jitter [O]", low=0, high=1)
    p_gray: float = option(0.2, "probability of gray [O]", low=0, high=1)
    p_blur: tuple[float, float] = option((1.0, 0.1), "probability of blur, in view 1 and 2 [O]",
        low=0, high=1)
    p_solarize: tuple[float, float] = option((0.0, 0.2), "probability of solarization, in view 1 "
        "and 2 [O]", low=0, high=1)
    solarize_threshold: int = option(128, "gray level from which it inverts [O]; 0 inverts all",
        low=0, high=256)
    # the optimizer
    optimizer: str = option("lars", "LARS [O], or AdamW for small runs", choices=("lars", "adamw"))
    batch_size: int = option(512, "images per optimizer step over all processes [P]",
        low=2, high=1_000_000)
    accumulate: int = option(1, "split each process's share into this many passes, for small "
        "memories; batch norm and contrast then see less", low=1, high=10_000)
    base_lr: float = option(1.0, "learning rate at batch 256; the actual one is base_lr * "
        "batch_size / 256 [O]", low=0, high=100)
    weight_decay: float = option(1e-5, "L2, not on biases and norms [O]", low=0, high=10)
    epochs: int = option(800, "length of the run and of all schedules [P]", low=1, high=1_000_000)
    warmup_epochs: float = option(5.0, "the learning rate rises over these [O]",
        low=0, high=1_000_000)
    steps: int = option(0, "length in optimizer steps instead of epochs, 0: --epochs; a folder of "
        "any size then takes the same time", low=0, high=10**9)
    warmup_steps: int = option(0, "the same for the warm-up, 0: --warmup-epochs",
        low=0, high=10**9)
    seed: int = option(0, "of weights, order, crops and colors", low=0, high=2**31)
    # the machine
    device: str = option("auto", "auto takes a GPU where there is one",
        choices=("auto", "cpu", "cuda", "mps"), free=True)
    amp: str = option("auto", "mixed precision: auto is bf16 where the GPU has it, else fp16, off "
        "on a CPU", choices=("auto", "bf16", "fp16", "off"), free=True)
    channels_last: bool | None = option(None, "memory format of the convolutions (default: on a "
        "CUDA GPU)", free=True)
    compile: bool = option(False, "torch.compile both networks: minutes at the start, faster steps",
        free=True)
    threads: int = option(0, "threads of a CPU process for arithmetic, 0: torch's choice; the "
        "last bits depend on it", low=0, high=4096, free=True)
    workers: int = option(-1, "processes per rank that decode and crop; 0: none, -1: one per core "
        "up to 8", low=-1, high=512, free=True)
    timeout: float = option(600.0, "seconds after which a silent process counts as lost",
        low=1, high=1e6, free=True)
    # what is written
    output_dir: str = option("", "default: runs/PRESET", free=True)
    init: str = option("", "start from these weights: a checkpoint, or a backbone.pth", free=True)
    resume: str = option("auto", "auto continues output-dir/last.pth if it is there; or a path; "
        "or none", free=True)
    force_resume: bool = option(False, "continue although options that matter have changed",
        free=True)
    log_every: int = option(10, "steps between lines of log.jsonl",
        low=1, high=1_000_000, free=True)
    save_every: int = option(1, "epochs between two writings of last.pth",
        low=1, high=1_000_000, free=True)
    save_minutes: float = option(10.0, "minutes between two writings of last.pth, 0: epochs only",
        low=0, high=1e6, free=True)
    keep_every: int = option(100, "keep epoch_N.pth at every such epoch, 0: none",
        low=0, high=1_000_000, free=True)
    keep_last: int = option(0, "keep the newest epoch_N.pth too, so many",
        low=0, high=1_000_000, free=True)
    max_steps: int = option(0, "stop after this many optimizer steps in all, 0: at the end; "
        "schedules do not change", low=0, high=10**9, free=True)
    max_bad_share: float = option(0.01, "stop when more than this share of the images cannot be "
        "read", low=0, high=1, free=True)
    max_bad_steps: int = option(20, "stop after this many steps in a row without a finite loss "
        "and gradient", low=1, high=10**6, free=True)
    on_save_error: str = option("continue", "when the disk refuses a checkpoint",
        choices=("continue", "stop"), free=True)
    tensorboard: bool = option(False, "also log to TensorBoard, if it is installed", free=True)
    check_data: bool = option(False, "only read every image once, report the bad ones, and exit",
        free=True)
    plan: bool = option(False, "only say what the run would need, and exit: hours, memory, bytes "
        "on the wire, disk; a few steps are measured on random images, nothing is written",
        free=True)
    plan_processes: int = option(1, "with --plan: processes of the run, so many GPUs",
        low=1, high=100_000, free=True)
    plan_images: int = option(0, "with --plan: number of images, where there is no --data-dir; 0: "
        "that of the preset's data set", low=0, high=10**12, free=True)

NEVER = 1_000_000  # epochs: --save-every of a preset that saves by the clock
COCO = Config(dataset="coco")
PRESETS = {
    # Hyper-parameters differ from the published recipe where three minutes on a laptop ask for it,
    # the method in one point: group_starts. All [U]; what it learns and what was tried:
    # benchmarks/toy.md.
    # The networks: widths for 8 classes, a trunk that sees 17 px and averages over the period of a
    #   texture. A view has the size of a typical crop of a 64 px scene, so textures keep the scale
    #   that they have in whole scenes.
    # num_prototypes, momentum_center: 32 prototypes and a center quicker than the published 0.9.
    #   With 16 and 0.9 more seeds left two classes in one group, which lets no other prototype in
    #   (measured with the trunk before).
    # group_starts, group_clusters: classes that look alike at first begin with one prototype and
    #   keep it; the trunk learns to tell them apart all the same. So the groups start anew after
    #   each third of the run (regroup.py). Nine is one more than the classes: of ten or more
    #   clusters, two share the waves or the ball. With one start the run is the published method.
    # min_area: a crop of 0.2 enlarges a texture 1.7 times, the published 0.08 would 2.7 times.
    # temp_teacher: a feature grows only if its correlation between the views exceeds temp_teacher /
    #   temp_student. An untrained trunk offers less than the published 0.7.
    # momentum_teacher_end: classes split off until the end, so the teacher stays quick.
    # The colors would be a shortcut, so they carry nothing: any hue, half of the views inverted
    #   (solarized from 0 up). The jitter of contrast is mild, and nothing is blurred: contrast and
    #   detail are what untrained features see of a texture.
    # The optimizer: many small steps, AdamW at 0.01. LARS (1.0 per 256) is made for large batches.
    # threads: one, so that a run leaves the second core to others. Whether two are quicker on a
    #   quiet machine has not been measured (benchmarks/README.md).
    "toy": dataclasses.replace(
        COCO, preset="toy", dataset="toy", toy_scenes=768, arch="tiny", image_size=48,
        num_prototypes=32, dim_hidden=64, dim_out=32, group_starts=3, temp_teacher=0.03,
        momentum_center=0.8, momentum_teacher_end=0.99, min_area=0.2, brightness=0.2,
        contrast=0.2, saturation=0.3, hue=0.5, p_jitter=1.0, p_blur=(0.0, 0.0),
        p_solarize=(0.5, 0.5), solarize_threshold=0, optimizer="adamw", batch_size=16,
        base_lr=0.16, weight_decay=0.01, epochs=36, warmup_epochs=0.625, channels_last=True,
        threads=1, workers=1, log_every=20, save_every=10, keep_every=0,
    ),
    # For a folder of photographs and one small machine: about half an hour on 2 cores, for any
    # folder from about 300 photographs on. All [U]; measured in benchmarks/photos.md.
    # The networks: the small trunk; 24 prototypes: of 32 about half died.
    # image_size: small views are many views per second; the trunk is shown whole images afterwards.
    # temp_teacher: 0.3 of the student's. An untrained trunk's features correlate less between two
    # views than the published 0.7, so that nothing would grow.
    # momentum_center: quicker than the published 0.9; 19 or 20 of 24 prototypes stay in use.
    # momentum_teacher_end: a short run has no time for a teacher that slows down.
    # The colors: hue, gray and solarization are mild or off. Grass is green and the sky is blue: in
    # photographs color says what a thing is, and a network that must not use it learns less here.
    # The optimizer: AdamW at 0.003 and batches of 32; LARS is made for large batches.
    # steps: the length does not depend on the number of photographs.
    "photos": dataclasses.replace(
        COCO, preset="photos", dataset="folder", held_out=64, arch="small", image_size=64,
        num_prototypes=24, dim_hidden=256, dim_out=64, temp_teacher=0.03, momentum_center=0.8,
        momentum_teacher_end=0.99, min_area=0.2, hue=0.05, p_gray=0.0, p_blur=(0.2, 0.1),
        p_solarize=(0.0, 0.0), optimizer="adamw", batch_size=32, base_lr=0.024, weight_decay=0.01,
        steps=3000, warmup_steps=80, channels_last=True, threads=1, workers=1, log_every=20,
        save_every=NEVER, save_minutes=2.0, keep_every=0,
    ),
    "coco-r50": COCO,
    "cocoplus-r50": dataclasses.replace(COCO, preset="cocoplus-r50", dataset="cocoplus"),
    "imagenet-r50-100ep": dataclasses.replace(
        COCO, preset="imagenet-r50-100ep", dataset="imagenet", num_prototypes=2048, epochs=100,
        keep_every=20),
    "imagenet-r50-200ep": dataclasses.replace(
        COCO, preset="imagenet-r50-200ep", dataset="imagenet", num_prototypes=2048, epochs=200,
        keep_every=20),
    # length [U]: as COCO
    "bdd100k-r50": dataclasses.replace(COCO, preset="bdd100k-r50", dataset="bdd100k"),
}
# fmt: on


NUM_IMAGES = {"coco": 118_287, "cocoplus": 241_690, "imagenet": 1_281_167, "bdd100k": 90_000}  # [P]

# ---------------------------------------------------------------------------- the slides' ablations


class Row(NamedTuple):
    """One row of an ablation table: its label on the slide, and the options that make it."""

    label: str
    options: tuple[str, ...]  # of the published recipe, with which train.py is that row on COCO
    # Of its toy counterpart; where a number makes no sense on toy scenes, another one
    toy: tuple[str, ...]
    default: bool = False  # the gray row of the slide
    system: str = "slotcon"  # file of comparisons/ that compare.py runs
    arguments: tuple[tuple[str, Any], ...] = ()  # what train.py cannot do, of that system alone


def _rows(option: str, published: Sequence, toy: Sequence, default: Any) -> tuple[Row, ...]:
    """Rows that differ in one number. published, toy: the values, row by row; default: the
    published one.
    """
    return tuple(
        Row(str(value), (option, str(value)), (option, str(small)), value == default)
        for value, small in zip(published, toy)
    )


TABLES: dict[str, tuple[str, tuple[Row, ...]]] = {
    "6a": (
        "number of prototypes K",
        _rows("--num-prototypes", (128, 256, 512, 1024), (16, 32, 64, 128), 256),
    ),
    "6b": (
        "loss balancing lambda_g",
        _rows("--group-weight", (0.3, 0.5, 0.7, 1.0), (0.3, 0.5, 0.7, 1.0), 0.5),
    ),
    "6c": ("teacher temperature tau_t", _rows("--temp-teacher", (0.04, 0.07), (0.02, 0.03), 0.07)),
    "8a": ("batch size B", _rows("--batch-size", (256, 512, 1024), (8, 16, 32), 512)),
    "8b": (
        "type of group-level loss",
        (
            Row("Reg.", ("--slot-loss", "reg"), ("--slot-loss", "reg")),
            Row("Ctr.", ("--slot-loss", "ctr"), ("--slot-loss", "ctr"), True),
        ),
    ),
    "8c": (
        "where to apply inverse augmentation",
        (
            Row("Proj.", ("--align", "proj"), ("--align", "proj")),
            Row("Asgn.", ("--align", "asgn"), ("--align", "asgn"), True),
        ),
    ),
    "8d": (
        "batch size and image-level objective",
        (
            Row("512, without", ("--batch-size", "512"), ("--batch-size", "16"), True),
            Row(
                "512, with",
                ("--batch-size", "512", "--image-loss"),
                ("--batch-size", "16", "--image-loss"),
            ),
            Row("1024, without", ("--batch-size", "1024"), ("--batch-size", "32")),
            Row(
                "1024, with",
                ("--batch-size", "1024", "--image-loss"),
                ("--batch-size", "32", "--image-loss"),
            ),
        ),
    ),
    "8e": (
        "geometric augmentations",
        (
            Row("with", ("--geometric",), ("--geometric",), True),
            Row("without", ("--no-geometric",), ("--no-geometric",)),
        ),
    ),
    # Slide "Towards semantic prototypes: deep clustering": each way not to collapse, taken away.
    "collapse": (
        "ways not to collapse, taken away one at a time, without the slot loss",
        (
            Row("all of them", ("--group-weight", "1"), (), True, "self_distillation"),
            Row(
                "no center",
                ("--group-weight", "1", "--momentum-center", "1"),
                ("--momentum-center", "1"),
                system="self_distillation",
            ),
            Row(
                "no sharpening",
                ("--group-weight", "1", "--temp-teacher", "0.1"),
                ("--temp-teacher", "0.1"),
                system="self_distillation",
            ),
            Row(
                "no stop-gradient",
                (),
                (),
                system="self_distillation",
                arguments=(("stop_gradient", False),),
            ),
            Row(
                "no moving average",
                ("--group-weight", "1", "--momentum-teacher", "0", "--momentum-teacher-end", "0"),
                ("--momentum-teacher", "0", "--momentum-teacher-end", "0"),
                system="self_distillation",
            ),
        ),
    ),
}


def command(row: Row, data_dir: str = "COCO") -> str:
    """The command that trains a row of a table on COCO, or on toy scenes where train.py cannot."""
    if row.arguments:
        return "python compare.py --table " + next(
            name for name, (_, rows) in TABLES.items() if row in rows
        )
    return " ".join(["python train.py --preset coco-r50 --data-dir", data_dir, *row.options])


# ---------------------------------------------------------------------------- from options to a run


def parse(argv: Sequence[str] | None, description: str) -> tuple[Config, set[str]]:
    """The command line -> configuration, and the names of the options given. Raises ValueError with
    one line.
    """
    c, given = options.parse(PRESETS, argv, description)
    if c.dataset == "toy" and c.data_dir:
        raise ValueError(
            f"--data-dir {c.data_dir} with the preset {c.preset}, which draws its own scenes: "
            "add a preset for photographs, such as --preset coco-r50"
        )
    check_plan(c, given)
    if c.dataset != "toy" and not (c.data_dir or c.plan):
        raise ValueError(f"the preset {c.preset} needs --data-dir, the folder with the images")
    if c.dataset == "toy" and c.toy_scenes < c.batch_size:
        raise ValueError(
            f"--toy-scenes {c.toy_scenes} are fewer than --batch-size {c.batch_size}: draw more"
        )
    check_given(c, given)
    # What was asked for in epochs is not overruled by a preset that counts steps.
    steps = 0 if "epochs" in given and "steps" not in given else c.steps
    warmup = 0 if "warmup_epochs" in given and "warmup_steps" not in given else c.warmup_steps
    paths = {name: os.path.expanduser(getattr(c, name)) for name in ("data_dir", "init", "resume")}
    folder = os.path.expanduser(c.output_dir or f"runs/{c.preset}")
    settled = dict(paths, output_dir=folder, steps=steps, warmup_steps=warmup)
    return dataclasses.replace(c, **settled), given


def check_given(c: Config, given: set[str]) -> None:
    """Options that would have no effect beside the others are refused. Raises ValueError."""
    if c.dataset == "toy" and c.subset:
        raise ValueError("--subset is for photographs; of toy scenes draw fewer: --toy-scenes")
    if c.dataset != "toy" and c.group_starts > 1:
        raise ValueError(
            f"--group-starts {c.group_starts} is for toy scenes, and has not been measured on "
            "photographs: leave it out"
        )
    if "group_clusters" in given and c.group_starts == 1:
        raise ValueError("--group-clusters says how the groups start anew: add --group-starts N")
    if c.long_tailed and not c.subset:
        raise ValueError("--long-tailed says how a subset is chosen: add --subset N")
    if c.temp_teacher_start and not c.temp_teacher_epochs:
        raise ValueError(
            "--temp-teacher-start says where the temperature begins: add --temp-teacher-epochs, "
            "over which it moves"
        )
    for name in ("epochs", "warmup_epochs"):
        steps = name.replace("epochs", "steps")
        if {name, steps} <= given and getattr(c, steps):
            raise ValueError(f"{options.flag(name)} and {options.flag(steps)}: give one of them")
    if "keep_last" in given and c.keep_last and c.save_every >= NEVER:
        raise ValueError(
            "--keep-last keeps some of what --save-every writes, which this preset leaves to the "
            "clock: add --save-every N, epochs"
        )


def check_plan(c: Config, given: set[str]) -> None:
    """The options of --plan go together. Raises ValueError."""
    alone = sorted(options.flag(name) for name in given & {"plan_processes", "plan_images"})
    if alone and not c.plan:
        raise ValueError(f"{alone[0]} says what --plan plans for: add --plan")
    if c.plan and c.check_data:
        raise ValueError("--plan reads no images and --check-data reads all: give one of them")
    if c.plan_images and (c.data_dir or c.dataset == "toy"):
        raise ValueError(
            f"--plan-images {c.plan_images}, but the images of this run are counted: leave it out"
        )
    if c.plan and not (c.data_dir or c.plan_images or c.dataset in (*NUM_IMAGES, "toy")):
        raise ValueError(
            f"--plan with the preset {c.preset} needs the number of images: --plan-images N, or "
            "--data-dir, the folder with the images"
        )


def images_of(c: Config, strict: bool = False) -> tuple[Sequence[Tensor | Photograph], str]:
    """The training images, for `crops_of`, and lines that say what they are.

    strict: a layout that was asked for by name must be there; a preset's layout may turn out to be
    any folder. Raises ValueError where there are too few.
    """
    if c.dataset == "toy":
        return toy.ToyImages(c.seed, c.toy_scenes), f"{c.toy_scenes} toy scenes, drawn here"
    if c.plan and not c.data_dir:
        there = c.plan_images or NUM_IMAGES[c.dataset]
        there -= min(c.held_out, there // 10)
        if c.subset > there:
            raise ValueError(f"--subset {c.subset}, but there are {there} images: take fewer")
        count = c.subset or there
        return DrawnPhotographs(count), f"{count} images, for which a drawn one stands"
    root, paths, notice = find_images(c.data_dir, c.dataset, strict)
    about = f"{len(paths)} images: " + (notice or f"{c.data_dir}, layout {c.dataset}")
    paths, out = hold_out(paths, c.held_out, c.seed)
    if len(out):
        about += f"; {len(out)} are kept out for the result"
    if c.subset:
        paths, how = choose_subset(paths, c.subset, c.seed, c.long_tailed)
        about += f"; {len(paths)} of {'the others' if len(out) else 'them'}, {how}"
    doubt = look_like_labels(paths)
    return Photographs(root, paths), about + (f"\nwarning  {doubt}" if doubt else "")


def held_out_images(c: Config, names: Sequence[str] | None = None) -> ImageFiles:
    """The photographs that `images_of` keeps out of training. names: those that were kept out when
    the run began; None: of the folder as it is now.
    """
    root, paths, _ = find_images(c.data_dir, c.dataset, strict=False)
    if names is not None:
        return ImageFiles(root, np.array(names, dtype=str))
    return ImageFiles(root, hold_out(paths, c.held_out, c.seed)[1])


def with_held_out(c: Config, images: ImageFiles) -> ImageFiles:
    """The training images and those kept out, as files."""
    return ImageFiles(images.root, np.concatenate([images.paths, held_out_images(c).paths]))


def model_of(c: Config, device: torch.device | str = "cpu", synchronized: bool = False) -> SlotCon:
    """The model with random weights, the same on every process. synchronized: batch norms count all
    ranks' rows.
    """
    device = torch.device(device)
    torch.manual_seed(c.seed)
    names = inspect.signature(SlotCon).parameters
    model = SlotCon(**{name: getattr(c, name) for name in names}).to(device).train()
    if synchronized and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # on a CPU it raises
    channels_last = device.type == "cuda" if c.channels_last is None else c.channels_last
    return model.to(memory_format=torch.channels_last) if channels_last else model


def compile_networks(model: SlotCon) -> None:
    """--compile: what takes time of both networks, in place."""
    for network in (model.student, model.teacher):
        network.backbone.compile()
        network.projector.compile()


def crops_of(c: Config) -> TwoCrops:
    """What cuts two views out of an image."""
    return TwoCrops(
        c.image_size, c.min_area, c.min_overlap, geometric=c.geometric, max_area=c.max_area
    )


def photometric_of(c: Config) -> Photometric:
    """What changes the colors of a batch."""
    return Photometric(
        c.brightness,
        c.contrast,
        c.saturation,
        c.hue,
        c.p_jitter,
        c.p_gray,
        c.p_blur,
        p_solarize=c.p_solarize,
        solarize_threshold=c.solarize_threshold,
    )


def run_options(c: Config) -> Options:
    """The part of the configuration that is about any run."""
    return Options(**{f.name: getattr(c, f.name) for f in dataclasses.fields(Options)})


def check_batch(c: Config, world_size: int, num_images: int) -> None:
    """The batch fits the processes and the images. Raises ValueError."""
    parts = world_size * c.accumulate
    if c.batch_size % parts:
        raise ValueError(
            f"--batch-size {c.batch_size} must be divisible by {world_size} process(es) x "
            f"--accumulate {c.accumulate}: take {max(c.batch_size // parts, 1) * parts}"
        )
    if num_images < c.batch_size:
        most = num_images // parts * parts
        advice = f"take at most {most}" if most else "take more images or a lower --accumulate"
        raise ValueError(
            f"--batch-size {c.batch_size} is larger than the data set of {num_images} images: "
            f"{advice}"
        )
    if c.batch_size == parts and c.image_size <= 32 and c.arch in RESNETS:
        raise ValueError(
            "one image of 32 px per process is one value per channel, and batch norm needs two: "
            "take larger images or more of them"
        )


def schedule_of(c: Config, num_images: int) -> Schedule:
    """What the run intends, in optimizer steps. The peak learning rate is base_lr * batch_size /
    256 [O].
    """
    steps_per_epoch = num_images // c.batch_size
    total = c.steps or c.epochs * steps_per_epoch
    warmup = c.warmup_steps or round(c.warmup_epochs * steps_per_epoch)
    last = min(total, c.max_steps or total)
    return Schedule(steps_per_epoch, total, warmup, last, c.base_lr * c.batch_size / 256)


def regroup_positions(c: Config, schedule: Schedule) -> set[int]:
    """The batches before which the groups start anew."""
    total = schedule.total_steps
    return {round(i * total / c.group_starts) for i in range(1, c.group_starts)}


def regroup_images(c: Config) -> Tensor:
    """Whole scenes (b 3 y x) uint8, at most 256 of those that are learned from."""
    return toy.ToyImages(c.seed, min(256, c.toy_scenes)).images


def teacher_temperature(c: Config, schedule: Schedule, step: int) -> float:
    """Of the teacher's assignment in the step that follows so many."""
    if not c.temp_teacher_start:
        return c.temp_teacher
    steps = round(c.temp_teacher_epochs * schedule.steps_per_epoch)
    return warm_up(step, steps, c.temp_teacher_start, c.temp_teacher)


def doubts(c: Config, schedule: Schedule, world_size: int) -> list[str]:
    """What a person may not have meant, a line each; the run goes on."""
    found = []
    if schedule.warmup_steps >= schedule.total_steps:
        found.append(
            f"the warm-up of {schedule.warmup_steps} steps is not shorter than the run of "
            f"{schedule.total_steps}: the learning rate only rises; lower --warmup-epochs"
        )
    if c.accumulate > 1 and c.batch_size // (world_size * c.accumulate) == 1:
        found.append(
            f"--accumulate {c.accumulate} leaves one image per pass: batch norm and contrast see "
            "no other image; lower it"
        )
    return found


def differences(c: Config, num_images: int, digest: str, saved: Mapping[str, Any]) -> list[str]:
    """What a checkpoint was made with and this run is not; empty where --force-resume allows it.

    digest: of the names of the images; "" for toy scenes.
    """
    changed = options.differences(c, saved["config"])
    if saved["num_images"] != num_images:
        changed.append(f"images: {saved['num_images']} then, {num_images} now")
    elif saved.get("notes", {}).get("images", digest) != digest:
        changed.append(f"images: as many then ({num_images}), but with other names")
    return [] if c.force_resume else changed


def describe(c: Config, schedule: Schedule, world_size: int, model: Any) -> str:
    """What will be trained, on a few lines. model: a SlotCon."""

    def million(part: nn.Module) -> float:
        return sum(p.numel() for p in part.parameters() if p.requires_grad) / 1e6

    ln_k = math.log(c.num_prototypes)
    return "\n".join(
        [
            f"network  {c.arch} {million(model.student.backbone):.2f} M, projector "
            f"{million(model.student.projector):.2f} M, {c.num_prototypes} prototypes; "
            f"{million(model):.2f} M parameters trained",
            f"batch    {c.batch_size} = {c.batch_size // world_size} x {world_size} process(es); "
            f"{schedule.steps_per_epoch} steps per epoch, {schedule.total_steps} in all",
            f"lr       {schedule.peak:g} = {c.base_lr:g} x {c.batch_size} / 256, {c.optimizer}, "
            f"warm-up {schedule.warmup_steps} steps",
            f"chance   ln k = {ln_k:.4f}; the group loss, a sum of two directions, is "
            f"{2 * ln_k:.4f} for a uniform assignment",
        ]
    )
