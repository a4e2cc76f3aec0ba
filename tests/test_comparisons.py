"""The systems of comparisons/: each loss against a slow loop, gradients where they belong."""

import dataclasses
import itertools
import math
import random as random_module

import numpy as np
import pytest
import torch
from einops import rearrange, reduce

import comparisons
import recipes
from comparisons import common, dense, given_masks, kmeans, motion, self_distillation, slot_matching
from comparisons import sinkhorn as balanced
from comparisons.scenes import Scenes, whole_scene
from comparisons.slot_attention import PLACES
from grouping import inverse_augmentation
from slotcon import SlotCon
from trained import random

B, K, D, HIDDEN, H, W = 3, 6, 7, 9, 4, 5  # h w of the map: a view has 16 x 20 px
SIZES = dict(arch="tiny", num_prototypes=K, dim_hidden=HIDDEN, dim_out=D)
C = dataclasses.replace(recipes.Config(), **SIZES, temp_teacher=0.04, momentum_center=0.8)
ROWS = [(name, row.arguments) for name, rows in comparisons.VARIANTS.items() for row in rows]
SLOTS = ["slot_attention", "independent_queries", "motion", "depth"]  # with their own encoder
VALID = torch.tensor([True, False, True])  # image 1's crops do not overlap


def build(name, seed=0, **more):
    """A system in float64 whose batch norms are fixed: an image does not depend on the others."""
    torch.manual_seed(seed)
    system = comparisons.build(name, C, **more).double()
    for p in system.parameters():
        if p.ndim > 1:  # a projector starts with weights so small that all pixels look alike
            p.data = p.data / p.data.std().clamp(min=1e-9) * math.sqrt(2 / p[0].numel())
    for student, teacher in (("student", "teacher"), ("network", "labeler")):
        if hasattr(system, teacher):  # related, and not equal
            networks = (getattr(system, name).parameters() for name in (teacher, student))
            for p, own in zip(*networks):
                p.data = own.data + 0.1 * random(*p.shape, seed=12) * own.data.std(correction=0)
    return system.eval()


def batch(system=None):
    """views, boxes, flipped, and the extra input that the system needs."""
    views, flipped = random(B, 2, 3, 4 * H, 4 * W, seed=7), random(B, 2, seed=8) > 0
    low = random(B, 2, 2, seed=9).sigmoid() * 0.4
    high = 1 - random(B, 2, 2, seed=10).sigmoid() * 0.4
    boxes = torch.cat([low, high], dim=2)
    boxes[1] = 0
    channels = given_masks.MASKS if system and system.extra else 0
    return views, boxes, flipped, random(B, 2, channels, 4 * H, 4 * W, seed=11).sigmoid()


def aligned(maps, boxes, flipped):
    return [inverse_augmentation(maps[i], boxes[:, i], flipped[:, i]) for i in (0, 1)]


def one_hot(labels):
    """(b h w) -> (b k h w)."""
    return torch.nn.functional.one_hot(labels, K).permute(0, 3, 1, 2).double()


def slow_contrast(queries, keys, positives, temperature):
    """Rows as lists of vectors; the loss in the form of MoCo v3."""
    total = 0
    for query, positive in zip(queries, positives):
        cosines = torch.stack([query @ key / (query.norm() * key.norm()) for key in keys])
        cosines = cosines / temperature
        total = total - (cosines[positive] - cosines.exp().sum().log())
    return 2 * temperature * total / len(queries)


def slow_cross_entropy(maps, targets, temperature, valid):
    """maps, targets (b k h w): mean over the places of the valid images."""
    values = []
    for b, h, w in itertools.product(range(len(maps)), range(H), range(W)):
        if valid[b]:
            p = (maps[b, :, h, w] / temperature).exp()
            values.append(-(targets[b, :, h, w] * (p / p.sum()).log()).sum())
    return sum(values) / len(values)


def assert_equal(found, expected):
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("name, arguments", ROWS)
def test_the_loss_moves_every_weight_that_is_trained_and_nothing_else(name, arguments):
    system = build(name, **arguments)
    views, *rest = batch(system)
    views.requires_grad_()
    loss, _ = system(views, *rest)
    loss.backward()
    assert loss.ndim == 0 and loss.isfinite() and views.grad.abs().max() > 0
    centers = "network.prototypes" if name in ("kmeans", "picie") else "teacher"  # from clustering
    for path, p in system.named_parameters():
        frozen = any(part in path for part in ("teacher", "labeler", centers))
        assert p.requires_grad != frozen, path
        if frozen:
            assert p.grad is None, path
        else:
            assert p.grad is not None and (p.ndim == 1 or p.grad.abs().max() > 0), path


