"""grouping.py: pixels are compared with prototypes, and two views of a scene are brought back
together.

Promised: a cosine, a softmax over prototypes, and a cut that puts the same place of the scene at
the same position of both maps, whatever the crops and flips were. Half precision never reaches
them; double precision is never lost.
"""

import math

import pytest
import torch

from backbone import Projector
from data import overlap_boxes
from grouping import GroupingNetwork, assignment, full_precision, inverse_augmentation, similarity

B, K, D, H, W = 3, 5, 7, 4, 6


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------------- similarity


def test_the_similarity_is_the_cosine_of_every_prototype_and_every_pixel():
    embeddings, prototypes = random(B, D, H, W), random(K, D, seed=1)
    found = similarity(embeddings, prototypes)
    assert found.shape == (B, K, H, W)
    for b in range(B):
        for k in range(K):
            for h in range(H):
                for w in range(W):
                    z, p = embeddings[b, :, h, w].tolist(), prototypes[k].tolist()
                    dot = sum(x * y for x, y in zip(z, p))
                    expected = dot / math.sqrt(sum(x * x for x in z) * sum(y * y for y in p))
                    assert found[b, k, h, w].item() == pytest.approx(expected, rel=1e-12)


def test_a_pixel_at_3_4_5_has_cosines_0_8_and_0_6():
    found = similarity(
        torch.tensor([4.0, 3.0]).reshape(1, 2, 1, 1), torch.tensor([[10.0, 0.0], [0.0, 0.1]])
    )
    assert found.flatten().tolist() == pytest.approx([0.8, 0.6])


def test_lengths_do_not_matter_and_a_vector_of_zeros_resembles_nothing():
    embeddings, prototypes = random(B, D, H, W), random(K, D, seed=1)
    found = similarity(embeddings, prototypes)
    assert found.abs().max() <= 1 + 1e-12
    assert torch.allclose(similarity(100 * embeddings, prototypes / 7), found, rtol=1e-12)
    assert similarity(0 * embeddings, prototypes).eq(0).all()


def test_permuting_the_prototypes_permutes_the_maps():
    embeddings, prototypes, order = (
        random(B, D, H, W),
        random(K, D, seed=1),
        torch.tensor([3, 0, 4, 1, 2]),
    )
    found = similarity(embeddings, prototypes[order])
    assert torch.allclose(found, similarity(embeddings, prototypes)[:, order], rtol=1e-12)


