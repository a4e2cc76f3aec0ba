"""transfer.py: whole fine-tunings of seconds, interrupted and resumed, refused and ended."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys

import pytest
import torch
from test_datasets import draw_ade20k, draw_cityscapes, draw_voc
from test_transfer_data import draw_coco, draw_folder

import train
import transfer
from backbone import build_backbone
from downstream import segmentation, settings
from engine import checkpoints
from engine.program import run_program
from measures import metrics
from staged import At, Signals, difference, fork_server, last_of, log_of, staged

SMALL = (
    "segmentation --dataset toy --labeled 10 --test-on train --batch-size 4 --base-steps 3 "
    "--log-every 2 --test-every 6 --device cpu --dropout 0.2 --base-lr 0.4"
).split()
STEPS = 12


def run(folder, *arguments, accident=None, small=SMALL):
    """The exit status of a small fine-tuning in this process."""
    argv = [*small, "--output-dir", str(folder), *arguments]
    with staged(accident):
        return run_program("transfer.py", transfer.main, argv)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run without any interruption."""
    folder = tmp_path_factory.mktemp("transfer") / "whole"
    assert run(folder) == 0
    return folder


def assert_same_run(folder, other):
    """Weights, optimizer, counts, scores, and every line of the log but for times."""
    a, b = last_of(folder), last_of(other)
    for state in (a, b):
        assert state.pop("seconds") > 0
        del state["config"]
        for group in state["optimizer"]["param_groups"]:
            del group["lr"]  # every step sets it
    assert not difference(a, b)
    assert not difference(log_of(folder), log_of(other))
    best = [torch.load(each / "best.pth") for each in (folder, other)]
    assert not difference(best[0]["model"], best[1]["model"])
    assert (folder / "result.json").read_text() == (other / "result.json").read_text()


def test_a_run_leaves_its_settings_its_log_its_scores_and_two_checkpoints(whole):
    assert {path.name for path in whole.iterdir()} == {
        "config.json", "log.jsonl", "last.pth", "best.pth", "result.json", "run.lock"}  # fmt: skip
    lines = [line for line in log_of(whole) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 4, 6, 8, 10, 12]
    assert lines[-1]["loss"] < 0.95 * lines[0]["loss"] and lines[0]["lr"] == pytest.approx(0.1)
    tests = {line["step"]: line["miou"] for line in log_of(whole) if "miou" in line}
    assert tests.keys() == {6, 12} and all(0 < score < 1 for score in tests.values())
    best, last = torch.load(whole / "best.pth"), last_of(whole)
    assert best["result"]["miou"] == max(tests.values()) == last["notes"]["best"]
    assert last["step"] == STEPS and best["config"]["dataset"] == "toy"
    result = json.loads((whole / "result.json").read_text())
    assert result["step"] == 12 and len(result["iou"]) == 8


def test_the_score_in_the_log_is_that_of_the_weights_that_were_kept(whole):
    c, _ = settings.parse(SMALL, "")
    model, _, unseen = segmentation.prepare(c, build_backbone("tiny"))
    best = torch.load(whole / "best.pth")
    model.load_state_dict(best["model"])
    counts = torch.zeros(8, 8, dtype=torch.long)
    for image, label in unseen:
        counts += metrics.confusion_matrix(model.eval().predict(image), label, 8, 8)
    assert metrics.miou(counts, torch.arange(8)) == best["result"]["miou"]


@pytest.mark.parametrize("steps", [3, 6, 8])
def test_a_run_that_was_stopped_and_continued_is_the_whole_run_bit_for_bit(
    steps, whole, tmp_path, capsys
):
    """Between two lines of the log, just before a test, and between tests."""
    assert run(tmp_path / "run", accident=At(steps - 1, Signals("SIGTERM"))) == 0
    assert f"stopped by SIGTERM after step {steps} of 12" in capsys.readouterr().out
    assert last_of(tmp_path / "run")["step"] == steps
    assert (tmp_path / "run" / "result.json").exists() == (steps > 6)  # a signal does not wait
    assert run(tmp_path / "run") == 0
    assert f"last.pth after step {steps}\n" in capsys.readouterr().out
    assert_same_run(tmp_path / "run", whole)


