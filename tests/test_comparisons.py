"""The systems of comparisons/: each loss against a slow loop, a case by hand, gradients where they
belong.

Promised of all: the trunk that is judged is the one that learns (or its teacher), nothing else
moves than what the header says, and nothing of a label reaches a loss but where the header says so.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from einops import rearrange

import comparisons
from comparisons import common, dense, given_masks, kmeans, motion, self_distillation, slot_matching
from comparisons import sinkhorn as balanced
from comparisons.common import System
from comparisons.scenes import Scenes, stuff_of
from grouping import inverse_augmentation, similarity
from slotcon import SlotCon

B, K, D, HIDDEN, H, W = 3, 6, 7, 9, 4, 5  # h w of the map: a view has 16 x 20 px
SETTINGS = dict(
    arch="tiny",
    num_prototypes=K,
    dim_hidden=HIDDEN,
    dim_out=D,
    temp_student=0.1,
    temp_teacher=0.04,
    temp_slot=0.2,
    group_weight=0.5,
    momentum_center=0.8,
    steps_per_epoch=3,
    seed=0,
)
ROWS = [
    (name, variant)
    for name in comparisons.SYSTEMS
    for variant in comparisons.VARIANTS.get(name, (comparisons.Variant(),))
]


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def build(name, seed=0, **more):
    torch.manual_seed(seed)
    system = comparisons.build(name, SETTINGS, **more).double()
    for (
        p
    ) in system.parameters():  # a projector starts with weights so small that all pixels look alike
        if p.ndim > 1:
            p.data = p.data / p.data.std().clamp(min=1e-9) * math.sqrt(2 / p[0].numel())
    for student, teacher in (("student", "teacher"), ("network", "labeler")):
        if hasattr(system, teacher):
            getattr(system, teacher).load_state_dict(getattr(system, student).state_dict())
    return (
        system.eval()
    )  # batch norms with fixed statistics: an image does not depend on the others


def batch(channels=0, flat=False):
    """views, boxes, flipped, told: image 1's crops do not overlap."""
    views, flipped = random(B, 2, 3, 4 * H, 4 * W, seed=7), random(B, 2, seed=8) > 0
    low, high = (
        random(B, 2, 2, seed=9).sigmoid() * 0.4,
        1 - random(B, 2, 2, seed=10).sigmoid() * 0.4,
    )
    boxes = torch.cat([low, high], dim=2)
    boxes[1] = 0
    told = random(B, 2, channels, 4 * H, 4 * W, seed=11).sigmoid()
    return views, boxes, flipped, told


def told_of(system):
    return {"": 0, "depth": 1}.get(system.told, given_masks.MASKS)


def aligned(maps, boxes, flipped):
    return [inverse_augmentation(maps[i], boxes[:, i], flipped[:, i]) for i in (0, 1)]


def slow_contrast(queries, keys, positives, temperature):
    """Rows as lists of vectors; the loss in the form of MoCo v3."""
    total = 0
    for query, positive in zip(queries, positives):
        cosines = (
            torch.stack([query @ key / (query.norm() * key.norm()) for key in keys]) / temperature
        )
        total = total - (cosines[positive] - cosines.exp().sum().log())
    return 2 * temperature * total / len(queries)


def slow_cross_entropy(maps, targets, temperature, valid):
    """maps, targets (b k h w): mean over the places of the valid images."""
    values = []
    for b in range(len(maps)):
        for h, w in itertools.product(range(H), range(W)):
            if valid[b]:
                p = (maps[b, :, h, w] / temperature).exp()
                values.append(-(targets[b, :, h, w] * (p / p.sum()).log()).sum())
    return sum(values) / len(values)


