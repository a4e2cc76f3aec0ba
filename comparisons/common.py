"""What the systems of this folder share: one protocol, and small parts that several of them need.

Slide: none. Paper: none. Differs: ours [U].
Read next: moco.py.

A system is built from plain values named as in the configuration. All systems share the trunk, the
views, the optimizer and the measures; what a file of this folder shows is the rest.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import reduce
from torch import Tensor, nn

from backbone import Projector, build_backbone
from grouping import GroupingNetwork
from teacher import update_teacher


class Outcome(NamedTuple):
    """What a forward gives besides the loss that is differentiated."""

    loss: Tensor  # scalar, no gradient
    memo: Any = None  # what `after_step` needs of this step


class System(nn.Module):
    """The protocol. A subclass overrides `forward` and `trunk`, the others where it has them."""

    sees = "image"  # what of a scene its trunk is shown: "image", or "flow" painted as an image
    told = ""  # what training is told besides: "", "depth", "grid", "color" or "truth"
    per_image = False  # its groups have no names: group 3 of one image is not group 3 of another
    rate = 1.0  # its learning rate, as a share of the preset's

    def forward(
        self, views: Tensor, boxes: Tensor, flipped: Tensor, told: Tensor
    ) -> tuple[Tensor, Outcome]:
        """views (b v 3 y x) normalized; boxes (b v 4), flipped (b v) as SlotCon takes them; told
        (b v m y x) in 0..1, m = 0 where training is told nothing -> this rank's loss, its
        outcome."""
        raise NotImplementedError

    @property
    def trunk(self) -> nn.Module:
        """The trained trunk, images (b 3 y x) -> (b c h w): the teacher's if there is one."""
        raise NotImplementedError

    def before_step(self, temp_teacher: float) -> None:
        """Before every step: the temperature of the teacher's assignment, where it has one."""

    def after_step(self, memo: Any, momentum: float) -> None:
        """After the optimizer's step: teacher, center, labels follow. momentum: the teacher's."""

    def maps(self, images: Tensor) -> Tensor | None:
        """images (b 3 y x) normalized -> one map per group (b k h w): the largest one owns a pixel.
        None: it makes no groups, and clusters of its trunk's features are measured instead."""
        return None


class Taught(System):
    """A system with a student and a teacher that follows it; the teacher is judged."""

    student: nn.Module
    teacher: nn.Module

    @property
    def trunk(self) -> nn.Module:
        """The teacher's."""
        return self.teacher.backbone

    def after_step(self, memo: None, momentum: float) -> None:
        """teacher <- momentum teacher + (1 - momentum) student."""
        update_teacher(self.teacher, self.student, momentum)


class Prototyped(System):
    """A system of one network with prototypes, whose groups have names."""

    network: GroupingNetwork

    @property
    def trunk(self) -> nn.Module:
        """The network's."""
        return self.network.backbone

    def maps(self, images: Tensor) -> Tensor:
        """images (b 3 y x) normalized -> similarity with the prototypes (b k h w)."""
        return self.network(images)[1]


class PixelNetwork(nn.Module):
    """Trunk and projector, without prototypes: images (b 3 y x) -> pixel embeddings (b d h w)."""

    def __init__(self, arch: str, dim_hidden: int, dim_out: int):
        super().__init__()
        self.backbone = build_backbone(arch)
        self.projector = Projector(self.backbone.out_channels, dim_hidden, dim_out)

    def forward(self, images: Tensor) -> Tensor:
        """images (b 3 y x) normalized -> (b d h w), not of length 1."""
        return self.projector(self.backbone(images))


def each_view(network: nn.Module, views: Tensor) -> list[Any]:
    """The network on one view after the other, so that each has batch statistics of its own."""
    return [network(images) for images in views.unbind(1)]  # over v


def overlapping(boxes: Tensor) -> Tensor:
    """boxes (b v 4) -> (b) bool: the two crops share a part of the scene."""
    return (boxes[:, 0, 2] > boxes[:, 0, 0]) & (boxes[:, 0, 3] > boxes[:, 0, 1])


def target_loss(similarity: Tensor, target: Tensor, temperature: float, valid: Tensor) -> Tensor:
    """Cross-entropy of the assignment against what a labeler says, over the images that overlap.

    similarity (b k h w), aligned; target: labels (b h w) in 0..k-1, or shares (b k h w) summing to
    1 over k; valid (b) bool -> scalar.
    CE = mean_bhw -sum_k target_k log softmax(similarity / temperature)_k.
    """
    entropy = F.cross_entropy(similarity / temperature, target, reduction="none")
    entropy = reduce(entropy, "b h w -> b", "mean")
    # `where`, not an index: without any overlap a zero stays connected to the graph.
    return torch.where(valid, entropy, 0 * entropy).sum() / valid.sum().clamp(min=1)
