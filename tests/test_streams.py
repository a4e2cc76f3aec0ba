"""measures/streams.py: images in order, in batches, by worker processes."""

import multiprocessing
import os
import resource
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional

from engine import batches, log
from engine.images import Photographs
from measures import streams


@pytest.mark.parametrize("workers", [0, 2])
def test_images_come_in_order_and_a_bad_one_is_left_out(tmp_path, capfd, workers, monkeypatch):
    monkeypatch.setattr(log, "OFTEN", 0)
    for i in range(4):
        Image.fromarray(np.full((8, 8, 3), i, dtype=np.uint8)).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes(b"torn")
    images = streams.open_images("folder", tmp_path)
    found = list(streams.stream(images, streams.center_view(8), 2, workers, "look"))
    assert [indices.tolist() for indices, _ in found] == [[0], [2, 3]]
    assert torch.cat([views for _, views in found])[:, 0, 0, 0].tolist() == [0, 2, 3]
    text = capfd.readouterr().err
    assert "left out 1.png" in text and "look, batches: 1 of 2, 0:00:0" in text


def refuse(image):
    raise ValueError("an image of one pixel")


READERS = r"the processes that read images died or hand nothing over \({}.*\): try a shorter TMPDIR"
NONE_LEFT = READERS.format(".*File too large")


@pytest.mark.parametrize("view, shared, place, line", [
    (refuse, None, "", "^an image of one pixel$"),
    (lambda image: os._exit(1), None, "", READERS.format(r"DataLoader worker \(pid.* exited")),
    (None, 2_000_000, "", NONE_LEFT),  # the batch does not fit
    (None, 10, "", NONE_LEFT),  # not even a lock does
    (None, None, "x" * 100, READERS.format(".*AF_UNIX path too long")),  # as on a cluster
])  # fmt: skip
def test_readers_that_hand_over_nothing_end(view, shared, place, line, monkeypatch, tmp_path):
    """shared: bytes that a file may have, also one in shared memory; place: of sockets."""
    (tmp_path / place).mkdir(exist_ok=True)
    # Where multiprocessing keeps TMPDIR once it has been asked for
    kept = multiprocessing.current_process()._config
    monkeypatch.setitem(kept, "tempdir", str(tmp_path / place))
    monkeypatch.setattr(batches, "PATIENCE", 20)
    monkeypatch.setattr(sys, "unraisablehook", pytest.fail)
    view = view or streams.center_view(512)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (shared or before[0], before[1]))
    try:
        with pytest.raises(ValueError, match=line):
            list(streams.stream(torch.zeros(8, 3, 512, 512, dtype=torch.uint8), view, 8, 1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_signal_that_ends_the_readers_too_is_no_fault_of_theirs():
    stopped = iter((False, True)).__next__
    assert not list(batches.load(lambda _: os._exit(1), [0], 1, stopped))


def test_images_come_from_a_folder_from_its_val2017_or_are_drawn(tmp_path):
    (tmp_path / "val2017").mkdir()
    for folder in (tmp_path, tmp_path / "val2017"):
        Image.new("RGB", (9, 7)).save(folder / "a.png")
    assert len(streams.open_images("folder", tmp_path)) == 1
    assert streams.open_images("toy", None, 5)[4].shape == (3, 64, 64)
    with pytest.raises(ValueError, match="--data-dir is missing"):
        streams.open_images("folder", None)
    named = streams.read_views(Photographs(tmp_path, ["a.png"]), streams.center_view(32))
    assert named.shape == (1, 3, 32, 32)
    both = Photographs(tmp_path, ["a.png", "none.png"])
    assert streams.read_views(both, streams.center_view(32)).equal(named)
    with pytest.raises(ValueError, match="none of the 1 images chosen can be read"):
        streams.read_views(Photographs(tmp_path, ["none.png"]), streams.center_view(32))


def test_a_square_of_the_right_size_is_left_alone_and_others_are_cut_from_the_center():
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    assert streams.center_view(64)(image).equal(image)
    wide = torch.zeros(3, 70, 210, dtype=torch.uint8)
    wide[:, :, 70:140] = 200
    view = streams.center_view(56)(wide)
    assert view.shape == (3, 56, 56) and view.float().mean() == 200


def test_the_protocols_square_shrinks_image_and_label_as_pillow_does_it():
    label = torch.randint(0, 27, (61, 97), generator=torch.Generator().manual_seed(0))
    image = (9 * label).to(torch.uint8).expand(3, -1, -1)
    small_image, small_label = streams.square((image, label), 40)
    assert small_image.shape == (3, 40, 40)
    for found, whole, how in ((small_label, label, Image.NEAREST),
                              (small_image[1], image[1], Image.BILINEAR)):  # fmt: skip
        whole = Image.fromarray(whole.numpy().astype(np.uint8))
        pillow = np.array(whole.resize((63, 40), how))[:, 12:52]
        assert np.abs(found.numpy() - pillow.astype(int)).max() <= (how == Image.BILINEAR)


def test_of_a_labeled_strip_only_the_middle_is_enlarged(monkeypatch):
    enlarged, plain = [], functional.resize
    resize = lambda *given, **named: enlarged.append(plain(*given, **named)) or enlarged[-1]
    monkeypatch.setattr(streams, "resize", resize)
    columns = torch.arange(3000)
    pair = columns.expand(3, 2, 3000).to(torch.uint8), columns.expand(2, 3000)
    image, label = streams.square(pair, 320)
    assert image.shape == (3, 320, 320) and label.unique().tolist() == [1499, 1500]
    assert [each.shape[-2:] for each in enlarged] == [(320, 1280)] * 2