class SeenImages:
    """Looks at every image that is tested, and sends SIGTERM to the processes at one of them."""

    def __init__(self, monkeypatch, signal_at=0, ranks=(0, 1)):
        self.signal_at, self.ranks, self.benchmark = signal_at, ranks, []
        self.plain = segmentation.Segmenter.predict
        monkeypatch.setattr(segmentation.Segmenter, "predict", lambda *given: self.see(*given))

    def see(self, model, image):
        self.benchmark.append(torch.backends.cudnn.benchmark)
        if len(self.benchmark) == self.signal_at and int(os.environ.get("RANK", 0)) in self.ranks:
            os.kill(os.getpid(), signal.SIGTERM)
        return self.plain(model, image)


@pytest.mark.parametrize("image, steps", [(3, 6), (13, 12)])
def test_a_signal_ends_a_test_at_once_and_the_same_command_tests_again(
    image, steps, whole, tmp_path, monkeypatch, capsys
):
    """Each test is of 10 images: the one after step 6, and that of a run whose steps are done."""
    for expected in (image, 2):  # the second run tests before its first step
        images = SeenImages(monkeypatch, expected)
        assert run(tmp_path / "run") == 0
        assert len(images.benchmark) == expected and last_of(tmp_path / "run")["step"] == steps
        said = capsys.readouterr().out
        assert f"stopped by SIGTERM after step {steps} of 12; " in said and "done " not in said
        monkeypatch.undo()
    assert run(tmp_path / "run") == 0
    assert_same_run(tmp_path / "run", whole)


def test_sizes_are_not_tried_out_where_they_change(tmp_path, monkeypatch):
    """cudnn's benchmark, which is for steps of one size."""
    images, steps = SeenImages(monkeypatch), []
    look = lambda run: steps.append(torch.backends.cudnn.benchmark)
    assert run(tmp_path / "run", "--test-every", "2", "--max-steps", "4", accident=look) == 0
    assert images.benchmark == [False] * 20 and steps == [True] * 4


@pytest.mark.parametrize("contents", [None, "{", "[]", '{"step": 6}'])
def test_a_result_that_is_missing_damaged_or_older_than_the_run_is_made_again(
    contents, whole, tmp_path, capsys
):
    """None: the run was killed while it was tested, and is continued in another folder."""
    other, result = tmp_path / "other", (whole / "result.json").read_text()
    if contents:
        shutil.copytree(whole, other)
        (other / "result.json").write_text(contents)
    assert run(other, "--resume", str(whole / "last.pth"), "--json", "-") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == json.loads(result)
    assert (other / "result.json").read_text() == result


def test_a_run_ends_with_a_table_in_one_unit_and_writes_json_where_it_is_asked_to(
    whole, tmp_path, capsys
):
    shutil.copytree(whole, tmp_path / "run")
    assert run(tmp_path / "run", "--json", str(tmp_path / "score.json")) == 0
    result = json.loads((tmp_path / "score.json").read_text())
    assert result == json.loads((whole / "result.json").read_text())
    end = capsys.readouterr().out.partition("done ")[2]
    assert f"this run    {result['miou']:.3f}     {result['accuracy']:.3f}\n" in end
    ball = f"ball              {result['iou']['ball']:.3f}\n"
    assert "IoU of each class\n" in end and ball in end and "%" not in end and "slides" not in end
    assert run(tmp_path / "run", "--json", str(whole)) == 2
    assert "--json" in capsys.readouterr().err


@pytest.mark.parametrize("changes, shown", [
    ("", True), ("--seed 3 --backbone last.pth", True), ("--labeled 100", False),
    ("--test-on train", False), ("--arch resnet18", False), ("--base-steps 9", False),
])  # fmt: skip
def test_the_slides_numbers_are_shown_for_what_they_measured_only(changes, shown):
    c, _ = settings.parse(["segmentation", "--dataset", "voc", *changes.split()], "")
    rows = settings.slides_of(c, 1449)
    assert [row["miou"] for row in rows.values()] == ([0.395, 0.716] if shown else [])
    assert settings.slides_of(c, 1448) == {}  # images in VOC's form that are not VOC's


def test_a_result_that_cannot_be_written_ends_the_run_with_what_to_do(whole, tmp_path, capsys):
    folder = tmp_path / "run"
    (folder / "result.json").mkdir(parents=True)
    assert run(folder, "--resume", str(whole / "last.pth")) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"transfer.py: {folder}/result.json could not be written")
    (folder / "result.json").rmdir()
    assert run(folder, "--resume", str(whole / "last.pth")) == 0


