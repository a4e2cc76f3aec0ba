"""What a cluster and a disk do to a run: signals, bad numbers, bad images, lost processes.
train.py, processes.py.
"""

import json
import math
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import train
from engine.schedule import learning_rate
from staged import (
    PATIENCE,
    ROOT,
    STEPS_PER_EPOCH,
    AtStep,
    BadNumbers,
    Several,
    Signal,
    command_line,
    difference,
    draw_photographs,
    last_of,
    log_of,
    play,
    start,
)
from teacher import teacher_momentum


def slowly_tested(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return draw_photographs(tmp_path_factory.mktemp("faults") / "photographs")


# ------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_ends_the_run_after_its_step_saved_and_with_a_line_that_says_how_to_go_on(
    name, photographs, tmp_path
):
    [run] = play(tmp_path / "run", photographs=photographs, accident=AtStep(5, Signal(name)))
    assert run.process.exitcode == (130 if name == "SIGINT" else 0)
    assert last_of(tmp_path / "run")["step"] == 5
    assert f"{name} received: the run ends after this step and saves" in run.output
    assert run.output.endswith(
        f"stopped by {name} after step 5 of 18; {tmp_path / 'run' / 'last.pth'} is written, and "
        "the same command goes on from there\n"
    )


def test_a_signal_before_the_first_step_is_not_lost(photographs, tmp_path):
    [run] = play(tmp_path / "run", photographs=photographs, accident=signal_before_the_first_batch)
    assert run.process.exitcode == 0 and last_of(tmp_path / "run")["step"] == 1


def signal_before_the_first_batch(rank, run):
    Signal("SIGTERM")()


def test_a_signal_in_the_last_step_does_not_turn_the_end_into_a_pause(photographs, tmp_path):
    [run] = play(
        tmp_path / "run",
        "--max-steps",
        "2",
        photographs=photographs,
        accident=AtStep(2, Signal("SIGTERM")),
    )
    assert (
        run.process.exitcode == 0
        and (tmp_path / "run" / "backbone.pth").exists()
        and "done     2" in run.output
    )


def test_the_line_does_not_send_a_run_back_to_where_it_was_told_to_start(photographs, tmp_path):
    arguments = "--resume", "none"
    [run] = play(
        tmp_path / "run", *arguments, photographs=photographs, accident=AtStep(2, Signal("SIGTERM"))
    )
    assert "is written, and the same command with --resume auto goes on from there\n" in run.output


def test_a_second_sigint_ends_the_run_at_once(photographs, tmp_path):
    twice = AtStep(5, Signals("SIGINT", "SIGINT"))
    [run] = play(tmp_path / "run", photographs=photographs, accident=twice)
    assert run.process.exitcode == 130 and last_of(tmp_path / "run")["step"] == 3


def test_other_signals_do_not_hurry_it(photographs, tmp_path):
    """Clusters repeat SIGTERM, and some send SIGINT before it."""
    several = AtStep(5, Signals("SIGINT", "SIGTERM", "SIGTERM", "SIGUSR1"))
    [run] = play(tmp_path / "run", photographs=photographs, accident=several)
    assert (
        run.process.exitcode == 130
        and last_of(tmp_path / "run")["step"] == 5
        and "stopped by SIGINT" in run.output
    )


class Signals:
    def __init__(self, *names):
        self.names = names

    def __call__(self):
        for name in self.names:
            Signal(name)()
            time.sleep(0.01)  # or the system joins two into one


@pytest.mark.parametrize("name", ["SIGTERM", slowly_tested("SIGUSR1")])
def test_all_processes_stop_at_the_step_at_which_one_was_asked_to(name, photographs, tmp_path):
    runs = play(
        tmp_path / "run",
        photographs=photographs,
        processes=2,
        accident=AtStep(4, Signal(name), rank=1),
    )
    assert [run.process.exitcode for run in runs] == [0, 0]
    assert (
        last_of(tmp_path / "run")["step"] == 4
        and "stopped by another process after step 4" in runs[0].output
    )
    assert_equal_weights(runs)


