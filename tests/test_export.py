"""Exported backbones load elsewhere and give the same features there. export.py."""

import errno
import os
import pickle

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import export
from backbone import RESNETS, build_backbone
from downstream import exported
from engine.program import run_program
from staged import difference


def trained(arch, seed):
    """A backbone in which no norm is the identity or zero: every tensor shows in the features."""
    torch.manual_seed(seed)
    backbone = build_backbone(arch)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 1)
            nn.init.normal_(module.bias, std=0.1)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return backbone.eval()


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """The folder of a run, and its backbones."""
    folder, names = tmp_path_factory.mktemp("run"), ("teacher", "student")
    states = {name: trained("resnet18", seed).state_dict() for seed, name in enumerate(names)}
    model = {f"{name}.backbone.{k}": v for name in names for k, v in states[name].items()}
    torch.save(dict(config=dict(arch="resnet18"), step=3, model=model), folder / "last.pth")
    return folder, states


def run(*arguments):
    return run_program("export.py", export.main, [str(argument) for argument in arguments])


@pytest.mark.parametrize("place, network", [
    ("last.pth", "teacher"), ("last.pth", "student"), (".", "teacher"),
])  # fmt: skip
def test_a_run_gives_both_networks(place, network, given, tmp_path, capsys):
    folder, states = given
    assert run(folder / place, "--network", network, "--output", tmp_path / "new" / "out.pth") == 0
    assert not difference(torch.load(tmp_path / "new" / "out.pth"), dict(states[network]))
    said = capsys.readouterr().out
    assert "features (1, 512, 4, 5) of a random image are identical" in said
    assert f" ({network}.backbone.*): resnet18, 120 tensors" in said


def test_resnet50_goes_into_torchvisions_networks(tmp_path):
    ours = trained("resnet50", 1)
    torch.save(ours.state_dict(), tmp_path / "backbone.pth")
    assert run(tmp_path / "backbone.pth", "--output", tmp_path / "out.pth") == 0
    state, network = torch.load(tmp_path / "out.pth"), torchvision.models.resnet50()
    keys = network.load_state_dict(state, strict=False)
    assert keys.missing_keys == ["fc.weight", "fc.bias"] and not keys.unexpected_keys
    image = torch.rand(1, 3, 65, 70)
    features = F.adaptive_avg_pool2d(ours(image), 1).flatten(1)
    torch.testing.assert_close(network.eval().fc(features), network(image))
    with torch.device("meta"):
        none = dict(weights=None, weights_backbone=None)
        fcn = torchvision.models.segmentation.fcn_resnet50(**none)
        detector = torchvision.models.detection.maskrcnn_resnet50_fpn(**none)
    fcn.backbone.load_state_dict(state, strict=True, assign=True)
    body = detector.backbone.body
    body.load_state_dict(state, strict=True, assign=True)
    assert torch.equal(body.eval()(image)["3"], ours(image))


def detectron2():
    """torchvision's layer -> detectron2's, as its modeling/backbone/resnet.py names them."""
    names = {"conv1": "stem.conv1", "bn1": "stem.conv1.norm"}
    for stage, count in enumerate(RESNETS["resnet50"][1]):
        for block in range(count):
            here, there = f"layer{stage + 1}.{block}.", f"res{stage + 2}.{block}."
            parts = [(f"conv{i}", f"bn{i}", f"conv{i}") for i in (1, 2, 3)]
            for conv, norm, name in [*parts, ("downsample.0", "downsample.1", "shortcut")]:
                names |= {here + conv: there + name, here + norm: f"{there}{name}.norm"}
    return names


def test_detectron2_gets_every_tensor_under_its_own_name(tmp_path, capsys):
    state, file, names = trained("resnet50", 1).state_dict(), tmp_path / "o.pkl", detectron2()
    torch.save(state, tmp_path / "backbone.pth")
    assert run(tmp_path / "backbone.pth", "--format", "detectron2", "--output", file) == 0
    said = capsys.readouterr().out
    assert 'INPUT.FORMAT "RGB"' in said and "are identical" in said
    assert said.endswith("; MODEL.RESNETS.DEPTH 50\n")
    contents = pickle.loads(file.read_bytes())
    assert contents["matching_heuristics"] is True and contents["__author__"] == "SlotCon"
    assert len(contents["model"]) == len(state)
    for name, value in state.items():
        layer, _, part = name.rpartition(".")
        assert (contents["model"][f"{names[layer]}.{part}"] == value.numpy()).all()


def test_an_export_that_fails_changes_no_file(given, tmp_path, monkeypatch, capsys):
    """Where the file would give other features, and onto a full disk."""

    def full(_file):
        raise OSError(errno.ENOSPC, "No space left on device")

    encoded, other, out = exported.encoded, trained("resnet18", 3).state_dict(), tmp_path / "o.pth"
    monkeypatch.setattr(exported, "encoded", lambda state, *more: encoded(other, *more))
    assert run(given[0] / "last.pth", "--output", out) == 1 and not out.exists()
    assert "would give other features than the checkpoint" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(os, "fsync", full)
    out.write_bytes(b"before")
    assert run(given[0] / "last.pth", "--output", out) == 2
    line = f"export.py: [Errno {errno.ENOSPC}] No space left on device: '{out}': make room"
    assert capsys.readouterr().err.startswith(line)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"before"]


def test_what_cannot_be_exported_is_refused_before_anything_is_written(given, tmp_path, capsys):
    torch.save(build_backbone("tiny").state_dict(), tmp_path / "tiny.pth")
    source, out = given[0] / "last.pth", tmp_path / "out.pth"
    (tmp_path / "folder.pth").mkdir()
    for arguments, complaint in (
        ([tmp_path / "tiny.pth", "--output", out], "train with --arch resnet18, for example"),
        ([source, "--output", tmp_path / "new" / "out.pkl"], "and *.pkl with --format detectron2"),
        ([source, "--output", tmp_path / "out.onnx"], "expected *.pth"),
        ([source], "--output"),
        ([tmp_path / "absent.pth", "--output", out], "there is no checkpoint"),
        ([source, "--output", tmp_path / "folder.pth"], "give another place by --output"),
        ([source, "--output", tmp_path / "tiny.pth" / "x.pth"], "cannot write"),
    ):
        assert run(*arguments) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("export.py: ") and complaint in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.pth", "tiny.pth"]


@pytest.mark.parametrize("output", ["sub/../last.pth", "link.pth", "hard.pth"])
def test_no_checkpoint_of_a_run_is_the_output(output, given, tmp_path, capsys):
    last, contents = tmp_path / "last.pth", (given[0] / "last.pth").read_bytes()
    last.write_bytes(contents)
    (tmp_path / "sub").mkdir()
    (tmp_path / "link.pth").symlink_to(last)
    (tmp_path / "hard.pth").hardlink_to(last)
    for source, to, reason in ((last, output, "the checkpoint itself"),
                               (tmp_path, output, "the checkpoint itself"),
                               (given[0] / "last.pth", last, "the last.pth of a run")):  # fmt: skip
        assert run(source, "--output", tmp_path / to) == 2
        assert f"is {reason}: give another name" in capsys.readouterr().err
    assert last.read_bytes() == contents and (tmp_path / "link.pth").is_symlink()
