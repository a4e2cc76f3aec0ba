"""measures/curves.py: the curves of one run, and of several."""

import json
import math

import numpy as np
import pytest
from matplotlib.colors import to_hex
from trained import record, write_run

from measures import curves


def a_run(name="run", steps=(10, 20, 30), records=None, **config):
    return curves.Run(name, records or [record(step) for step in steps], config)


CONFIG = dict(num_prototypes=16, batch_size=32, temp_slot=0.2, preset="toy", arch="tiny",
              image_size=48)


def lines_of(axis, style):
    return [line for line in axis.get_lines() if line.get_linestyle() == style]


def test_a_torn_line_is_left_out_and_a_repeated_step_counts_once(tmp_path):
    lines = [json.dumps(record(s, loss=i)) for i, s in enumerate((10, 20, 30, 20, 30))]
    name, records, config = curves.read_run(write_run(tmp_path / "run", [*lines, '{"step": 40, "']))
    assert name == "run" and config == {}
    assert [r["step"] for r in records] == [10, 20, 30] and records[1]["loss"] == 3


@pytest.mark.parametrize("contents, message", [
    (b'{"preset": "toy", "num_pro', "is damaged (Unterminated string"),
    (b"", "is damaged (Expecting value"),
    (b"\xff\xfe\x00", "is damaged ("),
    (b'["toy", 16]', "holds no options of a run, which are a JSON object, but a list"),
    (b"[]", "but a list"),
    (b'"toy"', "but a str"),
])  # fmt: skip
def test_a_configuration_that_is_cut_or_no_object_is_one_line_with_its_file(
    tmp_path, contents, message
):
    run = write_run(tmp_path / "run", [json.dumps(record(10))])
    (run / "config.json").write_bytes(contents)
    with pytest.raises(ValueError) as caught:
        curves.read_run(run)
    line = str(caught.value)
    assert line.startswith(f"{run / 'config.json'} ") and message in line and "\n" not in line


def test_chance_is_what_a_network_that_has_learned_nothing_would_log():
    records = [record(1), record(2, occupied_per_image=2.0)]
    chance = curves.chance_lines(records, CONFIG)
    assert chance["group_loss"] == pytest.approx([2 * 2.7726] * 2, abs=1e-4)
    assert chance["entropy_mean"][0] == pytest.approx(math.log(16))
    assert chance["agreement"] == [1 / 16] * 2
    assert chance["slot_loss"] == pytest.approx([0.8 * math.log(32 * 6), 0.8 * math.log(64)])
    assert "slot_loss" not in curves.chance_lines([record(1)], dict(CONFIG, slot_loss="reg"))
    assert curves.chance_lines([record(1)], {}) == {}


def test_the_curves_are_drawn_with_their_chance_lines():
    lined, plain = curves.draw_run(a_run(**CONFIG)), curves.draw_run(a_run())
    dashed = {axis.get_title(loc="left"): lines_of(axis, "--") for axis in lined.axes}
    for title, level in (("Group loss", 2 * math.log(16)), ("Prototypes", 16),
                         ("Entropy of the teacher", math.log(16)),
                         ("Student agrees with teacher", 1 / 16),
                         ("Slot loss", 0.8 * math.log(32 * 6))):
        line, = dashed[title]
        assert line.get_ydata() == pytest.approx([level] * 3)
    assert not any(lines_of(axis, "--") for axis in plain.axes)
    for figure in (lined, plain):
        colors = [to_hex(line.get_color()).upper() for axis in figure.axes
                  for line in lines_of(axis, "-")]
        assert colors.count(curves.BLUE) == 8 and colors.count(curves.ORANGE) == 5
    line, = lines_of(lined.axes[0], "-")
    assert list(line.get_xdata()) == [10, 20, 30] and list(line.get_ydata()) == [5.0] * 3


@pytest.mark.parametrize("momentum", [(0.99, 0.995, 1.0), (0.99, 0.99, 0.99), (1.0, 1.0, 1.0)])
def test_the_axis_of_the_momentum_ends_at_one(momentum):
    records = [record(i, momentum_teacher=m) for i, m in enumerate(momentum)]
    figure = curves.draw_run(a_run(records=records, **CONFIG))
    axis, = (axis for axis in figure.axes if axis.get_ylabel() == "teacher's momentum")
    low, high = axis.get_ylim()
    assert high == 1 and low < min(momentum)
    assert axis.get_lines()[0].get_ydata().tolist() == list(momentum)


def test_a_run_is_titled_with_what_it_is_and_not_only_with_its_preset():
    config = dict(CONFIG, preset="coco-r50", arch="resnet18", num_prototypes=64, image_size=96)
    title = curves.draw_run(a_run(**config)).get_suptitle()
    for words in ("coco-r50", "resnet18", "k = 64", "96 px", "3 records up to step 30"):
        assert words in title
    assert curves.draw_run(a_run()).get_suptitle().startswith("run; 3 records")


# ----------------------------------------------------------------------------------- several runs


def test_the_legend_names_the_options_that_differ_and_no_others():
    runs = [a_run("a", seed=0, batch_size=32, output_dir="x"),
            a_run("b", seed=1, batch_size=32, output_dir="y", image_loss=True), a_run("c")]
    assert curves.legend_of(runs) == [
        "a: seed 0, batch-size 32", "b: seed 1, batch-size 32, image-loss True",
        "c: no config.json"]
    assert curves.legend_of([a_run("a", seed=3), a_run("b", seed=3)]) == [
        "a: no option differs", "b: no option differs"]


def test_a_legend_of_many_differences_counts_the_rest():
    runs = [a_run(name, **{f"option_{i}": (name, i) for i in range(9)}) for name in "ab"]
    assert curves.legend_of(runs)[0].endswith(", 3 more")


def test_every_run_has_one_color_in_all_panels_and_its_own_numbers():
    runs = [a_run(name, records=[record(s, group_loss=level) for s in (1, 2)], **CONFIG)
            for name, level in (("a", 3.0), ("b", 4.0), ("c", 5.0))]
    figure = curves.draw_comparison(runs)
    colors = set()
    for axis in figure.axes:
        solid = [line.get_color() for line in lines_of(axis, "-")]
        assert len(solid) == len(set(solid)) == 3
        colors.add(tuple(solid))
    assert len(colors) == 1 and len(figure.axes) == 8
    assert [line.get_ydata()[0] for line in lines_of(figure.axes[0], "-")] == [3, 4, 5]
    legend, = figure.legends
    assert [text.get_text().split(":")[0] for text in legend.get_texts()] == ["a", "b", "c"]


def test_runs_beyond_the_colors_have_another_line_style():
    figure = curves.draw_comparison([a_run(str(i)) for i in range(9)])
    looks = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].get_lines()}
    assert len(looks) == 9


def test_a_key_that_a_log_lacks_leaves_a_gap_and_no_error():
    old = {key: value for key, value in record(1).items() if key != "agreement"}
    figure = curves.draw_comparison([a_run(records=[old]), a_run(records=[record(1)])])
    axis, = (axis for axis in figure.axes if "agrees" in axis.get_title(loc="left"))
    assert np.isnan(axis.get_lines()[0].get_ydata()).all()
