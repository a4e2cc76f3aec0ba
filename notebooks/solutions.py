"""The exercises: what an answer is compared with, and what is wrong with a wrong one.

EXERCISES has a `Task` for each, or a number or list. An answer is right if it has the values and
the gradients of the module's function, however it is written. Whoever gives up reads that function.
"""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

import grouping
import losses
import slots
import teacher
from comparisons.slot_attention import query_attention


class Task(NamedTuple):
    """right: the module's function; draw: generator -> random arguments; wrong: what is wrong ->
    a variant that is; gradients: of how many arguments, from the first on, they count.
    """

    right: Callable
    draw: Callable[[Generator], tuple]
    wrong: dict[str, Callable]
    gradients: int = 2


def result(name: str, attempt: Any) -> str:
    """todo, pass, or what is wrong; never raises."""
    task = EXERCISES[name]
    if not isinstance(task, Task):
        right = torch.as_tensor(task, dtype=torch.double)
        task = Task(lambda: right, lambda generator: (), {}, gradients=0)
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


def outcome(function: Callable, given: tuple, gradients: int) -> list[Tensor]:
    """What a function returns for copies of its arguments, and the gradients of these."""
    given = [copy.deepcopy(x) for x in given]
    floats = [x for x in given if torch.is_tensor(x) and x.is_floating_point()]
    asked = [x.requires_grad_() for x in floats[:gradients]]
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
        rounded = ": are there enough digits?" * bool((factor.mean() - 1).abs() < 0.01)
        return f"it is {factor.mean():.4g} times what it should be{rounded}"
    return f"the largest difference is {(value - right).abs().max():.3g}"


def uniform(generator: Generator, *shape: int) -> Tensor:
    """Random numbers from -1 to 1."""
    return 2 * torch.rand(shape, generator=generator) - 1


def pooled(z: Tensor, s: Tensor, t: float, over=1, least=1e-6, divide=True) -> Tensor:
    """Attentive pooling, with a softmax over an axis of (b k n)."""
    weights = (s.flatten(2) / t).softmax(over) + least
    weights = weights / (weights.sum(2, keepdim=True) if divide else 1)
    return weights @ z.flatten(2).transpose(1, 2)


def consistency(
    s: Tensor, t: Tensor, c: Tensor, hot: float, cold: float, over: int = 1, stop: bool = True
) -> Tensor:
    """Group consistency, with a softmax over an axis of (b k h w)."""
    target = ((t - c[:, None, None]) / cold).softmax(over)
    target = target.detach() if stop else target
    return -(target * (s / hot).log_softmax(over)).sum(1).mean()


def all_valid(s: Tensor, t: Tensor, *rest: Any) -> Tensor:
    """`losses.group_consistency` where all crops overlap."""
    return losses.group_consistency(s, t, *rest, torch.ones(len(s), dtype=torch.bool))


def next_center(center: Tensor, maps1: Tensor, maps2: Tensor, momentum: float) -> Tensor:
    """`losses.update_center` with the mean of both views."""
    losses.update_center(center, losses.mean_over_pixels([maps1, maps2]), momentum)
    return center


def next_teacher(old: Tensor, new: Tensor, momentum: float) -> Tensor:
    """`teacher.update_teacher` on one tensor."""
    networks = [nn.ParameterList([x]) for x in (old, new)]
    teacher.update_teacher(*networks, momentum)
    return networks[0][0].detach()


def read_box(
    maps: Tensor, boxes: Tensor, flipped: Tensor, half: float = 0.5, swap: bool = False,
    padding: str = "border", corners: bool = False,
) -> Tensor:  # fmt: skip
    """Inverse augmentation, cell by cell of the grid; x and y may be exchanged."""
    (h, w), (x1, y1, x2, y2) = maps.shape[-2:], boxes[:, :, None].unbind(1)
    x1, x2 = torch.where(flipped[:, None], x2, x1), torch.where(flipped[:, None], x1, x2)
    x = x1 + (x2 - x1) * (torch.arange(w) + half) / w
    y = y1 + (y2 - y1) * (torch.arange(h) + half) / h
    grid = 2 * torch.stack(torch.broadcast_tensors(x[:, None], y[:, :, None]), dim=-1) - 1
    grid = grid.flip(-1) if swap else grid
    return F.grid_sample(maps, grid, padding_mode=padding, align_corners=corners)


