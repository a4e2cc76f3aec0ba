"""transfer.py: whole fine-tunings of seconds, interrupted and resumed, refused and ended.

Runs are in this process; those that are killed or are two have processes of their own.
"""

import contextlib
import json
import multiprocessing
import os
import shutil
import socket
import sys

import numpy as np
import pytest
import torch
from test_transfer_data import draw_ade20k, draw_cityscapes, draw_coco, draw_voc, photo, save

import transfer
from backbone import build_trunk
from downstream import settings
from downstream.segmentation import predict
from downstream.tasks import make_task
from engine import checkpoint
from measures import metrics
from staged import AtStep, Signal, difference, last_of, log_of

SMALL = ["segmentation", "--dataset", "toy", "--scenes", "10", "--test-on", "train", "--batch-size",
         "4", "--base-steps", "3", "--log-every", "2", "--save-every", "4", "--test-every", "6",
         "--device", "cpu", "--dropout", "0.2", "--base-lr", "0.4"]  # fmt: skip
STEPS = 12


def run(folder, *arguments, accident=None, small=SMALL):
    """The exit status of a small fine-tuning in this process."""
    prepared = (lambda run: accident(0, run)) if accident else None
    return transfer.main([*small, "--output-dir", str(folder), *arguments], prepared)


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
    assert not difference(a, b)
    assert not difference(log_of(folder), log_of(other))
    best = [torch.load(each / "best.pth") for each in (folder, other)]
    assert not difference(best[0]["model"], best[1]["model"])
    assert (folder / "result.json").read_text() == (other / "result.json").read_text()


# ------------------------------------------------------------------------ a run


def test_a_run_leaves_its_settings_its_log_its_scores_and_two_checkpoints(whole, capsys):
    assert {path.name for path in whole.iterdir()} == {
        "config.json", "log.jsonl", "last.pth", "best.pth", "result.json"}  # fmt: skip
    lines = log_of(whole)
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6, 8, 10, 12]
    tests = {line["step"]: line["miou"] for line in lines if "miou" in line}
    assert tests.keys() == {6, 12} and all(0 < score < 1 for score in tests.values())
    best = torch.load(whole / "best.pth")
    assert best["result"]["miou"] == max(tests.values()) == last_of(whole)["notes"]["best"]
    assert last_of(whole)["step"] == STEPS and best["config"]["dataset"] == "toy"
    result = json.loads((whole / "result.json").read_text())
    assert result["step"] == 12 and len(result["iou"]) == 8


def test_the_score_in_the_log_is_that_of_the_weights_that_were_kept(whole):
    c, _ = transfer.parse([*SMALL, "--output-dir", "x"])
    task = make_task(c, build_trunk("tiny"))
    best = torch.load(whole / "best.pth")
    task.model.load_state_dict(best["model"])
    task.model.eval()
    counts = torch.zeros(8, 8, dtype=torch.long)
    for image, label in task.test:
        counts += metrics.confusion_matrix(predict(task.model, image), label, 8, 8)
    assert metrics.miou(counts, torch.arange(8)) == best["result"]["miou"]


def test_a_run_learns_what_it_sees(whole):
    losses = [line["loss"] for line in log_of(whole) if "loss" in line]
    assert losses[-1] < 0.95 * losses[0]
    rates = [line["lr"] for line in log_of(whole) if "lr" in line]
    assert rates == sorted(rates, reverse=True) and rates[0] == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("steps", [3, 6, 8])
def test_a_run_that_was_stopped_and_continued_is_the_whole_run_bit_for_bit(
    steps, whole, tmp_path, capsys
):
    """Between two lines of the log, just before a test, and where a checkpoint is due."""
    assert run(tmp_path / "run", accident=AtStep(steps, Signal("SIGTERM"))) == 0
    assert f"stopped by SIGTERM after step {steps} of 12" in capsys.readouterr().out
    assert last_of(tmp_path / "run")["step"] == steps
    assert run(tmp_path / "run") == 0
    assert f"last.pth after step {steps}\n" in capsys.readouterr().out
    assert_same_run(tmp_path / "run", whole)


