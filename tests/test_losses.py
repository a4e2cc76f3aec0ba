"""losses.py: what is asked of the student, in one process.

Promised: each loss is its formula; invalid images and missing queries leave a zero that still has a
gradient, never an exception; the teacher gets none; the order of the prototypes does not matter.
Several processes: test_processes.py.
"""

import math

import pytest
import torch

import losses
from engine import ranks
from slots import SlotPredictor

B, K, D, H, W = 3, 5, 7, 4, 6
ORDER = torch.tensor([3, 0, 4, 1, 2])
ALL = torch.ones(B, dtype=torch.bool)


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def two_maps():
    return random(B, K, H, W).tanh(), random(B, K, H, W, seed=1).tanh()


# -------------------------------------------------------------------------------------- other ranks


def test_a_process_on_its_own_is_the_first_of_one_and_exchanges_nothing():
    x = random(B, D)
    assert ranks.rank_and_world_size() == (0, 1)
    assert ranks.sum_over_ranks(x) is x
    assert ranks.gather_rows(x, [B]) is x


@pytest.mark.parametrize("counts", [[B - 1], [B, B], []])
def test_rows_are_gathered_only_where_the_counts_are_right(counts):
    with pytest.raises(ValueError, match="rank 0 of 1 holds 3 rows, but the counts say"):
        ranks.gather_rows(random(B, D), counts)


# -------------------------------------------------------------------------------- group consistency


def consistency_slowly(student, teacher, center, temp_student, temp_teacher, valid):
    values = []
    for b in range(B):
        for h in range(H):
            for w in range(W):
                target = [
                    math.exp((teacher[b, k, h, w] - center[k]) / temp_teacher) for k in range(K)
                ]
                chance = [math.exp(student[b, k, h, w] / temp_student) for k in range(K)]
                if valid[b]:
                    values.append(
                        -sum(
                            t / sum(target) * math.log(c / sum(chance))
                            for t, c in zip(target, chance)
                        )
                    )
    return sum(values) / len(values)


@pytest.mark.parametrize("valid", [[True, True, True], [True, False, True], [False, True, False]])
def test_the_group_loss_is_the_mean_cross_entropy_over_the_pixels_of_overlapping_crops(valid):
    student, teacher = two_maps()
    center, valid = random(K, seed=2) / 10, torch.tensor(valid)
    found = losses.group_consistency(student, teacher, center, 0.1, 0.07, valid)
    expected = consistency_slowly(student, teacher, center, 0.1, 0.07, valid)
    assert found.item() == pytest.approx(expected, rel=1e-12)
    assert found.dtype == torch.float64


def test_of_two_prototypes_with_shares_2_to_1_and_3_to_1_the_group_loss_is_known():
    student = torch.tensor([0.1 * math.log(3), 0.0]).reshape(1, 2, 1, 1)
    teacher = torch.tensor([0.05 * math.log(2), 0.0]).reshape(1, 2, 1, 1)
    found = losses.group_consistency(
        student, teacher, torch.zeros(2), 0.1, 0.05, torch.tensor([True])
    )
    assert found.item() == pytest.approx(-2 / 3 * math.log(3 / 4) - 1 / 3 * math.log(1 / 4))


def test_a_student_that_sees_no_difference_pays_ln_k():
    _, teacher = two_maps()
    found = losses.group_consistency(
        torch.zeros_like(teacher), teacher, torch.zeros(K), 0.1, 0.07, ALL
    )
    assert found.item() == pytest.approx(math.log(K))


def test_identical_views_with_equal_temperatures_and_no_center_pay_the_entropy_and_no_less():
    maps, other = two_maps()
    found = losses.group_consistency(maps, maps, torch.zeros(K), 0.1, 0.1, ALL)
    p = (maps / 0.1).softmax(1)
    assert found.item() == pytest.approx(-(p * p.log()).sum(1).mean().item())
    assert losses.group_consistency(other, maps, torch.zeros(K), 0.1, 0.1, ALL) > found


