"""SlotCon: student, teacher, centre and the two losses, put together.

Slide: "Together: solving segmentation & representation jointly". Paper: section 3, figure 2.
Differs: the teacher and the centre are moved by whoever calls, in plain sight, not inside the forward.
Read next: train.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

import losses
from engine import ranks
from grouping import GroupingNetwork, assignment, inverse_augmentation, similarity
from slots import SlotPredictor, attentive_pooling, occupied
from teacher import make_teacher, update_teacher


class Report(NamedTuple):
    """What a forward says besides its loss; all without gradient."""

    losses: Tensor  # (3) total, group, slot: this rank's share
    center_mean: Tensor  # (k) mean teacher similarity over all pixels, views and ranks
    student_aligned: tuple[Tensor, ...]  # one per view: (b k h w) similarity maps after inverse augmentation
    teacher_aligned: tuple[Tensor, ...]
    teacher_maps: tuple[Tensor, ...]  # before it
    teacher_occupied: Tensor  # (v b k) bool
    valid: Tensor  # (b) bool: the crops overlap


class SlotCon(nn.Module):
    """Student, teacher, predictor and centre; called on two views it returns the loss. It holds no clock.

    arch, num_prototypes (k), dim_hidden, dim_out (d): sizes of the networks. group_weight: lambda; at 1 the slot loss
    is skipped. temp_student, temp_teacher: of the assignments; temp_pool: of attentive pooling, 0 for the teacher's;
    temp_slot: of the contrast. slot_loss: "ctr" contrasts slots, "reg" regresses them (table 8b). align: "asgn" undoes
    the augmentation on similarity maps, "proj" on embeddings (table 8c). image_loss: adds table 8d's objective.
    Raises ValueError for a choice or size that does not exist.
    """

    def __init__(
        self, arch: str = "resnet50", num_prototypes: int = 256, dim_hidden: int = 4096, dim_out: int = 256,
        group_weight: float = 0.5, temp_student: float = 0.1, temp_teacher: float = 0.07, temp_pool: float = 0.0,
        temp_slot: float = 0.2, slot_loss: str = "ctr", align: str = "asgn", image_loss: bool = False,
    ):
        super().__init__()
        self.student = GroupingNetwork(arch, num_prototypes, dim_hidden, dim_out)
        self.predictor = SlotPredictor(dim_out, dim_out, dim_hidden) if group_weight < 1 else None
        self.register_buffer("center", torch.zeros(num_prototypes))
        self.teacher = make_teacher(self.student)
        self.group_weight, self.slot_loss, self.where_aligned = group_weight, slot_loss, align
        self.temp_student, self.temp_teacher, self.temp_slot = temp_student, temp_teacher, temp_slot
        self.temp_pool = temp_pool or temp_teacher  # student and teacher pool at the same temperature [O]
        self.image_loss = image_loss
        if slot_loss not in ("ctr", "reg") or align not in ("asgn", "proj"):
            raise ValueError(f"slot_loss is ctr or reg and align is asgn or proj, found {slot_loss!r} and {align!r}")
        if image_loss:  # the same three layers on one vector per image [U]
            self.image_projector = SlotPredictor(self.student.backbone.out_channels, dim_out, dim_hidden)
            self.image_predictor = SlotPredictor(dim_out, dim_out, dim_hidden)
            self.image_teacher = make_teacher(self.image_projector)

    def forward(self, views: Tensor, boxes: Tensor, flipped: Tensor) -> tuple[Tensor, Report]:
        """views (b v 3 y x) normalised; boxes (b v 4) x1 y1 x2 y2 in each view's unit frame; flipped (b v) bool
        -> this rank's share of the loss, and a report. The teacher is used as it is: `update_teacher` comes before."""
        images, boxes, flipped = views.unbind(1), boxes.unbind(1), flipped.unbind(1)  # over v
        # One view after the other, view 1 first: joined, they would share their batch statistics [O].
        s_features, s_embeddings, s_maps = zip(*[look(self.student, x) for x in images])
        with torch.no_grad():
            t_features, t_embeddings, t_maps = zip(*[look(self.teacher, x) for x in images])

        # Pixels that lie in the same location should have similar assignments.
        s_aligned = self.align(self.student, s_embeddings, s_maps, boxes, flipped)
        with torch.no_grad():
            t_aligned = self.align(self.teacher, t_embeddings, t_maps, boxes, flipped)
        valid = (boxes[0][:, 2] > boxes[0][:, 0]) & (boxes[0][:, 3] > boxes[0][:, 1])
        group = sum(
            losses.group_consistency(s_aligned[i], t_aligned[1 - i], self.center, self.temp_student, self.temp_teacher,
                                     valid)
            for i in (0, 1)
        )

        # A slot should find itself in the other view, among all slots of all images.
        t_occupied = [occupied(m) for m in t_maps]
        slot = self.slot_term(s_embeddings, t_embeddings, s_maps, t_maps, t_occupied)
        loss = group if slot is None else self.group_weight * group + (1 - self.group_weight) * slot
        if self.image_loss:
            loss = loss + self.image_term(s_features, t_features)

        seen = torch.stack([loss, group, torch.zeros_like(group) if slot is None else slot]).detach()
        return loss, Report(seen, losses.mean_over_pixels(t_maps), tuple(m.detach() for m in s_aligned),
                            tuple(t_aligned), t_maps, torch.stack(t_occupied), valid)

    def align(self, network, embeddings, maps, boxes, flipped) -> list[Tensor]:
        """Similarity maps of the part of the scene that both views share: cut from the maps, or from the embeddings."""
        if self.where_aligned == "asgn":
            return [inverse_augmentation(m, box, flip) for m, box, flip in zip(maps, boxes, flipped)]
        aligned = [inverse_augmentation(z, box, flip) for z, box, flip in zip(embeddings, boxes, flipped)]
        return [similarity(z, network.prototypes.weight) for z in aligned]

    def slot_term(self, s_embeddings, t_embeddings, s_maps, t_maps, t_occupied) -> Tensor | None:
        """Both directions of the slot loss; None at lambda 1, where it is skipped."""
        if self.predictor is None:
            return None
        s_slots = [attentive_pooling(z, m, self.temp_pool) for z, m in zip(s_embeddings, s_maps)]
        with torch.no_grad():
            t_slots = [attentive_pooling(z, m, self.temp_pool) for z, m in zip(t_embeddings, t_maps)]
        pairs = losses.pair_slots([occupied(m) for m in s_maps], t_occupied[::-1])
        if self.slot_loss == "reg":
            return sum(losses.slot_regression(s_slots[i], t_slots[1 - i], self.predictor, pairs[i]) for i in (0, 1))
        return sum(losses.slot_contrast(s_slots[i], t_slots[1 - i], self.predictor, pairs[i], self.temp_slot)
                   for i in (0, 1))

    def image_term(self, s_features, t_features) -> Tensor:
        """Both directions of the image-level objective, on global average pools of the backbone map."""
        predictions = [self.image_predictor(self.image_projector(reduce(f, "b c h w -> b c", "mean")))
                       for f in s_features]
        with torch.no_grad():
            targets = [self.image_teacher(reduce(f, "b c h w -> b c", "mean")) for f in t_features]
        return sum(losses.image_contrast(predictions[i], targets[1 - i]) for i in (0, 1))

    def update_teacher(self, momentum: float) -> None:
        """The teacher follows the student: all parameters, no buffers."""
        update_teacher(self.teacher, self.student, momentum)
        if self.image_loss:
            update_teacher(self.image_teacher, self.image_projector, momentum)


