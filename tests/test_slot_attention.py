"""comparisons/slot_attention.py: slots that compete for pixels, queries that do not, the decoder.

Promised: slots compete over k, independent queries attend over n; Slot Attention is its paper's
algorithm; the decoder's masks share out every pixel, and it paints the mixture of all slots' images.
"""

import itertools
import math

import pytest
import torch
from torch import nn

from comparisons.slot_attention import (
    IndependentQueries,
    PositionEmbedding,
    SlotAttention,
    SpatialBroadcastDecoder,
    query_attention,
    weighted_mean,
)

B, K, D, N, C, H, W = 3, 5, 7, 8, 2, 4, 6


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("compete", [True, False])
def test_competing_queries_share_each_pixel_and_independent_ones_attend_alone(compete):
    queries, keys = random(B, K, D), random(B, N, D, seed=1)
    found = query_attention(queries, keys, compete, temperature=0.5)
    assert found.shape == (B, K, N)
    for b, k, n in itertools.product(range(B), range(K), range(N)):

        def weight(k, n, b=b):
            return math.exp((queries[b, k] @ keys[b, n]).item() / (math.sqrt(D) * 0.5))

        rivals = [weight(j, n) for j in range(K)] if compete else [weight(k, j) for j in range(N)]
        assert found[b, k, n].item() == pytest.approx(weight(k, n) / sum(rivals), rel=1e-9)


def test_a_weighted_mean_is_the_mean_of_the_pixels_that_a_slot_won():
    attention, values = random(B, K, N).softmax(1), random(B, N, D, seed=1)
    found = weighted_mean(attention, values)
    for b, k in itertools.product(range(B), range(K)):
        weights = [attention[b, k, n].item() + 1e-6 for n in range(N)]
        expected = sum(weight * values[b, n] for n, weight in enumerate(weights)) / sum(weights)
        assert torch.allclose(found[b, k], expected, rtol=1e-9)
    nothing_won = weighted_mean(torch.zeros(B, K, N), values.float())
    assert torch.allclose(nothing_won, values.float().mean(1)[:, None])


