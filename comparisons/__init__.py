"""What the talk sets SlotCon against, a file per system; `compare.py` runs them side by side.

Slide: "Image-level, pixel-level, and object-level contrastive learning" and all that follow it, up
to "Together". Paper: the related work. Differs: toy scenes, one trunk, one optimizer for all.
Read next: common.py, the protocol.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from comparisons.common import System
from comparisons.dense import Dense
from comparisons.depth import Depth
from comparisons.given_masks import GivenMasks
from comparisons.independent_queries import Independent
from comparisons.kmeans import Kmeans
from comparisons.moco import Moco
from comparisons.motion import Motion
from comparisons.picie import Picie
from comparisons.self_distillation import SelfDistillation
from comparisons.sinkhorn import Sinkhorn
from comparisons.slot_attention import Reconstruction
from comparisons.slot_matching import SlotMatching
from comparisons.slotcon import WholeMethod
from slotcon import SlotCon

SYSTEMS: dict[str, type[System]] = {  # file name -> class, in the order of the talk
    "moco": Moco,
    "dense": Dense,
    "given_masks": GivenMasks,
    "slot_attention": Reconstruction,
    "independent_queries": Independent,
    "motion": Motion,
    "depth": Depth,
    "slot_matching": SlotMatching,
    "kmeans": Kmeans,
    "picie": Picie,
    "sinkhorn": Sinkhorn,
    "self_distillation": SelfDistillation,
    "slotcon": WholeMethod,
}


class Variant(NamedTuple):
    """One row of a system that has several."""

    label: str = ""
    arguments: Mapping[str, Any] = MappingProxyType({})
    preset: str = "scene"  # of toy.py


VARIANTS: dict[str, tuple[Variant, ...]] = {  # all other systems have one row
    "given_masks": tuple(Variant(kind, {"masks": kind}) for kind in ("grid", "color", "truth")),
    "slot_attention": (Variant("scene"), Variant("flat", preset="flat")),
}


def build(name: str, settings: Mapping[str, Any], **more: Any) -> System:
    """A system with random weights. settings: values under the configuration's names, from which it
    takes those that it knows; more: arguments of this system alone. ValueError for an unknown name.
    """
    if name not in SYSTEMS:
        raise ValueError(f"no system {name!r}: choose of {', '.join(SYSTEMS)}")
    known = inspect.signature(SYSTEMS[name]).parameters
    if any(p.kind is p.VAR_KEYWORD for p in known.values()):  # the rest goes to the method
        known = {**known, **inspect.signature(SlotCon).parameters}
    return SYSTEMS[name](**{**{key: settings[key] for key in known if key in settings}, **more})
