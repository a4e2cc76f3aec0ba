"""How well groups found without labels agree with labeled classes: functions of a table of counts.

The confusion matrix (k t) counts the pixels of prototype k in class t; those of two halves of a
data set add up. A prototype has no class: `match` or `majority` assigns one, and every score takes
that assignment as an argument. This is the published protocol of PiCIE [P]; the Rand index and the
normalized mutual information are ours [U].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from measures.layouts import IGNORE

UNMATCHED = -1


def confusion_matrix(
    predicted: Tensor, target: Tensor, num_predicted: int, num_classes: int
) -> Tensor:
    """Count the pixels of every (prototype, class) pair.

    predicted (any shape) int in [0, k); target (same shape) int in [0, t), or IGNORE: a pixel that
    is not counted. Returns counts (k t) int64 on the CPU. Raises ValueError for ids out of range.
    """
    labeled = target != IGNORE
    predicted, target = predicted[labeled].long(), target[labeled].long()  # uint8 would overflow
    for ids, count in ((predicted, num_predicted), (target, num_classes)):
        if ids.numel() and (ids.min() < 0 or ids.max() >= count):
            raise ValueError(f"ids run from {ids.min()} to {ids.max()}, outside 0..{count - 1}")
    pairs = predicted * num_classes + target
    counts = torch.bincount(pairs, minlength=num_predicted * num_classes)
    return counts.reshape(num_predicted, num_classes).cpu()


def match(confusion: Tensor) -> Tensor:
    """One-to-one: the assignment of classes to prototypes with the most correct pixels (Hungarian).

    confusion (k t). Returns the class of every prototype (k), `UNMATCHED` for those left over when
    k > t. When k < t, some classes get no prototype and cannot be found.
    """
    rows, columns = linear_sum_assignment(confusion.numpy(), maximize=True)
    classes = torch.full((len(confusion),), UNMATCHED)
    classes[torch.from_numpy(rows)] = torch.from_numpy(columns)
    return classes


def majority(confusion: Tensor) -> Tensor:
    """Many-to-one: each prototype gets the class that most of its pixels have.

    confusion (k t). Returns (k), `UNMATCHED` for prototypes without a pixel. The score rises with k
    whatever was learned: never compare it with `match`, nor between different k.
    """
    return torch.where(confusion.sum(1) > 0, confusion.argmax(1), UNMATCHED)  # both over t


def iou(confusion: Tensor, classes: Tensor) -> Tensor:
    """Intersection over union of every class over the whole data set:

    IoU_t = tp / (tp + fp + fn)

    confusion (k t); classes (k) from `match` or `majority`. Returns (t) float64 in [0, 1]; nan for
    a class without a labeled pixel. Pixels of unmatched prototypes are missed (fn) but claimed for
    no class (fp) [P].
    """
    by_class = _rows_by_class(confusion, classes)
    hit, claimed = by_class.diagonal(), by_class.sum(1)  # over t
    present = confusion.sum(0)  # over k
    union = (claimed + present - hit).clamp(min=1)
    return torch.where(present > 0, hit / union, torch.nan).double()


def miou(confusion: Tensor, classes: Tensor) -> float:
    """Mean of `iou` over the classes that occur; 0 without any labeled pixel. Same arguments."""
    return float(iou(confusion, classes).nanmean().nan_to_num())


def pixel_accuracy(confusion: Tensor, classes: Tensor) -> float:
    """Correct pixels / labeled pixels, in [0, 1]. Same arguments as `iou`."""
    correct = _rows_by_class(confusion, classes).diagonal().sum()
    return float((correct / confusion.sum()).nan_to_num())


def by_class(class_names: Sequence[str], values: Tensor) -> dict[str, float | None]:
    """values (t) under their names; None for nan, which JSON lacks: a class without a pixel."""
    numbers = (None if math.isnan(value) else value for value in values.tolist())
    return dict(zip(class_names, numbers))


def known_scores(confusion: Tensor, class_names: Sequence[str]) -> dict:
    """miou, accuracy and iou by name of a classifier with names: nothing is matched. (t t)."""
    own = torch.arange(len(class_names))
    each, accuracy = by_class(class_names, iou(confusion, own)), pixel_accuracy(confusion, own)
    return dict(miou=miou(confusion, own), accuracy=accuracy, iou=each)


def nmi(confusion: Tensor) -> float:
    """Normalized mutual information of prototypes and classes, in [0, 1]:

    NMI = 2 I(k, t) / (H(k) + H(t)),  I(k, t) = H(k) + H(t) - H(k t)

    confusion (k t). It is 0 if the two are independent, 1 if each determines the other.
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
    """Agreement of two partitions about which pairs of pixels belong together (adjusted Rand).

    confusion (k t). Returns at most 1: 0 by chance, 1 if the partitions are equal. The ids have no
    meaning, so it also serves segments without classes (Hubert and Arabie, 1985).
    """
    counts = confusion.double()
    sums = counts, counts.sum(1), counts.sum(0), counts.sum()  # over t; over k
    together, in_groups, in_classes, all_pairs = ((n * (n - 1) / 2).sum() for n in sums)
    expected = in_groups * in_classes / all_pairs.clamp(min=1)
    if in_groups + in_classes == 2 * expected:  # both are one segment, or all single pixels
        return 1.0
    return float((together - expected) / ((in_groups + in_classes) / 2 - expected))


def _rows_by_class(confusion: Tensor, classes: Tensor) -> Tensor:
    """Rows of prototypes (k t) summed into rows of the classes that they were given (t t)."""
    matched = classes != UNMATCHED
    by_class = torch.zeros(confusion.shape[1], confusion.shape[1], dtype=confusion.dtype)
    return by_class.index_add(0, classes[matched], confusion[matched])