@pytest.mark.parametrize(
    "kind, expected",
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_half_precision_is_raised_to_single_and_double_stays(kind, expected):
    x = random(K, D).to(kind)
    assert full_precision(x).dtype == expected
    assert full_precision(x).equal(x.to(expected))


def test_autocast_does_not_reach_the_similarity():
    embeddings, prototypes = random(B, D, H, W).float(), random(K, D, seed=1).float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = similarity(embeddings, prototypes)
    assert inside.dtype == torch.float32
    assert inside.equal(similarity(embeddings, prototypes))


# --------------------------------------------------------------------------------------- assignment


def test_the_assignment_is_a_softmax_over_the_prototypes():
    maps = random(B, K, H, W).tanh()
    found = assignment(maps, 0.3)
    for b in range(B):
        for h in range(H):
            for w in range(W):
                weights = [math.exp(maps[b, k, h, w].item() / 0.3) for k in range(K)]
                assert found[b, :, h, w].tolist() == pytest.approx(
                    [x / sum(weights) for x in weights], rel=1e-12
                )


def test_a_lead_of_ln_2_temperatures_is_twice_the_share():
    found = assignment(torch.tensor([0.1 * math.log(2), 0.0]).reshape(1, 2, 1, 1), 0.1)
    assert found.flatten().tolist() == pytest.approx([2 / 3, 1 / 3])


def test_shares_sum_to_one_and_a_lower_temperature_sharpens_them():
    maps = random(B, K, H, W).tanh()
    mild, sharp = assignment(maps, 0.1), assignment(maps, 0.07)
    assert torch.allclose(mild.sum(1), torch.ones(B, H, W, dtype=torch.float64))
    assert (sharp.amax(1) > mild.amax(1)).all()
    assert torch.allclose(
        assignment(maps + 0.5, 0.1), mild
    )  # only differences between prototypes count


@pytest.mark.parametrize("temperature", [0, -0.1])
def test_an_assignment_needs_a_positive_temperature(temperature):
    with pytest.raises(ValueError, match=f"must be positive, found {temperature}"):
        assignment(random(B, K, H, W), temperature)


# ----------------------------------------------------------------------------- inverse augmentation


def cut_slowly(maps, boxes, flipped):
    """One bilinear sample in the middle of each of h x w bins of the box, the border repeated
    beyond it.
    """
    b, c, h, w = maps.shape
    out = torch.empty_like(maps)

    def sample(plane, y, x):
        y, x = min(max(y, 0), h - 1), min(max(x, 0), w - 1)
        top, left = int(y), int(x)
        bottom, right = min(top + 1, h - 1), min(left + 1, w - 1)
        fy, fx = y - top, x - left
        return (1 - fy) * ((1 - fx) * plane[top, left] + fx * plane[top, right]) + fy * (
            (1 - fx) * plane[bottom, left] + fx * plane[bottom, right]
        )

    for i in range(b):
        x1, y1, x2, y2 = boxes[i].tolist()
        for j in range(c):
            for row in range(h):
                for column in range(w):
                    y = y1 * h + (row + 0.5) * (y2 - y1) - 0.5  # pixel centers lie at half-integers
                    x = x1 * w + (column + 0.5) * (x2 - x1) - 0.5
                    to = w - 1 - column if flipped[i] else column
                    out[i, j, row, to] = sample(maps[i, j], y, x)
    return out


BOXES = torch.tensor(
    [[0.1, 0.3, 0.75, 0.95], [0.0, 0.0, 1.0, 1.0], [0.4, 0.0, 1.0, 0.2]], dtype=torch.float64
)


@pytest.mark.parametrize("flipped", [[False, True, False], [True, False, True]])
def test_the_box_is_cut_by_bilinear_samples_and_mirrored_back(flipped):
    maps, flipped = random(B, K, H, W), torch.tensor(flipped)
    assert torch.allclose(
        inverse_augmentation(maps, BOXES, flipped), cut_slowly(maps, BOXES, flipped), rtol=1e-9
    )


def test_the_right_half_of_0_1_2_3_is_sampled_at_quarters():
    maps = torch.tensor([0.0, 1.0, 2.0, 3.0]).reshape(1, 1, 1, 4).repeat(2, 1, 1, 1)
    right_half = torch.tensor([[0.5, 0.0, 1.0, 1.0]]).repeat(2, 1)
    found = inverse_augmentation(maps, right_half, torch.tensor([False, True]))
    assert found[0].flatten().tolist() == pytest.approx([1.75, 2.25, 2.75, 3.0])
    assert found[1].flatten().tolist() == pytest.approx([3.0, 2.75, 2.25, 1.75])


def test_the_whole_box_of_an_unflipped_view_is_the_map_itself():
    maps = random(B, K, H, W)
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]] * B)
    assert torch.allclose(inverse_augmentation(maps, whole, torch.zeros(B, dtype=torch.bool)), maps)
    assert torch.allclose(
        inverse_augmentation(maps, whole, torch.ones(B, dtype=torch.bool)), maps.flip(3)
    )


