"""measures/palette.py: colors that everybody can tell apart."""

import numpy as np
import pytest

from measures import palette


def test_a_prototype_has_the_same_color_whatever_their_number():
    whole = palette.prototype_colors(300)
    for k in (1, 3, 16, 27):
        assert (palette.prototype_colors(k) == whole[:k]).all()


def test_2048_prototypes_have_2048_colors():
    colors = palette.prototype_colors(2048)
    assert colors.shape == (2048, 3) and len(np.unique(colors, axis=0)) == 2048


def test_the_first_27_colors_differ_for_every_kind_of_color_vision():
    looks = palette.appearance(palette.prototype_colors(27))
    distance = np.sqrt(np.square(looks[:, None] - looks[None]).sum(axis=3))  # (27 27 vision)
    assert (
        distance[~np.eye(27, dtype=bool)].min() > 0.05
    )  # in Oklab a difference of 0.02 is just seen
    usual = distance[:16, :16, 0]
    assert usual[~np.eye(16, dtype=bool)].min() > 0.14


def test_red_and_green_of_equal_lightness_look_alike_to_two_visions_and_not_to_the_others():
    looks = palette.appearance(np.array([[180, 60, 60], [110, 110, 40]]))
    distance = dict(zip(palette.VISIONS, np.sqrt(np.square(looks[0] - looks[1]).sum(axis=1))))
    assert (
        distance["protanopia"] < distance["usual"] / 2
        and distance["deuteranopia"] < distance["usual"] / 2
    )


def test_white_black_and_gray_are_where_oklab_has_them():
    looks = palette.appearance(np.array([[255, 255, 255], [0, 0, 0], [119, 119, 119]]))
    assert looks[:, 0, 0] == pytest.approx([1, 0, 0.5676], abs=2e-3)
    assert np.abs(looks[:, 0, 1:]).max() < 1e-3


def test_a_palette_cannot_be_changed_by_who_borrows_it():
    with pytest.raises(ValueError):
        palette.prototype_colors(4)[0] = 0