def test_a_run_that_dies_while_it_is_tested_is_tested_again(whole, tmp_path):
    class Dies(Exception):
        pass

    def accident(_, run):
        write = run.journal.write

        def dying(record, brief):
            if "miou" in record and record["step"] == 12:
                raise Dies
            write(record, brief)

        run.journal.write = dying

    with pytest.raises(Dies):
        run(tmp_path / "run", accident=accident)
    assert last_of(tmp_path / "run")["step"] == 12  # written before the test began
    assert run(tmp_path / "run") == 0
    assert_same_run(tmp_path / "run", whole)


def test_a_finished_run_started_again_changes_nothing(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    assert run(tmp_path / "run") == 0
    assert_same_run(tmp_path / "run", whole)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["step"] == 12


def test_a_finished_run_continued_in_another_folder_is_tested_there(whole, tmp_path, capsys):
    assert run(tmp_path / "other", "--resume", str(whole / "last.pth")) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["step"] == 12
    result = (whole / "result.json").read_text()
    assert (tmp_path / "other" / "result.json").read_text() == result
    assert not difference(last_of(tmp_path / "other")["model"], last_of(whole)["model"])
    tests = [line["miou"] for line in log_of(whole) if "miou" in line]
    assert (tmp_path / "other" / "best.pth").exists() == (max(tests) == tests[-1])


@pytest.mark.parametrize("contents", ["{", "[]", '{"step": 6}'])
def test_a_result_that_is_damaged_or_older_than_the_run_is_made_again(whole, contents, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "result.json").write_text(contents)
    assert run(tmp_path / "run") == 0
    assert (tmp_path / "run" / "result.json").read_text() == (whole / "result.json").read_text()


def test_a_result_that_cannot_be_written_ends_the_run_with_what_to_do(whole, tmp_path, capsys):
    folder = tmp_path / "run"
    (folder / "result.json").mkdir(parents=True)
    assert run(folder, "--resume", str(whole / "last.pth")) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"transfer.py: the run is done, but {folder / 'result.json'} could not")
    assert line.endswith("the scores are in log.jsonl, and the same command tests again")
    (folder / "result.json").rmdir()
    assert run(folder, "--resume", str(whole / "last.pth")) == 0


def test_fewer_steps_are_the_beginning_of_more(whole, tmp_path):
    assert run(tmp_path / "run", "--max-steps", "5") == 0
    assert last_of(tmp_path / "run")["step"] == 5
    assert run(tmp_path / "run") == 0
    a, b = last_of(tmp_path / "run"), last_of(whole)
    assert not difference(a["model"], b["model"]) and not difference(a["optimizer"], b["optimizer"])


def test_a_step_with_bad_numbers_changes_nothing_and_is_made_up_for(tmp_path):
    seen = []

    def accident(_, run):
        compute, clear = run.gradient.compute, run.gradient.clear

        def spoilt(*batch):
            before = {k: v.clone() for k, v in run.model.state_dict().items()}
            reports, norm = compute(*batch)
            seen.append(before)
            return reports, norm * (float("nan") if len(seen) == 3 else 1)

        def looked(scaled):
            clear(scaled)
            if len(seen) == 3 and run.progress.step == 2:
                assert not difference(run.model.state_dict(), seen[2])

        run.gradient.compute, run.gradient.clear = spoilt, looked

    assert run(tmp_path / "run", accident=accident) == 0
    last = last_of(tmp_path / "run")
    assert (last["step"], last["position"], last["bad_steps"], len(seen)) == (12, 13, 1, 13)


def test_nothing_finite_ends_the_run_and_says_what_to_do(tmp_path, capsys):
    def accident(_, run):
        compute = run.gradient.compute
        run.gradient.compute = lambda *batch: (lambda r, n: (r, n * float("nan")))(*compute(*batch))

    assert run(tmp_path / "run", "--max-bad-steps", "3", accident=accident) == 1
    assert "transfer.py: 3 steps in a row had no finite loss" in capsys.readouterr().err


def test_labels_that_cannot_be_used_are_named_and_too_many_end_the_run(tmp_path, capsys):
    top = draw_voc(tmp_path)
    (top / "SegmentationClassAug" / "2008_02.png").write_bytes(b"no label")
    arguments = ["segmentation", "--dataset", "voc", "--data-dir", str(top), "--arch", "tiny",
                 "--crop", "24", "--batch-size", "2", "--base-steps", "1",
                 "--frame", "40", "24", "--head-width", "8", "--workers", "0"]  # fmt: skip
    assert run(tmp_path / "run", small=arguments) == 1
    assert "1 of 2 images could not be read" in capsys.readouterr().err
    assert "2008_02.png" in (tmp_path / "run" / "skipped.txt").read_text()
    assert run(tmp_path / "more", "--max-bad-share", "0.5", small=arguments) == 0


