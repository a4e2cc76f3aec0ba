"""checkpoint.py: written whole or not at all, read without running anything, never a silently
random network.
"""

import argparse
import os
import pickle
import random
import re
import resource
import shutil
import signal
import time
import tracemalloc

import pytest
import torch

import train
from engine import checkpoint, files, weights
from grouping import GroupingNetwork
from slotcon import SlotCon
from staged import command_line, draw_photographs, last_of, play

MODEL = dict(arch="tiny", num_prototypes=5, dim_hidden=12, dim_out=7)

# ----------------------------------------------------------------------------------- atomic writing


def test_a_killed_save_leaves_the_old_checkpoint_or_the_new_one(tmp_path):
    """SIGKILL at 50 random moments around a save."""
    path, rng, interrupted = tmp_path / "last.pth", random.Random(5), 0
    clock = time.perf_counter()
    os.waitpid(child_that_saves(path, 0), 0)
    duration, number = time.perf_counter() - clock, 0
    for new in range(1, 51):
        saving = child_that_saves(path, new)
        time.sleep(rng.uniform(0, 1.2 * duration))
        os.kill(saving, signal.SIGKILL)
        interrupted += os.WIFSIGNALED(os.waitpid(saving, 0)[1])
        loaded = torch.load(path, weights_only=True)
        assert loaded["number"] in (number, new)
        number = loaded["number"]
        assert all((tensor == number).all() for tensor in loaded["tensors"])
    assert interrupted, "no save was ever interrupted: this test shows nothing"
    dead, alive = tmp_path / ".last.pth.4194399.tmp", tmp_path / f".last.pth.{os.getppid()}.tmp"
    dead.write_bytes(b"half a save")  # one at least, however the fifty fell
    alive.write_bytes(b"another run's save, which goes on")
    files.remove_leftovers(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [alive.name, "last.pth"]


def child_that_saves(path, number):
    """A process that saves 2 MB; its id."""
    child = os.fork()
    if child == 0:
        try:
            checkpoint.save(
                path, dict(number=number, tensors=[torch.full((125_000,), float(number))] * 4)
            )
        finally:
            os._exit(0)
    return child


def test_the_bytes_are_on_the_disk_before_the_name_points_to_them(tmp_path, monkeypatch):
    """What a power cut needs: file synchronized, then renamed, then the folder synchronized."""
    calls = []

    def fsync(number):
        calls.append("folder" if os.path.isdir(f"/proc/self/fd/{number}") else "file")

    replace = os.replace
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), replace(a, b)))
    checkpoint.save(tmp_path / "last.pth", {})
    assert calls == ["file", "rename", "folder"]


def test_a_save_needs_little_more_memory_than_the_checkpoint_has(tmp_path):
    contents = dict(tensor=torch.zeros(5_000_000))
    tracemalloc.start()
    checkpoint.save(tmp_path / "last.pth", contents)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.3 * 20e6


def test_leftovers_of_other_programs_stay(tmp_path):
    for name in (".last.pth.123.tmp", ".mine.tmp", "last.pth.tmp", "last.pth"):
        (tmp_path / name).touch()
    assert [path.name for path in files.remove_leftovers(tmp_path)] == [".last.pth.123.tmp"]


@pytest.mark.parametrize(
    "keep_last,keep_every,expected",
    [(2, 5, [5, 10, 11, 12]), (0, 4, [4, 8, 12]), (3, 0, [10, 11, 12]), (0, 0, [])],
)
def test_the_newest_and_every_mth_are_kept(keep_last, keep_every, expected, tmp_path):
    for epoch in range(1, 13):
        (tmp_path / f"epoch_{epoch:04d}.pth").touch()
    checkpoint.keep_newest(tmp_path, keep_last, keep_every, newest=12)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"epoch_{epoch:04d}.pth" for epoch in expected
    ]


# ------------------------------------------------------------------------------ a disk that refuses


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return draw_photographs(tmp_path_factory.mktemp("checkpoints") / "photographs")


class FullDisk:
    """From the nth save on, files may not grow beyond 100 kB: the operating system refuses, as a
    full disk does.
    """

    def __init__(self, n):
        self.n = n

    def __call__(self, rank, run):
        saves, write = [], run.keeper.write

        def limited(state, final=False):
            saves.append(state["step"])
            if len(saves) == self.n:
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
            write(state, final)

        run.keeper.write = limited


