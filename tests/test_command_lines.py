"""What a program makes of its command line, of its place on a cluster, and of what goes wrong."""

import dataclasses
import inspect
import os
import signal
import subprocess
import sys
import threading
from functools import partial

import pytest
import torch

import recipes
import train
from data import TwoCrops
from engine import options, program
from engine.processes import Place
from engine.program import Stopped, run_program, task_of_slurm
from photometric import Photometric
from slotcon import SlotCon
from staged import ROOT

PUBLISHED = dict(
    arch="resnet50", image_size=224, dim_hidden=4096, dim_out=256, group_weight=0.5,
    temp_student=0.1, temp_teacher=0.07, temp_slot=0.2, momentum_center=0.9,
    momentum_teacher=(0.99, 1.0), batch_size=512, base_lr=1.0, weight_decay=1e-5, warmup=5,
    optimizer="lars", min_area=0.08, jitter=(0.4, 0.4, 0.2, 0.1, 0.8), p_gray=0.2,
    p_blur=(1.0, 0.1), solarize=(0.0, 0.2, 128), slot_loss="ctr", align="asgn", image_loss=False,
    geometric=True, accumulate=1, subset=0, steps=0,
)  # fmt: skip


@pytest.mark.parametrize("preset, num_prototypes, epochs, dataset", [
    ("coco-r50", 256, 800, "coco"),
    ("cocoplus-r50", 256, 800, "cocoplus"),
    ("imagenet-r50-100ep", 2048, 100, "imagenet"),
    ("imagenet-r50-200ep", 2048, 200, "imagenet"),
    ("bdd100k-r50", 256, 800, "bdd100k"),
])  # fmt: skip
def test_presets_are_the_published_recipes(preset, num_prototypes, epochs, dataset):
    c, given = recipes.parse(["--preset", preset, "--data-dir", "somewhere"])
    own = dict(preset=preset, num_prototypes=num_prototypes, epochs=epochs, dataset=dataset)
    expected = {**PUBLISHED, **own, "output_dir": f"runs/{preset}"}
    assert {name: getattr(c, name) for name in expected} == expected
    assert given == {"preset", "data_dir"}


def test_without_arguments_toy_scenes_are_learned():
    c, given = recipes.parse([])
    assert (c.preset, c.dataset, c.arch, given) == ("toy", "toy", "tiny", set())


@pytest.mark.parametrize("taker", [SlotCon, TwoCrops, Photometric])
def test_defaults_of_the_method_are_those_of_the_configuration(taker):
    for name, value in options.chosen_for(taker, recipes.Config()).items():
        assert inspect.signature(taker).parameters[name].default == value, name


@pytest.mark.parametrize("arguments, epochs, steps, warmup", [
    ("--preset coco-r50", 800, 0, 5),
    ("--preset coco-r50 --steps 4000", 800, 4000, 25),  # the share of 5 in 800
    ("--preset coco-r50 --steps 4000 --warmup 9", 800, 4000, 9),
    ("--preset photos --epochs 30", 30, 0, 0.8),  # of 80 in 3000
    ("--preset photos --steps 300", 800, 300, 80),
])  # fmt: skip
def test_the_warm_up_keeps_its_share_in_the_other_unit(arguments, epochs, steps, warmup):
    c, _ = recipes.parse([*arguments.split(), "--data-dir", "x"])
    assert (c.epochs, c.steps, c.warmup) == (epochs, steps, pytest.approx(warmup))


def test_a_length_in_another_unit_is_named_and_not_what_it_moves():
    then, now = (recipes.parse(words.split())[0] for words in ("--epochs 2", "--steps 100"))
    changed = options.differences(now, dataclasses.asdict(then))
    assert changed == ["steps: not given then, 100 now"]


