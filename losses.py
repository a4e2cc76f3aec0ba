"""The two losses: the same place has the same assignment in both views, and a slot finds itself in
the other view.

Slides: "Towards semantic prototypes: deep clustering" (avoiding collapse), "Semantic grouping with
pixel-level deep clustering" and "Group-level representation learning by contrasting slots".
Paper: sections 3.1 to 3.3.
Differs: means run over the valid pixels and queries of all ranks, not of each rank, so the result
does not depend on how a batch is split; keys are cut to the occupied slots before they are
gathered, not after; images whose crops do not overlap leave the consistency loss; with fewer than
two queries the slot loss is zero, where the released code fails.
Read next: teacher.py.

Every loss returns this rank's share. DistributedDataParallel takes the mean of the gradients over
ranks, and the mean of the shares over ranks is the loss of the joined batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from engine.ranks import gather_rows, rank_and_world_size, sum_over_ranks
from grouping import assignment

# --------------------------------------------------------- group consistency: pixels and prototypes


def group_consistency(
    student: Tensor,
    teacher: Tensor,
    center: Tensor,
    temp_student: float,
    temp_teacher: float,
    valid: Tensor,
) -> Tensor:
    """Cross-entropy of the student's assignment against the teacher's at the same places of the
    scene.

    student, teacher (b k h w): aligned similarity maps of two views; center (k); valid (b) bool:
    the crops overlap -> scalar, one direction. It starts near ln k. CE = mean_bhw -sum_k softmax((t
    - center) / temp_teacher)_k log softmax(s / temp_student)_k. Three things keep it from
    collapsing. Stop-gradient: the teacher is a target. Centering: no prototype can win everywhere.
    Sharpening, temp_teacher < temp_student: the assignment cannot become uniform. Raises ValueError
    where the shapes do not fit.
    """
    if student.shape != teacher.shape or center.shape != student.shape[1:2]:
        raise ValueError(
            f"student {tuple(student.shape)}, teacher {tuple(teacher.shape)} and center "
            f"{tuple(center.shape)} do not fit: expected (b k h w), (b k h w) and (k)"
        )
    with torch.no_grad():  # stop-gradient
        target = assignment(teacher - rearrange(center, "k -> k 1 1"), temp_teacher)
    # Cross-entropy takes logits: the logarithm of a softmax would underflow.
    entropy = F.cross_entropy(student / temp_student, target, reduction="none")
    entropy = reduce(entropy, "b h w -> b", "mean")
    num_valid = sum_over_ranks(valid.sum()).clamp(min=1)
    # `where`, not an index: without any overlap a zero stays connected to the graph, and no host
    # waits for a size.
    return torch.where(valid, entropy, 0 * entropy).sum() * rank_and_world_size()[1] / num_valid


@torch.no_grad()
def mean_over_pixels(teacher: Sequence[Tensor]) -> Tensor:
    """The mean similarity of every prototype over all pixels, views and ranks: what the center
    follows.

    teacher: un-aligned maps (b k h w), one per view -> (k).
    """
    mean = sum(reduce(maps, "b k h w -> k", "mean") for maps in teacher) / len(teacher)
    return sum_over_ranks(mean) / rank_and_world_size()[1]


@torch.no_grad()
def update_center(center: Tensor, mean: Tensor, momentum: float) -> None:
    """center <- momentum center + (1 - momentum) mean, in place; both (k). Momentum 0.9 [O].

    Called after the group loss of the step, so that a step uses the center of the step before [O].
    """
    center.lerp_(mean.to(center.dtype), 1 - momentum)


# --------------------------------------------------------- slot contrast: pull force and push force


class SlotPairs(NamedTuple):
    """Which slots of one direction take part. Positions count through (b k) of this rank."""

    # (n) slots of the student that are occupied in its view and in the teacher's other view
    queries: Tensor
    keys: Tensor  # slots of the teacher on this rank that are occupied in its view
    positives: Tensor  # (n) the row of each query's positive among the m keys of all ranks
    keys_per_rank: list[int]  # they sum to m
    num_queries: int  # n summed over all ranks


@torch.no_grad()
def pair_slots(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[SlotPairs]:
    """Which slots are contrasted with which, for every direction at once.

    student[i], teacher[i] (b k) bool: occupied, in direction i -> one SlotPairs per direction.
    Query: a student's slot that is occupied on both sides. Positive: the teacher's slot of the same
    image and the same prototype (pull force). Negatives: all other occupied slots of the teacher,
    of this and of all other images (push force).
    """
    rank, world_size = rank_and_world_size()
    # (directions 2 b k)
    masks = torch.stack([torch.stack([s & t, t]) for s, t in zip(student, teacher)])
    masks = rearrange(masks, "i r b k -> i r (b k)")
    counts = masks.sum(dim=-1)[None]  # over (b k)
    # The number of rows must be known on the host before the predictor can run. This is the one
    # place of the forward where the host waits for the device, once for all directions and ranks.
    counts = gather_rows(counts, [1] * world_size).tolist()  # [rank][direction][queries, keys]
    pairs = []
    for i, (query_mask, key_mask) in enumerate(masks):
        n, m = counts[rank][i]
        keys_per_rank = [counts[r][i][1] for r in range(world_size)]
        # A stable sort puts the True positions first and in order; slicing by a known count needs
        # no second wait.
        queries = query_mask.byte().argsort(descending=True, stable=True)[:n]
        keys = key_mask.byte().argsort(descending=True, stable=True)[:m]
        positives = key_mask.cumsum(0)[queries] - 1 + sum(keys_per_rank[:rank])
        pairs.append(
            SlotPairs(queries, keys, positives, keys_per_rank, sum(c[i][0] for c in counts))
        )
    return pairs


def slot_contrast(
    student_slots: Tensor,
    teacher_slots: Tensor,
    predictor: Callable[[Tensor], Tensor],
    pairs: SlotPairs,
    temp_slot: float,
) -> Tensor:
    """Pull a slot to its other view, push it away from every other slot of all images (MoCo v3's
    loss on slots).

    student_slots, teacher_slots (b k d); predictor: rows (n d) -> (n d), the student's only;
    temp_slot 0.2 [O] -> scalar, one direction. CE = mean_n -log softmax_m(<q_n, k_m> /
    temp)_positive, times 2 temp. Fewer than two queries over all ranks: zero.
    """
    if pairs.num_queries < 2:
        return connected_zero(student_slots, predictor)
    prediction, target = predicted_and_target_rows(student_slots, teacher_slots, predictor, pairs)
    keys = gather_rows(target, pairs.keys_per_rank)
    total = contrast_in_parts(prediction, pairs.positives, keys, temp_slot)
    return 2 * temp_slot * total * rank_and_world_size()[1] / pairs.num_queries


def slot_regression(
    student_slots: Tensor,
    teacher_slots: Tensor,
    predictor: Callable[[Tensor], Tensor],
    pairs: SlotPairs,
) -> Tensor:
    """Pull only (table 8b, "Reg."): 2 - 2 cos(prediction, teacher's slot), the mean over queries;
    no negatives.

    Shapes as in `slot_contrast`. Weight 1 [U]. Fewer than two queries over all ranks: zero.
    """
    if pairs.num_queries < 2:
        return connected_zero(student_slots, predictor)
    prediction, target = predicted_and_target_rows(student_slots, teacher_slots, predictor, pairs)
    rank, world_size = rank_and_world_size()
    own = pairs.positives - sum(pairs.keys_per_rank[:rank])
    # Autocast would halve an einsum
    distance = 2 - 2 * reduce(prediction * target[own], "n d -> n", "sum")
    return distance.sum() * world_size / pairs.num_queries


def image_contrast(prediction: Tensor, target: Tensor, temp_image: float = 0.2) -> Tensor:
    """The image-level objective of table 8d: each image finds its other view among those of all
    ranks.

    prediction (b d) of the student, target (b d) of the teacher, neither normalized -> scalar, one
    direction. CE = mean_b -log softmax_m(<q_b, k_m> / temp)_b, times 2 temp; temperature 0.2, so
    factor 0.4 [U].
    """
    rank, world_size = rank_and_world_size()
    b = len(prediction)
    keys = gather_rows(unit(target.detach()), [b] * world_size)
    own = torch.arange(b, device=prediction.device) + rank * b
    return 2 * temp_image * contrast(unit(prediction), own, keys, temp_image) / b


# ------------------------------------------------------------------ helpers of the contrasts

MOST_LOGITS = 2**22  # [U] logits of the slot contrast held at once: 16 MB in float32


def contrast(prediction: Tensor, positives: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """prediction (n d) and keys (m d) of length 1, positives (n) rows of keys -> cross-entropy,
    summed over n.
    """
    with torch.autocast(
        prediction.device.type, enabled=False
    ):  # float32 here: m can be tens of thousands
        logits = einsum(prediction, keys, "n d, m d -> n m") / temperature
        return F.cross_entropy(logits, positives, reduction="sum")


def contrast_in_parts(
    prediction: Tensor,
    positives: Tensor,
    keys: Tensor,
    temperature: float,
    most_logits: int | None = None,
) -> Tensor:
    """`contrast`, a few rows at a time: n m logits can be a gigabyte. Each part is computed again
    in the backward.
    """
    rows = max((most_logits or MOST_LOGITS) // len(keys), 1)
    parts = zip(prediction.split(rows), positives.split(rows))
    if len(prediction) <= rows:
        return sum(contrast(*part, keys, temperature) for part in parts)
    return sum(
        checkpoint(contrast, *part, keys, temperature, use_reentrant=False) for part in parts
    )


def predicted_and_target_rows(
    student_slots: Tensor,
    teacher_slots: Tensor,
    predictor: Callable[[Tensor], Tensor],
    pairs: SlotPairs,
) -> tuple[Tensor, Tensor]:
    """The unit vectors that are compared: predictions (n d), and this rank's occupied teacher
    slots, no gradient.
    """
    prediction = predictor(rearrange(student_slots, "b k d -> (b k) d")[pairs.queries])
    target = rearrange(teacher_slots, "b k d -> (b k) d")[pairs.keys].detach()
    return unit(prediction), unit(target)


def unit(rows: Tensor) -> Tensor:
    """rows (n d) -> the same directions with length 1, in float32 or better whatever their type
    was.
    """
    return F.normalize(rows.to(torch.promote_types(rows.dtype, torch.float32)), dim=1)  # over d


def connected_zero(slots: Tensor, predictor: Callable[[Tensor], Tensor]) -> Tensor:
    """Zero with a gradient of zeros for all: without one in the predictor, a rank would keep the
    others waiting.
    """
    parameters = predictor.parameters() if isinstance(predictor, torch.nn.Module) else ()
    return 0 * (slots.sum() + sum(p.sum() for p in parameters))
