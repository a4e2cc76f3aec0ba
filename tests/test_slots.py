"""slots.py: pixels pool into one vector per prototype and image."""

import itertools
import math

import pytest
import torch

from slots import SlotPredictor, attentive_pooling, occupied
from trained import random

B, K, D, H, W, N = 3, 5, 7, 4, 6, 8


def embeddings_and_maps():
    return random(B, D, H, W, seed=1), random(B, K, H, W).tanh()


def test_a_slot_is_the_mean_of_the_pixels_weighted_by_their_assignment():
    embeddings, maps = embeddings_and_maps()
    expected = torch.zeros(B, K, D, dtype=torch.float64)
    for b, k in itertools.product(range(B), range(K)):
        total = 0.0
        for h, w in itertools.product(range(H), range(W)):
            weights = [math.exp(x / 0.3) for x in maps[b, :, h, w].tolist()]
            a = weights[k] / sum(weights) + 1e-6
            expected[b, k] += a * embeddings[b, :, h, w]
            total += a
        expected[b, k] /= total
    assert torch.allclose(attentive_pooling(embeddings, maps, 0.3), expected, rtol=1e-10)


def test_a_prototype_that_owns_nothing_pools_the_mean_of_the_view_instead_of_dividing_by_zero():
    embeddings, maps = random(B, D, H, W).float(), torch.zeros(B, K, H, W)
    maps[:, 2] = -1  # exp(-1 / 0.001) is zero in float32
    found = attentive_pooling(embeddings, maps, 0.001)
    assert torch.allclose(found[:, 2], embeddings.mean((2, 3)), atol=1e-5)


def test_pooling_needs_maps_of_one_size():
    embeddings, maps = embeddings_and_maps()
    words = r"\(3, 7, 4, 6\) and similarity \(3, 5, 4, 5\) are maps of different sizes"
    with pytest.raises(ValueError, match=words):
        attentive_pooling(embeddings, maps[..., :5], 0.07)


def test_a_prototype_is_occupied_if_it_is_nearest_to_some_pixel():
    maps = random(B, 17, H, W)  # 17 prototypes for 24 pixels: some go empty
    found = occupied(maps.requires_grad_())
    assert found.shape == (B, 17) and found.dtype == torch.bool and not found.requires_grad
    for b in range(B):
        columns = [maps[b, :, h, w].tolist() for h in range(H) for w in range(W)]
        winners = {column.index(max(column)) for column in columns}
        assert found[b].nonzero().flatten().tolist() == sorted(winners)
    assert 0 < found.sum() < found.numel()


def test_the_predictor_is_three_matrices_with_norms_over_its_rows_and_gelu():
    predictor, rows = SlotPredictor(D, 6, 9).double(), random(N, D)
    for i, p in enumerate(predictor.parameters()):
        p.data = random(*p.shape, seed=i)
    x, layers = rows, predictor.mlp
    for linear, norm in ((layers[0], layers[1]), (layers[3], layers[4])):
        x = torch.stack([linear.weight @ row + linear.bias for row in x])
        mean = sum(x) / N
        variance = sum((row - mean) ** 2 for row in x) / N
        x = (x - mean) / (variance + 1e-5).sqrt() * norm.weight + norm.bias
        x = x * (1 + torch.erf(x / math.sqrt(2))) / 2
    expected = torch.stack([layers[6].weight @ row + layers[6].bias for row in x])
    assert torch.allclose(predictor(rows), expected, rtol=1e-9)


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_rows_use_the_running_statistics_and_disturb_nothing(n):
    predictor = SlotPredictor(D, D, 9).double().train()
    predictor(random(N, D))  # gives it running statistics
    buffers = {name: value.clone() for name, value in predictor.named_buffers()}
    rows = random(n, D, seed=1).requires_grad_()
    found = predictor(rows)
    found.sum().backward()
    assert found.shape == (n, D)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in predictor.parameters())
    assert all(module.training for module in predictor.modules())
    assert all(value.equal(buffers[name]) for name, value in predictor.named_buffers())
    assert torch.allclose(found, predictor.eval()(rows))