def test_signals_mean_what_they_did_before_once_a_run_is_over(photographs, tmp_path, capsys):
    before = [signal.getsignal(getattr(signal, name)) for name in ("SIGTERM", "SIGINT", "SIGUSR1")]
    assert (
        train.main(command_line(tmp_path / "run", "--max-steps", "1", photographs=photographs)) == 0
    )
    assert [
        signal.getsignal(getattr(signal, name)) for name in ("SIGTERM", "SIGINT", "SIGUSR1")
    ] == before


def assert_equal_weights(runs):
    """All processes hold the same numbers, but for the statistics of batch norms on a CPU."""
    first, *others = [
        {k: v for k, v in run.model.items() if not re.search("running|tracked", k)} for run in runs
    ]
    assert others and not any(difference(first, other) for other in others)


@pytest.mark.slow
def test_ctrl_c_under_torchrun_and_the_same_command_again(photographs, tmp_path):
    """torchrun passes the terminal's SIGINT on to all of its processes: a pause, and exactly
    resumed.
    """
    arguments = "--workers", "1"
    whole = torchrun(tmp_path / "whole", photographs, *arguments)
    assert whole.wait(PATIENCE) == 0, whole.told.read_text()
    assert "Warning" not in whole.told.read_text()

    process = torchrun(tmp_path / "run", photographs, *arguments, slowly=True)
    wait_for(process, r"step [2-9]/18")
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(PATIENCE) != 130
    told = process.told.read_text()
    stopped = re.search(r"stopped by SIGINT after step (\d+) of 18", told)
    assert stopped, told
    assert last_of(tmp_path / "run")["step"] == int(stopped[1]) < 18

    again = torchrun(tmp_path / "run", photographs, *arguments)
    assert again.wait(PATIENCE) == 0, again.told.read_text()
    assert not difference(last_of(tmp_path / "run")["model"], last_of(tmp_path / "whole")["model"])
    assert not difference(log_of(tmp_path / "run"), log_of(tmp_path / "whole"))


def torchrun(folder, photographs, *arguments, slowly=False):
    """`torchrun --nproc-per-node=2 train.py`, in a process group of its own; slowly: half a second
    per step.
    """
    program = ROOT / "train.py"
    if slowly:
        program = folder.with_name("slow_train.py")
        program.write_text(
            f"import sys, time\nsys.path.insert(0, {str(ROOT)!r})\nimport train\n"
            "def slowly(run):\n"
            "    plain = run.batches.next\n"
            "    run.batches.next = lambda: time.sleep(0.5) or plain()\n"
            "sys.exit(train.main(prepared=slowly))\n"
        )
    told = folder.with_name(f"{folder.name}.txt")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(program),
    ]
    with told.open("w") as file:
        process = subprocess.Popen(
            [*command, *command_line(folder, *arguments, photographs=photographs)],
            stdout=file,
            stderr=file,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "STAGED": str(folder)},
        )
    process.told = told
    return process


def wait_for(process, pattern):
    deadline = time.monotonic() + PATIENCE
    while not re.search(pattern, process.told.read_text()):
        assert time.monotonic() < deadline and process.poll() is None, process.told.read_text()
        time.sleep(0.05)


# -------------------------------------------------------------------------------------- bad numbers


def everything_that_moves(folder):
    """Of last.pth: weights, teacher, center, batch norms, optimizer, and the step, on which
    schedules depend.
    """
    saved = last_of(folder)
    return {name: saved[name] for name in ("step", "model", "optimizer", "logged", "sums")}


