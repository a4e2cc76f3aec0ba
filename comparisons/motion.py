"""Motion as the cue: slots that must paint the optical flow find what moves as one.

Slide: "And also on real-world data if motion or depth is available".
Paper: "Self-Supervised Video Object Segmentation by Motion Grouping", Yang et al., ICCV 2021.
Differs: the true flow of toy.py's frame pairs instead of an estimated one; more slots than two, and
no consistency between several flows of one frame. As in the paper the backbone sees the flow and
never the image: a single image does not say how things will move. So its features know shapes and
motion only, and the probe reads classes from them. Scenes that lie in another way keep the flow's
colors, which only have to differ from object to object.
"""

import torch
from einops import rearrange
from torch import Tensor

from comparisons.slot_attention import Reconstruction

SPEED = 4  # px, the most that camera and objects move by between two frames


class Motion(Reconstruction):
    """slot_attention.py on flow, painted as an image by `flow_image`."""

    sees = "flow"


def flow_image(flow: Tensor) -> Tensor:
    """flow (n y x 2) in px, up to SPEED -> (n 3 y x) uint8: x, y, and nothing, around 128."""
    painted = 128 + flow * (127 // SPEED)
    still = torch.full_like(painted[..., :1], 128)
    return rearrange(torch.cat([painted, still], dim=-1), "n y x c -> n c y x").byte()
