"""The way that the talk gave up: slots of each view alone, matched between the views, contrasted.

Slide: "And..., what about real-world images?" ("Matching the slots [of] two views is hard").
Paper: none; the talk's own attempt before SlotCon was never published.
Differs: everything is our reading of one slide [U]: Slot Attention per view, a momentum teacher for
the other view, the Hungarian method on cosines, and SlotCon's contrast of the matched slots, with
all other slots of the batch as negatives. Groups are the attention of the teacher's last iteration.
"""

from types import MappingProxyType

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from backbone import build_backbone
from comparisons.common import Step, StudentTeacher, each_view
from comparisons.slot_attention import DIM, NUM_SLOTS, PixelEncoder, SlotAttention
from losses import contrast_in_parts, unit


class SlotNetwork(nn.Module):
    """Encoder and Slot Attention: images (b 3 y x) -> slots (b k d), last attention (b k h w)."""

    def __init__(self, arch: str, dim_hidden: int, dim: int):
        super().__init__()
        backbone = build_backbone(arch)
        self.encoder = PixelEncoder(backbone, backbone.out_channels)
        self.slots = SlotAttention(dim, NUM_SLOTS, dim_hidden=dim_hidden)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (b 3 y x) normalized -> slots, and which share of each cell each slot won."""
        pixels = self.encoder(images)
        slots, history = self.slots(rearrange(pixels, "b d h w -> b (h w) d"))
        return slots, rearrange(history[-1], "b k (h w) -> b k h w", h=pixels.shape[2])


@torch.no_grad()
def match_slots(slots: Tensor, others: Tensor) -> Tensor:
    """Pair the slots of two views of each image: the sum of their cosines is the largest possible.

    slots (b k d), others (b n d), n = k -> (b k): the one of `others` that belongs to each slot.
    """
    directions = [F.normalize(x, dim=2) for x in (slots, others)]  # over d
    cosines = einsum(*directions, "b k d, b n d -> b k n")
    columns = [linear_sum_assignment(each, maximize=True)[1] for each in cosines.cpu().numpy()]
    return torch.stack([torch.from_numpy(each) for each in columns]).to(slots.device)


def matched_contrast(
    prediction: Tensor, target: Tensor, matching: Tensor, temperature: float
) -> Tensor:
    """Every slot finds its partner among the slots of all images.

    CE = mean_bk -log softmax_m(<q_bk, t_m> / temperature)_partner, times 2 temperature

    prediction, target (b k d); matching (b k), as `match_slots` gives it -> scalar, one direction.
    """
    b, k, _ = prediction.shape
    rows, keys = (unit(rearrange(x, "b k d -> (b k) d")) for x in (prediction, target.detach()))
    first = torch.arange(b, device=matching.device)[:, None] * k
    partners = rearrange(matching + first, "b k -> (b k)")
    return 2 * temperature * contrast_in_parts(rows, partners, keys, temperature) / (b * k)


class SlotMatching(StudentTeacher):
    """Student, teacher and predictor of slots that have no names."""

    make_student = SlotNetwork
    judged = "teacher.encoder"
    per_image = True
    changes = MappingProxyType(dict(base_lr=0.016))  # a tenth of the preset's: slots diverge sooner

    def __init__(self, arch: str, dim_hidden: int, temp_slot: float = 0.2):
        super().__init__(arch, dim_hidden, DIM, temp_slot)

    def forward(self, views: Tensor, boxes: Tensor, flipped: Tensor, extra: Tensor) -> Step:
        """L = contrast(q1, t2) + contrast(q2, t1); s, not q = predictor(s), is matched with t."""
        (s1, _), (s2, _) = each_view(self.student, views)
        with torch.no_grad():
            (t1, _), (t2, _) = each_view(self.teacher, views)
        return self.direction(s1, t2) + self.direction(s2, t1), None

    def direction(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Slots (b k d) of the student's view and of the teacher's other view -> scalar."""
        rows = self.predictor(rearrange(student, "b k d -> (b k) d"))
        prediction = rearrange(rows, "(b k) d -> b k d", k=student.shape[1])
        return matched_contrast(prediction, teacher, match_slots(student, teacher), self.temp_slot)

    def maps(self, images: Tensor) -> Tensor:
        """images (b 3 y x) normalized -> the teacher's last attention (b k h w)."""
        return self.teacher(images)[1]
