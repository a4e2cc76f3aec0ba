"""What the systems of this folder share: one interface, and small parts that several of them need.

A system is built from values named as in the configuration. All systems share the measures; and
the backbone, the views and the optimizer, where its file does not state others.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from einops import reduce
from torch import Tensor, nn

from backbone import Projector, build_backbone
from grouping import GroupingNetwork, inverse_augmentation
from slots import SlotPredictor
from teacher import make_teacher, update_teacher

Step = tuple[Tensor, Any]  # the loss, and what `after_step` needs of the step


class System(nn.Module):
    """The interface. A subclass overrides `forward` and `judged`, and the others where needed."""

    sees = "image"  # input of its backbone: "image"; "flow" or "depth", painted as an image
    extra = ""  # input of its training only: "", "grid", "color" or "truth"
    per_image = False  # its groups have no names: group 3 of one image is not group 3 of another
    whole = False  # its views: one whole scene, as it is; otherwise two jittered crops
    # What its paper and the preset do not share, as values of the configuration
    changes: Mapping[str, Any] = MappingProxyType({})
    times_scenes = 1  # it learns from so many times the preset's number of scenes
    clip_norm = 0.0  # the gradient's norm is clipped to it; 0: not clipped
    wraps: type[nn.Module] | None = None  # a class that gets its other arguments
    judged = ""  # the part whose backbone is measured: the teacher if there is one

    def forward(self, views: Tensor, boxes: Tensor, flipped: Tensor, extra: Tensor) -> Step:
        """views (b v 3 y x) normalized; boxes (b v 4), flipped (b v) as SlotCon takes them; extra
        (b v m y x) in 0..1, m = 0 for a system without. v is 1 for a system of whole scenes.
        """
        raise NotImplementedError

    @property
    def backbone(self) -> nn.Module:
        """The trained backbone, images (b 3 y x) -> (b c h w)."""
        return self.get_submodule(f"{self.judged}.backbone")

    def after_step(self, memo: Any, momentum: float) -> None:
        """After the optimizer's step: teacher, center, labels follow. momentum: the teacher's."""

    def maps(self, images: Tensor) -> Tensor | None:
        """images (b 3 y x) normalized -> one map per group (b k h w); None: it makes no groups."""
        return None


class StudentTeacher(System):
    """Student, predictor, and a teacher that follows the student; temp_slot: of the contrast."""

    judged = "teacher"
    make_student: type[nn.Module]  # a subclass's, from the three sizes

    def __init__(self, arch: str, dim_hidden: int, dim_out: int, temp_slot: float = 0.2):
        super().__init__()
        self.student = self.make_student(arch, dim_hidden, dim_out)
        self.predictor = self.make_predictor(dim_out, dim_hidden)
        self.teacher = make_teacher(self.student)
        self.temp_slot = temp_slot

    def make_predictor(self, dim: int, dim_hidden: int) -> nn.Module:
        """Of the student alone: rows (n d) -> (n d)."""
        return SlotPredictor(dim, dim, dim_hidden)

    def after_step(self, memo: None, momentum: float) -> None:
        """The teacher follows."""
        update_teacher(self.teacher, self.student, momentum)


class Prototyped(System):
    """A system of one network with k prototypes, whose groups have names."""

    judged = "network"

    def __init__(
        self, arch: str, num_prototypes: int, dim_hidden: int, dim_out: int, temp_student: float
    ):
        super().__init__()
        self.network = GroupingNetwork(arch, num_prototypes, dim_hidden, dim_out)
        self.temp_student = temp_student

    def maps(self, images: Tensor) -> Tensor:
        """images (b 3 y x) normalized -> similarity with the prototypes (b k h w)."""
        return self.network(images)[1]


class PixelNetwork(nn.Module):
    """Backbone and projector: images (b 3 y x) -> pixel embeddings (b d h w)."""

    def __init__(self, arch: str, dim_hidden: int, dim_out: int):
        super().__init__()
        self.backbone = build_backbone(arch)
        self.projector = Projector(self.backbone.out_channels, dim_hidden, dim_out)

    def forward(self, images: Tensor) -> Tensor:
        """images (b 3 y x) normalized -> (b d h w), not of length 1."""
        return self.projector(self.backbone(images))


def each_view(network: nn.Module, views: Tensor) -> list[Any]:
    """The network on one view after the other: each view has batch statistics of its own."""
    return [network(images) for images in views.unbind(1)]  # over v


def align(maps: list[Tensor], boxes: Tensor, flipped: Tensor) -> list[Tensor]:
    """Maps (b c h w) of both views -> the same, cut to what both views show and not mirrored."""
    return [inverse_augmentation(maps[i], boxes[:, i], flipped[:, i]) for i in (0, 1)]


def target_loss(similarity: Tensor, target: Tensor, temperature: float, valid: Tensor) -> Tensor:
    """Cross-entropy of the assignment against given targets, over the images that overlap.

    CE = mean_bhw -sum_k target_k log softmax(similarity / temperature)_k

    similarity (b k h w), aligned; target: labels (b h w) in 0..k-1, or shares (b k h w) summing to
    1 over k; valid (b) bool -> scalar.
    """
    loss = F.cross_entropy(similarity / temperature, target, reduction="none")
    loss = reduce(loss, "b h w -> b", "mean")
    # `where`, not an index: without any overlap a zero stays connected to the graph.
    return torch.where(valid, loss, 0 * loss).sum() / valid.sum().clamp(min=1)
