"""transfer.py: whole fine-tunings of seconds, interrupted and resumed, refused and ended."""

import json
import multiprocessing
import os
import shutil
import signal
import time

import pytest
import torch
from test_datasets import draw_ade20k, draw_folder
from test_transfer_data import draw_coco

import toy
import transfer
from backbone import build_backbone
from downstream import segmentation, settings
from engine import checkpoints
from engine.program import run_program
from measures import metrics
from staged import At, Signals, difference, last_of, launch, log_of, staged, state_of
from trained import save_checkpoint

SMALL = (
    "segmentation --dataset toy --labeled 10 --test-on train --batch-size 4 --base-steps 3 "
    "--log-every 2 --test-every 6 --device cpu --dropout 0.2 --base-lr 0.4"
).split()
STEPS, T = 12, len(toy.CLASS_NAMES)


def run(folder, *arguments, accident=None, small=SMALL):
    """The exit status of a small fine-tuning in this process."""
    argv = [*small, "--output-dir", str(folder), *arguments]
    with staged(accident):
        return run_program("transfer.py", transfer.main, argv)


def play(folder, *arguments, small=SMALL, **how):
    """The exit statuses of its processes, and what they printed."""
    argv = [*small, "--output-dir", str(folder), *arguments]
    return launch(transfer.main, folder, argv, **how)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run without any interruption."""
    folder = tmp_path_factory.mktemp("transfer") / "whole"
    assert run(folder) == 0
    return folder


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def all_of(folder):
    """Weights, optimizer, counts, scores, and every line of the log but for times."""
    state, *log = state_of(folder)
    for group in state["optimizer"]["param_groups"]:
        del group["lr"]  # every step sets it
    return state, log, torch.load(folder / "best.pth")["model"]


def assert_same_run(folder, other):
    assert not difference(all_of(folder), all_of(other))


def losses_of(folder):
    return [line for line in log_of(folder) if "loss" in line]


def test_a_long_test_is_no_time_of_the_steps_after_it(tmp_path, monkeypatch):
    plain = segmentation.scores
    monkeypatch.setattr(segmentation, "scores", lambda *given: time.sleep(3) or plain(*given))
    assert run(tmp_path, "--max-steps", "8") == 0
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 8 and last["images_per_second"] > 2 * 4 / 3  # steps, images, seconds


def test_a_run_leaves_its_settings_its_log_its_scores_and_two_checkpoints(whole):
    assert {path.name for path in whole.iterdir()} == {
        "config.json", "log.jsonl", "last.pth", "best.pth", "result.json", "run.lock"}  # fmt: skip
    lines, best, last = losses_of(whole), torch.load(whole / "best.pth"), last_of(whole)
    assert [line["step"] for line in lines] == [1, 2, 4, 6, 8, 10, 12]
    assert lines[-1]["loss"] < 0.95 * lines[0]["loss"] and lines[0]["lr"] == pytest.approx(0.1)
    tests = {line["step"]: line["miou"] for line in log_of(whole) if "miou" in line}
    assert tests.keys() == {6, 12} and all(0 < score < 1 for score in tests.values())
    assert best["result"]["miou"] == max(tests.values()) == last["notes"]["best"]
    assert last["step"] == STEPS and best["config"]["dataset"] == "toy"
    assert result_of(whole)["step"] == 12 and len(result_of(whole)["iou"]) == T
    c, _ = settings.parse(SMALL, "")  # the score is that of the weights that were kept
    model, _, unseen = segmentation.prepare(c, build_backbone("tiny"))
    model.load_state_dict(best["model"])
    counts = torch.zeros(T, T, dtype=torch.long)
    for image, label in unseen:
        counts += metrics.confusion_matrix(model.eval().predict(image), label, T, T)
    assert metrics.miou(counts, torch.arange(T)) == best["result"]["miou"]


@pytest.mark.parametrize("steps", [3, 6, 8])
def test_a_run_that_was_stopped_and_continued_is_the_whole_run(steps, whole, tmp_path, capsys):
    """Between two lines of the log, just before a test, and between tests."""
    folder = tmp_path / "run"
    assert run(folder, accident=At(steps - 1, Signals("SIGTERM"))) == 0
    assert f"stopped by SIGTERM after step {steps} of 12" in capsys.readouterr().out
    assert last_of(folder)["step"] == steps
    assert ("result" in last_of(folder)["notes"]) == (steps > 6)  # a signal waits for no test
    assert run(folder) == 0
    assert f"last.pth after step {steps}\n" in capsys.readouterr().out
    assert_same_run(folder, whole)


def stop_a_test(patch, at=2):
    """SIGTERM at one of the images that are tested -> cudnn's benchmark at each of them."""
    plain, flags = segmentation.Segmenter.predict, []

    def predict(model, image):
        flags.append(torch.backends.cudnn.benchmark)
        if len(flags) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(model, image)

    patch.setattr(segmentation.Segmenter, "predict", predict)
    return flags


