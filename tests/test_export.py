"""Exported trunks load elsewhere and give the same features there. export.py, trunks.py."""

import argparse
import pickle

import pytest
import torch
import torchvision
from torch import nn

import export
from backbone import build_trunk
from downstream import detectron2_names
from downstream.trunks import open_trunk, read_trunk
from engine.program import Stopped


def trained(arch, seed):
    """A trunk in which no norm is the identity or zero: every tensor shows in the features."""
    torch.manual_seed(seed)
    trunk = build_trunk(arch)
    for module in trunk.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.3, 1)
            nn.init.normal_(module.bias, std=0.1)
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
    return trunk


def kinds(arch, folder):
    """The same teacher and student in every kind of file that a trunk may come in."""
    teacher, student = (trained(arch, seed).state_dict() for seed in (1, 2))
    ours = {f"teacher.backbone.{k}": v for k, v in teacher.items()}
    ours |= {f"student.backbone.{k}": v for k, v in student.items()}
    ours |= {"student.projector.mlp.0.weight": torch.zeros(3), "center": torch.zeros(5)}
    released = {f"module.encoder_k.{k}": v for k, v in teacher.items()}
    released |= {f"module.encoder_q.{k}": v for k, v in student.items()}
    files = {
        "paused": dict(config=dict(arch=arch), step=3, model=ours),
        "released": dict(args=argparse.Namespace(arch=arch, dim=3), model=released),
        "backbone": teacher,
        "classifier": teacher | {"fc.weight": torch.zeros(9, 4), "fc.bias": torch.zeros(9)},
        "detectron2": dict(model=detectron2_names.to_detectron2(teacher), matching_heuristics=True),
    }
    for name, contents in files.items():
        torch.save(contents, folder / f"{name}.pth")
    return teacher, student


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    return folder, *kinds("resnet18", folder)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("kind", ["paused", "released", "backbone", "classifier", "detectron2"])
def test_the_trunk_is_found_in_every_kind_of_file(kind, files):
    folder, teacher, _ = files
    found = read_trunk(folder / f"{kind}.pth")
    assert found.arch == "resnet18" and equal(found.state, teacher)
    trunk, arch, line = open_trunk(str(folder / f"{kind}.pth"), "")
    assert equal(trunk.state_dict(), teacher) and arch == "resnet18"
    assert "120 of 120 tensors" in line and "none missing, none left over" in line


def test_the_folder_of_a_run_stands_for_its_last_checkpoint(files, tmp_path, capsys):
    folder, teacher, _ = files
    (tmp_path / "last.pth").write_bytes((folder / "paused.pth").read_bytes())
    assert equal(read_trunk(tmp_path).state, teacher)
    assert run(tmp_path, "--output", tmp_path / "out.pth") == 0
    assert f"read     {tmp_path}: resnet18" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["paused", "released"])
def test_the_student_is_another_network_of_the_same_file(kind, files):
    folder, teacher, student = files
    found = read_trunk(folder / f"{kind}.pth", "student")
    assert equal(found.state, student) and not equal(found.state, teacher)


@pytest.mark.parametrize("change, complaint", [
    (lambda s: s.pop("layer3.1.bn2.running_var"), "lacks 1 tensors, first layer3.1.bn2"),
    (lambda s: s.update(extra=torch.zeros(1)), "has 1 of its own, first extra"),
    (lambda s: s.update({"bn1.bias": torch.zeros(7)}), r"has bn1.bias as \(7,\) where \(64,\)"),
])  # fmt: skip
@pytest.mark.parametrize("config", [{}, dict(config=dict(arch="resnet18"))])
def test_a_trunk_that_is_not_whole_is_refused(change, complaint, config, files, tmp_path):
    _, teacher, _ = files
    state = dict(teacher)
    change(state)
    torch.save(dict(model=state, **config), tmp_path / "damaged.pth")
    with pytest.raises(ValueError, match=complaint):
        read_trunk(tmp_path / "damaged.pth")


def test_what_is_no_trunk_and_what_is_another_one_is_refused(files, tmp_path):
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="is none of"):
        read_trunk(tmp_path / "other.pth")
    with pytest.raises(ValueError, match="no checkpoint at"):
        read_trunk(tmp_path / "absent.pth")
    with pytest.raises(ValueError, match=r"--arch resnet50, but .* holds a resnet18"):
        open_trunk(str(files[0] / "paused.pth"), "resnet50")


def test_a_random_trunk_says_that_nothing_was_loaded():
    trunk, arch, line = open_trunk("random", "tiny")
    assert arch == "tiny" and trunk.stride == 4 and "none loaded" in line


def run(*arguments):
    return export.start([str(argument) for argument in arguments])


def test_resnet50_goes_to_torchvision_and_into_its_dense_networks(tmp_path, capsys):
    teacher, _ = kinds("resnet50", tmp_path)
    file = tmp_path / "out.pth"
    assert run(tmp_path / "paused.pth", "--output", file) == 0
    assert "features (1, 2048, 4, 5) of a random image are identical" in capsys.readouterr().out
    state = torch.load(file)
    network = torchvision.models.resnet50()
    keys = network.load_state_dict(state, strict=False)
    assert keys.missing_keys == ["fc.weight", "fc.bias"] and not keys.unexpected_keys
    trunk = build_trunk("resnet50")
    trunk.load_state_dict(teacher)
    image = torch.rand(1, 3, 65, 70)
    ours = trunk.eval()(image)
    stages = torchvision.models._utils.IntermediateLayerGetter(network.eval(), {"layer4": "out"})
    assert torch.equal(ours, stages(image)["out"])
    with torch.device("meta"):
        fcn = torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None)
        detector = torchvision.models.detection.maskrcnn_resnet50_fpn(
            weights=None, weights_backbone=None)  # fmt: skip
    fcn.backbone.load_state_dict(state, strict=True, assign=True)
    body = detector.backbone.body
    body.load_state_dict(state, strict=True, assign=True)
    assert torch.equal(body.eval()(image)["3"], ours)


