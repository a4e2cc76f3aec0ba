"""The same measures for every system of compare.py: where its groups have no names, or there are
none, k-means on the features of the backbone is matched with the classes instead [U].
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor

import toy
from comparisons.common import System
from comparisons.scenes import Scenes
from measures import metrics, probes
from measures.groups import kmeans, table, winner
from photometric import normalize

SAMPLE = 8192  # [U] cells of the features that k-means is fitted to
OWN, CLUSTERS = "own groups", "k-means on backbone features"
FEWEST_GROUPS = 4  # fewer of k in use is a collapse
MEASURES = {  # key of a record -> heading
    "miou": "mIoU", "nmi": "NMI", "probe_miou": "probe", "ari_objects": "obj.",
    "ari_instances": "inst.", "ari_foreground": "fore.",
}  # fmt: skip
STARRED = f"* of {CLUSTERS}: no groups, or none with names.\n"
EXPLANATION = f"""\
obj., inst., fore.: adjusted Rand index per scene, of the pixels of objects; of
objects and stuff; of foreground and background. used: groups in use.
probe: mIoU of a linear classifier that learns from few labeled scenes.
collapsed: fewer than {FEWEST_GROUPS} groups, or NMI not above untrained (not of slots)."""


@torch.no_grad()
def judge(system: System, truth: Scenes, labeled: Scenes, k: int) -> tuple[dict[str, Any], Tensor]:
    """Every measure of one system on scenes never trained on, and its groups (n y x).

    labeled: scenes that the probe learns from; k: of the k-means.
    """
    size, semantic = truth.images.shape[-2:], truth.semantic.long()
    images = [normalize(some) for some in truth.images.split(64)]
    features = torch.cat([system.backbone(some) for some in images])
    own = [system.maps(some) for some in images]
    unnamed = system.per_image or own[0] is None
    clusters = winner(cluster_maps(features, k), size) if unnamed else None
    groups = clusters if own[0] is None else torch.cat([winner(maps, size) for maps in own])
    named = groups if clusters is None else clusters
    counts = metrics.confusion_matrix(named, semantic, int(named.max()) + 1, len(toy.CLASS_NAMES))
    found = dict(
        named_by=OWN if clusters is None else CLUSTERS,
        grouped_by=CLUSTERS if own[0] is None else OWN,
        miou=metrics.miou(counts, metrics.match(counts)),
        nmi=metrics.nmi(counts),
        probe_miou=probe(system, labeled, features, semantic),
        ari_objects=metrics.rand_index(groups, truth.regions, truth.instance > 0),
        ari_instances=metrics.rand_index(groups, truth.regions),
        ari_foreground=metrics.rand_index(groups, truth.instance > 0),
        groups_used=max(len(some.unique()) for some in (groups if system.per_image else [groups])),
    )
    return found, groups


def cluster_maps(features: Tensor, k: int) -> Tensor:
    """k-means on the directions of features (n c h w) -> closeness to each center (n k h w)."""
    directions = F.normalize(features.float(), dim=1)  # over c
    rows, rng = rearrange(directions, "n c h w -> (n h w) c"), np.random.default_rng(0)
    some = rows[torch.from_numpy(rng.permutation(len(rows))[:SAMPLE])]
    centers = torch.from_numpy(kmeans(some.numpy(), k, rng)).to(rows.dtype)
    dots = einsum(centers, directions, "k c, n c h w -> n k h w")
    return 2 * dots - centers.square().sum(1)[:, None, None]  # over c; |direction|^2 never differs


@torch.enable_grad()
def probe(system: System, labeled: Scenes, features: Tensor, semantic: Tensor) -> float:
    """mIoU of a linear classifier that has learned from the few labeled scenes."""
    batches, t = [(torch.empty(0), (labeled.images, labeled.semantic.long()))], len(toy.CLASS_NAMES)
    cells = probes.collect_cells(system.backbone, batches, len(labeled.images), t)
    guess = winner(probes.linear_probe(*cells)(features), semantic.shape[-2:])
    return metrics.miou(metrics.confusion_matrix(guess, semantic, t, t), torch.arange(t))


def collapsed(found: Mapping[str, Any], untrained: Mapping[str, Any]) -> bool:
    """Few groups in use, or no more agreement with the classes than before training; of groups
    without names the first alone.
    """
    named = found["named_by"] == found["grouped_by"]
    return found["groups_used"] < FEWEST_GROUPS or (named and found["nmi"] <= untrained["nmi"])


def brief(label: str, record: Mapping[str, Any]) -> str:
    """One line about one row and seed."""
    form = "mIoU {miou:.3f} NMI {nmi:.3f} probe {probe_miou:.3f}, trained in {seconds:.0f} s"
    gone = "  collapsed" * record["collapsed"]
    return f"seed {record['seed']}  {label:<22} {form.format(**record)}{gone}"


def format_table(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """label -> the records of its seeds: medians, and how many of the seeds have collapsed."""
    cells = {}
    for label, records in rows.items():
        named, grouped = (records[0][by] == CLUSTERS for by in ("named_by", "grouped_by"))
        starred = dict(miou=named, nmi=named, probe_miou=False)
        median = {key: np.median([r[key] for r in records]) for key in (*MEASURES, "groups_used")}
        cells[label] = [f"{median[key]:.3f}{' *'[starred.get(key, grouped)]}" for key in MEASURES]
        gone = sum(record["collapsed"] for record in records)
        note = f"{gone} of {len(records)} collapsed" * bool(gone)
        cells[label] += [f"{median['groups_used']:.0f}", note]
    text = table(cells, [*MEASURES.values(), "used", ""])
    return f"{text}\n{STARRED * ('*' in text)}{EXPLANATION}"