@pytest.mark.parametrize("name", comparisons.SYSTEMS)
def test_the_judged_backbone_follows_what_was_learned(name):
    system = build(name)
    followed = any("teacher" in path for path, _ in system.named_modules())
    assert all(p.requires_grad != followed for p in system.backbone.parameters())
    before = [p.clone() for p in system.backbone.parameters()]
    teacher = [p.clone() for p in getattr(system, "teacher", system).parameters()]
    optimizer = torch.optim.SGD([p for p in system.parameters() if p.requires_grad], 0.1)
    loss, memo = system(*batch(system))
    loss.backward()
    optimizer.step()
    system.after_step(memo, 0.75)
    assert all((p != q).any() for p, q in zip(system.backbone.parameters(), before) if p.ndim > 1)
    if isinstance(system, common.StudentTeacher):
        for p, q, own in zip(system.teacher.parameters(), teacher, system.student.parameters()):
            assert torch.allclose(p, 0.75 * q + 0.25 * own)


@pytest.mark.parametrize("name", comparisons.SYSTEMS)
def test_groups_are_one_map_per_group_and_do_not_depend_on_the_rest_of_the_batch(name):
    system, images = build(name), batch()[0][:, 0]
    maps = system.maps(images)
    if maps is None:
        assert name in ("moco", "dense", "given_masks") and not system.per_image
        return
    assert maps.shape[:2] == (B, slot_matching.NUM_SLOTS if system.per_image else K)
    if not system.per_image:
        assert torch.allclose(system.maps(images[1:2]), maps[1:2])


def test_all_systems_start_from_the_same_backbone():
    starts = []
    for name in comparisons.SYSTEMS.keys() - SLOTS:
        torch.manual_seed(3)
        starts.append(comparisons.build(name, C).backbone[0].weight)
    assert all(start.equal(starts[0]) for start in starts)


def test_without_any_overlap_a_loss_is_a_zero_with_a_gradient():
    maps, nowhere = random(B, K, H, W).requires_grad_(), torch.zeros(B, dtype=torch.bool)
    for loss in (
        common.target_loss(maps, random(B, K, H, W).softmax(1), 0.1, nowhere),
        dense.place_contrast(maps, maps.detach(), nowhere, 0.2),
    ):
        loss.backward()
        assert loss.item() == 0 and maps.grad.abs().max() == 0


def test_moco_contrasts_whole_images():
    system, (views, *rest) = build("moco"), batch()
    queries, keys = (
        [network.projector(network.backbone(views[:, v]).mean((2, 3))) for v in (0, 1)]
        for network in (system.student, system.teacher)
    )
    pairs = [(system.predictor(queries[v]), keys[1 - v]) for v in (0, 1)]
    expected = sum(slow_contrast(*pair, range(B), 0.2) for pair in pairs)
    assert_equal(system(views, *rest)[0], expected)


def test_dense_contrasts_places_among_all_places_of_images_that_overlap():
    system = build("dense")
    views, boxes, flipped, extra = batch()
    queries = [system.predictor(system.student(views[:, v])) for v in (0, 1)]
    keys = [system.teacher(views[:, v]) for v in (0, 1)]
    (q1, q2), (k1, k2) = aligned(queries, boxes, flipped), aligned(keys, boxes, flipped)
    expected, side = 0, dense.PLACES
    for pair in ((q1, k2), (q2, k1)):
        pooled = [torch.nn.functional.adaptive_avg_pool2d(maps[VALID], side) for maps in pair]
        rows = [rearrange(maps, "b d h w -> (b h w) d") for maps in pooled]
        expected += slow_contrast(*rows, range(2 * side**2), 0.2)
    assert_equal(system(views, boxes, flipped, extra)[0], expected)


def test_pool_in_masks_is_the_mean_under_each_mask():
    embeddings, masks = random(B, D, H, W), (random(B, K, 4 * H, 4 * W, seed=1) > 0.3).double()
    masks[0, 2], masks[1, 3] = 0, 0
    masks[1, 3, :2, :4] = 1  # half a cell
    slots, seen = given_masks.pool_in_masks(embeddings, masks)
    for b, k in itertools.product(range(B), range(K)):
        total, weight = torch.zeros(D, dtype=torch.float64), 0.0
        for h, w in itertools.product(range(H), range(W)):
            share = masks[b, k, 4 * h : 4 * h + 4, 4 * w : 4 * w + 4].mean().item()
            total, weight = total + share * embeddings[b, :, h, w], weight + share
        assert bool(seen[b, k]) == (weight >= 1)
        if weight:  # every cell counts 1e-6 more
            assert torch.allclose(slots[b, k], total / weight, rtol=1e-4, atol=1e-5)
    assert not seen[0, 2] and not seen[1, 3] and seen.sum() > K


