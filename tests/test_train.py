"""train.py and recipes.py: command lines, and small whole runs on the CPU."""

import dataclasses
import inspect
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from functools import partial

import pytest
import torch
from PIL import Image

import recipes
import staged
import toy
import train
from data import TwoCrops
from engine import options, program
from engine.batches import Samples, order_of
from engine.optimizers import LARS, Schedule
from engine.processes import Place
from engine.program import Stopped, run_program, task_of_slurm
from engine.run import seed_of
from measures import networks
from measures.datasets import UNSEEN
from measures.groups import compare_in_memory
from photometric import Photometric
from slotcon import SlotCon
from staged import ROOT, STEPS, At, Signals, difference, last_of, log_of, state_of, train_here
from teacher import teacher_momentum


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A run of five steps, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "short"
    arguments = ("--max-steps", "5", "--log-every", "1")
    return folder, train_here(folder, *arguments)


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


def test_without_arguments_toy_scenes_are_learned_and_every_preset_parses():
    c, given = recipes.parse([])
    assert (c.preset, c.dataset, c.arch, given) == ("toy", "toy", "tiny", set())
    for name in recipes.PRESETS.keys() - {"toy"}:
        c, _ = recipes.parse(["--preset", name, "--data-dir", "x"])
        assert (c.preset, c.data_dir, c.output_dir) == (name, "x", f"runs/{name}")


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


REFUSED = [  # arguments behind those of a small run, what the line must say
    ("--epochs 3 --steps 9", "--epochs and --steps are two units of one length: give one of them"),
    ("--long-tailed", "--long-tailed says how a subset is chosen: add --subset N"),
    ("--batch-size 16", "must be a multiple of 1 process(es) x --accumulate 1, and at most"),
    ("--preset toy --dataset toy", "draws its own scenes: add a preset for photographs, such as"),
    ("--data-dir=", "needs --data-dir, the folder with the images"),
    ("--preset toy --dataset toy --data-dir= --check-data", "--check-data has nothing to read"),
    ("--preset toy --dataset toy --data-dir= --subset 3", "is at least --batch-size 4"),
    ("--data-dir empty", "no images in "),
    ("--init nothing.pth", "there is no checkpoint nothing.pth"),
    ("--data-dir photos --output-dir photos", "--output-dir photos holds the images"),
    ("--output-dir photos/000.png", "photos/000.png cannot be used: it is a file"),
]


@pytest.mark.parametrize("arguments, line", REFUSED)
def test_what_cannot_be_is_one_line_and_writes_nothing(arguments, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    staged.draw_photographs(tmp_path / "photos")
    before = sorted(tmp_path.rglob("*"))
    text = train_here("out", *arguments.split(), status=2)
    assert text.startswith("train.py: ") and line in text and text.count("\n") == 1, text
    assert sorted(tmp_path.rglob("*")) == before


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
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}

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
    if program == "train":
        for f in dataclasses.fields(recipes.Config):
            assert options.flag(f.name) in done.stdout
        assert "[P]" in done.stdout and "torchrun --nproc-per-node=8 train.py" in done.stdout
        assert "torch is loaded" in run("").stderr  # so the stand-in is a real one
        (tmp_path / "torch.py").write_text("import os; os.kill(os.getpid(), 2)  # Ctrl-C")
        assert (run("").returncode, run("").stderr) == (130, "train.py: interrupted\n")


