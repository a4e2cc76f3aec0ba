"""slot_attention.py: slots that compete for pixels, and queries that do not."""

import math

import pytest
import torch

from slot_attention import IndependentQueries, SlotAttention, query_attention, weighted_mean

B, K, D, N = 3, 5, 7, 8


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------- attention mechanisms


def test_competing_queries_share_each_pixel_and_lone_queries_share_their_own_gaze():
    queries, keys = random(B, K, D), random(B, N, D, seed=1)
    for compete in (True, False):
        found = query_attention(queries, keys, compete, temperature=0.5)
        assert found.shape == (B, K, N)
        for b in range(B):
            logits = [
                [
                    sum(queries[b, k, i] * keys[b, n, i] for i in range(D)).item()
                    / (math.sqrt(D) * 0.5)
                    for n in range(N)
                ]
                for k in range(K)
            ]
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
    assert torch.allclose(
        weighted_mean(torch.zeros(B, K, N), values.float()), values.float().mean(1)[:, None]
    )


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
            logits = torch.stack(
                [torch.stack([(module.to_key.weight @ x) @ q for x in inputs]) for q in queries]
            )
            shares = (logits / math.sqrt(D)).exp()
            shares = shares / shares.sum(0)
            assert torch.allclose(attention[b], shares, rtol=1e-8)
            for k in range(K):
                weights = (shares[k] + 1e-6) / (shares[k] + 1e-6).sum()
                update = sum(a * (module.to_value.weight @ x) for a, x in zip(weights, inputs))
                moved = gru_slowly(module.gru, update, state[k])
                hidden = (module.mlp[0].weight @ layer_norm(moved) + module.mlp[0].bias).clamp(
                    min=0
                )
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
            weights = [
                math.exp((query @ (module.to_key.weight @ x)).item() / math.sqrt(D))
                for x in pixels[b]
            ]
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
