"""What the talk sets SlotCon against, a file per system; `compare.py` runs them side by side.

Slide: "Image-level, pixel-level, and object-level contrastive learning" and all that follow it, up to
"Together". Paper: the related work. Differs: toy scenes, one trunk, one optimizer for all.
Read next: common.py, the protocol.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

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
VARIANTS: dict[str, tuple[str, ...]] = {  # rows of one system; all others have one row
    "given_masks": ("grid", "color", "truth"),  # where the masks come from
    "slot_attention": ("scene", "flat"),  # presets of toy.py: with textures, plain colors
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