def test_given_masks_contrast_each_mask_with_itself_in_the_other_view():
    system = build("given_masks", masks="truth")
    views, boxes, flipped, masks = batch(system)
    masks[0, 0, 4] = 0  # in one view only: a key, never a query
    pooled = [
        [given_masks.pool_in_masks(network(views[:, v]), masks[:, v]) for v in (0, 1)]
        for network in (system.student, system.teacher)
    ]
    expected = 0
    for v in (0, 1):
        (slots, seen), (targets, there) = pooled[0][v], pooled[1][1 - v]
        places = [(b, k) for b in range(B) for k in range(given_masks.MASKS) if there[b, k]]
        queries = [place for place in places if seen[place]]
        rows = system.predictor(torch.stack([slots[place] for place in queries]))
        positives = [places.index(place) for place in queries]
        expected += slow_contrast(rows, [targets[place] for place in places], positives, 0.2)
        assert len(queries) < B * given_masks.MASKS
    assert_equal(system(views, boxes, flipped, masks)[0], expected)


def test_k_means_moves_every_center_to_the_mean_of_its_rows_and_no_cluster_is_empty():
    rows = torch.cat([random(20, 2) / 9, random(30, 2) / 9 + 5])
    centers = kmeans.cluster(rows, 2, torch.Generator().manual_seed(0))
    means = torch.stack([rows[:20].mean(0), rows[20:].mean(0)])
    assert torch.allclose(centers[centers[:, 0].argsort()], means)
    slow = [min(range(2), key=lambda k: (row - centers[k]).norm().item()) for row in rows]
    assert kmeans.nearest_center(rows, centers).tolist() == slow
    rows = torch.tensor([[0.0, 0], [5, 0], [5, 3]]).double().repeat_interleave(20, 0)
    rows[20:] += random(40, 2) / 9  # the others are equal, so two centers may start at one place
    for seed in range(20):
        centers = kmeans.cluster(rows, 3, torch.Generator().manual_seed(seed))
        assert len(kmeans.nearest_center(rows, centers).unique()) == 3


def test_k_means_pseudo_labels_come_from_the_copy_and_each_view_has_its_own():
    system = build("kmeans")
    views, *rest = batch()
    found, expected = system(views, *rest)[0], 0
    for v in (0, 1):
        labels = system.labeler(views[:, v])[1].argmax(1)
        maps = system.network(views[:, v])[1]
        expected += slow_cross_entropy(maps, one_hot(labels), 0.1, [True] * B) / 2
    assert_equal(found, expected)


def test_pseudo_labels_change_once_per_epoch_only(monkeypatch):
    monkeypatch.setattr(kmeans, "EPOCH", 3)
    system, copies = build("kmeans"), []
    for step in range(1, 7):
        loss, memo = system(*batch())
        loss.backward()
        for p in system.network.parameters():
            p.data -= 0 if p.grad is None else 0.1 * p.grad
        system.zero_grad()
        system.after_step(memo, 0.9)
        copies.append(system.labeler.backbone[0].weight.clone())
        same = copies[-1].equal(system.network.backbone[0].weight)
        assert same == (step % 3 == 0)
    changed = [not a.equal(b) for a, b in itertools.pairwise(copies)]
    assert changed == [False, True, False, False, True]
    assert system.network.prototypes.weight.equal(system.labeler.prototypes.weight)


def test_picie_asks_each_view_for_its_own_and_for_the_other_views_labels():
    system = build("picie")
    views, boxes, flipped, extra = batch()
    found = system(views, boxes, flipped, extra)[0]
    maps = aligned([system.network(views[:, v])[1] for v in (0, 1)], boxes, flipped)
    seen = aligned([system.labeler(views[:, v])[1] for v in (0, 1)], boxes, flipped)
    targets = [one_hot(m.argmax(1)) for m in seen]
    expected = sum(slow_cross_entropy(s, y, 0.1, VALID) for s in maps for y in targets) / 4
    assert_equal(found, expected)
    assert (targets[0] != targets[1]).any()


