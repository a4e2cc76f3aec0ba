"""Pretrain SlotCon: student, teacher, centre and two losses, on toy scenes or on a folder of photographs.

    python train.py                                                  toy scenes, two minutes on a laptop
    python train.py --preset coco-r50 --data-dir COCO                the published recipe, one process
    torchrun --nproc-per-node=8 train.py --preset coco-r50 --data-dir COCO      the same on eight GPUs

Slide: "Together: solving segmentation & representation jointly". Paper: sections 3 and 4.1.
Differs: starts without a launcher; the two losses are normalised over all ranks (losses.py); a step whose loss or
gradient is not finite changes nothing; every random choice is a function of the seed and of the position in the run.
Read next: evaluate.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

import data
import evaluate
import losses
import photometric
import toy
import visualize
from backbone import ARCHITECTURES
from engine import checkpoint, files, loader, options, processes, ranks, weights
from engine.images import LAYOUTS, ImageFiles, find_images
from engine.journal import Log, brief, introduce, say, write_json
from engine.lars import LARS
from engine.options import option
from measures import labels
from slotcon import SlotCon, statistics
from teacher import teacher_momentum

# ------------------------------------------------------------------------------------------ configuration


@dataclass(frozen=True)
class Config:
    """Everything that can be set. Defaults: the published COCO recipe. Origins: [P]aper, [O]fficial code, [U]s."""

    # what is learned from
    preset: str = option("coco-r50", "named recipe that sets all other defaults", free=True)
    data_dir: str = option("", "folder of images, flat or nested, no labels needed, or a text file of paths", free=True)
    dataset: str = option("folder", "layout of the folder; a preset's layout falls back to a plain folder, and says so",
                          choices=(*LAYOUTS, "toy"))
    toy_scenes: int = option(0, "toy scenes drawn for training, preset toy only", low=0)
    toy_test_scenes: int = option(256, "toy scenes of another seed, for the result at the end", low=8, free=True)
    # the networks
    arch: str = option("resnet50", "trunk; `tiny` is for toy images of about 64 px", choices=ARCHITECTURES)
    image_size: int = option(224, "side of a view, px [P]; the map is 32 (tiny: 4) times smaller", low=32, high=4096)
    num_prototypes: int = option(256, "k; 256 for COCO and COCO+, 2048 for ImageNet [P]", low=2, high=1_000_000)
    dim_hidden: int = option(4096, "hidden width of projector and predictor [O]", low=1, high=65_536)
    dim_out: int = option(256, "d, width of embeddings, prototypes and slots [O]", low=1, high=65_536)
    # the losses
    group_weight: float = option(0.5, "lambda of the group loss; the slot loss has 1 - lambda; at 1 it is skipped [P]",
                                 low=0, high=1)
    temp_student: float = option(0.1, "temperature of the student's assignment [P]", low=1e-4, high=100)
    temp_teacher: float = option(0.07, "temperature of the teacher's assignment [P]; learning needs it well below "
                                 "the student's", low=1e-4, high=100)
    temp_pool: float = option(0.0, "temperature of attentive pooling, 0: the teacher's [O]", low=0, high=100)
    temp_slot: float = option(0.2, "temperature of the slot contrast [O]", low=1e-4, high=100)
    slot_loss: str = option("ctr", "contrast slots, or regress them (table 8b)", choices=("ctr", "reg"))
    align: str = option("asgn", "inverse augmentation on assignments or on projections (table 8c)",
                        choices=("asgn", "proj"))
    image_loss: bool = option(False, "add the image-level objective (table 8d)")
    momentum_center: float = option(0.9, "momentum of the centre [O]", low=0, high=1)
    momentum_teacher: float = option(0.99, "the teacher's momentum at the first step [P]", low=0, high=1)
    momentum_teacher_end: float = option(1.0, "the teacher's momentum at the last step, reached along a cosine [P]",
                                         low=0, high=1)
    # the views
    geometric: bool = option(True, "random crops and flips; off: both views are the centre square (table 8e)")
    min_area: float = option(0.08, "smallest crop, as a share of the image [O]", low=0.001, high=1)
    min_overlap: float = option(0.01, "least overlap, as a share of the second crop [O]", low=0, high=1)
    brightness: float = option(0.4, "strength of the brightness jitter: factor in 1 +- this [O]", low=0, high=1)
    contrast: float = option(0.4, "strength of the contrast jitter: factor in 1 +- this [O]", low=0, high=1)
    saturation: float = option(0.2, "strength of the saturation jitter: factor in 1 +- this [O]", low=0, high=1)
    hue: float = option(0.1, "largest rotation of the hue, in turns [O]", low=0, high=0.5)
    p_jitter: float = option(0.8, "probability of the jitter [O]", low=0, high=1)
    p_gray: float = option(0.2, "probability of grey [O]", low=0, high=1)
    p_blur: tuple[float, float] = option((1.0, 0.1), "probability of blur, in view 1 and 2 [O]", low=0, high=1)
    p_solarize: tuple[float, float] = option((0.0, 0.2), "probability of solarisation, in view 1 and 2 [O]",
                                             low=0, high=1)
    solarize_threshold: int = option(128, "grey level from which it inverts [O]; 0 inverts all", low=0, high=256)
    # the optimiser
    optimizer: str = option("lars", "LARS [O], or AdamW for small runs", choices=("lars", "adamw"))
    batch_size: int = option(512, "images per optimiser step over all processes [P]", low=2, high=1_000_000)
    accumulate: int = option(1, "split each process's share into this many passes, for small memories; batch norm and "
                             "contrast then see less", low=1, high=10_000)
    base_lr: float = option(1.0, "learning rate at batch 256; the actual one is base_lr * batch_size / 256 [O]",
                            low=0, high=100)
    weight_decay: float = option(1e-5, "L2, not on biases and norms [O]", low=0, high=10)
    epochs: int = option(800, "length of the run and of all schedules [P]", low=1, high=1_000_000)
    warmup_epochs: float = option(5.0, "the learning rate rises over these [O]", low=0, high=1_000_000)
    seed: int = option(0, "of weights, order, crops and colours", low=0, high=2**31)
    # the machine
    device: str = option("auto", "auto takes a GPU where there is one", choices=("auto", "cpu", "cuda", "mps"),
                         free=True)
    amp: str = option("auto", "mixed precision: auto is bf16 where the GPU has it, else fp16, off on a CPU",
                      choices=("auto", "bf16", "fp16", "off"), free=True)
    channels_last: bool | None = option(None, "memory format of the convolutions (default: on a CUDA GPU)", free=True)
    compile: bool = option(False, "torch.compile both networks: minutes at the start, faster steps", free=True)
    threads: int = option(0, "threads of a CPU process for arithmetic, 0: torch's choice; the last bits depend on it",
                          low=0, high=4096, free=True)
    workers: int = option(-1, "processes per rank that decode and crop; 0: none, -1: one per core up to 8", low=-1,
                          high=512, free=True)
    timeout: float = option(600.0, "seconds after which a silent process counts as lost", low=1, high=1e6, free=True)
    # what is written
    output_dir: str = option("", "default: runs/PRESET", free=True)
    resume: str = option("auto", "auto continues output-dir/last.pth if it is there; or a path; or none", free=True)
    force_resume: bool = option(False, "continue although options that matter have changed", free=True)
    log_every: int = option(10, "steps between lines of log.jsonl", low=1, high=1_000_000, free=True)
    save_every: int = option(1, "epochs between two writings of last.pth", low=1, high=1_000_000, free=True)
    keep_every: int = option(100, "keep epoch_N.pth at every such epoch, 0: none", low=0, high=1_000_000, free=True)
    keep_last: int = option(0, "keep the newest epoch_N.pth too, so many", low=0, high=1_000_000, free=True)
    max_steps: int = option(0, "stop after this many optimiser steps in all, 0: at the end; schedules do not change",
                            low=0, high=10**9, free=True)
    max_bad_share: float = option(0.01, "stop when more than this share of the images cannot be read", low=0, high=1,
                                  free=True)
    max_bad_steps: int = option(20, "stop after this many steps in a row without a finite loss and gradient", low=1,
                                high=10**6, free=True)
    on_save_error: str = option("continue", "when the disk refuses a checkpoint", choices=("continue", "stop"),
                                free=True)
    tensorboard: bool = option(False, "also log to TensorBoard, if it is installed", free=True)
    check_data: bool = option(False, "only read every image once, report the bad ones, and exit", free=True)


COCO = Config(dataset="coco")
PRESETS = {
    # Hyper-parameters differ from the published recipe where two minutes on a laptop ask for it, the method nowhere.
    # All [U]; what it learns and what else was tried stand in benchmarks/toy.md.
    # The networks: 8 classes, so 16 prototypes; widths to match; a trunk that sees 17 px. A view has the size of a
    #   typical crop of a 64 px scene: textures keep the scale that they have in the whole scenes shown at the end.
    # min_area: a crop of 0.2 enlarges a texture 1.7 times, the published 0.08 would 2.7 times.
    # temp_teacher: a feature grows only if its correlation between the views exceeds temp_teacher / temp_student. 0.7,
    #   as published, is more than an untrained trunk offers.
    # momentum_teacher_end: the teacher is as quick at the end as at the start, since things split off until the end.
    # The colours are the shortcut, so they say nothing: any hue, half of the views inverted (solarised from 0 up). The
    #   contrast is what untrained features see of a texture, so its jitter is mild, and nothing is blurred away.
    # The optimiser: many small steps, AdamW at 0.01. LARS (1.0 per 256) is made for large batches.
    # threads: one, since two that wait for each other were ten times slower on a busy machine.
    "toy": dataclasses.replace(
        COCO, preset="toy", dataset="toy", toy_scenes=768, arch="tiny", image_size=48, num_prototypes=16,
        dim_hidden=64, dim_out=32, temp_teacher=0.03, momentum_teacher_end=0.99, min_area=0.2, brightness=0.2,
        contrast=0.2, saturation=0.3, hue=0.5, p_jitter=1.0, p_blur=(0.0, 0.0), p_solarize=(0.5, 0.5),
        solarize_threshold=0, optimizer="adamw", batch_size=16, base_lr=0.16, weight_decay=0.01, epochs=36,
        warmup_epochs=0.625, channels_last=True, threads=1, workers=1, log_every=20, save_every=10, keep_every=0,
    ),
    "coco-r50": COCO,
    "cocoplus-r50": dataclasses.replace(COCO, preset="cocoplus-r50", dataset="cocoplus"),
    "imagenet-r50-100ep": dataclasses.replace(
        COCO, preset="imagenet-r50-100ep", dataset="imagenet", num_prototypes=2048, epochs=100, keep_every=20),
    "imagenet-r50-200ep": dataclasses.replace(
        COCO, preset="imagenet-r50-200ep", dataset="imagenet", num_prototypes=2048, epochs=200, keep_every=20),
    "bdd100k-r50": dataclasses.replace(COCO, preset="bdd100k-r50", dataset="bdd100k"),  # length [U]: as COCO
}


def parse(argv: list[str] | None = None) -> tuple[Config, set[str]]:
    """The command line -> configuration, and the names of the options given. Raises ValueError with one line."""
    c, given = options.parse(PRESETS, argv, __doc__)
    if c.dataset == "toy" and c.data_dir:
        raise ValueError(f"--data-dir {c.data_dir} with the preset {c.preset}, which draws its own scenes: "
                         "add a preset for photographs, such as --preset coco-r50")
    if c.dataset != "toy" and not c.data_dir:
        raise ValueError(f"the preset {c.preset} needs --data-dir, the folder with the images")
    if c.dataset == "toy" and c.toy_scenes < c.batch_size:
        raise ValueError(f"--toy-scenes {c.toy_scenes} are fewer than --batch-size {c.batch_size}: draw more")
    return dataclasses.replace(c, output_dir=c.output_dir or f"runs/{c.preset}"), given


# ------------------------------------------------------------------------------------------ schedule, optimiser


def learning_rate(step: int, total_steps: int, warmup_steps: int, peak: float) -> float:
    """Linear from peak / 100 over the warm-up, then a cosine down to 1e-6, at every optimiser step [O].

    lr(t) = peak / 100 (99 t / T_w + 1) for t < T_w, then 1e-6 + (peak - 1e-6) (1 + cos(pi (t - T_w) / (T - T_w))) / 2.
    """
    if step < warmup_steps:
        return peak / 100 * (99 * step / warmup_steps + 1)
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return 1e-6 + (peak - 1e-6) * (1 + math.cos(math.pi * progress)) / 2


def make_model(c: Config) -> SlotCon:
    torch.manual_seed(c.seed)  # the same start on every process
    names = inspect.signature(SlotCon).parameters
    return SlotCon(**{name: getattr(c, name) for name in names})


def make_optimizer(model: SlotCon, c: Config, lr: float) -> torch.optim.Optimizer:
    """Over what the gradient trains: student and predictor."""
    weights = [p for p in model.parameters() if p.requires_grad]
    if c.optimizer == "lars":
        return LARS(weights, lr, weight_decay=c.weight_decay)
    groups = [dict(params=[p for p in weights if p.ndim != 1]),
              dict(params=[p for p in weights if p.ndim == 1], weight_decay=0.0)]  # as LARS: not on biases and norms
    return torch.optim.AdamW(groups, lr, weight_decay=c.weight_decay)


# ------------------------------------------------------------------------------------------ the run


def train(c: Config, given: set[str], signals: processes.StopSignals, at_end: contextlib.ExitStack) -> None:
    """The whole run. Raises ValueError, with one line, for what the person at the keyboard can change, and Stopped."""
    began = time.perf_counter()
    # ---- who, what, how many
    if c.threads:
        torch.set_num_threads(c.threads)
    place = processes.start(c.device, c.timeout)
    chief, device, folder = place.rank == 0, place.device, Path(c.output_dir)
    dtype = processes.precision(c.amp, device)
    images, about = find_images(c, given)
    check_batch(c, place, len(images))
    steps_per_epoch = len(images) // c.batch_size
    total_steps, warmup_steps = c.epochs * steps_per_epoch, round(c.warmup_epochs * steps_per_epoch)
    last_step = min(total_steps, c.max_steps or total_steps)
    peak_lr = c.base_lr * c.batch_size / 256

    # ---- model and optimiser, new or continued
    model = make_model(c).to(device).train()
    if place.world_size > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # on a CPU it raises
    if device.type == "cuda" if c.channels_last is None else c.channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = make_optimizer(model, c, peak_lr)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step, position = 0, 0  # optimiser steps taken, batches consumed: more, since a step without finite numbers is none
    earlier = 0.0  # seconds that this run has taken before it was interrupted
    logged, sums, bad_steps = 0, [0.0] * 4, 0  # step of the last line in the log, and what adds up for the next one
    last = folder / "last.pth" if c.resume == "auto" else Path(c.resume)
    if c.resume != "none" and (c.resume != "auto" or last.exists()):
        saved = checkpoint.restore(last, model, optimizer, scaler, lambda s: differences(c, len(images), s))
        step, position = saved["step"], saved["position"]
        logged, sums, bad_steps = saved["logged"], saved["sums"], saved["bad_steps"]
        earlier = saved["seconds"]
        if chief:
            print(f"resumed  {last} after step {step}" + change_of_processes(saved["world_size"], place.world_size))
    if c.compile:
        for part in (model.student.backbone, model.student.projector, model.teacher.backbone, model.teacher.projector):
            part.compile()
    check_position(last, ranks.gather_rows(torch.tensor([position], device=device), [1] * place.world_size).tolist())
    wrapped = processes.wrap(model, place)
    trained = [p for p in model.parameters() if p.requires_grad]
    # What batch norms count, sums apart from integers: a list of one type is copied in one launch.
    buffers = [[b for b in model.buffers() if b is not model.center and b.is_floating_point() == floating]
               for floating in (True, False)]
    before = [[b.clone() for b in group] for group in buffers]

    # ---- batches: more than steps, since one without a finite gradient is made up for
    crops = data.TwoCrops(images, c.image_size, c.seed, c.min_area, c.min_overlap, geometric=c.geometric)
    sampler = loader.RunSampler(len(images), c.batch_size, place.rank, place.world_size, c.seed, position, sys.maxsize)
    batches = loader.on_device(loader.make_loader(crops, sampler, readers(c), device), device)
    at_end.callback(batches.close)  # whatever ends the run: workers ignore the signal Python would end them with
    photometric = photometric.Photometric(c.brightness, c.contrast, c.saturation, c.hue, c.p_jitter, c.p_gray, c.p_blur,
                                   p_solarize=c.p_solarize, solarize_threshold=c.solarize_threshold)
    luck = torch.Generator(device)

    # ---- what is written
    try:
        folder.mkdir(parents=True, exist_ok=True)
        log = Log(folder, step, c.tensorboard) if chief else None
        if chief and position == 0:  # a new run names its own
            (folder / "skipped.txt").unlink(missing_ok=True)
        skipped = loader.Skipped(folder / "skipped.txt", len(images), c.max_bad_share)
        if chief:
            files.remove_leftovers(folder)
            write_json(folder / "config.json", dataclasses.asdict(c))
    except OSError as error:
        raise ValueError(f"--output-dir {folder} cannot be written to: {error.strerror or error}") from None
    if chief:
        introduce(c, place, about, model, steps_per_epoch, peak_lr, dtype)
    bar = tqdm(total=last_step, initial=step, disable=not (chief and sys.stderr.isatty()), unit="step")
    ended, failure, bad_in_row, due = "", "", 0, 0  # due: the epoch after which a checkpoint must be written
    waited, since, timed = 0.0, time.perf_counter(), step

    while step < last_step and not ended:
        # ---- two views
        clock = time.perf_counter()
        batch, trouble = next_batch(batches, skipped, c, c.batch_size // place.world_size, device)
        failure = failure or trouble
        waited += time.perf_counter() - clock
        views = photometric(batch.views, luck.manual_seed(seed_of(c.seed, position, place.rank)))

        # ---- loss and gradient
        for then, now in zip(before, buffers):
            torch._foreach_copy_(then, now)
        reports = []
        share = len(views) // c.accumulate
        for start in range(0, len(views), share):
            some = slice(start, start + share)
            with processes.exchange(wrapped, last=start + share == len(views)):
                with torch.autocast(device.type, dtype, enabled=dtype is not None):
                    loss, report = wrapped(views[some], batch.boxes[some], batch.flipped[some])
                scaler.scale(loss / c.accumulate).backward()
            reports.append(report)
        scaler.unscale_(optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in trained])

        # ---- all processes read the same numbers: here the host waits for the device
        seen = torch.stack([r.losses for r in reports]).mean(0)
        wishes = torch.tensor([bool(signals.received), bool(failure)], device=device)
        *values, stop, failed = ranks.sum_over_ranks(torch.cat([seen, norm[None], wishes])).tolist()
        values = [value / place.world_size for value in values]

        # ---- everything that moves, moves here; without a finite loss and gradient nothing does
        moved = math.isfinite(sum(values)) and not failed
        if moved:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, total_steps, warmup_steps, peak_lr)
            optimizer.step()
            losses.update_center(model.center, torch.stack([r.center_mean for r in reports]).mean(0), c.momentum_center)
            step += 1
            # The release does this at the start of its next step, which is the same student and the same teacher.
            momentum = teacher_momentum(step, total_steps, c.momentum_teacher, c.momentum_teacher_end)
            model.update_teacher(momentum)
            sums, bad_in_row = [a + b for a, b in zip(sums, values)], 0
            bar.update()
        else:
            for then, now in zip(before, buffers):
                torch._foreach_copy_(now, then)
            bad_steps, bad_in_row = bad_steps + (not failed), bad_in_row + (not failed)
        if not failed:  # else a rerun must meet this batch again
            position += 1
            scaler.update()
        optimizer.zero_grad()
        diverged = bad_in_row == c.max_bad_steps
        ended = "failure" if failed or diverged else "signal" if stop and step < last_step else ""

        # ---- what there is to say
        epoch, batches_into_epoch = divmod(position, steps_per_epoch)
        if moved and (step % c.log_every == 0 or batches_into_epoch == 0 or step == last_step):
            numbers = statistics(report, model.center, c.temp_teacher)
            steps, seconds = step - logged, time.perf_counter() - since
            record = dict(
                step=step, epoch=round(position / steps_per_epoch, 4), loss=sums[0] / steps,
                group_loss=sums[1] / steps, slot_loss=sums[2] / steps, lr=optimizer.param_groups[0]["lr"],
                momentum_teacher=momentum, **numbers, grad_norm=sums[3] / steps,
                images_per_second=(step - timed) * c.batch_size / seconds, data_seconds=waited / (step - timed),
                memory_gb=processes.peak_memory_gb(device), skipped_steps=bad_steps)
            if chief:
                log.write(record)
                bar.set_postfix_str(brief(record))
                if bar.disable:
                    print(f"step {step}/{last_step}  {brief(record)}", flush=True)
            logged, sums, waited, since, timed = step, [0.0] * 4, 0.0, time.perf_counter(), step

        # ---- what is kept: never a state that has led to bad numbers only, so after a bad step it waits for a good one
        due = epoch if batches_into_epoch == 0 and to_keep(c, epoch) else due
        final = bool(ended) or step == last_step
        if diverged:
            failure = nothing_finite(bad_in_row, dtype, folder / "last.pth")
        elif chief and (final or (due and moved)):
            state = dict(format=checkpoint.FORMAT, config=dataclasses.asdict(c), step=step, position=position,
                         num_images=len(images), world_size=place.world_size, logged=logged, sums=sums,
                         bad_steps=bad_steps, seconds=earlier + time.perf_counter() - began,
                         model=model.state_dict(), optimizer=optimizer.state_dict(),
                         scaler=scaler.state_dict())
            trouble = keep(c, folder, state, due, final)
            failure, due = failure or trouble, 0
    bar.close()

    # ---- the end, or a pause
    if failure or ended == "failure":
        raise Stopped(failure or "another process stopped the run, and says why")
    if ended == "signal":
        if chief:
            print(f"stopped by {signals.received or 'another process'} after step {step} of {last_step}; "
                  f"{folder / 'last.pth'} is written, and {same_command(c)} goes on from there", flush=True)
        return
    if chief:
        try:
            checkpoint.save(folder / "backbone.pth", weights.backbone_state(model.state_dict()))
        except OSError as error:
            raise Stopped(f"could not write {folder / 'backbone.pth'}: {error.strerror or error}; last.pth holds "
                          f"everything, and {same_command(c)} tries again") from None
        print(f"done     {step} steps; {folder / 'backbone.pth'} is the teacher's trunk under torchvision's names")
        if c.dataset == "toy":
            show_toy(c, model, folder, began - earlier)


def show_toy(c: Config, model: SlotCon, folder: Path, began: float) -> None:
    """What the prototypes found in scenes never trained on: result.json, a table, groups.png."""
    scenes = toy.ToyImages(labels.UNSEEN, c.toy_test_scenes)
    untrained = evaluate.untrained_like(dataclasses.asdict(c), "cpu", c.seed)
    report = evaluate.toy_report(model.teacher, untrained, scenes.images, scenes.semantic, model.center.device)
    report["seconds"] = round(time.perf_counter() - began, 1)
    write_json(folder / "result.json", report)
    shown, _ = evaluate.segment(model.teacher.eval(), scenes.images[:8])
    visualize.save_groups(folder / "groups.png", scenes.images[:8], shown, scenes.semantic[:8], c.num_prototypes,
                          toy.CLASS_NAMES, report["matching"], report["iou"])
    print(f"\n{len(scenes)} scenes never trained on, {report['seconds']:.0f} s in all\n")
    print(evaluate.format_table(report))
    print(f"\nlook at  {folder / 'groups.png'}; the numbers are in {folder / 'result.json'}", flush=True)


class Stopped(Exception):
    """The run cannot go on; one line says why. What was learned so far is on disk."""


def find_images(c: Config, given: set[str]):
    """The training images, a sequence of uint8 tensors (3 y x), and a line that says what they are."""
    if c.dataset == "toy":
        return toy.ToyImages(c.seed, c.toy_scenes), f"{c.toy_scenes} toy scenes, drawn here"
    # A layout that was asked for by name must be there; a preset's layout may turn out to be any folder of images.
    root, paths, notice = find_images(c.data_dir, c.dataset, strict="dataset" in given)
    return ImageFiles(root, paths), f"{len(paths)} images: " + (notice or f"{c.data_dir}, layout {c.dataset}")


def readers(c: Config) -> int:
    """How many processes decode and crop for this one."""
    return processes.cores_per_process() if c.workers < 0 else c.workers


def check_batch(c: Config, place: processes.Place, num_images: int) -> None:
    """The batch fits the processes and the images. Raises ValueError."""
    parts = place.world_size * c.accumulate
    if c.batch_size % parts:
        raise ValueError(f"--batch-size {c.batch_size} must be divisible by {place.world_size} process(es) x "
                         f"--accumulate {c.accumulate}: take {max(c.batch_size // parts, 1) * parts}")
    if num_images < c.batch_size:
        raise ValueError(f"--batch-size {c.batch_size} is larger than the data set of {num_images} images: "
                         f"take at most {num_images // parts * parts}")
    if c.batch_size == parts and c.image_size <= 32 and c.arch != "tiny":
        raise ValueError("one image of 32 px per process is one value per channel, and batch norm needs two: "
                         "take larger images or more of them")


def seed_of(*parts: int) -> int:
    """One random stream per (seed, position in the run, rank): nothing of it need be saved."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> 1)


