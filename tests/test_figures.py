"""measures/figures.py: figures that show what they claim to show."""

import numpy as np
import pytest
import torch
from matplotlib.colors import rgb_to_hsv
from PIL import Image

from measures import figures
from measures.figures import prototype_colors
from measures.retrieval import retrieve
from measures.streams import center_view
from trained import K


class BySide(torch.nn.Module):
    """Prototype 2 owns the left two thirds, 4 the right third, and 3 one cell, by little."""

    def __init__(self):
        super().__init__()
        self.prototypes = torch.nn.Embedding(K, 3)

    def forward(self, images):
        similarity = torch.zeros(len(images), K, 6, 6)
        similarity[:, 2, :, :4] = 0.9
        similarity[:, 4, :, 4:] = 0.8
        similarity[:, 3, 5, 1] = 0.901
        return torch.randn(len(images), 3, 6, 6), similarity


def pixels(file):
    return np.asarray(Image.open(file).convert("RGB")) / 255


def share_of(image, color):
    """Share of the pixels of image (y x 3) in 0..1 with this color."""
    return float((np.abs(image - np.array(color)).max(axis=2) < 0.02).mean())


def test_colors_are_a_function_of_the_prototype_and_clear_of_gray():
    many = prototype_colors(2048)
    assert all((prototype_colors(k) == many[:k]).all() for k in (1, 3, 24, 300))
    assert len(np.unique(many, axis=0)) == 2048 and many.min() >= 0 and many.max() <= 1
    _, saturation, value = rgb_to_hsv(many).T
    assert saturation.min() > 0.3 and value.min() > 0.3
    apart = np.abs(many[:24, None] - many[None, :24]).max(axis=2)
    assert (apart + np.eye(24)).min() > 0.19


def test_the_most_used_prototypes_have_the_best_separated_colors():
    use = torch.arange(40).roll(7)
    order = use.argsort(descending=True)
    assert (prototype_colors(40, use)[order] == prototype_colors(40)).all()
    # Where there are enough good ones, a prototype has one color in all figures
    assert (prototype_colors(24, use[:24]) == prototype_colors(24)).all()


@pytest.mark.parametrize("k, words", [(24, "prototype. "), (25, "prototype, in this figure only.")])
def test_a_figure_says_where_its_colors_are_not_those_of_others(k, words, monkeypatch):
    network, found = BySide(), []
    network.prototypes = torch.nn.Embedding(k, 3)
    monkeypatch.setattr(figures, "save", lambda figure, *_: found.append(figure))
    figures.draw_parts("x.png", network, torch.zeros(1, 3, 36, 36, dtype=torch.uint8), 0.1)
    assert words in found[0].get_suptitle()


def test_no_soft_panel_is_near_gray():
    gray = np.linspace(0, 1, 30)[None, :, None].repeat(3, axis=2)
    for color in prototype_colors(24):
        panel = figures.tint(gray, color, np.ones((1, 30)))
        assert (panel.max(axis=2) - panel.min(axis=2)).min() > 0.23


def test_the_segment_of_a_prototype_is_where_its_enlarged_map_wins():
    image = torch.zeros(3, 36, 36, dtype=torch.uint8)
    left, right, speck, none = (figures.segment_of(BySide(), image, k) for k in (2, 4, 3, 0))
    assert left[:30, :22].all() and not left[:, 26:].any() and (left ^ right)[:30].all()
    assert not none.any()
    # It loses all its pixels when the maps are enlarged, and is shown as a cell
    assert speck[30:, 6:12].all() and speck.sum() == 36


@pytest.mark.parametrize("shade", [(128, 128, 128), (230, 20, 20), (240, 240, 240)])
def test_each_column_shows_the_segments_of_its_prototype_and_all_else_gray(shade, tmp_path):
    images = [torch.tensor(shade, dtype=torch.uint8)[:, None, None].expand(3, 36, 36)] * 3
    found = retrieve(BySide(), images, center_view(36), top=3, batch_size=2, workers=0)
    file = tmp_path / "p.png"
    figures.draw_prototypes(file, BySide(), images, center_view(36), found, [2, 4])
    image = pixels(file)
    colors = prototype_colors(K, found.cells)
    assert all(share_of(image, colors[k]) > 0.001 for k in (2, 4))  # the lines
    image, width = image[len(image) // 3 :], image.shape[1]
    rest_color = 0.6 + 0.4 * sum(shade) / 765
    for first, share, side in ((0, 2 / 3, -1), (width // 4, 1 / 3, 1)):  # of four columns
        column = image[:, first : first + width // 4]
        within = column.max(axis=2) - column.min(axis=2) > 0.1
        rest = np.abs(column - rest_color).max(axis=2) < 0.02
        assert within.sum() / (within.sum() + rest.sum()) == pytest.approx(share, abs=0.06)
        assert np.sign(within.nonzero()[1].mean() - rest.nonzero()[1].mean()) == side


def test_a_group_has_the_color_of_what_it_is_matched_with_and_others_the_next_by_use(tmp_path):
    truth, groups = torch.zeros(3, 8, 8).byte(), torch.full((3, 8, 8), 4)
    truth[:, :, 2:] = 1  # group 4: of class 1; 3: of no class; 0: of class 0, and 2: of no class
    groups[:, 0, 2:], groups[:, :, 0], groups[:, :2, 0] = 3, 0, 2
    colors, found = prototype_colors(4), figures.color_groups(groups, truth)
    for group, place in {4: 1, 3: 2, 0: 0, 2: 3}.items():
        assert (found[groups == group] == colors[place]).all()
    # As another set of images has them matched: class 0 with 3, class 1 with nothing, 2 with 4
    colors, found = prototype_colors(6), figures.color_groups(groups, truth, [3, None, 4])
    for group, place in {3: 0, 4: 2, 0: 3, 2: 4}.items():
        assert (found[groups == group] == colors[place]).all()
    file, rows = tmp_path / "g.png", [colors[truth], found]
    legend = dict(zip("abc", colors))
    figure = figures.grid("title", rows, ["truth", "groups"], legend=legend)
    figures.save(figure, file, 130)
    shares = [share_of(pixels(file), colors[place]) for place in (0, 1, 5)]
    assert shares[1] > shares[0] > 0.05 and shares[2] == 0


@pytest.mark.parametrize("d", [2, 3, 7])
def test_equal_features_get_equal_colors_and_unlike_ones_unlike_colors(d):
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(2, d, generator=generator)
    which = torch.randint(0, 2, (3, 4, 5), generator=generator)
    lengths = torch.rand(3, 1, 4, 5, generator=generator) + 0.5  # cosines count
    embeddings = kinds[which].permute(0, 3, 1, 2) * lengths
    colors = figures.principal_colors(embeddings, (4, 5))
    assert colors.shape == (3, 4, 5, 3) and colors.min() >= 0 and colors.max() <= 1
    apart = (colors[which == 0].mean(0) - colors[which == 1].mean(0)).abs()
    assert apart.max() > 0.9 and colors[which == 0].std(0)[apart.argmax()] < 0.05
