"""Slots that compete for an image's pixels, queries that do not, the decoder that reconstructs.

Slides: "On object discovery: the Slot Attention mechanism", "Slot Attention works well on toy data
with reconstruction".
Papers: Locatello et al., NeurIPS 2020, section 2; Watters et al., 2019, for the decoder.
Differs: nothing known in the attention; the decoder has three 3x3 convolutions where Locatello et
al. have four 5x5 and enlarge, and paints at the size of its grid. Not part of SlotCon.
Read next: losses.py, where the path goes on.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from torch import Tensor, nn

from slots import EPSILON


class SlotAttention(nn.Module):
    """Slots compete for the pixels of one image, over and over (Locatello et al., 2020).

    dim: d of pixels and slots; num_slots: k; iterations: rounds of attention. Unlike prototypes,
    slots start from noise in every image, so that slot 3 of two images has nothing in common.
    """

    def __init__(self, dim: int, num_slots: int, iterations: int = 3, dim_hidden: int = 128):
        super().__init__()
        self.num_slots, self.iterations = num_slots, iterations
        self.mean, self.log_std = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.norm_pixels, self.norm_slots, self.norm_mlp = (nn.LayerNorm(dim) for _ in range(3))
        self.to_query, self.to_key, self.to_value = projections(dim)
        self.gru = nn.GRUCell(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, dim_hidden), nn.ReLU(), nn.Linear(dim_hidden, dim))

    def forward(self, pixels: Tensor, start: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """pixels (b n d); start (b k d) or None for noise -> slots (b k d), attention (b k n) of
        every iteration.

        Each attention sums to 1 over k: a pixel that one slot takes is lost to the others.
        """
        pixels = self.norm_pixels(pixels)
        keys, values = self.to_key(pixels), self.to_value(pixels)
        if start is None:
            noise = torch.randn(len(pixels), self.num_slots, pixels.shape[-1], device=pixels.device)
            start = self.mean + self.log_std.exp() * noise
        slots, history = start, []
        for _ in range(self.iterations):
            queries = self.to_query(self.norm_slots(slots))
            attention = query_attention(queries, keys, compete=True)
            history.append(attention)
            update = weighted_mean(attention, values)
            state = self.gru(*(rearrange(x, "b k d -> (b k) d") for x in (update, slots)))
            slots = rearrange(state, "(b k) d -> b k d", k=slots.shape[1])
            slots = slots + self.mlp(self.norm_mlp(slots))
        return slots, history


class IndependentQueries(nn.Module):
    """Queries of a Transformer decoder: none knows of the others, so pixels may stay unowned.

    dim: d; num_slots: k learnt queries. One layer of cross-attention, without self-attention.
    """

    def __init__(self, dim: int, num_slots: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(num_slots, dim))
        self.to_query, self.to_key, self.to_value = projections(dim)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """pixels (b n d) -> slots (b k d), attention (b k n), which sums to 1 over n."""
        queries = self.to_query(self.queries).expand(len(pixels), -1, -1)
        attention = query_attention(queries, self.to_key(pixels), compete=False)
        return einsum(attention, self.to_value(pixels), "b k n, b n d -> b k d"), attention


def projections(dim: int) -> list[nn.Linear]:
    """To queries, keys and values. Glorot's initialization [O]: with torch's own, the first logits
    are a third as large, attention is nearly uniform, and slots take longer to part.
    """
    layers = [nn.Linear(dim, dim, bias=False) for _ in range(3)]
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight)
    return layers


def query_attention(
    queries: Tensor, keys: Tensor, compete: bool, temperature: float = 1.0
) -> Tensor:
    """The whole difference between the two slides is one `dim=`.

    queries (b k d), keys (b n d) -> (b k n): softmax of <q, k> / (sqrt(d) temperature) over k where
    the queries compete for pixels (Slot Attention), over n where each query is on its own
    (Transformer decoder).
    """
    scale = queries.shape[-1] ** 0.5 * temperature
    logits = einsum(queries, keys, "b k d, b n d -> b k n") / scale
    return logits.softmax(dim=1 if compete else 2)  # over k, or over n


def weighted_mean(attention: Tensor, values: Tensor) -> Tensor:
    """attention (b k n) >= 0, values (b n d) -> (b k d): the mean of the pixels that a slot won."""
    attention = F.normalize(attention + EPSILON, p=1, dim=2)  # over n
    return einsum(attention, values, "b k n, b n d -> b k d")


class PositionEmbedding(nn.Module):
    """Adds to every cell a linear function of its distances from the four borders [O]."""

    def __init__(self, channels: int):
        super().__init__()
        self.project = nn.Linear(4, channels)

    def forward(self, maps: Tensor) -> Tensor:
        """maps (b c h w) -> (b c h w); distances run from 0 to 1 between the outermost cells."""
        h, w = maps.shape[-2:]
        down = torch.linspace(0, 1, h, device=maps.device, dtype=maps.dtype)
        right = torch.linspace(0, 1, w, device=maps.device, dtype=maps.dtype)
        v, u = torch.meshgrid(down, right, indexing="ij")
        position = self.project(torch.stack([v, u, 1 - v, 1 - u], dim=-1))
        return maps + rearrange(position, "h w c -> c h w")


class SpatialBroadcastDecoder(nn.Module):
    """Slots paint an image together: the decoder that reconstructs (Watters et al., 2019).

    Each slot is repeated in every cell of a grid, is told where each cell is, and becomes, by the
    same convolutions, an image and a mask. The masks compete: a softmax over slots.
    dim: d of the slots; channels: of the image; width: of the convolutions.
    """

    def __init__(self, dim: int, channels: int, width: int = 32):
        super().__init__()
        self.position = PositionEmbedding(dim)
        self.paint = nn.Sequential(
            nn.Conv2d(dim, width, 3, padding=1, padding_mode="replicate"),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, padding_mode="replicate"),
            nn.ReLU(),
            nn.Conv2d(width, channels + 1, 3, padding=1, padding_mode="replicate"),
        )

    def forward(self, slots: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """slots (b k d), grid h w -> image (b c h w) and masks (b k h w), which sum to 1 over k.

        image = sum_k mask_k image_k.
        """
        cells = repeat(slots, "b k d -> (b k) d h w", h=grid[0], w=grid[1])
        painted = self.paint(self.position(cells))
        painted = rearrange(painted, "(b k) c h w -> b k c h w", k=slots.shape[1])
        masks = painted[:, :, -1].softmax(dim=1)  # over k
        return einsum(masks, painted[:, :, :-1], "b k h w, b k c h w -> b c h w"), masks
