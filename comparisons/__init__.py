"""What the talk sets SlotCon against, a file per system; `compare.py` runs them side by side.

Slide: "Image-level, pixel-level, and object-level contrastive learning" and all that follow it, up
to "Together". The names are here without torch; a system's file is loaded when it is built.
"""

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from engine.options import chosen_for

if TYPE_CHECKING:
    from comparisons.common import System

SYSTEMS = {  # name -> file of this folder, and class; in the order of the talk's argument
    "slot_attention": "slot_attention.Reconstruction",
    "independent_queries": "independent_queries.Independent",
    "motion": "motion.Motion",
    "depth": "depth.Depth",
    "slot_matching": "slot_matching.SlotMatching",
    "kmeans": "kmeans.Kmeans",
    "picie": "picie.Picie",
    "sinkhorn": "sinkhorn.Sinkhorn",
    "self_distillation": "self_distillation.SelfDistillation",
    "moco": "moco.Moco",
    "dense": "dense.Dense",
    "given_masks": "given_masks.GivenMasks",
    "slotcon": "whole_method.WholeMethod",
}


class Variant(NamedTuple):
    """One row of a system."""

    label: str
    arguments: Mapping[str, Any] = {}
    preset: str = "scene"  # of toy.py


# Those that use all of their groups also get as many as there are classes, which helps them
CLASSES = dict(num_prototypes=8)
VARIANTS = {name: [Variant(name)] for name in SYSTEMS} | {
    **{n: [Variant(n), Variant(f"{n}: 8", CLASSES)] for n in ("kmeans", "picie", "sinkhorn")},
    "given_masks": [Variant(f"given_masks: {x}", {"masks": x}) for x in ("grid", "color", "truth")],
    "slot_attention": [Variant(f"slot_attention: {x}", preset=x) for x in ("flat", "scene")],
}


def build(name: str, settings: Any, **more: Any) -> "System":
    """A system, one of `SYSTEMS`, with random weights.

    settings: the configuration, a dataclass; more: arguments of this system alone.
    """
    file, kind = SYSTEMS[name].split(".")
    system = getattr(importlib.import_module(f"comparisons.{file}"), kind)
    known = chosen_for(system.wraps, settings) if system.wraps else {}
    return system(**{**known, **chosen_for(system, settings), **more})
