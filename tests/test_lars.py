"""lars.py: momentum SGD in which every weight moves by a fixed fraction of its own norm.

Promised: the released arithmetic, tensor by tensor; decay is part of the gradient whose norm is
taken; biases and norms are left out of both; a norm of zero changes nothing; what is saved
continues as if nothing had happened.
"""

import math

import pytest
import torch

from engine.lars import LARS

SHAPES = ((5, 3, 2, 4), (7, 6), (8,), ())


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def weights():
    return [random(*shape, seed=i).requires_grad_() for i, shape in enumerate(SHAPES)]


def give_gradients(params, step):
    for i, p in enumerate(params):
        p.grad = random(*p.shape, seed=100 * step + i)


def norm(x):
    return math.sqrt(sum(value * value for value in x.flatten().tolist()))


def lars_slowly(params, velocities, lr, momentum, weight_decay, coefficient):
    for i, p in enumerate(params):
        g = p.grad.clone()
        if p.ndim != 1:
            g = g + weight_decay * p.data
            if norm(p.data) > 0 and norm(g) > 0:
                g = g * coefficient * norm(p.data) / norm(g)
        velocities[i] = momentum * velocities[i] + g
        p.data = p.data - lr * velocities[i]


def test_three_steps_equal_the_loop_over_tensors():
    ours, slow = weights(), weights()
    optimizer = LARS(ours, lr=0.3, momentum=0.8, weight_decay=0.05, coefficient=0.02)
    velocities = [torch.zeros_like(p) for p in slow]
    for step in (1, 2, 3):
        optimizer.param_groups[0]["lr"] = 0.3 / step  # the schedule's business
        for params in (ours, slow):
            give_gradients(params, step)
        optimizer.step()
        lars_slowly(slow, velocities, 0.3 / step, 0.8, 0.05, 0.02)
        assert all(torch.allclose(p, q, rtol=1e-12) for p, q in zip(ours, slow))


def test_a_weight_of_length_5_moves_by_a_thousandth_of_it_and_a_bias_by_its_gradient():
    weight, bias = (
        torch.tensor([[3.0, 4.0]], requires_grad=True),
        torch.tensor([1.0, 2.0], requires_grad=True),
    )
    weight.grad, bias.grad = torch.tensor([[0.0, 100.0]]), torch.tensor([0.5, -0.5])
    LARS([weight, bias], lr=1.0, weight_decay=0.0).step()
    assert weight.flatten().tolist() == pytest.approx([3.0, 4.0 - 0.005])
    assert bias.tolist() == pytest.approx([0.5, 2.5])


def test_the_norm_of_the_gradient_is_taken_after_the_decay():
    weight = torch.tensor([[3.0, 4.0]], requires_grad=True)
    weight.grad = torch.tensor([[-3.0, 0.0]])
    LARS([weight], lr=1.0, weight_decay=1.0, coefficient=0.1).step()
    assert weight.flatten().tolist() == pytest.approx(
        [3.0, 4.0 - 0.1 * 5]
    )  # (0, 4) scaled to a tenth of 5, not to 5/3


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_weight_of_zeros_takes_its_gradient_as_it_is(weight_decay):
    weight = torch.zeros(2, 3, requires_grad=True)
    weight.grad = torch.arange(6.0).reshape(2, 3)
    LARS([weight], lr=0.5, weight_decay=weight_decay).step()
    assert weight.equal(-0.5 * torch.arange(6.0).reshape(2, 3))


def test_a_gradient_of_zeros_moves_nothing_and_makes_no_nan():
    weight = torch.ones(2, 3, requires_grad=True)
    weight.grad = torch.zeros(2, 3)
    LARS([weight], lr=0.5, weight_decay=0.0).step()
    assert weight.eq(1).all()


def test_scaling_a_gradient_changes_no_first_step_of_a_weight():
    found = []
    for scale in (1.0, 1000.0):
        (weight, *_) = weights()
        weight.grad = scale * random(*weight.shape, seed=9)
        LARS([weight], lr=1.0, weight_decay=0.0).step()
        found.append(weight.detach())
    assert torch.allclose(*found, rtol=1e-12)


def test_what_has_no_gradient_stays_and_the_others_move():
    params = weights()
    give_gradients(params, 1)
    params[1].grad = None
    before = [p.detach().clone() for p in params]
    LARS(params, lr=1.0).step()
    assert [p.equal(q) for p, q in zip(params, before)] == [False, True, False, False]
    LARS(weights(), lr=1.0).step()  # nothing has a gradient: nothing to do


def test_a_saved_optimizer_goes_on_where_it_was():
    through, resumed = weights(), weights()
    one, first = LARS(through, 0.2), LARS(resumed, 0.2)
    for params, optimizer in ((through, one), (resumed, first)):
        give_gradients(params, 1)
        optimizer.step()
    second = LARS(resumed, 0.1)
    second.load_state_dict(first.state_dict())
    for params, optimizer in ((through, one), (resumed, second)):
        give_gradients(params, 2)
        optimizer.step()
    assert all(p.equal(q) for p, q in zip(through, resumed))


def test_the_defaults_are_the_released_ones():
    by_default, spelled_out = weights(), weights()
    one, other = (
        LARS(by_default, 0.3),
        LARS(spelled_out, 0.3, momentum=0.9, weight_decay=1e-5, coefficient=0.001),
    )
    for step in (1, 2):
        for params, optimizer in ((by_default, one), (spelled_out, other)):
            give_gradients(params, step)
            optimizer.step()
    assert all(p.equal(q) for p, q in zip(by_default, spelled_out))


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay", "coefficient"])
def test_negative_settings_are_refused_by_name(name):
    with pytest.raises(ValueError, match=f"LARS needs {name} >= 0, found -0.1"):
        LARS(weights(), **(dict(lr=0.1) | {name: -0.1}))
