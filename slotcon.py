"""SlotCon: student, teacher, center and the two losses, put together.

Slide: "Together: solving segmentation & representation jointly".
Paper: section 3, figure 2.
Differs: the forward moves neither the teacher nor the center. The training loop does, after the
optimizer's step; the released code moves the teacher at the start of its next step, which is the
same student and the same teacher.
Read next: data.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import reduce
from torch import Tensor, nn

import losses
from grouping import GroupingNetwork, inverse_augmentation, similarity
from slots import SlotPredictor, attentive_pooling, occupied
from teacher import make_teacher, update_teacher


class View(NamedTuple):
    """One view of b images, as one network describes it. The letters are those of the whole
    repository.
    """

    features: Tensor  # (b c h w) the backbone's map
    embeddings: Tensor  # (b d h w) of the pixels, not normalized
    similarity: Tensor  # (b k h w) with the prototypes, of the whole view
    aligned: Tensor  # (b k h w) of the part of the scene that both views show, not mirrored
    slots: Tensor | None  # (b k d); None where there is no slot loss
    occupied: Tensor  # (b k) bool: the prototype is the nearest one of some pixel


class Report(NamedTuple):
    """What a forward computes besides its loss; all without gradient. Directions: (s1, t2), then
    (s2, t1).
    """

    losses: Tensor  # (3) total, group, slot: this rank's share
    group_losses: Tensor  # (2) by direction
    slot_losses: Tensor  # (2) by direction; zeros where there is no slot loss
    center_mean: Tensor  # (k) mean teacher similarity over all pixels, views and ranks
    student: tuple[View, View]  # by view
    teacher: tuple[View, View]
    pairs: list[losses.SlotPairs]  # by direction; empty where there is no slot loss
    valid: Tensor  # (b) bool: the crops overlap


class SlotCon(nn.Module):
    """Student, teacher, predictor and center; called on two views it returns the loss.

    arch, num_prototypes (k), dim_hidden, dim_out (d): sizes of the networks. group_weight: lambda;
    at 1 the slot loss is skipped. temp_student, temp_teacher: of the assignments; temp_slot: of the contrast. slot_loss: "ctr" contrasts
    slots, "reg" regresses them (table 8b). align: "asgn" undoes the augmentation on similarity
    maps, "proj" on embeddings (table 8c). image_loss: adds table 8d's objective. Raises ValueError
    for a choice or size that does not exist.
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
    ):
        super().__init__()
        self.student = GroupingNetwork(arch, num_prototypes, dim_hidden, dim_out)
        self.predictor = SlotPredictor(dim_out, dim_out, dim_hidden) if group_weight < 1 else None
        self.register_buffer("center", torch.zeros(num_prototypes))
        self.teacher = make_teacher(self.student)
        self.group_weight, self.slot_loss, self.where_aligned = group_weight, slot_loss, align
        self.temp_student, self.temp_teacher, self.temp_slot = temp_student, temp_teacher, temp_slot
        self.image_loss = image_loss
        if slot_loss not in ("ctr", "reg") or align not in ("asgn", "proj"):
            raise ValueError(
                f"slot_loss is ctr or reg and align is asgn or proj, found {slot_loss!r} and "
                f"{align!r}"
            )
        if image_loss:  # the same three layers on one vector per image [U]
            self.image_projector = SlotPredictor(
                self.student.backbone.out_channels, dim_out, dim_hidden
            )
            self.image_predictor = SlotPredictor(dim_out, dim_out, dim_hidden)
            self.image_teacher = make_teacher(self.image_projector)

    def forward(self, views: Tensor, boxes: Tensor, flipped: Tensor) -> tuple[Tensor, Report]:
        """views (b v 3 y x) normalized; boxes (b v 4) x1 y1 x2 y2 in each view's unit frame;
        flipped (b v) bool -> this rank's share of the loss, and a report.
        """
        s1, s2 = self.look(self.student, views, boxes, flipped)
        with torch.no_grad():
            t1, t2 = self.look(self.teacher, views, boxes, flipped)
        valid = (boxes[:, 0, 2] > boxes[:, 0, 0]) & (boxes[:, 0, 3] > boxes[:, 0, 1])

        # Pixels that lie in the same location should have similar assignments.
        group12, group21 = self.consistency(s1, t2, valid), self.consistency(s2, t1, valid)
        group = group12 + group21
        slot12 = slot21 = torch.zeros_like(group)
        loss, pairs = group, []
        if self.predictor is not None:
            # A slot should find itself in the other view, among all slots of all images.
            pairs = losses.pair_slots([s1.occupied, s2.occupied], [t2.occupied, t1.occupied])
            slot12, slot21 = self.contrast(s1, t2, pairs[0]), self.contrast(s2, t1, pairs[1])
            loss = self.group_weight * group + (1 - self.group_weight) * (slot12 + slot21)
        if self.image_loss:
            loss = loss + self.image_term((s1, s2), (t1, t2))

        by_direction = torch.stack([group12, group21, slot12, slot21]).detach()
        return loss, Report(
            torch.stack([loss, group, slot12 + slot21]).detach(),
            by_direction[:2],
            by_direction[2:],
            losses.mean_over_pixels([t1.similarity, t2.similarity]),
            (detached(s1), detached(s2)),
            (t1, t2),
            pairs,
            valid,
        )

    def look(
        self, network: GroupingNetwork, views: Tensor, boxes: Tensor, flipped: Tensor
    ) -> list[View]:
        """All that one network computes of both views; arguments as in `forward`."""
        # One view after the other, view 1 first: joined, they would share their batch statistics
        # [O].
        embedded = []
        for images in views.unbind(1):  # over v
            features, embeddings = network.embed(images)
            embedded.append(
                (features, embeddings, similarity(embeddings, network.prototypes.weight))
            )
        return [self.describe(network, *embedded[i], boxes[:, i], flipped[:, i]) for i in (0, 1)]

    def describe(
        self,
        network: GroupingNetwork,
        features: Tensor,
        embeddings: Tensor,
        maps: Tensor,
        boxes: Tensor,
        flipped: Tensor,
    ) -> View:
        """The record of one view from what the network computed: boxes (b 4), flipped (b)."""
        if self.where_aligned == "asgn":
            aligned = inverse_augmentation(maps, boxes, flipped)
        else:
            aligned = similarity(
                inverse_augmentation(embeddings, boxes, flipped), network.prototypes.weight
            )
        slots = None
        if self.predictor is not None:
            # Student and teacher pool at the same temperature, the teacher's [O].
            slots = attentive_pooling(embeddings, maps, self.temp_teacher)
        return View(features, embeddings, maps, aligned, slots, occupied(maps))

    def consistency(self, student: View, teacher: View, valid: Tensor) -> Tensor:
        """One direction of the group loss."""
        return losses.group_consistency(
            student.aligned,
            teacher.aligned,
            self.center,
            self.temp_student,
            self.temp_teacher,
            valid,
        )

    def contrast(self, student: View, teacher: View, pairs: losses.SlotPairs) -> Tensor:
        """One direction of the slot loss."""
        if self.slot_loss == "reg":
            return losses.slot_regression(student.slots, teacher.slots, self.predictor, pairs)
        return losses.slot_contrast(
            student.slots, teacher.slots, self.predictor, pairs, self.temp_slot
        )

    def image_term(self, student: tuple[View, View], teacher: tuple[View, View]) -> Tensor:
        """Both directions of the image-level objective, on global average pools of the backbone
        map.
        """
        pooled = [reduce(view.features, "b c h w -> b c", "mean") for view in student]
        predictions = [self.image_predictor(self.image_projector(x)) for x in pooled]
        with torch.no_grad():
            targets = [
                self.image_teacher(reduce(view.features, "b c h w -> b c", "mean"))
                for view in teacher
            ]
        return losses.image_contrast(predictions[0], targets[1]) + losses.image_contrast(
            predictions[1], targets[0]
        )

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
