"""Bottom up: the slots of one image compete for its pixels, and must paint the image again.

Slides: "On object discovery: the Slot Attention mechanism"; "Slot Attention works well on toy data
with reconstruction". Paper: Locatello et al., NeurIPS 2020, sections 2 and 3.1.
Differs: our trunk instead of four 5x5 convolutions at full resolution; the decoder paints one
view per image, at the size of the trunk's map, so that a step is not ten times as long as others;
the image is painted as the trunk sees it, with jittered colors. Groups are the decoder's masks, as
in the paper; they have no names, so mIoU and NMI are measured on clusters of the trunk's features.
Read next: independent_queries.py.
"""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from backbone import build_backbone
from comparisons.common import Outcome, System
from slot_attention import PositionEmbedding, SlotAttention, SpatialBroadcastDecoder

NUM_SLOTS = 8  # [U] up to seven objects, and what is behind them


class PixelEncoder(nn.Module):
    """Trunk, position, and an MLP of every pixel: images (b 3 y x) -> (b d h w)."""

    def __init__(self, arch: str, dim_hidden: int, dim_out: int):
        super().__init__()
        self.backbone = build_backbone(arch)
        c = self.backbone.out_channels
        self.position = PositionEmbedding(c)
        self.mlp = nn.Sequential(
            nn.LayerNorm(c), nn.Linear(c, dim_hidden), nn.ReLU(), nn.Linear(dim_hidden, dim_out)
        )

    def forward(self, images: Tensor) -> Tensor:
        """images (b 3 y x) normalized -> (b d h w)."""
        features = self.position(self.backbone(images))
        rows = self.mlp(rearrange(features, "b c h w -> b h w c"))
        return rearrange(rows, "b h w d -> b d h w")


class Reconstruction(System):
    """Encoder, slots, decoder.

    arch, dim_hidden, dim_out (d): sizes of the networks.
    """

    per_image = True
    rate = 0.1  # the paper's rate is 0.0004; at the preset's own the recurrent unit diverges
    channels = 3  # of what is painted

    def __init__(self, arch: str, dim_hidden: int, dim_out: int):
        super().__init__()
        self.encoder = PixelEncoder(arch, dim_hidden, dim_out)
        self.slots = self.make_slots(dim_out)
        self.decoder = SpatialBroadcastDecoder(dim_out, self.channels)

    def make_slots(self, dim: int) -> nn.Module:
        """What turns pixels (b n d) into slots (b k d)."""
        return SlotAttention(dim, NUM_SLOTS)

    def target(self, view: Tensor, told: Tensor) -> Tensor:
        """What is to be painted of a view: view (b 3 y x), told (b m y x) -> (b channels y x)."""
        return view

    def forward(
        self, views: Tensor, boxes: Tensor, flipped: Tensor, told: Tensor
    ) -> tuple[Tensor, Outcome]:
        """L = mean squared error of the painted first view, at the size of the map."""
        painted, _ = self.paint(views[:, 0])
        target = F.adaptive_avg_pool2d(self.target(views[:, 0], told[:, 0]), painted.shape[-2:])
        loss = F.mse_loss(painted, target)
        return loss, Outcome(loss.detach())

    def paint(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (b 3 y x) -> painted (b channels h w), masks (b k h w) summing to 1 over k."""
        pixels = self.encoder(images)
        slots, _ = self.slots(rearrange(pixels, "b d h w -> b (h w) d"))
        return self.decoder(slots, pixels.shape[-2:])

    @property
    def trunk(self) -> nn.Module:
        """The encoder's."""
        return self.encoder.backbone

    def maps(self, images: Tensor) -> Tensor:
        """images (b 3 y x) normalized -> the decoder's masks (b k h w)."""
        return self.paint(images)[1]
