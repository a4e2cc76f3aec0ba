"""comparisons/slot_attention.py: competing slots, queries that do not compete, the decoder."""

import itertools
import math

import torch

from comparisons.slot_attention import (
    IndependentQueries,
    PositionEmbedding,
    SlotAttention,
    SpatialBroadcastDecoder,
)

B, K, D, N, C, H, W = 3, 5, 7, 8, 2, 4, 6


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer_norm(x):
    return (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()


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
                moved = module.gru(update[None], state[k][None])[0]
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
    queries = (module.queries @ module.to_query.weight.T).expand(B, K, D)
    scores = queries @ (pixels @ module.to_key.weight.T).mT / math.sqrt(D)
    assert torch.allclose(attention, scores.exp() / scores.exp().sum(2, keepdim=True), rtol=1e-9)
    for b, k in itertools.product(range(B), range(K)):
        mean = sum(a * (module.to_value.weight @ x) for a, x in zip(attention[b, k], pixels[b]))
        assert torch.allclose(slots[b, k], mean, rtol=1e-9)
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


def test_every_slot_paints_a_whole_image_and_a_softmax_over_slots_mixes_them():
    module, slots = SpatialBroadcastDecoder(D, C, width=6).double(), random(B, K, D)
    image, masks = module(slots, (H, W))
    for b in range(B):
        cells = [slot[:, None, None].expand(D, H, W)[None] for slot in slots[b]]
        painted = [module.paint(module.position(cell))[0] for cell in cells]
        shares = torch.stack([each[C].exp() for each in painted])
        shares = shares / shares.sum(0)
        mixture = sum(share * each[:C] for share, each in zip(shares, painted))
        assert torch.allclose(masks[b], shares) and torch.allclose(image[b], mixture)
