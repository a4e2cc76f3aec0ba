"""measures/audit.py: how far shortcuts get on toy scenes."""

import numpy as np
import pytest

import toy
from measures import audit


def test_a_lookup_table_finds_what_there_is_and_nothing_else():
    labels = (np.arange(4 * 6 * 5) % 8).reshape(4, 6, 5)
    assert audit.lookup_accuracy(labels + 1, labels) == 1.0
    assert audit.lookup_accuracy(np.zeros_like(labels), labels) == pytest.approx(1 / 8)


def test_kmeans_finds_classes_that_have_a_color_each():
    labels = np.stack([toy.scene(1, index).semantic for index in range(40)])
    assert audit.kmeans_miou(toy.CLASS_COLORS[labels], labels, seed=1) > 0.4


def test_neither_color_nor_position_solves_the_default():
    shortcuts = audit.shortcuts(seed=1, count=64)
    assert shortcuts["position"] < 0.17 and shortcuts["rgb_kmeans_miou"] < 0.16
    assert shortcuts["color"] < 0.30 < shortcuts["random_convolutions"] < 0.7
