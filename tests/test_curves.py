"""measures/curves.py: the curves of one run, and of several."""

import itertools
import json
import math

import numpy as np
import pytest
from matplotlib.text import Text

from measures import curves
from trained import record, write_run

CONFIG = dict(preset="toy", num_prototypes=16, batch_size=32, temp_slot=0.2, arch="tiny")


def a_run(name="run", records=None, **config):
    return curves.Run(name, records or [record(step) for step in (10, 20, 30)], config)


def panels_of(runs):
    """Key of the log -> (curves, chance lines), one of each per run."""
    figure = curves.draw_runs(runs)
    lines = [axis.get_lines() for axis in figure.axes]
    return figure, {key: (some[1::2], some[::2]) for key, some in zip(curves.PANELS, lines)}


def test_a_torn_line_is_left_out_and_a_repeated_step_counts_once(tmp_path):
    lines = [json.dumps(record(s, loss=i)) for i, s in enumerate((10, 20, 30, 15, 30))]
    run = write_run(tmp_path / "run", [*lines, '{"step": 40, "'])
    (run / "config.json").write_text('{"preset": "toy", "num_pro')  # cut: as if there were none
    name, records, config = curves.read_run(run)
    assert name == "run" and config == {}
    assert [r["step"] for r in records] == [10, 15, 20, 30] and records[3]["loss"] == 4


def test_chance_is_what_a_network_that_learned_nothing_would_log():
    records = [record(1), record(2, occupied_per_image=2.0)]
    chance = curves.chance_lines(records, CONFIG)
    assert chance["group_loss"] == pytest.approx([2 * 2.7726] * 2, abs=1e-4)
    assert chance["entropy_mean"][0] == pytest.approx(math.log(16))
    assert chance["agreement"] == [1 / 16] * 2 and chance["prototypes_used"] == [16] * 2
    assert chance["slot_loss"] == pytest.approx([0.8 * math.log(32 * 6), 0.8 * math.log(64)])
    assert "slot_loss" not in curves.chance_lines(records, dict(CONFIG, slot_loss="reg"))


def test_a_run_is_drawn_with_its_chance_lines_and_a_gap_for_what_its_log_lacks():
    old = [{key: x for key, x in record(s).items() if key != "grad_norm"} for s in (10, 20, 30)]
    figure, panels = panels_of([a_run(records=old, **CONFIG)])
    (curve,), (chance,) = panels["group_loss"]
    assert list(curve.get_xdata()) == [10, 20, 30] and list(curve.get_ydata()) == [5.0] * 3
    assert list(chance.get_ydata()) == pytest.approx([2 * math.log(16)] * 3)
    assert np.isnan(panels["grad_norm"][0][0].get_ydata()).all()
    assert np.isnan(panels_of([a_run()])[1]["group_loss"][1][0].get_ydata()).all()
    (text,) = figure.legends[0].get_texts()
    assert text.get_text() == "run: preset toy, arch tiny, num-prototypes 16"


def test_a_loss_that_is_off_is_not_drawn_and_its_panel_says_so():
    off = [record(step, slot_loss=0.0) for step in (10, 20)]
    _, panels = panels_of([a_run(records=off, **CONFIG), a_run("b", **CONFIG)])
    (first, second), (chance, _) = panels["slot_loss"]
    assert np.isnan(first.get_ydata()).all() and np.isnan(chance.get_ydata()).all()
    assert list(second.get_ydata()) == [2.0] * 3
    axis = panels_of([a_run(records=off, **CONFIG)])[0].axes[1]
    assert "turned off" in axis.texts[0].get_text() and not len(axis.get_yticks())


def test_the_numbers_of_good_runs_are_those_of_the_presets_that_were_run():
    toy, other = (a_run(preset=name) for name in ("toy", "coco-r50"))
    assert curves.hint_of("prototypes_used", [other]) == "1 to 3: collapsed"
    assert "preset toy: 31, 9 to 15, 17" in curves.hint_of("prototypes_used", [toy, other])
    assert "photos" not in curves.hint_of("prototypes_used", [toy, other])


@pytest.mark.parametrize("presets", [["toy"], ["toy", "photos"]])
def test_no_two_labels_of_the_figure_overlap(presets):
    figure = curves.draw_runs([a_run(name, **{**CONFIG, "preset": name}) for name in presets])
    figure.draw_without_rendering()
    panels = [axis.get_tightbbox() for axis in figure.axes]  # with all labels
    labels = [child for axis in figure.axes for child in axis.get_children()]
    labels = [each for each in labels if isinstance(each, Text) and each.get_text()]
    assert len(labels) == 24 and len(panels) == 12
    for boxes in (panels, [label.get_window_extent() for label in labels]):
        pairs = itertools.combinations(boxes, 2)
        assert not any(one.overlaps(other) for one, other in pairs)


def test_the_legend_names_the_options_that_differ_and_no_others():
    both = dict(batch_size=32, epochs=4.0)
    runs = [a_run("a", seed=0, steps=0, warmup=1.0, output_dir="x", **both)]
    runs.append(a_run("b", seed=1, steps=9, warmup=1.0, output_dir="y", image_loss=True, **both))
    expected = ["a: seed 0, warmup 1 epochs, epochs 4", "b: seed 1, warmup 1 steps, steps 9, image"]
    assert all(map(str.startswith, curves.legend_of(runs), expected))
    assert curves.legend_of([*runs, a_run("c")])[2] == "c: no config.json"
    paused = [a_run(name, max_steps=steps) for name, steps in (("a", 0), ("b", 7))]
    assert curves.legend_of(paused) == ["a: none of these", "b: max-steps 7"]
