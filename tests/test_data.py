"""data.py and engine/loader.py: finding images, two crops of each, the batches of a run."""

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import Batch, TwoCrops, center_square, resized_crop
from engine.images import ImageFiles, find_images
from engine.loader import RunSampler, Samples, collate, make_loader, on_device

PHOTOGRAPHS = pytest.mark.skipif(
    "SLOTCON_TINY_COCO" not in os.environ, reason="SLOTCON_TINY_COCO names no folder"
)


def write_image(path, height=6, width=9, color=(200, 100, 50)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), color).save(path, format="PNG")


def tree(root, *names):
    for name in names:
        write_image(root / name)
    return root


def noise(count=11, height=37, width=53):
    generator = torch.Generator().manual_seed(0)
    return list(
        torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)
    )


def samples_of(images, size, seed=0, **settings):
    """What a run sees of these images."""
    return Samples(images, TwoCrops(size, **settings), seed)


# ----------------------------------------------------------------------------------- finding images


@pytest.mark.parametrize(
    "layout, names, found",
    [
        (
            "coco",
            ["train2017/b.jpg", "train2017/a.jpg", "val2017/c.jpg", "train2017/deep/d.jpg"],
            ["train2017/a.jpg", "train2017/b.jpg"],
        ),
        (
            "cocoplus",
            ["unlabeled2017/z.jpg", "train2017/b.jpg", "test2017/c.jpg"],
            ["train2017/b.jpg", "unlabeled2017/z.jpg"],
        ),
        (
            "imagenet",
            ["train/n02/b.JPEG", "train/n01/c.JPEG", "train/stray.jpg", "val/n01/d.JPEG"],
            ["train/n01/c.JPEG", "train/n02/b.JPEG"],
        ),
        (
            "bdd100k",
            [
                "images/100k/train/b.jpg",
                "images/100k/val/v.jpg",
                "images/100k/test/a.jpg",
                "images/10k/train/x.jpg",
            ],
            ["images/100k/test/a.jpg", "images/100k/train/b.jpg"],
        ),
        (
            "folder",
            ["b.jpg", "a.PNG", "x/y/z.webp", "grüße aus/Füssen 1.jpeg", ".hidden/h.jpg", "._a.jpg"],
            ["a.PNG", "b.jpg", "grüße aus/Füssen 1.jpeg", "x/y/z.webp"],
        ),
    ],
)
def test_each_layout_finds_its_images_sorted(tmp_path, layout, names, found):
    tree(tmp_path, *names)
    (tmp_path / "readme.txt").write_text("no image")
    root, paths, notice = find_images(tmp_path, layout)
    assert (root, paths.tolist(), notice) == (tmp_path, found, "")
    assert len(ImageFiles(root, paths)) == len(found) and ImageFiles(root, paths)[0].shape == (
        3,
        6,
        9,
    )


def test_names_are_one_block_of_memory(tmp_path):
    _, paths, _ = find_images(tree(tmp_path, "a.jpg", "b/c.jpg"))
    assert paths.dtype.kind == "U" and paths.flags.c_contiguous


def test_a_relative_folder_is_found_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tree(tmp_path / "here", "train2017/a.jpg"))
    for given in (".", "../here", Path("../here/")):
        root, paths, _ = find_images(given, "coco")
        assert paths.tolist() == ["train2017/a.jpg"] and ImageFiles(root, paths)[0].shape == (
            3,
            6,
            9,
        )


def test_a_list_names_images_absolutely_or_from_its_own_folder(tmp_path):
    tree(tmp_path / "sets", "b.jpg", "x/a b.jpg", "#1.jpg")
    tree(tmp_path / "far", "c.jpg")
    file = tmp_path / "sets" / "list.txt"
    file.write_text(
        f"\ufeffx/a b.jpg\n# a remark\n#\n\nb.jpg\n#1.jpg\n{tmp_path}/far/c.jpg\n", encoding="utf-8"
    )
    for layout in ("list", "folder"):  # a file is a list, whatever was asked for
        root, paths, _ = find_images(file, layout)
        assert paths.tolist() == ["#1.jpg", f"{tmp_path}/far/c.jpg", "b.jpg", "x/a b.jpg"]
        assert all(image.shape == (3, 6, 9) for image in ImageFiles(root, paths))