CHANGES = {
    "num_prototypes: 5 then, 6 now": "--num-prototypes 6",
    "epochs: 6.0 then, 7.0 now; warmup: 1.0 then, 2.0 now": "--epochs 7 --warmup 2",
    "p_blur: (1.0, 0.1) then, (1.0, 0.2) now": "--p-blur 1 0.2",
    "images: 14 then, 13 now": "--data-dir fewer",
    "images: as many then (14), but with other names": "--data-dir others",
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_matters_cannot_change_within_a_run(change, short, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    staged.draw_photographs(tmp_path / "fewer", 13)
    others = staged.draw_photographs(tmp_path / "others")
    (others / "000.png").rename(others / "new.png")
    before = state_of(short[0])
    text = train_here(short[0], *CHANGES[change].split(), status=2)
    assert text == (
        f"train.py: {short[0]}/last.pth was made with other options or images ({change}): "
        "--resume force goes on all the same, --resume none starts over in this folder, "
        "and another --output-dir keeps both\n"
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
    wrong = ("--num-prototypes", "6", "--resume", "force")
    text = train_here(folder, *given, *wrong, status=2)
    assert "lacks: 3, such as center (6,); that it has too many: 3, such as center (5,)" in text


def test_a_run_neither_goes_on_from_a_damaged_file_nor_overwrites_it(short, tmp_path):
    shutil.copytree(short[0], folder := tmp_path / "run")
    last = folder / "last.pth"
    last.write_bytes(last.read_bytes()[:-1000])
    text = train_here(folder, status=2)
    assert f"{last} is no checkpoint, or damaged" in text and text.count("\n") == 1
    text = train_here(folder, "--resume", folder / "gone", status=2)
    assert f"there is no checkpoint {folder}/gone" in text and text.count("\n") == 1
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
    text = train_here(tmp_path / "a", *given, "--init", short[0])
    count = len(last_of(short[0])["model"])
    assert f"start    {short[0]}: {count} of {count} tensors used, the others are random" in text
    assert log_of(tmp_path / "a")[0]["loss"] != log_of(short[0])[0]["loss"]
    resume = ("--resume", short[0] / "last.pth", "--max-steps", "7")
    assert "after step 5" in train_here(tmp_path / "b", *resume)
    assert last_of(tmp_path / "b")["step"] == 7


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
    for words in (f"left out {min(out)}", "2 photographs kept out of training", "are occupied",
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


def test_a_few_bad_images_are_replaced_and_named_and_more_than_one_percent_stop_the_run(tmp_path):
    photographs = staged.draw_photographs(tmp_path / "photographs", count=120)
    (photographs / "003.png").write_bytes(b"no image")
    given, folder = ("--epochs", "1", "--warmup", "0"), tmp_path / "run"
    text = train_here(folder, *given, photographs=photographs)
    assert text.count("003.png: not an image that Pillow knows: its neighbor takes its place") == 1
    assert f"skipped  1 images since the run began could not be read: {folder}" in text
    assert (folder / "skipped.txt").read_text() == "003.png\tnot an image that Pillow knows\n"
    check = train_here(tmp_path / "no", "--check-data", photographs=photographs)
    assert "bad      003.png: not an image that Pillow knows\n" in check
    assert "checked  120 images: 119 can be read, 1 cannot" in check

    (photographs / "004.png").write_bytes(b"no image")
    train_here(tmp_path / "no", "--check-data", photographs=photographs, status=1)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="without torchrun"):
        patch.setenv("WORLD_SIZE", "2")
        recipes.parse(["--preset", "photos", "--data-dir", str(photographs), "--check-data"])
    assert not (tmp_path / "no").exists()
    field = recipes.Config.__dataclass_fields__["check_data"]
    assert "status 1 where a run would stop" in field.metadata["help"]
    text = train_here(folder, *given, "--resume", "none", photographs=photographs, status=1)
    line = f"2 of 120 images could not be read, more than 1%; they are named in {folder}/skipped"
    assert line in text.splitlines()[-1] and "Traceback" not in text
    held = last_of(folder)
    assert held["step"] == held["position"] < 30  # and the batch with the second one is met again


def test_doubts_are_said(tmp_path):
    given = ("--accumulate", "4", "--max-steps", "1", "--min-area", "0.9", "--warmup", "6")
    text = train_here(tmp_path / "run", *given)
    assert "warning  one image per pass" in text
    assert "warning  the warm-up is as long as the run: lower --warmup" in text


@pytest.mark.parametrize("given, workers", [("", -1), ("--workers 1", 1)])
def test_on_a_gpu_only_a_given_number_of_readers_is_taken(given, workers, monkeypatch):
    """Without a GPU: the run is stopped where its images would be opened."""
    monkeypatch.setattr(train, "images_of", lambda c, strict: sys.exit(f"{c.workers} readers"))
    monkeypatch.setattr(train.processes, "start", lambda *_: Place(torch.device("cuda")))
    with pytest.raises(SystemExit, match=f"^{workers} readers"):
        train.main(given.split())


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


@pytest.mark.parametrize("loaded, rank, lines", [(0, 0, 1), (0, 1, 0), (1, 0, 0)])
def test_a_line_of_one_process_says_that_torch_is_loaded_slowly(
    loaded, rank, lines, monkeypatch, capfd
):
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
