"""What all programs share at the shell: Ctrl-C while they load, a launcher they do not need, an
output that nobody reads.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from trained import save_checkpoint

import compare
import evaluate
import export
import visualize
from engine import processes
from engine.program import run_program

ROOT = Path(__file__).resolve().parent.parent
VERBS = ("train", "evaluate", "visualize", "compare", "transfer", "export")
ALONE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
PATIENCE = 60  # seconds, on a busy machine


@pytest.fixture
def trained(tmp_path):
    return str(save_checkpoint(tmp_path / "last.pth"))


# ----------------------------------------------------------------------------- Ctrl-C while loading


@pytest.mark.parametrize("rank", ["", "1"])
def test_ctrl_c_while_a_program_loads_is_one_line_and_status_130(rank, tmp_path):
    """torch is a stand-in that says that its loading has begun, and does not end."""
    (tmp_path / "torch.py").write_text(
        "import os, pathlib, time\n"
        "pathlib.Path(os.environ['LOADING']).touch()\n"
        "time.sleep(600)\n"
    )
    started = {}
    for verb in VERBS:
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "LOADING": str(tmp_path / verb)}
        if rank:
            environment["RANK"] = rank  # the terminal interrupts all, and rank 0 says it
        started[verb] = subprocess.Popen(
            [sys.executable, ROOT / f"{verb}.py", "--help"],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            # tests that a shell runs in the background hand on that Ctrl-C is ignored
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
    for verb, process in started.items():
        deadline = time.monotonic() + PATIENCE
        while not (tmp_path / verb).exists():
            assert time.monotonic() < deadline and process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=PATIENCE)
        assert said == ("", "" if rank else f"{verb}.py: interrupted\n")
        assert process.returncode == 130


def test_ctrl_c_later_is_said_once_for_all_processes(monkeypatch, capfd):
    def interrupted(argv):
        raise KeyboardInterrupt

    for rank, line in (("1", ""), ("0", "x.py: interrupted\n")):
        monkeypatch.setenv("RANK", rank)
        assert run_program("x.py", interrupted, []) == 130
        assert capfd.readouterr().err == line


# ---------------------------------------------------------------------------------- under torchrun


def test_a_program_of_one_process_works_in_the_first_of_a_launcher_and_the_others_end_well(
    trained, tmp_path, capfd, monkeypatch
):
    def ended(status):
        raise AssertionError(f"ended at once with status {status}")

    monkeypatch.setattr(os, "_exit", ended)

    def launched(rank):
        for name, value in zip(ALONE, (rank, rank, 2, 2)):
            monkeypatch.setenv(name, str(value))

    for verb, main in (
        ("evaluate", evaluate.main), ("visualize", visualize.main), ("export", export.main),
        ("compare", lambda argv: run_program("compare.py", compare.main, argv, alone=True)),
    ):  # fmt: skip
        launched(1)
        assert main(["nothing of this is read"]) == 0
        assert capfd.readouterr() == ("", "")
        launched(0)
        assert main(["--no-such-option"]) == 2
        first, second = capfd.readouterr().err.splitlines()
        assert first == (
            f"{verb}.py works in one process: the other 1 of the launcher have nothing to do"
        )
        assert second.startswith(f"{verb}.py: ")
    launched(0)
    file = tmp_path / "result.json"
    words = ["segmentation", trained, "--limit", "2", "--json", str(file)]
    assert evaluate.main(words) == 0 and json.loads(file.read_text())["images"] == 2
    assert processes.start("cpu", 60)[1:] == (0, 1)  # and nobody is waited for


def test_compare_is_started_as_a_program_of_one_process(tmp_path):
    """Its main is not the one that a shell starts, so the text is looked at."""
    assert 'run_program("compare.py", main, alone=True)' in Path(compare.__file__).read_text()


# ------------------------------------------------------------------------------- nobody reads it


class NobodyReads:
    """stdout as behind `| head -1`, once head has gone."""

    def __enter__(self):
        reader, writer = os.pipe()
        os.close(reader)
        self.stream, self.before = os.fdopen(writer, "w"), sys.stdout
        sys.stdout = self.stream
        return self

    def __exit__(self, *_):
        sys.stdout = self.before
        self.stream.close()  # as at the end of a program: what is left must not raise either


SLOW = pytest.param("compare", marks=pytest.mark.slow)


@pytest.mark.parametrize("verb", ["evaluate", "visualize", SLOW])
def test_a_program_whose_output_nobody_reads_still_does_its_work(verb, trained, tmp_path, capfd):
    folder = tmp_path / "out"
    with NobodyReads():
        if verb == "evaluate":
            words = ["segmentation", trained, "--limit", "2", "--json", str(folder / "r.json")]
            status, written = evaluate.main(words), ["r.json"]
        elif verb == "visualize":
            words = ["prototypes", trained, "--limit", "3", "--output", str(folder / "p.png")]
            status, written = visualize.main(words), ["p.png"]
        else:
            words = ["--only", "slotcon", "--steps", "1", "--scenes", "2"]
            words += ["--output-dir", str(folder)]
            status = run_program("compare.py", compare.main, words, alone=True)
            written = ["comparison.json", "comparison.png"]
    assert status == 0 and all((folder / name).stat().st_size for name in written)
    said = capfd.readouterr().err
    assert "Broken" not in said and "Traceback" not in said


def test_json_that_nobody_reads_is_no_trace_either(trained, capfd):
    with NobodyReads():
        assert evaluate.main(["segmentation", trained, "--limit", "2", "--json", "-"]) == 0
    assert "Broken" not in capfd.readouterr().err