@pytest.mark.parametrize("flips", [(False, False), (True, False), (False, True), (True, True)])
def test_the_same_place_of_a_scene_comes_to_the_same_position_of_both_views(flips):
    """The scene is a slope, which bilinear sampling reproduces exactly away from the border."""
    h, w = 12, 15
    crops = [(10, 20, 60, 90), (25, 45, 80, 75)]  # top left height width
    boxes = overlap_boxes(*crops, flips).double()
    aligned = []
    for (top, left, height, width), flip, box in zip(crops, flips, boxes):
        y = top + (torch.arange(h, dtype=torch.float64) + 0.5) / h * height
        x = left + (torch.arange(w, dtype=torch.float64) + 0.5) / w * width
        view = torch.stack([y[:, None] + 3 * x, y[:, None] - 2 * x])[None]  # a map of two channels
        aligned.append(
            inverse_augmentation(view.flip(3) if flip else view, box[None], torch.tensor([flip]))
        )
    inside = (..., slice(1, -1), slice(1, -1))
    assert torch.allclose(aligned[0][inside], aligned[1][inside], rtol=1e-5)
    # ... and it is the overlap, rows 25 to 70 and columns 45 to 110, in scene coordinates and the
    # right way round
    y, x = 25 + (torch.arange(h) + 0.5) / h * 45, 45 + (torch.arange(w) + 0.5) / w * 65
    assert torch.allclose(
        aligned[0][0, 0][1:-1, 1:-1], (y[:, None] + 3 * x).double()[1:-1, 1:-1], rtol=1e-5
    )


def test_what_is_constant_stays_constant_and_gradient_is_neither_lost_nor_made():
    maps = torch.ones(B, K, H, W, dtype=torch.float64, requires_grad=True)
    found = inverse_augmentation(maps, BOXES, torch.tensor([True, False, True]))
    assert torch.allclose(found, torch.ones_like(found))
    found.sum().backward()
    assert maps.grad.sum().item() == pytest.approx(maps.numel())


def test_an_empty_box_gives_finite_values_and_no_error():
    found = inverse_augmentation(
        random(B, K, H, W), torch.zeros(B, 4), torch.tensor([True, False, True])
    )
    assert found.shape == (B, K, H, W) and found.isfinite().all()


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_maps_are_cut_where_single_precision_ones_are(kind):
    """bfloat16 counts images only up to 256 and boxes only in 256ths."""
    b = 260
    maps, boxes = (
        random(b, 1, 2, 3).to(kind),
        torch.tensor([[0.123, 0.321, 0.777, 0.999]]).repeat(b, 1),
    )
    flipped = torch.arange(b) % 2 == 0
    found = inverse_augmentation(maps, boxes, flipped)
    assert found.dtype == torch.float32
    assert torch.allclose(found, inverse_augmentation(maps.float(), boxes, flipped))


def test_maps_boxes_and_flips_must_be_of_as_many_images():
    maps, boxes, flipped = random(B, K, H, W), BOXES, torch.tensor([True, False, True])
    with pytest.raises(
        ValueError, match=r"3 maps need boxes \(3, 4\) and flags \(3,\), found \(2, 4\) and \(3,\)"
    ):
        inverse_augmentation(maps, boxes[:2], flipped)
    with pytest.raises(ValueError, match=r"found \(3, 4\) and \(2,\)"):
        inverse_augmentation(maps, boxes, flipped[:2])


# -------------------------------------------------------------------------------------- the network


def test_the_grouping_network_is_trunk_then_projector_then_cosine():
    network = GroupingNetwork("tiny", K, dim_hidden=9, dim_out=D).double()
    images = random(B, 3, 16, 24)
    embeddings, maps = network(images)
    assert embeddings.shape == (B, D, 4, 6) and maps.shape == (B, K, 4, 6)
    assert embeddings.equal(network.projector(network.backbone(images)))
    assert embeddings.equal(network.embed(images)[1])
    assert maps.equal(similarity(embeddings, network.prototypes.weight))
    assert isinstance(network.projector, Projector)


def test_prototypes_start_from_a_standard_normal():
    table = GroupingNetwork("tiny", 400, dim_hidden=9, dim_out=50).prototypes.weight
    assert table.shape == (400, 50)
    assert table.mean().item() == pytest.approx(
        0, abs=0.05
    ) and table.std().item() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("name", ["num_prototypes", "dim_hidden", "dim_out"])
def test_a_network_of_size_zero_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, found 0"):
        GroupingNetwork("tiny", **(dict(num_prototypes=K, dim_hidden=9, dim_out=D) | {name: 0}))