def draw_parts(root, counts):
    """A folder with parts and without classes.txt; counts: part -> number of classes."""
    for part, count in counts.items():
        for i in range(5):
            save(root / "images" / part / f"{i}.png", photo(i))
            save(root / "labels" / part / f"{i}.png", np.full((24, 40), i % count))
    return root


FOLDER = ["segmentation", "--dataset", "folder", "--arch", "tiny", "--crop", "24", "--batch-size",
          "2", "--base-steps", "1", "--max-steps", "2", "--frame", "40", "24", "--head-width", "8",
          "--device", "cpu", "--threads", "1"]  # fmt: skip


@pytest.mark.parametrize("counts", [dict(train=5, val=3), dict(train=3, val=5)])
def test_a_class_that_one_part_alone_has_is_a_class_of_both(counts, tmp_path, capsys):
    small = [*FOLDER, "--data-dir", str(draw_parts(tmp_path / "data", counts)), "--workers", "0"]
    assert run(tmp_path / "run", small=small) == 0
    ends = f"of train end at {counts['train'] - 1}, those of val at {counts['val'] - 1}"
    assert f"classes  5 of both parts together: the ids {ends}" in capsys.readouterr().out
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert list(result["iou"]) == [f"class {i}" for i in range(5)]
    unseen = [name for name, value in result["iou"].items() if value is None]
    assert all(int(name[-1]) >= counts["val"] for name in unseen)


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize("broken", ["images/val/2.png", "labels/val/2.png"])
def test_an_image_to_test_that_cannot_be_used_is_named_before_the_first_step(
    broken, workers, tmp_path, capsys
):
    root = draw_parts(tmp_path / "data", dict(train=3, val=3))
    (root / "classes.txt").write_text("sky\nsea\nsand\n")
    save(root / "labels" / "val" / "4.png", np.full((24, 40), 3))
    cut = (root / broken).read_bytes()[:-30]
    (root / broken).write_bytes(cut)
    small = [*FOLDER, "--data-dir", str(root), "--workers", workers]
    assert run(tmp_path / "run", small=small) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("transfer.py: 2 of 5 images to test cannot be used, first: cannot read")
    assert "2.png" in line and not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_label_that_is_lost_during_a_run_ends_its_test_with_one_line(workers, tmp_path, capsys):
    root = draw_parts(tmp_path / "data", dict(train=3, val=3))
    lost = root / "labels" / "val" / "2.png"
    small = [*FOLDER, "--data-dir", str(root), "--workers", workers]
    kept = lost.read_bytes()
    assert run(tmp_path / "run", small=small, accident=lambda *_: lost.unlink()) == 2
    [line] = capsys.readouterr().err.splitlines()
    expected = "transfer.py: an image to test cannot be used: cannot read the label"
    assert line == f"{expected} {lost}"
    lost.write_bytes(kept)
    assert run(tmp_path / "run", small=small) == 0
    assert "last.pth after step 2\n" in capsys.readouterr().out


# ------------------------------------------------------------------------ the trunk


def slotcon_checkpoint(file):
    """The part of a paused pretraining that a fine-tuning reads."""
    networks = {}
    for seed, name in enumerate(("teacher", "student")):
        torch.manual_seed(seed)
        networks[name] = build_trunk("tiny").state_dict()
    state = {f"{n}.backbone.{k}": v for n, trunk in networks.items() for k, v in trunk.items()}
    torch.save(dict(config=dict(arch="tiny"), model=state), file)
    return networks


def first_weights(folder, file, *arguments):
    """The trunk as it was when a run began."""
    found = {}
    note = lambda _, run: found.update({k: v.clone() for k, v in run.model.state_dict().items()})
    status = run(folder, "--backbone", str(file), "--max-steps", "1", *arguments, accident=note)
    assert status == 0
    return {k.removeprefix("backbone.trunk."): v for k, v in found.items() if "trunk" in k}


