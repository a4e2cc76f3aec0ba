"""How well groups found without labels agree with labelled classes: pure functions of one table of counts.

Slide: "Understanding the semantic grouping ability: unsupervised semantic segmentation". Paper: table 5.
Differs: the authors released no evaluation code. This follows the published protocol of PiCIE [P], which they say
they used; the Rand index and the normalised mutual information are ours [U].
Read next: evaluate.py.

The table is the confusion matrix (k t): pixels of prototype k in class t. `t`, the classes of the truth, is the one
axis that training does not know. The counts of two halves of a data set add up to those of the whole, so nothing here
depends on the batch size or the number of processes. A prototype has no name; `match` or `majority` gives it one, and
the scores take the names as an argument, so that one kind is never taken for the other.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

IGNORE = 255  # a pixel without a class, in label pictures of COCO-Stuff, VOC, Cityscapes and ADE20K
UNMATCHED = -1


def confusion_matrix(
    predicted: Tensor, target: Tensor, num_predicted: int, num_classes: int, ignore: int = IGNORE
) -> Tensor:
    """Count the pixels of every (prototype, class) pair.

    predicted (any shape) int in [0, k); target (same shape) int in [0, t), or `ignore`: a pixel not to be counted.
    Returns counts (k t) int64 on the CPU. Raises ValueError for unequal shapes and for ids out of range.
    """
    if predicted.shape != target.shape:
        raise ValueError(f"predicted {(*predicted.shape,)} and target {(*target.shape,)} differ in shape")
    labelled = target != ignore
    predicted, target = predicted[labelled].long(), target[labelled].long()  # uint8 would overflow below
    for name, ids, count in (("prototype", predicted, num_predicted), ("class", target, num_classes)):
        if ids.numel() and (ids.min() < 0 or ids.max() >= count):
            raise ValueError(f"{name} ids run from {ids.min()} to {ids.max()}, outside 0..{count - 1}")
    pairs = torch.bincount(predicted * num_classes + target, minlength=num_predicted * num_classes)
    return pairs.reshape(num_predicted, num_classes).cpu()


def match(confusion: Tensor) -> Tensor:
    """Name prototypes one-to-one such that the most pixels are right (the Hungarian method).

    confusion (k t). Returns the class of every prototype (k), `UNMATCHED` for those left over when k > t. When
    k < t, some classes get no prototype and cannot be found.
    """
    rows, columns = linear_sum_assignment(confusion.numpy(), maximize=True)
    classes = torch.full((len(confusion),), UNMATCHED)
    classes[torch.from_numpy(rows)] = torch.from_numpy(columns)
    return classes


def majority(confusion: Tensor) -> Tensor:
    """Name prototypes many-to-one: each gets the class that most of its pixels have.

    confusion (k t). Returns (k), `UNMATCHED` for prototypes without a pixel. It reads the labels once per prototype,
    so the score rises with k whatever was learned: never compare it with `match`, nor between different k.
    """
    return torch.where(confusion.sum(1) > 0, confusion.argmax(1), UNMATCHED)  # both over t


def iou(confusion: Tensor, classes: Tensor) -> Tensor:
    """Intersection over union of every class, tp / (tp + fp + fn), over the whole data set.

    confusion (k t); classes (k) from `match` or `majority`. Returns (t) float64 in [0, 1]; nan for a class without
    a labelled pixel. Pixels of unmatched prototypes are missed (fn) but claimed for no class (fp) [P].
    """
    named = _named(confusion, classes)
    hit, claimed = named.diagonal(), named.sum(1)  # over t
    present = confusion.sum(0)  # over k
    return torch.where(present > 0, hit / (claimed + present - hit).clamp(min=1), torch.nan).double()


def miou(confusion: Tensor, classes: Tensor) -> float:
    """Mean of `iou` over the classes that occur; 0 without any labelled pixel. Same arguments."""
    return _finite(iou(confusion, classes).nanmean())


def pixel_accuracy(confusion: Tensor, classes: Tensor) -> float:
    """Pixels whose prototype bears their class / labelled pixels, in [0, 1]. Same arguments as `iou`."""
    return _finite(_named(confusion, classes).diagonal().sum() / confusion.sum())


def nmi(confusion: Tensor) -> float:
    """Normalised mutual information of prototypes and classes, 2 I(k, t) / (H(k) + H(t)), in [0, 1].

    confusion (k t). Needs no names for prototypes. 0 if the two are independent, 1 if each determines the other.
    """
    joint = confusion.double() / max(int(confusion.sum()), 1)
    of_prototype, of_class = _entropy(joint.sum(1)), _entropy(joint.sum(0))
    information = of_prototype + of_class - _entropy(joint)
    if of_prototype + of_class == 0:  # one prototype and one class: they do determine each other
        return float(confusion.sum() > 0)
    return float((2 * information / (of_prototype + of_class)).clamp(min=0))  # rounding may leave -1e-16


def adjusted_rand_index(confusion: Tensor) -> float:
    """Agreement of two partitions about which pairs of pixels belong together, 0 by chance and 1 if equal.

    confusion (k t). Names play no part, so it also serves segments that have none (Hubert and Arabie, 1985).
    """
    pairs = lambda counts: (counts * (counts - 1) / 2).sum()  # noqa: E731 - pairs within each cell
    counts = confusion.double()
    together, in_groups, in_classes = pairs(counts), pairs(counts.sum(1)), pairs(counts.sum(0))
    expected = in_groups * in_classes / pairs(counts.sum()).clamp(min=1)
    if in_groups + in_classes == 2 * expected:  # both are one segment, or both are all single pixels
        return 1.0
    return float((together - expected) / ((in_groups + in_classes) / 2 - expected))


def _named(confusion: Tensor, classes: Tensor) -> Tensor:
    """Rows of prototypes (k t) summed into rows of the classes whose name they bear (t t)."""
    if len(classes) != len(confusion):
        raise ValueError(f"{len(classes)} names for {len(confusion)} prototypes")
    bears = classes != UNMATCHED
    named = torch.zeros(confusion.shape[1], confusion.shape[1], dtype=confusion.dtype)
    return named.index_add(0, classes[bears], confusion[bears])


def _entropy(probability: Tensor) -> Tensor:
    return torch.special.entr(probability).sum()


def _finite(score: Tensor) -> float:
    return float(torch.nan_to_num(score))
