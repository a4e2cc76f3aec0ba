"""What a cluster, a disk and a person do to a run of train.py, and the same command once more.

One table: fault -> exit statuses, the step that last.pth holds, a line. Afterwards the run that
goes on must be, bit for bit, the run that nothing happened to.
"""

import os
import re
import signal
import subprocess
import sys
import time
from typing import NamedTuple

import pytest

from staged import (
    PATIENCE,
    ROOT,
    STEPS,
    At,
    BadNumbers,
    FullDisk,
    Several,
    Signals,
    Unmoved,
    close_output,
    command_line,
    die_in_the_next_save,
    difference,
    draw_photographs,
    kill_a_reader,
    last_of,
    log_of,
    play,
    raise_a_mistake,
    raise_what_a_person_can_change,
    start,
    state_of,
)

pytestmark = pytest.mark.slow


class Fault(NamedTuple):
    accident: object
    statuses: tuple  # of the first of two processes, and of the last one
    alone: int  # of one process
    held: int  # step of last.pth; one more where a step was under way
    line: str  # what one of the processes prints
    arguments: tuple = ()


SAVED = ("--save-minutes", "0")  # after every step
GONE = "another process is gone, and may say why"
# Where a fault strikes one process of several, it is the last one, unless it writes
FAULTS = {
    "SIGTERM": Fault(Signals("SIGTERM"), (0, 0), 0, 6, "stopped by (SIGTERM|a signal to another)"),
    "SIGUSR1": Fault(Signals("SIGUSR1"), (0, 0), 0, 6, "stopped by (SIGUSR1|a signal to another)"),
    "SIGHUP": Fault(Signals("SIGHUP"), (0, 0), 0, 6, "after step 6 of 18; .* the same command"),
    "SIGINT": Fault(Signals("SIGINT"), (0, 130), 130, 6, "after step 6 of 18"),
    "a second SIGINT": Fault(Signals("SIGINT", "SIGINT"), (1, 130), 130, 5, "", SAVED),
    "kill -9": Fault(Signals("SIGKILL"), (1, -9), -9, 5, "", SAVED),
    "kill -9 in the middle of a save": Fault(die_in_the_next_save, (-9, 1), -9, 5, "", SAVED),
    "a dead reader": Fault(
        kill_a_reader, (1, 1), 1, 6, "a process that reads images died", ("--workers", "2")
    ),
    "a full disk": Fault(FullDisk(), (1, 0), 1, 5, "after step 6: File too large.* goes on", SAVED),
    "a full disk at the end": Fault(
        FullDisk(), (1, 0), 1, 0, "after step 18: File too large.* same command again"
    ),
    "a closed output": Fault(close_output, (0, 0), 0, 18, ""),
    "a mistake of ours": Fault(raise_a_mistake, (1, 1), 1, 5, "ArithmeticError: a mistake"),
    "an error of one process": Fault(
        raise_what_a_person_can_change, (1, 2), 2, 5, r"train.py: (rank 1: )?the answer to all"
    ),
}
OF_THE_FIRST = ("kill -9 in", "a full disk", "a closed output")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return draw_photographs(tmp_path_factory.mktemp("faults") / "photographs")