def test_permuting_the_prototypes_does_not_change_the_group_loss():
    (student, teacher), center = two_maps(), random(K, seed=2)
    found = losses.group_consistency(
        student[:, ORDER], teacher[:, ORDER], center[ORDER], 0.1, 0.07, ALL
    )
    assert found.item() == pytest.approx(
        losses.group_consistency(student, teacher, center, 0.1, 0.07, ALL).item()
    )


def test_only_differences_within_the_center_count():
    (student, teacher), center = two_maps(), random(K, seed=2)
    found = losses.group_consistency(student, teacher, center + 3, 0.1, 0.07, ALL)
    assert found.item() == pytest.approx(
        losses.group_consistency(student, teacher, center, 0.1, 0.07, ALL).item()
    )


def test_the_group_loss_gives_no_gradient_to_the_teacher_the_center_or_an_image_without_overlap():
    (student, teacher), center = two_maps(), torch.zeros(K, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (student, teacher, center)]
    losses.group_consistency(*leaves, 0.1, 0.07, torch.tensor([True, False, True])).backward()
    assert teacher.grad is None and center.grad is None
    assert student.grad.abs().sum((1, 2, 3)).gt(0).tolist() == [True, False, True]


def test_with_no_overlap_anywhere_the_group_loss_is_a_zero_that_has_a_gradient_of_zeros():
    student, teacher = two_maps()
    student.requires_grad_()
    loss = losses.group_consistency(student, teacher, torch.zeros(K), 0.1, 0.07, ~ALL)
    loss.backward()
    assert loss.item() == 0
    assert student.grad.eq(0).all()


@pytest.mark.parametrize(
    "student, teacher, center",
    [
        ((B, K, H, W), (B, K, W, H), (K,)),
        ((B, K, H, W), (B, K, H, W), (K - 1,)),
        ((B, K, H, W), (B, K, H, W), (1, K)),
    ],
)
def test_maps_and_center_that_do_not_fit_are_named(student, teacher, center):
    with pytest.raises(
        ValueError, match=r"do not fit: expected \(b k h w\), \(b k h w\) and \(k\)"
    ):
        losses.group_consistency(
            random(*student), random(*teacher), random(*center), 0.1, 0.07, ALL
        )


# ------------------------------------------------------------------------------------------ center


def test_the_mean_over_pixels_is_over_images_views_and_places():
    views = list(two_maps())
    found = losses.mean_over_pixels(views)
    assert found.shape == (K,)
    for k in range(K):
        values = [
            view[b, k, h, w].item()
            for view in views
            for b in range(B)
            for h in range(H)
            for w in range(W)
        ]
        assert found[k].item() == pytest.approx(sum(values) / len(values))


def test_the_center_moves_a_tenth_of_the_way_in_place():
    center = torch.tensor([1.0, 0.0, -2.0])
    losses.update_center(center, torch.tensor([2.0, 0.5, -2.0], dtype=torch.float64), 0.9)
    assert center.dtype == torch.float32
    assert center.tolist() == pytest.approx([1.1, 0.05, -2.0])


def test_a_center_of_momentum_one_stays_and_of_momentum_zero_jumps():
    mean = random(K)
    for momentum, expected in ((1.0, torch.zeros(K, dtype=torch.float64)), (0.0, mean)):
        center = torch.zeros(K, dtype=torch.float64)
        losses.update_center(center, mean, momentum)
        assert torch.allclose(center, expected)


# -------------------------------------------------------------------------------- who is contrasted


def masks(seed=0):
    return random(B, K, seed=seed) > 0, random(B, K, seed=seed + 1) > 0


def test_queries_are_occupied_in_both_views_and_every_occupied_teacher_slot_is_a_key():
    directions = [masks(0), masks(2)]
    found = losses.pair_slots([s for s, _ in directions], [t for _, t in directions])
    assert len(found) == 2
    for (student, teacher), pairs in zip(directions, found):
        keys = [b * K + k for b in range(B) for k in range(K) if teacher[b, k]]
        queries = [b * K + k for b in range(B) for k in range(K) if student[b, k] and teacher[b, k]]
        assert pairs.queries.tolist() == queries and pairs.keys.tolist() == keys
        assert pairs.positives.tolist() == [keys.index(q) for q in queries]
        assert pairs.keys_per_rank == [len(keys)] and pairs.num_queries == len(queries) > 2


