"""compare.py: which rows, how they are trained, what is written."""

import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import compare
import comparisons
import recipes
import train
from comparisons import bench, judge
from comparisons.bench import learn
from comparisons.common import System
from comparisons.scenes import Scenes
from engine.program import Stopped, run_program
from photometric import normalize
from staged import ROOT

SMALL = dict(subset=36, held_out=8, workers=0)


@pytest.fixture
def small(monkeypatch):
    """The preset toy with few scenes."""
    preset = dataclasses.replace(recipes.PRESETS["toy"], **SMALL)
    monkeypatch.setitem(recipes.PRESETS, "toy", preset)


def entries(*words):
    return compare.entries_of(compare.parse(words))


def test_without_options_every_system_has_its_rows_and_every_file_its_system():
    rows = entries("--steps", "7")
    assert list(dict.fromkeys(row.name for row in rows)) == list(comparisons.SYSTEMS)
    files = {path.stem for path in Path(comparisons.__file__).parent.glob("*.py")}
    used = {place.split(".")[0] for place in comparisons.SYSTEMS.values()}
    assert files - used == {"__init__", "bench", "common", "judge", "scenes"} and used <= files
    labels = [row.label for row in rows if row.name == "given_masks"]
    assert labels == ["given_masks: grid", "given_masks: color", "given_masks: truth"]
    assert [row.preset for row in rows if row.name == "slot_attention"] == ["flat", "scene"]
    assert [row.arguments for row in rows if row.name == "picie"] == [{}, {"num_prototypes": 8}]
    assert {row.c for row in rows} == {compare.configuration(7)} and rows[0].c.steps == 7


@pytest.mark.parametrize("table", recipes.TABLES)
def test_every_row_of_every_table_is_the_preset_but_for_what_its_label_says(table):
    rows = recipes.TABLES[table][1]
    built = entries("--table", table)
    labels = [entry.label.partition(" (toy")[0] for entry in built]
    assert labels == [row.label for row in rows] and len(rows) >= 2
    for entry, row in zip(built, rows):
        same = entry.c == compare.configuration(compare.STEPS) and not entry.arguments
        assert same == row.default, row.label


def test_the_tables_do_what_their_rows_say():
    def system(table, label):
        labels = [row.label for row in recipes.TABLES[table][1]]
        return entries("--table", table)[labels.index(label)].build(seed=0)

    assert [entry.label for entry in entries("--table", "6c")][1] == "0.07 (toy: 0.03)"
    assert [entry.label for entry in entries("--table", "8d")][1] == "512, with (toy: 16)"
    assert system("6b", "1.0").method.predictor is None  # the slot loss is skipped
    assert system("6a", "1024").method.student.prototypes.num_embeddings == 128
    assert system("8d", "512, with").method.image_loss
    assert system("collapse", "no center").momentum_center == 1  # it stays at zero
    assert not system("collapse", "no stop-gradient").stop_gradient
    assert system("collapse", "no moving average").stop_gradient


