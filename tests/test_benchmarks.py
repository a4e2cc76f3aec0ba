"""The scripts in benchmarks/: each still runs to its result. What shortcuts find on toy scenes."""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import train
from benchmarks import same_bits, shortcuts
from engine.program import run_program


def test_neither_color_nor_position_solves_the_default():
    found = shortcuts.shortcuts(seed=1, count=64)
    assert found["position"] < 0.17 and found["rgb_kmeans_miou"] < 0.16
    assert found["color"] < 0.30 < found["random_convolutions"] < 0.7


RUNS = {  # the smallest run of each script, and what its output says
    "shortcuts": ("--count 16", "random_convolutions"),
    "contrast": ("--k 16 --d 8 --batch 16 --ranks 2 --occupied 4", "MB on the wire"),
    "loader": ("--drawn 64x48 --batch-size 2 --rounds 1 --image-size 32", "ours"),
    "step": ("--steps 2 --rounds 1 -- --preset toy --subset 32 --workers 0", "images/s"),
    "law": ("--steps 20 --only 1", "The law was right in"),
    "few_labels": (
        "--backbones random=random --labeled 2 --seeds 0 --output-dir few -- --dataset toy "
        "--batch-size 2 --base-steps 1 --warmup-steps 0 --workers 0",
        "random",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_every_benchmark_runs_to_its_result(name, tmp_path, monkeypatch, capfd):
    """It runs here: a process for each would load torch once more."""
    options, expected = RUNS[name]
    script = str(Path(__file__).parent.parent / "benchmarks" / f"{name}.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script, *options.split()])
    runpy.run_path(script, run_name="__main__")
    assert expected in capfd.readouterr().out


@pytest.mark.slow
def test_same_bits_tells_the_one_tensor_that_changed(tmp_path, monkeypatch, capsys):
    """Its runs are started here: a process for each would load torch six times."""
    here = lambda command, **_: run_program("train.py", train.main, command[2:])
    changes = dict(RUNS={"one": ["--subset", "32"]}, HALF=1, WHOLE=2)
    for name, value in dict(changes, subprocess=SimpleNamespace(run=here)).items():
        monkeypatch.setattr(same_bits, name, value)
    same_bits.record(tmp_path)
    known = json.loads((tmp_path / "hashes.json").read_text())
    known["one"]["model/center"] = "0"
    (tmp_path / "hashes.json").write_text(json.dumps(known))
    assert same_bits.check(tmp_path, []) == 3  # anew, resumed, and resumed from the folder
    assert capsys.readouterr().out.count("1 tensors differ, first model/center") == 3
