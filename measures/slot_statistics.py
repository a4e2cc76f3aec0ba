"""How many slots are occupied in an image, and how often each slot is occupied.

Slide: "Statistics about the slots".
Paper: appendix.
Differs: the authors released none of this [U]. The slides say "active" for occupied.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from matplotlib.figure import Figure  # draws into files, without a window
from torch import Tensor

from grouping import GroupingNetwork
from photometric import normalize
from slots import occupied


@torch.no_grad()
def slot_counts(
    network: GroupingNetwork, batches: Iterable[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Images in which each slot is occupied (k), and images with 0 .. k occupied slots (k + 1).

    batches of (indices (b), images (b 3 y x) uint8).
    """
    k = network.prototypes.num_embeddings
    active = torch.zeros(k, dtype=torch.long)
    images_with = torch.zeros(k + 1, dtype=torch.long)
    for _, images in batches:
        _, similarity = network(normalize(images.to(network.prototypes.weight.device)))
        owned = occupied(similarity).cpu()
        active += owned.sum(0)  # over b
        images_with += torch.bincount(owned.sum(1), minlength=k + 1)  # over k
    return active, images_with


def slot_report(active: Tensor, images_with: Tensor) -> dict:
    """The statistics of the slides from the counts of `slot_counts`.

    "bottom" has the least often occupied of the slots in use, which are occupied somewhere.
    """
    images = max(int(images_with.sum()), 1)
    used = [int(k) for k in active.argsort(descending=True, stable=True) if active[k] > 0]
    top, bottom = ([dict(prototype=k, images=int(active[k])) for k in some]
                   for some in (used[:5], used[:-6:-1]))
    return dict(images=images, num_prototypes=len(active),
                occupied_per_image=int(active.sum()) / images, prototypes_used=len(used), top=top,
                bottom=bottom, active=active.tolist(), images_with=images_with.tolist())


def format_slots(report: dict) -> str:
    """The report as text."""
    lines = [f"{report['occupied_per_image']:.2f} slots are occupied per image, over "
             f"{report['images']} images; {report['prototypes_used']} of "
             f"{report['num_prototypes']} prototypes are in use"]
    for title, some in (("most often", report["top"]),
                        ("least often, of those in use", report["bottom"])):
        numbers = ", ".join(f"prototype {each['prototype']} ({each['images']})" for each in some)
        lines.append(f"{title}: {numbers}")
    return "\n".join(lines)


def draw_slots(file: Path, report: dict) -> None:
    """Two panels: how many slots an image has, and how often each slot is occupied."""
    figure = Figure((10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    images_with, mean = report["images_with"], report["occupied_per_image"]
    most = max(number for number, images in enumerate(images_with) if images or number == 0)
    left.bar(range(most + 1), images_with[: most + 1], color="#0072B2")
    left.axvline(mean, color="#D55E00", label=f"mean {mean:.1f}")
    left.set(title="Occupied slots of an image", xlabel="occupied slots", ylabel="images")
    left.legend(frameon=False)
    counts = sorted(report["active"], reverse=True)
    width = 1.0 if len(counts) > 60 else 0.8
    right.bar(range(1, len(counts) + 1), counts, width=width, color="#0072B2")
    right.set(title="How often each slot is occupied", xlabel="slots, most often occupied first",
              ylabel=f"of {report['images']} images")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)