def test_links_are_followed_and_circles_walked_once(tmp_path):
    tree(tmp_path / "elsewhere", "far.jpg")
    tree(tmp_path / "set", "a.jpg", "sub/b.jpg")
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "sub" / "up").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "nowhere").symlink_to(tmp_path / "set" / "nowhere")
    assert find_images(tmp_path / "set")[1].tolist() == ["a.jpg", "linked/far.jpg", "sub/b.jpg"]


def test_another_layout_is_taken_as_a_plain_folder_only_where_that_is_allowed(tmp_path):
    tree(tmp_path, "mine/a.jpg")
    _, paths, notice = find_images(tmp_path, "coco", strict=False)
    assert (
        paths.tolist() == ["mine/a.jpg"]
        and "not laid out as coco: taken as a plain folder" in notice
    )
    with pytest.raises(
        ValueError,
        match=r"no images in .*expected .*train2017/\*.jpg; found in .*mine/; .*'folder'",
    ):
        find_images(tmp_path, "coco")
    tree(tmp_path, "train2017/a.jpg")
    with pytest.raises(
        ValueError, match=r"expected .*train2017/\*.jpg and .*unlabeled2017/\*.jpg; found in"
    ):
        find_images(tmp_path, "cocoplus")


def test_a_wrong_path_says_what_was_expected_and_what_is_there(tmp_path):
    tree(tmp_path, "photos/a.jpg")
    with pytest.raises(
        ValueError, match=r"no such .*fotos/deep; found in .*: photos/; expected .*\*.jpg"
    ) as error:
        find_images(tmp_path / "fotos" / "deep")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "prepare, words",
    [
        (lambda root: None, "no images in .*found in .*: nothing"),
        (
            lambda root: [(root / f"{n}.txt").write_text("") for n in range(9)],
            "0.txt, 1.txt, .* and 3 more",
        ),
        (
            lambda root: (root / "a.jpg").write_text("no image"),
            "none of 1 files tried .* a.jpg: not an image that Pillow",
        ),
        (
            lambda root: [(root / f"{n}.jpg").touch() for n in range(40)],
            "none of 16 files tried .* 0.jpg: empty file",
        ),
    ],
)
def test_a_folder_without_readable_images_is_refused_in_one_line(tmp_path, prepare, words):
    prepare(tmp_path)
    with pytest.raises(ValueError, match=words) as error:
        find_images(tmp_path)
    assert "\n" not in str(error.value)


def test_wrong_lists_and_layouts_are_refused(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "wrong.txt").write_text("gone.jpg\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x81")
    for name, words in [
        ("empty.txt", "no images .*one image path per line"),
        ("wrong.txt", "gone.jpg: no such file"),
        ("binary", "not a text file of image paths"),
    ]:
        with pytest.raises(ValueError, match=words):
            find_images(tmp_path / name, "list")
    with pytest.raises(
        ValueError, match="unknown data set layout 'cococo': choose from coco, cocoplus"
    ):
        find_images(tmp_path, "cococo")


@PHOTOGRAPHS
def test_photographs_of_coco_are_found_and_read():
    root, paths, _ = find_images(os.environ["SLOTCON_TINY_COCO"], "coco")
    assert len(paths) == 50
    for index in (0, 49):
        with Image.open(root / paths[index]) as image:
            expected = np.asarray(image.convert("RGB"))
        assert np.array_equal(ImageFiles(root, paths)[index].permute(1, 2, 0).numpy(), expected)


# ---------------------------------------------------------------------------------------- two crops


def assert_same(item, other):
    assert all(torch.equal(a, b) for a, b in zip(item[0], other[0])) and item[1] == other[1]


def test_an_item_has_the_promised_shapes():
    (views, boxes, flipped), failures = samples_of(noise(), 24)[3]
    assert (views.shape, views.dtype, views.is_contiguous()) == ((2, 3, 24, 24), torch.uint8, True)
    assert (boxes.shape, boxes.dtype, flipped.shape, flipped.dtype) == (
        (2, 4),
        torch.float32,
        (2,),
        torch.bool,
    )
    assert failures == []


def test_crops_are_a_function_of_seed_epoch_and_index_alone():
    crops, again = samples_of(noise(), 24, 5), samples_of(noise(), 24, 5)
    for sample in (0, 7, 11 + 7, 22 + 7):
        assert_same(crops[sample], again[sample])
    again[9]  # what was asked before does not matter
    assert_same(crops[7], again[7])
    drawn = [crops[7], crops[8], crops[11 + 7], samples_of(noise(), 24, 6)[7]]
    for one, other in itertools.combinations(drawn, 2):
        assert not torch.equal(one[0].boxes, other[0].boxes)


