"""The same measures for every system of compare.py: where its groups have no names, or there are
none, k-means on the features of the backbone is matched with the classes instead [U].
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from measures import metrics, probes
from measures.groups import kmeans, table, winner
from photometric import normalize

SAMPLE = 8192  # [U] cells of the features that k-means is fitted to
OWN, CLUSTERS = "own groups", "k-means on backbone features"
FEWEST_GROUPS = 4  # fewer of k in use is a collapse
MEASURES = {  # key of a record -> heading
    "miou": "mIoU", "nmi": "NMI", "probe_miou": "probe", "ari_instances": "ARI inst.",
    "ari_objects": "ARI obj.", "ari_classes": "ARI class", "ari_foreground": "ARI fore.",
}  # fmt: skip
COUNTS = {"groups_used": "used", "steps": "steps", "seconds": "seconds"}
EXPLANATION = f"""\
* of {CLUSTERS}: the system has no groups, or none with names.
ARI: adjusted Rand index per scene, of objects and stuff, objects, classes, two kinds of pixels.
Collapsed: fewer than {FEWEST_GROUPS} groups in use, or NMI not above the untrained network's."""


class Truth(NamedTuple):
    """Scenes never trained on. All uint8, n scenes."""

    seen: Tensor  # (n 3 y x) what the backbone is shown
    semantic: Tensor  # (n y x) classes 0..t-1
    regions: Tensor  # (n y x) every object, and every kind of stuff
    instance: Tensor  # (n y x) 0 the stuff, then the objects


@torch.no_grad()
def judge(
    backbone: nn.Module, maps: Callable[[Tensor], Tensor | None], per_image: bool,
    truth: Truth, labeled: Truth, k: int, num_classes: int,
) -> tuple[dict[str, Any], Tensor]:  # fmt: skip
    """Every measure of one system, and its groups (n y x); both on the CPU.

    maps: of the system, from normalized images (b 3 y x), or None; per_image: the groups have no
    names; labeled: scenes that the probe learns from; k: of the k-means.
    """
    size, semantic = truth.seen.shape[-2:], truth.semantic.long()
    device = next(backbone.parameters()).device
    images = [normalize(some.to(device)) for some in truth.seen.split(64)]
    features = torch.cat([backbone(some).cpu() for some in images])
    own = [maps(some) for some in images]
    clusters = winner(cluster_maps(features, k), size) if per_image or own[0] is None else None
    groups = clusters if own[0] is None else torch.cat([winner(m.cpu(), size) for m in own])
    named = groups if clusters is None else clusters
    counts = metrics.confusion_matrix(named, semantic, int(named.max()) + 1, num_classes)
    found = dict(
        named_by=OWN if clusters is None else CLUSTERS,
        grouped_by=CLUSTERS if own[0] is None else OWN,
        miou=metrics.miou(counts, metrics.match(counts)),
        nmi=metrics.nmi(counts),
        probe_miou=probe(backbone, labeled, features, semantic, num_classes),
        ari_instances=rand_index(groups, truth.regions),
        ari_objects=rand_index(groups, truth.regions, truth.instance > 0),
        ari_classes=rand_index(groups, semantic),
        ari_foreground=rand_index(groups, truth.instance > 0),
        groups_used=max(len(some.unique()) for some in (groups if per_image else [groups])),
    )
    return found, groups


def rand_index(groups: Tensor, truth: Tensor, counted: Tensor | None = None) -> float:
    """The mean adjusted Rand index of scenes (n y x); counted (n y x) bool: only these pixels."""
    values, counted = [], torch.ones_like(truth).bool() if counted is None else counted
    for one, other, which in zip(groups, truth.long(), counted):
        one, other = one[which], other[which]
        if one.numel():
            counts = metrics.confusion_matrix(one, other, int(one.max()) + 1, int(other.max()) + 1)
            values.append(metrics.adjusted_rand_index(counts))
    return sum(values) / max(len(values), 1)


def cluster_maps(features: Tensor, k: int) -> Tensor:
    """k-means on the directions of features (n c h w) -> closeness to each center (n k h w)."""
    directions = F.normalize(features.float(), dim=1)  # over c
    rows, rng = rearrange(directions, "n c h w -> (n h w) c"), np.random.default_rng(0)
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


def collapsed(found: Mapping[str, Any], untrained: Mapping[str, Any]) -> bool:
    """Few groups in use, or no more agreement with the classes than before training."""
    return found["groups_used"] < FEWEST_GROUPS or found["nmi"] <= untrained["nmi"]


def without_names(record: Mapping[str, Any]) -> bool:
    """Whether group 3 of one image is not group 3 of another: slots."""
    return record["grouped_by"] == OWN != record["named_by"]


def brief(label: str, record: Mapping[str, Any]) -> str:
    """One line about one row and seed."""
    form = "mIoU {miou:.3f}  NMI {nmi:.3f}  probe {probe_miou:.3f}  {steps} steps, {seconds:.0f} s"
    gone = "  collapsed" * record["collapsed"]
    return f"seed {record['seed']}  {label:<28} {form.format(**record)}{gone}"


def format_table(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """label -> the records of its seeds: medians, and how many of the seeds have collapsed."""
    cells = {}
    for label, records in rows.items():
        named, grouped = (records[0][by] == CLUSTERS for by in ("named_by", "grouped_by"))
        starred = dict(miou=named, nmi=named, probe_miou=False)
        median = {key: np.median([r[key] for r in records]) for key in (*MEASURES, *COUNTS)}
        cells[label] = [f"{median[key]:.3f}{' *'[starred.get(key, grouped)]}" for key in MEASURES]
        cells[label] += [f"{median[key]:.0f} " for key in COUNTS]
        cells[label] += [f"{sum(record['collapsed'] for record in records)} of {len(records)}"]
    return f"{table(cells, [*MEASURES.values(), *COUNTS.values(), 'collapsed'])}\n{EXPLANATION}"