@pytest.mark.parametrize(
    "processes,where,value,amp",
    [
        (1, "views", math.nan, "off"),
        (1, "gradient", math.inf, "off"),
        (1, "gradient", math.nan, "fp16"),
        (2, "loss", math.nan, "off"),
        slowly_tested(2, "views", math.nan, "off"),
        slowly_tested(2, "gradient", math.nan, "off"),
    ],
)
def test_a_step_with_bad_numbers_moves_nothing_on_any_process(
    processes, where, value, amp, photographs, tmp_path
):
    """Two bad batches, a signal in the second of them: what is saved is the state before them."""
    run, options = tmp_path / "run", dict(photographs=photographs, processes=processes)
    arguments, good = (
        ("--amp", amp),
        (4 if amp == "off" else 12),
    )  # fp16 begins with a scale that is too large
    play(run, *arguments, accident=AtStep(good, Signal("SIGTERM")), **options)
    before, saved_before = everything_that_moves(run), last_of(run)
    assert before["step"] >= 4 and saved_before["position"] == good

    bad = BadNumbers(1, count=2, rank=processes - 1, where=where, value=value)  # the last rank only
    runs = play(run, *arguments, accident=Several(bad, AtStep(2, Signal("SIGTERM"))), **options)
    assert all(one.process.exitcode == 0 for one in runs), runs[0].output
    saved = last_of(run)
    assert not difference(everything_that_moves(run), before)
    assert saved["position"] == good + 2 and saved["bad_steps"] == saved_before["bad_steps"] + 2
    if processes > 1:
        assert_equal_weights(runs)
    if amp == "fp16":
        assert saved["scaler"]["scale"] == saved_before["scaler"]["scale"] / 4

    # The schedules go on with the optimizer's steps, and the run has as many of them as without.
    play(run, *arguments, **options)
    lines = log_of(run)
    assert lines[-1]["step"] == 18 and lines[-1]["skipped_steps"] >= saved["bad_steps"]
    assert lines[-1]["epoch"] == round((18 + lines[-1]["skipped_steps"]) / STEPS_PER_EPOCH, 4)
    for line in lines:
        assert line["lr"] == learning_rate(line["step"] - 1, 18, STEPS_PER_EPOCH, 4 * 4 / 256)
        assert line["momentum_teacher"] == teacher_momentum(line["step"], 18, 0.99, 1.0)


@pytest.mark.parametrize("processes", [slowly_tested(1), 2])
def test_a_run_without_finite_numbers_stops_with_advice_and_its_last_good_checkpoint(
    processes, photographs, tmp_path
):
    run, arguments = tmp_path / "run", ("--max-bad-steps", "4")
    bad = BadNumbers(STEPS_PER_EPOCH + 2, count=99, rank=processes - 1)
    runs = play(run, *arguments, photographs=photographs, processes=processes, accident=bad)
    assert [one.process.exitcode for one in runs] == [1] * processes
    assert runs[0].complaints == [
        "train.py: 4 steps in a row had no finite loss and gradient; none of them changed the "
        "weights. "
        f"{run / 'last.pth'} is the checkpoint before them: continue it with a lower --base-lr and "
        "--force-resume"
    ]
    assert "Traceback" not in runs[0].output
    assert last_of(run)["step"] == STEPS_PER_EPOCH  # not the state that had led to bad numbers only
    again = play(
        run,
        *arguments,
        "--base-lr",
        "1",
        "--force-resume",
        photographs=photographs,
        processes=processes,
    )
    assert again[0].process.exitcode == 0 and last_of(run)["step"] == 18


def test_fewer_bad_steps_than_that_in_a_row_do_not_stop_it(photographs, tmp_path):
    bad = Several(BadNumbers(2, count=3), BadNumbers(6, count=3))
    [run] = play(tmp_path / "run", "--max-bad-steps", "4", photographs=photographs, accident=bad)
    assert run.process.exitcode == 0 and last_of(tmp_path / "run")["bad_steps"] == 6


def test_bad_numbers_from_the_start_say_that_there_is_no_checkpoint(photographs, tmp_path):
    arguments = "--max-bad-steps", "2", "--amp", "fp16"
    [run] = play(
        tmp_path / "run", *arguments, photographs=photographs, accident=BadNumbers(1, count=99)
    )
    assert run.process.exitcode == 1 and run.complaints[0].endswith(
        "there is no checkpoint yet: start again with --amp off, --amp bf16, or a lower --base-lr"
    )
    assert not (tmp_path / "run" / "last.pth").exists()