@pytest.mark.parametrize("suffix", ["pkl", "pth"])
def test_detectron2_gets_its_own_names_and_the_same_features(suffix, files, tmp_path, capsys):
    file = tmp_path / f"out.{suffix}"
    assert run(files[0] / "released.pth", "--format", "detectron2", "--output", file) == 0
    said = capsys.readouterr().out
    assert "all 120 names of detectron2's R-18" in said and "are identical" in said
    assert 'INPUT.FORMAT "RGB"' in said
    contents = pickle.loads(file.read_bytes()) if suffix == "pkl" else torch.load(file)
    assert contents["matching_heuristics"] is True and contents["__author__"] == "SlotCon"
    assert "res2.0.conv1.norm.running_var" in contents["model"]


def names_of_detectron2_r50():
    """As detectron2's resnet.py names them: every convolution holds its norm."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    convs = ["stem.conv1"]
    for stage, blocks in (("res2", 3), ("res3", 4), ("res4", 6), ("res5", 3)):
        convs.append(f"{stage}.0.shortcut")
        convs += [f"{stage}.{block}.conv{i}" for block in range(blocks) for i in (1, 2, 3)]
    return {f"{c}.weight" for c in convs} | {f"{c}.norm.{n}" for c in convs for n in norm}


def test_the_names_of_resnet50_are_those_of_detectron2_and_lead_back():
    with torch.device("meta"):
        state = build_trunk("resnet50").state_dict()
    there = detectron2_names.to_detectron2(state)
    assert there.keys() == names_of_detectron2_r50() and len(there) == 318
    assert detectron2_names.to_torchvision(there).keys() == state.keys()
    for torchvision_name, name in {
        "conv1.weight": "stem.conv1.weight",
        "bn1.running_mean": "stem.conv1.norm.running_mean",
        "layer1.0.downsample.0.weight": "res2.0.shortcut.weight",
        "layer1.0.downsample.1.bias": "res2.0.shortcut.norm.bias",
        "layer2.3.conv3.weight": "res3.3.conv3.weight",
        "layer4.2.bn2.running_var": "res5.2.conv2.norm.running_var",
    }.items():
        assert there[name] is state[torchvision_name]


def test_a_file_that_gives_other_features_is_removed(files, tmp_path):
    folder, _, student = files
    found = read_trunk(folder / "paused.pth")
    torch.save(student, tmp_path / "wrong.pth")
    with pytest.raises(Stopped, match="gave other features than the checkpoint, by"):
        export.prove(found, "torchvision", tmp_path / "wrong.pth")
    assert not (tmp_path / "wrong.pth").exists()


def test_what_cannot_be_exported_is_refused_before_anything_is_written(files, tmp_path):
    tiny = {f"teacher.backbone.{k}": v for k, v in build_trunk("tiny").state_dict().items()}
    torch.save(dict(model=tiny | {"student.x": torch.zeros(1)}), tmp_path / "tiny.pth")
    with pytest.raises(ValueError, match="the trunk tiny, which no other library has"):
        run(tmp_path / "tiny.pth", "--output", tmp_path / "out.pth")
    with pytest.raises(ValueError, match=r"\*.pkl is for --format detectron2"):
        run(files[0] / "paused.pth", "--output", tmp_path / "out.pkl")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.pth"]
    with pytest.raises(ValueError, match="--output"):
        run(files[0] / "paused.pth")


@pytest.mark.parametrize("source", ["last.pth", ""])
@pytest.mark.parametrize("output", ["last.pth", "sub/../last.pth", "link.pth", "hard.pth"])
def test_the_checkpoint_itself_is_never_the_output(source, output, files, tmp_path):
    last = tmp_path / "last.pth"
    last.write_bytes((files[0] / "paused.pth").read_bytes())
    (tmp_path / "sub").mkdir()
    (tmp_path / "link.pth").symlink_to(last)
    (tmp_path / "hard.pth").hardlink_to(last)
    for form in ("torchvision", "detectron2"):
        with pytest.raises(ValueError, match=r"^--output .* is the checkpoint itself.*$"):
            run(tmp_path / source, "--format", form, "--output", tmp_path / output)
    assert last.read_bytes() == (files[0] / "paused.pth").read_bytes()
    assert (tmp_path / "link.pth").is_symlink()


def test_the_last_checkpoint_of_a_run_is_never_the_output_whatever_is_exported(files, tmp_path):
    last = tmp_path / "last.pth"
    last.write_bytes(b"the state of a training")
    with pytest.raises(ValueError, match=r"^--output .* is the last.pth of a run.*$"):
        run(files[0] / "paused.pth", "--output", last)
    assert last.read_bytes() == b"the state of a training"


def test_the_folder_of_the_output_is_made_and_a_place_that_takes_no_file_is_one_line(
    files, tmp_path
):
    checkpoint, file = files[0] / "paused.pth", tmp_path / "new" / "inner" / "out.pth"
    assert run(checkpoint, "--output", file) == 0 and file.is_file()
    with pytest.raises(ValueError, match=r"^cannot write .*inner: give another place by --output$"):
        run(checkpoint, "--output", file.parent)
    with pytest.raises(ValueError, match=r"^cannot make the folder of .*below\.pth: \w"):
        run(checkpoint, "--output", file / "below.pth")
    with pytest.raises(ValueError, match="--format detectron2"):
        run(checkpoint, "--output", tmp_path / "other" / "out.pkl")
    assert not (tmp_path / "other").exists()  # nothing is made for what is refused
