"""Bottom up: the slots of one image compete for its pixels, and must paint the image again.

Slides: "On object discovery: the Slot Attention mechanism"; "Slot Attention works well on toy data
with reconstruction".
Papers: Locatello et al., NeurIPS 2020, sections 2 and 3.1; Watters et al., 2019, for the decoder.
Differs: our backbone instead of four 5x5 convolutions at full resolution; the decoder has three 3x3
convolutions, not four 5x5 that enlarge, and paints one view per image, with jittered colors, at the
size of the backbone's map: a step takes a tenth of the time. Groups are the decoder's masks, as in
the paper; without names, mIoU and NMI are measured on clusters of the backbone's features.
"""

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, repeat
from torch import Tensor, nn

from backbone import build_backbone
from comparisons.common import Step, System
from slots import EPSILON

NUM_SLOTS = 8  # [U] up to seven objects, and what is behind them


class SlotAttention(nn.Module):
    """Slots compete for the pixels of one image, in several rounds (Locatello et al., 2020).

    dim: d of pixels and slots; num_slots: k. Unlike prototypes, slots start from noise in every
    image, so that slot 3 of two images has nothing in common.
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
    """k queries of a Transformer decoder: none knows of the others, so pixels may stay unowned."""

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
    """To queries, keys and values, with Glorot's weights [O]: torch's own are a third as large."""
    layers = [nn.Linear(dim, dim, bias=False) for _ in range(3)]
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight)
    return layers


def query_attention(
    queries: Tensor, keys: Tensor, compete: bool, temperature: float = 1.0
) -> Tensor:
    """The whole difference between the two slides is one `dim=`.

    attention = softmax(<q, k> / (sqrt(d) temperature))

    queries (b k d), keys (b n d) -> (b k n): the softmax is over k where the queries compete for
    pixels (Slot Attention), over n where they do not (Transformer decoder).
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
        down, right = (torch.linspace(0, 1, n, dtype=maps.dtype).to(maps) for n in (h, w))
        v, u = torch.meshgrid(down, right, indexing="ij")
        position = self.project(torch.stack([v, u, 1 - v, 1 - u], dim=-1))
        return maps + rearrange(position, "h w c -> c h w")


class SpatialBroadcastDecoder(nn.Module):
    """Slots paint an image together: the decoder that reconstructs (Watters et al., 2019).

    Each slot is repeated in every cell of a grid, gets the cell's position added, and becomes, by
    the same convolutions, an image and a mask. The masks compete: a softmax over slots.
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

        image = sum_k mask_k image_k
        """
        cells = repeat(slots, "b k d -> (b k) d h w", h=grid[0], w=grid[1])
        painted = self.paint(self.position(cells))
        painted = rearrange(painted, "(b k) c h w -> b k c h w", k=slots.shape[1])
        masks = painted[:, :, -1].softmax(dim=1)  # over k
        return einsum(masks, painted[:, :, :-1], "b k h w, b k c h w -> b c h w"), masks


class PixelEncoder(nn.Module):
    """Backbone, position, and an MLP of every pixel: images (b 3 y x) -> (b d h w)."""

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
    """Encoder, slots, decoder. arch, dim_hidden, dim_out (d): sizes of the networks."""

    per_image = True
    rate = 0.1  # the paper's rate is 0.0004; at the preset's own the recurrent unit diverges
    judged = "encoder"
    channels = 3  # of the painted image

    def __init__(self, arch: str, dim_hidden: int, dim_out: int):
        super().__init__()
        self.encoder = PixelEncoder(arch, dim_hidden, dim_out)
        self.slots = self.make_slots(dim_out)
        self.decoder = SpatialBroadcastDecoder(dim_out, self.channels)

    def make_slots(self, dim: int) -> nn.Module:
        """The module that turns pixels (b n d) into slots (b k d)."""
        return SlotAttention(dim, NUM_SLOTS)

    def forward(self, views: Tensor, boxes: Tensor, flipped: Tensor, extra: Tensor) -> Step:
        """L = mean squared error of the painted first view, or extra input, at the map's size."""
        painted, _ = self.paint(views[:, 0])
        target = extra[:, 0] if self.extra else views[:, 0]
        target = F.adaptive_avg_pool2d(target, painted.shape[-2:])
        return F.mse_loss(painted, target), None

    def paint(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """images (b 3 y x) -> painted (b channels h w), masks (b k h w) summing to 1 over k."""
        pixels = self.encoder(images)
        slots, _ = self.slots(rearrange(pixels, "b d h w -> b (h w) d"))
        return self.decoder(slots, pixels.shape[-2:])

    def maps(self, images: Tensor) -> Tensor:
        """images (b 3 y x) normalized -> the decoder's masks (b k h w)."""
        return self.paint(images)[1]