# -------------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("name, variant", ROWS)
def test_the_loss_moves_every_weight_that_is_trained_and_nothing_else(name, variant):
    system = build(name, **variant.arguments)
    views, boxes, flipped, told = batch(told_of(system))
    views.requires_grad_()
    loss, outcome = system(views, boxes, flipped, told)
    loss.backward()
    assert loss.ndim == 0 and loss.isfinite() and outcome.loss.item() == loss.item()
    assert not outcome.loss.requires_grad and views.grad.abs().max() > 0
    centers = (
        "network.prototypes" if name in ("kmeans", "picie") else "teacher"
    )  # set by clustering
    for path, p in system.named_parameters():
        frozen = any(part in path for part in ("teacher", "labeler", centers))
        assert p.requires_grad != frozen, path
        if frozen:
            assert p.grad is None, path
        else:
            assert p.grad is not None and (p.ndim == 1 or p.grad.abs().max() > 0), path


@pytest.mark.parametrize("name", comparisons.SYSTEMS)
def test_the_judged_trunk_follows_what_was_learned(name):
    system = build(name)
    before = [p.clone() for p in system.trunk.parameters()]
    optimizer = torch.optim.SGD([p for p in system.parameters() if p.requires_grad], 0.1)
    loss, outcome = system(*batch(told_of(system)))
    loss.backward()
    optimizer.step()
    system.after_step(outcome.memo, 0.5)
    assert all((p != q).any() for p, q in zip(system.trunk.parameters(), before) if p.ndim > 1)


@pytest.mark.parametrize("name", comparisons.SYSTEMS)
def test_groups_are_one_map_per_group_and_do_not_depend_on_the_rest_of_the_batch(name):
    system, images = build(name), batch()[0][:, 0]
    torch.manual_seed(1)
    maps = system.maps(images)
    if maps is None:
        assert name in ("moco", "dense", "given_masks") and not system.per_image
        return
    assert maps.shape[0] == B and maps.shape[1] == (
        slot_matching.NUM_SLOTS if system.per_image else K
    )
    if not system.per_image:
        assert torch.allclose(system.maps(images[1:2]), maps[1:2])


def test_all_systems_start_from_the_same_trunk_and_an_unknown_one_is_named():
    torch.manual_seed(3)
    first = comparisons.build("moco", SETTINGS).trunk[0].weight
    for name in comparisons.SYSTEMS:
        torch.manual_seed(3)
        assert comparisons.build(name, SETTINGS).trunk[0].weight.equal(first), name
    with pytest.raises(ValueError, match="no system 'mocov3': choose of moco, dense"):
        comparisons.build("mocov3", SETTINGS)


def test_the_protocol_itself_makes_no_groups_and_has_no_loss():
    system = System()
    assert system.maps(batch()[0][:, 0]) is None and system.after_step(None, 0.9) is None
    for missing in (lambda: system.trunk, lambda: system(*batch())):
        with pytest.raises(NotImplementedError):
            missing()


# ------------------------------------------------------------------------------- what several share


def test_target_loss_is_the_cross_entropy_of_the_places_of_images_that_overlap():
    maps, shares = random(B, K, H, W).tanh(), random(B, K, H, W, seed=1).softmax(1)
    valid = torch.tensor([True, False, True])
    expected = slow_cross_entropy(maps, shares, 0.3, valid)
    assert common.target_loss(maps, shares, 0.3, valid).item() == pytest.approx(
        expected.item(), rel=1e-9
    )
    labels = shares.argmax(1)
    one_hot = torch.nn.functional.one_hot(labels, K).permute(0, 3, 1, 2).double()
    expected = slow_cross_entropy(maps, one_hot, 0.3, valid)
    assert common.target_loss(maps, labels, 0.3, valid).item() == pytest.approx(
        expected.item(), rel=1e-9
    )


def test_by_hand_two_prototypes_one_place():
    maps = torch.tensor([0.0, math.log(3)]).reshape(
        1, 2, 1, 1
    )  # assignment 1/4, 3/4 at temperature 1
    label = torch.tensor([[[1]]])
    yes = torch.tensor([True])
    assert common.target_loss(maps, label, 1.0, yes).item() == pytest.approx(
        math.log(4 / 3), rel=1e-6
    )


