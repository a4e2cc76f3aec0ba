"""A row of the comparison from random weights to measures; what all rows share is made once.

Slide: none. Paper: none. Differs: ours [U].
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import comparisons
import toy
from comparisons.common import System
from comparisons.learn import Budget, learn
from comparisons.scenes import Scenes
from measures import systems
from measures.labels import UNSEEN
from photometric import Photometric

LABELED = 16  # scenes that the probe learns from
STARTING = 1.0  # seconds that a row takes to start and to end its worker process


class Entry(NamedTuple):
    """A row: what is trained, and on what."""

    label: str
    name: str  # of the system
    variant: str  # "" where the system has one row
    settings: Mapping[str, Any]  # values under the configuration's names
    arguments: Mapping[str, Any]  # of this system alone
    crops: Callable[..., Any]
    photometric: Photometric
    preset: str = "scene"  # of toy.py

    def build(self, seed: int) -> System:
        """The system with random weights; those of the trunk are the same for all systems."""
        torch.manual_seed(seed)
        steps = self.settings["toy_scenes"] // self.settings["batch_size"]
        settings = {**self.settings, "seed": seed, "steps_per_epoch": steps}
        system = comparisons.build(self.name, settings, **self.arguments)
        channels_last = bool(self.settings["channels_last"])
        return system.to(memory_format=torch.channels_last) if channels_last else system

    def kind(self) -> tuple:
        """Entries of one kind have the same measures before training."""
        system = self.build(0)
        own = type(system).maps is not System.maps
        slots = self.name if system.per_image else ""  # start like no other
        return system.sees, self.preset, own, slots, self.settings["num_prototypes"]


class Bench:
    """Scenes, drawn once for all rows, and the measures of what is untrained.

    count: scenes to train on; test_count: unseen ones to judge on; draw: makes them.
    """

    def __init__(self, count: int, test_count: int, draw: Callable[..., Scenes] = Scenes):
        self.count, self.test_count, self.draw = count, test_count, draw
        self.drawn: dict[tuple, Scenes] = {}
        self.untrained: dict[tuple, dict[str, Any]] = {}  # (seed, kind) -> measures
        self.judging: dict[tuple, float] = {}  # kind -> seconds

    def scenes(self, seed: int, count: int, system: System, preset: str, told: str = "") -> Scenes:
        """Of training, or to judge on. Those of earlier training seeds are dropped."""
        key = (seed, system.sees, told, preset)
        if key not in self.drawn:
            if seed < UNSEEN:
                self.drawn = {k: v for k, v in self.drawn.items() if k[0] >= seed}
            self.drawn[key] = self.draw(seed, count, system.sees, told, preset)
        return self.drawn[key]

    def prepare(self, entries: Sequence[Entry], seed: int) -> None:
        """Draw what this seed needs, and judge every kind of entry before it is trained."""
        for entry in entries:
            system = entry.build(seed)
            self.scenes(seed, self.count, system, entry.preset, system.told)
            self.truths(system, entry.preset)
            if (seed, entry.kind()) not in self.untrained:
                began = time.perf_counter()
                self.untrained[seed, entry.kind()], _ = self.judge(system, entry)
                self.judging[entry.kind()] = time.perf_counter() - began

    def truths(self, system: System, preset: str) -> list[systems.Truth]:
        """The scenes that are judged on, and the few labeled ones that the probe learns from."""
        drawn = [
            self.scenes(UNSEEN, self.test_count, system, preset),
            self.scenes(UNSEEN + 1, LABELED, system, preset),
        ]
        return [systems.Truth(s.images, s.semantic, s.regions, s.instance) for s in drawn]

    def judge(self, system: System, entry: Entry) -> tuple[dict[str, Any], Tensor]:
        """All measures of a system on unseen scenes, and its groups (n y x)."""
        system.eval()
        truth, labeled = self.truths(system, entry.preset)
        return systems.judge(
            system.trunk,
            system.maps,
            system.per_image,
            truth,
            labeled,
            entry.settings["num_prototypes"],
            len(toy.CLASS_NAMES),
        )

    def row(self, entry: Entry, seed: int, budget: Budget, folder: Path) -> tuple[dict, Tensor]:
        """Train and judge: everything that is known of a row, and its groups (n y x)."""
        system = entry.build(seed)
        scenes = self.scenes(seed, self.count, system, entry.preset, system.told)
        trained = learn(
            system,
            scenes,
            entry.crops,
            entry.photometric,
            {**entry.settings, "seed": seed},
            budget,
            folder,
        )
        found, groups = self.judge(system, entry)
        first = self.untrained[seed, entry.kind()]
        return dict(
            system=entry.name,
            variant=entry.variant,
            seed=seed,
            **found,
            **trained,
            untrained={key: first[key] for key in systems.MEASURES},
            collapsed=systems.collapsed(found, first),
        ), groups


def seconds_each(
    minutes: float,
    seeds: int,
    kinds: Sequence[tuple],
    judging: Mapping[tuple, float],
    spent: float,
    prepared: float,
) -> float:
    """Equal training seconds for every row and seed: what drawing and judging leave of the minutes.

    kinds: of the rows; judging: kind -> seconds; spent: seconds since the program began; prepared:
    what one seed takes before its first row. Raises ValueError where less than a second is left.
    """
    rows = seeds * len(kinds)
    left = 60 * minutes - spent - (seeds - 1) * prepared - 5  # the image at the end
    left -= seeds * (1.5 * sum(judging[kind] for kind in kinds) + STARTING * len(kinds))
    if left < rows:
        enough = math.ceil(10 * minutes + (rows - left) / 6) / 10
        raise ValueError(
            f"{minutes:g} minutes leave no second of training to each of {len(kinds)} "
            f"rows and {seeds} seed(s): {enough:.1f} would"
        )
    return left / rows
