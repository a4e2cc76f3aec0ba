"""What a cluster, a disk and a person do to a run of train.py, and the same command once more.

The run that goes on must be, bit for bit, the run that nothing happened to.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest

import staged
from staged import ROOT, At, Signals, difference, last_of, log_of, play, state_of

pytestmark = pytest.mark.slow


class Fault(NamedTuple):
    accident: Callable  # when five steps are done
    statuses: tuple[int, ...]  # of the first process, and of the second one, where there is one
    held: tuple[int, ...]  # steps that last.pth may hold
    line: str  # what one of the processes prints
    arguments: tuple[str, ...] = ()
    rank: int | None = 1  # of the process that it strikes; None: all


SAVED, READER = ("--save-minutes", "0"), ("--workers", "1")  # saved after every step
STOPPED = r"stopped by ({}|a signal to another process) after step 6 of 18; .* the same command"
CTRL_C, DISK = staged.interrupt_as_a_terminal_does, staged.fill_the_disk
DIE, KILL, BAD = staged.die_in_the_next_save, staged.kill_a_reader, staged.raise_bad_input
FAULTS = {  # tests/test_run.py has the other signals
    "SIGTERM": Fault(Signals("SIGTERM"), (0, 0), (6,), STOPPED.format("SIGTERM")),
    "SIGINT": Fault(CTRL_C, (0, 130), (6,), STOPPED.format("SIGINT"), READER),
    # With --signal=USR1@120 srun sends it to every task
    "srun": Fault(Signals("SIGUSR1"), (0, 0), (6,), STOPPED.format("SIGUSR1"), rank=None),
    # Clusters repeat SIGTERM, and some send SIGINT before it
    "many": Fault(Signals("SIGINT", "SIGTERM", "SIGTERM", "SIGHUP"), (130,), (6,), "", rank=0),
    "SIGINT again": Fault(Signals("SIGINT", "SIGINT"), (1, 130), (5,), "", SAVED),
    "kill -9": Fault(Signals("SIGKILL"), (1, -9), (5,), "", SAVED),
    "kill -9 in a save": Fault(DIE, (-9, 1), (5,), "", SAVED, rank=0),
    "kill -9 in a save, alone": Fault(DIE, (-9,), (5,), "", SAVED, rank=0),
    "dead reader": Fault(KILL, (1, 1), (6, 7, 8, 9, 10), "that read images died", READER),
    "full disk": Fault(DISK, (1, 0), (5,), "step 6: File too large.* goes on", SAVED, rank=0),
    "full disk at the end": Fault(DISK, (1,), (0,), "18: File too large.* begin anew", rank=0),
    "mistake of ours": Fault(staged.raise_a_mistake, (1, 1), (5,), "ArithmeticError: a mistake"),
    "infinite gradient": Fault(staged.spoil_the_gradient, (1, 1), (5,), "no finite loss", SAVED),
    "error of one": Fault(BAD, (1, 2), (5,), "train.py: rank 1: the answer"),
}
# After which the other process says that it lost one
LOST = ("SIGINT again", "kill -9", "kill -9 in a save", "mistake of ours", "error of one")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Number of processes -> what a whole run leaves."""
    found, folder = {}, tmp_path_factory.mktemp("faults")
    for processes in (1, 2):
        statuses, outputs = play(folder / "run", processes=processes)
        assert statuses == [0] * processes, outputs
        found[processes] = state_of((folder / "run").rename(folder / str(processes)))
    return found


def complaints(output):
    return [line for line in output.splitlines() if line.startswith("train.py: ")]


@pytest.mark.parametrize("name", FAULTS)
def test_a_run_that_a_fault_stopped_goes_on_exactly(name, undisturbed, tmp_path):
    folder, fault = tmp_path / "run", FAULTS[name]
    processes = len(fault.statuses)
    given = dict(processes=processes, srun=name == "srun")
    accident = At(5, fault.accident, fault.rank)
    statuses, outputs = play(folder, *fault.arguments, accident=accident, **given)
    printed = "\n".join(outputs)
    assert statuses == list(fault.statuses), printed
    held = last_of(folder)["step"] if (folder / "last.pth").exists() else 0
    assert held in fault.held and re.search(fault.line, printed), printed
    assert all(len(complaints(output)) <= 1 for output in outputs), printed
    assert ("Traceback" in printed) == (name == "mistake of ours")
    assert ("another process is gone" in printed) == (name in LOST)

    statuses, outputs = play(folder, *fault.arguments, **given)
    assert statuses == [0] * processes, outputs
    assert (f"resumed  {folder}/last.pth after step {held}\n" in outputs[0]) == (held > 0)
    assert not difference(state_of(folder), undisturbed[processes])
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("elsewhere, line", [
    ("--output-dir", r"different states of .* \(batches: \[3, 0\]\): .* --output-dir"),
    ("--data-dir OTHERS", r"different images \(\[14, 13\], or other names\): .* --data-dir"),
    ("--temp-teacher 0.05", r"--temp-teacher with \[0.07, 0.05\]: every one needs the same"),
])  # fmt: skip
def test_processes_that_know_different_things_do_not_start(elsewhere, line, tmp_path):
    """As machines without a common disk, or with lines that were typed twice."""
    folder = tmp_path / "run"
    if "output" in elsewhere:
        play(folder, "--max-steps", "3")
        elsewhere = f"--output-dir {folder}-elsewhere"
    others = str(staged.draw_photographs(tmp_path / "others", 13))
    elsewhere = elsewhere.replace("OTHERS", others).split()
    statuses, outputs = play(folder, processes=2, elsewhere=elsewhere)
    assert statuses == [2, 2]
    assert all(re.search(line, complaints(output)[0]) for output in outputs)


def test_a_wait_for_a_process_that_never_starts_is_said_and_ends_at_once(tmp_path):
    place = {name: str(value) for name, value in staged.torchrun(2)[0].items()}
    command = [sys.executable, "train.py", *staged.command_line(tmp_path / "run")]
    options = dict(cwd=ROOT, env={**os.environ, **place}, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, **options) as process:
        guard = threading.Timer(staged.PATIENCE, process.kill)
        guard.start()  # the wait itself takes half an hour
        assert any("waits for all of 2 processes at 127" in line for line in process.stderr)
        guard.cancel()
        process.terminate()
        assert process.wait(staged.PATIENCE) == -signal.SIGTERM


def test_ctrl_c_under_torchrun_pauses_both_processes_and_the_run_goes_on(tmp_path):
    """torchrun passes the terminal's SIGINT on to all of its processes."""
    folder, text = tmp_path / "run", tmp_path / "output.txt"
    given = ("--log-every", "1", "--epochs", "40", "--workers", "1")
    program = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"]
    command = [sys.executable, *program, *staged.command_line(folder, *given)]
    options = dict(cwd=ROOT, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    with text.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, **options)
        deadline = time.monotonic() + staged.PATIENCE
        while "step 3/120" not in text.read_text():
            assert time.monotonic() < deadline and process.poll() is None, text.read_text()
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)
        process.wait(staged.PATIENCE)
    stopped = re.search(r"stopped by SIGINT after step (\d+) of 120", text.read_text())
    assert stopped and last_of(folder)["step"] == int(stopped[1]) < 120, text.read_text()
    end = int(stopped[1]) + 2
    assert play(folder, *given, "--max-steps", end, processes=2)[0] == [0, 0]
    assert [line["step"] for line in log_of(folder)] == list(range(1, end + 1))