def test_without_any_overlap_the_loss_is_a_zero_with_a_gradient():
    maps = random(B, K, H, W).requires_grad_()
    loss = common.target_loss(
        maps, random(B, K, H, W).softmax(1), 0.1, torch.zeros(B, dtype=torch.bool)
    )
    loss.backward()
    assert loss.item() == 0 and maps.grad.abs().max() == 0


def test_overlapping_crops_are_those_whose_box_has_an_area():
    boxes = torch.tensor(
        [[[0.1, 0.2, 0.5, 0.9]] * 2, [[0.0, 0, 0, 0]] * 2, [[0.3, 0.2, 0.3, 0.9]] * 2]
    )
    assert common.overlapping(boxes).tolist() == [True, False, False]


# ----------------------------------------------------------------------------- image, pixel, object


def test_moco_contrasts_whole_images():
    system = build("moco")
    views, *rest = batch()
    vectors = [
        [network.projector(network.backbone(views[:, v]).mean((2, 3))) for v in (0, 1)]
        for network in (system.student, system.teacher)
    ]
    queries = [system.predictor(rows) for rows in vectors[0]]
    expected = sum(slow_contrast(queries[v], vectors[1][1 - v], range(B), 0.2) for v in (0, 1))
    assert system(views, *rest)[0].item() == pytest.approx(expected.item(), rel=1e-9)


def test_a_teacher_with_other_weights_changes_the_loss_and_follows_slowly():
    system = build("moco")
    before = system(*batch())[0].item()
    weight = system.teacher.backbone[0].weight
    weight.data += 1
    assert system(*batch())[0].item() != pytest.approx(before, rel=1e-3)
    expected = 0.75 * weight + 0.25 * system.student.backbone[0].weight
    system.after_step(None, 0.75)
    assert torch.allclose(weight, expected)


def test_dense_contrasts_places_among_all_places_of_images_that_overlap():
    query, key = random(B, D, 8, 12), random(B, D, 8, 12, seed=1)
    valid, P = torch.tensor([True, False, True]), dense.PLACES
    cells = [
        [
            maps[b, :, 2 * i : 2 * i + 2, 3 * j : 3 * j + 3].mean((1, 2))
            for b in (0, 2)
            for i in range(P)
            for j in range(P)
        ]
        for maps in (query, key)
    ]
    expected = slow_contrast(*cells, range(2 * P * P), 0.2)
    found = dense.place_contrast(query, key, valid, 0.2)
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)
    query.requires_grad_(), key.requires_grad_()
    dense.place_contrast(query, key, valid, 0.2).backward()
    assert key.grad is None and query.grad[1].abs().max() == 0 < query.grad[0].abs().max()


def test_dense_by_hand_every_place_points_its_own_way():
    maps = torch.eye(dense.PLACES**2).reshape(1, dense.PLACES**2, dense.PLACES, dense.PLACES)
    found = dense.place_contrast(maps, maps, torch.tensor([True]), 0.5).item()
    others = dense.PLACES**2 - 1
    assert found == pytest.approx(
        math.log(1 + others * math.exp(-2)), rel=1e-6
    )  # 2 tau = 1, and 1 / tau = 2


def test_dense_without_overlap_is_a_zero_with_a_gradient():
    query = random(B, D, H, W).requires_grad_()
    loss = dense.place_contrast(query, query.detach(), torch.zeros(B, dtype=torch.bool), 0.2)
    loss.backward()
    assert loss.item() == 0 and query.grad.abs().max() == 0