def test_sinkhorn_alternates_between_equal_prototypes_and_whole_pixels():
    maps = random(B, K, H, W).tanh()
    q = np.exp(maps.numpy() / 0.3)
    for _ in range(2):
        for k in range(K):
            q[:, k] /= q[:, k].sum()
        for b, h, w in itertools.product(range(B), range(H), range(W)):
            q[b, :, h, w] /= q[b, :, h, w].sum()
    found = balanced.sinkhorn(maps, 0.3, iterations=2)
    assert torch.allclose(found, torch.from_numpy(q), rtol=1e-9)
    # Four pixels that prefer one of two prototypes are split evenly.
    same = torch.tensor([1.0, -1.0]).reshape(1, 2, 1, 1).expand(1, 2, 2, 2)
    assert balanced.sinkhorn(same, 0.1).eq(0.5).all()
    share = reduce(balanced.sinkhorn(maps, 0.1, iterations=50), "b k h w -> k", "mean")
    assert (share * maps.shape[1] - 1).abs().max() < 1e-3


def test_sinkhorn_predicts_the_other_views_targets_and_targets_have_no_gradient():
    system = build("sinkhorn")
    views, boxes, flipped, extra = batch()
    s1, s2 = aligned([system.network(views[:, v])[1] for v in (0, 1)], boxes, flipped)
    q1, q2 = (balanced.sinkhorn(s, balanced.TEMPERATURE) for s in (s1, s2))
    expected = sum(slow_cross_entropy(s, q, 0.1, VALID) for s, q in ((s1, q2), (s2, q1)))
    assert_equal(system(views, boxes, flipped, extra)[0], expected)
    assert not q1.requires_grad


@pytest.mark.parametrize("name, weight", [("slotcon", 0.5), ("self_distillation", 1.0)])
def test_slotcon_is_the_method_and_self_distillation_the_method_at_group_weight_one(name, weight):
    system, (views, boxes, flipped, extra) = build(name), batch()
    method = SlotCon(**SIZES, group_weight=weight, temp_teacher=0.04).double().eval()
    system.method.center.copy_(random(K) / 9)
    method.load_state_dict(system.method.state_dict())
    loss, memo = system(views, boxes, flipped, extra)
    expected, report = method(views, boxes, flipped)
    assert loss.equal(expected) and memo.equal(report.center_mean)
    loss.backward(), expected.backward()
    assert system.method.student.prototypes.weight.grad.equal(method.student.prototypes.weight.grad)


def test_without_stop_gradient_the_target_is_moved_too():
    first, second = random(B, K, H, W).tanh(), random(B, K, H, W, seed=1).tanh()
    center = random(K, seed=2) / 9
    targets = ((second - center[:, None, None]) / 0.04).softmax(1)
    expected = slow_cross_entropy(first, targets, 0.1, VALID)
    first.requires_grad_(), second.requires_grad_()
    loss = self_distillation.both_branches(first, second, center, 0.1, 0.04, VALID)
    loss.backward()
    assert_equal(loss, expected)
    assert second.grad[0].abs().max() > 0 == second.grad[1].abs().max()
    assert first.grad[2].abs().max() > 0 == first.grad[1].abs().max()


def test_the_system_without_stop_gradient_is_its_own_teacher():
    system = build("self_distillation", stop_gradient=False)
    views, boxes, flipped, extra = batch()
    for p in system.method.teacher.parameters():
        p.data += 1  # of no consequence
    maps = [system.method.student(views[:, v])[1] for v in (0, 1)]
    s1, s2 = aligned(maps, boxes, flipped)
    numbers = torch.zeros(K, dtype=torch.float64), 0.1, 0.04, VALID
    expected = sum(self_distillation.both_branches(*p, *numbers) for p in ((s1, s2), (s2, s1)))
    loss, memo = system(views, boxes, flipped, extra)
    assert_equal(loss, expected)
    assert torch.allclose(memo, torch.stack(maps).mean((0, 1, 3, 4)))


@pytest.mark.parametrize("name", SLOTS)
def test_what_is_painted_is_compared_with_random_places_of_the_scene_at_half_its_size(name):
    system = build(name)
    views, *rest = batch(system)
    torch.manual_seed(5)
    places = torch.randperm(4 * H * W)[:PLACES]  # the order: then slots start from noise
    painted, masks = system.paint(views[:, 0], places)
    total = 0
    for b, n in itertools.product(range(B), range(len(places))):
        y, x = divmod(places[n].item(), 2 * W)
        target = views[b, 0, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].mean((1, 2))
        total += (painted[b, :, n] - target).square().mean()
    torch.manual_seed(5)
    assert_equal(system(views, *rest)[0], total / (B * len(places)))
    assert painted.shape == (B, 3, len(places))
    assert torch.allclose(masks.sum(1), torch.ones(B, len(places), dtype=torch.float64))
    assert system.sees == dict(motion="flow", depth="depth").get(name, "image") and system.whole


