"""The losses: the same place has the same assignment in both views, and a slot finds itself.

Slides: "Towards semantic prototypes: deep clustering" (avoiding collapse), "Semantic grouping with
pixel-level deep clustering" and "Group-level representation learning by contrasting slots".
Paper: sections 3.1 to 3.3.
Read next: teacher.py.

Several processes (ranks) may hold a part of the batch each. Every loss is scaled so that its mean
over ranks is the loss of the whole batch, as DistributedDataParallel takes the mean of gradients.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine.ranks import gather_rows, rank_and_world_size, sum_over_ranks
from grouping import assignment, full_precision


def group_consistency(
    student_aligned: Tensor,
    teacher_aligned: Tensor,
    center: Tensor,
    temp_student: float,
    temp_teacher: float,
    valid: Tensor,
) -> Tensor:
    """Pixels at the same place of the scene should have the same assignment; one direction.

    target = softmax_k((teacher_aligned - center) / temp_teacher), without gradient
    loss = mean_bhw -sum_k target_k log softmax_k(student_aligned / temp_student)

    student_aligned, teacher_aligned (b k h w): aligned similarity of two views; center (k); valid
    (b) bool: the crops overlap; the mean runs over these images of all ranks -> scalar, ln k where
    all is uniform. Against collapse: stop-gradient, the teacher is a target; centering, no
    prototype wins everywhere; sharpening, temp_teacher < temp_student, no assignment is uniform;
    and the moving average of teacher.py. Raises ValueError for shapes that do not fit.
    """
    if student_aligned.shape != teacher_aligned.shape or center.shape != student_aligned.shape[1:2]:
        shapes = [tuple(x.shape) for x in (student_aligned, teacher_aligned, center)]
        raise ValueError(f"expected maps (b k h w), (b k h w) and a center (k), found {shapes}")
    with torch.no_grad():  # stop-gradient
        target = assignment(teacher_aligned - rearrange(center, "k -> k 1 1"), temp_teacher)
    # It takes logits: the logarithm of a softmax would underflow.
    loss = F.cross_entropy(student_aligned / temp_student, target, reduction="none")
    loss = reduce(loss, "b h w -> b", "mean")
    # `where`, not an index: without any overlap a zero stays connected to the graph.
    total = torch.where(valid, loss, 0 * loss).sum()
    return share_of_mean(total, sum_over_ranks(valid.sum()).clamp(min=1))


def slot_contrast(
    student_slots: Tensor,
    teacher_slots: Tensor,
    predictor: nn.Module,
    pairs: SlotPairs,
    temp_slot: float,
) -> Tensor:
    """Pull a slot to itself in the other view, push it away from all other slots; one direction.

    loss = 2 t mean_n -log(exp(<query_n, key_positive(n)> / t) / sum_m exp(<query_n, key_m> / t))

    student_slots, teacher_slots (b k d), of different views; predictor: rows (n d) -> (n d); pairs:
    of `pair_slots`, which defines queries, keys and positives; t = temp_slot: 0.2 [O] -> scalar.
    Queries are predictions; all rows have length 1. Fewer than two queries on all ranks: zero [U].
    """
    if pairs.num_queries < 2:
        return connected_zero(student_slots, predictor)
    queries, own_keys = unit_rows(student_slots, teacher_slots, predictor, pairs)
    keys = gather_rows(own_keys, pairs.keys_per_rank)
    total = contrast_in_parts(queries, pairs.positives, keys, temp_slot)
    return share_of_mean(2 * temp_slot * total, pairs.num_queries)


def slot_regression(
    student_slots: Tensor, teacher_slots: Tensor, predictor: nn.Module, pairs: SlotPairs
) -> Tensor:
    """Pull only (table 8b, "Reg."), weight 1 [U]; arguments as in `slot_contrast`.

    loss = mean_n (2 - 2 <query_n, key_positive(n)>)
    """
    if pairs.num_queries < 2:
        return connected_zero(student_slots, predictor)
    queries, own_keys = unit_rows(student_slots, teacher_slots, predictor, pairs)
    own = pairs.positives - sum(pairs.keys_per_rank[: rank_and_world_size()[0]])
    # Not an einsum, which autocast would compute in half precision.
    distance = 2 - 2 * reduce(queries * own_keys[own], "n d -> n", "sum")
    return share_of_mean(distance.sum(), pairs.num_queries)


def image_contrast(prediction: Tensor, target: Tensor, temp_image: float = 0.2) -> Tensor:
    """The image-level objective of table 8d: an image finds its other view; one direction.

    loss = 2 t mean_b -log(exp(<query_b, key_b> / t) / sum_m exp(<query_b, key_m> / t))

    prediction (b d) of the student, target (b d) of the teacher, not normalized; keys are the
    targets of all ranks; t = temp_image: 0.2 [U] -> scalar.
    """
    rank, world_size = rank_and_world_size()
    b = len(prediction)
    keys = gather_rows(unit(target.detach()), [b] * world_size)
    own = torch.arange(b, device=prediction.device) + rank * b
    return 2 * temp_image * contrast_in_parts(unit(prediction), own, keys, temp_image) / b


# ----------------------------------------------------------- helpers: center, pairs, cross-entropy


@torch.no_grad()
def mean_over_pixels(teacher_similarity: list[Tensor]) -> Tensor:
    """What the center follows: maps (b k h w) of whole views -> mean over all ranks (k)."""
    maps = [reduce(similarity, "b k h w -> k", "mean") for similarity in teacher_similarity]
    return sum_over_ranks(sum(maps) / len(maps)) / rank_and_world_size()[1]


@torch.no_grad()
def update_center(center: Tensor, mean: Tensor, momentum: float) -> None:
    """center <- momentum center + (1 - momentum) mean, in place; both (k). Momentum 0.9 [O]."""
    center.lerp_(mean.to(center.dtype), 1 - momentum)


class SlotPairs(NamedTuple):
    """Which slots of one direction take part. Slot k of image b has number b * K + k."""

    queries: Tensor  # (n) numbers of the slots that are occupied in both views, on this rank
    keys: Tensor  # numbers of the slots that are occupied in the teacher's view, on this rank
    positives: Tensor  # (n) the key of the same image and prototype: its row among all m keys
    keys_per_rank: list[int]  # their sum is m
    num_queries: int  # sum of n over all ranks


@torch.no_grad()
def pair_slots(student_occupied: list[Tensor], teacher_occupied: list[Tensor]) -> list[SlotPairs]:
    """Masks (b k) bool: of the student's view, of the teacher's other view, for each direction.

    A query's positive is the same slot in the teacher's other view. Its negatives are all other
    occupied slots of the teacher's other views of all images of all ranks.
    """
    rank, world_size = rank_and_world_size()
    masks = [torch.stack([s & t, t]) for s, t in zip(student_occupied, teacher_occupied)]
    masks = rearrange(masks, "direction role b k -> direction role (b k)")
    occupied_first = masks.byte().argsort(descending=True, stable=True)  # over (b k)
    # Only here the forward waits for the device: the predictor must know its number of rows.
    counts = gather_rows(masks.sum(dim=-1)[None], [1] * world_size).tolist()
    pairs = []
    for i, (n, m) in enumerate(counts[rank]):
        queries, keys = occupied_first[i, 0, :n], occupied_first[i, 1, :m]
        keys_per_rank = [count[i][1] for count in counts]
        positives = masks[i, 1].cumsum(0)[queries] - 1 + sum(keys_per_rank[:rank])
        num_queries = sum(count[i][0] for count in counts)
        pairs.append(SlotPairs(queries, keys, positives, keys_per_rank, num_queries))
    return pairs


def unit_rows(
    student_slots: Tensor, teacher_slots: Tensor, predictor: nn.Module, pairs: SlotPairs
) -> tuple[Tensor, Tensor]:
    """Queries (n d): predictions; keys of this rank: slots of the teacher, without gradient."""
    queries = predictor(rearrange(student_slots, "b k d -> (b k) d")[pairs.queries])
    keys = rearrange(teacher_slots, "b k d -> (b k) d")[pairs.keys].detach()
    return unit(queries), unit(keys)


def share_of_mean(total: Tensor, count: Tensor | int) -> Tensor:
    """total: a sum on this rank; count: of its terms on all ranks -> a loss, scaled as above."""
    return total * rank_and_world_size()[1] / count


def unit(rows: Tensor) -> Tensor:
    """rows (n d) -> the same directions with length 1, in float32 or better."""
    return F.normalize(full_precision(rows), dim=1)  # over d


def contrast_in_parts(
    queries: Tensor, positives: Tensor, keys: Tensor, temperature: float, most_logits: int = 2**22
) -> Tensor:
    """queries (n d), keys (m d), positives (n): rows of keys -> cross-entropy, summed over n.

    At most 16 MB of logits exist at once [U]; n m of them can be a gigabyte.
    """
    rows = max(most_logits // len(keys), 1)
    if len(queries) > rows:
        again = partial(checkpoint, contrast_in_parts, use_reentrant=False)  # in the backward
        parts = zip(queries.split(rows), positives.split(rows))
        return sum(again(*part, keys, temperature) for part in parts)
    with torch.autocast(queries.device.type, enabled=False):  # m can be tens of thousands
        logits = einsum(queries, keys, "n d, m d -> n m") / temperature
        return F.cross_entropy(logits, positives, reduction="sum")


def connected_zero(slots: Tensor, predictor: nn.Module) -> Tensor:
    """Zero, with a gradient of zeros: other ranks wait for a gradient from this one."""
    return 0 * (slots.sum() + sum(p.sum() for p in predictor.parameters()))