def test_dense_pairs_the_same_places_of_the_scene():
    system = build("dense")
    views, boxes, flipped, told = batch()
    queries = [system.predictor(system.student(views[:, v])) for v in (0, 1)]
    keys = [system.teacher(views[:, v]) for v in (0, 1)]
    (q1, q2), (k1, k2) = aligned(queries, boxes, flipped), aligned(keys, boxes, flipped)
    valid = torch.tensor([True, False, True])
    expected = sum(dense.place_contrast(*pair, valid, 0.2) for pair in ((q1, k2), (q2, k1)))
    assert system(views, boxes, flipped, told)[0].item() == pytest.approx(expected.item(), rel=1e-9)


def test_pool_in_masks_is_the_mean_under_each_mask():
    embeddings, masks = random(B, D, H, W), (random(B, K, 4 * H, 4 * W, seed=1) > 0.3).double()
    masks[0, 2] = 0
    masks[1, 3] = 0
    masks[1, 3, :2, :4] = 1  # half a cell
    slots, seen = given_masks.pool_in_masks(embeddings, masks)
    for b, k in itertools.product(range(B), range(K)):
        total, weight = torch.zeros(D, dtype=torch.float64), 0.0
        for h, w in itertools.product(range(H), range(W)):
            share = masks[b, k, 4 * h : 4 * h + 4, 4 * w : 4 * w + 4].mean().item()
            total, weight = total + share * embeddings[b, :, h, w], weight + share
        assert bool(seen[b, k]) == (weight >= 1)
        if weight:
            assert torch.allclose(
                slots[b, k], total / weight, rtol=1e-4, atol=1e-5
            )  # less 1e-6 per cell
    assert not seen[0, 2] and not seen[1, 3] and seen.sum() > K


def test_given_masks_contrast_each_mask_with_itself_in_the_other_view():
    system = build("given_masks", masks="truth")
    views, boxes, flipped, told = batch(given_masks.MASKS)
    told[0, 0, 4] = 0  # in one view only: a key, never a query
    pooled = [
        [given_masks.pool_in_masks(network(views[:, v]), told[:, v]) for v in (0, 1)]
        for network in (system.student, system.teacher)
    ]
    expected = 0
    for v in (0, 1):
        (slots, seen), (targets, there) = pooled[0][v], pooled[1][1 - v]
        places = [(b, k) for b in range(B) for k in range(given_masks.MASKS) if there[b, k]]
        queries = [place for place in places if seen[place]]
        rows = system.predictor(torch.stack([slots[place] for place in queries]))
        expected += slow_contrast(
            rows,
            [targets[place] for place in places],
            [places.index(place) for place in queries],
            0.2,
        )
        assert len(queries) < B * given_masks.MASKS
    assert system(views, boxes, flipped, told)[0].item() == pytest.approx(expected.item(), rel=1e-9)


def test_masks_come_from_one_of_three_places():
    assert [build("given_masks", masks=kind).told for kind in ("grid", "color", "truth")] == [
        "grid",
        "color",
        "truth",
    ]
    with pytest.raises(ValueError, match="masks are grid, color or truth, found 'edges'"):
        build("given_masks", masks="edges")


def test_color_clusters_by_hand_two_colors_are_two_clusters():
    image = torch.zeros(3, 24, 24, dtype=torch.uint8)
    image[0, :, 12:] = 200
    clusters = given_masks.color_clusters(image)
    left, right = clusters[:, :12].unique().tolist(), clusters[:, 12:].unique().tolist()
    assert clusters.shape == (24, 24) and not set(left) & set(right)


# ---------------------------------------------------------------------------------- deep clustering


def test_k_means_finds_two_clouds_and_moves_every_center_to_the_mean_of_its_rows():
    rows = torch.cat([random(20, 2) / 9, random(30, 2) / 9 + 5])
    centers = kmeans.cluster(rows, 2, torch.Generator().manual_seed(0))
    means = torch.stack([rows[:20].mean(0), rows[20:].mean(0)])
    assert torch.allclose(centers[centers[:, 0].argsort()], means)
    labels = kmeans.nearest_center(rows, centers)
    slow = [min(range(2), key=lambda k: (row - centers[k]).norm().item()) for row in rows]
    assert labels.tolist() == slow