def change_of_processes(then: int, now: int) -> str:
    if then == now:
        return ""
    return (f" of {then} process(es), now {now}: the same images in every step, but not the same bits, since batch "
            "statistics and random colours are per process")


def differences(c: Config, num_images: int, saved: dict) -> list[str]:
    """What a checkpoint was made with and this run is not, unless it is forced."""
    changed = options.differences(c, saved["config"])
    if saved["num_images"] != num_images:
        changed.append(f"images: {saved['num_images']} then, {num_images} now")
    return [] if c.force_resume else changed


def next_batch(batches, skipped: loader.Skipped, c: Config, b: int, device: torch.device) -> tuple[data.Batch, str]:
    """The next b images, and what should stop the run, or nothing.

    Where no batch can be made, black images stand in for it until all processes have agreed to stop: the others wait
    for this one in the middle of the step.
    """
    try:
        batch = next(batches)
    except (ValueError, RuntimeError, OSError) as error:
        black = data.Batch(torch.zeros(b, 2, 3, c.image_size, c.image_size, dtype=torch.uint8, device=device),
                           torch.zeros(b, 2, 4, device=device), torch.zeros(b, 2, dtype=torch.bool, device=device), [])
        return black, no_more_images(error)
    try:
        skipped.record(batch.failures)
    except ValueError as error:
        return batch, str(error)
    except OSError as error:
        say(f"could not write to {skipped.file}: {error.strerror or error}; the run goes on")
    return batch, ""