def test_fewer_steps_are_the_beginning_of_more(whole, tmp_path, capsys):
    assert run(tmp_path / "run", "--max-steps", "5") == 0
    assert last_of(tmp_path / "run")["step"] == 5
    again = "the same command without --max-steps goes on; best.pth has the best of all tests, "
    assert f"paused   at step 5 of 12; {again}" in capsys.readouterr().out
    assert run(tmp_path / "run") == 0
    assert (
        "done     at step 12 of 12; best.pth has the best of all tests, " in capsys.readouterr().out
    )
    a, b = last_of(tmp_path / "run"), last_of(whole)
    assert not difference(a["model"], b["model"]) and not difference(a["optimizer"], b["optimizer"])


FOLDER = (
    "segmentation --dataset folder --arch tiny --crop 24 --batch-size 2 --base-steps 1 "
    "--max-steps 2 --frame 40 24 --head-width 8 --device cpu --threads 1"
).split()


def folder_run(root, workers="0"):
    return [*FOLDER, "--data-dir", str(root), "--workers", workers]


@pytest.mark.parametrize("train, val", [(5, 3), (3, 5)])
def test_a_class_that_one_part_alone_has_is_a_class_of_both(train, val, tmp_path):
    root = draw_folder(tmp_path / "data", dict(train=train, val=val).items())
    assert run(tmp_path / "run", small=folder_run(root)) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert list(result["iou"]) == [f"class {i}" for i in range(5)]
    unseen = [name for name, value in result["iou"].items() if value is None]
    assert len(unseen) == 5 - val


def test_labels_that_cannot_be_used_are_named_and_too_many_end_the_run(tmp_path, capsys):
    root = draw_folder(tmp_path / "data")
    (root / "classes.txt").write_text("sky\nsea\nsand\n")
    (root / "labels" / "train" / "2.png").write_bytes(b"no label")
    assert run(tmp_path / "run", small=folder_run(root)) == 1
    assert "1 of 5 images could not be read" in capsys.readouterr().err
    assert "2.png" in (tmp_path / "run" / "skipped.txt").read_text()


@pytest.mark.parametrize("broken, workers", [("images", "0"), ("labels", "1")])
def test_an_image_to_test_that_cannot_be_used_is_named_before_the_first_step(
    broken, workers, tmp_path, capsys
):
    root = draw_folder(tmp_path / "data")
    (root / "classes.txt").write_text("sky\nsea\nsand\n")
    file = root / broken / "val" / "2.png"
    file.write_bytes(file.read_bytes()[:-30])
    assert run(tmp_path / "run", small=folder_run(root, workers)) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("transfer.py: the images to test cannot be used: cannot read")
    assert "2.png" in line and not (tmp_path / "run").exists()


def slotcon_checkpoint(file):
    """The part of a paused pretraining that a fine-tuning reads."""
    networks = {}
    for seed, name in enumerate(("teacher", "student")):
        torch.manual_seed(seed)
        networks[name] = build_backbone("tiny").state_dict()
    state = {
        f"{n}.backbone.{k}": v for n, backbone in networks.items() for k, v in backbone.items()
    }
    torch.save(dict(config=dict(arch="tiny"), model=state), file)
    return networks


def test_a_run_begins_with_the_network_that_was_asked_for_and_prints_it(tmp_path, capsys):
    networks = slotcon_checkpoint(tmp_path / "last.pth")
    torch.save(networks["teacher"], tmp_path / "backbone.pth")
    for name, file, options in (("teacher", "last.pth", []), ("teacher", "backbone.pth", []),
                                ("student", "last.pth", ["--network", "student"])):  # fmt: skip
        first, folder = {}, tmp_path / f"{name}-{file}"
        note = At(0, lambda run, first=first: first.update(
            {k: v.clone() for k, v in run.model.backbone.state_dict().items()}))  # fmt: skip
        arguments = ["--backbone", str(tmp_path / file), "--max-steps", "1", *options]
        assert run(folder, *arguments, accident=note) == 0
        assert not difference(first, networks[name])
        said = capsys.readouterr().out
        names = f" ({name}.backbone.*)" if file == "last.pth" else ""
        assert f"tiny, all {len(first)} tensors from {tmp_path / file}{names}\n" in said
        assert json.loads((folder / "config.json").read_text())["arch"] == "tiny"


