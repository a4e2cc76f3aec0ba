"""SlotCon: student, teacher, center and the two losses, put together.

Slide: "Together: solving segmentation & representation jointly".
Paper: section 3, figure 2.
Read next: data.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import torch
from einops import reduce
from torch import Tensor, nn

import losses
from grouping import GroupingNetwork, inverse_augmentation, overlapping, similarity
from slots import SlotPredictor, attentive_pooling, occupied
from teacher import make_teacher, update_teacher


class View(NamedTuple):
    """One view of b images, as one network describes it."""

    features: Tensor  # (b c h w) the backbone's map
    embeddings: Tensor  # (b d h w) of the pixels, not normalized
    similarity: Tensor  # (b k h w) of pixels and prototypes, over the whole view
    aligned: Tensor  # (b k h w) with crop and flip undone: of the part that both views show
    slots: Tensor | None  # (b k d); None where there is no slot loss
    occupied: Tensor  # (b k) bool: the prototype is the nearest one of some pixel


class Report(NamedTuple):
    """What a forward computes, without gradient; directions: (s1, t2), then (s2, t1)."""

    losses: Tensor  # (3) total, group, slot, of this rank; their mean over ranks counts
    group_losses: Tensor  # (2) by direction
    slot_losses: Tensor  # (2) by direction; zeros where there is no slot loss
    pairs: list[losses.SlotPairs]  # by direction; empty where there is no slot loss
    center_mean: Tensor  # (k) mean of the teacher's similarity over pixels, views and ranks
    student: tuple[View, View]  # by view
    teacher: tuple[View, View]  # by view
    valid: Tensor  # (b) bool: the crops overlap


class SlotCon(nn.Module):
    """Student, teacher, predictor, center; called on two views it returns the loss and a report.

    loss = group_weight (group12 + group21) + (1 - group_weight) (slot12 + slot21) + image term

    arch, num_prototypes (k), dim_hidden, dim_out (d): sizes of the networks. group_weight: lambda;
    at 1 there is no slot loss. temp_student, temp_teacher: of the assignments; temp_slot: of the
    contrast. slot_loss: "ctr" contrasts slots, "reg" regresses them (table 8b). align: "asgn"
    undoes the augmentation on similarity maps, "proj" on embeddings (table 8c). image_loss: adds
    the image term, of table 8d, weight 1 [U]. freeze_backbone: the backbone, such as a pretrained
    one of timm, stays as it is, in student and teacher [U]. pretrained: of `build_backbone`. Raises
    ValueError for what does not exist.
    """

    def __init__(
        self,
        arch: str = "resnet50",
        num_prototypes: int = 256,
        dim_hidden: int = 4096,
        dim_out: int = 256,
        group_weight: float = 0.5,
        temp_student: float = 0.1,
        temp_teacher: float = 0.07,
        temp_slot: float = 0.2,
        slot_loss: str = "ctr",
        align: str = "asgn",
        image_loss: bool = False,
        pretrained: bool = False,
        freeze_backbone: bool = False,
    ):
        super().__init__()
        if slot_loss not in ("ctr", "reg") or align not in ("asgn", "proj"):
            given = f"{slot_loss!r} and {align!r}"
            raise ValueError(f"slot_loss is ctr or reg and align is asgn or proj, found {given}")
        self.group_weight, self.slot_loss, self.align = group_weight, slot_loss, align
        self.temp_student, self.temp_teacher, self.temp_slot = temp_student, temp_teacher, temp_slot
        self.image_loss, self.freeze_backbone = image_loss, freeze_backbone
        self.side_by_side = False  # student and teacher each in a thread: for two cores of a CPU
        self.student = GroupingNetwork(arch, num_prototypes, dim_hidden, dim_out, pretrained)
        self.predictor = SlotPredictor(dim_out, dim_out, dim_hidden) if group_weight < 1 else None
        self.register_buffer("center", torch.zeros(num_prototypes))
        self.teacher = make_teacher(self.student)
        if freeze_backbone:  # both networks have one and the same
            self.student.backbone.requires_grad_(False)
            self.teacher.backbone = self.student.backbone
        if image_loss:  # the same three layers on one vector per image [U]
            channels = self.student.backbone.out_channels
            self.image_projector = SlotPredictor(channels, dim_out, dim_hidden)
            self.image_predictor = SlotPredictor(dim_out, dim_out, dim_hidden)
            self.image_teacher = make_teacher(self.image_projector)

    def forward(self, views: Tensor, boxes: Tensor, flipped: Tensor) -> tuple[Tensor, Report]:
        """views (b v 3 y x) normalized; boxes (b v 4) and flipped (b v) bool, of `data.Batch` ->
        this rank's loss, as losses.py scales it, and a report.
        """
        (s1, s2), (t1, t2) = self.describe_both(views, boxes, flipped)
        valid = overlapping(boxes)

        # Pixels that lie in the same location should have similar assignments.
        temps = self.temp_student, self.temp_teacher
        group12 = losses.group_consistency(s1.aligned, t2.aligned, self.center, *temps, valid)
        group21 = losses.group_consistency(s2.aligned, t1.aligned, self.center, *temps, valid)

        # A slot should find itself in the other view, among all occupied slots of all images.
        pairs, slot12, slot21 = [], torch.zeros_like(group12), torch.zeros_like(group12)
        if self.predictor is not None:
            pairs = losses.pair_slots([s1.occupied, s2.occupied], [t2.occupied, t1.occupied])
            slot12 = self.contrast(s1, t2, pairs[0])
            slot21 = self.contrast(s2, t1, pairs[1])

        group, slot = group12 + group21, slot12 + slot21
        loss = self.group_weight * group + (1 - self.group_weight) * slot  # lambda
        if self.image_loss:
            loss = loss + self.image_term(s1, s2, t1, t2)
        return loss, Report(
            losses=torch.stack([loss, group, slot]).detach(),
            group_losses=torch.stack([group12, group21]).detach(),
            slot_losses=torch.stack([slot12, slot21]).detach(),
            pairs=pairs,
            center_mean=losses.mean_over_pixels([t1.similarity, t2.similarity]),
            student=(detached(s1), detached(s2)),
            teacher=(t1, t2),
            valid=valid,
        )

    def describe_both(self, views: Tensor, boxes: Tensor, flipped: Tensor) -> list[list[View]]:
        """The student's records, and the teacher's without gradient; arguments as in `forward`."""
        describe_teacher = torch.no_grad()(partial(self.describe, self.teacher))
        given = views, boxes, flipped
        if self.side_by_side:  # neither needs the other: the same numbers, sooner
            with ThreadPoolExecutor(1) as thread:
                teacher = thread.submit(describe_teacher, *given)
                return [self.describe(self.student, *given), teacher.result()]
        student = self.describe(self.student, *given)
        known = [view.features for view in student] if self.freeze_backbone else [None, None]
        return [student, describe_teacher(*given, known)]

    def describe(
        self, network: GroupingNetwork, views: Tensor, boxes: Tensor, flipped: Tensor,
        known: Sequence[Tensor | None] = (None, None),
    ) -> list[View]:  # fmt: skip
        """The records of both views; arguments as in `forward`; known: the backbone's maps."""
        # View 1 first, then view 2: joined, they would share their batch statistics [O].
        embedded = [network.embed(*of_view) for of_view in zip(views.unbind(1), known)]  # over v
        prototypes, on_maps = network.prototypes.weight, self.align == "asgn"
        maps = [similarity(z, prototypes) for _, z in embedded]
        records = []
        for i, (features, z) in enumerate(embedded):
            moved = inverse_augmentation(maps[i] if on_maps else z, boxes[:, i], flipped[:, i])
            aligned = moved if on_maps else similarity(moved, prototypes)
            # Student and teacher pool at the same temperature, the teacher's [O].
            slots = attentive_pooling(z, maps[i], self.temp_teacher) if self.predictor else None
            records.append(View(features, z, maps[i], aligned, slots, occupied(maps[i])))
        return records

    def contrast(self, student: View, teacher: View, pairs: losses.SlotPairs) -> Tensor:
        """One direction of the slot loss."""
        given = student.slots, teacher.slots, self.predictor, pairs
        if self.slot_loss == "reg":
            return losses.slot_regression(*given)
        return losses.slot_contrast(*given, self.temp_slot)

    def image_term(self, *views: View) -> Tensor:
        """Both directions of the image-level objective; views: s1, s2, t1, t2."""
        pooled = [reduce(view.features, "b c h w -> b c", "mean") for view in views]
        q1, q2 = (self.image_predictor(self.image_projector(x)) for x in pooled[:2])
        with torch.no_grad():
            k1, k2 = (self.image_teacher(x) for x in pooled[2:])
        return losses.image_contrast(q1, k2) + losses.image_contrast(q2, k1)

    def train(self, mode: bool = True) -> SlotCon:
        """As of every module, but a frozen backbone keeps its running statistics."""
        super().train(mode)
        self.student.backbone.train(mode and not self.freeze_backbone)
        return self

    def update_center(self, mean: Tensor, momentum: float) -> None:
        """center <- momentum center + (1 - momentum) mean, both (k)."""
        losses.update_center(self.center, mean, momentum)

    def update_teacher(self, momentum: float) -> None:
        """The teacher follows the student: all parameters, no buffers."""
        update_teacher(self.teacher, self.student, momentum)
        if self.image_loss:
            update_teacher(self.image_teacher, self.image_projector, momentum)


def detached(view: View) -> View:
    """The same record without gradient."""
    return View(*(None if x is None else x.detach() for x in view))
