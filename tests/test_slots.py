"""slots.py: pixels pool into one vector per prototype, and the two attention mechanisms that the slots descend from.

Promised: a weighted mean over the pixels of each group that never divides by zero; a prototype occupies what it is
nearest to; a predictor that survives fewer than two rows; slots that compete over k, queries that look alone over n.
"""

import math

import pytest
import torch
from torch import nn

from slots import (
    IndependentQueries,
    SlotAttention,
    SlotPredictor,
    attentive_pooling,
    occupied,
    query_attention,
    weighted_mean,
)

B, K, D, H, W, N = 3, 5, 7, 4, 6, 8


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def maps_and_embeddings():
    return random(B, K, H, W).tanh(), random(B, D, H, W, seed=1)


# ------------------------------------------------------------------------------------------ attentive pooling


def pooled_slowly(embeddings, maps, temperature):
    slots = torch.zeros(B, K, D, dtype=torch.float64)
    for b in range(B):
        for k in range(K):
            total = 0.0
            for h in range(H):
                for w in range(W):
                    weights = [math.exp(x / temperature) for x in maps[b, :, h, w].tolist()]
                    a = weights[k] / sum(weights) + 1e-6
                    slots[b, k] += a * embeddings[b, :, h, w]
                    total += a
            slots[b, k] /= total
    return slots


def test_a_slot_is_the_mean_of_the_pixels_weighted_by_how_much_they_belong():
    maps, embeddings = maps_and_embeddings()
    found = attentive_pooling(embeddings, maps, 0.3)
    assert found.shape == (B, K, D) and found.dtype == torch.float64
    assert torch.allclose(found, pooled_slowly(embeddings, maps, 0.3), rtol=1e-10)


def test_two_prototypes_that_share_four_pixels_get_the_means_of_their_own():
    maps = torch.tensor([[1.0, 1.0, 1.0, -1.0], [-1.0, -1.0, -1.0, 1.0]]).reshape(1, 2, 1, 4)
    embeddings = torch.tensor([3.0, 6.0, 9.0, 5.0]).reshape(1, 1, 1, 4)
    assert attentive_pooling(embeddings, maps, 0.01).flatten().tolist() == pytest.approx([6.0, 5.0], rel=1e-4)


def test_a_prototype_that_owns_nothing_pools_the_mean_of_the_view_instead_of_dividing_by_zero():
    embeddings, maps = random(B, D, H, W).float(), torch.zeros(B, K, H, W)
    maps[:, 2] = -1  # exp(-1 / 0.001) is zero in float32
    found = attentive_pooling(embeddings, maps, 0.001)
    assert torch.allclose(found[:, 2], embeddings.mean((2, 3)), atol=1e-5)


def test_slots_do_not_depend_on_where_pixels_lie_and_follow_the_prototypes_order():
    maps, embeddings = maps_and_embeddings()
    found = attentive_pooling(embeddings, maps, 0.07)
    shuffled = attentive_pooling(embeddings.flip(2).roll(1, 3), maps.flip(2).roll(1, 3), 0.07)
    assert torch.allclose(shuffled, found, rtol=1e-9)
    order = torch.tensor([3, 0, 4, 1, 2])
    assert torch.allclose(attentive_pooling(embeddings, maps[:, order], 0.07), found[:, order], rtol=1e-9)


def test_autocast_does_not_reach_the_pooling():
    maps, embeddings = (x.float() for x in maps_and_embeddings())
    halved = embeddings.bfloat16()  # as the projector leaves them under autocast
    with torch.autocast("cpu", torch.bfloat16):
        found = attentive_pooling(halved, maps, 0.07)
    assert found.dtype == torch.float32
    assert found.equal(attentive_pooling(halved.float(), maps, 0.07))


@pytest.mark.parametrize("temperature", [0, -0.07])
def test_pooling_needs_a_positive_temperature(temperature):
    maps, embeddings = maps_and_embeddings()
    with pytest.raises(ValueError, match=f"pooling temperature must be positive, found {temperature}"):
        attentive_pooling(embeddings, maps, temperature)


