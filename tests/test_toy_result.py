"""measures/toy_result.py: what a toy run shows at its end."""

import json

import numpy as np
import torch
from PIL import Image
from trained import K

import toy
from grouping import GroupingNetwork
from measures import toy_result
from measures.grouping_report import compare_in_memory
from measures.labels import UNSEEN
from measures.networks import untrained_network


def test_the_numbers_the_figure_and_the_table_are_of_the_same_unseen_scenes(tmp_path, capsys):
    torch.manual_seed(0)
    teacher = GroupingNetwork("tiny", K, 12, 6).train()
    report = toy_result.show(teacher, "tiny", dim_hidden=12, seed=4, count=9, folder=tmp_path,
                             seconds=1000.0)
    scenes = toy.ToyImages(UNSEEN, 9)
    expected = compare_in_memory(teacher, untrained_network("tiny", K, 12, 6, seed=4),
                                 scenes.images, scenes.semantic, toy.CLASS_NAMES)
    assert 1000 < report.pop("seconds") < 1100  # what the run took, and this
    assert report == expected
    written = json.loads((tmp_path / "result.json").read_text())
    assert written.pop("seconds") > 1000 and written == json.loads(json.dumps(expected))
    assert np.asarray(Image.open(tmp_path / "groups.png")).std() > 0
    text = capsys.readouterr().out
    for words in ("9 scenes never trained on", "k-means on RGB", str(tmp_path / "groups.png")):
        assert words in text