@pytest.mark.parametrize("image, steps", [(3, 6), (13, 12)])
def test_a_signal_ends_a_test_made_again_later(image, steps, whole, tmp_path, monkeypatch, capsys):
    """Each test is of 10 images: the one after step 6, and that of a run whose steps are done."""
    for expected in (image, 2):  # the second run tests before its first step
        flags = stop_a_test(monkeypatch, expected)
        assert run(tmp_path / "run") == 0
        assert flags == [False] * expected  # sizes change: none is tried out
        assert last_of(tmp_path / "run")["step"] == steps
        said = capsys.readouterr().out
        assert f"stopped by SIGTERM after step {steps} of 12; " in said and "done " not in said
        monkeypatch.undo()
    assert run(tmp_path / "run") == 0
    assert_same_run(tmp_path / "run", whole)


def test_a_run_ends_with_a_table_in_one_unit_and_writes_json(whole, tmp_path, capsys):
    """A run that is done says its result again, in another folder too, and tests nothing."""
    here, there, result = tmp_path / "here", tmp_path / "there", result_of(whole)
    shutil.copytree(whole, here)
    (here / "result.json").write_text("{")
    assert run(here, "--json", str(tmp_path / "score.json")) == 0
    assert result_of(here) == result == json.loads((tmp_path / "score.json").read_text())
    end = capsys.readouterr().out.partition("done ")[2]
    assert f"this run    {result['miou']:.3f}  {result['accuracy']:.3f}\n" in end
    ball = f"ball              {result['iou']['ball']:.3f}\n"
    assert "IoU of each class\n" in end and ball in end and "%" not in end and "slides" not in end
    assert run(here, "--json", str(whole)) == 2
    assert "--json" in capsys.readouterr().err
    (there / "result.json").mkdir(parents=True)  # no file can have this name
    shutil.copy(whole / "last.pth", there)
    assert run(there, "--json", "-") == 2
    assert f"{there}/result.json" in capsys.readouterr().err.splitlines()[-1]
    (there / "result.json").rmdir()
    assert run(there, "--json", "-") == 0 and result_of(there) == result
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result


@pytest.mark.parametrize("changes, shown", [
    ("", True), ("--seed 3 --backbone last.pth", True), ("--labeled 100", False),
    ("--test-on train", False), ("--arch resnet18", False), ("--base-steps 9", False),
])  # fmt: skip
def test_the_slides_numbers_are_shown_for_what_they_measured_only(changes, shown):
    c, _ = settings.parse(["segmentation", "--dataset", "voc", *changes.split()], "")
    rows = settings.slides_of(c, 1449)
    assert [row["miou"] for row in rows.values()] == ([0.395, 0.716] if shown else [])
    assert settings.slides_of(c, 1448) == {}  # images in VOC's form that are not VOC's


def test_fewer_steps_are_the_beginning_of_more(whole, tmp_path, capsys):
    folder = tmp_path / "run"
    assert run(folder, "--max-steps", "5") == 0 and last_of(folder)["step"] == 5
    paused = "paused   at step 5 of 12; the same command without --max-steps goes on, for 0:0"
    assert capsys.readouterr().out.splitlines()[-1].startswith(paused)
    assert not {"best.pth", "result.json"} & set(os.listdir(folder))  # a pause does not test
    assert run(folder) == 0
    assert "done     12 steps; best.pth has the best of" in capsys.readouterr().out
    a, b = last_of(folder), last_of(whole)
    assert not difference(a["model"], b["model"]) and not difference(a["optimizer"], b["optimizer"])


def draw_parts(root, train=3, val=3):
    """Five labeled images of train classes to learn from, and five to test on."""
    for part, count in dict(train=train, val=val).items():
        draw_folder(root, [(i % count,) for i in range(5)], part)
    return root


FOLDER = (
    "segmentation --dataset folder --arch tiny --crop 24 --batch-size 2 --base-steps 1 "
    "--frame 40 24 --head-width 8 --device cpu"
).split()


def folder_run(folder, root, workers="0"):
    return run(folder, "--data-dir", str(root), "--workers", workers, small=FOLDER)


@pytest.mark.parametrize("train, val", [(5, 3), (3, 5)])
def test_a_class_that_one_part_alone_has_is_a_class_of_both(train, val, tmp_path):
    assert folder_run(tmp_path / "run", draw_parts(tmp_path / "data", train, val)) == 0
    scores = result_of(tmp_path / "run")["iou"]
    assert list(scores) == [f"class {i}" for i in range(5)]
    assert list(scores.values()).count(None) == 5 - val


