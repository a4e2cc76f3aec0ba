"""What a run begins with: subsets, names of images, given weights, lengths in steps, and doubts
that are said."""

import contextlib
import dataclasses
import io
import json
import shlex
import shutil

import numpy as np
import pytest
import torch

import recipes
import staged
import train
from engine import weights
from engine.images import choose_subset, digest_of, hold_out, look_like_labels, share_out
from engine.schedule import Schedule


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return staged.draw_photographs(tmp_path_factory.mktemp("data") / "photographs")


def run(folder, photographs, *arguments, status=0):
    """A small run in this process; returns what it has said."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        command = staged.command_line(folder, *arguments, photographs=photographs)
        assert train.main(command) == status
    return said.getvalue()


# ------------------------------------------------------------------------------- subsets (table 1)


def in_classes(*counts):
    return np.array([f"class {c}/{i:03d}.jpg" for c, n in enumerate(counts) for i in range(n)])


def counts_of(paths):
    return [sum(path.startswith(f"class {c}/") for path in paths) for c in range(4)]


def test_a_uniform_subset_takes_as_many_of_every_class_and_fills_up_where_one_has_too_few():
    paths, how = choose_subset(in_classes(50, 50, 3, 50), 40, seed=0)
    counts = counts_of(paths)
    assert counts[2] == 3 and sum(counts) == 40 and max(counts) - min(counts[:2]) <= 1
    assert "uniform over 4 classes (3 to 13 each)" in how
    assert len(set(paths)) == 40 and paths.tolist() == sorted(paths)


def test_a_long_tail_follows_the_quantiles_of_a_pareto_distribution_of_power_6():
    paths, how = choose_subset(in_classes(900, 900, 900, 900), 400, seed=0, long_tailed=True)
    quantiles = [(1 - q) ** (-1 / 6) - 1 for q in (0.125, 0.375, 0.625, 0.875)]
    expected = [400 * q / sum(quantiles) for q in quantiles]
    assert sorted(counts_of(paths)) == [pytest.approx(x, abs=2) for x in expected]
    assert "with a long tail" in how


def test_a_subset_is_a_function_of_the_seed_and_without_classes_random():
    flat = np.array([f"{i:03d}.jpg" for i in range(100)])
    one, again, other = (choose_subset(flat, 30, seed)[0].tolist() for seed in (1, 1, 2))
    assert one == again != other and len(set(one)) == 30
    assert one != flat[:30].tolist()


def test_what_a_subset_cannot_be_is_one_line():
    with pytest.raises(ValueError, match="--subset 9, but there are 8 images"):
        choose_subset(in_classes(4, 4), 9, 0)
    with pytest.raises(ValueError, match="--long-tailed needs folders that are classes"):
        choose_subset(np.array(["a.jpg", "b.jpg"]), 1, 0, long_tailed=True)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 7, 20, 24])
def test_shares_are_whole_numbers_that_sum_to_the_count(count):
    available = np.array([10, 1, 5, 8])
    found = share_out(count, np.array([1.0, 5.0, 0.1, 3.0]), available)
    assert found.sum() == count and (found <= available).all() and (found >= 0).all()


def test_the_names_of_a_subset_are_written_beside_the_run(photographs, tmp_path):
    said = run(tmp_path / "run", photographs, "--subset", "9", "--max-steps", "1")
    assert "14 images" in said and "9 of them, at random" in said
    names = (tmp_path / "run" / "subset.txt").read_text().splitlines()
    assert len(set(names)) == 9 and all((photographs / name).exists() for name in names)


# ------------------------------------------------------------------------------- names of images


def test_another_list_of_as_many_images_is_refused_and_can_be_forced(photographs, tmp_path):
    names = [path.name for path in sorted(photographs.iterdir())]
    one, other = tmp_path / "one.txt", tmp_path / "other.txt"
    one.write_text("\n".join(str(photographs / name) for name in names[:12]))
    other.write_text("\n".join(str(photographs / name) for name in names[2:]))
    start = ("--dataset", "list", "--data-dir")
    run(tmp_path / "run", photographs, *start, str(one), "--max-steps", "2")
    said = run(tmp_path / "run", photographs, *start, str(other), "--max-steps", "3", status=2)
    assert "images: as many then (12), but with other names" in said
    run(tmp_path / "run", photographs, *start, str(other), "--max-steps", "3", "--force-resume")
    assert staged.last_of(tmp_path / "run")["step"] == 3


def test_a_digest_is_of_all_names_in_their_order():
    assert digest_of(["a", "b"]) != digest_of(["b", "a"]) != digest_of(["ab"])
    assert digest_of(np.array(["a", "b"])) == digest_of(["a", "b"])


def test_label_maps_beside_photographs_are_named():
    names = [f"images/{i}.jpg" for i in range(8)] + [f"labels/{i}.png" for i in range(8)]
    assert look_like_labels(names) == (
        "8 files of labels/ have the names of images in images/ and may be label maps: give the "
        "folder images as --data-dir"
    )
    assert look_like_labels([f"a/{i}.jpg" for i in range(8)]) == ""
    assert (
        look_like_labels([f"a/{i}.jpg" for i in range(8)] + [f"b/{i}.jpg" for i in range(8)]) == ""
    )
    assert look_like_labels([f"{i}.png" for i in range(8)]) == ""


# ------------------------------------------------------------------------------- given weights


def test_a_run_starts_from_a_backbone_or_a_whole_checkpoint_and_says_what_it_used(
    photographs, tmp_path
):
    run(tmp_path / "first", photographs, "--max-steps", "2")
    state = staged.last_of(tmp_path / "first")["model"]
    for file, used in (("backbone.pth", 52), ("last.pth", len(state))):
        c, _ = recipes.parse(
            staged.command_line("unused", "--seed", "5", photographs=photographs), ""
        )
        model = recipes.model_of(c)
        line = weights.start_from(model, tmp_path / "first" / file)
        assert f"{used} of {len(state)} tensors used" in line
        teacher = {k: v for k, v in state.items() if k.startswith("teacher.backbone.")}
        for key, value in teacher.items():
            assert model.state_dict()[key].equal(value)
            student = key.replace("teacher.", "student.")
            expected = value if file == "backbone.pth" else state[student]
            assert model.state_dict()[student].equal(expected)
    said = run(tmp_path / "second", photographs, "--init", str(tmp_path / "none"), status=2)
    assert "no checkpoint at" in said
    said = run(
        tmp_path / "second", photographs, "--init", str(tmp_path / "first"),  # its last.pth
        "--max-steps", "1",
    )  # fmt: skip
    assert "start    " in said and "tensors used" in said


@pytest.mark.parametrize(
    "contents", [{"conv1.weight": torch.ones(2, 2)}, {"model": "resnet"}, {"model": torch.ones(2)}]
)
def test_a_backbone_of_another_kind_is_refused(contents, photographs, tmp_path):
    torch.save(contents, tmp_path / "other.pth")
    said = run(tmp_path / "run", photographs, "--init", str(tmp_path / "other.pth"), status=2)
    assert "does not hold this backbone" in said and not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------- lengths and doubts


def parsed(*arguments):
    return recipes.parse(["--preset", "coco-r50", "--data-dir", "x", *arguments], "")[0]


def test_a_length_in_steps_does_not_depend_on_the_number_of_images():
    c = parsed("--steps", "100", "--warmup-steps", "7", "--batch-size", "8")
    for images in (9, 1000):
        schedule = recipes.schedule_of(c, images)
        assert (schedule.total_steps, schedule.warmup_steps, schedule.last_step) == (100, 7, 100)
        assert schedule.steps_per_epoch == images // 8
    again = dict(epochs=2, warmup_epochs=1.0)
    assert recipes.schedule_of(parsed("--epochs", "2"), 5120).total_steps == 20, again


def test_the_temperature_of_the_teacher_moves_along_a_line_and_not_at_all_by_default():
    moving = parsed("--temp-teacher", "0.05", "--temp-teacher-start", "0.03",
                    "--temp-teacher-epochs", "2", "--batch-size", "8")  # fmt: skip
    schedule = recipes.schedule_of(moving, 80)
    found = [recipes.teacher_temperature(moving, schedule, step) for step in (0, 10, 20, 30)]
    assert found == pytest.approx([0.03, 0.04, 0.05, 0.05])
    assert recipes.teacher_temperature(parsed(), schedule, 3) == 0.07


def test_doubts_are_said_in_one_line_each_and_the_run_goes_on(photographs, tmp_path):
    said = run(tmp_path / "run", photographs, "--epochs", "1", "--warmup-epochs", "5")
    assert "warning  the warm-up of 15 steps is not shorter than the run of 3" in said
    assert staged.last_of(tmp_path / "run")["step"] == 3
    said = run(
        tmp_path / "parts",
        photographs,
        "--accumulate",
        "4",
        "--max-steps",
        "1",
        "--min-area",
        "0.5",
    )
    assert "warning  --accumulate 4 leaves one image per pass" in said
    quiet = run(tmp_path / "quiet", photographs, "--max-steps", "1")
    assert "warning" not in quiet and "disk     " in quiet and "free in" in quiet


def test_a_line_is_due_after_the_first_step_every_so_many_and_at_the_end():
    schedule = Schedule(100, 250, 0, 250, 1.0)
    due = [step for step in range(1, 251) if schedule.is_logged(step, step, 60)]
    assert due == [1, 60, 100, 120, 180, 200, 240, 250]
    short = Schedule(5, 30, 0, 30, 1.0)
    assert [s for s in range(1, 31) if short.is_logged(s, s, 10)] == [1, 10, 20, 30]


# ------------------------------------------------------------------------------- photographs


def test_what_is_held_out_is_a_tenth_at_most_and_never_learned_from():
    paths = np.array([f"{i:02d}.jpg" for i in range(50)])
    kept, out = hold_out(paths, 64, seed=3)
    assert len(out) == 5 and len(kept) == 45 and set(kept) | set(out) == set(paths)
    assert (
        hold_out(paths, 64, seed=3)[1].tolist()
        == out.tolist()
        != hold_out(paths, 64, 4)[1].tolist()
    )
    assert len(hold_out(paths, 2, 0)[1]) == 2 and len(hold_out(paths, 0, 0)[1]) == 0


def test_a_subset_is_taken_of_what_is_not_kept_out(tmp_path):
    photographs = staged.draw_photographs(tmp_path / "photographs", count=30)
    c = parsed("--data-dir", str(photographs), "--held-out", "3", "--subset", "20")
    images, about = recipes.images_of(c)
    out = recipes.held_out_images(c)
    assert len(images) == 20 and len(out) == 3 and not set(images.paths) & set(out.paths)
    assert "30 images" in about and "3 are kept out" in about and "20 of the others" in about
    assert set(recipes.with_held_out(c, images).paths) == {*images.paths, *out.paths}
    with pytest.raises(ValueError, match="--subset 28, but there are 27 images"):
        recipes.images_of(dataclasses.replace(c, subset=28))
    plan = parsed("--plan", "--data-dir", "", "--plan-images", "30", "--held-out", "3",
                  "--subset", "20")  # fmt: skip
    assert len(recipes.images_of(plan)[0]) == 20
    with pytest.raises(ValueError, match="--subset 28, but there are 27 images"):
        recipes.images_of(dataclasses.replace(plan, subset=28))


def test_what_was_kept_out_when_the_run_began_is_shown_although_photographs_came(tmp_path, capsys):
    photographs = staged.draw_photographs(tmp_path / "photographs", count=30)
    arguments = ("--held-out", "3", "--max-steps", "2")
    c = parsed("--data-dir", str(photographs), *arguments)
    before = recipes.held_out_images(c).paths.tolist()

    def change(_):
        shutil.copy(photographs / before[0], photographs / "00.png")
        for name in before:  # whoever looks at these says so
            (photographs / name).write_bytes(b"no image")

    argv = staged.command_line(tmp_path / "run", *arguments, photographs=photographs)
    assert train.main(argv, prepared=change) == 0
    assert recipes.held_out_images(c).paths.tolist() != before
    said = capsys.readouterr()
    assert [line.split(":")[0] for line in said.err.splitlines() if "left out" in line] == [
        f"left out {name}" for name in before
    ]
    assert "figures  none" in said.out


def test_what_is_kept_out_and_cannot_be_read_is_named_and_the_result_is_of_the_others(
    tmp_path, capsys
):
    photographs = staged.draw_photographs(tmp_path / "photographs", count=30)
    arguments = ("--held-out", "3", "--max-steps", "2")
    first, *_ = recipes.held_out_images(parsed("--data-dir", str(photographs), *arguments)).paths
    (photographs / first).write_bytes((photographs / first).read_bytes()[:200])
    check = staged.command_line(
        "unused", *arguments, "--check-data", "--max-bad-share", "1", photographs=photographs
    )
    assert train.main(check) == 0 and f"bad      {first}" in capsys.readouterr().out
    argv = staged.command_line(tmp_path / "run", *arguments, photographs=photographs)
    assert train.main(argv) == 0
    assert f"left out {first}" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "result.json").read_text())["images"] == 2


def test_a_folder_too_small_to_keep_any_out_ends_in_a_line_that_says_so(tmp_path, capsys):
    photographs = staged.draw_photographs(tmp_path / "photographs", count=9)
    argv = staged.command_line(
        tmp_path / "run", "--held-out", "3", "--max-steps", "2", photographs=photographs
    )
    assert train.main(argv) == 0
    assert "figures  none, since no photograph was kept out" in capsys.readouterr().out


def test_the_figures_of_a_run_inside_the_folder_are_no_photographs(tmp_path):
    photographs = staged.draw_photographs(tmp_path / "photographs", count=30)
    (photographs / "more" / "runs").mkdir(parents=True)
    shutil.copy(next(photographs.glob("*.png")), photographs / "more" / "one.png")
    for name in ("config.json", "log.jsonl", "groups.png"):
        (photographs / "more" / "runs" / name).touch()
    assert len(recipes.images_of(parsed("--data-dir", str(photographs)))[0]) == 31
    (photographs / "more" / "runs" / "log.jsonl").unlink()  # then it is a folder like any other
    assert len(recipes.images_of(parsed("--data-dir", str(photographs)))[0]) == 32


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--preset", "toy", "--subset", "9"], "--toy-scenes"),
        (["--long-tailed"], "add --subset"),
        (["--temp-teacher-start", "0.09"], "add --temp-teacher-epochs"),
        (["--steps", "5", "--epochs", "3"], "--epochs and --steps: give one"),
        (["--warmup-steps", "5", "--warmup-epochs", "3"], "give one"),
        (["--preset", "photos", "--keep-last", "2"], "add --save-every"),
    ],
)
def test_an_option_that_would_have_no_effect_is_refused(arguments, says):
    data = ["--data-dir", "unused"] if "photos" in arguments else []
    with pytest.raises(ValueError, match=says):
        recipes.parse([*arguments, *data], "")


def test_a_run_on_photographs_ends_with_figures_of_those_that_it_has_not_seen(tmp_path):
    folder = tmp_path / "a run"  # the command that is printed must work with it
    photographs = staged.draw_photographs(tmp_path / "photographs", count=30)
    said = run(folder, photographs, "--held-out", "9", "--max-steps", "2")
    assert "30 images" in said and "3 are kept out for the result" in said
    assert staged.last_of(folder)["num_images"] == 27
    report = json.loads((folder / "result.json").read_text())
    assert report["images"] == 3 and 1 <= report["prototypes_used"] <= 5
    assert {"groups.png", "prototypes.png"} <= {f.name for f in (folder).iterdir()}
    assert "3 photographs kept out of training" in said
    assert f"python evaluate.py segmentation {shlex.quote(str(folder))} --dataset folder" in said


# ------------------------------------------------------------------------------- slips of the hand


def test_an_unquoted_pattern_is_answered_with_its_first_file_and_the_count(photographs, tmp_path):
    names = [str(path) for path in sorted(photographs.iterdir())]
    said = run(tmp_path / "run", photographs, *names, status=2)
    assert said == (
        f"train.py: unrecognized arguments: {names[0]} and 13 more; give the folder, or put a "
        "pattern into quotes\n"
    )


def test_one_image_in_place_of_a_folder_is_said_to_be_one(photographs, tmp_path):
    said = run(tmp_path / "run", photographs, "--data-dir", str(photographs / "003.png"), status=2)
    assert "003.png is one image: give the folder that it lies in" in said


def test_the_home_folder_is_understood_in_every_path(photographs, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    run("~/run", photographs, "--max-steps", "1")
    assert staged.last_of(tmp_path / "run")["step"] == 1


def test_a_skipped_image_is_said_once_and_counted_at_the_end(tmp_path):
    folder = staged.draw_photographs(tmp_path / "photographs")
    (folder / "003.png").write_bytes(b"no image")
    said = run(tmp_path / "run", folder, "--max-bad-share", "0.1", "--epochs", "2")
    assert said.count("003.png could not be read (not an image that Pillow knows)") == 1
    assert "skipped  1 images could not be read and were replaced by their neighbors" in said
