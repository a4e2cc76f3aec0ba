"""Exact resumption: a run that is interrupted and continued is the run that was not. train.py,
checkpoint.py.
"""

import json
import re
import shutil

import pytest
import torch

import train
from staged import (
    STEPS_PER_EPOCH,
    AtStep,
    Signal,
    command_line,
    difference,
    draw_photographs,
    last_of,
    log_of,
    play,
)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return draw_photographs(tmp_path_factory.mktemp("resume") / "photographs")


@pytest.fixture(scope="module")
def whole(photographs, tmp_path_factory):
    """A run without any interruption."""
    folder = tmp_path_factory.mktemp("resume") / "whole"
    [run] = play(folder, photographs=photographs)
    assert run.process.exitcode == 0, run.output
    return folder


def assert_same_run(folder, other):
    """Weights, teacher, center, optimizer, scaler, position; and every line of the log but for
    times.
    """
    a, b = last_of(folder), last_of(other)
    for state in (a, b):
        assert (
            state.pop("seconds") > 0
        )  # what a run has taken adds up, but is no two times the same
        del state["config"]
    assert not difference(a, b)
    assert not difference(log_of(folder), log_of(other))
    weights = [torch.load(f / "backbone.pth") for f in (folder, other)]
    assert not difference(*weights)


@pytest.mark.parametrize("steps", [STEPS_PER_EPOCH + 2, 2 * STEPS_PER_EPOCH])
def test_a_run_stopped_by_a_signal_and_continued_is_the_whole_run_bit_for_bit(
    steps, whole, photographs, tmp_path
):
    """In the middle of an epoch, between two lines of the log, and at an epoch's end."""
    [first] = play(
        tmp_path / "run", photographs=photographs, accident=AtStep(steps, Signal("SIGTERM"))
    )
    assert first.process.exitcode == 0 and last_of(tmp_path / "run")["step"] == steps
    [second] = play(tmp_path / "run", photographs=photographs)
    assert f"resumed  {tmp_path / 'run' / 'last.pth'} after step {steps}\n" in second.output
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--workers", "1"),
        ("--optimizer", "adamw"),
        ("--amp", "fp16"),
        ("--accumulate", "2"),
        ("--image-loss",),
    ],
)
@pytest.mark.slow
def test_resumption_is_exact_with_every_kind_of_step(arguments, photographs, tmp_path):
    play(tmp_path / "whole", *arguments, photographs=photographs)
    play(
        tmp_path / "run", *arguments, photographs=photographs, accident=AtStep(4, Signal("SIGUSR1"))
    )
    assert last_of(tmp_path / "run")["position"] == 4
    play(tmp_path / "run", *arguments, photographs=photographs)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_work_lost_with_a_killed_process_is_done_again_and_logged_once(
    whole, photographs, tmp_path
):
    run = tmp_path / "run"
    [first] = play(
        run, photographs=photographs, accident=AtStep(3 * STEPS_PER_EPOCH, Signal("SIGKILL"))
    )
    assert first.process.exitcode == -9
    assert log_of(run)[-1]["step"] > last_of(run)["step"] == 2 * STEPS_PER_EPOCH
    with (run / "log.jsonl").open("a") as log:
        log.write('{"step": 7, "los')  # cut off in the middle
    play(run, photographs=photographs)
    assert_same_run(run, whole)