def test_a_full_disk_leaves_the_checkpoint_before_and_the_run_goes_on(photographs, tmp_path):
    [run] = play(tmp_path / "run", photographs=photographs, accident=FullDisk(3))
    refused = re.findall(
        r"could not write .*/run/last.pth after step (\d+): File too large; what stood there "
        r"before "
        "is intact, and the run goes on\n",
        run.output,
    )
    assert refused == ["9", "12", "15"] and last_of(tmp_path / "run")["step"] == 6
    # At its end nothing can follow, so it is a failure.
    assert run.process.exitcode == 1 and "Traceback" not in run.output
    assert run.complaints == [
        f"train.py: could not write {tmp_path / 'run' / 'last.pth'} after step 18: File too "
        f"large; what stood there before is intact. {tmp_path / 'run' / 'last.pth'} holds step 6, "
        "and "
        "the same command goes on from there"
    ]
    assert not list((tmp_path / "run").glob(".*"))
    [again] = play(tmp_path / "run", photographs=photographs)
    assert again.process.exitcode == 0 and "after step 6" in again.output


def test_a_full_disk_stops_the_run_if_that_is_asked_for(photographs, tmp_path):
    arguments = "--on-save-error", "stop"
    runs = play(
        tmp_path / "run", *arguments, photographs=photographs, processes=2, accident=FullDisk(3)
    )
    assert [run.process.exitcode for run in runs] == [1, 1]
    assert runs[0].complaints == [
        f"train.py: could not write {tmp_path / 'run' / 'last.pth'} after step 9: File too "
        f"large; what stood there before is intact. {tmp_path / 'run' / 'last.pth'} holds step 6, "
        "and "
        "the same command goes on from there"
    ]
    assert last_of(tmp_path / "run")["step"] == 6


def read_only(rank, run):
    """As on a read-only disk: root, as which tests may run, is not held back by permissions."""
    import errno

    rename, saves, write = os.replace, [], run.keeper.write

    def refuse(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def limited(state, final=False):
        saves.append(state["step"])
        os.replace = rename if len(saves) < 3 else refuse
        write(state, final)
        os.replace = rename

    run.keeper.write = limited


def test_a_read_only_folder_is_survived_too(photographs, tmp_path):
    [run] = play(tmp_path / "run", photographs=photographs, accident=read_only)
    assert (
        "after step 9: Read-only file system; what stood there before is intact, and the run goes "
        "on" in run.output
    )
    assert last_of(tmp_path / "run")["step"] == 6 and "Traceback" not in run.output


def test_a_folder_that_cannot_be_written_to_is_one_line_at_the_start(photographs, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "run").mkdir()
    arguments = "--output-dir", str(tmp_path / "file" / "run")
    [run] = play(tmp_path / "run", *arguments, photographs=photographs)
    assert run.process.exitcode == 2
    assert (
        run.output
        == f"train.py: --output-dir {tmp_path / 'file' / 'run'} cannot be written to: "
        "Not a directory\n"
    )


def test_a_run_keeps_what_it_is_told_to_and_cleans_up_after_the_killed_one(photographs, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".last.pth.4194399.tmp").touch()
    arguments = "--save-every", "2", "--keep-every", "3", "--keep-last", "1"
    play(tmp_path / "run", *arguments, photographs=photographs)
    kept = sorted(file.name for file in (tmp_path / "run").iterdir())
    assert kept == [
        "backbone.pth",
        "config.json",
        "epoch_0003.pth",
        "epoch_0006.pth",
        "last.pth",
        "log.jsonl",
    ]
    assert last_of(tmp_path / "run")["step"] == 18
    assert torch.load(tmp_path / "run" / "epoch_0003.pth", weights_only=True)["step"] == 9


# ---------------------------------------------------------------------------------- bad checkpoints


@pytest.fixture(scope="module")
def good(photographs, tmp_path_factory):
    """last.pth of a run of four steps."""
    folder = tmp_path_factory.mktemp("checkpoints") / "good"
    [run] = play(folder, "--max-steps", "4", photographs=photographs)
    assert run.process.exitcode == 0, run.output
    return folder / "last.pth"


def complaint(path):
    """The one line of load_network."""
    with pytest.raises(ValueError) as caught:
        weights.load_network(path)
    line = str(caught.value)
    assert "\n" not in line and str(path) in line and len(line) < 400
    return line


def changed(good, path, **changes):
    contents = torch.load(good, weights_only=True)
    contents.update(changes)
    torch.save({k: v for k, v in contents.items() if v is not None}, path)
    return path


def test_a_missing_file_is_named_with_what_is_beside_it(good):
    assert "no checkpoint at" in complaint(good.with_name("latest.pth"))
    assert "beside it: backbone.pth, last.pth" in complaint(good.with_name("latest.pth"))
    (good.parent / "empty").mkdir(exist_ok=True)
    assert "no checkpoint at" in complaint(good.parent / "empty")


def test_the_folder_of_a_run_stands_for_its_last_checkpoint(tmp_path):
    torch.save(dict(step=5), tmp_path / "last.pth")
    assert checkpoint.read(tmp_path) == dict(step=5)


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(share, good, tmp_path):
    whole = good.read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: int(share * len(whole))])
    assert "damaged" in complaint(tmp_path / "cut.pth") or "truncated" in complaint(
        tmp_path / "cut.pth"
    )