# --------------------------------------------------------------------------------------- bad images


def spoil(photographs, *names):
    for name in names:
        (photographs / name).write_bytes(b"no image")


def test_a_bad_image_is_named_once_and_the_run_goes_on(tmp_path):
    photographs = draw_photographs(tmp_path / "photographs")
    spoil(photographs, "003.png")
    arguments = "--max-bad-share", "0.1", "--workers", "1"
    runs = play(tmp_path / "run", *arguments, photographs=photographs, processes=2)
    assert [run.process.exitcode for run in runs] == [0, 0], runs[0].output
    assert (
        tmp_path / "run" / "skipped.txt"
    ).read_text() == "003.png\tnot an image that Pillow knows\n"


def test_too_many_bad_images_stop_all_processes(tmp_path):
    photographs = draw_photographs(tmp_path / "photographs")
    spoil(photographs, "003.png", "004.png", "005.png", "006.png")
    runs = play(tmp_path / "run", "--max-bad-share", "0.1", photographs=photographs, processes=2)
    assert [run.process.exitcode for run in runs] == [1, 1]
    expected = r"train.py: \d of 14 images could not be read, more than the share of 0.1 that is "
    expected += r"allowed.*/skipped.txt; .*"
    assert any(re.fullmatch(expected, run.complaints[0]) for run in runs), [
        run.output for run in runs
    ]
    assert all(len(run.complaints) == 1 and "Traceback" not in run.output for run in runs)
    assert (
        last_of(tmp_path / "run")["step"] == last_of(tmp_path / "run")["position"] < 18
    )  # that step was not made


@pytest.mark.parametrize("workers", [0, slowly_tested(1)])
def test_images_that_disappear_during_the_run_stop_it_with_a_line_and_a_checkpoint(
    workers, tmp_path
):
    photographs = draw_photographs(tmp_path / "photographs")
    away = AtStep(5, Disappear(photographs), rank=1)
    arguments = "--max-bad-share", "1", "--workers", str(workers)
    runs = play(tmp_path / "run", *arguments, photographs=photographs, processes=2, accident=away)
    assert [run.process.exitcode for run in runs] == [1, 1]
    reason = r"train.py: no more images: 14 images in a row could not be read; \d+.png: "
    reason += r"no such file or directory\. .*"
    assert any(re.fullmatch(reason, line) for run in runs for line in run.complaints), [
        run.output for run in runs
    ]
    assert all("Traceback" not in run.output for run in runs)
    stopped = last_of(tmp_path / "run")
    assert stopped["step"] == stopped["position"] >= 4
    draw_photographs(photographs)
    play(tmp_path / "run", *arguments, photographs=photographs, processes=2)
    play(tmp_path / "whole", *arguments, photographs=photographs, processes=2)
    assert not difference(last_of(tmp_path / "run")["model"], last_of(tmp_path / "whole")["model"])
    assert not difference(log_of(tmp_path / "run"), log_of(tmp_path / "whole"))


class Disappear:
    def __init__(self, folder):
        self.folder = folder

    def __call__(self):
        for file in self.folder.iterdir():
            file.unlink()
        self.folder.rmdir()


def test_check_data_reports_counts_sizes_and_the_bad_ones(tmp_path, capfd):
    photographs = draw_photographs(tmp_path / "photographs")
    spoil(photographs, "003.png", "008.png")
    assert train.main(command_line(tmp_path / "run", "--check-data", photographs=photographs)) == 1
    told, complaint = capfd.readouterr()
    assert "bad      003.png: not an image that Pillow knows\n" in told
    assert "sizes    12 different, from 37 x 40 to 37 x 53 (height x width); most often" in told
    assert "checked  14 images: 12 can be read, 2 cannot\n" in told
    assert complaint == (
        "train.py: 2 of 14 images cannot be read, more than --max-bad-share 0.01 allows: a run "
        "would "
        "stop\n"
    )
    few = command_line(
        tmp_path / "run", "--check-data", "--max-bad-share", "0.2", photographs=photographs
    )
    assert train.main(few) == 0
    assert not (tmp_path / "run").exists()