def test_an_empty_cluster_takes_over_half_of_the_largest_and_too_few_rows_are_an_error():
    rows = torch.cat([torch.zeros(30, 2), torch.ones(30, 2)]).double() + random(60, 2) / 99
    rows[:30] = rows[0]  # two of the three starting centers may be the same row
    for seed in range(5):
        centers = kmeans.cluster(rows, 3, torch.Generator().manual_seed(seed), rounds=9)
        assert centers.isfinite().all() and len(kmeans.nearest_center(rows, centers).unique()) >= 2
    with pytest.raises(ValueError, match="7 clusters of 6 rows"):
        kmeans.cluster(rows[:6], 7, torch.Generator())


def test_k_means_pseudo_labels_are_of_the_copy_and_each_view_has_its_own():
    system = build("kmeans")
    views, boxes, flipped, told = batch()
    found = system(views, boxes, flipped, told)[0]
    assert not system.network.prototypes.weight.equal(torch.zeros(K, D))
    expected = 0
    for v in (0, 1):
        maps = system.network(views[:, v])[1]
        labels = system.labeler(views[:, v])[1].argmax(1)
        one_hot = torch.nn.functional.one_hot(labels, K).permute(0, 3, 1, 2).double()
        expected += slow_cross_entropy(maps, one_hot, 0.1, [True] * B) / 2
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)
    system.labeler.projector.mlp[0].weight.data += 1  # other labels
    assert system(views, boxes, flipped, told)[0].item() != pytest.approx(found.item(), rel=1e-3)


def test_pseudo_labels_change_once_per_epoch_only():
    system = build("kmeans")
    copies = []
    for step in range(1, 7):
        loss, outcome = system(*batch())
        loss.backward()
        for p in system.network.parameters():
            p.data -= 0 if p.grad is None else 0.1 * p.grad
        system.zero_grad()
        system.after_step(outcome.memo, 0.9)
        copies.append(system.labeler.backbone[0].weight.clone())
        same = system.labeler.backbone[0].weight.equal(system.network.backbone[0].weight)
        assert same == (step % 3 == 0)  # steps_per_epoch
    assert (
        copies[0].equal(copies[1]) and not copies[1].equal(copies[2]) and copies[2].equal(copies[4])
    )
    assert system.network.prototypes.weight.equal(system.labeler.prototypes.weight)


def test_picie_asks_each_view_for_its_own_and_for_the_other_views_labels():
    system = build("picie")
    views, boxes, flipped, told = batch()
    found = system(views, boxes, flipped, told)[0]
    maps = aligned([system.network(views[:, v])[1] for v in (0, 1)], boxes, flipped)
    seen = aligned([system.labeler(views[:, v])[1] for v in (0, 1)], boxes, flipped)
    targets = [
        torch.nn.functional.one_hot(m.argmax(1), K).permute(0, 3, 1, 2).double() for m in seen
    ]
    valid = [True, False, True]
    expected = sum(slow_cross_entropy(s, y, 0.1, valid) for s in maps for y in targets) / 4
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)
    assert (targets[0] != targets[1]).any()


def test_sinkhorn_alternates_between_equal_prototypes_and_whole_pixels():
    maps = random(B, K, H, W).tanh()
    q = np.exp(maps.numpy() / 0.3)
    for _ in range(2):
        for k in range(K):
            q[:, k] /= q[:, k].sum()
        for b, h, w in itertools.product(range(B), range(H), range(W)):
            q[b, :, h, w] /= q[b, :, h, w].sum()
    assert torch.allclose(
        balanced.sinkhorn(maps, 0.3, iterations=2), torch.from_numpy(q), rtol=1e-9
    )


