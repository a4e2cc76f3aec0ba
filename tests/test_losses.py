"""losses.py in one process; two processes: test_ranks.py."""

import math
from functools import partial

import pytest
import torch

import losses
from slots import SlotPredictor
from trained import random

B, K, D, H, W = 3, 5, 7, 4, 6
STUDENT, TEACHER = random(B, K) > 0, random(B, K, seed=1) > 0  # which slots are occupied


@pytest.mark.parametrize("valid", [[True, True, True], [True, False, True], [False, True, False]])
def test_the_group_loss_is_the_mean_cross_entropy_over_the_pixels_of_overlapping_crops(valid):
    """It has a gradient there, and none for the teacher and the center."""
    student, teacher = (random(B, K, H, W, seed=seed).tanh() for seed in (0, 1))
    center, terms = random(K, seed=2) / 10, []
    for b in [b for b in range(B) if valid[b]]:
        for s, t in zip(student[b].flatten(1).T.tolist(), teacher[b].flatten(1).T.tolist()):
            target = [math.exp((x - c) / 0.07) for x, c in zip(t, center.tolist())]
            chance = [math.exp(x / 0.1) for x in s]
            logs = [math.log(x / sum(chance)) for x in chance]
            terms.append(-sum(x / sum(target) * log for x, log in zip(target, logs)))
    leaves = [x.requires_grad_() for x in (student, teacher, center)]
    found = losses.group_consistency(*leaves, 0.1, 0.07, torch.tensor(valid))
    assert found.item() == pytest.approx(sum(terms) / len(terms), rel=1e-12)
    assert found.dtype == torch.float64
    found.backward()
    assert teacher.grad is None and center.grad is None
    assert student.grad.abs().sum((1, 2, 3)).gt(0).tolist() == valid


def slot_inputs(count=None):
    """Slots of both networks, a predictor, and the pairs: all, or the first `count` queries."""
    student = STUDENT
    if count is not None:
        keep = (STUDENT & TEACHER).flatten().nonzero().flatten()[:count]
        student = torch.zeros(B * K, dtype=torch.bool).index_fill(0, keep, True).reshape(B, K)
    predictor = SlotPredictor(D, D, 9).double().eval()
    for i, p in enumerate(predictor.parameters()):
        p.data = random(*p.shape, seed=10 + i)
    slots = [random(B, K, D, seed=seed).requires_grad_() for seed in (4, 5)]
    return (*slots, predictor, *losses.pair_slots([student], [TEACHER]))


CONTRAST = partial(losses.slot_contrast, temp_slot=0.2)
SLOT_LOSSES = pytest.mark.parametrize("loss", [losses.slot_regression, CONTRAST])


@SLOT_LOSSES
def test_slot_losses_reach_queries_and_predictor_and_nothing_of_the_teacher(loss):
    student_slots, teacher_slots, predictor, pairs = slot_inputs()
    loss(student_slots, teacher_slots, predictor, pairs).backward()
    assert teacher_slots.grad is None
    assert (student_slots.grad.abs().sum(2) > 0).equal(STUDENT & TEACHER)
    assert all(p.grad.abs().sum() > 0 for p in predictor.parameters())


@pytest.mark.parametrize("count", [0, 1])
@SLOT_LOSSES
def test_fewer_than_two_queries_cost_nothing_and_are_connected_to_slots_and_predictor(loss, count):
    student_slots, teacher_slots, predictor, pairs = slot_inputs(count)
    predictor.train()  # whose batch norm would fail on one row
    assert pairs.num_queries == count
    value = loss(student_slots, teacher_slots, predictor, pairs)
    value.backward()
    assert value.item() == 0 and student_slots.grad.eq(0).all()
    assert all(p.grad.eq(0).all() for p in predictor.parameters())
    assert loss(*slot_inputs(2)) > 0  # two are enough


def test_a_contrast_in_parts_has_the_value_and_the_gradient_of_the_whole():
    found = []
    for most in (2**22, 1, 2 * 6):  # all rows at once, one at a time, two at a time
        rows, keys = losses.unit(random(B, D)).requires_grad_(), losses.unit(random(6, D, seed=1))
        loss = losses.contrast_in_parts(rows, torch.tensor([2, 0, 5]), keys, 0.3, most)
        loss.backward()
        found.append(torch.cat([loss.detach()[None], rows.grad.flatten()]))
    assert torch.allclose(found[1], found[0]) and torch.allclose(found[2], found[0])