def test_toy_scenes_need_no_check(capsys):
    assert train.main(["--check-data"]) == 2
    assert "--check-data reads photographs" in capsys.readouterr().err


# ----------------------------------------------------------------------------------- lost processes


@pytest.mark.parametrize(
    "name,lost", [("SIGKILL", 1), slowly_tested("SIGKILL", 0), slowly_tested("SIGSTOP", 1)]
)
def test_when_a_process_is_lost_the_other_says_so_and_ends_and_a_rerun_resumes(
    name, lost, photographs, tmp_path
):
    """Killed, or silent for longer than the timeout."""
    run, arguments = tmp_path / "run", ("--timeout", "4" if name == "SIGSTOP" else "600")
    accident = AtStep(STEPS_PER_EPOCH + 2, Signal(name), rank=lost)
    runs = start(run, *arguments, photographs=photographs, processes=2, accident=accident)
    assert runs[1 - lost].wait() == 1
    runs[lost].process.kill()
    kept = STEPS_PER_EPOCH if lost == 0 else STEPS_PER_EPOCH + 1  # the surviving main process saves
    assert re.fullmatch(
        rf"train.py: process {1 - lost} has lost contact with another process \(.*\) "
        rf"\(trace: {run}/trace_{1 - lost}.txt\)\. "
        rf"{run / 'last.pth'} holds step {kept}, and the same command goes on from there",
        runs[1 - lost].complaints[0],
    )
    assert len(runs[1 - lost].complaints) == 1 and "Traceback" not in runs[1 - lost].output
    assert "RuntimeError" in (run / f"trace_{1 - lost}.txt").read_text()
    assert last_of(run)["step"] == kept
    if name == "SIGKILL" and lost:
        again = play(run, *arguments, photographs=photographs, processes=2)
        assert [one.process.exitcode for one in again] == [0, 0] and "resumed" in again[0].output


def test_a_mistake_of_ours_that_reads_like_a_lost_process_keeps_its_trace(photographs, tmp_path):
    """The words of an error decide what is said, so the trace must tell what it was."""
    run, accident = tmp_path / "run", AtStep(STEPS_PER_EPOCH + 2, mistaken, rank=0)
    runs = play(run, photographs=photographs, processes=2, accident=accident)
    assert runs[0].process.exitcode == 1 and len(runs[0].complaints) == 1
    file = run / "trace_0.txt"
    assert f"(trace: {file}). {run / 'last.pth'} holds step 4" in runs[0].complaints[0]
    trace = file.read_text()
    assert trace.startswith("Traceback") and "in mistaken" in trace
    assert "RuntimeError: these two layers do not connect" in trace.splitlines()[-1]


def mistaken():
    raise RuntimeError("these two layers do not connect: 12 and 7 channels")


@pytest.mark.slow
def test_a_process_that_never_comes_is_one_line_too(photographs, tmp_path):
    runs = start(
        tmp_path / "run",
        "--timeout",
        "2",
        photographs=photographs,
        processes=2,
        before=dead_on_arrival,
    )
    assert runs[0].wait() == 1
    assert "process 0 has lost contact with another process" in runs[0].complaints[0]
    assert "Traceback" not in runs[0].output


def dead_on_arrival(rank, argv):
    if rank == 1:
        os._exit(0)
    return argv


def test_a_reading_process_that_dies_is_one_line_and_what_was_learned_is_saved(
    photographs, tmp_path
):
    accident = AtStep(5, kill_a_child)
    [run] = play(tmp_path / "run", "--workers", "1", photographs=photographs, accident=accident)
    assert run.process.exitcode == 1 and len(run.complaints) == 1, run.output
    assert "Traceback" not in run.output
    assert (
        "a process that reads images has died, often for want of memory: try fewer --workers"
        in run.complaints[0]
    )
    step = last_of(tmp_path / "run")["step"]
    assert step >= 4  # not 3, where the epoch ended: batches that were read ahead are used up
    assert run.complaints[0].endswith(
        f"last.pth holds step {step}, and the same command goes on from there"
    )