def test_two_images_of_three_prototypes_pair_as_on_paper():
    student = torch.tensor([[True, True, False], [False, True, True]])
    teacher = torch.tensor([[True, False, True], [True, True, False]])
    (pairs,) = losses.pair_slots([student], [teacher])
    assert pairs.keys.tolist() == [0, 2, 3, 4]
    assert pairs.queries.tolist() == [0, 4] and pairs.positives.tolist() == [0, 3]


def test_without_a_common_slot_there_are_no_queries():
    nothing = torch.zeros(B, K, dtype=torch.bool)
    (pairs,) = losses.pair_slots([nothing], [~nothing])
    assert pairs.num_queries == 0 and pairs.queries.numel() == 0 and pairs.keys.numel() == B * K


# ------------------------------------------------------------------------------------ slot contrast


def contrast_inputs(count=None):
    """Slots of both networks, a predictor in evaluation mode, and the pairs (only the first `count`
    queries).
    """
    student, teacher = masks()
    if count is not None:
        keep = (student & teacher).flatten().nonzero().flatten()[:count]
        student = torch.zeros(B * K, dtype=torch.bool).index_fill(0, keep, True).reshape(B, K)
    predictor = SlotPredictor(D, D, 9).double().eval()
    for i, p in enumerate(predictor.parameters()):
        p.data = random(*p.shape, seed=10 + i)
    (pairs,) = losses.pair_slots([student], [teacher])
    return (
        random(B, K, D, seed=4).requires_grad_(),
        random(B, K, D, seed=5).requires_grad_(),
        predictor,
        pairs,
    )


def unit(row):
    return row / math.sqrt(sum(x * x for x in row.tolist()))


def test_a_slot_is_contrasted_with_every_occupied_slot_of_every_image():
    student_slots, teacher_slots, predictor, pairs = contrast_inputs()
    student, teacher = masks()
    terms = []
    for b in range(B):
        for k in range(K):
            if not (student[b, k] and teacher[b, k]):
                continue
            query = unit(predictor(student_slots[b, k][None])[0].detach())
            logits = {
                (i, j): query @ unit(teacher_slots[i, j].detach()) / 0.2
                for i in range(B)
                for j in range(K)
                if teacher[i, j]
            }
            chances = {place: math.exp(x) for place, x in logits.items()}
            terms.append(-math.log(chances[b, k] / sum(chances.values())))
    found = losses.slot_contrast(student_slots, teacher_slots, predictor, pairs, 0.2)
    assert found.item() == pytest.approx(0.4 * sum(terms) / len(terms), rel=1e-10)


def test_a_contrast_in_parts_has_the_value_and_the_gradient_of_the_whole(monkeypatch):
    found = []
    for most in (2**22, 1, 2 * 9):  # all rows at once, one at a time, two at a time
        monkeypatch.setattr(losses, "MOST_LOGITS", most)
        student_slots, teacher_slots, predictor, pairs = contrast_inputs()
        loss = losses.slot_contrast(student_slots, teacher_slots, predictor, pairs, 0.2)
        loss.backward()
        numbers = (loss.detach(), student_slots.grad, predictor.mlp[0].weight.grad)
        found.append(torch.cat([x.flatten() for x in numbers]))
    assert len(pairs.queries) > 2
    assert torch.allclose(found[1], found[0], rtol=1e-9) and torch.allclose(
        found[2], found[0], rtol=1e-9
    )


