"""Bottom up: the slots of one image compete for its pixels, and must paint the image again.

Slides: "On object discovery: the Slot Attention mechanism"; "Slot Attention works well on toy data
with reconstruction".
Papers: Locatello et al., NeurIPS 2020, sections 2 and 3.1; Watters et al., 2019, for the decoder.
Differs, so that minutes teach something: three 3x3 convolutions at half the resolution, not four
5x5 at all of it; positions are cosines, not a linear function, and are added behind the MLP; a slot
paints one color under one mask; the decoder multiplies slot and position, where the paper adds
them, and has 1x1 convolutions, so that a step can paint a few random places only; all projections
start as the identity, so that slots start as soft k-means. Groups are what each slot wins in the
last round; the paper takes the decoder's masks, which are smooth here. Without names, mIoU and NMI
are measured on clusters of the backbone's features.
"""

import math
from types import MappingProxyType

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from comparisons.common import Step, System
from slots import EPSILON

NUM_SLOTS = 8  # [U] up to seven objects, and what is behind them
DIM, CHANNELS = 64, 32  # [U] d of pixels and slots; of the convolutions
WAVES = 6  # [U] cosines along each side: the shortest has half a period in a sixth of the side
PLACES = 64  # [U] places that a training step paints, of the 1,024 of half the resolution


class SlotAttention(nn.Module):
    """Slots compete for the pixels of one image, in several rounds (Locatello et al., 2020).

    dim: d of pixels and slots; num_slots: k; iterations: in training, afterwards twice as many [U].
    Unlike prototypes, slots start from noise in every image, so that slot 3 of two images has
    nothing in common.
    """

    def __init__(self, dim: int, num_slots: int, iterations: int = 4, dim_hidden: int = 128):
        super().__init__()
        self.num_slots, self.iterations = num_slots, iterations
        self.mean, self.log_std = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.norm_pixels, self.norm_slots, self.norm_mlp = (nn.LayerNorm(dim) for _ in range(3))
        self.to_query, self.to_key, self.to_value = projections(dim)
        self.gru = nn.GRUCell(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, dim_hidden), nn.ReLU(), nn.Linear(dim_hidden, dim))
        self.start_as_kmeans()

    @torch.no_grad()
    def start_as_kmeans(self) -> None:
        """At first a slot becomes, nearly, the mean of what it wins [U]."""
        # The rows of a GRU's matrices are: reset, update, new.
        nn.init.eye_(self.gru.weight_ih.chunk(3)[2])
        self.gru.weight_hh.chunk(3)[2].zero_()
        self.gru.bias_ih.chunk(3)[1].fill_(-2)  # seven eighths are new
        self.mlp[-1].weight.mul_(0.01)
        self.to_query.weight.mul_(3)

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
        for _ in range(self.iterations if self.training else 2 * self.iterations):
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
    """To queries, keys and values; they start as the identity [U]: like attracts like."""
    layers = [nn.Linear(dim, dim, bias=False) for _ in range(3)]
    for layer in layers:
        nn.init.eye_(layer.weight)
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


def he(layer: nn.Module) -> nn.Module:
    """A layer that starts with He's weights and without bias."""
    nn.init.kaiming_normal_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class PositionEmbedding(nn.Module):
    """A linear function of products of cosines, low frequencies of a grid's rows and columns."""

    def __init__(self, dim: int, deviation: float):
        super().__init__()
        self.project = nn.Linear(WAVES**2, dim, bias=False)
        nn.init.normal_(self.project.weight, std=deviation / WAVES)

    def forward(self, h: int, w: int) -> Tensor:
        """-> the position of every cell (h w d).

        cosines_ij = cos(pi i v) cos(pi j u) / deviation, v and u in 0..1 from border to border
        """
        frequencies = torch.arange(WAVES) * math.pi
        down, right = (
            torch.cos((torch.arange(n)[:, None] + 0.5) / n * frequencies) for n in (h, w)
        )
        waves = rearrange(einsum(down, right, "h i, w j -> h w i j"), "h w i j -> h w (i j)")
        waves = waves / waves.std(dim=(0, 1), correction=0).clamp(min=0.5)  # one is constant
        return self.project(waves.to(self.project.weight))