def test_before_the_first_step_a_lost_run_does_not_say_that_it_can_go_on(photographs, tmp_path):
    [run] = play(tmp_path / "run", "--workers", "1", photographs=photographs, accident=kill_at_once)
    assert run.process.exitcode == 1
    if not (tmp_path / "run" / "last.pth").exists():
        assert "there is no checkpoint in" in run.complaints[0]
    assert "goes on" not in run.complaints[0] or (tmp_path / "run" / "last.pth").exists()


def kill_at_once(rank, run):
    run.batches.next()
    kill_a_child()


def test_a_reading_process_that_dies_with_a_lock_in_its_hand_does_not_stop_the_run_from_ending(
    photographs, tmp_path
):
    """PyTorch takes that lock when it ends the other readers, and would wait for it for ever."""
    accident = kill_while_it_holds_a_lock
    [run] = play(tmp_path / "run", "--workers", "2", photographs=photographs, accident=accident)
    assert run.process.exitcode == 1 and "has died" in run.complaints[0]


def kill_while_it_holds_a_lock(rank, run):
    run.batches.next()
    lock = run.batches.loader._iterator._workers_done_event._cond
    other = threading.Thread(target=lock.acquire)  # the lock belongs to the thread that takes it
    other.start()
    other.join()
    kill_a_child()


def test_a_lost_terminal_is_a_pause_with_its_own_status(photographs, tmp_path):
    accident = AtStep(5, Signal("SIGHUP"))
    [run] = play(tmp_path / "run", photographs=photographs, accident=accident)
    assert run.process.exitcode == 129 and last_of(tmp_path / "run")["step"] == 5


def test_the_error_of_a_step_keeps_its_trace_and_what_was_learned(photographs, tmp_path):
    """A mistake of ours in step 5: four steps are saved, as if the fifth had never begun."""
    [run] = play(tmp_path / "run", photographs=photographs, accident=broken_after_four)
    assert run.process.exitcode == 1 and "Traceback" in run.output
    assert last_of(tmp_path / "run")["step"] == 4
    play(tmp_path / "run", photographs=photographs)
    play(tmp_path / "whole", photographs=photographs)
    assert not difference(last_of(tmp_path / "run")["model"], last_of(tmp_path / "whole")["model"])


def broken_after_four(rank, run):
    compute, count = run.gradient.compute, []

    def broken(*batch):
        count.append(1)
        result = compute(*batch)
        if len(count) == 5:
            raise ArithmeticError("a mistake of ours")
        return result

    run.gradient.compute = broken


@pytest.mark.parametrize("minutes, kept", [("0", 3), ("0.000001", 4)])
def test_a_long_epoch_is_saved_by_the_clock(minutes, kept, photographs, tmp_path):
    accident = AtStep(5, Signal("SIGKILL"))
    arguments = "--save-minutes", minutes
    play(tmp_path / "run", *arguments, photographs=photographs, accident=accident)
    assert last_of(tmp_path / "run")["step"] == kept


def test_a_second_run_in_the_same_directory_is_refused_with_host_and_process(photographs, tmp_path):
    slow = AtStep(3, sleep_a_while)
    [first] = start(tmp_path / "run", photographs=photographs, accident=slow)
    first.wait_for("chance")
    waiting = tmp_path / "waiting"  # the second process's own place for what it says
    arguments = "--output-dir", str(tmp_path / "run")
    [second] = play(waiting, *arguments, photographs=photographs)
    assert second.process.exitcode == 2
    assert f"is in use by process {first.process.pid} on {socket.gethostname()}" in second.output
    assert first.wait() == 0 and last_of(tmp_path / "run")["step"] == 18
    assert not (tmp_path / "run" / "run.lock").exists()


def sleep_a_while():
    time.sleep(6)


