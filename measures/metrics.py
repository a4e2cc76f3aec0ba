"""How well groups agree with classes, from counts of pixels (k t): the protocol of PiCIE [P]."""

import math
from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from measures.layouts import IGNORE

UNMATCHED = -1


def confusion_matrix(predicted: Tensor, target: Tensor, k: int, t: int) -> Tensor:
    """Ids of any equal shape -> pixels of every pair (k t) int64 on the CPU, without IGNORE."""
    labeled = target != IGNORE
    pairs = predicted[labeled].long() * t + target[labeled].long()  # uint8 would overflow
    return torch.bincount(pairs, minlength=k * t).reshape(k, t).cpu()


def match(confusion: Tensor) -> Tensor:
    """(k t) -> one-to-one: the class of each prototype (k) or `UNMATCHED`: most pixels right."""
    rows, columns = linear_sum_assignment(confusion.numpy(), maximize=True)
    classes = torch.full((len(confusion),), UNMATCHED)
    classes[torch.from_numpy(rows)] = torch.from_numpy(columns)
    return classes


def majority(confusion: Tensor) -> Tensor:
    """Many-to-one: the class of most pixels of each prototype (k). Scores rise with k."""
    return torch.where(confusion.sum(1) > 0, confusion.argmax(1), UNMATCHED)  # both over t


def iou(confusion: Tensor, classes: Tensor) -> Tensor:
    """Intersection over union of every class over the whole data set:

    IoU_t = tp / (tp + fp + fn)

    confusion (k t); classes (k) of the prototypes -> (t) float64 in [0, 1]; nan for a class without
    a labeled pixel. Pixels of unmatched prototypes count as fn, not as fp [P].
    """
    by_class = _rows_by_class(confusion, classes)
    hit, claimed = by_class.diagonal(), by_class.sum(1)  # over t
    present = confusion.sum(0)  # over k
    union = (claimed + present - hit).clamp(min=1)
    return torch.where(present > 0, hit / union, torch.nan).double()


def miou(confusion: Tensor, classes: Tensor) -> float:
    """Mean of `iou` over the classes that occur; 0 without a labeled pixel."""
    return float(iou(confusion, classes).nanmean().nan_to_num())


def pixel_accuracy(confusion: Tensor, classes: Tensor) -> float:
    """Correct pixels / labeled pixels, in [0, 1]; 0 without a labeled pixel."""
    correct = _rows_by_class(confusion, classes).diagonal().sum()
    return float((correct / confusion.sum()).nan_to_num())


def by_class(class_names: Sequence[str], values: Tensor) -> dict[str, float | None]:
    """values (t) under their names; None for nan, which JSON lacks: a class without a pixel."""
    numbers = (None if math.isnan(value) else value for value in values.tolist())
    return dict(zip(class_names, numbers))


def known_scores(confusion: Tensor, class_names: Sequence[str]) -> dict:
    """Scores of a classifier that knows the classes by name: nothing is matched. (t t)."""
    own = torch.arange(len(class_names))
    each, accuracy = by_class(class_names, iou(confusion, own)), pixel_accuracy(confusion, own)
    return dict(miou=miou(confusion, own), accuracy=accuracy, iou=each)


def nmi(confusion: Tensor) -> float:
    """Normalized mutual information of prototypes and classes, in [0, 1]:

    NMI = 2 I(k, t) / (H(k) + H(t)),  I(k, t) = H(k) + H(t) - H(k t)
    """
    joint = confusion.double() / max(int(confusion.sum()), 1)
    tables = joint, joint.sum(1), joint.sum(0)  # over t; over k
    both, of_prototypes, of_classes = (torch.special.entr(each).sum() for each in tables)
    if of_prototypes + of_classes == 0:  # one prototype and one class: each determines the other
        return float(confusion.sum() > 0)
    information = of_prototypes + of_classes - both
    # Rounding may leave -1e-16.
    return float((2 * information / (of_prototypes + of_classes)).clamp(min=0))


def adjusted_rand_index(confusion: Tensor) -> float:
    """Agreement on the pairs of pixels that belong together: 0 by chance, at most 1; no names."""
    counts = confusion.double()
    sums = counts, counts.sum(1), counts.sum(0), counts.sum()  # over t; over k
    together, in_groups, in_classes, all_pairs = ((n * (n - 1) / 2).sum() for n in sums)
    expected = in_groups * in_classes / all_pairs.clamp(min=1)
    if in_groups + in_classes == 2 * expected:  # both are one segment, or all single pixels
        return 1.0
    return float((together - expected) / ((in_groups + in_classes) / 2 - expected))


def rand_indices(groups: Tensor, truth: Tensor) -> list[float]:
    """`adjusted_rand_index` of every image (b y x) in which a pixel is labeled."""
    found = []
    for one, other in zip(groups, truth.long()):
        if (other != IGNORE).any():
            counts = confusion_matrix(one, other, int(one.max()) + 1, int(other.max()) + 1)
            found.append(adjusted_rand_index(counts))
    return found


def rand_index(groups: Tensor, truth: Tensor, counted: Tensor | None = None) -> float:
    """The mean of `rand_indices`, 0 of none; counted (b y x) bool: only these pixels."""
    truth = truth.long() if counted is None else truth.long().masked_fill(~counted, IGNORE)
    values = rand_indices(groups, truth)
    return sum(values) / max(len(values), 1)


def _rows_by_class(confusion: Tensor, classes: Tensor) -> Tensor:
    """Rows of prototypes (k t) added up in the rows of their classes (t t)."""
    matched = classes != UNMATCHED
    by_class = torch.zeros(confusion.shape[1], confusion.shape[1], dtype=confusion.dtype)
    return by_class.index_add(0, classes[matched], confusion[matched])
