"""teacher.py: the average of the student's past."""

import math

import pytest
import torch
from torch import nn

from teacher import make_teacher, teacher_momentum, update_teacher


def network(seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 5, 2), nn.BatchNorm2d(5), nn.Linear(7, 4)).double()
    for buffer in net.buffers():
        buffer.fill_(seed + 1)
    return net


def test_the_teacher_is_a_copy_in_training_mode_that_shares_nothing_and_needs_no_gradient():
    student = network(1).eval()
    teacher = make_teacher(student)
    assert all(module.training for module in teacher.modules()) and not student.training
    for name, value in student.state_dict().items():
        copied = teacher.state_dict()[name]
        assert copied.equal(value) and copied.data_ptr() != value.data_ptr()
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in student.parameters())


def test_every_parameter_moves_by_the_same_share_in_place_and_no_buffer_moves():
    student, teacher = network(1), make_teacher(network(2))
    storage = [p.data_ptr() for p in teacher.parameters()]
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    update_teacher(teacher, student, 0.9)
    parameters = dict(student.named_parameters())
    for name, value in teacher.state_dict().items():
        follows = name in parameters
        expected = 0.9 * before[name] + 0.1 * parameters[name] if follows else before[name]
        assert torch.allclose(value, expected, rtol=1e-12), name
    assert all(p.equal(q) for p, q in zip(student.parameters(), network(1).parameters()))
    assert [p.data_ptr() for p in teacher.parameters()] == storage
    assert not any(p.requires_grad or p.grad_fn for p in teacher.parameters())
    assert len(parameters) == 6 and len(before) == 9


@pytest.mark.parametrize("momentum", [-0.1, 1.1, float("nan")])
def test_a_momentum_outside_0_to_1_is_refused(momentum):
    with pytest.raises(ValueError, match=rf"momentum must lie in \[0, 1\], found {momentum}"):
        update_teacher(network(1), network(2), momentum)


def test_the_momentum_rises_along_a_cosine():
    found = [teacher_momentum(t, 1000) for t in (0, 250, 500, 1000)]
    quarter = 1 - 0.01 * (math.sqrt(0.5) + 1) / 2
    assert found == pytest.approx([0.99, quarter, 0.995, 1.0], rel=1e-14)
    values = [teacher_momentum(t, 37, 0.9, 0.97) for t in range(38)]
    assert values == sorted(values) and values[0] == 0.9 and values[-1] == pytest.approx(0.97)