def test_a_closed_and_a_full_output_cost_lines_and_not_the_run(photographs, tmp_path):
    for name, sink in (("closed", "| true"), ("full", "> /dev/full")):
        folder = tmp_path / name
        command = [sys.executable, "train.py", *command_line(folder, photographs=photographs)]
        line = f"{shlex.join(command)} 2>&1 {sink}"
        subprocess.run(["bash", "-c", line], cwd=ROOT, timeout=PATIENCE, check=False)
        deadline = time.monotonic() + PATIENCE
        while not (folder / "backbone.pth").exists() and time.monotonic() < deadline:
            time.sleep(0.1)  # `| true` ends before the run does
        assert last_of(folder)["step"] == 18, name


def kill_a_child():
    import multiprocessing

    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_process_killed_under_torchrun_ends_the_run_and_leaves_no_process_behind(
    photographs, tmp_path
):
    arguments = "--workers", "1", "--timeout", "60"
    process = torchrun(tmp_path / "run", photographs, *arguments, slowly=True)
    wait_for(process, r"step 4/18")
    os.kill(
        min(processes_of(tmp_path / "run", RANK="1")), signal.SIGKILL
    )  # not the reading one that it has started
    assert process.wait(PATIENCE) not in (0, None)
    assert "process 0 has lost contact with another process" in process.told.read_text()
    deadline = time.monotonic() + 60
    while left := processes_of(tmp_path / "run"):
        assert time.monotonic() < deadline, [
            Path(f"/proc/{pid}/cmdline").read_text() for pid in left
        ]
        time.sleep(0.2)
    again = torchrun(tmp_path / "run", photographs, *arguments)
    assert again.wait(PATIENCE) == 0 and "resumed" in again.told.read_text()


def processes_of(folder, **variables):
    """Living processes that were started for the run of this folder, whatever group they are in."""
    expected = {
        f"{name}={value}".encode() for name, value in dict(variables, STAGED=folder).items()
    }
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if expected <= set(
                (process / "environ").read_bytes().split(b"\0")
            ):  # empty for one that has ended
                found.append(int(process.name))
        except OSError:
            continue
    return found


# --------------------------------------------------------------------------------------- a long run


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's account of memory"
)
def test_two_thousand_steps_need_no_more_memory_and_files_than_two_hundred(photographs, tmp_path):
    """Main process and reading process; checkpoints, log lines and bad images included."""
    spoiled = draw_photographs(tmp_path / "photographs")
    spoil(spoiled, "003.png")
    arguments = ["--workers", "1", "--epochs", "700", "--max-steps", "2000", "--save-every", "20"]
    arguments += ["--max-bad-share", "0.1"]
    watch = Watch(tmp_path / "watch.jsonl")
    [run] = play(tmp_path / "run", *arguments, photographs=spoiled, accident=watch)
    assert run.process.exitcode == 0, run.output[-500:]
    seen = [json.loads(line) for line in (tmp_path / "watch.jsonl").read_text().splitlines()]
    early, late = seen[0], seen[-1]
    assert early["step"] == 200 and late["step"] == 2000 and early.keys() == late.keys()
    for name in early.keys() - {"step"}:
        grown = late[name] / early[name] - 1
        assert grown <= (0.02 if "memory" in name else 0), (
            f"{name}: {early[name]} -> {late[name]} (+{grown:.1%})"
        )


class Watch:
    """Writes down memory and open files of a process and of those that it has started, every 200
    steps.
    """

    def __init__(self, file):
        self.file = file

    def __call__(self, rank, run):
        for step in range(200, 2001, 200):
            AtStep(step, Look(self.file, step))(rank, run)


class Look:
    def __init__(self, file, step):
        self.file, self.step = file, step

    def __call__(self):
        import multiprocessing

        line = dict(step=self.step)
        for i, pid in enumerate(
            [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
        ):
            # Without files that are mapped, whose share depends on what else runs on the machine.
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            line[f"memory of process {i}, kB"] = int(
                re.search(r"^Anonymous: +(\d+)", rollup, re.M)[1]
            )
            line[f"files of process {i}"] = len(os.listdir(f"/proc/{pid}/fd"))
        with self.file.open("a") as file:
            file.write(json.dumps(line) + "\n")
