"""train.py: what small whole runs on the CPU learn, say and write."""

import dataclasses
import json
import math
import re
import shutil

import pytest
import torch
from PIL import Image

import recipes
import staged
import toy
import train
from data import TwoCrops
from engine.batches import Samples, order_of
from engine.optimizers import LARS, Schedule
from engine.processes import Place
from engine.program import run_program
from engine.run import seed_of
from measures import networks
from measures.datasets import UNSEEN
from measures.groups import compare_in_memory
from photometric import Photometric
from slotcon import SlotCon
from staged import STEPS, At, Signals, difference, last_of, log_of, state_of, train_here
from teacher import teacher_momentum


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A run of five steps, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "short"
    arguments = ("--max-steps", "5", "--log-every", "1")
    return folder, train_here(folder, *arguments)


def test_slow_steps_say_how_much_time_is_left_between_two_lines_of_the_log(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.log.OFTEN", -1)
    lines = train_here(tmp_path, "--max-steps", "4", "--log-every", "9").splitlines()
    found = [line for line in lines if re.fullmatch(r"step [234]/4  \d:\d\d:\d\d left", line)]
    assert [line[5] for line in found] == ["2", "3"]  # and after step 4 the log's own line
    assert sum(line.startswith("step 4/4") for line in lines) == 1


REFUSED = [  # arguments behind those of a small run, what the line must say
    ("--epochs 3 --steps 9", "--epochs and --steps are two units of one length: give one of them"),
    ("--long-tailed", "--long-tailed says how a subset is chosen: add --subset N"),
    ("--batch-size 16", "--batch-size 16, but 14 images to learn from: lower it"),
    ("--accumulate 3", "must be a multiple of 1 process(es) x --accumulate 3"),
    ("--freeze-backbone", "keeps random weights: add --init FILE or --pretrained"),
    ("--preset toy --dataset toy", "draws its own scenes: add a preset for photographs, such as"),
    ("--data-dir=", "needs --data-dir, the folder with the images"),
    ("--preset toy --dataset toy --data-dir= --check-data", "--check-data has nothing to read"),
    ("--preset toy --dataset toy --data-dir= --subset 3", "is at least --batch-size 4"),
    ("--init nothing.pth", "there is no checkpoint nothing.pth"),
    ("--output-dir photos/000.png", "photos/000.png cannot be used: it is a file"),
]


@pytest.mark.parametrize("arguments, line", REFUSED)
def test_what_cannot_be_is_one_line_and_writes_nothing(arguments, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    staged.draw_photographs(tmp_path / "photos")
    before = sorted(tmp_path.rglob("*"))
    text = train_here("out", *arguments.split(), status=2)
    assert text.startswith("train.py: ") and line in text and text.count("\n") == 1, text
    assert sorted(tmp_path.rglob("*")) == before


CHANGES = {
    "num_prototypes: 5 then, 6 now": "--num-prototypes 6",
    "epochs: 6.0 then, 7.0 now; warmup: 1.0 then, 2.0 now": "--epochs 7 --warmup 2",
    "p_blur: (1.0, 0.1) then, (1.0, 0.2) now": "--p-blur 1 0.2",
    "seed: 0 then, 1 now": "--seed 1",
    "init: not given then, given.pth now": "--init given.pth",
    "images: 14 then, 13 now": "--data-dir fewer",
    "images: as many then (14), but other ones": "--data-dir others",
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_matters_cannot_change_within_a_run(change, short, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    staged.draw_photographs(tmp_path / "fewer", 13)
    shutil.copy(short[0] / "last.pth", "given.pth")
    others = staged.draw_photographs(tmp_path / "others")
    (others / "000.png").rename(others / "new.png")
    before = state_of(short[0])
    text = train_here(short[0], *CHANGES[change].split(), status=2)
    assert text == (
        f"train.py: {short[0]}/last.pth was made with other options or images ({change}): "
        "--resume force goes on all the same, where the network has the same tensors; "
        "--resume none starts over in this folder, and another --output-dir keeps both\n"
    )
    assert not difference(state_of(short[0]), before)


def test_what_does_not_matter_can_change_and_force_takes_what_is_asked_for_now(tmp_path):
    folder, given = tmp_path / "run", ("--optimizer", "adamw")
    train_here(folder, *given, "--max-steps", "2")
    free = ("--max-steps", "3", "--workers", "1", "--log-every", "1", "--save-minutes", "1")
    text = train_here(folder, *given, *free)
    assert f"resumed  {folder}/last.pth after step 2\n" in text and last_of(folder)["step"] == 3
    forced = ("--max-steps", "4", "--weight-decay", "0.5", "--resume", "force")
    train_here(folder, *given, *forced)
    groups = last_of(folder)["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.5, 0]
    text = train_here(folder, "--resume", "force", status=2)
    assert f"{folder}/last.pth was made with another optimizer (" in text
    wrong = ("--num-prototypes", "6", "--resume", "force")
    text = train_here(folder, *given, *wrong, status=2)
    assert "lacks: 3, such as center (6,); that it has too many: 3, such as center (5,)" in text
    assert "another --output-dir keeps both" in text


def test_a_run_neither_goes_on_from_a_damaged_file_nor_overwrites_it(short, tmp_path):
    shutil.copytree(short[0], folder := tmp_path / "run")
    last = folder / "last.pth"
    last.write_bytes(last.read_bytes()[:-1000])
    text = train_here(folder, status=2)
    assert f"{last} is no checkpoint, or damaged" in text and text.count("\n") == 1
    torch.save(last_of(short[0]) | dict(format=2), last)
    text = train_here(folder, status=2)
    assert "it holds no training state (found format, config, step), or one of a newer" in text
    assert log_of(folder) == log_of(short[0])


KEYS = (
    "step epoch loss group_loss slot_loss grad_norm images_per_second data_seconds memory_gb "
    "skipped_steps lr momentum_teacher occupied_per_image prototypes_used entropy_teacher "
    "entropy_mean agreement"
).split()


def test_a_run_prints_what_it_will_do_and_writes_what_others_can_read(short):
    folder, text = short
    for words in (
        "device   cpu, 1 thread(s), 1 process, float32", "14 images", "tiny, 5 prototypes; 0.04 M",
        "batch    4 = 4 x 1 process(es); 3 steps per epoch, 18 in all",
        "lr       0.0625 = 4 x 4 / 256, lars, warm-up 3 steps", "2 ln k = 3.219",
        "start    random weights", "step 5/5", "paused   at step 5 of 18; the same command without",
    ):  # fmt: skip
        assert words in text, words
    names = sorted(file.name for file in folder.iterdir())
    assert names == ["config.json", "last.pth", "log.jsonl", "run.lock"] and "warning" not in text
    written = json.loads((folder / "config.json").read_text())
    assert list(written) == [f.name for f in dataclasses.fields(recipes.Config)]
    assert written["max_steps"] == 5 and written["p_blur"] == [1.0, 0.1]
    saved = last_of(folder)  # weights_only
    assert (saved["step"], saved["num_images"], saved["world_size"]) == (5, 14, 1)


SCHEDULE = Schedule(steps_per_epoch=3, total_steps=STEPS, warmup_steps=3, peak=4 * 4 / 256)


def test_the_log_has_every_number_at_every_step(short):
    lines = [json.loads(line) for line in (short[0] / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    for line in lines:
        assert list(line) == KEYS and all(math.isfinite(value) for value in line.values())
        step = line["step"]
        assert line["epoch"] == round(step / 3, 4) and line["skipped_steps"] == 0
        assert line["loss"] == pytest.approx((line["group_loss"] + line["slot_loss"]) / 2, rel=1e-5)
        assert line["lr"] == SCHEDULE.learning_rate(step - 1)  # --max-steps bends no schedule
        assert line["momentum_teacher"] == teacher_momentum(step, 18)
        assert 1 <= line["occupied_per_image"] <= line["prototypes_used"] <= 5
        assert 0 <= line["entropy_teacher"] <= line["entropy_mean"] <= math.log(5) + 1e-5
        assert 0 <= line["agreement"] <= 1


def test_the_steps_are_those_of_the_paper_in_the_order_of_the_released_code(short):
    """The same five steps, written down once more without precautions."""
    c, _ = recipes.parse(staged.command_line("unused"))
    images, *_ = train.images_of(c, strict=True)
    samples = Samples(images, TwoCrops(c.image_size, c.min_area), c.seed)
    order = order_of(len(images), c.batch_size, Place(torch.device("cpu")), c.seed)
    torch.manual_seed(c.seed)
    model = SlotCon("tiny", 5, 12, 7).to(memory_format=torch.channels_last)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = LARS(trained, 0.0, weight_decay=c.weight_decay), []
    for t, chosen in zip(range(5), order):
        batch = torch.utils.data.default_collate([samples[i][0] for i in chosen])
        # The student of before this step's gradient
        model.update_teacher(teacher_momentum(t, STEPS))
        generator = torch.Generator().manual_seed(seed_of(c.seed, t, 0))
        views = Photometric()(batch.views, generator)
        loss, report = model(views, batch.boxes, batch.flipped)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = SCHEDULE.learning_rate(t)
        optimizer.step()
        model.update_center(report.center_mean, 0.9)
        losses.append(loss.item())
    # Which the released code does when the next step begins
    model.update_teacher(teacher_momentum(5, STEPS))
    assert losses == pytest.approx([line["loss"] for line in log_of(short[0])], rel=1e-5)
    state = last_of(short[0])["model"]
    for name, value in model.state_dict().items():
        assert torch.allclose(value.double(), state[name].double(), rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("kind", [
    "--slot-loss reg", "--align proj", "--image-loss", "--group-weight 1", "--no-geometric",
    "--optimizer adamw", "--accumulate 2", "--min-area 0.9", "--amp bf16",
    "--workers 2", "--seed 1", "--amp fp16 --batch-size 2 --epochs 0.6",  # slow on a CPU
])  # fmt: skip
def test_a_run_of_each_kind_learns_and_goes_on_where_it_stopped(kind, short, tmp_path):
    given = ["--epochs", "2", "--log-every", "4", *kind.split()]
    text = train_here(tmp_path / "whole", *given)
    first, *_ = lines = log_of(tmp_path / "whole")
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert min(line["grad_norm"] for line in lines) > 0
    change = abs(first["loss"] / log_of(short[0])[0]["loss"] - 1)
    same = kind in ("--optimizer adamw", "--workers 2")
    assert (change == 0) == same
    assert "--amp" not in kind or f"1 process, {kind.split()[1]}" in text
    pause = At(2, Signals("SIGTERM"))
    train_here(tmp_path / "run", *given, accident=pause)
    assert last_of(tmp_path / "run")["position"] == 3
    train_here(tmp_path / "run", *given)
    assert not difference(state_of(tmp_path / "run"), state_of(tmp_path / "whole"))


def test_a_run_starts_from_given_weights_and_from_the_state_of_another_folder(short, tmp_path):
    given = ("--max-steps", "5", "--log-every", "1")
    text = train_here(tmp_path / "a", *given, "--init", short[0], "--resume", "none")
    assert "the same command without --max-steps and --resume none goes on" in text
    count = len(last_of(short[0])["model"])
    assert f"start    {short[0]}: {count} of {count} tensors used\n" in text
    assert log_of(tmp_path / "a")[0]["loss"] != log_of(short[0])[0]["loss"]
    shutil.copy(short[0] / "last.pth", tmp_path / "a")
    assert "after step 5" in train_here(tmp_path / "a", "--max-steps", "7")


def test_subset_and_held_out_are_said_and_written_and_a_result_is_of_what_was_not_seen(tmp_path):
    folder = tmp_path / "run"
    photographs = staged.draw_photographs(tmp_path / "photographs", count=30)
    given = ("--held-out", "9", "--subset", "20", "--epochs", "0.4")
    c, _ = recipes.parse(staged.command_line(folder, *given, photographs=photographs))
    out = set(train.images_of(c, strict=True)[1].paths)
    (photographs / min(out)).write_bytes(b"no image")
    text = train_here(folder, *given, photographs=photographs)
    assert "30 images" in text and "3 are kept out" in text and "20 of them are chosen" in text
    learned = set((folder / "subset.txt").read_text().splitlines())
    assert len(learned) == 20 and len(out) == 3 and not learned & out
    for words in (f"left out {min(out)}", "\n2 photographs, kept out of training\n", "are occupied",
                  "of 224 px; the log counts in crops of 32 px, which show less\n"):  # fmt: skip
        assert words in text
    report = json.loads((folder / "result.json").read_text())
    assert report["images"] == 2 and 1 <= report["prototypes_used"] <= 5
    assert (folder / "backbone.pth").exists()
    assert all(Image.open(folder / f"{name}.png").width > 300 for name in ("groups", "prototypes"))
    for name in out:
        (photographs / name).write_bytes(b"no image")
    text = train_here(folder, *given, photographs=photographs)
    assert "no photograph that was kept out can be read" in text
    photographs = staged.draw_photographs(tmp_path / "fewer", count=29)  # others are kept out
    text = train_here(folder, *given, "--resume", "force", photographs=photographs)
    assert "2 photographs, some of which may have been learned from" in text


def test_a_few_bad_images_are_replaced_and_named_and_more_than_one_percent_stop_the_run(tmp_path):
    photographs = staged.draw_photographs(tmp_path / "photographs", count=120)
    (photographs / "003.png").write_bytes(b"no image")
    given, folder = ("--epochs", "1", "--warmup", "0"), tmp_path / "run"
    text = train_here(folder, *given, photographs=photographs)
    assert text.count("003.png: not an image that Pillow knows: its neighbor takes its place") == 1
    assert f"skipped  1 images since the run began could not be read: {folder}" in text
    assert (folder / "skipped.txt").read_text() == "003.png\tnot an image that Pillow knows\n"
    train_here(tmp_path / "no", "--check-data", photographs=photographs)

    (photographs / "004.png").write_bytes(b"no image")
    train_here(tmp_path / "no", "--check-data", photographs=photographs, status=1)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="without torchrun"):
        patch.setenv("WORLD_SIZE", "2")
        recipes.parse(["--preset", "photos", "--data-dir", str(photographs), "--check-data"])
    assert not (tmp_path / "no").exists()
    text = train_here(folder, *given, "--resume", "none", photographs=photographs, status=1)
    line = f"2 of 120 images could not be read, more than 1%; they are named in {folder}/skipped"
    assert line in text.splitlines()[-1] and "Traceback" not in text
    held = last_of(folder)
    assert held["step"] == held["position"] < 30  # and the batch with the second one is met again


def test_doubts_are_said(tmp_path):
    given = ("--accumulate", "4", "--max-steps", "1", "--min-area", "0.9", "--warmup", "6")
    text = train_here(tmp_path / "run", *given)
    assert "1 x 1 process(es) x --accumulate 4; " in text and "warning  one image per pass" in text
    assert "warning  the warm-up is no shorter than the run: lower --warmup" in text


def test_toy_scenes_end_with_the_scores_of_scenes_that_no_run_sees(tmp_path, capsys):
    argv = "--subset 32 --held-out 9 --steps 2 --workers 0 --seed 4 --output-dir".split()
    assert run_program("train.py", train.main, [*argv, str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for words in ("32 toy scenes, drawn here", "9 scenes never trained on", "k-means on RGB",
                  f"groups.png in {tmp_path}"):  # fmt: skip
        assert words in text
    report = json.loads((tmp_path / "result.json").read_text())
    network, config = networks.open_network(tmp_path)
    untrained = networks.untrained_network(config, seed=4)
    scenes = toy.ToyImages(UNSEEN, 9)
    labeled = scenes.images, scenes.semantic, toy.CLASS_NAMES
    assert report.pop("seconds") > 0 and report == compare_in_memory(network, untrained, *labeled)
    assert Image.open(tmp_path / "groups.png").width > 1100  # eight scenes in a row
    assert (tmp_path / "backbone.pth").exists()


@pytest.mark.slow
def test_with_a_teacher_nearly_as_soft_as_the_student_the_assignment_stays_uniform(tmp_path):
    """The features move all the same: the groups of such a run are not blind."""
    argv = (
        "--seed 3 --epochs 5 --max-steps 120 --temp-teacher 0.09 --workers 0 --output-dir".split()
    )
    assert run_program("train.py", train.main, [*argv, str(tmp_path)]) == 0
    shares = [line["group_loss"] / (2 * math.log(32)) for line in log_of(tmp_path)]
    # 0.99 was seen; 0.64 after as many steps at 0.03
    assert min(shares[-4:]) > 0.98 and max(shares[-4:]) < 1.01, shares