REFUSED = {
    "--only mocov3": "mocov3",
    "--table 9z": "9z",
    "--only moco --table 6a": "--table",
    "--seeds 0": "at least 1",
    f"--output-dir {__file__}": "--output-dir",
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_wrong_option_is_one_line_before_any_work(words, monkeypatch, capsys):
    monkeypatch.setattr(bench, "row", None)
    assert run_program("compare.py", compare.main, words.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("compare.py: ") and REFUSED[words] in line


class Still(System):
    """A system with a given loss; it keeps what it is asked."""

    def __init__(self, losses=(1.0,)):
        super().__init__()
        self.layer, self.norm = nn.Linear(1, 1), nn.BatchNorm1d(1)
        self.losses, self.asked, self.moved = itertools.cycle(losses), [], []

    def forward(self, views, boxes, flipped, extra):
        self.asked.append((views, extra))
        self.norm(torch.arange(5.0)[:, None])
        return self.layer.weight.sum() ** 2 * next(self.losses), "memo"

    def after_step(self, memo, momentum):
        self.moved.append((memo, momentum))


def taught(system, steps, **changes):
    c = dataclasses.replace(compare.configuration(steps), workers=0, batch_size=2, seed=4)
    c = dataclasses.replace(c, momentum_teacher=(0.9, 1.0), **changes)
    return learn(system, Scenes(0, 5, system.sees, system.extra), c)


def test_every_system_takes_the_given_steps_on_the_same_views_and_the_rest_follows():
    first, second = Still(), Still()
    first.extra = "grid"
    for system in (first, second):
        found = taught(system, steps=6)
        assert found["steps"] == 6 == len(system.asked) and found["bad_steps"] == 0
    views, extra = first.asked[0]
    assert views.shape == (2, 2, 3, 48, 48) and extra.shape == (2, 2, 9, 48, 48)
    assert extra.min() >= 0 and 0.5 < extra.max() <= 1 and views.min() < 0
    assert second.asked[0][1].shape == (2, 2, 0, 48, 48)
    assert all(one[0].equal(other[0]) for one, other in zip(first.asked, second.asked))
    memos, momenta = zip(*first.moved)
    assert set(memos) == {"memo"} and sorted(momenta) == list(momenta) and momenta[-1] == 1


def test_a_bad_step_changes_nothing_and_twenty_end_the_training():
    system = Still([math.nan, 1.0])
    found = taught(system, steps=2)
    assert found == dict(found, steps=2, bad_steps=2) and len(system.moved) == 2
    assert system.norm.num_batches_tracked == 2 and system.layer.weight.isfinite().all()
    with pytest.raises(Stopped, match="after 0 steps: diverged"):
        taught(Still([math.nan]), steps=2)


def test_ctrl_c_ends_the_training():
    system, once = Still(), iter([signal.SIGINT])
    system.after_step = lambda memo, momentum: os.kill(os.getpid(), next(once, 0))
    with pytest.raises(KeyboardInterrupt):
        taught(system, steps=100)
    assert len(system.asked) == 2


def test_whole_scenes_are_neither_cut_nor_jittered_and_a_system_changes_its_own_options():
    system = Still()
    system.whole, system.changes = True, dict(batch_size=4)
    taught(system, steps=1)
    views, scenes = system.asked[0][0], normalize(Scenes(0, 5).images)
    assert views.shape == (4, 1, 3, 64, 64)
    values = [scene.flatten().sort()[0] for scene in scenes]
    assert all(any(v.flatten().sort()[0].allclose(w) for w in values) for v in views)


def test_a_gradient_is_clipped_to_the_norm_that_its_system_states():
    norms = []
    for clip_norm in (0.0, 0.5):
        system = Still()
        system.layer.weight.data.fill_(3)
        system.clip_norm, weight = clip_norm, system.layer.weight
        system.after_step = lambda memo, momentum, w=weight: norms.append(w.grad.norm().item())
        taught(system, steps=1)
    assert norms == [6, pytest.approx(0.5)]


def test_slotcon_here_is_train_py_weight_for_weight(tmp_path, small):
    words = ["--steps", "5", "--seed", "3", "--workers", "0", "--device", "cpu"]
    assert train.main([*words, "--output-dir", str(tmp_path)]) == 0
    expected = torch.load(tmp_path / "last.pth", weights_only=True)["model"]
    (entry,) = entries("--only", "slotcon", "--steps", "5")
    system = entry.build(seed=3)
    learn(system, Scenes(3, SMALL["subset"]), dataclasses.replace(entry.c, seed=3))
    found = system.method.state_dict()
    assert found.keys() == expected.keys() and found["center"].any()
    assert all(found[name].equal(expected[name]) for name in found)


@pytest.mark.skipif(multiprocessing.get_start_method() != "fork", reason="others see no stand-in")
@pytest.mark.parametrize("died", [signal.SIGKILL, signal.SIGINT])
def test_where_a_row_dies_none_goes_on_and_one_line_says_so(died, tmp_path, small, monkeypatch):
    def stopped(system, scenes, c):
        time.sleep(2)  # until all processes have started
        if c.seed == 0:
            os.kill(os.getpid() if died == signal.SIGKILL else os.getppid(), died)
        time.sleep(60)

    monkeypatch.setattr(bench, "learn", stopped)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
    began, words = time.perf_counter(), ["--only", "moco", "--seeds", "9"]
    with pytest.raises(Stopped if died == signal.SIGKILL else KeyboardInterrupt):
        compare.main([*words, "--output-dir", str(tmp_path)])
    assert time.perf_counter() - began < 50


@pytest.mark.slow
def test_rows_end_with_the_program_where_it_is_killed(tmp_path):
    command = [sys.executable, "compare.py", "--only", "moco", "--output-dir", str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as program:
        assert any(line.startswith("row 1 of 1, moco") for line in program.stdout)
        program.kill()
        program.communicate(timeout=20)  # the process of the row writes there, too


def test_from_the_command_line_to_the_file(tmp_path, small, capfd):
    words = ["--only", "moco", "slot_attention", "--steps", "2", "--seeds", "2"]
    for _ in range(2):
        assert compare.main([*words, "--output-dir", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    for file in ("comparison.png", "previous_1/comparison.json"):
        assert (tmp_path / "out" / file).stat().st_size > 1000
    assert list(found["rows"]) == ["slot_attention: flat", "slot_attention: scene", "moco"]
    system = entries("--only", "slot_attention")[0].build(seed=9)
    kept = torch.load(tmp_path / "out" / "slot_attention-flat_1.pth", weights_only=True)
    system.load_state_dict(kept)
    assert {value.dtype for value in kept.values()} == {torch.float16}
    for records in found["rows"].values():
        assert [record["seed"] for record in records] == [0, 1]
        for record in records:
            assert record["steps"] == 2 and isinstance(record["collapsed"], bool)
            assert all(-1 <= record[key] <= 1 for key in judge.MEASURES)
    lines = capfd.readouterr().out.splitlines()
    assert "row 1 of 6, slot_attention: flat, about 1 min left" in lines
    assert "moco, slot_attention (2 steps: too few to judge), median of 2 seed(s)" in lines
    assert "row 6 of 6, moco, about 1 min left" in lines
    assert any(line.startswith("2 x 4 blocks know the place only: obj. 0.") for line in lines)
    rows = partial(bench.heading_of, ["moco"] * 12, 2, time.time() - 300, 1000)
    assert rows(number=3) == "row 4 of 12, moco, about 25 min left"
    assert rows(number=1) == "row 2 of 12, moco, about 12 min left"  # none is done
