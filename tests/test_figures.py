"""measures/figures.py: figures that show what they say they show."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from trained import K

from measures import figures, palette
from measures.retrieval import Retrieval, retrieve
from measures.streams import center_view


class BySide(torch.nn.Module):
    """Prototype 2 owns the left two thirds of every image, prototype 4 the right third."""

    def __init__(self):
        super().__init__()
        self.prototypes = torch.nn.Embedding(K, 3)

    def forward(self, images):
        similarity = torch.zeros(len(images), K, 6, 6)
        similarity[:, 2, :, :4] = 0.9
        similarity[:, 4, :, 4:] = 0.8
        return torch.randn(len(images), 3, 6, 6), similarity


def pixels(file):
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


def share_of(image, color, tolerance=3):
    """Share of the pixels of image (y x 3) with this color."""
    return float((np.abs(image - np.array(color)).max(axis=2) <= tolerance).mean())



# prototypes

def test_red_covers_the_segment_and_nothing_else():
    image = torch.full((3, 4, 5), 100, dtype=torch.uint8)
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[1, 2:] = True
    drawn = figures.redden(image, mask)
    assert drawn[:, ~mask].equal(image[:, ~mask])
    assert (drawn[0, mask] > 150).all() and (drawn[1:, mask] < 90).all()


def test_the_segment_of_a_prototype_is_where_its_enlarged_map_wins():
    image = torch.zeros(3, 36, 36, dtype=torch.uint8)
    left, right = (figures.segment_of(BySide(), image, k) for k in (2, 4))
    assert left[:, :22].all() and not left[:, 26:].any() and (left ^ right).all()
    assert not figures.segment_of(BySide(), image, 0).any()


def test_a_cell_that_vanishes_when_enlarged_is_shown_as_a_cell():
    class Speck(BySide):
        def forward(self, images):
            similarity = torch.zeros(1, K, 6, 6)
            similarity[:, 1] = 0.9
            similarity[:, 1, 3, 2], similarity[:, 3, 3, 2] = 0.899, 0.9  # barely, in one cell
            return None, similarity

    mask = figures.segment_of(Speck(), torch.zeros(3, 24, 24, dtype=torch.uint8), 3)
    assert mask[12:16, 8:12].all() and mask.sum() == 16


def red_pixels(image):
    return (image[..., 0] > image[..., 1] + 60) & (image[..., 0] > image[..., 2] + 60)


def test_the_grid_highlights_the_region_of_each_columns_prototype(tmp_path):
    images = [torch.full((3, 36, 36), 128, dtype=torch.uint8)] * 3
    found = retrieve(BySide(), images, center_view(36), top=3, batch_size=2, workers=0)
    assert found.active.tolist() == [0, 0, 3, 0, 3] and found.images[2].tolist() == [0, 1, 2]
    (file,) = figures.draw_prototypes(
        tmp_path / "p.png", BySide(), images, center_view(36), found, [2, 4]
    )
    image = pixels(file)
    image = image[image.shape[0] // 3 :]  # below the titles and the stripes of color
    gray = np.abs(image - 128).max(axis=2) < 8
    first = [
        slice(0, image.shape[1] // 4),
        slice(image.shape[1] // 4, image.shape[1] // 2),
    ]  # of four columns
    for column, share, side in zip(first, (2 / 3, 1 / 3), (-1, 1)):
        red, rest = red_pixels(image[:, column]), gray[:, column]
        assert red.sum() / (red.sum() + rest.sum()) == pytest.approx(share, abs=0.06)
        assert np.sign(red.nonzero()[1].mean() - rest.nonzero()[1].mean()) == side


def test_a_small_segment_gets_an_arrow():
    mask = torch.zeros(40, 40, dtype=torch.bool)
    mask[10:12, 30:32] = True
    for large, arrows in ((False, 2), (True, 0)):  # a red arrow on a white one
        axis = Figure().subplots()
        figures.draw_retrieved(axis, torch.zeros(3, 40, 40, dtype=torch.uint8), mask | large)
        assert len(axis.texts) == arrows
    assert (
        figures.draw_retrieved(
            Figure().subplots(), torch.zeros(3, 4, 4, dtype=torch.uint8), mask[:4, :4]
        )
        is None
    )


def test_many_prototypes_go_to_several_files(tmp_path):
    found = Retrieval(K, top=1)
    found.active[:] = 1
    files = figures.draw_prototypes(tmp_path / "p.png", BySide(), [], None, found, [0, 1] * 7)
    assert [file.name for file in files] == ["p-001.png", "p-002.png"] and all(
        file.is_file() for file in files
    )


# groups

def test_groups_and_truth_wear_the_colors_of_the_prototypes(tmp_path):
    images = torch.full((2, 3, 8, 8), 128, dtype=torch.uint8)
    groups = torch.full((2, 8, 8), 3)
    groups[:, :, 4:] = 1
    truth = torch.zeros(2, 8, 8, dtype=torch.uint8)
    truth[:, :, 4:] = 2
    figures.draw_groups(tmp_path / "g.png", images, groups, truth, K, ("a", "b", "c"))
    image, colors = pixels(tmp_path / "g.png"), palette.prototype_colors(K)
    by_row = np.array_split(image, 3)
    assert share_of(image, colors[3]) == pytest.approx(share_of(image, colors[1]), rel=0.1)
    for k in (3, 1):  # matched with classes 0 and 2, so as much of it in the truth as in the groups
        assert share_of(by_row[1], colors[k]) > 0.1 and share_of(by_row[2], colors[k]) > 0.02
    assert all(share_of(image, colors[k]) < 0.001 for k in (0, 2))


def test_a_given_matching_decides_the_colors_of_the_truth(tmp_path):
    images, groups = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.full((2, 8, 8), 3)
    truth = torch.zeros(2, 8, 8, dtype=torch.uint8)
    figures.draw_groups(
        tmp_path / "g.png", images, groups, truth, K, ("a", "b"), matching=dict(a=0, b=None)
    )
    image = pixels(tmp_path / "g.png")
    assert share_of(image, palette.prototype_colors(K)[0]) > 0.05
    figures.draw_groups(
        tmp_path / "g.png", images, groups, truth, K, ("a", "b"), matching=dict(a=None, b=0)
    )
    assert share_of(pixels(tmp_path / "g.png"), palette.GRAY) > 0.05


def test_painted_segments_have_the_color_of_their_prototype():
    painted = figures.paint(torch.tensor([[0, 4], [2, 2]]), K)
    assert painted.shape == (2, 2, 3) and (painted[0, 1] == palette.prototype_colors(K)[4]).all()


def test_the_strongest_slots_have_the_most_assignment():
    soft = torch.zeros(4, 2, 3)
    soft[1], soft[3], soft[0, 0, 0] = 0.5, 0.3, 0.9
    assert figures.strongest(soft, 3) == [1, 3, 0] and figures.strongest(soft, 9) == [1, 3, 0, 2]


@pytest.mark.parametrize("d", [2, 3, 7])
def test_equal_features_get_equal_colors_and_unlike_ones_unlike_colors(d):
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(2, d, generator=generator)
    which = torch.randint(0, 2, (3, 4, 5), generator=generator)
    embeddings = kinds[which].permute(0, 3, 1, 2) * torch.rand(3, 1, 4, 5, generator=generator).add(
        0.5
    )
    colors = figures.principal_colors(
        embeddings, (4, 5)
    )  # cosines count, so the length of a vector does not
    assert colors.shape == (3, 4, 5, 3) and colors.min() >= 0 and colors.max() <= 1
    apart = colors[which == 0].mean(0) - colors[which == 1].mean(0)
    assert apart.abs().max() > 0.9 and colors[which == 0].std(0)[apart.abs().argmax()] < 0.05


def test_the_colors_of_features_do_not_flip_with_their_order():
    embeddings = torch.randn(3, 7, 4, 5, generator=torch.Generator().manual_seed(1))
    one, two = (
        figures.principal_colors(each, (8, 10)) for each in (embeddings, embeddings.flip(0))
    )
    assert torch.allclose(one, two.flip(0), atol=1e-4)


# ------------------------------------------------------------------------------------------ parts


def test_slot_maps_are_light_where_the_slot_is_not_and_colored_where_it_is():
    dark = np.zeros((4, 6, 3))
    dark[:2] = 0.2  # a dark photograph: its two halves must still differ
    sure = np.zeros((4, 6))
    sure[:, 3:] = 1
    color = np.array([0.8, 0.1, 0.1])
    drawn = figures.tint(dark, color, sure)
    assert drawn[:, :3].min() >= 0.55 and drawn[:2, :3].min() > drawn[2:, :3].max()
    assert (np.abs(drawn[:, 3:] - color) < 0.3).all()
    assert (drawn[:, 3:, 0] - drawn[:, 3:, 1] > 0.4).all()  # red stays red
    assert figures.tint(np.ones((2, 2, 3)), np.ones(3), np.ones((2, 2))).max() <= 1


def test_parts_of_many_images_go_to_several_files(tmp_path):
    torch.manual_seed(0)
    network, images = BySide(), torch.zeros(figures.PER_PAGE + 1, 3, 24, 24, dtype=torch.uint8)
    files = figures.draw_parts(tmp_path / "p.png", network, images, 0.07, slots=1)
    assert [file.name for file in files] == ["p-001.png", "p-002.png"]
    heights = [Image.open(file).height for file in files]
    assert heights[0] > 4 * heights[1]
    one, = figures.draw_parts(tmp_path / "q.png", network, images[:1], 0.07, slots=9)
    assert one.name == "q.png"