def test_a_run_begins_with_the_network_that_was_asked_for_and_says_so(tmp_path, capsys):
    networks = slotcon_checkpoint(tmp_path / "last.pth")
    teacher = first_weights(tmp_path / "a", tmp_path / "last.pth")
    student = first_weights(tmp_path / "b", tmp_path / "last.pth", "--network", "student")
    assert not difference(teacher, networks["teacher"])
    assert not difference(student, networks["student"]) and difference(student, teacher)
    said = capsys.readouterr().out
    assert "tiny, 26 of 26 tensors" in said and "student of a SlotCon checkpoint" in said
    torch.save(networks["teacher"], tmp_path / "backbone.pth")
    assert not difference(first_weights(tmp_path / "c", tmp_path / "backbone.pth"), teacher)
    assert json.loads((tmp_path / "c" / "config.json").read_text())["arch"] == "tiny"


def test_a_trunk_that_is_not_whole_is_refused(tmp_path, capsys):
    networks = slotcon_checkpoint(tmp_path / "last.pth")
    del networks["teacher"]["3.weight"]
    torch.save(networks["teacher"], tmp_path / "backbone.pth")
    assert run(tmp_path / "run", "--backbone", str(tmp_path / "backbone.pth")) == 2
    assert "lacks 1 tensors, first 3.weight" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("arguments, complaint", [
    (["detection"], "--data-dir is missing: the folder of coco, which holds {train2017,val2017}"),
    (["segmentation", "--dataset", "voc"], "--data-dir is missing: the folder of voc"),
    (["segmentation", "--dataset", "toy", "--steps", "3"], "unrecognized arguments: --steps 3"),
    ([], "the following arguments are required: detection | segmentation"),
    (["segmentation", "--dataset", "toys"], "invalid choice: 'toys'"),
    (["detection", "--dataset", "voc"], "invalid choice: 'voc'"),
    ([*SMALL, "--labeled", "99"], "--labeled 99, but there are 10 labeled images"),
    ([*SMALL, "--labeled", "3"], "--batch-size 4 is larger than the 3 images to learn from"),
    ([*SMALL, "--accumulate", "3"], "must be divisible by 1 process(es) x --accumulate 3: take 3"),
    ([*SMALL, "--frame", "0", "64"], "--frame 0 64: both sides, or 0 0"),
    ([*SMALL, "--scale", "2", "1"], "--scale 2 1: the smaller number comes first"),
    ([*SMALL, "--window", "16", "--window-stride", "32"], "leaves gaps between squares of 16 px"),
    ([*SMALL, "--aux-weight", "0.4"], "set --aux-weight 0 for this trunk"),
    ([*SMALL, "--output-stride", "16"], "set --output-stride 0 for this trunk"),
    ([*SMALL, "--backbone", "/no/such.pth"], "no checkpoint at /no/such.pth"),
])  # fmt: skip
def test_what_cannot_be_is_refused_with_one_line(arguments, complaint, tmp_path, capsys):
    tail = ["--output-dir", str(tmp_path / "run")] if arguments else []
    assert transfer.main([*arguments, *tail]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("transfer.py: ") and complaint in line
    assert not (tmp_path / "run").exists()


def test_a_run_is_continued_by_its_own_options_and_task_only(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    assert run(tmp_path / "run", "--base-lr", "3") == 2
    assert "base_lr: 0.4 then, 3.0 now" in capsys.readouterr().err
    pretraining = last_of(whole)
    del pretraining["config"]["task"]
    checkpoint.save(tmp_path / "run" / "last.pth", pretraining)
    assert run(tmp_path / "run") == 2
    assert "task: pretraining then, segmentation now" in capsys.readouterr().err


def test_the_help_of_each_task_names_every_option_and_the_defaults_of_every_data_set(capsys):
    for task, names in (("detection", settings.Detection), ("segmentation", settings.Segmentation)):
        with pytest.raises(SystemExit):
            transfer.parse([task, "--help"])
        said = " ".join(capsys.readouterr().out.split())
        for name in names.__dataclass_fields__:
            assert "--" + name.replace("_", "-") in said
    assert "toy: 0.05" in said and "ade20k: 0.0005" in said


# ------------------------------------------------------------------------ processes of their own


def _play(argv, place, accident, output):
    file = open(output, "w", buffering=1)  # noqa: SIM115, until the process ends
    sys.stdout = sys.stderr = file
    os.environ.update({name: str(value) for name, value in place.items()})
    rank = place.get("RANK", 0)
    sys.exit(transfer.main(argv, (lambda run: accident(rank, run)) if accident else None))


def play(folder, *arguments, processes=1, accident=None, small=SMALL):
    """The exit statuses of the processes of a run, and what the first one has said."""
    fork = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv, played = [*small, "--output-dir", str(folder), *arguments], []
    for rank in range(processes):
        place = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes, MASTER_PORT=port,
                     LOCAL_WORLD_SIZE=processes, MASTER_ADDR="127.0.0.1",
                     GLOO_SOCKET_IFNAME="lo")  # fmt: skip
        output = folder.with_name(f"{folder.name}.{rank}.txt")
        place = place if processes > 1 else {}
        played.append(fork.Process(target=_play, args=(argv, place, accident, output)))
        played[-1].start()
    for one in played:
        one.join(180)
    with contextlib.suppress(OSError):
        said = folder.with_name(f"{folder.name}.0.txt").read_text()
    return [one.exitcode for one in played], said


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [(), ("--workers", "1"), ("--accumulate", "2", "--amp", "bf16")]
)
def test_a_killed_run_continued_is_the_whole_run_bit_for_bit(arguments, tmp_path):
    assert play(tmp_path / "whole", *arguments)[0] == [0]
    killed = play(tmp_path / "run", *arguments, accident=AtStep(11, Signal("SIGKILL")))
    assert killed[0] == [-9] and last_of(tmp_path / "run")["step"] == 8
    assert log_of(tmp_path / "run")[-1]["step"] > 8  # of work that is lost
    status, said = play(tmp_path / "run", *arguments)
    assert status == [0] and "after step 8\n" in said
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_two_processes_share_the_images_and_continue_exactly(tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    status, said = play(whole, processes=2)
    assert status == [0, 0] and "batch    4 = 2 x 2 process(es)" in said
    assert play(folder, processes=2, accident=AtStep(5, Signal("SIGUSR1"), rank=1))[0] == [0, 0]
    assert last_of(folder)["step"] == 5
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
             "resnet18", "--batch-size", "2", "--base-steps", "1", "--frame", "80", "48",
             "--crop", "48", "--head-width", "16", "--workers", "0", "--log-every", "1",
             "--threads", "1"]  # fmt: skip
    if dataset == "cityscapes":
        small += ["--window", "32", "--window-stride", "24"]
    assert run(tmp_path / "run", small=small) == 0
    said = capsys.readouterr().out
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert len(result["iou"]) == classes and 0 <= result["miou"] <= 1 and result["step"] == 8
    target = settings.TARGETS[dataset]["miou"]
    assert f"the slides: {target[1]} pretrained on COCO, {target[0]} from random weights" in said
    lines = [line for line in log_of(tmp_path / "run") if "loss" in line]
    assert ("aux_loss" in lines[0]) == (dataset == "ade20k")
    assert all(0 < line["loss"] < 10 for line in lines)


