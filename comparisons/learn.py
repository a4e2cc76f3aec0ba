"""Training of one system, by the clock or by steps: the pieces of engine/ in the order of train.py.

Slide: none. Paper: none. Differs: nothing is resumed and nothing is kept; schedules follow the
share of the time that is used up, so that every system ends with a small learning rate after the
same seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from comparisons.common import System
from comparisons.scenes import Scenes
from engine.batches import run_batches
from engine.gradient import Gradient
from engine.lars import make_optimizer
from engine.loader import Skipped
from engine.processes import Place
from engine.progress import seed_of
from engine.schedule import learning_rate, warm_up
from engine.undo import Undo
from engine.verdict import agree
from photometric import Photometric, normalize
from teacher import teacher_momentum

PARTS = 1000.0  # the schedules count thousandths of the run


class Budget:
    """How long a system may train: seconds, or steps where they are given."""

    def __init__(self, seconds: float = 0.0, steps: int = 0):
        if (seconds > 0) == (steps > 0):
            raise ValueError(f"a budget is of seconds or of steps, found {seconds} and {steps}")
        self.seconds, self.steps, self.began = seconds, steps, time.perf_counter()

    def start(self) -> None:
        """The seconds count from now."""
        self.began = time.perf_counter()

    def used(self, step: int) -> float:
        """The share that is used up after so many steps; 1 and more: it is over."""
        return step / self.steps if self.steps else self.spent() / self.seconds

    def spent(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.began


def learn(
    system: System,
    scenes: Scenes,
    crops: Callable[..., Any],
    photometric: Photometric,
    settings: Mapping[str, Any],
    budget: Budget,
    folder: Path,
) -> dict[str, float]:
    """Train a system in place.

    crops, photometric: what makes views; settings: values under the configuration's names; folder:
    for the list of unreadable images, of which toy scenes have none. Returns steps, seconds,
    bad_steps, and loss, the mean of the last tenth. Raises ValueError where twenty steps in a row
    have no finite loss.
    """
    c = SimpleNamespace(**settings)
    place = Place(torch.device("cpu"), 0, 1)
    peak = system.rate * c.base_lr * c.batch_size / 256
    start, share = c.temp_teacher_start or c.temp_teacher, c.temp_teacher_epochs / c.epochs
    optimizer = make_optimizer(c.optimizer, system.parameters(), peak, c.weight_decay)
    gradient = Gradient(system, optimizer, place.device)
    undo = Undo(system.buffers())
    generator = torch.Generator()
    batches = run_batches(
        scenes,
        crops,
        c.batch_size,
        c.seed,
        0,
        place,
        c.workers,
        Skipped(folder / "skipped.txt", len(scenes)),
    )
    system.train()
    position, step, bad, losses = 0, 0, 0, []
    try:
        batch = batches.next()  # worker processes start before the clock does
        budget.start()
        while (used := budget.used(step)) < 1 and bad < 20:
            generator.manual_seed(seed_of(c.seed, position, 0))
            views, told = prepare(system, batch.views, photometric, generator)
            system.before_step(warm_up(used, share, start, c.temp_teacher))
            undo.remember()
            outcomes, norm = gradient.compute(views, batch.boxes, batch.flipped, told)
            verdict = agree(torch.stack([outcomes[0].loss, norm]), False, bool(batches.trouble))
            if verdict.good:
                gradient.step(
                    learning_rate(PARTS * used, PARTS, PARTS * c.warmup_epochs / c.epochs, peak)
                )
                step, bad = step + 1, 0
                system.after_step(
                    outcomes[0].memo,
                    teacher_momentum(
                        PARTS * budget.used(step), PARTS, c.momentum_teacher, c.momentum_teacher_end
                    ),
                )
                losses.append(verdict.values[0])
            else:
                undo.undo()
                bad += 1
            gradient.clear()
            position += 1
            batch = batches.next()
    finally:
        seconds = budget.spent()
        batches.close()
    if bad or batches.trouble:
        raise ValueError(batches.trouble or f"no finite loss in {bad} steps in a row")
    last = losses[-max(len(losses) // 10, 1) :]
    return dict(
        steps=step, seconds=seconds, bad_steps=position - step, loss=sum(last) / max(len(last), 1)
    )


def prepare(
    system: System, views: Tensor, photometric: Photometric, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """views (b v 3+m y x) uint8 -> what is seen (b v 3 y x) normalized, what is told (b v m y x) in
    0..1. The colors of flow are directions, so they are not jittered."""
    seen, told = views[:, :, :3], views[:, :, 3:].float() / 255
    return normalize(seen) if system.sees == "flow" else photometric(seen, generator), told
