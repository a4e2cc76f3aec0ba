"""train.py: the command line, and small whole runs on the CPU.

Promised: published presets; one clear line and exit status 2 for every command line that cannot be,
with nothing written; a loop that takes the steps of the paper in the order of the released code;
the same numbers from the same seed whatever prepares the images; a log, a configuration and weights
that other programs can read. Interrupted and continued runs: test_resume.py. Several processes:
test_processes.py, and slowly here.
"""

import contextlib
import dataclasses
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision

import data
import photometric
import recipes
import staged
import train
from engine import checkpoint, loader, options, weights
from engine.lars import LARS, make_optimizer
from engine.progress import seed_of
from engine.schedule import learning_rate
from teacher import teacher_momentum

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return staged.draw_photographs(tmp_path_factory.mktemp("data") / "photographs")


def run(folder, photographs, *arguments):
    """A small run in this process; returns what it has said."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert train.main(staged.command_line(folder, *arguments, photographs=photographs)) == 0
    return said.getvalue()


@pytest.fixture(scope="module")
def short(photographs, tmp_path_factory):
    """A run of five steps, and what it said."""
    folder = tmp_path_factory.mktemp("runs") / "short"
    return folder, run(folder, photographs, "--max-steps", "5", "--log-every", "1")


# ------------------------------------------------------------------------------------- command line


PUBLISHED = dict(  # of every preset but toy
    arch="resnet50",
    image_size=224,
    dim_hidden=4096,
    dim_out=256,
    group_weight=0.5,
    temp_student=0.1,
    temp_teacher=0.07,
    temp_slot=0.2,
    momentum_center=0.9,
    momentum_teacher=0.99,
    momentum_teacher_end=1.0,
    batch_size=512,
    base_lr=1.0,
    weight_decay=1e-5,
    warmup_epochs=5,
    optimizer="lars",
    min_area=0.08,
    min_overlap=0.01,
    brightness=0.4,
    contrast=0.4,
    saturation=0.2,
    hue=0.1,
    p_jitter=0.8,
    p_gray=0.2,
    p_blur=(1.0, 0.1),
    p_solarize=(0.0, 0.2),
    solarize_threshold=128,
    slot_loss="ctr",
    align="asgn",
    image_loss=False,
    geometric=True,
)


@pytest.mark.parametrize(
    "preset, num_prototypes, epochs, dataset",
    [
        ("coco-r50", 256, 800, "coco"),
        ("cocoplus-r50", 256, 800, "cocoplus"),
        ("imagenet-r50-100ep", 2048, 100, "imagenet"),
        ("imagenet-r50-200ep", 2048, 200, "imagenet"),
        ("bdd100k-r50", 256, 800, "bdd100k"),
    ],
)
def test_presets_are_the_published_recipes(preset, num_prototypes, epochs, dataset):
    c, given = recipes.parse(["--preset", preset, "--data-dir", "somewhere"], "")
    expected = dict(
        PUBLISHED, preset=preset, num_prototypes=num_prototypes, epochs=epochs, dataset=dataset
    )
    assert {name: getattr(c, name) for name in expected} == expected
    assert given == {"preset", "data_dir"} and c.output_dir == f"runs/{preset}"


def test_without_arguments_toy_scenes_are_learned():
    c, given = recipes.parse([], "")
    assert (c.preset, c.dataset, c.arch, c.data_dir, c.output_dir) == (
        "toy",
        "toy",
        "tiny",
        "",
        "runs/toy",
    )
    assert given == set()


def test_every_preset_is_within_its_own_ranges():
    for name, c in recipes.PRESETS.items():
        assert c.preset == name
        options.check_ranges(c)


def test_the_help_names_every_option_and_where_its_value_comes_from(capsys):
    with pytest.raises(SystemExit) as end:
        train.main(["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0
    for f in dataclasses.fields(recipes.Config):
        assert f"--{f.name.replace('_', '-')}" in text
    assert "torchrun" in text and "[P]" in text and "[O]" in text


ABSURD = [
    ("--batch-size", "0"),
    ("--batch-size", "1"),
    ("--batch-size", "-4"),
    ("--batch-size", "four"),
    ("--epochs", "0"),
    ("--epochs", "-1"),
    ("--epochs", "1e3"),
    ("--image-size", "31"),
    ("--image-size", "100000"),
    ("--num-prototypes", "1"),
    ("--dim-hidden", "0"),
    ("--dim-out", "-7"),
    ("--dim-hidden", "1000000"),
    ("--group-weight", "1.5"),
    ("--temp-student", "0"),
    ("--temp-teacher", "-0.07"),
    ("--temp-slot", "nan"),
    ("--temp-pool", "nan"),
    ("--momentum-teacher", "1.01"),
    ("--momentum-center", "nan"),
    ("--base-lr", "-1"),
    ("--base-lr", "inf"),
    ("--weight-decay", "nan"),
    ("--warmup-epochs", "-5"),
    ("--hue", "0.6"),
    ("--min-area", "0"),
    ("--p-blur", "0.5", "2"),
    ("--solarize-threshold", "300"),
    ("--accumulate", "0"),
    ("--workers", "-2"),
    ("--seed", "-1"),
    ("--max-steps", "-1"),
    ("--log-every", "0"),
    ("--timeout", "0"),
    ("--max-bad-share", "nan"),
]
IMPOSSIBLE = [  # further arguments, what the line must say
    (("--preset", "coco-r51"), "coco-r51"),
    (("--arch", "resnet19"), "resnet19"),
    (("--amp", "fp8"), "fp8"),
    (("--slot-loss", "none"), "none"),
    (("--optimizer", "adam"), "adam"),
    (("--dataset", "voc"), "voc"),
    (("--learning-rate", "1"), "unrecognized arguments: --learning-rate 1"),
    (("--batch", "4"), "unrecognized arguments: --batch 4"),
    (("--batch-size", "16"), "--batch-size 16 is larger than the data set of 14 images"),
    (
        ("--accumulate", "3"),
        "--batch-size 4 must be divisible by 1 process(es) x --accumulate 3: take 3",
    ),
    (("--preset", "toy", "--dataset", "toy"), "draws its own scenes: add a preset for photographs"),
    (("--data-dir", "nowhere"), "no such folder or file"),
    (("--data-dir", "empty"), "no images in"),
    (("--data-dir", "texts"), "is a readable image"),
    (("--data-dir", "list.txt"), "is a readable image"),
    (("--data-dir", ""), "needs --data-dir"),
    (("--dataset", "coco"), "train2017"),
    (("--dataset", "imagenet"), "expected"),
    (("--resume", "nothing.pth"), "no checkpoint at nothing.pth"),
    (("--device", "cuda"), "--device cpu"),
    (("--device", "mps"), "--device auto"),
]


@pytest.mark.parametrize(
    "arguments, says", [*((a, a[0]) for a in ABSURD), *IMPOSSIBLE], ids=" ".join
)
def test_what_cannot_be_is_one_line_with_status_2_and_nothing_is_written(
    arguments, says, photographs, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.jpg").write_text("no image")
    (tmp_path / "list.txt").write_text("gone.jpg\n")
    before = sorted(tmp_path.rglob("*"))
    assert (
        train.main(staged.command_line(tmp_path / "out", *arguments, photographs=photographs)) == 2
    )
    out, err = capfd.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1 and err.startswith("train.py: ") and says in err
    assert sorted(tmp_path.rglob("*")) == before


CPU_FULL = RuntimeError(
    "[enforce fail at alloc.cpp:1] . DefaultCPUAllocator: can't allocate memory: you tried to "
    "allocate 4000000 bytes. Error code 12"
)
GPU_FULL = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of\nmuch"
)


@pytest.mark.parametrize("error, says", [(CPU_FULL, "4000000 bytes"), (GPU_FULL, "2.50 GiB")])
def test_a_full_memory_is_one_line_with_what_to_do(error, says, photographs, tmp_path, capsys):
    def full(_run):
        raise error

    assert train.main(staged.command_line(tmp_path / "out", photographs=photographs), full) == 2
    err = capsys.readouterr().err
    assert err.startswith(
        f"train.py: out of memory ({says} more were wanted): take a smaller --batch-size"
    )
    assert len(err.splitlines()) == 1 and not (tmp_path / "out" / "last.pth").exists()


def test_other_errors_of_the_program_are_not_hidden(photographs, tmp_path):
    with pytest.raises(RuntimeError):
        train.main(
            staged.command_line(tmp_path / "out", photographs=photographs),
            lambda _run: torch.ones(2) @ torch.ones(3),
        )


def test_a_real_process_says_one_line_too_and_ends_with_status_2(photographs, tmp_path):
    """The whole program, imports included."""
    arguments = staged.command_line(
        "out", "--data-dir", str(tmp_path / "nowhere"), photographs=photographs
    )
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        cwd=tmp_path,
        text=True,
        timeout=180,
        capture_output=True,
    )
    assert done.returncode == 2 and done.stdout == "", done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"train.py: no such folder or file: {tmp_path / 'nowhere'}")
    assert list(tmp_path.iterdir()) == []


def test_a_batch_that_two_processes_cannot_share_ends_both_and_the_first_says_why(
    photographs, tmp_path
):
    first, second = staged.play(
        tmp_path / "out", "--batch-size", "5", photographs=photographs, processes=2
    )
    says = "train.py: --batch-size 5 must be divisible by 2 process(es) x --accumulate 1: take 4"
    assert (first.wait(), first.complaints) == (2, [says])
    # Without torchrun the first process keeps the meeting place: the second may find it gone before
    # it has counted, and only then it has something of its own to say.
    second.wait()
    assert second.complaints == [] or "has lost contact" in second.complaints[0]
    assert not (tmp_path / "out" / "last.pth").exists()


# ---------------------------------------------------------------------------------- small decisions


def config(**settings):
    return dataclasses.replace(recipes.COCO, **settings)


@pytest.mark.parametrize(
    "settings, world_size, images, says",
    [
        (dict(batch_size=9), 2, 99, "divisible by 2 process(es) x --accumulate 1: take 8"),
        (
            dict(batch_size=4, accumulate=2),
            4,
            99,
            "divisible by 4 process(es) x --accumulate 2: take 8",
        ),
        (dict(batch_size=8), 2, 7, "larger than the data set of 7 images: take at most 6"),
        (dict(batch_size=16, accumulate=16), 1, 8, "of 8 images: take more images or a lower"),
        (dict(batch_size=2, image_size=32), 2, 99, "batch norm needs two"),
    ],
)
def test_a_batch_must_fit_processes_images_and_batch_norm(settings, world_size, images, says):
    with pytest.raises(ValueError) as error:
        recipes.check_batch(config(**settings), world_size, images)
    assert says in str(error.value)


@pytest.mark.parametrize(
    "settings, world_size, images",
    [
        (dict(batch_size=8), 2, 8),
        (dict(batch_size=8, accumulate=4), 2, 8),
        (dict(batch_size=2, image_size=33), 2, 9),
        (dict(batch_size=2, image_size=32, arch="tiny"), 2, 9),
        (dict(batch_size=2, image_size=32, arch="small"), 2, 9),
    ],
)
def test_a_batch_that_fits_is_let_through(settings, world_size, images):
    recipes.check_batch(config(**settings), world_size, images)


def test_the_learning_rate_rises_from_a_hundredth_and_falls_along_a_cosine():
    rate = lambda t: learning_rate(t, total_steps=110, warmup_steps=10, peak=2.0)
    assert rate(0) == 0.02 and rate(5) == pytest.approx(0.02 * 50.5)
    assert rate(10) == 2.0 and rate(60) == pytest.approx(1e-6 + (2 - 1e-6) / 2)
    assert rate(109) == pytest.approx(1e-6 + (2 - 1e-6) * (1 + math.cos(math.pi * 0.99)) / 2)
    rates = [rate(t) for t in range(110)]
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)


def test_a_run_without_warm_up_or_with_nothing_else_has_a_learning_rate():
    assert learning_rate(0, 5, 0, 2.0) == 2.0
    assert learning_rate(4, 5, 5, 2.0) == pytest.approx(0.02 * (99 * 4 / 5 + 1))


def test_a_seed_makes_one_model_and_another_seed_another():
    small = dict(arch="tiny", num_prototypes=5, dim_hidden=9, dim_out=7)
    one, again, other = (recipes.model_of(config(seed=seed, **small)) for seed in (1, 1, 2))
    assert staged.difference(one.state_dict(), again.state_dict()) == ""
    assert staged.difference(one.state_dict(), other.state_dict()) != ""
    assert (one.temp_slot, one.temp_pool, one.group_weight) == (0.2, 0.0, 0.5)


@pytest.mark.parametrize("optimizer", ["lars", "adamw"])
def test_the_optimizer_trains_student_and_predictor_and_decays_no_bias_or_norm(optimizer):
    c = config(
        arch="tiny",
        num_prototypes=5,
        dim_hidden=9,
        dim_out=7,
        optimizer=optimizer,
        weight_decay=0.1,
    )
    model = recipes.model_of(c)
    made = make_optimizer(optimizer, model.parameters(), 0.5, 0.1)
    trained = {id(p) for group in made.param_groups for p in group["params"]}
    assert trained == {
        id(p) for part in (model.student, model.predictor) for p in part.parameters()
    }
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
        p.data.fill_(1)
    made.step()  # with no gradient only the decay moves anything
    for p in model.parameters():
        assert (p.eq(1).all().item()) == (p.ndim == 1 or not p.requires_grad)


def test_every_seed_position_and_rank_has_luck_of_its_own():
    seeds = {
        seed_of(seed, position, rank)
        for seed in (0, 1)
        for position in range(50)
        for rank in range(3)
    }
    assert len(seeds) == 300 and all(0 <= s < 2**63 for s in seeds)
    assert seed_of(1, 2, 3) == seed_of(1, 2, 3)


# --------------------------------------------------------------------------------------- whole runs


KEYS = [
    "step",
    "epoch",
    "loss",
    "group_loss",
    "slot_loss",
    "lr",
    "momentum_teacher",
    "occupied_per_image",
    "prototypes_used",
    "entropy_teacher",
    "entropy_mean",
    "agreement",
    "grad_norm",
    "images_per_second",
    "data_seconds",
    "memory_gb",
    "skipped_steps",
]


def test_a_run_writes_a_configuration_a_log_a_checkpoint_and_a_backbone(short):
    folder, _ = short
    assert sorted(p.name for p in folder.iterdir()) == [
        "backbone.pth",
        "config.json",
        "last.pth",
        "log.jsonl",
    ]
    written = json.loads((folder / "config.json").read_text())
    assert list(written) == [f.name for f in dataclasses.fields(recipes.Config)]
    assert (
        written["max_steps"] == 5
        and written["p_blur"] == [1.0, 0.1]
        and written["output_dir"] == str(folder)
    )


def test_a_run_first_says_where_it_runs_and_what_it_will_do(short):
    _, said = short
    for words in (
        "device   cpu",
        "1 process, float32",
        "14 images",
        "3 steps per epoch, 18 in all",
        "tiny 0.04 M",
        "5 prototypes",
        "batch    4 = 4 x 1",
        "lr       0.0625 = 4 x 4 / 256",
        "ln k = 1.6094",
        "3.2189",
        "step 5/5",
        "done     5 steps",
    ):
        assert words in said, words


def test_the_log_has_every_number_at_every_step(short):
    folder, _ = short
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    for line in lines:
        assert list(line) == KEYS
        assert all(math.isfinite(value) for value in line.values())
        step = line["step"]
        assert line["epoch"] == round(step / 3, 4)
        assert line["loss"] == pytest.approx((line["group_loss"] + line["slot_loss"]) / 2, rel=1e-5)
        assert line["lr"] == learning_rate(step - 1, 18, 3, 0.0625)  # --max-steps bends no schedule
        assert line["momentum_teacher"] == teacher_momentum(step, 18)
        assert 1 <= line["occupied_per_image"] <= line["prototypes_used"] <= 5
        assert 0 <= line["entropy_teacher"] <= line["entropy_mean"] <= math.log(5) + 1e-5
        assert 0 <= line["agreement"] <= 1 and line["skipped_steps"] == 0
        assert line["grad_norm"] > 0 and line["images_per_second"] > 0 and line["memory_gb"] > 0


def test_a_line_that_stands_for_several_steps_has_their_means(short, photographs, tmp_path):
    run(tmp_path, photographs, "--max-steps", "5", "--log-every", "4")
    each, some = staged.log_of(short[0]), staged.log_of(tmp_path)
    assert [line["step"] for line in some] == [1, 4, 5]  # the first, every fourth, the last
    for name in ("loss", "group_loss", "slot_loss", "grad_norm"):
        assert some[0][name] == pytest.approx(each[0][name])
        assert some[1][name] == pytest.approx(sum(line[name] for line in each[1:4]) / 3)
        assert some[2][name] == pytest.approx(each[4][name])


def test_the_checkpoint_is_tensors_and_plain_values_and_holds_the_network(short):
    folder, _ = short
    saved = staged.last_of(folder)  # weights_only
    assert (saved["step"], saved["position"], saved["num_images"], saved["world_size"]) == (
        5,
        5,
        14,
        1,
    )
    assert saved["config"]["arch"] == "tiny"
    network, c = weights.load_network(folder / "last.pth")
    assert c["image_size"] == 32 and network.prototypes.weight.equal(
        saved["model"]["teacher.prototypes.weight"]
    )
    backbone = torch.load(folder / "backbone.pth", weights_only=True)
    assert staged.difference(backbone, checkpoint.part(saved["model"], "teacher.backbone.")) == ""


def test_the_steps_are_those_of_the_paper_in_the_order_of_the_released_code(short, photographs):
    """The same five steps, written down once more without precautions."""
    c, _ = recipes.parse(staged.command_line("unused", photographs=photographs), "")
    images, _ = recipes.images_of(c)
    samples = loader.Samples(images, data.TwoCrops(c.image_size, c.min_area, c.min_overlap), c.seed)
    batches = loader.make_loader(
        samples, loader.RunSampler(len(images), c.batch_size, seed=c.seed, stop=5), 0, "cpu"
    )
    model = recipes.model_of(c)
    optimizer = LARS(
        [p for p in model.parameters() if p.requires_grad], 0.0, weight_decay=c.weight_decay
    )
    total = c.epochs * 3
    found = []
    for t, (batch, _) in enumerate(batches):
        model.update_teacher(
            teacher_momentum(t, total)
        )  # with the student of before this step's gradient
        views = photometric.Photometric()(
            batch.views, torch.Generator().manual_seed(seed_of(c.seed, t, 0))
        )
        loss, report = model(views, batch.boxes, batch.flipped)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = learning_rate(t, total, 3, c.base_lr * c.batch_size / 256)
        optimizer.step()
        model.update_center(report.center_mean, 0.9)
        found.append(loss.item())
    model.update_teacher(
        teacher_momentum(5, total)
    )  # which the released code does when the next step begins
    assert found == pytest.approx([line["loss"] for line in staged.log_of(short[0])], rel=1e-5)
    state = staged.last_of(short[0])["model"]
    for name, value in model.state_dict().items():
        assert torch.allclose(value.double(), state[name].double(), rtol=1e-4, atol=1e-6), name


def test_the_same_seed_gives_the_same_numbers_whatever_prepares_the_images(
    short, photographs, tmp_path
):
    for name, workers in (("again", "0"), ("two workers", "2")):
        run(
            tmp_path / name,
            photographs,
            "--max-steps",
            "5",
            "--log-every",
            "1",
            "--workers",
            workers,
        )
        assert staged.log_of(tmp_path / name) == staged.log_of(short[0])
        found, expected = staged.last_of(tmp_path / name), staged.last_of(short[0])
        for part in ("model", "optimizer"):
            assert staged.difference(found[part], expected[part]) == ""


def test_another_seed_gives_other_numbers_from_the_first_step(short, photographs, tmp_path):
    run(tmp_path, photographs, "--max-steps", "1", "--seed", "1")
    assert staged.log_of(tmp_path)[0]["loss"] != staged.log_of(short[0])[0]["loss"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("--slot-loss", "reg"),
        ("--align", "proj"),
        ("--image-loss",),
        ("--group-weight", "1"),
        ("--no-geometric",),
        ("--optimizer", "adamw"),
        ("--accumulate", "2"),
        ("--channels-last",),
        ("--min-area", "0.9"),
    ],
    ids=" ".join,
)
def test_a_run_with_each_other_kind_of_step_is_finite_and_learns_something(
    arguments, short, photographs, tmp_path
):
    run(tmp_path, photographs, "--max-steps", "2", "--log-every", "1", *arguments)
    lines = staged.log_of(tmp_path)
    assert len(lines) == 2 and all(
        math.isfinite(value) for line in lines for value in line.values()
    )
    assert all(line["grad_norm"] > 0 for line in lines)
    if arguments != ("--channels-last",):  # which changes no number, or only the last digit
        assert [line["loss"] for line in lines] != [
            line["loss"] for line in staged.log_of(short[0])[:2]
        ]


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_half_precision_runs_on_a_cpu_too_and_stays_near_single(amp, short, photographs, tmp_path):
    said = run(tmp_path, photographs, "--max-steps", "3", "--log-every", "1", "--amp", amp)
    assert f"1 process, {amp}" in said
    lines = staged.log_of(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    if lines[0]["skipped_steps"] == 0:
        assert lines[0]["loss"] == pytest.approx(staged.log_of(short[0])[0]["loss"], rel=0.02)
    state = staged.last_of(tmp_path)
    assert {v.dtype for v in state["model"].values()} == {torch.float32, torch.int64}
    assert bool(state["scaler"]) == (amp == "fp16")


def test_torchvision_loads_the_backbone_of_a_run_and_misses_only_its_classifier(
    photographs, tmp_path
):
    run(
        tmp_path,
        photographs,
        "--max-steps",
        "1",
        "--arch",
        "resnet18",
        "--image-size",
        "64",
        "--batch-size",
        "2",
    )
    theirs = torchvision.models.resnet18()
    weights = torch.load(tmp_path / "backbone.pth", weights_only=True)
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])
    assert theirs.bn1.num_batches_tracked == 2  # the teacher's, which saw both views of one step


def test_a_folder_of_another_layout_than_the_presets_is_taken_as_it_is_and_this_is_said(
    photographs, tmp_path
):
    arguments = staged.command_line(tmp_path, "--max-steps", "1", photographs=photographs)
    at = arguments.index("--dataset")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert train.main(arguments[:at] + arguments[at + 2 :]) == 0
    assert "is not laid out as coco: taken as a plain folder of images" in said.getvalue()


# ------------------------------------------------------------------------------ slow: real programs


def program(*command, folder):
    done = subprocess.run(
        [str(x) for x in command], cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert lines and all(math.isfinite(value) for line in lines for value in line.values())
    assert (folder / "last.pth").exists()
    return lines, torch.load(folder / "backbone.pth", weights_only=True)


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@pytest.mark.slow
def test_torchrun_with_two_processes_finishes_and_logs_once(photographs, tmp_path):
    arguments = staged.command_line(
        tmp_path, "--max-steps", "4", "--log-every", "1", photographs=photographs
    )
    lines, _ = program(*TORCHRUN, ROOT / "train.py", *arguments, folder=tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert staged.last_of(tmp_path)["world_size"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "variable, folder", [("SLOTCON_TINY_COCO", "."), ("SLOTCON_BSDS", "images")]
)
@pytest.mark.parametrize("launcher", [(sys.executable,), TORCHRUN], ids=["alone", "torchrun"])
def test_a_resnet_18_learns_from_photographs(variable, folder, launcher, tmp_path):
    if variable not in os.environ:
        pytest.skip(f"{variable} is not set")
    lines, backbone = program(
        *launcher,
        ROOT / "train.py",
        "--preset",
        "coco-r50",
        "--data-dir",
        Path(os.environ[variable], folder),
        "--arch",
        "resnet18",
        "--batch-size",
        "10",
        "--epochs",
        "2",
        "--dim-hidden",
        "256",
        "--image-size",
        "128",
        "--output-dir",
        tmp_path,
        "--device",
        "cpu",
        folder=tmp_path,
    )
    assert lines[-1]["epoch"] == 2
    missing, unexpected = torchvision.models.resnet18().load_state_dict(backbone, strict=False)
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])
