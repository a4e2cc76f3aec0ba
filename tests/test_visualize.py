"""visualize.py and palette.py: pictures that show what they say they show."""

import json
import math

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

import visualize
from engine import checkpoint
from grouping import GroupingNetwork
from measures import palette
from measures.segments import Retrieval, center_view

K = 5


class BySide(torch.nn.Module):
    """Prototype 2 owns the left two thirds of every picture, prototype 4 the right third."""

    def __init__(self):
        super().__init__()
        self.prototypes = torch.nn.Embedding(K, 3)

    def forward(self, images):
        similarity = torch.zeros(len(images), K, 6, 6)
        similarity[:, 2, :, :4] = 0.9
        similarity[:, 4, :, 4:] = 0.8
        return torch.randn(len(images), 3, 6, 6), similarity


@pytest.fixture
def trained(tmp_path):
    torch.manual_seed(1)
    network = GroupingNetwork("tiny", K, 12, 6)
    state = {f"{which}.{k}": v for which in ("student", "teacher") for k, v in network.state_dict().items()}
    checkpoint.save(tmp_path / "last.pth", dict(model=state, config=dict(image_size=32, temp_teacher=0.07)))
    return str(tmp_path / "last.pth")


def pixels(file):
    return np.asarray(Image.open(file).convert("RGB")).astype(int)


def share_of(image, color, tolerance=3):
    """Share of the pixels of image (y x 3) with this color."""
    return float((np.abs(image - np.array(color)).max(axis=2) <= tolerance).mean())


# ------------------------------------------------------------------------------------------ palette


def test_a_prototype_has_the_same_color_whatever_their_number():
    whole = palette.palette(300)
    for k in (1, 3, 16, 27):
        assert (palette.palette(k) == whole[:k]).all()


def test_2048_prototypes_have_2048_colors():
    colors = palette.palette(2048)
    assert colors.shape == (2048, 3) and len(np.unique(colors, axis=0)) == 2048


def test_the_first_27_colors_differ_for_every_kind_of_color_vision():
    looks = palette.appearance(palette.palette(27))
    distance = np.sqrt(np.square(looks[:, None] - looks[None]).sum(axis=3))  # (27 27 vision)
    assert distance[~np.eye(27, dtype=bool)].min() > 0.05  # in Oklab a difference of 0.02 is just seen
    usual = distance[:16, :16, 0]
    assert usual[~np.eye(16, dtype=bool)].min() > 0.14


def test_red_and_green_of_equal_lightness_look_alike_to_two_visions_and_not_to_the_others():
    looks = palette.appearance(np.array([[180, 60, 60], [110, 110, 40]]))
    distance = dict(zip(palette.VISIONS, np.sqrt(np.square(looks[0] - looks[1]).sum(axis=1))))
    assert distance["protanopia"] < distance["usual"] / 2 and distance["deuteranopia"] < distance["usual"] / 2


def test_white_black_and_gray_are_where_oklab_has_them():
    looks = palette.appearance(np.array([[255, 255, 255], [0, 0, 0], [119, 119, 119]]))
    assert looks[:, 0, 0] == pytest.approx([1, 0, 0.5676], abs=2e-3)
    assert np.abs(looks[:, 0, 1:]).max() < 1e-3


def test_a_palette_cannot_be_changed_by_who_borrows_it():
    with pytest.raises(ValueError):
        palette.palette(4)[0] = 0


# --------------------------------------------------------------------------------------- prototypes


def test_red_covers_the_segment_and_nothing_else():
    image = torch.full((3, 4, 5), 100, dtype=torch.uint8)
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[1, 2:] = True
    drawn = visualize.redden(image, mask)
    assert drawn[:, ~mask].equal(image[:, ~mask])
    assert (drawn[0, mask] > 150).all() and (drawn[1:, mask] < 90).all()


def test_the_segment_of_a_prototype_is_where_its_enlarged_map_wins():
    image = torch.zeros(3, 36, 36, dtype=torch.uint8)
    left, right = (visualize.segment_of(BySide(), image, k) for k in (2, 4))
    assert left[:, :22].all() and not left[:, 26:].any() and (left ^ right).all()
    assert not visualize.segment_of(BySide(), image, 0).any()