def test_every_view_has_its_own_flip_and_a_flip_mirrors_view_and_box():
    images = noise()
    never, always = samples_of(images, 24, flip=0), samples_of(images, 24, flip=1)
    for sample in range(11):
        (plain, _), (mirrored, _) = never[sample], always[sample]
        assert not plain[2].any() and mirrored[2].all()
        assert torch.equal(mirrored[0], plain[0].flip(-1))
        x1, y1, x2, y2 = plain[1].unbind(1)
        torch.testing.assert_close(mirrored[1], torch.stack([1 - x2, y1, 1 - x1, y2], 1))
    half = samples_of(images, 4)
    flips = torch.stack([half[sample][0].flipped for sample in range(11 * 40)]).float()
    assert flips.mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.08)
    assert (flips[:, 0] == flips[:, 1]).float().mean().item() == pytest.approx(0.5, abs=0.08)


def test_views_are_the_crops_that_draw_crop_draws(monkeypatch):
    drawn, images = [], noise()

    def draw_crop(*arguments):
        drawn.append(arguments)
        return (1, 2, 30, 40) if len(drawn) == 1 else (5, 6, 20, 25)

    monkeypatch.setattr(data, "draw_crop", draw_crop)
    settings = dict(min_area=0.2, max_area=0.9, min_overlap=0.3, flip=0)
    (views, _, _), _ = samples_of(images, 24, **settings)[4]
    assert torch.equal(views[0], resized_crop(images[4], (1, 2, 30, 40), 24, False))
    assert torch.equal(views[1], resized_crop(images[4], (5, 6, 20, 25), 24, False))
    (height, width, _, least, most), (_, _, _, _, _, other, overlap) = drawn
    assert (height, width, least, most) == (37, 53, 0.2, 0.9)
    assert (other, overlap) == ((1, 2, 30, 40), 0.3)


def test_the_second_crop_overlaps_the_first_only_if_it_must():
    images, empty = noise(), []
    for min_overlap in (0, 0.01):
        crops = samples_of(images, 4, min_overlap=min_overlap)
        empty.append(sum(not crops[sample][0].boxes.any() for sample in range(700)))
    assert empty[0] > 5 and empty[1] == 0


def test_without_geometry_both_views_are_the_whole_center():
    images = noise()
    (views, boxes, flipped), _ = samples_of(images, 24, geometric=False)[11 + 3]
    assert torch.equal(views[0], views[1]) and torch.equal(views[0], center_square(images[3], 24))
    assert boxes.tolist() == [[0, 0, 1, 1]] * 2 and not flipped.any()


@pytest.mark.parametrize(
    "settings",
    [{"image_size": 0}, {"min_area": 0}, {"min_area": 1.5}, {"min_overlap": -1}, {"flip": 2}],
)
def test_impossible_crops_are_refused(settings):
    with pytest.raises(ValueError, match=f"found .*{next(iter(settings.values()))}"):
        TwoCrops(**{"image_size": 24, **settings})


# ---------------------------------------------------------------------------------------------- run


def joined(lists):
    return list(itertools.chain(*lists))


def test_every_epoch_has_every_image_at_most_once_and_its_own_order():
    sampler = RunSampler(num_images=23, total_batch=5, seed=1, stop=12)
    batches = list(sampler)
    assert len(sampler) == len(batches) == 12 and sampler.steps_per_epoch == 4
    epochs = [joined(batches[4 * e : 4 * e + 4]) for e in range(3)]
    for epoch, samples in enumerate(epochs):
        assert len(set(samples)) == 20 and all(sample // 23 == epoch for sample in samples)
    indices = [[sample % 23 for sample in samples] for samples in epochs]
    assert indices[0] != indices[1] != indices[2]
    assert set(indices[0]) != set(indices[1])  # not always the same images are left out
    assert set(joined(RunSampler(20, 5, stop=4))) == set(range(20))


def test_a_run_continues_anywhere():
    whole = list(RunSampler(23, 5, seed=1, stop=12))
    for start in (0, 1, 4, 7, 12):
        assert list(RunSampler(23, 5, seed=1, start=start, stop=12)) == whole[start:]
    assert list(RunSampler(23, 5, seed=2, stop=12)) != whole


@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_the_ranks_together_have_the_batches_of_one(world_size):
    alone = list(RunSampler(50, 6, seed=3, start=2, stop=17))
    ranks = [
        list(RunSampler(50, 6, rank, world_size, seed=3, start=2, stop=17))
        for rank in range(world_size)
    ]
    for step, parts in enumerate(zip(*ranks)):
        assert joined(parts) == alone[step] and all(len(part) == 6 // world_size for part in parts)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (
            dict(total_batch=7, world_size=2),
            "batch of 7 images .* by 2 processes: choose a multiple of 2",
        ),
        (dict(total_batch=51), "batch of 51 images is larger than the data set, which has 50"),
        (dict(total_batch=0), "batch of 0"),
        (dict(total_batch=5, start=4, stop=3), "from step 4 to step 3"),
    ],
)
def test_impossible_runs_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        RunSampler(50, **arguments)