def look(network: GroupingNetwork, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """images (b 3 y x) -> backbone map (b c h w), embeddings (b d h w), similarity (b k h w)."""
    features = network.backbone(images)
    embeddings = network.projector(features)
    return features, embeddings, similarity(embeddings, network.prototypes.weight)


@torch.no_grad()
def statistics(report: Report, center: Tensor, temp_teacher: float) -> dict[str, float]:
    """Is it learning? Over the images of all ranks, for the log; the README has the glossary. Waits for the device."""
    v, b, _ = report.teacher_occupied.shape
    world_size = ranks.rank_and_world_size()[1]
    maps = rearrange(list(report.teacher_maps), "v b k h w -> (v b) k h w")
    p = assignment(maps - center[:, None, None], temp_teacher)
    mean = ranks.sum_over_ranks(reduce(p, "b k h w -> k", "mean")) / world_size
    same = [(report.student_aligned[i].argmax(1) == report.teacher_aligned[1 - i].argmax(1)) for i in (0, 1)]  # over k
    same = reduce(torch.stack(same).float(), "v b h w -> b", "mean")
    sums = ranks.sum_over_ranks(torch.stack([
        report.teacher_occupied.sum() / (v * b),
        reduce(torch.special.entr(p), "b k h w -> b h w", "sum").mean(),
        (same * report.valid).sum(),
        report.valid.sum(),
    ]).float())
    used = ranks.sum_over_ranks(reduce(report.teacher_occupied.long(), "v b k -> k", "sum")) > 0
    return dict(
        occupied_per_image=sums[0].item() / world_size,
        prototypes_used=int(used.sum()),
        entropy_teacher=sums[1].item() / world_size,
        entropy_mean=torch.special.entr(mean).sum().item(),
        agreement=(sums[2] / sums[3].clamp(min=1)).item(),
    )