DETECTION = ["detection", "--arch", "resnet18", "--labeled", "4", "--test-on", "train",
             "--short-low", "64", "--short-high", "64", "--test-short", "64", "--longest", "128",
             "--smallest-anchor", "8", "--regions", "8", "--batch-size", "2", "--base-steps", "1",
             "--warmup-steps", "4", "--log-every", "1", "--save-every", "100",
             "--workers", "0", "--threads", "1", "--device", "cpu"]  # fmt: skip


@pytest.mark.slow
def test_a_detector_that_was_stopped_and_continued_is_the_whole_one_bit_for_bit(tmp_path, capsys):
    small = [*DETECTION, "--data-dir", str(draw_coco(tmp_path / "coco", more=3))]
    assert run(tmp_path / "whole", small=small) == 0
    assert "box_ap75" in capsys.readouterr().out
    assert run(tmp_path / "run", small=small, accident=AtStep(5, Signal("SIGTERM"))) == 0
    assert run(tmp_path / "run", small=small) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    lines = [line for line in log_of(tmp_path / "run") if "loss" in line]
    assert len(lines) == 8 and lines[-1]["loss"] < lines[0]["loss"]
    assert lines[0]["lr"] == pytest.approx(0.02 * 2 / 16 / 1000)


@pytest.mark.slow
def test_two_processes_find_objects_together(tmp_path):
    small = [*DETECTION, "--data-dir", str(draw_coco(tmp_path / "coco", more=3))]
    status, _ = play(tmp_path / "run", processes=2, small=small)
    assert status == [0, 0]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["step"] == 8 and 0 <= result["box_ap"] <= 1