def batches_of(workers, images=None, stop=5):
    crops = samples_of(noise() if images is None else images, 24)
    return list(on_device(make_loader(crops, RunSampler(11, 4, stop=stop), workers, "cpu"), "cpu"))


def test_batches_are_the_sampled_items_in_order():
    crops = samples_of(noise(), 24)
    for (batch, failures), samples in zip(batches_of(0), RunSampler(11, 4, stop=5), strict=True):
        assert (
            isinstance(batch, Batch)
            and batch.views.shape == (4, 2, 3, 24, 24)
            and batch.boxes.shape == (4, 2, 4)
        )
        for i, sample in enumerate(samples):
            assert_same((Batch(*(part[i] for part in batch)), failures), crops[sample])


def test_the_number_of_workers_changes_nothing():
    alone = batches_of(0)
    for workers in (1, 2):
        for batch, expected in zip(batches_of(workers), alone, strict=True):
            assert_same(batch, expected)


def test_workers_stay_when_a_loader_is_read_again():
    loader = make_loader(samples_of(noise(), 8), RunSampler(11, 4, stop=2), 1, "cpu")
    processes = []
    for _ in range(2):
        assert len(list(loader)) == 2
        processes += [worker.pid for worker in loader._iterator._workers]
    assert processes[0] == processes[1]


def test_collate_joins_failures():
    views, _ = samples_of(noise(), 8)[0]
    items = [(views, []), (views, [("a", "x"), ("b", "y")]), (views, [("c", "z")])]
    assert collate(items)[1] == [("a", "x"), ("b", "y"), ("c", "z")]


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="no such signals here")
def test_workers_go_on_when_the_whole_job_is_signalled():
    loader = iter(make_loader(samples_of(noise(), 24), RunSampler(11, 4, stop=40), 2, "cpu"))
    next(loader)
    workers = [str(worker.pid) for worker in loader._workers]
    for name in ("TERM", "INT", "USR1"):
        subprocess.run(["kill", f"-{name}", *workers], check=True)  # not from the parent
    assert sum(1 for _ in loader) == 39


def test_a_program_that_ends_in_the_middle_of_a_run_takes_its_workers_along():
    program = """
import sys, torch
from data import TwoCrops
from engine.loader import RunSampler, Samples, make_loader
images = [torch.zeros(3, 9, 9, dtype=torch.uint8)] * 8
loader = make_loader(Samples(images, TwoCrops(8), 0), RunSampler(8, 2, stop=1000), 2, "cpu")
batches = iter(loader)
next(batches)
print(*(worker.pid for worker in batches._workers))
sys.exit(7)
"""
    here = Path(data.__file__).parent
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=here, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 7 and ended.stderr == ""
    for worker in ended.stdout.split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(worker), 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_batches_are_the_same():
    crops = samples_of(noise(), 24)
    loader = make_loader(crops, RunSampler(11, 4, stop=5), 2, "cuda")
    for (batch, _), expected in zip(on_device(loader, "cuda"), batches_of(0), strict=True):
        assert batch.views.is_cuda
        assert_same((Batch(*(part.cpu() for part in batch)), []), expected)


@PHOTOGRAPHS
def test_photographs_become_batches():
    root, paths, _ = find_images(os.environ["SLOTCON_TINY_COCO"], "coco")
    batch, failures = collate(
        [samples_of(ImageFiles(root, paths), 64)[sample] for sample in range(4)]
    )
    assert (
        batch.views.shape == (4, 2, 3, 64, 64)
        and 60 < batch.views.float().mean() < 180
        and failures == []
    )