def test_after_many_rounds_every_prototype_owns_the_same_share_of_all_pixels():
    maps = random(B, K, H, W).tanh()
    maps[:, 1] += 0.5  # nearest to most pixels
    q = balanced.sinkhorn(maps, 0.2, iterations=300)
    assert torch.allclose(q.sum(1), torch.ones(B, H, W, dtype=torch.float64))
    assert torch.allclose(q.sum((0, 2, 3)), torch.full((K,), B * H * W / K, dtype=torch.float64))


def test_four_pixels_that_prefer_one_of_two_prototypes_are_split_evenly():
    maps = torch.tensor([1.0, -1.0]).reshape(1, 2, 1, 1).expand(1, 2, 2, 2)
    assert balanced.sinkhorn(maps, 0.1).eq(0.5).all()


@pytest.mark.parametrize("temperature, iterations", [(0, 3), (-1, 3), (0.02, 3), (0.1, 0)])
def test_sinkhorn_needs_a_temperature_that_float32_can_hold_and_a_round(temperature, iterations):
    with pytest.raises(ValueError, match=f"found {temperature} and {iterations}"):
        balanced.sinkhorn(random(B, K, H, W), temperature, iterations)


def test_sinkhorn_predicts_the_other_views_targets_and_targets_have_no_gradient():
    system = build("sinkhorn")
    views, boxes, flipped, told = batch()
    s1, s2 = aligned([system.network(views[:, v])[1] for v in (0, 1)], boxes, flipped)
    q1, q2 = (balanced.sinkhorn(s, balanced.TEMPERATURE) for s in (s1, s2))
    valid = [True, False, True]
    expected = slow_cross_entropy(s1, q2, 0.1, valid) + slow_cross_entropy(s2, q1, 0.1, valid)
    assert system(views, boxes, flipped, told)[0].item() == pytest.approx(expected.item(), rel=1e-9)
    assert not q1.requires_grad


# --------------------------------------------------------------------------------------- the method


def test_self_distillation_is_slotcon_at_group_weight_one():
    system, (views, boxes, flipped, told) = build("self_distillation"), batch()
    method = SlotCon("tiny", K, HIDDEN, D, group_weight=1.0, temp_teacher=0.04).double().eval()
    method.load_state_dict(system.method.state_dict())
    system.method.center.copy_(random(K) / 9)
    method.center.copy_(random(K) / 9)
    loss, outcome = system(views, boxes, flipped, told)
    expected, report = method(views, boxes, flipped)
    assert (
        system.method.predictor is None
        and loss.equal(expected)
        and outcome.memo.equal(report.center_mean)
    )
    loss.backward(), expected.backward()
    assert system.method.student.prototypes.weight.grad.equal(method.student.prototypes.weight.grad)


def test_without_stop_gradient_the_target_is_moved_too():
    first, second, center = (
        random(B, K, H, W).tanh(),
        random(B, K, H, W, seed=1).tanh(),
        random(K, seed=2) / 9,
    )
    valid = torch.tensor([True, False, True])
    targets = ((second - center[:, None, None]) / 0.04).softmax(1)
    expected = slow_cross_entropy(first, targets, 0.1, valid)
    first.requires_grad_(), second.requires_grad_()
    loss = self_distillation.both_branches(first, second, center, 0.1, 0.04, valid)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    assert second.grad[0].abs().max() > 0 == second.grad[1].abs().max()
    assert first.grad[2].abs().max() > 0 == first.grad[1].abs().max()


def test_the_system_without_stop_gradient_is_its_own_teacher():
    system, (views, boxes, flipped, told) = build("self_distillation", stop_gradient=False), batch()
    for p in system.method.teacher.parameters():
        p.data += 1  # of no consequence
    maps = [
        similarity(
            system.method.student.embed(views[:, v])[1], system.method.student.prototypes.weight
        )
        for v in (0, 1)
    ]
    s1, s2 = aligned(maps, boxes, flipped)
    valid, center = torch.tensor([True, False, True]), torch.zeros(K, dtype=torch.float64)
    expected = sum(
        self_distillation.both_branches(*pair, center, 0.1, 0.04, valid)
        for pair in ((s1, s2), (s2, s1))
    )
    loss, outcome = system(views, boxes, flipped, told)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    assert torch.allclose(outcome.memo, torch.stack(maps).mean((0, 1, 3, 4)))