@pytest.mark.parametrize(
    "kind, expected",
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_unit_rows_have_length_one_in_single_precision_or_better(kind, expected):
    rows = random(B, D).to(kind)
    found = losses.unit(rows)
    assert found.dtype == expected
    for row, vector in zip(rows.double(), found.double()):
        assert torch.allclose(vector, unit(row), rtol=1e-6)


def test_the_cross_entropy_of_a_contrast_is_summed_over_its_rows():
    rows, keys, positives = (
        losses.unit(random(B, D)),
        losses.unit(random(4, D, seed=1)),
        torch.tensor([2, 0, 3]),
    )
    terms = [
        math.log(sum(math.exp(row @ key / 0.3) for key in keys)) - row @ keys[p] / 0.3
        for row, p in zip(rows, positives)
    ]
    assert losses.contrast(rows, positives, keys, 0.3).item() == pytest.approx(
        sum(terms).item(), rel=1e-10
    )


def test_two_orthogonal_slots_that_find_themselves_pay_the_softmax_of_one_against_nothing():
    slots, present = 3 * torch.eye(2)[None], torch.ones(1, 2, dtype=torch.bool)
    (pairs,) = losses.pair_slots([present], [present])
    found = losses.slot_contrast(slots, 7 * slots, lambda rows: rows, pairs, 0.5)
    assert found.item() == pytest.approx(2 * 0.5 * math.log(1 + math.exp(-1 / 0.5)))


def test_permuting_the_prototypes_does_not_change_the_slot_losses():
    student_slots, teacher_slots, predictor, pairs = contrast_inputs()
    (moved,) = losses.pair_slots(*[[mask[:, ORDER]] for mask in masks()])
    for loss in (losses.slot_regression, lambda *inputs: losses.slot_contrast(*inputs, 0.2)):
        before = loss(student_slots, teacher_slots, predictor, pairs)
        after = loss(student_slots[:, ORDER], teacher_slots[:, ORDER], predictor, moved)
        assert after.item() == pytest.approx(before.item(), rel=1e-10)


def test_the_length_of_a_teacher_slot_does_not_matter():
    student_slots, teacher_slots, predictor, pairs = contrast_inputs()
    before = losses.slot_contrast(student_slots, teacher_slots, predictor, pairs, 0.2)
    after = losses.slot_contrast(student_slots, 5 * teacher_slots, predictor, pairs, 0.2)
    assert after.item() == pytest.approx(before.item(), rel=1e-10)


SLOT_LOSSES = [losses.slot_regression, lambda *inputs: losses.slot_contrast(*inputs, 0.2)]


@pytest.mark.parametrize("loss", SLOT_LOSSES, ids=["regression", "contrast"])
def test_slot_losses_reach_queries_and_predictor_and_nothing_of_the_teacher(loss):
    student_slots, teacher_slots, predictor, pairs = contrast_inputs()
    loss(student_slots, teacher_slots, predictor, pairs).backward()
    assert teacher_slots.grad is None
    reached = student_slots.grad.abs().sum(2) > 0
    student, teacher = masks()
    assert reached.equal(student & teacher)
    assert all(p.grad.abs().sum() > 0 for p in predictor.parameters())


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("loss", SLOT_LOSSES, ids=["regression", "contrast"])
def test_fewer_than_two_queries_cost_nothing_and_are_connected_to_slots_and_predictor(loss, count):
    student_slots, teacher_slots, predictor, pairs = contrast_inputs(count)
    predictor.train()  # whose batch norm would fail on one row
    assert pairs.num_queries == count
    value = loss(student_slots, teacher_slots, predictor, pairs)
    value.backward()
    assert value.item() == 0
    assert student_slots.grad.eq(0).all()
    assert all(p.grad.eq(0).all() for p in predictor.parameters())


def test_two_queries_are_enough():
    assert losses.slot_contrast(*contrast_inputs(2), 0.2) > 0


def test_the_zero_is_connected_also_to_a_predictor_that_is_a_plain_function():
    slots = random(B, K, D).requires_grad_()
    losses.connected_zero(slots, lambda rows: rows).backward()
    assert slots.grad.eq(0).all()


def test_predictions_and_targets_are_unit_rows_of_the_right_slots():
    student_slots, teacher_slots, _, pairs = contrast_inputs()
    prediction, target = losses.predicted_and_target_rows(
        student_slots, teacher_slots, lambda rows: 2 * rows, pairs
    )
    student, teacher = masks()
    expected = [
        unit(student_slots[b, k].detach())
        for b in range(B)
        for k in range(K)
        if student[b, k] & teacher[b, k]
    ]
    assert torch.allclose(prediction, torch.stack(expected))
    expected = [
        unit(teacher_slots[b, k].detach()) for b in range(B) for k in range(K) if teacher[b, k]
    ]
    assert torch.allclose(target, torch.stack(expected)) and not target.requires_grad


# ---------------------------------------------------------------------------------- slot regression


def test_regression_is_the_mean_of_2_minus_2_cosines():
    student_slots, teacher_slots, predictor, pairs = contrast_inputs()
    student, teacher = masks()
    terms = [
        2
        - 2
        * unit(predictor(student_slots[b, k][None])[0].detach())
        @ unit(teacher_slots[b, k].detach())
        for b in range(B)
        for k in range(K)
        if student[b, k] and teacher[b, k]
    ]
    found = losses.slot_regression(student_slots, teacher_slots, predictor, pairs)
    assert found.item() == pytest.approx(sum(terms).item() / len(terms), rel=1e-10)


@pytest.mark.parametrize("sign, expected", [(1, 0), (-1, 4)])
def test_regression_is_zero_for_the_same_slot_and_four_for_its_opposite(sign, expected):
    slots = random(B, K, D)
    (pairs,) = losses.pair_slots(*[[mask] for mask in masks()])
    found = losses.slot_regression(sign * slots, 3 * slots, lambda rows: rows, pairs)
    assert found.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("loss", SLOT_LOSSES, ids=["regression", "contrast"])
def test_autocast_leaves_only_the_predictor_in_half_precision(loss):
    student_slots, teacher_slots, predictor, pairs = contrast_inputs()
    student_slots, teacher_slots, predictor = (
        student_slots.float(),
        teacher_slots.float(),
        predictor.float(),
    )
    with torch.autocast("cpu", torch.bfloat16):
        rows = predictor(student_slots.flatten(0, 1)[pairs.queries]).float()
        found = loss(student_slots, teacher_slots, predictor, pairs)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(
        loss(student_slots, teacher_slots, lambda _: rows, pairs).item(), rel=1e-6
    )


# ----------------------------------------------------------------------------------- image contrast


def test_an_image_is_contrasted_with_the_other_views_of_all():
    prediction, target = random(B, D), random(B, D, seed=1)
    terms = []
    for i in range(B):
        chances = [math.exp(unit(prediction[i]) @ unit(target[j]) / 0.3) for j in range(B)]
        terms.append(-math.log(chances[i] / sum(chances)))
    found = losses.image_contrast(prediction, target, 0.3)
    assert found.item() == pytest.approx(0.6 * sum(terms) / B, rel=1e-10)


def test_two_images_that_have_nothing_in_common_pay_the_softmax_of_one_against_nothing():
    images = torch.eye(2, 3)
    assert losses.image_contrast(images, images).item() == pytest.approx(
        0.4 * math.log(1 + math.exp(-5))
    )


def test_the_image_loss_ignores_lengths_and_gives_the_target_no_gradient():
    prediction, target = random(B, D).requires_grad_(), random(B, D, seed=1).requires_grad_()
    found = losses.image_contrast(prediction, target)
    found.backward()
    assert target.grad is None and prediction.grad.abs().sum() > 0
    assert losses.image_contrast(2 * prediction, 3 * target).item() == pytest.approx(found.item())


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_the_image_loss_compares_in_single_precision(kind):
    prediction, target = random(B, D).to(kind), random(B, D, seed=1).to(kind)
    with torch.autocast("cpu", torch.bfloat16):
        found = losses.image_contrast(prediction, target)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(
        losses.image_contrast(prediction.float(), target.float()).item(), rel=1e-6
    )