ROWS = {  # some rows of the tables, and what they change of the published recipe
    ("6a", "128"): dict(num_prototypes=128),
    ("6b", "1.0"): dict(group_weight=1),
    ("6c", "0.04"): dict(temp_teacher=0.04),
    ("8a", "1024"): dict(batch_size=1024),
    ("8b", "Reg."): dict(slot_loss="reg"),
    ("8c", "Proj."): dict(align="proj"),
    ("8d", "1024, with"): dict(batch_size=1024, image_loss=True),
    ("8e", "without"): dict(geometric=False),
    ("collapse", "no moving average"): dict(group_weight=1, momentum_teacher=(0, 0)),
}


def test_the_rows_of_the_tables_change_what_the_slide_says_and_run_on_toy_scenes_too():
    found = {}
    for name, (_, rows) in recipes.TABLES.items():
        assert sum(row.default for row in rows) == 1
        for row in rows:
            recipes.parse(list(row.toy))
            c, _ = recipes.parse(["--preset", "coco-r50", "--data-dir", "COCO", *row.options])
            changed = {k: v for k, v in vars(c).items() if v != getattr(recipes.COCO, k)}
            found[name, row.label] = {k: v for k, v in changed.items() if not k.endswith("_dir")}
            assert name == "collapse" or row.default == (not found[name, row.label])
    assert {key: found[key] for key in ROWS} == ROWS


WRONG = {  # program -> a command line that is wrong, and how it is answered
    "train": (".", "unrecognized argument .: did you mean --data-dir .?"),
    "evaluate": ("probe x.pth --batchsize 3", "did you mean --batch-size?"),
    "visualize": ("groups x.pth --slot 3", "did you mean --slots?"),
    "compare": ("--step 9", "did you mean --steps?"),
    "transfer": ("segmentation --crops 9", "did you mean --crop?"),
    "export": ("x.pth --outputs y.pth", "are required: --output"),
}


@pytest.mark.parametrize("program", WRONG)
def test_a_program_answers_a_wrong_command_line_before_it_loads_torch(program, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch is loaded')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "100"}

    def run(words):
        command = [sys.executable, str(ROOT / f"{program}.py"), *words.split()]
        # A test that runs in the background ignores Ctrl-C
        heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        how = dict(env=environment, capture_output=True, text=True, timeout=60)
        return subprocess.run(command, preexec_fn=heard, **how)

    words, answer = WRONG[program]
    done = run(words)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"{program}.py: ") and answer in done.stderr
    done = run("probe --help" if program == "evaluate" else "--help")
    assert done.returncode == 0 and f"{program}.py" in done.stdout
    bare = [sys.executable, "-S", str(ROOT / f"{program}.py")]  # without what is installed
    alone = subprocess.run(bare, capture_output=True, text=True)
    assert alone.returncode == 2 and alone.stderr.count("\n") == 1
    assert alone.stderr.startswith(f"{program}.py: this Python has no torch: install as README")
    if program == "train":
        fields = dataclasses.fields(recipes.Config)
        assert len(fields) <= 50 and done.stdout.count("\n") <= 120
        assert all(options.flag(f.name) in done.stdout for f in fields)
        assert "[P]" in done.stdout and "torchrun --nproc-per-node=8 train.py" in done.stdout
        assert "torch is loaded" in run("").stderr  # so the stand-in is a real one
        for number in (signal.SIGINT, signal.SIGTERM):
            (tmp_path / "torch.py").write_text(f"import os; os.kill(os.getpid(), {int(number)})")
            assert (run("").returncode, run("").stderr) == (130, "train.py: interrupted\n")


@pytest.mark.parametrize("given, workers", [("", -1), ("--workers 1", 1)])
def test_on_a_gpu_only_a_given_number_of_readers_is_taken(given, workers, monkeypatch):
    """Without a GPU: the run is stopped where its images would be opened."""
    monkeypatch.setattr(train, "images_of", lambda c, strict: sys.exit(f"{c.workers} readers"))
    monkeypatch.setattr(train.processes, "start", lambda *_: Place(torch.device("cuda")))
    with pytest.raises(SystemExit, match=f"^{workers} readers"):
        train.main(given.split())