@pytest.mark.parametrize(
    "contents",
    [
        b"hello",
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        bytes(5000),
        b"PK\x03\x04" * 50,
        b"\x80\x02.",
        b"version https://git-lfs.github.com/spec/v1\n",
    ],
)
def test_a_file_of_another_kind_is_refused(contents, tmp_path):
    (tmp_path / "other.pth").write_bytes(contents)
    complaint(tmp_path / "other.pth")


def test_whatever_is_broken_in_a_file_is_one_line_or_still_a_network(good, tmp_path):
    """Bytes changed at random, most in the structure: never an exception of another kind."""
    whole, rng, path = good.read_bytes(), random.Random(6), tmp_path / "broken.pth"
    pickled = whole.index(b"data.pkl")
    for _ in range(100):
        broken = bytearray(whole)
        for _ in range(rng.choice([1, 4])):
            place = rng.choice(
                [pickled + rng.randrange(9000), len(whole) - 1 - rng.randrange(9000)]
            )
            broken[place] = rng.randrange(256)
        path.write_bytes(broken)
        try:
            weights.load_network(path)
        except ValueError as error:
            assert "\n" not in str(error)


class Payload:
    """Unpickled without care, it makes a file."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return shutil.copyfile, (__file__, self.witness)


class SystemPayload(Payload):
    def __reduce__(self):
        return os.system, (f"touch {self.witness}",)


@pytest.mark.parametrize(
    "payload,name", [(Payload, "shutil.copyfile"), (SystemPayload, "posix.system")]
)
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_code_in_a_checkpoint_is_refused_by_name_and_does_not_run(
    payload, name, form, good, tmp_path
):
    witness = tmp_path / "it_ran"
    contents = {**torch.load(good, weights_only=True), "extra": payload(witness)}
    if form == "pickle":
        (tmp_path / "evil.pth").write_bytes(pickle.dumps(contents))
    else:
        torch.save(contents, tmp_path / "evil.pth", _use_new_zipfile_serialization=form == "zip")
    line = complaint(tmp_path / "evil.pth")
    assert not witness.exists()
    if form != "pickle":  # a bare pickle fails at its first object already
        assert f"is refused: it asks to run {name}" in line and "nothing was executed" in line
    torch.load(tmp_path / "evil.pth", weights_only=False) if form == "zip" else None
    assert witness.exists() == (form == "zip")  # so the payload is a real one


def test_a_backbone_alone_is_said_to_be_one(good):
    assert "is a backbone only (tiny), without projector and prototypes" in complaint(
        good.with_name("backbone.pth")
    )


def test_other_state_dicts_are_said_to_be_none_of_ours(tmp_path):
    torch.save(
        dict(state_dict=dict(weight=torch.ones(2), bias=torch.ones(3))), tmp_path / "linear.pth"
    )
    assert "holds no SlotCon: expected student.* or encoder_q.*, found" in complaint(
        tmp_path / "linear.pth"
    )
    torch.save([1, 2], tmp_path / "list.pth")
    assert "holds a list" in complaint(tmp_path / "list.pth")
    torch.save({}, tmp_path / "empty.pth")
    complaint(tmp_path / "empty.pth")


def test_a_network_that_lacks_a_tensor_is_refused_whichever_it_is(good, tmp_path):
    model = torch.load(good, weights_only=True)["model"]
    for name in [name for name in model if name.startswith("teacher.")][::8]:
        line = complaint(
            changed(
                good, tmp_path / "hole.pth", model={k: v for k, v in model.items() if k != name}
            )
        )
        assert re.search(
            "lacks 1 tensors, first|holds no prototypes or projector|is none of tiny", line
        ), line


def test_a_tensor_of_another_size_is_refused(good, tmp_path):
    model = torch.load(good, weights_only=True)["model"]
    model["teacher.projector.mlp.6.weight"] = torch.zeros(8, 12, 1, 1)
    line = complaint(changed(good, tmp_path / "wide.pth", model=model))
    assert "has projector.mlp.6.weight as (8, 12, 1, 1) where (7, 12, 1, 1) is needed" in line


def test_the_architecture_that_was_saved_is_right_and_tensors_that_do_not_fit_it_are_refused(
    good, tmp_path
):
    path = changed(
        good, tmp_path / "wrong_words.pth", config=dict(arch="resnet50", num_prototypes=9)
    )
    with pytest.raises(ValueError, match="is of another architecture or size"):
        weights.load_network(path)


def test_what_is_loaded_is_what_was_saved_and_its_sizes_come_from_the_tensors(good, tmp_path):
    path = changed(good, tmp_path / "wrong_words.pth", config=dict(num_prototypes=9))
    for which in ("student", "teacher"):
        network, config = weights.load_network(path, which)
        assert not network.training and config == MODEL
        saved = checkpoint.part(torch.load(good, weights_only=True)["model"], f"{which}.")
        assert all(torch.equal(value, saved[key]) for key, value in network.state_dict().items())


def test_a_released_checkpoint_loads_with_its_namespace(tmp_path):
    torch.manual_seed(0)
    model = SlotCon(**MODEL)
    names = [
        ("student.backbone.", "encoder_q."),
        ("teacher.backbone.", "encoder_k."),
        ("student.projector.", "projector_q."),
        ("teacher.projector.", "projector_k."),
        ("student.prototypes.", "grouping_q.slot_embed."),
        ("teacher.prototypes.", "grouping_k.slot_embed."),
        ("predictor.", "predictor_slot."),
    ]
    state = {}
    for key, value in model.state_dict().items():
        for ours, theirs in names:
            key = theirs + key.removeprefix(ours) if key.startswith(ours) else key
        state["module." + key] = value[None] if key == "center" else value
    torch.save(
        dict(args=argparse.Namespace(arch="tiny", epochs=800), model=state, epoch=800),
        tmp_path / "theirs.pth",
    )
    network, config = weights.load_network(tmp_path / "theirs.pth")
    assert config == {**MODEL, "epochs": 800} and isinstance(network, GroupingNetwork)
    assert torch.equal(network.prototypes.weight, model.teacher.prototypes.weight)


BAD_TO_CONTINUE = {
    "cannot be continued: it holds no training state of this program": dict(optimizer=None),
    "it holds no training state": dict(step="four"),
    "made with other options (num_prototypes: 6 then, 5 now": dict(config=dict(num_prototypes=6)),
    "is of another architecture or size": dict(model=dict(center=torch.zeros(5))),
    "was made with another optimizer": dict(optimizer=dict(state={}, param_groups=[])),
}


@pytest.mark.parametrize("expected", BAD_TO_CONTINUE)
def test_a_run_does_not_continue_from_a_bad_checkpoint(
    expected, good, photographs, tmp_path, capsys
):
    changes = BAD_TO_CONTINUE[expected]
    if "config" in changes:
        changes = dict(
            config={**torch.load(good, weights_only=True)["config"], **changes["config"]}
        )
    said = refused_by_train(
        changed(good, tmp_path / "bad.pth", **changes), photographs, tmp_path, capsys
    )
    assert expected in said


def test_a_run_does_not_continue_from_a_damaged_or_missing_or_evil_file(
    good, photographs, tmp_path, capsys
):
    (tmp_path / "cut.pth").write_bytes(good.read_bytes()[:-1000])
    assert "cut.pth" in refused_by_train(tmp_path / "cut.pth", photographs, tmp_path, capsys)
    assert "no checkpoint at" in refused_by_train(
        tmp_path / "none.pth", photographs, tmp_path, capsys
    )
    assert "backbone" in refused_by_train(
        good.with_name("backbone.pth"), photographs, tmp_path, capsys
    )
    torch.save(dict(extra=Payload(tmp_path / "it_ran")), tmp_path / "evil.pth")
    assert "is refused" in refused_by_train(tmp_path / "evil.pth", photographs, tmp_path, capsys)
    assert not (tmp_path / "it_ran").exists()


def test_a_damaged_last_pth_is_not_passed_over_in_silence(good, photographs, tmp_path, capsys):
    """`--resume auto` finds it, and starting over would overwrite it."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last.pth").write_bytes(good.read_bytes()[:-1000])
    assert "last.pth" in refused_by_train("auto", photographs, tmp_path, capsys)


def refused_by_train(path, photographs, tmp_path, capsys):
    status = train.main(
        command_line(tmp_path / "run", "--resume", str(path), photographs=photographs)
    )
    said = capsys.readouterr().err
    assert status == 2 and said.count("\n") == 1 and said.startswith("train.py: ")
    assert not (tmp_path / "run" / "log.jsonl").exists()
    return said
