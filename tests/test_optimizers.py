"""engine/optimizers.py: LARS against a loop over tensors, AdamW's groups, and the learning rate."""

import pytest
import torch

from engine.optimizers import LARS, Schedule, make_optimizer, schedule_for
from slotcon import SlotCon
from teacher import teacher_momentum
from trained import random

SHAPES = ((5, 3, 2, 4), (7, 6), (3, 2), (2, 3), (8,), ())


def weights():
    """The third one starts at zero: its norm is zero."""
    return [(random(*shape, seed=i) * (i != 2)).requires_grad_() for i, shape in enumerate(SHAPES)]


def lars_slowly(params, velocities, lr, momentum, weight_decay, coefficient):
    for i, p in enumerate(params):
        g = p.grad.clone()
        if p.ndim != 1:
            g = g + weight_decay * p.data
            if p.data.norm() > 0 and g.norm() > 0:
                g = g * coefficient * p.data.norm() / g.norm()
        velocities[i] = momentum * velocities[i] + g
        p.data = p.data - lr * velocities[i]


@pytest.mark.parametrize("settings", [{}, dict(momentum=0.8, weight_decay=0.1, coefficient=0.02)])
def test_three_steps_of_lars_equal_the_loop_over_tensors(settings):
    released = dict(momentum=0.9, weight_decay=1e-5, coefficient=0.001)
    ours, slow = weights(), weights()
    optimizer, velocities = LARS(ours, lr=0.3, **settings), [torch.zeros_like(p) for p in slow]
    for step in (1, 2, 3):
        optimizer.param_groups[0]["lr"] = 0.3 / step  # the schedule's business
        for i, p in [*enumerate(ours), *enumerate(slow)]:  # zeros for the fourth one, at first
            p.grad = random(*p.shape, seed=100 * step + i) * ((i, step) != (3, 1))
        optimizer.step()
        lars_slowly(slow, velocities, 0.3 / step, **{**released, **settings})
        assert all(torch.allclose(p, q, rtol=1e-12) for p, q in zip(ours, slow))


@pytest.mark.parametrize("name", ["lars", "adamw"])
def test_an_optimizer_trains_student_and_predictor_and_decays_no_bias_or_norm(name):
    model = SlotCon("tiny", 5, 9, 7)
    optimizer = make_optimizer(name, model.parameters(), 0.5, 0.1)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    parts = (model.student, model.predictor)
    assert trained == {id(p) for part in parts for p in part.parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
        p.data.fill_(1)
    optimizer.step()  # with no gradient only the decay moves anything
    for p in model.parameters():
        assert p.eq(1).all().item() == (p.ndim == 1 or not p.requires_grad)


def test_a_warm_up_may_be_nothing_or_everything():
    """The curve itself is held to the released code: test_reference_numbers.py."""
    assert Schedule(1, 5, 0, 2.0).learning_rate(0) == 2.0
    assert Schedule(1, 5, 5, 2.0).learning_rate(4) == pytest.approx(0.02 * (99 * 4 / 5 + 1))


@pytest.mark.parametrize("images, lengths, expected", [
    (83, dict(epochs=3, steps=0, warmup=1), (10, 30, 10)),
    (83, dict(epochs=2.55, steps=0, warmup=0.5), (10, 26, 5)),
    (83, dict(epochs=800, steps=70, warmup=7), (10, 70, 7)),  # the images do not count
    (8, dict(epochs=0.1, steps=0, warmup=0), (1, 1, 0)),
])  # fmt: skip
def test_a_length_is_in_epochs_or_in_steps_and_so_is_the_warm_up(images, lengths, expected):
    schedule = schedule_for(num_images=images, batch_size=8, base_lr=4.0, **lengths)
    assert schedule == Schedule(*expected, peak=4 * 8 / 256)


def test_the_teachers_momentum_ends_where_it_is_asked_to():
    assert teacher_momentum(37, 37, 0.9, 0.97) == pytest.approx(0.97)