@pytest.mark.parametrize("loaded, rank, lines", [(0, 0, 1), (0, 1, 0), (1, 0, 0)])
def test_a_slow_load_of_torch_is_one_line_of_one_process(loaded, rank, lines, monkeypatch, capfd):
    event = threading.Event()
    monkeypatch.setattr(program, "LOADED", event)
    monkeypatch.setattr(program, "PATIENCE", 0)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(threading.Thread, "start", threading.Thread.run)
    if loaded:
        run_program("x.py", lambda argv: 0, [])
    program.run_early("x.py", lambda argv: None)
    assert capfd.readouterr().err.count("x.py: loads PyTorch") == lines


STEP = dict(JOB_ID=1234567, STEP_ID=2, NTASKS=8, PROCID=5, LOCALID=1, JOB_NODELIST="gpu[07-08],x")
SRUN = {f"SLURM_{name}": str(value) for name, value in STEP.items()}
TASK = dict(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", MASTER_ADDR="gpu07", MASTER_PORT="24569")


@pytest.mark.parametrize("changed, expected", [
    ({}, TASK),
    (dict(SLURM_STEP_NODELIST="r[2-3]-n[04,5],z"), {**TASK, "MASTER_ADDR": "r2-n04"}),
    (dict(SLURM_STEP_NODELIST="z,gpu[1-2]"), {**TASK, "MASTER_ADDR": "z"}),
    (dict(SLURM_STEP_NUM_TASKS="4"), {**TASK, "WORLD_SIZE": "4"}),
    (dict(MASTER_PORT="1"), {**TASK, "MASTER_PORT": "1"}),
    (dict(CUDA_VISIBLE_DEVICES="3"), {**TASK, "LOCAL_RANK": "0"}),  # --gpus-per-task=1
    (dict(CUDA_VISIBLE_DEVICES="2,3"), TASK),
    (dict(RANK="0", WORLD_SIZE="2"), {}),  # srun torchrun
    (dict(WORLD_SIZE="1"), {}),  # a process that wants to be alone
    (dict(SLURM_STEP_NUM_TASKS="1"), {}),
    (dict(SLURM_STEP_ID="4294967290", SLURM_PROCID="0"), {}),  # the shell of salloc
    (dict(SLURM_STEP_ID=None, SLURM_PROCID="0"), {}),  # the script of sbatch
    (dict.fromkeys(SRUN), {}),
])  # fmt: skip
def test_a_task_of_srun_knows_its_rank_and_where_to_meet_and_a_shell_is_no_task(changed, expected):
    assert task_of_slurm({k: v for k, v in {**SRUN, **changed}.items() if v}) == expected


@pytest.mark.parametrize("error, status, line", [
    (ValueError("--k 1 is too small"), 2, "--k 1 is too small"),
    (FileNotFoundError(2, "No such file", "x"), 2, "[Errno 2] No such file: 'x'"),
    (Stopped("the disk is full"), 1, "the disk is full"),
    (KeyboardInterrupt(), 130, "interrupted"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried\n2"), 2, "take a smaller --batch-size"),
    (RuntimeError("gloo: connection closed by peer"), RuntimeError, ""),  # in one process
    (KeyError("x"), KeyError, ""),  # a mistake of ours keeps its trace
])  # fmt: skip
def test_what_goes_wrong_is_one_line_and_a_status(error, status, line, capfd):
    def main(argv):
        raise error

    if isinstance(status, int):
        assert run_program("x.py", main, []) == status
        out, err = capfd.readouterr()
        assert out == "" and err.startswith("x.py: ") and line in err and err.count("\n") == 1
        assert sys.stdout.line_buffering  # a pipe has each line at once, too
    else:
        with pytest.raises(status):
            run_program("x.py", main, [])