def two_boxes(g: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Maps, boxes that reach the border of the view, and one mirrored view of two."""
    boxes = torch.cat(
        [torch.rand((2, 2), generator=g) / 3, 1 - torch.rand((2, 2), generator=g) / 3], 1
    )
    boxes[0, 0], boxes[1, 3] = 0, 1
    return uniform(g, 2, 3, 4, 5), boxes, torch.tensor([True, False])


def contrast(q: Tensor, k: Tensor, positives: Tensor, t: float) -> Tensor:
    """Slot contrast of rows as they are; the keys have a gradient."""
    return 2 * t * F.cross_entropy(q @ k.T / t, positives)


def unit_contrast(q: Tensor, k: Tensor, positives: Tensor, t: float) -> Tensor:
    """The loss of one direction, by the parts of `losses.slot_contrast`."""
    total = losses.contrast_in_parts(losses.unit(q), positives, losses.unit(k.detach()), t)
    return 2 * t * total / len(q)


EXERCISES: dict[str, Any] = {
    "partners": [1, 0, 2],
    "clusters of flow": 4,
    "position in driving": 0.31582,
    "a box by hand": [0.25, 0.0, 1.0, 0.5],
    "half a cell": 4 / 3,
    "queries, keys, positives": [3, 4, 0, 2, 3],
    "slot loss by chance": 0.4 * math.log(300),
    "name the number": 16,
    "the teacher's memory": 69,
    "half and half": math.log(2),
    "match by hand": [10, 12],
    "IoU of the first class": 6 / 11,
    "inverse_augmentation": Task(
        grouping.inverse_augmentation,
        two_boxes,
        {
            "the flip is not undone": lambda m, b, f: read_box(m, b, f & False),
            "every map is mirrored, also where the view is not":
                lambda m, b, f: read_box(m, b, f | True),
            "the unmirrored views are mirrored, and the mirrored ones not":
                lambda m, b, f: read_box(m, b, ~f),
            "the map is read at the edges of the cells, not at their centers: + 1/2 is missing":
                lambda m, b, f: read_box(m, b, f, half=0),
            "x and y of the grid are exchanged": lambda m, b, f: read_box(m, b, f, swap=True),
            "align_corners=True takes the outermost centers for the border":
                lambda m, b, f: read_box(m, b, f, corners=True),
            "zeros are read beyond the outermost centers: padding_mode is border":
                lambda m, b, f: read_box(m, b, f, padding="zeros"),
            "the grid counts from 0 to 1, grid_sample from -1 to 1":
                lambda m, b, f: read_box(m, b / 2 + 0.5, f),
            "the whole map is returned, the box is not cut out":
                lambda m, b, f: read_box(m, torch.tensor([0.0, 0, 1, 1]).expand(2, 4), f),
            "the map is returned as it is": lambda m, b, f: m,
        },
        gradients=0,
    ),
    "slot_contrast": Task(
        unit_contrast,
        lambda g: (uniform(g, 4, 5), uniform(g, 6, 5), torch.randperm(6, generator=g)[:4], 0.2),
        {
            "a gradient reaches the keys: they are targets":
                lambda q, k, p, t: contrast(F.normalize(q), F.normalize(k), p, t),
            "the rows are not brought to length 1":
                lambda q, k, p, t: contrast(q, k.detach(), p, t),
            "the queries are not brought to length 1":
                lambda q, k, p, t: contrast(q, F.normalize(k).detach(), p, t),
            "the keys are not brought to length 1":
                lambda q, k, p, t: contrast(F.normalize(q), k.detach(), p, t),
            "the rows are normalized over n, they should be over d (dim=1)":
                lambda q, k, p, t: contrast(q / q.norm(dim=0), (k / k.norm(dim=0)).detach(), p, t),
            "the factor 2 tau is missing": lambda q, k, p, t: unit_contrast(q, k, p, t) / (2 * t),
            "the cosines are not divided by the temperature":
                lambda q, k, p, t: unit_contrast(q, k, p, 1) * t,
            "it is a sum over the queries, it should be their mean":
                lambda q, k, p, t: unit_contrast(q, k, p, t) * len(q),
            "the positive of row n is positives[n], not key n":
                lambda q, k, p, t: unit_contrast(q, k, torch.arange(4), t),
        },
    ),
    "competing attention": Task(
        partial(query_attention, compete=True),
        lambda g: (uniform(g, 2, 3, 8), uniform(g, 2, 5, 8)),
        {
            "the sum runs over n, so the queries are independent":
                partial(query_attention, compete=False),
            "the division by the root of d is missing":
                lambda q, k: query_attention(q, k, True, temperature=q.shape[2] ** -0.5),
            "it is divided by d, not by its root":
                lambda q, k: query_attention(q, k, True, temperature=q.shape[2] ** 0.5),
        },
        gradients=0,
    ),
    "attentive_pooling": Task(
        slots.attentive_pooling,
        lambda g: (uniform(g, 2, 5, 3, 4), uniform(g, 2, 6, 3, 4), 0.07),
        {
            "the softmax runs over the pixels, not over k": lambda *x: pooled(*x, over=2),
            "the weights are not divided by their sum": lambda *x: pooled(*x, divide=False),
            "the 1e-6 is missing": lambda *x: pooled(*x, least=0),
            "the temperature is missing": lambda z, s, t: pooled(z, s, 1),
            "the similarity is multiplied by the temperature": lambda z, s, t: pooled(z, s, 1 / t),
            "embeddings are not normalized": lambda z, *x: pooled(F.normalize(z, dim=1), *x),
            "the axes are (b d k), not (b k d)": lambda *x: pooled(*x).transpose(1, 2),
            "the similarity needs its gradient": lambda z, s, t: pooled(z, s.detach(), t),
        },
    ),
    "group_consistency": Task(
        all_valid,
        lambda g: (uniform(g, 2, 6, 3, 4), uniform(g, 2, 6, 3, 4), uniform(g, 6) / 5, 0.1, 0.04),
        {
            "the stop-gradient is missing": lambda *x: consistency(*x, stop=False),
            "student and teacher are exchanged": lambda s, t, *x: consistency(t, s, *x),
            "the center is missing": lambda s, t, c, *x: consistency(s, t, 0 * c, *x),
            "the center is added, not subtracted": lambda s, t, c, *x: consistency(s, t, -c, *x),
            "the student has no center":
                lambda s, t, c, *x: consistency(s - c[:, None, None], t, c, *x),
            "the temperatures are exchanged": lambda *x: consistency(*x[:3], x[4], x[3]),
            "the teacher has the student's temperature": lambda *x: consistency(*x[:4], x[3]),
            "the student has the teacher's temperature": lambda *x: consistency(*x[:3], x[4], x[4]),
            "the softmax does not run over k": lambda *x: consistency(*x, over=3),
            "over k one takes the sum, not the mean": lambda *x: consistency(*x) / x[0].shape[1],
        },
    ),
    "update_center": Task(
        next_center,
        lambda g: (uniform(g, 6), uniform(g, 2, 6, 3, 4), uniform(g, 2, 6, 3, 4), 0.9),
        {
            "old and new are exchanged": lambda c, a, b, m: next_center(c, a, b, 1 - m),
            "the second view is missing": lambda c, a, b, m: next_center(c, a, a, m),
            "the first view is missing": lambda c, a, b, m: next_center(c, b, b, m),
            "of two views take the mean": lambda c, a, b, m: next_center(c, 2 * a, 2 * b, m),
            "1 - momentum is missing": lambda c, a, b, m: m * c + (a + b).mean((0, 2, 3)) / 2,
        },
        gradients=0,
    ),
    "update_teacher": Task(
        next_teacher,
        lambda g: (uniform(g, 3, 4), uniform(g, 3, 4), 0.99),
        {
            "teacher and student are exchanged": lambda t, s, m: next_teacher(s, t, m),
            "1 - momentum is missing": lambda t, s, m: m * t + s,
        },
        gradients=0,
    ),
}  # fmt: skip
