"""checkpoint.py: what is kept on disk, read back without trust.

Promised: files are whole or absent; a checkpoint is tensors and plain values; released checkpoints
come in under our names; a network is rebuilt from its tensors alone; and each file that is not what
it should be is refused in one line.
"""

import argparse
import os
import pickle
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from backbone import build_trunk
from engine import checkpoint, files, weights
from slotcon import SlotCon

K, D, HIDDEN = 5, 7, 9


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    model = SlotCon("tiny", K, HIDDEN, D)
    for i, p in enumerate(model.parameters()):
        p.data += 0.01 * (i + 1)  # student and teacher differ
    model.center.copy_(torch.arange(K))
    return model


def one_line(error, *parts):
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def released(model, prefix="module."):
    """What the released code would have saved of this model."""
    names = {
        "student.backbone": "encoder_q",
        "teacher.backbone": "encoder_k",
        "student.projector": "projector_q",
        "teacher.projector": "projector_k",
        "student.prototypes": "grouping_q.slot_embed",
        "teacher.prototypes": "grouping_k.slot_embed",
        "predictor": "predictor_slot",
    }
    state = {}
    for key, value in model.state_dict().items():
        for here, there in names.items():
            key = there + key.removeprefix(here) if key.startswith(here) else key
        state[prefix + key] = value[None] if key == "center" else value
    return state


# ------------------------------------------------------------------------------------------ writing


def test_what_is_saved_is_read_back_and_leaves_no_other_file(tmp_path):
    weight = torch.arange(6).reshape(2, 3)
    contents = dict(step=3, config=dict(arch="tiny", p_blur=[1.0, 0.1]), model=dict(weight=weight))
    checkpoint.save(tmp_path / "last.pth", contents)
    found = checkpoint.read(tmp_path / "last.pth")
    assert found["step"] == 3 and found["config"] == contents["config"]
    assert found["model"]["weight"].equal(weight)
    assert [p.name for p in tmp_path.iterdir()] == ["last.pth"]