def layer_norm(x):
    return (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()


def slow_gru(gru, x, state):
    """Cho et al., 2014: reset, update and candidate, in torch's order."""
    wi, wh = gru.weight_ih.chunk(3), gru.weight_hh.chunk(3)
    bi, bh = gru.bias_ih.chunk(3), gru.bias_hh.chunk(3)
    r = torch.sigmoid(wi[0] @ x + bi[0] + wh[0] @ state + bh[0])
    z = torch.sigmoid(wi[1] @ x + bi[1] + wh[1] @ state + bh[1])
    candidate = torch.tanh(wi[2] @ x + bi[2] + r * (wh[2] @ state + bh[2]))
    return (1 - z) * candidate + z * state


def test_slot_attention_is_its_published_algorithm():
    """Algorithm 1 of Locatello et al., 2020, image by image and slot by slot."""
    module = SlotAttention(D, K, iterations=2, dim_hidden=9).double()
    pixels, start = random(B, N, D), random(B, K, D, seed=1)
    slots, history = module(pixels, start)
    assert slots.shape == (B, K, D) and [a.shape for a in history] == [(B, K, N)] * 2
    for b in range(B):
        inputs = [layer_norm(pixel) for pixel in pixels[b]]
        state = list(start[b])
        for attention in history:
            queries = [module.to_query.weight @ layer_norm(slot) for slot in state]
            keys = [module.to_key.weight @ x for x in inputs]
            logits = torch.stack([torch.stack([key @ q for key in keys]) for q in queries])
            shares = (logits / math.sqrt(D)).exp()
            shares = shares / shares.sum(0)
            assert torch.allclose(attention[b], shares, rtol=1e-8)
            for k in range(K):
                weights = (shares[k] + 1e-6) / (shares[k] + 1e-6).sum()
                update = sum(a * (module.to_value.weight @ x) for a, x in zip(weights, inputs))
                moved = slow_gru(module.gru, update, state[k])
                hidden = module.mlp[0].weight @ layer_norm(moved) + module.mlp[0].bias
                state[k] = moved + module.mlp[2].weight @ hidden.clamp(min=0) + module.mlp[2].bias
        assert torch.allclose(slots[b], torch.stack(state), rtol=1e-8)


def test_slots_have_no_names_and_start_from_noise():
    module, pixels, start = SlotAttention(D, K).double(), random(B, N, D), random(B, K, D, seed=1)
    order = torch.tensor([3, 0, 4, 1, 2])
    slots, history = module(pixels, start)
    assert len(history) == 3
    assert torch.allclose(module(pixels, start[:, order])[0], slots[:, order], rtol=1e-9)
    assert not torch.allclose(module(pixels)[0], module(pixels)[0])


def test_independent_queries_pool_what_each_attends_to_and_do_not_notice_each_other():
    module, pixels = IndependentQueries(D, K).double(), random(B, N, D)
    slots, attention = module(pixels)
    assert slots.shape == (B, K, D) and attention.shape == (B, K, N)
    for b, k in itertools.product(range(B), range(K)):
        query = module.to_query.weight @ module.queries[k]
        keys = [module.to_key.weight @ x for x in pixels[b]]
        weights = [math.exp((query @ key).item() / math.sqrt(D)) for key in keys]
        shares = [weight / sum(weights) for weight in weights]
        assert attention[b, k].tolist() == pytest.approx(shares, rel=1e-9)
        expected = sum(a * (module.to_value.weight @ x) for a, x in zip(shares, pixels[b]))
        assert torch.allclose(slots[b, k], expected, rtol=1e-9)
    module.queries.data[2] += 1
    moved = (module(pixels)[0] != slots).any(2).all(0)
    assert moved.tolist() == [False, False, True, False, False]


def test_positions_are_a_linear_function_of_the_distances_from_four_borders():
    module, maps = PositionEmbedding(C).double(), random(B, C, H, W)
    found = module(maps)
    for h, w in itertools.product(range(H), range(W)):
        v, u = h / (H - 1), w / (W - 1)
        distances = torch.tensor([v, u, 1 - v, 1 - u], dtype=torch.float64)
        expected = maps[:, :, h, w] + module.project.weight @ distances + module.project.bias
        assert torch.allclose(found[:, :, h, w], expected)


def slow_conv(layer, image):
    """A 3x3 convolution whose border cells are repeated: image (c h w) -> (o h w)."""
    _, h, w = image.shape
    out = torch.zeros(len(layer.weight), h, w, dtype=image.dtype)
    for y, x, i, j in itertools.product(range(h), range(w), range(3), range(3)):
        cell = image[:, min(max(y + i - 1, 0), h - 1), min(max(x + j - 1, 0), w - 1)]
        out[:, y, x] += layer.weight[:, :, i, j] @ cell
    return out + layer.bias[:, None, None]


def test_every_slot_paints_a_whole_image_and_a_softmax_over_slots_mixes_them():
    module, slots = SpatialBroadcastDecoder(D, C, width=6).double(), random(B, K, D)
    image, masks = module(slots, (3, 2))
    assert image.shape == (B, C, 3, 2) and masks.shape == (B, K, 3, 2)
    first, second, last = (layer for layer in module.paint if isinstance(layer, nn.Conv2d))
    for b in range(B):
        painted = []
        for k in range(K):
            x = module.position(slots[b, k][:, None, None].expand(D, 3, 2)[None])[0]
            x = slow_conv(second, slow_conv(first, x).clamp(min=0)).clamp(min=0)
            painted.append(slow_conv(last, x))
        shares = torch.stack([each[C].exp() for each in painted])
        shares = shares / shares.sum(0)
        mixture = sum(share * each[:C] for share, each in zip(shares, painted))
        assert torch.allclose(masks[b], shares) and torch.allclose(image[b], mixture)


def test_the_decoder_knows_no_order_of_slots_and_every_weight_gets_a_gradient():
    module, slots = SpatialBroadcastDecoder(D, C).double(), random(B, K, D).requires_grad_()
    order = [3, 0, 4, 1, 2]
    image, masks = module(slots, (H, W))
    again, permuted = module(slots[:, order], (H, W))
    assert torch.allclose(image, again) and torch.allclose(masks[:, order], permuted)
    image.square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in module.parameters()) and slots.grad.abs().min() > 0


def test_of_two_equal_slots_each_owns_half_of_every_cell():
    module, slots = SpatialBroadcastDecoder(D, C).double(), random(1, 1, D).expand(1, 2, D)
    masks = module(slots, (H, W))[1]
    assert torch.allclose(masks, torch.full_like(masks, 0.5))