def test_a_backbone_that_is_not_whole_or_another_is_refused(tmp_path, capsys):
    networks = slotcon_checkpoint(tmp_path / "last.pth")
    argument = ["--backbone", str(tmp_path / "last.pth")]
    assert run(tmp_path / "run", *argument, "--arch", "resnet18") == 2
    assert "holds a tiny: leave --arch out" in capsys.readouterr().err
    contents = torch.load(tmp_path / "last.pth")
    del contents["model"][f"teacher.backbone.{next(iter(networks['teacher']))}"]
    torch.save(contents, tmp_path / "last.pth")
    assert run(tmp_path / "run", *argument) == 2
    assert "lacks: 1, such as" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments, complaint", [
    (["segmentation", "--dataset", "voc"], "--data-dir is missing: the folder of voc"),
    (["detection", "--dataset", "voc"], "--dataset: invalid choice: 'voc' (choose from"),
    (["detection", "--shorts", "640", "800"], "--shorts 640 800: the larger number comes first"),
    ([*SMALL, "--labeled", "3"], "and at most the 3 images that there are"),
    ([*SMALL, "--aux-weight", "0.4"], "set --aux-weight 0"),
    ([*SMALL, "--output-stride", "16"], "set --output-stride 0"),
    ([*SMALL, "--arch", "huge"], "unknown architecture 'huge'"),
])  # fmt: skip
def test_what_cannot_be_is_refused_with_one_line(arguments, complaint, tmp_path, capsys):
    assert run(tmp_path / "run", small=arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("transfer.py: ") and complaint in line


@pytest.mark.parametrize("tested", ["segmentation", "pretraining"])
def test_a_disk_on_which_not_one_checkpoint_fits_is_refused(tested, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    if tested == "segmentation":
        status = run(tmp_path / "run")
    else:
        argv = ["--subset", "16", "--output-dir", str(tmp_path / "run")]
        status = run_program("train.py", train.main, argv)
    assert status == 2 and not (tmp_path / "run" / "last.pth").exists()
    line = f"the disk of {tmp_path}/run is too small: 0.001 GB a checkpoint, 0.0 GB free\n"
    assert capsys.readouterr().err.endswith(line)


def test_a_run_is_continued_by_its_own_options_and_task_only(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    assert run(tmp_path / "run", "--base-lr", "3") == 2
    assert "base_lr: 0.4 then, 3.0 now" in capsys.readouterr().err
    pretraining = last_of(whole)
    del pretraining["config"]["task"]
    checkpoints.save(tmp_path / "run" / "last.pth", pretraining)
    assert run(tmp_path / "run") == 2
    assert "task: pretraining then, segmentation now" in capsys.readouterr().err


def _play(argv, place, accident, output, signal_at):
    sys.stdout = sys.stderr = open(output, "w", buffering=1)  # noqa: SIM115, until the end
    os.environ.update({name: str(value) for name, value in place.items()})
    multiprocessing.set_start_method("fork", force=True)
    if signal_at:
        SeenImages(pytest.MonkeyPatch(), signal_at, ranks=[1])
    with staged(accident):
        sys.exit(run_program("transfer.py", transfer.main, argv))


def play(folder, *arguments, processes=1, accident=None, small=SMALL, signal_at=0):
    """The exit statuses of the processes of a run, and what the first one has printed; signal_at:
    the image of a test at which rank 1 is asked to stop.
    """
    fork = fork_server()  # a fork of a process that has gone backward could not do so
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv, played = [*small, "--output-dir", str(folder), *arguments], []
    for rank in range(processes):
        sizes = dict(WORLD_SIZE=processes, LOCAL_WORLD_SIZE=processes, RANK=rank, LOCAL_RANK=rank)
        meeting = dict(MASTER_PORT=port, MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
        place = {**sizes, **meeting} if processes > 1 else {}
        output = folder.with_name(f"{folder.name}.{rank}.txt")
        played.append(fork.Process(target=_play, args=(argv, place, accident, output, signal_at)))
        played[-1].start()
    for one in played:
        one.join(180)
    return [one.exitcode for one in played], folder.with_name(f"{folder.name}.0.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ["", "--workers 1", "--accumulate 2 --amp bf16"])
def test_a_killed_run_continued_is_the_whole_run_bit_for_bit(arguments, tmp_path):
    arguments = arguments.split()
    assert play(tmp_path / "whole", *arguments)[0] == [0]
    killed = play(tmp_path / "run", *arguments, accident=At(10, Signals("SIGKILL")))
    assert killed[0] == [-9] and last_of(tmp_path / "run")["step"] == 6
    assert log_of(tmp_path / "run")[-1]["step"] > 6  # of work that is lost
    status, said = play(tmp_path / "run", *arguments)
    assert status == [0] and "after step 6\n" in said
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_share_the_images_and_continue_exactly(tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert play(whole, processes=2)[0] == [0, 0]
    accident = At(4, Signals("SIGUSR1"), rank=1)
    assert play(folder, processes=2, accident=accident)[0] == [0, 0]
    assert last_of(folder)["step"] == 5
    assert play(folder, processes=2)[0] == [0, 0]
    assert_same_run(folder, whole)


@pytest.mark.slow
def test_a_signal_to_one_process_ends_the_test_of_both(tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert play(whole, processes=2)[0] == [0, 0]
    statuses, said = play(folder, processes=2, signal_at=2)
    assert statuses == [0, 0] and last_of(folder)["step"] == 6 and "Traceback" not in said
    assert "stopped by a signal to another process after step 6 of 12" in said
    assert play(folder, processes=2)[0] == [0, 0]
    assert_same_run(folder, whole)


@pytest.mark.slow
@pytest.mark.parametrize("dataset, draw, classes", [
    ("voc", draw_voc, 21), ("cityscapes", draw_cityscapes, 19), ("ade20k", draw_ade20k, 150),
])  # fmt: skip
def test_the_real_layouts_train_and_test_with_their_own_settings(
    dataset, draw, classes, tmp_path, capsys
):
    """Only sizes are smaller: strides, heads, schedule and sliding window are the data set's."""
    draw(tmp_path)
    small = ["segmentation", "--dataset", dataset, "--data-dir", str(tmp_path), "--arch",
             *("resnet18 --batch-size 2 --base-steps 1 --frame 80 48 --crop 48 --head-width 16 "
               "--workers 0 --log-every 1 --threads 1 --device cpu").split()]  # fmt: skip
    if dataset == "cityscapes":
        small += ["--window", "32", "24"]
    assert run(tmp_path / "run", small=small) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert len(result["iou"]) == classes and 0 <= result["miou"] <= 1 and result["step"] == 8
    assert "slides" not in capsys.readouterr().out  # which measured a ResNet-50 at full size
    lines = [line for line in log_of(tmp_path / "run") if "loss" in line]
    assert ("aux_loss" in lines[0]) == (dataset == "ade20k")
    assert all(0 < line["loss"] < 10 for line in lines)


DETECTION = (
    "detection --arch resnet18 --labeled 4 --test-on train --shorts 64 64 --test-short 64 "
    "--longest 128 --smallest-anchor 8 --regions 8 --batch-size 2 --base-steps 1 "
    "--warmup-steps 4 --log-every 1 --workers 0 --threads 1 --device cpu"
).split()


@pytest.mark.slow
def test_a_detector_that_was_stopped_and_continued_is_the_whole_one_bit_for_bit(tmp_path):
    data = str(draw_coco(tmp_path / "coco", more=3))
    small = [*DETECTION, "--test-every", "3", "--data-dir", data]
    assert run(tmp_path / "whole", small=small) == 0
    assert run(tmp_path / "run", small=small, accident=At(4, Signals("SIGTERM"))) == 0
    assert run(tmp_path / "run", small=small) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    lines = [line for line in log_of(tmp_path / "run") if "loss" in line]
    assert len(lines) == 8 and lines[-1]["loss"] < lines[0]["loss"]
    assert lines[0]["lr"] == pytest.approx(0.02 * 2 / 16 / 1000)


@pytest.mark.slow
def test_two_processes_find_objects_together(tmp_path):
    small = [*DETECTION, "--data-dir", str(draw_coco(tmp_path / "coco", more=3))]
    assert play(tmp_path / "run", processes=2, small=small)[0] == [0, 0]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["step"] == 8 and 0 <= result["box_ap"] <= 1