def no_more_images(error: Exception) -> str:
    """What stopped the processes that read images: a ValueError is of the images, anything else of the processes."""
    line = str(error).strip().splitlines()[-1]  # of the trace that a process sends
    if isinstance(error, ValueError):
        return f"no more images: {line.partition('ValueError: ')[2] or line}"
    return processes.reader_died(line)


def check_position(path: Path, positions: list[int]) -> None:
    """All processes continue from the same batch. Raises ValueError."""
    if len(set(positions)) > 1:
        raise ValueError(f"the processes found different states of {path} (batches done: {positions}): every machine "
                         "must see the same --output-dir")


def same_command(c: Config) -> str:
    """How a person goes on with this run."""
    return "the same command" if c.resume == "auto" else "the same command with --resume auto"


def nothing_finite(steps: int, dtype: torch.dtype | None, last: Path) -> str:
    advice = "a lower --base-lr" if dtype is None else "--amp off, --amp bf16, or a lower --base-lr"
    go_on = (f"{last} is the checkpoint before them: continue it with {advice} and --force-resume" if last.exists()
             else f"there is no checkpoint yet: start again with {advice}")
    return f"{steps} steps in a row had no finite loss and gradient; none of them changed the weights. {go_on}"


def to_keep(c: Config, epoch: int) -> bool:
    """Whether a checkpoint is due after this many whole epochs."""
    return epoch % c.save_every == 0 or (c.keep_every > 0 and epoch % c.keep_every == 0)