def test_slot_matching_attracts_the_best_of_all_pairings_and_repels_all_others():
    system, (views, *rest) = build("slot_matching"), batch()
    torch.manual_seed(5)
    students = [system.student(views[:, v])[0] for v in (0, 1)]
    teachers = [system.teacher(views[:, v])[0] for v in (0, 1)]
    expected = 0
    for student, teacher in zip(students, teachers[::-1]):
        b, k, _ = student.shape
        cosines = torch.cosine_similarity(student[:, :, None], teacher[:, None], dim=3).tolist()
        orders = list(itertools.permutations(range(k)))
        best = [max(orders, key=lambda o: sum(map(list.__getitem__, c, o))) for c in cosines]
        positives = [k * i + best[i][j] for i in range(b) for j in range(k)]
        rows = system.predictor(rearrange(student, "b k d -> (b k) d"))
        expected += slow_contrast(rows, rearrange(teacher, "b k d -> (b k) d"), positives, 0.2)
    torch.manual_seed(5)
    assert_equal(system(views, *rest)[0], expected)


def test_scenes_stack_the_extra_input_behind_the_image():
    plain, grid, flow = Scenes(3, 4), Scenes(3, 4, extra="grid"), Scenes(3, 4, sees="flow")
    assert plain.images.shape == flow.images.shape == (4, 3, 64, 64) and len(plain) == 4
    assert grid[2][:3].equal(plain[2]) and set(grid[2][3].unique().tolist()) == {0, 255}
    depth = Scenes(3, 4, sees="depth")
    both = torch.cat([plain.depth[:, None], depth.images], dim=1)
    pixels = rearrange(both, "n c y x -> (n y x) c").unique(dim=0)  # every depth has a color
    assert len(pixels) == len(plain.depth.unique()) == len(pixels[:, 1:].unique(dim=0))
    assert flow.colors.equal(plain.images) and not flow.images.equal(plain.images)
    flat = Scenes(3, 4, preset="flat")
    assert flat.semantic.equal(plain.semantic) and not flat.images.equal(plain.images)
    painted = motion.flow_image(torch.tensor([[[[0, 0], [4, -4]]]]))  # one scene of 1 x 2 px
    assert painted.tolist() == [[[[128, 252]], [[128, 4]], [[128, 128]]]]


@pytest.mark.parametrize("kind", ["grid", "color", "truth"])
def test_every_pixel_has_exactly_one_mask_and_the_true_ones_are_things_and_stuff(kind):
    scenes = Scenes(3, 3, extra=kind)
    masks = scenes.images[:, 3:]
    assert masks.shape[1] == given_masks.MASKS and set(masks.unique().tolist()) == {0, 255}
    assert (masks == 255).sum(1).eq(1).all()
    if kind == "grid":
        assert masks.argmax(1)[1, ::25, ::25].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    if kind == "truth":
        regions, things = scenes.regions, scenes.instance > 0
        assert masks.argmax(1).equal(regions.long())
        assert regions[things].equal(scenes.instance[things] + 1)
        for region, semantic in zip(regions, scenes.semantic):
            assert all(len(semantic[region == stuff].unique()) <= 1 for stuff in (0, 1))


def test_a_whole_scene_is_one_view_that_lies_in_one_of_eight_ways():
    image, rng = torch.arange(3 * 16).reshape(3, 4, 4), random_module.Random(0)
    batches = [whole_scene(image, rng) for _ in range(80)]
    seen = {batch.views.flatten().numpy().tobytes() for batch in batches}
    assert len(seen) == 8 and image.flatten().numpy().tobytes() in seen
    for views, boxes, flipped in batches:
        assert views.shape == (1, 3, 4, 4) and boxes.shape == (1, 4) and flipped.shape == (1,)
        assert views[0, 0].unique().equal(image[0].unique())


def test_blocks_divide_every_scene_by_place_alone():
    blocks = Scenes(3, 2).blocks
    assert blocks.shape == (2, 64, 64) and blocks.unique().tolist() == [*range(8)]
    assert blocks[1, 31, 15] == 0 and blocks[1, 31, 16] == 1 and blocks[0, 32, 63] == 7
