"""The exercises: what an answer is compared with, and what is wrong with a wrong one.

EXERCISES has a `Task` for each, or a number or list. An answer is right if it has the values and
the gradients of the module's function, however it is written. Whoever gives up reads that function.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

import losses
import slots
import teacher


class Task(NamedTuple):
    """right: the module's function; draw: generator -> random arguments; wrong: what is wrong ->
    a variant that is; gradients: whether they count.
    """

    right: Callable
    draw: Callable[[Generator], tuple]
    wrong: dict[str, Callable]
    gradients: bool = True


def result(name: str, attempt: Any, expected: Any = None) -> str:
    """todo, pass, or what is wrong; never raises. expected: in place of an entry of EXERCISES."""
    task = EXERCISES[name] if expected is None else expected
    if not isinstance(task, Task):
        right = torch.as_tensor(task, dtype=torch.double)
        task = Task(lambda: right, lambda generator: (), {}, gradients=False)
    function = attempt if callable(attempt) else lambda: attempt
    draws = [task.draw(Generator().manual_seed(seed)) for seed in range(3)]
    try:
        found = [outcome(function, given, task.gradients) for given in draws]
    except NotImplementedError:
        return "todo"
    except Exception as error:  # whatever a first attempt raises
        return f"not yet, {type(error).__name__}: {error}"
    wanted = [outcome(task.right, given, task.gradients) for given in draws]
    if all(map(alike, found, wanted)):
        return "pass"
    for words, variant in task.wrong.items():
        if all(map(alike, found, [outcome(variant, given, task.gradients) for given in draws])):
            return f"not yet: {words}"
    return f"not yet: {difference([f[0] for f in found], [w[0] for w in wanted])}"


def outcome(function: Callable, given: tuple, gradients: bool) -> list[Tensor]:
    """What a function returns for copies of its arguments, and the gradients of these."""
    given = [copy.deepcopy(x) for x in given]
    floats = [x for x in given if torch.is_tensor(x) and x.is_floating_point()]
    asked = [x.requires_grad_() for x in floats] if gradients else []
    value = function(*given)
    if value is None or value is ...:
        raise NotImplementedError
    value = torch.as_tensor(value)
    weighted = (torch.linspace(1, 2, value.numel()).reshape(value.shape) * value).sum()
    found = [None] * len(asked)
    if asked and value.requires_grad:
        found = torch.autograd.grad(weighted, asked, allow_unused=True)
    found = [torch.zeros_like(x) if g is None else g for x, g in zip(asked, found)]
    return [value.detach().double(), *found]


def alike(found: list[Tensor], wanted: list[Tensor]) -> bool:
    """Equal shapes and, but for rounding, equal values."""
    return all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-5)
        for a, b in zip(found, wanted)
    )


def difference(values: list[Tensor], right: list[Tensor]) -> str:
    """What is wrong with values, one tensor per draw, that no variant has."""
    if values[0].shape != right[0].shape:
        return f"the shape is {tuple(values[0].shape)}, it should be {tuple(right[0].shape)}"
    value, right = torch.stack(values), torch.stack(right)
    if not value.isfinite().all():
        return "some values are not finite"
    if alike([value], [right]):
        return "the values are right, a gradient is not: is something detached, or should it be?"
    if alike([-value], [right]):
        return "the sign is wrong"
    factor = value / right
    if factor.std() < 1e-3 * factor.mean().abs():
        return f"it is {factor.mean():.4g} times what it should be"
    return f"the largest difference is {(value - right).abs().max():.3g}"


def uniform(generator: Generator, *shape: int) -> Tensor:
    """Random numbers from -1 to 1."""
    return 2 * torch.rand(shape, generator=generator) - 1


def pooled(z: Tensor, s: Tensor, t: float, over: int = 1, least: float = 1e-6) -> Tensor:
    """Attentive pooling, with a softmax over one axis of (b k n)."""
    weights = (s.flatten(2) / t).softmax(over) + least
    return weights / weights.sum(2, keepdim=True) @ z.flatten(2).transpose(1, 2)


def consistency(s: Tensor, t: Tensor, c: Tensor, hot: float, cold: float, over: int = 1) -> Tensor:
    """Group consistency of s and t (b k h w), with a softmax over one axis; t has a gradient."""
    target = ((t - c[:, None, None]) / cold).softmax(over)
    return -(target * (s / hot).log_softmax(over)).sum(1).mean()


def all_valid(s: Tensor, t: Tensor, *rest: Any) -> Tensor:
    """`losses.group_consistency` where all crops overlap."""
    return losses.group_consistency(s, t, *rest, torch.ones(len(s), dtype=torch.bool))


def next_teacher(old: Tensor, new: Tensor, momentum: float) -> Tensor:
    """`teacher.update_teacher` on one tensor."""
    networks = [nn.ParameterList([x]) for x in (old, new)]
    teacher.update_teacher(*networks, momentum)
    return networks[0][0].detach()


def next_center(center: Tensor, maps1: Tensor, maps2: Tensor, momentum: float) -> Tensor:
    """`losses.update_center` with the mean of both views."""
    losses.update_center(center, losses.mean_over_pixels([maps1, maps2]), momentum)
    return center


EXERCISES: dict[str, Any] = {
    "attentive_pooling": Task(
        slots.attentive_pooling,
        lambda g: (uniform(g, 2, 5, 3, 4), uniform(g, 2, 6, 3, 4), 0.07),
        {
            "the softmax runs over the pixels, it should run over k (dim=1)":
                lambda z, s, t: pooled(z, s, t, over=2),
            "the weights are not divided by their sum over the pixels":
                lambda z, s, t: pooled(z, s, t) * ((s / t).softmax(1) + 1e-6).sum((2, 3))[..., None],
            "the weights are divided by the number of pixels, not by their sum":
                lambda z, s, t: pooled(z, s, t) * ((s / t).softmax(1) + 1e-6).mean((2, 3))[..., None],
            "the 1e-6 is missing": lambda z, s, t: pooled(z, s, t, least=0),
            "the temperature is missing": lambda z, s, t: pooled(z, s, 1),
            "the similarity is multiplied by the temperature, not divided":
                lambda z, s, t: pooled(z, s, 1 / t),
            "the embeddings are pooled as they are, without being normalized":
                lambda z, s, t: pooled(F.normalize(z, dim=1), s, t),
            "the axes are (b d k), they should be (b k d)":
                lambda z, s, t: pooled(z, s, t).transpose(1, 2),
            "nothing is detached here: student's slots need both gradients":
                lambda z, s, t: pooled(z, s.detach(), t),
        },
    ),
    "group_consistency": Task(
        all_valid,
        lambda g: (uniform(g, 2, 6, 3, 4), uniform(g, 2, 6, 3, 4), uniform(g, 6) / 5, 0.1, 0.04),
        {
            "the target has a gradient: the stop-gradient is missing": consistency,
            "the sign is wrong: a cross-entropy has a minus":
                lambda s, t, *rest: -consistency(s, t.detach(), *rest),
            "student and teacher are exchanged":
                lambda s, t, c, *rest: consistency(t, s.detach(), c, *rest),
            "the center is not subtracted":
                lambda s, t, c, *rest: consistency(s, t.detach(), 0 * c, *rest),
            "the center is added, it should be subtracted":
                lambda s, t, c, *rest: consistency(s, t.detach(), -c, *rest),
            "the center is subtracted from the student too":
                lambda s, t, c, *rest: consistency(s - c[:, None, None], t.detach(), c, *rest),
            "the temperatures are exchanged: the teacher is the sharp one":
                lambda s, t, c, hot, cold: consistency(s, t.detach(), c, cold, hot),
            "the teacher has the student's temperature: sharpening is missing":
                lambda s, t, c, hot, cold: consistency(s, t.detach(), c, hot, hot),
            "the student has the teacher's temperature":
                lambda s, t, c, hot, cold: consistency(s, t.detach(), c, cold, cold),
            "the softmax runs over another axis, it should run over k (dim=1)":
                lambda s, t, *rest: consistency(s, t.detach(), *rest, over=3),
            "the mean runs over k too: sum over k, then take the mean over b, h and w":
                lambda s, t, *rest: consistency(s, t.detach(), *rest) / s.shape[1],
        },
    ),
    "update_center": Task(
        next_center,
        lambda g: (uniform(g, 6), uniform(g, 2, 6, 3, 4), uniform(g, 2, 6, 3, 4), 0.9),
        {
            "old and new are exchanged: the momentum belongs to the old center":
                lambda c, a, b, m: next_center(c, a, b, 1 - m),
            "only the first view is there": lambda c, a, b, m: next_center(c, a, a, m),
            "only the second view is there": lambda c, a, b, m: next_center(c, b, b, m),
            "the views are added: take their mean": lambda c, a, b, m: next_center(c, 2 * a, 2 * b, m),
            "the new mean is added without 1 - momentum":
                lambda c, a, b, m: m * c + (a + b).mean((0, 2, 3)) / 2,
        },
        gradients=False,
    ),
    "update_teacher": Task(
        next_teacher,
        lambda g: (uniform(g, 3, 4), uniform(g, 3, 4), 0.99),
        {
            "teacher and student are exchanged": lambda t, s, m: next_teacher(s, t, m),
            "the student is added without 1 - momentum": lambda t, s, m: m * t + s,
        },
        gradients=False,
    ),
}  # fmt: skip