def test_slotcon_is_the_method_and_after_a_step_center_and_teacher_follow():
    system, (views, boxes, flipped, told) = build("slotcon"), batch()
    method = SlotCon("tiny", K, HIDDEN, D, temp_teacher=0.04).double().eval()
    method.load_state_dict(system.method.state_dict())
    loss, outcome = system(views, boxes, flipped, told)
    assert loss.equal(method(views, boxes, flipped)[0])
    system.method.student.prototypes.weight.data += 1
    before = system.method.teacher.prototypes.weight.clone()
    system.after_step(outcome.memo, 0.75)
    assert torch.allclose(system.method.center, 0.2 * outcome.memo)  # momentum 0.8
    assert torch.allclose(system.method.teacher.prototypes.weight, before + 0.25)


# ---------------------------------------------------------------------------------------- bottom up


@pytest.mark.parametrize("name", ["slot_attention", "independent_queries", "motion", "depth"])
def test_what_is_painted_is_compared_with_the_first_view_at_the_size_of_the_map(name):
    system = build(name)
    views, boxes, flipped, told = batch(told_of(system))
    torch.manual_seed(5)
    painted, masks = system.paint(views[:, 0])
    wanted = told[:, 0] if name == "depth" else views[:, 0]
    total = 0.0
    for b, h, w in itertools.product(range(B), range(H), range(W)):
        target = wanted[b, :, 4 * h : 4 * h + 4, 4 * w : 4 * w + 4].mean((1, 2))
        total += (painted[b, :, h, w] - target).square().mean().item()
    torch.manual_seed(5)  # slots start from noise
    loss = system(views, boxes, flipped, told)[0].item()
    assert loss == pytest.approx(total / (B * H * W), rel=1e-9)
    assert painted.shape == (B, 1 if name == "depth" else 3, H, W)
    assert torch.allclose(masks.sum(1), torch.ones(B, H, W, dtype=torch.float64))
    assert system.sees == ("flow" if name == "motion" else "image")


def test_depth_is_told_in_training_only():
    system, (views, boxes, flipped, told) = build("depth"), batch(1)
    losses = []
    for depth in (told, 1 - told):
        torch.manual_seed(5)
        losses.append(system(views, boxes, flipped, depth)[0].item())
    assert losses[0] != losses[1]
    system.maps(views[:, 0])  # needs no depth


def test_flow_is_painted_around_gray_by_hand():
    flow = torch.tensor([[[[0, 0], [4, -4]]]])  # one scene of 1 x 2 px
    painted = motion.flow_image(flow)
    assert painted.dtype == torch.uint8 and painted.tolist() == [
        [[[128, 252]], [[128, 4]], [[128, 128]]]
    ]


def test_slots_are_matched_as_the_best_of_all_permutations():
    slots, others = random(B, 5, D), random(B, 5, D, seed=1)
    found = slot_matching.match_slots(slots, others)
    for b in range(B):
        cosines = [
            [torch.cosine_similarity(s, o, dim=0).item() for o in others[b]] for s in slots[b]
        ]
        best = max(
            itertools.permutations(range(5)),
            key=lambda order: sum(cosines[i][j] for i, j in enumerate(order)),
        )
        assert found[b].tolist() == list(best)


def test_slots_that_changed_places_are_found_again_by_hand():
    slots = torch.eye(4)[None]
    order = [2, 0, 3, 1]
    assert slot_matching.match_slots(slots, 3 * slots[:, order]).tolist() == [[1, 3, 0, 2]]