def test_pooling_needs_maps_of_one_size():
    maps, embeddings = maps_and_embeddings()
    with pytest.raises(ValueError, match=r"\(3, 7, 4, 6\) and similarity \(3, 5, 4, 5\) are maps of different sizes"):
        attentive_pooling(embeddings, maps[..., :5], 0.07)


# ------------------------------------------------------------------------------------------ occupied


def test_a_prototype_is_occupied_if_it_is_nearest_to_some_pixel():
    maps = random(B, 17, H, W)  # 17 prototypes for 24 pixels: some go empty
    found = occupied(maps)
    assert found.shape == (B, 17) and found.dtype == torch.bool
    for b in range(B):
        winners = {max(range(17), key=lambda k: maps[b, k, h, w].item()) for h in range(H) for w in range(W)}
        assert found[b].nonzero().flatten().tolist() == sorted(winners)
    assert 0 < found.sum() < found.numel()


def test_of_three_prototypes_the_one_that_is_always_second_is_empty():
    maps = torch.tensor([[0.9, 0.1], [0.8, 0.8], [0.1, 0.9]]).reshape(1, 3, 1, 2)
    assert occupied(maps).tolist() == [[True, False, True]]


def test_occupancy_follows_the_prototypes_order_and_carries_no_gradient():
    maps, order = random(B, K, H, W).requires_grad_(), torch.tensor([3, 0, 4, 1, 2])
    assert occupied(maps[:, order]).equal(occupied(maps)[:, order])
    assert not occupied(maps).requires_grad


# ------------------------------------------------------------------------------------------ slot predictor


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def test_the_predictor_is_three_matrices_with_norms_over_its_rows_and_gelu():
    predictor, rows = SlotPredictor(D, D, 9).double(), random(N, D)
    for i, p in enumerate(predictor.parameters()):
        p.data = random(*p.shape, seed=i)
    x, layers = rows, predictor.mlp
    for linear, norm in ((layers[0], layers[1]), (layers[3], layers[4])):
        x = torch.stack([linear.weight @ row + linear.bias for row in x])
        mean = sum(x) / N
        variance = sum((row - mean) ** 2 for row in x) / N
        x = torch.stack([gelu((row - mean) / (variance + 1e-5).sqrt() * norm.weight + norm.bias) for row in x])
    expected = torch.stack([layers[6].weight @ row + layers[6].bias for row in x])
    assert torch.allclose(predictor(rows), expected, rtol=1e-9)
    assert torch.allclose(predictor(rows.flip(0)), expected.flip(0), rtol=1e-9)


def test_the_predictor_has_the_published_number_of_parameters():
    with torch.device("meta"):
        assert sum(p.numel() for p in SlotPredictor(256, 256, 4096).parameters()) == 18_899_200


def test_the_predictor_starts_from_small_normals_and_zero_biases():
    for layer in SlotPredictor(64, 80, 96).mlp:
        if isinstance(layer, nn.Linear):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
            assert layer.bias.eq(0).all()


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_rows_use_the_running_statistics_and_disturb_nothing(n):
    predictor = SlotPredictor(D, D, 9).double().train()
    predictor(random(N, D))  # statistics of their own
    buffers = {name: value.clone() for name, value in predictor.named_buffers()}
    rows = random(n, D, seed=1).requires_grad_()
    found = predictor(rows)
    found.sum().backward()
    assert found.shape == (n, D)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in predictor.parameters())
    assert all(module.training for module in predictor.modules())
    assert all(value.equal(buffers[name]) for name, value in predictor.named_buffers())
    assert torch.allclose(found, predictor.eval()(rows))


# ------------------------------------------------------------------------------------------ attention mechanisms