class PixelEncoder(nn.Module):
    """Backbone, an MLP of every pixel, and position: images (b 3 y x) -> (b d h w)."""

    def __init__(self, backbone: nn.Module, channels: int):
        super().__init__()
        self.backbone, self.position = backbone, PositionEmbedding(DIM, deviation=0.6)
        layers = he(nn.Linear(channels, DIM)), nn.ReLU(), he(nn.Linear(DIM, DIM))
        self.mlp = nn.Sequential(nn.LayerNorm(channels), *layers)

    def forward(self, images: Tensor) -> Tensor:
        """images (b 3 y x) normalized -> (b d h w)."""
        rows = self.mlp(rearrange(self.backbone(images), "b c h w -> b h w c"))
        return rearrange(rows + self.position(*rows.shape[1:3]), "b h w d -> b d h w")


class SpatialBroadcastDecoder(nn.Module):
    """Slots paint an image together: the decoder that reconstructs (after Watters et al., 2019).

    Each slot is repeated at every place, is multiplied with the place's position, and becomes, by
    the same 1x1 convolutions, a mask. The masks compete: a softmax over slots. Each slot has one
    color.
    """

    def __init__(self) -> None:
        super().__init__()
        self.from_slot, self.position = he(nn.Linear(DIM, DIM)), PositionEmbedding(DIM, deviation=1)
        self.mask = nn.Sequential(he(nn.Linear(DIM, DIM)), nn.ReLU(), nn.Linear(DIM, 1))
        self.color = nn.Linear(DIM, 3)

    def forward(
        self, slots: Tensor, grid: tuple[int, int], some: Tensor | slice = slice(None)
    ) -> tuple[Tensor, Tensor]:
        """slots (b k d), grid h w, some of its h w places -> image (b 3 n), masks (b k n), which
        sum to 1 over k.

        image = sum_k mask_k color_k
        """
        places = rearrange(self.position(*grid), "h w d -> (h w) d")[some]
        placed = rearrange(self.from_slot(slots), "b k d -> b k 1 d") * places
        masks = rearrange(self.mask(placed), "b k n 1 -> b k n").softmax(dim=1)  # over k
        return einsum(masks, self.color(slots), "b k n, b k c -> b c n"), masks


def plain_backbone() -> nn.Sequential:
    """Three 3x3 convolutions without norm, of images of half the size: output stride 2."""
    layers: list[nn.Module] = [nn.AvgPool2d(2)]
    for channels in (3, CHANNELS, CHANNELS):
        layers += [he(nn.Conv2d(channels, CHANNELS, 3, padding=1)), nn.ReLU()]
    return nn.Sequential(*layers)


class Reconstruction(System):
    """Encoder, slots, decoder; its sizes are those of this file."""

    whole, per_image, judged = True, True, "encoder"
    times_scenes, clip_norm = 4, 1.0
    changes = MappingProxyType(dict(batch_size=16, base_lr=0.048, weight_decay=0.0, warmup=100))

    def __init__(self) -> None:
        super().__init__()
        self.encoder = PixelEncoder(plain_backbone(), CHANNELS)
        self.slots = self.make_slots()
        self.decoder = SpatialBroadcastDecoder()

    def make_slots(self) -> nn.Module:
        """The module that turns pixels (b n d) into slots (b k d)."""
        return SlotAttention(DIM, NUM_SLOTS)

    def forward(self, views: Tensor, boxes: Tensor, flipped: Tensor, extra: Tensor) -> Step:
        """L = mean squared error at random places of the scene at half its size.

        views (b 1 3 y x): whole scenes.
        """
        target = rearrange(F.avg_pool2d(views[:, 0], 2), "b rgb y x -> b rgb (y x)")
        some = torch.randperm(target.shape[2], device=target.device)[:PLACES]
        painted, _ = self.paint(views[:, 0], some)
        return F.mse_loss(painted, target[:, :, some]), None

    def paint(self, images: Tensor, some: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor]:
        """images (b 3 y x) -> painted (b 3 n), masks (b k n) summing to 1 over k.

        some: which of the y/2 x/2 places are painted.
        """
        slots, _ = self.slots(rearrange(self.encoder(images), "b d h w -> b (h w) d"))
        return self.decoder(slots, (images.shape[2] // 2, images.shape[3] // 2), some)

    def maps(self, images: Tensor) -> Tensor:
        """images (b 3 y x) normalized -> the attention of the last round (b k y/2 x/2)."""
        _, history = self.slots(rearrange(self.encoder(images), "b d h w -> b (h w) d"))
        return rearrange(history[-1], "b k (y x) -> b k y x", y=images.shape[2] // 2)