def keep(c: Config, folder: Path, state: dict, due: int, final: bool) -> str:
    """Write last.pth, and epoch_N.pth where that of epoch `due` is to be kept. Returns what should stop the run."""
    file = folder / "last.pth"
    try:
        checkpoint.save(file, state)
        if due and (c.keep_last or (c.keep_every and due % c.keep_every == 0)):
            file = folder / f"epoch_{due:04d}.pth"
            checkpoint.save(file, state)
            checkpoint.keep_newest(folder, c.keep_last, c.keep_every)
    except OSError as error:
        message = (f"could not write {file} after step {state['step']}: {error.strerror or error}; what stood there "
                   "before is intact")
        if final or c.on_save_error == "stop":
            return message
        say(message + ", and the run goes on")
    return ""


def check_data(c: Config, given: set[str]) -> None:
    """--check-data: read everything once and report. Raises Stopped where a run would stop for it, ValueError."""
    if c.dataset == "toy":
        raise ValueError("--check-data reads photographs: give --data-dir, and a preset such as --preset coco-r50")
    images, about = find_images(c, given)
    print(about)
    bar = lambda results: tqdm(results, total=len(images), unit="image", disable=not sys.stderr.isatty())  # noqa: E731
    found = loader.check_images(images.root, images.paths, readers(c), bar)
    total, bad = found["images"], found["bad"]
    for name, reason in bad:
        print(f"bad      {name}: {reason}")
    if found["sizes"]:
        (height, width), commonest = next(iter(found["sizes"].items()))
        print(f"sizes    {len(found['sizes'])} different, from {found['smallest'][0]} x {found['smallest'][1]} to "
              f"{found['largest'][0]} x {found['largest'][1]} (height x width); most often {height} x {width}, "
              f"{commonest} times")
    print(f"checked  {total} images: {total - len(bad)} can be read, {len(bad)} cannot")
    if len(bad) > c.max_bad_share * total:
        raise Stopped(f"{len(bad)} of {total} images cannot be read, more than --max-bad-share {c.max_bad_share:g} "
                      "allows: a run would stop")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 done or paused, 1 stopped, 2 for what the person at the keyboard can change."""
    try:
        c, given = parse(argv)
        if c.check_data:
            check_data(c, given)
        else:
            with processes.StopSignals() as signals, contextlib.ExitStack() as at_end:
                train(c, given, signals, at_end)
    except ValueError as error:
        return fail(error, 2)
    except Stopped as error:
        return fail(error, 1)
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    except RuntimeError as error:
        if processes.out_of_memory(error):
            return fail(f"{processes.out_of_memory(error)}: take a smaller --batch-size, --image-size or network, or "
                        "more passes by --accumulate", 2)
        if not processes.lost(error):
            raise
        last = Path(c.output_dir) / "last.pth"
        intact = f"; {last} is intact" if last.exists() else ""
        return fail(f"{processes.lost(error)}{intact}, and {same_command(c)} goes on", 1)
    processes.finish()
    return 0


def fail(reason: Exception | str, status: int) -> int:
    """One line on stderr. One process of many ends at once: a goodbye to the others could wait for ever."""
    print(f"train.py: {reason}", file=sys.stderr, flush=True)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        processes.end_now(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
