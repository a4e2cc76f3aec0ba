"""comparisons/slot_attention.py: competing slots, queries that do not compete, the decoder."""

import itertools
import math
from types import SimpleNamespace

import torch

from comparisons import build
from comparisons.slot_attention import (
    DIM,
    WAVES,
    IndependentQueries,
    PositionEmbedding,
    SlotAttention,
    SpatialBroadcastDecoder,
)
from trained import random

B, K, D, N, H, W = 3, 5, 7, 8, 4, 6


def layer_norm(x, norm):
    return (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt() * norm.weight + norm.bias


def test_slot_attention_is_its_published_algorithm():
    """Algorithm 1 of Locatello et al., 2020, image by image and slot by slot."""
    module = SlotAttention(D, K, iterations=2, dim_hidden=9).double()
    for i, p in enumerate(module.parameters()):
        p.data = random(*p.shape, seed=i) / 2
    pixels, start = random(B, N, D), random(B, K, D, seed=1)
    slots, history = module(pixels, start)
    assert slots.shape == (B, K, D) and [a.shape for a in history] == [(B, K, N)] * 2
    for b in range(B):
        inputs = [layer_norm(pixel, module.norm_pixels) for pixel in pixels[b]]
        state = list(start[b])
        for attention in history:
            normed = [layer_norm(slot, module.norm_slots) for slot in state]
            queries = [module.to_query.weight @ slot for slot in normed]
            keys = [module.to_key.weight @ x for x in inputs]
            logits = torch.stack([torch.stack([key @ q for key in keys]) for q in queries])
            shares = (logits / math.sqrt(D)).exp()
            shares = shares / shares.sum(0)
            assert torch.allclose(attention[b], shares, rtol=1e-8)
            for k in range(K):
                weights = (shares[k] + 1e-6) / (shares[k] + 1e-6).sum()
                update = sum(a * (module.to_value.weight @ x) for a, x in zip(weights, inputs))
                moved = module.gru(update[None], state[k][None])[0]
                normed = layer_norm(moved, module.norm_mlp)
                hidden = module.mlp[0].weight @ normed + module.mlp[0].bias
                state[k] = moved + module.mlp[2].weight @ hidden.clamp(min=0) + module.mlp[2].bias
        assert torch.allclose(slots[b], torch.stack(state), rtol=1e-8)


def test_slots_have_no_names_and_start_from_noise():
    module, pixels, start = SlotAttention(D, K).double(), random(B, N, D), random(B, K, D, seed=1)
    order = torch.tensor([3, 0, 4, 1, 2])
    slots, history = module(pixels, start)
    assert (len(history), len(module.eval()(pixels, start)[1])) == (4, 8)
    module.train()
    assert torch.allclose(module(pixels, start[:, order])[0], slots[:, order], rtol=1e-9)
    assert not torch.allclose(module(pixels)[0], module(pixels)[0])


def test_independent_queries_pool_what_each_attends_to_and_do_not_notice_each_other():
    module, pixels = IndependentQueries(D, K).double(), random(B, N, D)
    slots, attention = module(pixels)
    assert slots.shape == (B, K, D) and attention.shape == (B, K, N)
    queries = (module.queries @ module.to_query.weight.T).expand(B, K, D)
    scores = queries @ (pixels @ module.to_key.weight.T).mT / math.sqrt(D)
    assert torch.allclose(attention, scores.exp() / scores.exp().sum(2, keepdim=True), rtol=1e-9)
    for b, k in itertools.product(range(B), range(K)):
        mean = sum(a * (module.to_value.weight @ x) for a, x in zip(attention[b, k], pixels[b]))
        assert torch.allclose(slots[b, k], mean, rtol=1e-9)
    module.queries.data[2] += 1
    moved = (module(pixels)[0] != slots).any(2).all(0)
    assert moved.tolist() == [False, False, True, False, False]


def test_positions_are_a_linear_function_of_products_of_cosines():
    module = PositionEmbedding(D, deviation=1).double()
    waves = torch.empty(H, W, WAVES, WAVES, dtype=torch.float64)
    for h, w, i, j in itertools.product(range(H), range(W), range(WAVES), range(WAVES)):
        down, right = math.pi * i * (h + 0.5) / H, math.pi * j * (w + 0.5) / W
        waves[h, w, i, j] = math.cos(down) * math.cos(right)
    waves = waves.flatten(2)
    scaled = waves / waves.std((0, 1), correction=0).clamp(min=0.5)
    expected = scaled @ module.project.weight.T
    assert torch.allclose(module(H, W), expected, atol=1e-4)


def test_every_slot_paints_every_place_and_a_softmax_over_slots_mixes_them():
    module, slots = SpatialBroadcastDecoder().double(), random(B, K, DIM)
    image, masks = module(slots, (H, W))
    assert image.shape == (B, 3, H * W) and masks.shape == (B, K, H * W)
    places = module.position(H, W)
    for b, h, w in itertools.product(range(B), range(H), range(W)):
        mask = module.mask(module.from_slot(slots[b]) * places[h, w])[:, 0]
        shares = mask.exp() / mask.exp().sum()
        mixture = sum(share * module.color(slot) for share, slot in zip(shares, slots[b]))
        assert torch.allclose(masks[b, :, h * W + w], shares)
        assert torch.allclose(image[b, :, h * W + w], mixture)
    some = torch.tensor([3, 0, 7])
    assert torch.allclose(module(slots, (H, W), some)[0], image[:, :, some])


def test_pixels_are_features_of_half_of_the_resolution_plus_their_position():
    encoder = build("slot_attention", SimpleNamespace()).double().encoder
    images = random(B, 3, 16, 24)
    rows = encoder.mlp(encoder.backbone(images).permute(0, 2, 3, 1))
    expected = (rows + encoder.position(8, 12)).permute(0, 3, 1, 2)
    assert expected.shape == (B, DIM, 8, 12) and torch.allclose(encoder(images), expected)
    assert encoder.position(8, 12).std() > 0.1


def test_groups_are_what_a_slot_wins_or_the_masks_of_queries_that_do_not_compete():
    for name in ("slot_attention", "independent_queries"):
        system, images = build(name, SimpleNamespace()).double().eval(), random(B, 3, 16, 24)
        torch.manual_seed(0)
        maps = system.maps(images).flatten(2)
        torch.manual_seed(0)  # slots start from noise
        masks = system.paint(images)[1]
        assert maps.shape == masks.shape == (B, 8, 8 * 12)
        assert torch.allclose(maps.sum(1), torch.ones(B, 8 * 12).double())  # over k
        assert torch.allclose(maps, masks) == (name == "independent_queries")