def test_a_run_that_starts_over_starts_its_log_over(whole, photographs, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    play(tmp_path / "run", "--resume", "none", photographs=photographs)
    assert_same_run(tmp_path / "run", whole)


def test_a_finished_run_started_again_changes_nothing(whole, photographs, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    [again] = play(tmp_path / "run", photographs=photographs)
    assert again.process.exitcode == 0
    assert_same_run(tmp_path / "run", whole)


def test_a_run_can_go_on_from_a_file_of_another_folder(whole, photographs, tmp_path):
    play(tmp_path / "first", "--max-steps", "5", photographs=photographs)
    [run] = play(
        tmp_path / "second",
        "--resume",
        str(tmp_path / "first" / "last.pth"),
        photographs=photographs,
    )
    assert "after step 5" in run.output
    assert not difference(last_of(tmp_path / "second")["model"], last_of(whole)["model"])


def test_two_processes_go_on_as_two_exactly_and_one_is_told_of_the_difference(
    photographs, tmp_path
):
    whole, run, alone = tmp_path / "whole", tmp_path / "run", tmp_path / "alone"
    reference = play(whole, photographs=photographs, processes=2)
    play(run, photographs=photographs, processes=2, accident=AtStep(4, Signal("SIGUSR1"), rank=1))
    assert last_of(run)["position"] == 4
    shutil.copytree(run, alone)

    both = play(run, photographs=photographs, processes=2)
    assert [one.process.exitcode for one in both] == [0, 0]
    assert_same_run(run, whole)
    weights = [
        {k: v for k, v in one.model.items() if not re.search("running|tracked", k)}
        for one in both + reference
    ]
    assert not difference(weights[0], weights[1]) and not difference(weights[1], weights[3])

    [one] = play(alone, photographs=photographs)
    assert one.process.exitcode == 0
    assert (
        "after step 4 of 2 process(es), now 1: the same images in every step, but not the same "
        "bits, since batch "
        "statistics and random colors are per process"
    ) in one.output
    assert log_of(alone)[-1]["lr"] == log_of(whole)[-1]["lr"] and last_of(alone)["position"] == 18


CHANGES = {
    "num_prototypes: 5 then, 6 now": ("--num-prototypes", "6"),
    "dim_hidden: 12 then, 11 now": ("--dim-hidden", "11"),
    "dim_out: 7 then, 8 now": ("--dim-out", "8"),
    "batch_size: 4 then, 3 now": ("--batch-size", "3"),
    "epochs: 6 then, 7 now": ("--epochs", "7"),
    "optimizer: lars then, adamw now": ("--optimizer", "adamw"),
    "p_blur: (1.0, 0.1) then, (1.0, 0.2) now": ("--p-blur", "1", "0.2"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_option_that_matters_cannot_change_between_two_parts_of_a_run(
    change, whole, photographs, capsys
):
    refused(
        train.main(command_line(whole, *CHANGES[change], photographs=photographs)),
        capsys,
        change,
        whole,
    )


def test_the_number_of_images_cannot_change_either(whole, tmp_path, capsys):
    fewer = draw_photographs(tmp_path / "fewer", 13)
    refused(
        train.main(command_line(whole, photographs=fewer)), capsys, "images: 14 then, 13 now", whole
    )


def refused(status, capsys, change, whole):
    said = capsys.readouterr().err
    assert status == 2 and said.count("\n") == 1
    assert said.startswith(
        f"train.py: {whole / 'last.pth'} was made with other options ({change}): give another --out"
    )
    assert last_of(whole)["step"] == 18


def test_force_resume_continues_with_what_is_asked_for_now(photographs, tmp_path):
    arguments = "--optimizer", "adamw", "--max-steps", "2"
    play(tmp_path / "run", *arguments, photographs=photographs)
    arguments = (
        "--optimizer",
        "adamw",
        "--max-steps",
        "3",
        "--weight-decay",
        "0.5",
        "--force-resume",
    )
    [run] = play(tmp_path / "run", *arguments, photographs=photographs)
    assert run.process.exitcode == 0, run.output
    saved = last_of(tmp_path / "run")
    assert saved["step"] == 3
    assert [group["weight_decay"] for group in saved["optimizer"]["param_groups"]] == [0.5, 0]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["weight_decay"] == 0.5


def test_forcing_does_not_put_weights_where_they_do_not_fit(whole, photographs, capsys):
    assert (
        train.main(
            command_line(whole, "--num-prototypes", "6", "--force-resume", photographs=photographs)
        )
        == 2
    )
    assert (
        "is of another architecture or size: it has center as (5,) where (6,) is needed"
        in capsys.readouterr().err
    )


def test_processes_that_see_different_checkpoints_do_not_start(whole, photographs, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    runs = play(
        tmp_path / "run", photographs=photographs, processes=2, before=other_folder_on_rank_1
    )
    assert [run.process.exitcode for run in runs] == [2, 2]
    assert (
        "the processes found different states of" in runs[0].output and "[18, 0]" in runs[0].output
    )


def other_folder_on_rank_1(rank, argv):
    return (
        [*argv, "--output-dir", argv[argv.index("--output-dir") + 1] + "-elsewhere"]
        if rank == 1
        else argv
    )