@pytest.mark.slow
@pytest.mark.parametrize("what", ["images", "classes"])
def test_other_images_are_refused_later_and_in_another_process(what, tmp_path, capsys):
    root, other = draw_parts(tmp_path / "data"), draw_parts(tmp_path / "other")
    for file in other.glob("*/val/*2.*") if what == "images" else ():
        file.rename(file.with_stem("9"))
    if what == "classes":
        (other / "classes.txt").write_text("sky\nsea\nsand\nsun\n")
    assert folder_run(tmp_path / "run", root) == 0 == folder_run(tmp_path / "run", root)
    assert folder_run(tmp_path / "run", other) == 2
    found = "images: as many then (5), but other ones, or other classes"
    assert found in capsys.readouterr().err
    elsewhere, small = ("--data-dir", str(other)), [*FOLDER, "--data-dir", str(root)]
    statuses, said = play(tmp_path / "two", processes=2, small=small, elsewhere=elsewhere)
    assert statuses == [2, 2] and "different images ([5, 5], or other names)" in said[0]


@pytest.mark.parametrize("broken, workers, status, line", [
    ("images/train", "0", 1, "transfer.py: 2 of 5 images could not be read"),
    ("images/val", "1", 2, "transfer.py: the images to test cannot be used: cannot read"),
    ("labels/val", "0", 2, "transfer.py: cannot read the label"),
])  # fmt: skip
def test_what_cannot_be_used_is_named(broken, workers, status, line, tmp_path, capsys):
    """Two to learn from in skipped.txt, and one to test before the first step."""
    root = draw_parts(tmp_path / "data")
    (root / "classes.txt").write_text("sky\nsea\nsand\n")
    for file in (root / broken).glob("[24].*" if status == 1 else "2.*"):
        file.write_bytes(file.read_bytes()[:-30])
    assert folder_run(tmp_path / "run", root, workers) == status
    said = capsys.readouterr().err.splitlines()[-1]
    skipped = tmp_path / "run" / "skipped.txt"
    assert said.startswith(line) and file.name in (skipped.read_text() if status == 1 else said)
    assert (tmp_path / "run").exists() == (status == 1)


def test_a_run_begins_with_the_network_that_was_asked_for_and_prints_it(tmp_path, capsys):
    saved = torch.load(save_checkpoint(tmp_path / "last.pth"))["model"]
    for name, file, options in (("teacher", "last.pth", []), ("teacher", "backbone.pth", []),
                                ("student", "last.pth", ["--network", "student"])):  # fmt: skip
        first, folder = {}, tmp_path / f"{name}-{file}"
        note = At(0, lambda run, first=first: first.update(
            {k: v.clone() for k, v in run.model.backbone.state_dict().items()}))  # fmt: skip
        arguments = ["--backbone", str(tmp_path / file), "--max-steps", "1", *options]
        assert run(folder, *arguments, accident=note) == 0
        assert not difference(first, checkpoints.part(saved, f"{name}.backbone."))
        said = capsys.readouterr().out
        names = f" ({name}.backbone.*)" if file == "last.pth" else ""
        assert f"tiny, all {len(first)} tensors from {tmp_path / file}{names}\n" in said
        assert json.loads((folder / "config.json").read_text())["arch"] == "tiny"


