"""The same measures for every system that compare.py runs, whatever kind of groups it makes [U].

Groups with names, the same in all scenes, are matched with the classes. For groups without names
(the slots of one image) and for features without groups, k-means on the features of the backbone
stands in, and the result says so. The Rand index needs no names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from measures import metrics, probes
from measures.groups import kmeans, winner
from measures.tables import number, table
from photometric import normalize

SAMPLE = 8192  # [U] cells of the features that k-means is fitted to
OWN, CLUSTERS = "own groups", "k-means on backbone features"
FEWEST_GROUPS = 4  # fewer of k in use is a collapse
MEASURES = ("miou", "nmi", "probe_miou", "ari_instances", "ari_objects", "ari_classes")


class Truth(NamedTuple):
    """Scenes never trained on. All uint8, n scenes."""

    seen: Tensor  # (n 3 y x) what the backbone is shown
    semantic: Tensor  # (n y x) classes 0..t-1
    regions: Tensor  # (n y x) every object, and every kind of stuff
    instance: Tensor  # (n y x) 0 the stuff, then the objects


@torch.no_grad()
def judge(
    backbone: nn.Module,
    maps: Callable[[Tensor], Tensor | None],
    per_image: bool,
    truth: Truth,
    labeled: Truth,
    k: int,
    num_classes: int,
) -> tuple[dict[str, Any], Tensor]:
    """Every measure of one system on the CPU, and its groups (n y x) for the image.

    maps: of the system, from normalized images (b 3 y x), or None; per_image: the groups have no
    names; labeled: scenes that the probe learns from; k: of the k-means that stands in.
    """
    size, semantic = truth.seen.shape[-2:], truth.semantic.long()
    device = next(backbone.parameters()).device
    images = [normalize(some.to(device)) for some in truth.seen.split(64)]
    features = torch.cat([backbone(some).cpu() for some in images])
    own = [maps(some) for some in images]
    clusters = winner(cluster_maps(features, k), size) if per_image or own[0] is None else None
    groups = clusters if own[0] is None else torch.cat([winner(m.cpu(), size) for m in own])
    found = dict(
        named_by=OWN if clusters is None else CLUSTERS,
        grouped_by=CLUSTERS if own[0] is None else OWN,
        **agreement(groups if clusters is None else clusters, semantic, num_classes),
        probe_miou=probe(backbone, labeled, features, semantic, num_classes),
        ari_instances=rand_index(groups, truth.regions),
        ari_objects=rand_index(groups, truth.regions, truth.instance > 0),
        ari_classes=rand_index(groups, semantic),
        groups_used=groups_in_use(groups, per_image),
        groups_per_scene=sum(len(each.unique()) for each in groups) / len(groups),
    )
    return found, groups


def agreement(groups: Tensor, semantic: Tensor, num_classes: int) -> dict[str, float]:
    """One-to-one mIoU and NMI of groups (n y x) with names against the classes (n y x)."""
    counts = metrics.confusion_matrix(groups, semantic, int(groups.max()) + 1, num_classes)
    return dict(miou=metrics.miou(counts, metrics.match(counts)), nmi=metrics.nmi(counts))


def rand_index(groups: Tensor, truth: Tensor, counted: Tensor | None = None) -> float:
    """The adjusted Rand index of each scene, averaged. groups, truth (n y x); counted (n y x) bool:
    only these pixels. A scene without such a pixel is left out.
    """
    values, counted = [], torch.ones_like(truth).bool() if counted is None else counted
    for some, other, which in zip(groups, truth.long(), counted):
        one, other = some[which], other[which]
        if one.numel():
            counts = metrics.confusion_matrix(one, other, int(one.max()) + 1, int(other.max()) + 1)
            values.append(metrics.adjusted_rand_index(counts))
    return sum(values) / max(len(values), 1)


def cluster_maps(features: Tensor, k: int, seed: int = 0) -> Tensor:
    """k-means on the directions of features (n c h w) -> minus the squared distances (n k h w)."""
    directions = F.normalize(features.float(), dim=1)  # over c
    rows = rearrange(directions, "n c h w -> (n h w) c")
    rng = np.random.default_rng(seed)
    some = rows[torch.from_numpy(rng.permutation(len(rows))[:SAMPLE])]
    centers = torch.from_numpy(kmeans(some.numpy(), k, rng)).to(rows.dtype)
    dots = einsum(centers, directions, "k c, n c h w -> n k h w")
    return 2 * dots - centers.square().sum(1)[:, None, None]  # over c; |direction|^2 never differs


@torch.enable_grad()
def probe(
    backbone: nn.Module, labeled: Truth, features: Tensor, semantic: Tensor, num_classes: int
) -> float:
    """mIoU of a linear classifier that has learned from the few labeled scenes."""
    batches = [(torch.empty(0), (labeled.seen, labeled.semantic.long()))]
    cells = probes.collect_cells(backbone, batches, len(labeled.seen), num_classes)
    guess = winner(probes.linear_probe(*cells)(features.float()), semantic.shape[-2:])
    counts = metrics.confusion_matrix(guess, semantic, num_classes, num_classes)
    return metrics.miou(counts, torch.arange(num_classes))


def groups_in_use(groups: Tensor, per_image: bool) -> int:
    """How many of groups (n y x) own a pixel: in all scenes, or in the scene that has the most."""
    return max(len(some.unique()) for some in (groups if per_image else [groups]))


def collapsed(found: Mapping[str, Any], untrained: Mapping[str, Any]) -> bool:
    """Fewer than four groups in use, or no more agreement with the classes than before training."""
    return found["groups_used"] < FEWEST_GROUPS or found["nmi"] <= untrained["nmi"]


def brief(label: str, record: Mapping[str, Any]) -> str:
    """One line about one row and seed, for the eye."""
    scores = f"mIoU {record['miou']:.3f}  NMI {record['nmi']:.3f}  probe {record['probe_miou']:.3f}"
    spent = f"{record['steps']} steps in {record['seconds']:.0f} s"
    gone = "  collapsed" if record["collapsed"] else ""
    return f"seed {record['seed']}  {label:<28} {scores}  {spent}{gone}"


# key of a row -> heading
COLUMNS = {
    "miou": "mIoU", "nmi": "NMI", "probe_miou": "probe", "ari_instances": "ARI inst.",
    "ari_objects": "ARI obj.", "ari_classes": "ARI class", "groups_used": "used", "steps": "steps",
    "seconds": "seconds",
}  # fmt: skip
EXPLANATION = f"""\
* of {CLUSTERS}: the system has no groups, or none with names.
Collapsed: fewer than {FEWEST_GROUPS} groups in use, or NMI not above the untrained network's."""


def format_table(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """label -> the records of its seeds: medians, and how many of the seeds have collapsed."""
    cells = {}
    for label, records in rows.items():
        gone = sum(record.get("collapsed", False) for record in records)
        cells[label] = [median(records, key) for key in COLUMNS]
        cells[label].append(f"{gone} of {len(records)}" if gone else "no")
    return f"{table(cells, [*COLUMNS.values(), 'collapsed'])}\n{EXPLANATION}"


def median(records: Sequence[Mapping[str, Any]], key: str) -> str:
    """One cell: the median over the seeds, and the star."""
    values = [record[key] for record in records if key in record]
    how = records[0]["named_by" if key in ("miou", "nmi") else "grouped_by"]
    star = "*" if key.startswith(("miou", "nmi", "ari")) and how == CLUSTERS else " "
    digits = 0 if key in ("groups_used", "steps", "seconds") else 3
    return number(float(np.median(values)) if values else None, digits) + star