def test_a_device_or_a_pipe_is_written_to_and_not_replaced_by_a_file(tmp_path):
    """`--json /dev/stdout`, `--json >(jq .)`."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    files.write_json(pipe, dict(miou=0.5))
    assert pipe.is_fifo() and os.read(reader, 99) == b'{\n "miou": 0.5\n}\n'
    assert [file.name for file in tmp_path.iterdir()] == ["pipe"]
    os.close(reader)


def test_a_writer_that_fails_leaves_the_old_content_and_no_neighbor(tmp_path):
    path = tmp_path / "config.json"
    files.write_atomically(path, lambda file: file.write(b"old"))

    def half(file):
        file.write(b"ne")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        files.write_atomically(path, half)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_reader_never_sees_half_a_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b"old")

    def slowly(file):
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"

    files.write_atomically(path, slowly)
    assert path.read_bytes() == b"new"


def test_leftovers_of_a_killed_process_are_removed_and_nothing_else(tmp_path):
    folder = tmp_path / "run [1]"  # brackets mean something to a glob
    folder.mkdir()
    for name in ("last.pth", ".last.pth.123.tmp", "notes.tmp", ".hidden"):
        (folder / name).write_bytes(b"x")
    assert files.remove_leftovers(folder) == [folder / ".last.pth.123.tmp"]
    assert sorted(p.name for p in folder.iterdir()) == [".hidden", "last.pth", "notes.tmp"]


@pytest.mark.parametrize(
    "keep_last, keep_every, kept",
    [(2, 0, [11, 12]), (0, 5, [5, 10]), (1, 4, [4, 8, 12]), (3, 10, [10, 11, 12]), (0, 0, [])],
)
def test_the_newest_epochs_and_every_so_many_th_are_kept(tmp_path, keep_last, keep_every, kept):
    for epoch in range(1, 13):
        (tmp_path / f"epoch_{epoch:04d}.pth").touch()
    (tmp_path / "last.pth").touch()
    checkpoint.keep_newest(tmp_path, keep_last, keep_every, newest=12)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *(f"epoch_{e:04d}.pth" for e in kept),
        "last.pth",
    ]


def test_epochs_are_counted_as_numbers_and_those_of_an_earlier_longer_run_stay(tmp_path):
    for epoch in (1, 2, 9998, 9999, 10000, 10001):
        (tmp_path / f"epoch_{epoch:04d}.pth").touch()
    checkpoint.keep_newest(tmp_path, 2, 0, newest=10000)
    epochs = sorted(int(p.stem.split("_")[1]) for p in tmp_path.iterdir())
    assert epochs == [9999, 10000, 10001]
    checkpoint.keep_newest(tmp_path, 2, 0, newest=2)
    assert sorted(int(p.stem.split("_")[1]) for p in tmp_path.iterdir()) == epochs
    checkpoint.keep_newest(tmp_path, 5, 0, newest=10000)  # more than there are
    assert len(list(tmp_path.iterdir())) == 3


# ------------------------------------------------------------------------------------------ reading


def test_a_missing_file_is_named_with_the_checkpoints_beside_it(tmp_path):
    (tmp_path / "epoch_0100.pth").touch()
    with pytest.raises(ValueError) as error:
        checkpoint.read(tmp_path / "last.pth")
    one_line(error, f"no checkpoint at {tmp_path / 'last.pth'}", "beside it: epoch_0100.pth")
    with pytest.raises(ValueError, match="no checkpoint at"):
        checkpoint.read(tmp_path / "nowhere" / "last.pth")
    with pytest.raises(ValueError, match="no checkpoint at"):
        checkpoint.read(tmp_path)  # a folder is none


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 and no more", b"\x80\x02}q\x00"])
def test_a_file_that_is_no_checkpoint_is_refused_with_its_size(tmp_path, content):
    path = tmp_path / "last.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        checkpoint.read(path)
    one_line(error, str(path), f"({len(content)} bytes", "take an earlier one")


def test_a_file_that_holds_something_else_is_refused_by_its_type(tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list, not a checkpoint's dictionary"):
        checkpoint.read(tmp_path / "list.pth")


class Intruder:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_in_a_file_is_executed(tmp_path):
    torch.save(dict(model=Intruder(tmp_path / "was here")), tmp_path / "evil.pth")
    with pytest.raises(ValueError) as error:
        checkpoint.read(tmp_path / "evil.pth")
    one_line(error, "is refused: it asks to run", "nothing was executed")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Intruder(tmp_path / "was here"), 2))
    with pytest.raises(ValueError):
        checkpoint.read(tmp_path / "plain.pkl")
    assert not (tmp_path / "was here").exists()


def test_the_command_line_in_a_released_checkpoint_becomes_a_dictionary(tmp_path):
    torch.save(
        dict(opt=argparse.Namespace(arch="resnet50", epochs=800), epoch=3),
        tmp_path / "released.pth",
    )
    assert checkpoint.read(tmp_path / "released.pth") == dict(
        opt=dict(arch="resnet50", epochs=800), epoch=3
    )


# ----------------------------------------------------------------------------------- released names


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_released_state_dict_comes_in_under_our_names(model, prefix):
    found, own = weights.import_released(released(model, prefix)), model.state_dict()
    assert found.keys() == own.keys()
    assert all(found[key].equal(own[key]) for key in own)
    assert found["center"].shape == (K,)


def test_a_state_dict_of_something_else_is_not_imported():
    with pytest.raises(ValueError, match=r"expected encoder_q.\*, found head.weight"):
        weights.import_released({"head.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match="found nothing"):
        weights.import_released({})


def test_the_model_is_found_in_our_checkpoints_in_released_ones_and_in_bare_state_dicts(model):
    own = model.state_dict()
    for contents in (
        dict(model=own, step=3),
        dict(model=released(model)),
        own,
        released(model, ""),
    ):
        found = weights.model_state(contents, "a.pth")
        assert found.keys() == own.keys() and all(found[key].equal(own[key]) for key in own)


def test_a_file_without_slotcon_is_refused_by_what_it_holds(model):
    with pytest.raises(
        ValueError, match=r"a.pth is a backbone only \(resnet18\), without projector"
    ):
        weights.model_state(torchvision.models.resnet18().state_dict(), "a.pth")
    with pytest.raises(
        ValueError,
        match=r"a.pth holds no SlotCon: expected student.\* or encoder_q.\*, found epoch",
    ):
        weights.model_state(dict(epoch=3, loss=1.0), "a.pth")
    with pytest.raises(ValueError, match=r"holds no SlotCon"):
        weights.model_state(dict(model="gone"), "a.pth")


# ----------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("which", ["student", "teacher"])
@pytest.mark.parametrize("ours", [True, False])
def test_a_network_is_rebuilt_from_its_tensors_alone(model, tmp_path, which, ours):
    state = model.state_dict() if ours else released(model)
    torch.save(
        dict(model=state, config=dict(arch="wrong", num_prototypes=99, image_size=64)),
        tmp_path / "a.pth",
    )
    network, config = weights.load_network(tmp_path / "a.pth", which)
    assert config == dict(
        arch="tiny", num_prototypes=K, dim_hidden=HIDDEN, dim_out=D, image_size=64
    )
    assert not network.training
    expected = getattr(model, which).state_dict()
    assert all(value.equal(expected[key]) for key, value in network.state_dict().items())
    assert network.state_dict().keys() == expected.keys()
    assert model.student.prototypes.weight.ne(model.teacher.prototypes.weight).all()


def test_the_teacher_is_loaded_unless_asked_otherwise_and_other_names_are_refused(model, tmp_path):
    torch.save(dict(model=model.state_dict()), tmp_path / "a.pth")
    network, _ = weights.load_network(tmp_path / "a.pth")
    assert network.prototypes.weight.equal(model.teacher.prototypes.weight)
    with pytest.raises(ValueError, match="holds a student and a teacher, not 'parent'"):
        weights.load_network(tmp_path / "a.pth", "parent")


@pytest.mark.parametrize(
    "spoil, complaint",
    [
        (
            lambda s: s.pop("teacher.prototypes.weight"),
            "holds no prototypes or projector of the teacher",
        ),
        (
            lambda s: s.pop("teacher.projector.mlp.0.weight"),
            "holds no prototypes or projector of the teacher",
        ),
        (
            lambda s: s.pop("teacher.projector.mlp.3.bias"),
            "lacks 1 tensors, first projector.mlp.3.bias",
        ),
        (lambda s: s.pop("teacher.backbone.0.weight"), "is none of tiny, small, resnet18"),
        (lambda s: s.update({"teacher.extra": torch.zeros(1)}), "has 1 of its own, first extra"),
        (
            lambda s: s.update({"teacher.projector.mlp.6.weight": torch.zeros(D, 2, 1, 1)}),
            "has projector.mlp.6.weight as (7, 2, 1, 1) where (7, 9, 1, 1) is needed",
        ),
    ],
)
def test_an_incomplete_network_is_never_filled_up_at_random(model, tmp_path, spoil, complaint):
    state = model.state_dict()
    spoil(state)
    torch.save(dict(model=state), tmp_path / "a.pth")
    with pytest.raises(ValueError) as error:
        weights.load_network(tmp_path / "a.pth")
    one_line(error, str(tmp_path / "a.pth"), complaint)


@pytest.mark.parametrize("arch", ["tiny", "resnet18", "resnet34", "resnet50", "resnet101"])
def test_the_architecture_is_read_off_names_and_shapes(arch):
    with torch.device("meta"):
        state = build_trunk(arch).state_dict()
        assert weights.architecture_of(state, "a.pth") == arch
        assert weights.architecture_of(state | {"fc.bias": torch.zeros(3)}, "a.pth") == arch
        with pytest.raises(
            ValueError, match=r"the backbone in a.pth \(0 tensors.*is none of tiny, small, resnet18"
        ):
            weights.architecture_of({}, "a.pth")


def test_strict_loading_names_every_kind_of_difference_and_touches_nothing():
    module = nn.Linear(3, 2)
    before = module.weight.detach().clone()
    for state, complaint in (
        ({"weight": torch.zeros(2, 3)}, "lacks 1 tensors, first bias"),
        (
            {"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "a": torch.zeros(1)},
            "has 1 of its own, first a",
        ),
        (
            {"weight": torch.zeros(2, 4), "bias": torch.zeros(2)},
            r"has weight as \(2, 4\) where \(2, 3\) is needed",
        ),
    ):
        with pytest.raises(
            ValueError, match=f"a.pth is of another architecture or size: it {complaint}"
        ):
            checkpoint.load_strictly(module, state, "a.pth")
    assert module.weight.equal(before)
    checkpoint.load_strictly(module, {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}, "a.pth")
    assert module.weight.eq(1).all()


# ---------------------------------------------------------------------------------- training states


def trained(seed):
    torch.manual_seed(seed)
    module = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
    module(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    return module, optimizer, torch.amp.GradScaler("cpu", init_scale=2.0**seed)


def saved_state(seed):
    module, optimizer, scaler = trained(seed)
    return dict(
        format=checkpoint.FORMAT,
        config={},
        step=7,
        position=8,
        num_images=30,
        world_size=1,
        logged=6,
        sums=[1.0, 2.0, 3.0, 4.0],
        bad_steps=1,
        seconds=5.0,
        model=module.state_dict(),
        optimizer=optimizer.state_dict(),
        scaler=scaler.state_dict(),
    )


def test_a_training_state_is_put_back_whole(tmp_path):
    checkpoint.save(tmp_path / "last.pth", saved_state(1))
    module, optimizer, scaler = trained(2)
    found = checkpoint.restore(tmp_path / "last.pth", module, optimizer, scaler, lambda saved: [])
    expected, optimizer_then, _ = trained(1)
    assert (found["step"], found["position"]) == (7, 8)
    assert module.weight.equal(expected.weight)
    assert scaler.get_scale() == 2
    for p, q in zip(module.parameters(), expected.parameters()):
        assert optimizer.state[p]["momentum_buffer"].equal(
            optimizer_then.state[q]["momentum_buffer"]
        )


def test_what_cannot_be_continued_is_refused_before_anything_is_touched(model, tmp_path):
    module, optimizer, scaler = trained(2)
    before = module.weight.detach().clone()
    no_state = ("cannot be continued: it holds no training state", "its network can be evaluated")
    for contents, reasons, parts in (
        (dict(model=released(model)), [], no_state),
        ({k: v for k, v in saved_state(1).items() if k != "position"}, [], no_state),
        (
            saved_state(1),
            ["k: 5 then, 7 now"],
            ("was made with other options (k: 5 then, 7 now)", "--force-resume"),
        ),
        (
            saved_state(1) | {"model": {"weight": torch.zeros(2, 3)}},
            [],
            ("lacks 1 tensors, first bias",),
        ),
    ):
        checkpoint.save(tmp_path / "last.pth", contents)
        with pytest.raises(ValueError) as error:
            checkpoint.restore(
                tmp_path / "last.pth", module, optimizer, scaler, lambda saved, r=reasons: r
            )
        one_line(error, str(tmp_path / "last.pth"), *parts)
        assert module.weight.equal(before)


def test_another_optimizer_is_named_as_the_reason(tmp_path):
    checkpoint.save(tmp_path / "last.pth", saved_state(1))
    module, _, scaler = trained(2)
    optimizer = torch.optim.SGD([dict(params=[module.weight]), dict(params=[module.bias])], 0.1)
    with pytest.raises(ValueError) as error:
        checkpoint.restore(tmp_path / "last.pth", module, optimizer, scaler, lambda saved: [])
    one_line(error, "was made with another optimizer")


# ------------------------------------------------------------------------------------------ export


def test_torchvision_loads_the_backbone_and_misses_only_its_classifier():
    model = SlotCon("resnet18", K, HIDDEN, D)
    nn.init.constant_(model.teacher.backbone.bn1.weight, 3.0)
    theirs = torchvision.models.resnet18()
    missing, unexpected = theirs.load_state_dict(
        weights.backbone_state(model.state_dict()), strict=False
    )
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])
    assert theirs.bn1.weight.eq(3).all()  # the teacher's
    assert weights.backbone_state(model.state_dict(), "student")["bn1.weight"].eq(1).all()


def test_a_part_of_a_state_dict_is_named_without_its_prefix():
    assert checkpoint.part({"a.b": 1, "a.c.d": 2, "ab": 3, "x.a.b": 4}, "a.") == {"b": 1, "c.d": 2}
    assert checkpoint.some_keys({"a": 1, "b": 2, "c": 3, "d": 4}) == "a, b, c"


@pytest.mark.parametrize("missing", list(checkpoint.TRAINING))
def test_a_state_that_lacks_anything_a_run_needs_is_one_line(missing, tmp_path):
    state = saved_state(0)
    del state[missing]
    torch.save(state, tmp_path / "last.pth")
    module, optimizer, scaler = trained(1)
    with pytest.raises(ValueError) as error:
        checkpoint.restore(tmp_path / "last.pth", module, optimizer, scaler, lambda _: [])
    one_line(error, "cannot be continued: it holds no training state of this program")


def test_a_state_of_a_newer_program_is_refused(tmp_path):
    torch.save(dict(saved_state(0), format=checkpoint.FORMAT + 1), tmp_path / "last.pth")
    module, optimizer, scaler = trained(1)
    with pytest.raises(ValueError) as error:
        checkpoint.restore(tmp_path / "last.pth", module, optimizer, scaler, lambda _: [])
    one_line(error, "newer version of this program (format 2, this one reads up to 1)")