def test_matched_slots_attract_and_all_others_repel():
    prediction, target = random(B, 4, D), random(B, 4, D, seed=1)
    matching = torch.tensor([[1, 0, 3, 2], [0, 1, 2, 3], [3, 1, 0, 2]])
    positives = [4 * b + matching[b, k].item() for b in range(B) for k in range(4)]
    expected = slow_contrast(
        rearrange(prediction, "b k d -> (b k) d"),
        rearrange(target, "b k d -> (b k) d"),
        positives,
        0.2,
    )
    prediction.requires_grad_(), target.requires_grad_()
    loss = slot_matching.matched_contrast(prediction, target, matching, 0.2)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    assert target.grad is None and prediction.grad.abs().max() > 0


def test_slot_matching_matches_slots_and_contrasts_predictions():
    system, (views, *rest) = build("slot_matching"), batch()
    torch.manual_seed(5)
    students = [system.student(views[:, v])[0] for v in (0, 1)]
    teachers = [system.teacher(views[:, v])[0] for v in (0, 1)]
    expected = 0
    for student, teacher in ((students[0], teachers[1]), (students[1], teachers[0])):
        rows = torch.stack([system.predictor(slots) for slots in student])
        expected += slot_matching.matched_contrast(
            rows, teacher, slot_matching.match_slots(student, teacher), 0.2
        )
    torch.manual_seed(5)
    assert system(views, *rest)[0].item() == pytest.approx(expected.item(), rel=1e-9)


# ------------------------------------------------------------------------------------------ scenes


def test_scenes_stack_what_is_told_behind_what_is_seen():
    plain = Scenes(3, 4)
    assert (
        plain.images.shape == (4, 3, 64, 64)
        and plain.images.dtype == torch.uint8
        and len(plain) == 4
    )
    depth = Scenes(3, 4, told="depth")
    assert depth[2][:3].equal(plain[2]) and set(depth[2][3].unique().tolist()) >= {0, 255}
    flow = Scenes(3, 4, sees="flow")
    assert flow.colors.equal(plain.images) and not flow.images.equal(plain.images)
    assert flow.images.shape == (4, 3, 64, 64)
    assert flow.semantic.equal(plain.semantic)
    flat = Scenes(3, 4, preset="flat")
    assert flat.semantic.equal(plain.semantic) and not flat.images.equal(plain.images)


@pytest.mark.parametrize("kind", ["grid", "color", "truth"])
def test_every_pixel_has_exactly_one_mask(kind):
    scenes = Scenes(3, 3, told=kind)
    masks = scenes.images[:, 3:]
    assert masks.shape[1] == given_masks.MASKS and set(masks.unique().tolist()) == {0, 255}
    assert (masks == 255).sum(1).eq(1).all()
    numbers = masks.argmax(1)
    if kind == "truth":
        assert numbers.equal(scenes.regions.long())
    if kind == "grid":
        assert numbers[0, ::25, ::25].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]] and numbers[
            0
        ].equal(numbers[1])
    with pytest.raises(ValueError, match="masks are grid, color or truth, found 'edges'"):
        scenes.masks("edges")


def test_regions_are_the_objects_and_both_kinds_of_stuff():
    scenes = Scenes(3, 6)
    for i in range(6):
        regions, semantic, instance = scenes.regions[i], scenes.semantic[i], scenes.instance[i]
        assert regions[instance > 0].equal(instance[instance > 0] + 1)
        stuff = regions[instance == 0]
        kinds = semantic[instance == 0]
        assert len(kinds.unique()) <= 2 and set(stuff.unique().tolist()) <= {0, 1}
        for number in stuff.unique():
            assert len(kinds[stuff == number].unique()) == 1
    assert stuff_of(torch.tensor([[[2, 1], [7, 2]]])).tolist() == [[[1, 0], [1, 1]]]
