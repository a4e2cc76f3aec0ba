"""measures/streams.py: images in order, in batches, by worker processes; engine/streams.py: output
that goes on.
"""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from engine.streams import Unbreakable
from measures import streams
from measures.labels import ToyScenes


def test_a_limit_takes_images_from_everywhere():
    """The first ten of a folder are often of one class."""
    assert streams.spaced(10, 3) == [0, 3, 6] and streams.spaced(4, 3) == [0, 1, 2]
    assert streams.spaced(3, 9) == streams.spaced(3, 0) == [0, 1, 2]


def identity(item):  # of the module, since worker processes may pickle it
    return item


@pytest.mark.parametrize("batch_size, workers", [(1, 0), (4, 0), (4, 2)])
def test_images_come_in_order_whatever_the_batch_and_the_workers(batch_size, workers):
    images = [torch.full((3, 2, 2), i, dtype=torch.uint8) for i in range(9)]
    batches = list(streams.stream(images, identity, batch_size, workers))
    assert torch.cat([indices for indices, _ in batches]).tolist() == list(range(9))
    assert torch.cat([images for _, images in batches])[:, 0, 0, 0].tolist() == list(range(9))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named_and_left_out_and_the_others_keep_their_numbers(
    tmp_path, capsys, workers
):
    for i in range(4):
        Image.fromarray(np.full((8, 8, 3), i, dtype=np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes(b"torn")
    images = streams.open_images("folder", tmp_path)
    found = list(streams.stream(images, streams.center_view(8), 2, workers))
    assert [indices.tolist() for indices, _ in found] == [[0], [2, 3]]
    assert "left out 1.png" in capsys.readouterr().err


class Broken:
    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index == 2:
            raise ValueError("the label of b.png has id 9")
        return torch.zeros(3, 2, 2)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_problem_in_a_worker_process_is_still_one_line(workers):
    with pytest.raises(ValueError, match=r"^the label of b\.png has id 9$"):
        list(streams.stream(Broken(), identity, 3, workers))


def test_images_come_from_a_folder_from_its_val2017_or_are_drawn(tmp_path):
    (tmp_path / "val2017").mkdir()
    for folder in (tmp_path, tmp_path / "val2017"):
        Image.new("RGB", (9, 7)).save(folder / "a.png")
    assert len(streams.open_images("folder", tmp_path)) == 1
    assert len(streams.open_images("toy", None, 5)) == 5
    assert isinstance(streams.open_images("toy", None), ToyScenes)


def test_a_square_of_the_right_size_is_left_alone_and_others_are_cut_from_the_center():
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    assert streams.center_view(64)(image).equal(image)
    wide = torch.zeros(3, 70, 210, dtype=torch.uint8)
    wide[:, :, 70:140] = 200
    view = streams.center_view(56)(wide)
    assert view.shape == (3, 56, 56) and view.float().mean() == 200


# ------------------------------------------------------------------------------------------ output


@pytest.mark.parametrize("encoding, text, written", [
    ("latin-1", "фото: 3 images\n", r"\u0444\u043e\u0442\u043e: 3 images" + "\n"),
    ("latin-1", "Größe ф\n", "Größe \\u0444\n"),  # what it has stays
    ("ascii", "30 °C\n", "30 \\xb0C\n"),
    ("utf-8", "\udcff.jpg: фото\n", "\\udcff.jpg: фото\n"),  # a file name that is no text
])  # fmt: skip
def test_a_character_that_the_output_lacks_is_spelled_out_and_the_lines_after_it_come_too(
    tmp_path, encoding, text, written
):
    file = tmp_path / "out"
    with open(file, "w", encoding=encoding, newline="\n") as stream:
        output = Unbreakable(stream)
        assert output.write(text) == len(text)
        output.write("the next line\n")
    assert file.read_text(encoding=encoding) == written + "the next line\n"


def test_a_program_speaks_where_its_output_lacks_the_letters_of_a_folder(tmp_path):
    code = ("import sys; from engine.program import run_program\n"
            "def main(argv):\n"
            "    print('folder', argv[0], flush=True)\n"
            "    print('2 images')\n"
            "    return 0\n"
            "sys.exit(run_program('p.py', main, sys.argv[1:], alone=True))")
    done = subprocess.run([sys.executable, "-c", code, "фото"], capture_output=True, text=True,
                          env=dict(os.environ, PYTHONIOENCODING="latin-1"),
                          cwd=Path(__file__).parents[1])
    assert done.returncode == 0 and not done.stderr
    assert done.stdout == r"folder \u0444\u043e\u0442\u043e" + "\n2 images\n"


def test_a_closed_stream_costs_lines_and_nothing_else():
    stream = io.StringIO()
    stream.close()
    assert Unbreakable(stream).write("lost\n") == 5