@pytest.fixture(scope="module")
def undisturbed(photographs, tmp_path_factory):
    """Number of processes -> what a whole run leaves."""
    found, folder = {}, tmp_path_factory.mktemp("faults")
    for processes in (1, 2):
        runs = play(folder / str(processes), photographs=photographs, processes=processes)
        assert [run.process.exitcode for run in runs] == [0] * processes, runs[0].output
        found[processes] = state_of(folder / str(processes))
    return found


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", FAULTS)
def test_a_run_that_a_fault_stopped_goes_on_exactly(
    name, processes, undisturbed, photographs, tmp_path
):
    folder, fault = tmp_path / "run", FAULTS[name]
    given = dict(photographs=photographs, processes=processes)
    accident = At(5, fault.accident, rank=0 if name.startswith(OF_THE_FIRST) else processes - 1)
    runs = play(folder, *fault.arguments, accident=accident, **given)
    outputs = "\n".join(run.output for run in runs)
    statuses = [run.process.exitcode for run in runs]
    assert statuses == (list(fault.statuses) if processes == 2 else [fault.alone]), outputs
    held = last_of(folder)["step"] if (folder / "last.pth").exists() else 0
    assert held in ((5, 6, 7) if name == "a dead reader" else (fault.held,)), outputs
    assert re.search(fault.line, outputs)
    assert all(len(run.complaints) <= 1 for run in runs), outputs
    assert ("Traceback" in outputs) == (name == "a mistake of ours")
    if processes == 2 and 1 in statuses and statuses != [1, 1] and "full disk" not in name:
        assert GONE in runs[statuses.index(1)].complaints[0]

    again = play(folder, *fault.arguments, **given)
    assert [run.process.exitcode for run in again] == [0] * processes, again[0].output
    assert (f"resumed  {folder}/last.pth after step {held}\n" in again[0].output) == (held > 0)
    assert not difference(state_of(folder), undisturbed[processes])
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("where", ["views", "gradient", "loss"])
@pytest.mark.parametrize("processes", [1, 2])
def test_steps_without_finite_numbers_move_nothing_on_any_process(
    processes, where, photographs, tmp_path
):
    """Two bad batches of the last process, and then too many."""
    folder, last = tmp_path / "run", processes - 1
    given = dict(photographs=photographs, processes=processes)
    accident = Several(Unmoved(4, 6), BadNumbers((4, 5), where, rank=last))
    runs = play(folder, accident=accident, **given)
    assert [run.process.exitcode for run in runs] == [0] * processes, runs[0].output
    assert all("compared: nothing moved" in run.output for run in runs)
    saved, lines = last_of(folder), log_of(folder)
    assert (saved["step"], saved["position"], saved["bad_steps"]) == (STEPS, STEPS + 2, 2)
    assert {line["step"]: line["skipped_steps"] for line in lines} == {
        1: 0, 2: 0, 4: 0, **dict.fromkeys(range(6, 19, 2), 2)
    }  # fmt: skip
    if where == "views":
        runs = play(tmp_path / "bad", accident=BadNumbers(range(4, 99), where, last), **given)
        assert [run.process.exitcode for run in runs] == [1] * processes
        assert "20 steps in a row had no finite loss and gradient" in runs[0].complaints[0]
        assert "Traceback" not in runs[0].output


def test_processes_that_see_different_checkpoints_do_not_start(photographs, tmp_path):
    """As machines without a common disk: only the first one finds last.pth."""
    folder = tmp_path / "run"
    play(folder, "--max-steps", "3", photographs=photographs)
    runs = play(folder, photographs=photographs, processes=2, elsewhere=True)
    assert [run.process.exitcode for run in runs] == [2, 2]
    for run in runs:
        line = r"the processes found different states of .* \(batches done: \[3, 0\]\)"
        assert re.search(line, run.complaints[0])


def test_a_second_run_in_a_folder_is_refused_and_the_first_goes_on(photographs, tmp_path):
    folder = tmp_path / "run"
    [first] = start(folder, photographs=photographs, accident=At(3, sleep_a_while))
    first.wait_for("step 2/18")
    [second] = play(folder, photographs=photographs, output=tmp_path / "second.txt")
    assert second.process.exitcode == 2 and len(second.complaints) == 1
    assert f"is in use by process {first.process.pid} on " in second.complaints[0]
    assert first.wait() == 0 and last_of(folder)["step"] == STEPS


def sleep_a_while(run):
    time.sleep(4)


def test_ctrl_c_under_torchrun_pauses_both_processes_and_the_same_command_goes_on(
    photographs, tmp_path
):
    """torchrun passes the terminal's SIGINT on to all of its processes."""
    folder, text = tmp_path / "run", tmp_path / "output.txt"
    program = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *program, str(ROOT / "train.py")]
    command += command_line(folder, "--log-every", "1", "--epochs", "20", photographs=photographs)

    def started(file):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        given = dict(stdout=file, stderr=file, start_new_session=True, env=environment)
        return subprocess.Popen(command, **given)

    with text.open("w") as file:
        process, deadline = started(file), time.monotonic() + PATIENCE
        while "step 3/60" not in text.read_text():
            assert time.monotonic() < deadline and process.poll() is None, text.read_text()
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        process.wait(PATIENCE)
        stopped = re.search(r"stopped by SIGINT after step (\d+) of 60", text.read_text())
        assert stopped and last_of(folder)["step"] == int(stopped[1]) < 60, text.read_text()
        assert started(file).wait(PATIENCE) == 0
    assert last_of(folder)["step"] == 60
    assert [line["step"] for line in log_of(folder)] == list(range(1, 61))