def test_competing_queries_share_each_pixel_and_lone_queries_share_their_own_gaze():
    queries, keys = random(B, K, D), random(B, N, D, seed=1)
    for compete in (True, False):
        found = query_attention(queries, keys, compete, temperature=0.5)
        assert found.shape == (B, K, N)
        for b in range(B):
            logits = [[sum(queries[b, k, i] * keys[b, n, i] for i in range(D)).item() / (math.sqrt(D) * 0.5)
                       for n in range(N)] for k in range(K)]
            for k in range(K):
                for n in range(N):
                    rivals = [logits[j][n] for j in range(K)] if compete else logits[k]
                    expected = math.exp(logits[k][n]) / sum(math.exp(x) for x in rivals)
                    assert found[b, k, n].item() == pytest.approx(expected, rel=1e-9)


def test_a_weighted_mean_is_the_mean_of_the_pixels_a_slot_won():
    attention, values = random(B, K, N).softmax(1), random(B, N, D, seed=1)
    found = weighted_mean(attention, values)
    for b in range(B):
        for k in range(K):
            weights = [attention[b, k, n].item() + 1e-6 for n in range(N)]
            expected = sum(weight * values[b, n] for n, weight in enumerate(weights)) / sum(weights)
            assert torch.allclose(found[b, k], expected, rtol=1e-9)
    assert torch.allclose(weighted_mean(torch.zeros(B, K, N), values.float()), values.float().mean(1)[:, None])


def layer_norm(x):
    return (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt()


def gru_slowly(gru, x, state):
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
            logits = torch.stack([torch.stack([(module.to_key.weight @ x) @ q for x in inputs]) for q in queries])
            shares = (logits / math.sqrt(D)).exp()
            shares = shares / shares.sum(0)
            assert torch.allclose(attention[b], shares, rtol=1e-8)
            for k in range(K):
                weights = (shares[k] + 1e-6) / (shares[k] + 1e-6).sum()
                update = sum(a * (module.to_value.weight @ x) for a, x in zip(weights, inputs))
                moved = gru_slowly(module.gru, update, state[k])
                hidden = (module.mlp[0].weight @ layer_norm(moved) + module.mlp[0].bias).clamp(min=0)
                state[k] = moved + module.mlp[2].weight @ hidden + module.mlp[2].bias
        assert torch.allclose(slots[b], torch.stack(state), rtol=1e-8)


def test_in_slot_attention_no_slot_has_a_name_and_each_pixel_is_shared_out():
    module, pixels, start = SlotAttention(D, K).double(), random(B, N, D), random(B, K, D, seed=1)
    order = torch.tensor([3, 0, 4, 1, 2])
    slots, history = module(pixels, start)
    assert len(history) == 3
    assert torch.allclose(module(pixels, start[:, order])[0], slots[:, order], rtol=1e-9)
    assert all(torch.allclose(a.sum(1), torch.ones(B, N, dtype=torch.float64)) for a in history)
    again, other = module(pixels)[0], module(pixels)[0]
    assert again.shape == (B, K, D) and not torch.allclose(again, other)  # they start from noise


def test_independent_queries_pool_what_each_looks_at_and_share_nothing():
    module, pixels = IndependentQueries(D, K).double(), random(B, N, D)
    slots, attention = module(pixels)
    assert slots.shape == (B, K, D) and attention.shape == (B, K, N)
    for b in range(B):
        for k in range(K):
            query = module.to_query.weight @ module.queries[k]
            weights = [math.exp((query @ (module.to_key.weight @ x)).item() / math.sqrt(D)) for x in pixels[b]]
            shares = [weight / sum(weights) for weight in weights]
            assert attention[b, k].tolist() == pytest.approx(shares, rel=1e-9)
            expected = sum(a * (module.to_value.weight @ x) for a, x in zip(shares, pixels[b]))
            assert torch.allclose(slots[b, k], expected, rtol=1e-9)


def test_an_independent_query_does_not_notice_that_another_moved():
    module, pixels = IndependentQueries(D, K).double(), random(B, N, D)
    before = module(pixels)[0].detach()
    module.queries.data[2] += 1
    after = module(pixels)[0].detach()
    assert (before != after).any(2).all(0).tolist() == [False, False, True, False, False]
