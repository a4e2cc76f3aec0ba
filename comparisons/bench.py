"""Rows of the comparison, one per core: from random weights to measures, with train.py's step."""

import dataclasses
import multiprocessing
import re
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import comparisons
from comparisons.common import System
from comparisons.judge import MEASURES, collapsed, judge
from comparisons.scenes import Scenes, whole_scene
from data import TwoCrops
from engine.guards import end_with_parent
from engine.optimizers import make_optimizer, schedule_for
from engine.options import chosen_for
from engine.processes import Place, synchronized, workers_of
from engine.program import Stopped
from engine.run import Options, Run
from measures.datasets import UNSEEN
from photometric import Photometric, normalize
from teacher import teacher_momentum

LABELED = 16  # scenes that the probe learns from
SHOWN = 8  # scenes in the image
START, STEP = 20, 0.1  # seconds of a row on one core of an Intel Xeon [U]

draw = lru_cache(maxsize=8)(Scenes)  # rows with the same scenes share them


class Entry(NamedTuple):
    """A row: what is trained, and on what."""

    label: str
    name: str  # of the system
    c: Any  # the configuration, a dataclass
    arguments: Mapping[str, Any] = {}  # of this system alone
    preset: str = "scene"  # of toy.py

    def build(self, seed: int) -> System:
        """The system with random weights; those of the backbone are the same for all systems."""
        torch.manual_seed(seed)
        c = dataclasses.replace(self.c, seed=seed)
        return comparisons.build(self.name, c, **self.arguments)


Job = tuple[Entry, int]  # a row and its seed


def in_processes(jobs: Sequence[Job], folder: Path) -> Iterator[tuple[dict, np.ndarray]]:
    """What `row` returns for each row and seed, in order; one process per core."""
    count = min(workers_of(-1), len(jobs))
    steps = jobs[0][0].c.steps
    heading = partial(heading_of, [entry.label for entry, _ in jobs], count, time.time(), steps)
    work = partial(row, folder, heading)
    threads = (torch.get_num_threads(),)  # a new process has its own number
    with ProcessPoolExecutor(count, None, begin, threads) as pool:
        try:
            rows = [pool.submit(work, number, job) for number, job in enumerate(jobs)]
            yield from (each.result() for each in rows)
        except BaseException as error:
            for process in multiprocessing.active_children():
                process.kill()
            if not isinstance(error, BrokenProcessPool):
                raise
            found = "the process of a row was killed, perhaps for want of memory"
            raise Stopped(f"{found}; comparison.json has the rows before it") from None


def begin(threads: int) -> None:
    """In a process of rows. Ctrl-C is left to the main one, which ends them all."""
    if hasattr(signal, "pthread_sigmask"):  # not on Windows
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    torch.set_num_threads(threads)
    end_with_parent()


def heading_of(labels: Sequence[str], several: int, began: float, steps: int, number: int) -> str:
    """Of the row that starts: its number and name, and the time that is left.

    several: how many rows run at a time; all others before this one are done. Until one is done,
    the time is that of the machine of benchmarks/comparisons.md.
    """
    done, rows = number + 1 - several, len(labels)
    each = (time.time() - began) / done if done > 0 else (START + STEP * steps) / several
    left = f"about {max(each * (rows - max(done, 0)) / 60, 1):.0f} min left"
    return f"row {number + 1} of {rows}, {labels[number]}, {left}"


def row(
    folder: Path, heading: Callable[[int], str], number: int, job: Job
) -> tuple[dict[str, Any], np.ndarray]:
    """In a process of its own: the record of a row and seed, its groups in the scenes shown.

    Writes the learned tensors in half precision. Raises Stopped.
    """
    print(f"{heading(number)}\n", end="", flush=True)  # whole, beside those of others
    entry, seed = job
    untrained, _ = judged(entry.build(seed), entry)
    system = entry.build(seed)
    c = dataclasses.replace(entry.c, seed=seed)
    count = c.subset * system.times_scenes
    trained = learn(system, draw(seed, count, system.sees, system.extra, entry.preset), c)
    weights = {name: value.half() for name, value in system.state_dict().items()}
    name = re.sub(r"[^\w.]+", "-", entry.label).strip("-")
    torch.save(weights, folder / f"{name}_{seed}.pth")
    found, groups = judged(system, entry)
    record = dict(system=entry.name, seed=seed, **found, **trained)
    record["untrained"] = {key: untrained[key] for key in MEASURES}
    record["collapsed"] = collapsed(found, untrained)
    return record, groups[:SHOWN].numpy()


def learn(system: System, scenes: Scenes, c: Any) -> dict[str, float]:
    """Train a system in place, on the CPU; nothing is written. Raises Stopped.

    Returns steps, bad_steps, seconds, and loss, the mean of the last tenth.
    """
    place, began, losses = Place(torch.device("cpu")), time.perf_counter(), []
    c = dataclasses.replace(c, output_dir="", **system.changes)
    system = synchronized(system.train(), place)
    schedule = schedule_for(num_images=len(scenes), **chosen_for(schedule_for, c))
    optimizer = make_optimizer(c.optimizer, system.parameters(), schedule.peak, c.weight_decay)
    photometric = Photometric(**chosen_for(Photometric, c))
    steps = schedule.total_steps
    options = Options(last_step=steps, **chosen_for(Options, c))
    view = whole_scene if system.whole else TwoCrops(**chosen_for(TwoCrops, c))
    run = Run(options, place, system, optimizer, scenes, view, settings={})
    with run:
        for batch in run.batches():
            seen, extra = batch.views[:, :, :3], batch.views[:, :, 3:].float() / 255
            views = normalize(seen) if system.whole else photometric(seen, run.generator())
            run.remember()
            loss, memo = run.network(views, batch.boxes, batch.flipped, extra)
            run.backward(loss)
            if run.agree(loss.detach()[None]):
                if system.clip_norm:
                    nn.utils.clip_grad_norm_(system.parameters(), system.clip_norm)
                run.step(schedule.learning_rate(run.steps))
                momentum = teacher_momentum(run.steps + 1, steps, *c.momentum_teacher)
                system.after_step(memo, momentum)
                losses.append(loss.item())
            else:
                run.undo()
            run.end_step()
    seconds = time.perf_counter() - began
    if run.ended == "signal":
        raise KeyboardInterrupt
    if not run.finished:
        raise Stopped(f"training ended after {run.steps} steps: {run.trouble or run.ended}")
    loss = statistics.fmean(losses[-max(run.steps // 10, 1) :])
    return dict(steps=run.steps, bad_steps=run.bad_steps, seconds=seconds, loss=loss)


def judged(system: System, entry: Entry) -> tuple[dict[str, Any], Tensor]:
    """All measures of a system on unseen scenes, and its groups (n y x)."""
    sets = (UNSEEN, entry.c.held_out), (UNSEEN + 1, LABELED)
    truth, labeled = (draw(seed, count, system.sees, "", entry.preset) for seed, count in sets)
    return judge(system.eval(), truth, labeled, entry.c.num_prototypes)