def test_a_backbone_that_is_not_whole_or_another_is_refused(tmp_path, capsys):
    save_checkpoint(tmp_path / "last.pth")
    argument = ["--backbone", str(tmp_path / "last.pth")]
    assert run(tmp_path / "run", *argument, "--arch", "resnet18") == 2
    assert "holds a tiny: leave --arch out" in capsys.readouterr().err
    contents = torch.load(tmp_path / "last.pth")
    del contents["model"]["teacher.backbone.0.weight"]
    torch.save(contents, tmp_path / "last.pth")
    assert run(tmp_path / "run", *argument) == 2
    assert "lacks: 1, such as" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments, complaint", [
    (["segmentation", "--dataset", "voc"], "--data-dir is missing: the folder of voc"),
    (["detection", "--dataset", "voc"], "--dataset: invalid choice: 'voc' (choose from"),
    (["detection", "--shorts", "640", "800"], "--shorts 640 800: the larger number comes first"),
    ([*SMALL, "--labeled", "3"], "--batch-size 4, but 3 images to learn from: lower it"),
    ([*SMALL, "--aux-weight", "0.4"], "set --aux-weight 0"),
    ([*SMALL, "--output-stride", "16"], "set --output-stride 0"),
    ([*SMALL, "--arch", "huge"], "unknown architecture 'huge'"),
])  # fmt: skip
def test_what_cannot_be_is_refused_with_one_line(arguments, complaint, tmp_path, capsys):
    assert run(tmp_path / "run", small=arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("transfer.py: ") and complaint in line


def test_a_run_is_continued_by_its_own_options_and_task_only(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    assert run(tmp_path / "run", "--base-lr", "3") == 2
    assert "base_lr: 0.4 then, 3.0 now" in capsys.readouterr().err
    given = "--backbone", str(save_checkpoint(tmp_path / "given.pth")), "--max-steps", "1"
    assert run(tmp_path / "other", *given) == 0
    assert run(tmp_path / "other", *given, "--network", "student") == 2
    assert "given.pth had other weights then" in capsys.readouterr().err
    pretraining = last_of(whole)
    del pretraining["config"]["task"]
    checkpoints.save(tmp_path / "run" / "last.pth", pretraining)
    assert run(tmp_path / "run") == 2
    assert "task: pretraining then, segmentation now" in capsys.readouterr().err


def stop_the_test(run):
    stop_a_test(pytest.MonkeyPatch())


@pytest.mark.slow
def test_two_processes_share_images_and_tests_and_a_signal_to_one_stops_both(tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert play(whole, processes=2)[0] == [0, 0]
    for step, accident in ((5, At(4, Signals("SIGUSR1"), rank=1)),
                           (6, At(5, stop_the_test, rank=1))):  # fmt: skip
        statuses, said = play(folder, processes=2, accident=accident)
        assert statuses == [0, 0] and last_of(folder)["step"] == step
        assert f"stopped by a signal to another process after step {step} of 12" in said[0]
    assert play(folder, processes=2)[0] == [0, 0]
    assert_same_run(folder, whole)


@pytest.mark.slow
def test_the_settings_of_ade20k_train_and_test(tmp_path, capsys):
    """Only sizes are smaller: stride, heads, colors and schedule are those of the table."""
    draw_ade20k(tmp_path)
    small = (
        "segmentation --dataset ade20k --arch resnet18 --batch-size 2 --base-steps 1 --frame 80 48 "
        "--crop 48 --head-width 16 --window 32 24 --workers 0 --log-every 1 --device cpu"
    ).split()
    assert run(tmp_path / "run", "--data-dir", str(tmp_path), small=small) == 0
    result, lines = result_of(tmp_path / "run"), losses_of(tmp_path / "run")
    assert len(result["iou"]) == 150 and 0 <= result["miou"] <= 1 and result["step"] == 8
    assert "slides" not in capsys.readouterr().out  # which measured a ResNet-50 at full size
    assert "aux_loss" in lines[0] and all(0 < line["loss"] < 10 for line in lines)


DETECTION = (
    "detection --arch resnet18 --labeled 2 --test-on train --shorts 32 32 --test-short 32 "
    "--longest 64 --smallest-anchor 8 --regions 8 --batch-size 2 --max-steps 2 --workers 0 "
    "--warmup-steps 2 --log-every 1 --test-every 2 --device cpu --data-dir"
).split()


@pytest.mark.slow
def test_a_detector_that_was_stopped_and_continued_is_the_whole_one_bit_for_bit(tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    small = [*DETECTION, str(draw_coco(tmp_path / "coco", more=1))]
    assert run(whole, small=small) == 0
    for accident in (At(0, Signals("SIGTERM")), None):
        assert run(folder, small=small, accident=accident) == 0
    assert_same_run(folder, whole)
    assert losses_of(whole)[0]["lr"] == pytest.approx(0.02 * 2 / 16 / 1000)


@pytest.mark.slow
def test_two_processes_find_objects_together(tmp_path):
    small = [*DETECTION, str(draw_coco(tmp_path / "coco", more=1))]
    assert play(tmp_path / "run", processes=2, small=small)[0] == [0, 0]
    result = last_of(tmp_path / "run")["notes"]["result"]
    assert result["step"] == 2 and result["detections"] > 100 and 0 <= result["box_ap"] <= 1


@pytest.mark.slow
def test_readers_that_are_not_forked_are_sent_all_they_need(tmp_path):
    """As on a Mac, and everywhere from Python 3.14 on."""
    usual, few = multiprocessing.get_start_method(), ("--workers", "1", "--max-steps", "1")
    multiprocessing.set_start_method("spawn", force=True)
    try:
        for small in (SMALL, [*DETECTION, str(draw_coco(tmp_path / "coco", more=1))]):
            assert run(tmp_path / small[0], *few, small=small) == 0
    finally:
        multiprocessing.set_start_method(usual, force=True)
