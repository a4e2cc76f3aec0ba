"""train.py --plan: what a run of a configuration would need, measured and counted before it
starts.

Slide: none.
Paper: none.
Differs: not in the released code. What is measured and counted, for any model: engine/plan.py.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import default_collate

import recipes
from data import Batch
from engine import processes
from engine.keeper import checkpoints_at_most
from engine.lars import make_optimizer
from engine.loader import Samples, moved
from engine.plan import (
    Norms,
    Plan,
    Traffic,
    cost_of,
    reading_seconds,
    sizes_to_measure,
    traffic,
)
from engine.run import bare_run
from recipes import Config
from slotcon import Report


def random_batch(c: Config, images: int) -> Batch:
    """Views of random images, for a measurement: as many as asked for."""
    rng, crops = random.Random(c.seed), recipes.crops_of(c)
    generator = torch.Generator().manual_seed(c.seed)
    shape = (3, c.image_size, c.image_size)
    noise = (torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8),) * images
    return default_collate([crops(image, rng) for image in noise])


def plan(c: Config, take_step: Callable[..., tuple[Any, Report]], strict: bool = False) -> Plan:
    """--plan: what a run would need. Nothing is written; what is planned for is printed.

    take_step: train.py's, measured on random images; strict: as of `images_of`. Raises ValueError.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("--plan asks one process: --plan-processes N says how many a run has")
    if c.threads:
        torch.set_num_threads(c.threads)
    place = processes.start(c.device, c.timeout)
    images, about = recipes.images_of(c, strict)
    recipes.check_batch(c, c.plan_processes, len(images))
    schedule, model = recipes.schedule_of(c, len(images)), recipes.model_of(c, place.device)
    optimizer = make_optimizer(c.optimizer, model.parameters(), schedule.peak, c.weight_decay)
    dtype = processes.precision(c.amp, place.device)
    settings = dataclasses.replace(recipes.run_options(c), accumulate=1)  # a pass is measured
    touched = [buffer for buffer in model.buffers() if buffer is not model.center]
    run = bare_run(settings, place, dtype, schedule, model, optimizer, touched)
    print(f"device   {processes.describe(place, dtype)}\ndata     {about}")
    print(recipes.describe(c, schedule, c.plan_processes, model), flush=True)
    photometric, generator, last = recipes.photometric_of(c), torch.Generator(place.device), {}

    def step_of(size: int) -> Callable[[], None]:
        batch = moved(random_batch(c, size), lambda tensor: tensor.to(place.device))

        def step() -> None:
            views = photometric(batch.views, generator)
            last["report"] = take_step(c, run, views, batch.boxes, batch.flipped)[1]

        return step

    part = c.batch_size // (c.plan_processes * c.accumulate)
    sizes = sizes_to_measure(part, c.image_size, place.device)
    with Norms(model) as norms:
        step_of(sizes[0])()
    if c.compile:
        recipes.compile_networks(model)
    cost = cost_of(
        part, sizes, step_of, place.device,
        state=lambda: dict(model=model.state_dict(), optimizer=optimizer.state_dict()),
    )  # fmt: skip
    counted = functools.partial(
        plan_traffic, c, sum(p.numel() for p in run.gradient.trained), norms
    )
    return Plan(
        c.plan_processes, schedule.last_step, c.batch_size, c.accumulate, place.device.type, cost,
        traffic=counted(keys_of(c, last["report"], part)),
        most_keys=counted(keys_of(c, last["report"], part, most=True)).keys,
        gradient_bytes=sum(p.numel() * p.element_size() for p in run.gradient.trained),
        synchronized=place.device.type == "cuda",
        checkpoint_bytes=run.checkpoint_bytes(),
        checkpoints=checkpoints_at_most(schedule.epochs, c.keep_every, c.keep_last),
        reading=reading_seconds(Samples(images, recipes.crops_of(c), c.seed)),
        workers=processes.workers_of(c.workers),
    )  # fmt: skip


def plan_traffic(
    c: Config, weights: int, norms: Sequence[tuple[int, bool]], rows: float
) -> Traffic:
    """Bytes on the wire per step of the run that is planned. weights: trained numbers; norms: that
    run in a pass; rows: vectors that a process gives to the contrasts of a pass.
    """
    return traffic(
        c.plan_processes, weights, list(norms) * c.accumulate, rows * c.accumulate, c.dim_out,
        c.num_prototypes, c.accumulate, contrasted=c.group_weight < 1,
    )  # fmt: skip


def keys_of(c: Config, report: Report, images: int, most: bool = False) -> float:
    """Vectors that a process with so many images gives to the contrasts of a pass: as many slots
    per image as the report has, or the most that can be occupied.
    """
    cells = report.teacher[0].similarity.shape[-2:].numel()
    occupied = sum(len(pairs.keys) for pairs in report.pairs) / len(report.valid)
    if most:
        occupied = len(report.pairs) * min(c.num_prototypes, cells)
    slots = occupied * images if c.slot_loss == "ctr" else 0.0
    return slots + 2 * images * c.image_loss
