"""How many slots are occupied in an image, and how often each slot is occupied ("active")."""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import Module

from photometric import normalize
from slots import occupied

Pair = tuple[Tensor, Tensor]


@torch.no_grad()
def slot_counts(network: Module, batches: Iterable[Pair]) -> Pair:
    """Images in which each slot is occupied (k), and images with 0 .. k occupied slots (k + 1)."""
    k = network.prototypes.num_embeddings
    active, images_with = torch.zeros(k, dtype=torch.long), torch.zeros(k + 1, dtype=torch.long)
    for _, images in batches:
        _, similarity = network(normalize(images.to(network.prototypes.weight.device)))
        owned = occupied(similarity).cpu()
        active += owned.sum(0)  # over b
        images_with += torch.bincount(owned.sum(1), minlength=k + 1)  # over k
    return active, images_with


def slot_report(active: Tensor, images_with: Tensor) -> dict:
    """The statistics of the slides from `slot_counts`; top: the five prototypes that are occupied
    most often; bottom: of the others in use the five that are occupied least often.
    """
    images = max(int(images_with.sum()), 1)
    order = active.argsort(descending=True, stable=True).tolist()
    used = [dict(prototype=k, images=int(active[k])) for k in order if active[k] > 0]
    return dict(
        images=images, num_prototypes=len(active), occupied_per_image=int(active.sum()) / images,
        prototypes_used=len(used), top=used[:5], bottom=used[5:][:-6:-1], active=active.tolist(),
        images_with=images_with.tolist(),
    )  # fmt: skip


def format_slots(report: dict) -> str:
    """The report as text."""
    mean = "{occupied_per_image:.2f} slots are occupied per image, over {images} images"
    used = "{prototypes_used} of {num_prototypes} prototypes are in use"
    lines = [f"{mean}; {used}".format(**report)]
    for title, key in (("most often", "top"), ("least often, of those in use", "bottom")):
        numbers = (f"prototype {each['prototype']} ({each['images']})" for each in report[key])
        lines += [f"{title}: {', '.join(numbers)}"] if report[key] else []
    return "\n".join(lines)