def test_a_cell_that_vanishes_when_enlarged_is_shown_as_a_cell():
    class Speck(BySide):
        def forward(self, images):
            similarity = torch.zeros(1, K, 6, 6)
            similarity[:, 1] = 0.9
            similarity[:, 1, 3, 2], similarity[:, 3, 3, 2] = 0.899, 0.9  # barely, in one cell
            return None, similarity

    mask = visualize.segment_of(Speck(), torch.zeros(3, 24, 24, dtype=torch.uint8), 3)
    assert mask[12:16, 8:12].all() and mask.sum() == 16


def red_pixels(image):
    return (image[..., 0] > image[..., 1] + 60) & (image[..., 0] > image[..., 2] + 60)


def test_the_grid_highlights_the_region_of_each_columns_prototype(tmp_path):
    pictures = [torch.full((3, 36, 36), 128, dtype=torch.uint8)] * 3
    found = visualize.retrieve(BySide(), pictures, center_view(36), top=3, batch_size=2, workers=0)
    assert found.active.tolist() == [0, 0, 3, 0, 3] and found.pictures[2].tolist() == [0, 1, 2]
    file, = visualize.save_prototypes(tmp_path / "p.png", BySide(), pictures, center_view(36), found, [2, 4])
    image = pixels(file)
    image = image[image.shape[0] // 3 :]  # below the titles and the stripes of color
    gray = np.abs(image - 128).max(axis=2) < 8
    first = [slice(0, image.shape[1] // 4), slice(image.shape[1] // 4, image.shape[1] // 2)]  # of four columns
    for column, share, side in zip(first, (2 / 3, 1 / 3), (-1, 1)):
        red, rest = red_pixels(image[:, column]), gray[:, column]
        assert red.sum() / (red.sum() + rest.sum()) == pytest.approx(share, abs=0.06)
        assert np.sign(red.nonzero()[1].mean() - rest.nonzero()[1].mean()) == side


def test_a_small_segment_gets_an_arrow():
    mask = torch.zeros(40, 40, dtype=torch.bool)
    mask[10:12, 30:32] = True
    for large, arrows in ((False, 2), (True, 0)):  # a red arrow on a white one
        axis = Figure().subplots()
        visualize.draw_retrieved(axis, torch.zeros(3, 40, 40, dtype=torch.uint8), mask | large)
        assert len(axis.texts) == arrows
    assert visualize.draw_retrieved(Figure().subplots(), torch.zeros(3, 4, 4, dtype=torch.uint8), mask[:4, :4]) is None


def test_many_prototypes_go_to_several_files(tmp_path):
    found = Retrieval(K, top=1)
    found.active[:] = 1
    files = visualize.save_prototypes(tmp_path / "p.png", BySide(), [], None, found, [0, 1] * 7)
    assert [file.name for file in files] == ["p-001.png", "p-002.png"] and all(file.is_file() for file in files)


def test_prototypes_are_chosen_by_use_by_extremes_or_by_number():
    active = torch.tensor([3, 0, 9, 9, 1, 2, 4, 5, 6, 7, 8, 2, 10])
    choose = visualize.choose_prototypes
    assert choose(active, ["used"], 3) == [12, 2, 3]
    assert choose(active, ["all"], 3) == [0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    assert choose(active, ["extremes"], 3) == [12, 2, 3, 10, 9, 6, 0, 5, 11, 4]
    assert choose(active, ["7", "1"], 3) == [7, 1]
    for wrong in (["13"], ["best"], ["-1"], ["used", "3"]):
        with pytest.raises(ValueError, match=r"--show .*numbers from 0 to 12"):
            choose(active, wrong, 3)


# ------------------------------------------------------------------------------------------- groups


def test_groups_and_truth_wear_the_colors_of_the_prototypes(tmp_path):
    images = torch.full((2, 3, 8, 8), 128, dtype=torch.uint8)
    groups = torch.full((2, 8, 8), 3)
    groups[:, :, 4:] = 1
    truth = torch.zeros(2, 8, 8, dtype=torch.uint8)
    truth[:, :, 4:] = 2
    visualize.save_groups(tmp_path / "g.png", images, groups, truth, K, ("a", "b", "c"))
    image, colors = pixels(tmp_path / "g.png"), palette.palette(K)
    by_row = np.array_split(image, 3)
    assert share_of(image, colors[3]) == pytest.approx(share_of(image, colors[1]), rel=0.1)
    for k in (3, 1):  # matched with classes 0 and 2, so as much of it in the truth as in the groups
        assert share_of(by_row[1], colors[k]) > 0.1 and share_of(by_row[2], colors[k]) > 0.02
    assert all(share_of(image, colors[k]) < 0.001 for k in (0, 2))


def test_a_given_matching_decides_the_colors_of_the_truth(tmp_path):
    images, groups = torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.full((2, 8, 8), 3)
    truth = torch.zeros(2, 8, 8, dtype=torch.uint8)
    visualize.save_groups(tmp_path / "g.png", images, groups, truth, K, ("a", "b"), matching=dict(a=0, b=None))
    image = pixels(tmp_path / "g.png")
    assert share_of(image, palette.palette(K)[0]) > 0.05
    visualize.save_groups(tmp_path / "g.png", images, groups, truth, K, ("a", "b"), matching=dict(a=None, b=0))
    assert share_of(pixels(tmp_path / "g.png"), palette.GREY) > 0.05


def test_painted_segments_have_the_color_of_their_prototype():
    painted = visualize.paint(torch.tensor([[0, 4], [2, 2]]), K)
    assert painted.shape == (2, 2, 3) and (painted[0, 1] == palette.palette(K)[4]).all()


def test_the_strongest_slots_have_the_most_assignment():
    soft = torch.zeros(4, 2, 3)
    soft[1], soft[3], soft[0, 0, 0] = 0.5, 0.3, 0.9
    assert visualize.strongest(soft, 3) == [1, 3, 0] and visualize.strongest(soft, 9) == [1, 3, 0, 2]


@pytest.mark.parametrize("d", [2, 3, 7])
def test_equal_features_get_equal_colors_and_unlike_ones_unlike_colors(d):
    generator = torch.Generator().manual_seed(0)
    kinds = torch.randn(2, d, generator=generator)
    which = torch.randint(0, 2, (3, 4, 5), generator=generator)
    embeddings = kinds[which].permute(0, 3, 1, 2) * torch.rand(3, 1, 4, 5, generator=generator).add(0.5)
    colors = visualize.principal_colors(embeddings, (4, 5))  # cosines count, so the length of a vector does not
    assert colors.shape == (3, 4, 5, 3) and colors.min() >= 0 and colors.max() <= 1
    apart = colors[which == 0].mean(0) - colors[which == 1].mean(0)
    assert apart.abs().max() > 0.9 and colors[which == 0].std(0)[apart.abs().argmax()] < 0.05


def test_the_colors_of_features_do_not_flip_with_their_order():
    embeddings = torch.randn(3, 7, 4, 5, generator=torch.Generator().manual_seed(1))
    one, two = (visualize.principal_colors(each, (8, 10)) for each in (embeddings, embeddings.flip(0)))
    assert torch.allclose(one, two.flip(0), atol=1e-4)


# ----------------------------------------------------------------------------------------- training


def record(step, **other):
    return dict(dict(step=step, loss=1.0, group_loss=5.0, slot_loss=2.0, lr=0.1, momentum_teacher=0.99, grad_norm=1.0,
                     occupied_per_image=6.0, prototypes_used=9, entropy_teacher=1.0, entropy_mean=2.5, agreement=0.6,
                     images_per_second=90.0, data_seconds=0.01, skipped_steps=0), **other)  # fmt: skip


def write_run(folder, lines, **config):
    folder.mkdir(exist_ok=True)
    (folder / "log.jsonl").write_text("\n".join(lines))
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_torn_line_is_left_out_and_a_repeated_step_counts_once(tmp_path):
    lines = [json.dumps(record(s, loss=i)) for i, s in enumerate((10, 20, 30, 20, 30))] + ['{"step": 40, "lo']
    records, config = visualize.read_log(write_run(tmp_path / "run", lines))
    assert [r["step"] for r in records] == [10, 20, 30] and records[1]["loss"] == 3 and config == {}


def test_chance_is_what_a_network_that_knows_nothing_would_log():
    config = dict(num_prototypes=16, batch_size=32, temp_slot=0.2)
    chance = visualize.chance_lines([record(1), record(2, occupied_per_image=2.0)], config)
    assert chance["group_loss"] == pytest.approx([2 * 2.7726] * 2, abs=1e-4)
    assert chance["entropy"][0] == pytest.approx(math.log(16)) and chance["agreement"] == [1 / 16] * 2
    assert chance["slot_loss"] == pytest.approx([0.8 * math.log(32 * 6), 0.8 * math.log(64)])
    assert "slot_loss" not in visualize.chance_lines([record(1)], dict(config, slot_loss="reg"))
    assert visualize.chance_lines([record(1)], {}) == {}


def test_the_curves_are_drawn_with_their_chance_lines(tmp_path, monkeypatch):
    records, config = [record(s) for s in range(10, 60, 10)], dict(num_prototypes=16, batch_size=32, preset="toy")
    visualize.save_training(tmp_path / "lined.png", records, config)
    monkeypatch.setattr(visualize, "chance_lines", lambda *_: {})
    visualize.save_training(tmp_path / "plain.png", records, config)
    lined, plain = pixels(tmp_path / "lined.png"), pixels(tmp_path / "plain.png")
    blue, orange = ([int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in (visualize.BLUE, visualize.ORANGE))
    assert min(share_of(lined, blue), share_of(lined, orange)) > 0.0005
    assert share_of(lined, (0, 0, 0), 40) > share_of(plain, (0, 0, 0), 40) + 0.0001


def test_a_log_without_a_configuration_is_drawn_and_says_what_is_missing(tmp_path, capsys):
    run = write_run(tmp_path / "run", [json.dumps(record(s)) for s in (10, 20)])
    assert visualize.main(["training", str(run), "--output", str(tmp_path / "a.png")]) == 0
    assert "no config.json" in capsys.readouterr().out and (tmp_path / "a.png").is_file()


# -------------------------------------------------------------------------------------- the program


def test_every_subcommand_writes_its_picture_and_says_where(trained, tmp_path, capsys):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(tmp_path / "x.png")
    for command in (["prototypes", trained, "--limit", "6", "--top", "2", "--count", "3"],
                    ["groups", trained, "--count", "2", "--slots", "9"], ["groups", trained, str(tmp_path / "x.png")],
                    ["groups", trained, "--data-dir", str(tmp_path), "--count", "1"]):
        assert visualize.main([*command, "--output", str(tmp_path / "out.png")]) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert result["files"] == [str(tmp_path / "out.png")] and Image.open(tmp_path / "out.png").width > 300
        (tmp_path / "out.png").unlink()


@pytest.mark.parametrize("argv, message", [
    (["prototypes", "none.pth"], "no checkpoint"),
    (["prototypes", "TRAINED", "--show", "best", "--limit", "2"], "numbers from 0 to 4"),
    (["groups", "TRAINED", "nowhere.jpg"], "cannot read"),
    (["groups", "TRAINED", "--count", "0"], "less than 1"),
    (["training", "nowhere"], "give the output directory of a run"),
    (["training", "EMPTY"], "no line with a step yet"),
    (["paint"], "invalid choice"),
])  # fmt: skip
def test_wrong_input_ends_with_one_line_and_exit_code_2(argv, message, trained, tmp_path, capsys):
    empty = str(write_run(tmp_path / "empty", ["{}"]))
    words = [{"TRAINED": trained, "EMPTY": empty}.get(word, word) for word in argv]
    assert visualize.main([*words, "--output", str(tmp_path / "out.png")] if argv != ["paint"] else words) == 2
    out, err = capsys.readouterr()
    assert message in err and err.startswith("visualize.py: ") and err.count("\n") == 1 and not out
    assert not (tmp_path / "out.png").exists()
