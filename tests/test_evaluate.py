"""evaluate.py and probes.py: what a checkpoint learned, in numbers."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
from engine import checkpoint, weights
from grouping import GroupingNetwork
from measures import labels, probes
from measures.metrics import IGNORE

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # pycocotools, older than numpy 2

K = 5
COLORS = torch.tensor([[200, 30, 30], [30, 200, 30], [30, 30, 200]], dtype=torch.uint8)  # of classes 0, 1, 2
NAMES = ("red", "green", "blue")


class ByColor(torch.nn.Module):
    """A network that has understood `COLORS`: prototype 4 - c owns the pixels of class c. Without eyes, 4 owns all."""

    def __init__(self, eyes=True):
        super().__init__()
        self.prototypes, self.eyes = torch.nn.Embedding(K, 3), eyes

    def forward(self, images):
        similarity = torch.zeros(len(images), K, *images.shape[-2:])
        if self.eyes:
            similarity.scatter_(1, 4 - images.argmax(1, keepdim=True), 1.0)  # over colors
        else:
            similarity[:, 4] = 1
        return None, similarity


def colored(n=5, y=6, x=7, seed=0):
    label = torch.randint(0, 3, (n, y, x), generator=torch.Generator().manual_seed(seed))
    return COLORS[label].permute(0, 3, 1, 2), label


def save_checkpoint(path, arch="tiny", **config):
    torch.manual_seed(1)
    network = GroupingNetwork(arch, K, 12, 6)
    state = {f"{which}.{k}": v for which in ("student", "teacher") for k, v in network.state_dict().items()}
    checkpoint.save(path, dict(model=state, config=dict(dict(image_size=32, temp_teacher=0.07), **config)))
    checkpoint.save(path.with_name("backbone.pth"), weights.backbone_state(state))
    return str(path)


@pytest.fixture
def trained(tmp_path):
    return save_checkpoint(tmp_path / "last.pth")


@pytest.fixture
def folder(tmp_path):
    """Seven pictures of unlike sizes with labels of three classes."""
    for i in range(7):
        label = np.random.default_rng(i).integers(0, 3, (34 + i, 40 - i))
        image = COLORS[torch.from_numpy(label)].numpy()
        label[0] = IGNORE
        for kind, array in (("images", image), ("labels", label.astype(np.uint8))):
            (tmp_path / "data" / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(tmp_path / "data" / kind / f"{i}.png")
    return tmp_path / "data"


def run(*argv, capsys):
    """Exit code, the JSON object at the end, everything printed, the error lines."""
    code = evaluate.main([str(word) for word in argv])
    out, err = capsys.readouterr()
    return code, json.loads(out.splitlines()[-1]) if code == 0 else None, out, err


# ------------------------------------------------------------------------------------- segmentation


def test_a_network_that_understands_scores_one_and_a_blind_one_the_largest_class():
    images, label = colored()
    report = evaluate.toy_report(ByColor(), ByColor(eyes=False), images, label, class_names=NAMES)
    for numbers in (report, report["rgb_kmeans"]):  # here color is all there is to know
        for key in ("nmi", "miou", "accuracy", "miou_many_to_one", "accuracy_many_to_one"):
            assert numbers[key] == pytest.approx(1)
    largest = label.flatten().bincount().max() / label.numel()
    assert report["untrained"]["accuracy"] == pytest.approx(float(largest))
    assert report["untrained"]["miou"] == pytest.approx(float(largest) / 3)
    assert report["untrained"]["nmi"] == 0 and report["untrained"]["prototypes_used"] == 1
    assert report["matching"] == {"red": 4, "green": 3, "blue": 2} and report["iou"]["red"] == 1
    assert report["occupied_per_image"] == 3 and report["prototypes_used"] == 3


def test_a_report_has_the_keys_of_result_json_for_every_method():
    report = evaluate.toy_report(ByColor(), ByColor(eyes=False), *colored(), class_names=NAMES)
    keys = {"nmi", "miou", "miou_many_to_one", "accuracy", "occupied_per_image", "prototypes_used"}
    for numbers in (report, report["untrained"], report["rgb_kmeans"]):
        assert keys <= numbers.keys()
    json.dumps(report, allow_nan=False)
    table = evaluate.format_table(report)
    for text in ("trained", "untrained network", "k-means on RGB", "mIoU", "one-to-one"):
        assert text in table


def test_one_to_one_and_many_to_one_are_kept_apart():
    tally = evaluate.Tally(K, ("a", "b"))
    segments = torch.tensor([[[0, 0, 0, 1, 1, 3]]])  # class a is split between prototypes 0 and 1
    tally.add(segments, torch.ones(1, K, dtype=torch.bool), torch.tensor([[[0, 0, 0, 0, 0, 1]]]))
    report = tally.report()
    assert (report["miou"], report["accuracy"]) == pytest.approx(((3 / 5 + 1) / 2, 4 / 6))
    assert report["miou_many_to_one"] == report["accuracy_many_to_one"] == 1
    assert report["iou"] == pytest.approx({"a": 3 / 5, "b": 1}) and report["matching"] == {"a": 0, "b": 3}


def test_a_class_without_a_pixel_is_none_in_json_and_not_nan():
    images, label = colored()
    report = evaluate.toy_report(ByColor(), ByColor(), images, label, class_names=(*NAMES, "absent"))
    assert report["iou"]["absent"] is None and report["miou"] == pytest.approx(1)


@pytest.mark.parametrize("batch_size", [1, 2, 7, 64])
def test_the_report_does_not_depend_on_the_batch_size(batch_size):
    torch.manual_seed(0)
    networks = [GroupingNetwork("tiny", K, 12, 6).double().eval() for _ in range(2)]
    networks = [Double(each) for each in networks]
    images, label = colored(7, 32, 36)
    one = evaluate.toy_report(*networks, images, label, class_names=NAMES, batch_size=batch_size)
    all_at_once = evaluate.toy_report(*networks, images, label, class_names=NAMES, batch_size=100)
    for key in ("nmi", "miou", "accuracy", "occupied_per_image"):
        assert one[key] == pytest.approx(all_at_once[key])
        assert one["rgb_kmeans"][key] == pytest.approx(all_at_once["rgb_kmeans"][key])


class Double(torch.nn.Module):
    """In float64, where no convolution library decides ties between prototypes by the size of the batch."""

    def __init__(self, network):
        super().__init__()
        self.network, self.prototypes = network, network.prototypes

    def forward(self, images):
        return self.network(images.double())


def test_the_rand_index_of_segments_without_names_is_a_mean_over_pictures():
    tally = evaluate.Tally(3, ())
    truth = torch.tensor([[[7, 7, 9, 9]], [[0, 0, 4, 4]]])
    segments = torch.tensor([[[2, 2, 0, 0]], [[0, 0, 2, 2]]])  # each perfect on its own, contradictory together
    tally.add(segments, torch.ones(2, 3, dtype=torch.bool), truth)
    assert tally.report()["adjusted_rand_index"] == 1
    tally.add(torch.zeros(2, 1, 4, dtype=torch.long), torch.ones(2, 3, dtype=torch.bool), truth)
    assert tally.report()["adjusted_rand_index"] == pytest.approx(0.5)


@pytest.mark.parametrize("num_groups", [9, 2000])
def test_kmeans_finds_three_colors_and_survives_more_centers_than_colors_or_pixels(num_groups):
    images, label = colored()
    segmenter = evaluate.rgb_kmeans(evaluate.sample_pixels(images.split(2)), num_groups)
    segments, present = segmenter(images)
    assert present.shape == (5, num_groups) and present.sum(1).eq(3).all()
    for c in range(3):
        assert len(segments[label == c].unique()) == 1


def test_pixels_are_sampled_from_every_picture_and_the_same_each_time():
    images = torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(4, 3, 5, 6)
    pixels = evaluate.sample_pixels(images.split(3), per_picture=8)
    assert pixels[:, 0].bincount().tolist() == [8, 8, 8, 8]
    assert pixels.equal(evaluate.sample_pixels(images.split(1), per_picture=8))


def test_the_untrained_network_is_random_always_the_same_and_leaves_the_generator_alone():
    config = dict(arch="tiny", num_prototypes=K, dim_hidden=12, dim_out=6)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one = evaluate.untrained_like(config, "cpu")
    assert torch.rand(1) == expected and not one.training
    two = evaluate.untrained_like(config, "cpu")
    assert one.prototypes.weight.equal(two.prototypes.weight) and one.prototypes.weight.shape == (K, 6)


def test_the_command_measures_any_labeled_folder_whatever_the_batch_and_the_workers(trained, folder, tmp_path, capsys):
    results = []
    for options in (["--batch-size", 1], ["--batch-size", 3, "--workers", 1]):
        code, result, out, _ = run("segmentation", trained, "--data-dir", folder, "--size", 32, *options,
                                   "--json", tmp_path / "out.json", capsys=capsys)
        assert code == 0 and json.loads((tmp_path / "out.json").read_text()) == result
        assert "k-means on RGB" in out and result["pictures"] == 7 and result["num_prototypes"] == K
        results.append(result["sizes"]["32"])
    assert results[0]["rgb_kmeans"] == results[1]["rgb_kmeans"]
    assert results[0]["accuracy"] == pytest.approx(results[1]["accuracy"], abs=1e-3)


def test_the_command_goes_through_a_tree_of_coco_stuff(trained, tmp_path, capsys):
    for name, fine in (("000000000002", 181), ("000000000001", 91), ("000000000003", 0)):
        for path, array in ((f"val2017/{name}.jpg", np.full((360, 370, 3), fine)),
                            (f"stuffthingmaps_trainval2017/val2017/{name}.png", np.full((360, 370), fine))):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array.astype(np.uint8)).save(tmp_path / path)
    where = ["--dataset", "coco_stuff", "--data-dir", tmp_path]
    code, result, out, _ = run("segmentation", trained, *where, capsys=capsys)
    assert code == 0 and result["pictures"] == 2 and result["classes"] == 27
    assert list(result["sizes"]) == ["320", "224"] and "NOT the published list" in result["notice"] in out
    assert set(result["sizes"]["320"]["iou"]) == set(labels.COARSE_NAMES)


def test_toy_scenes_need_no_folder_and_come_as_they_are_drawn_whatever_the_size_of_the_views(trained, capsys):
    code, result, _, _ = run("segmentation", trained, "--toy-scenes", 5, "--limit", 3, capsys=capsys)
    assert code == 0 and result["dataset"] == "toy" and result["pictures"] == 3 and list(result["sizes"]) == ["64"]


# -------------------------------------------------------------------------------------------- slots


def test_slot_counts_are_those_of_a_loop_over_pictures():
    images, label = colored()
    label[0], images[0] = 1, COLORS[1][:, None, None]
    batches = [(torch.arange(2), images[:2]), (torch.arange(2, 5), images[2:])]
    active, pictures_with = evaluate.slot_counts(ByColor(), batches)
    assert active.tolist() == [0, 0, 4, 5, 4]  # class c is prototype 4 - c; picture 0 has class 1 only
    assert pictures_with.tolist() == [0, 1, 0, 4, 0, 0]


def test_the_least_active_slots_are_the_least_of_those_ever_active():
    report = evaluate.slot_report(torch.tensor([3, 0, 9, 9, 1, 2, 4, 0]), torch.tensor([1, 0, 4, 0, 5, 0, 0, 0, 0]))
    assert [each["prototype"] for each in report["top"]] == [2, 3, 6, 0, 5]
    assert [each["prototype"] for each in report["bottom"]] == [4, 5, 0, 6, 3]
    assert [each["pictures"] for each in report["bottom"]] == [1, 2, 3, 4, 9]
    assert report["prototypes_used"] == 6 and report["pictures"] == 10 and report["occupied_per_image"] == 2.8


def test_slots_come_as_text_as_json_and_as_a_plot(trained, tmp_path, capsys):
    code, result, out, _ = run("slots", trained, "--limit", 6, "--plot", tmp_path / "p.png", capsys=capsys)
    assert code == 0 and result["pictures"] == sum(result["pictures_with"]) == 6 and len(result["active"]) == K
    assert f"{sum(result['active']) / 6:.2f} slots are active" in out and "most often" in out
    assert Image.open(tmp_path / "p.png").width > 800


# ------------------------------------------------------------------------------------------- probes


def test_cells_carry_the_shares_of_the_classes_they_cover():
    label = torch.tensor([[[0, 0, 1, 1], [0, 2, IGNORE, IGNORE]]])  # two cells: 3/4 class 0 + 1/4 class 2, all class 1
    backbone = torch.nn.AvgPool2d(2)
    backbone.register_parameter("unused", torch.nn.Parameter(torch.zeros(1)))
    features, shares = probes.collect_cells(backbone, [(None, (torch.zeros(1, 3, 2, 4), label))], 1, 3)
    assert features.shape == (2, 3)
    assert sorted(shares.tolist()) == [[0.0, 1.0, 0.0], [0.75, 0.0, 0.25]]


def test_cells_without_a_label_are_dropped_and_memory_is_bounded_with_every_picture_heard():
    backbone = torch.nn.AvgPool2d(2)
    backbone.register_parameter("unused", torch.nn.Parameter(torch.zeros(1)))
    images = torch.arange(6).repeat_interleave(3 * 8 * 8).reshape(6, 3, 8, 8).to(torch.uint8)
    label = torch.full((6, 8, 8), IGNORE)
    label[:, :4] = 1
    batches = [(None, (images[:3], label[:3])), (None, (images[3:], label[3:]))]
    assert len(probes.collect_cells(backbone, batches, 6, 3)[0]) == 6 * 8
    batches = [(None, (some, torch.ones(3, 8, 8, dtype=torch.long))) for some in images.split(3)]
    features, _ = probes.collect_cells(backbone, batches, 6, 3, most=12)
    assert len(features) == 12 and len(features[:, 0].unique()) == 6
    assert len(probes.collect_cells(backbone, batches, 6, 3, most=2)[0]) == 2


def test_the_linear_probe_learns_what_is_linear_whatever_the_scale_of_the_features():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(300, 4, generator=generator)
    classes = features[:, 1:].argmax(1)
    shares = torch.nn.functional.one_hot(classes, 3).float()
    for scale, shift in ((1, 0), (1000, 50)):
        classify = probes.linear_probe(features * scale + shift, shares)
        maps = (features * scale + shift)[None, :, :, None].transpose(1, 2)  # (b c h w) = (1, 4, 300, 1)
        accuracy = (classify(maps)[0, :, :, 0].argmax(0) == classes).float().mean()
        assert classify(maps).shape == (1, 3, 300, 1) and accuracy > 0.95


def test_a_neighbor_votes_with_its_classes_and_the_nearer_the_more():
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    shares = torch.tensor([[1.0, 0.0], [0.25, 0.75], [0.0, 1.0]])
    maps = torch.tensor([[2.0, 0.1], [0.1, 3.0]]).T.reshape(1, 2, 1, 2)
    scores = probes.neighbor_probe(features, shares)(maps)[0, :, 0]  # (t, w)
    assert scores[:, 0].tolist() == pytest.approx([1, 0], abs=1e-3)
    assert scores[:, 1].tolist() == pytest.approx([0.25, 0.75], abs=1e-3)
    between = torch.tensor([1.0, 1.1]).reshape(1, 2, 1, 1)  # the directions count, not the lengths
    classify = probes.neighbor_probe(features * torch.tensor([[1.0], [9.0], [5.0]]), shares)
    assert classify(between).equal(classify(between * 8)) and 0.3 < classify(between)[0, 0] < 0.9


def test_a_probe_is_scored_by_the_names_it_gives():
    images, label = colored()
    network = ByColor()
    network.backbone = torch.nn.Identity()  # its largest channel is the class
    classifiers = dict(right=lambda maps: maps, turned=lambda maps: maps.roll(1, dims=1))
    report = evaluate.score_probes(network, classifiers, [(None, (images, label))], NAMES)
    assert report["right"]["miou"] == report["right"]["accuracy"] == 1 and report["right"]["iou"]["green"] == 1
    assert report["turned"]["miou"] == report["turned"]["accuracy"] == 0


def test_probe_compares_with_a_random_backbone_and_learns_from_few_labels(trained, capsys):
    code, result, out, _ = run("probe", trained, "--toy-scenes", 6, "--labeled", 3, capsys=capsys)
    assert code == 0 and result["labeled_pictures"] == 3 and result["pictures"] == 6 and "random backbone" in out
    assert result["trained"] != result["random_backbone"]
    for row in ("trained", "random_backbone"):
        for kind in ("linear", "neighbors"):
            assert 0 < result[row][kind]["miou"] <= 1 and len(result[row][kind]["iou"]) == 8


# --------------------------------------------------------------------------------------- wrong input


def spoil_label(folder, array):
    Image.fromarray(array).save(folder / "labels" / "3.png")


WRONG = {
    "a missing checkpoint": (lambda f: ["segmentation", f / "none.pth"], "no checkpoint"),
    "a backbone without prototypes": (lambda f: ["slots", f.parent / "backbone.pth"], "backbone only"),
    "a folder that is not there": (lambda f: ["segmentation", "CHECKPOINT", "--data-dir", f / "no"], "no folder"),
    "no folder at all": (lambda f: ["segmentation", "CHECKPOINT", "--dataset", "voc"], "--data-dir is missing"),
    "an unknown data set": (lambda f: ["probe", "CHECKPOINT", "--dataset", "mars"], "invalid choice"),
    "no pictures": (lambda f: ["segmentation", "CHECKPOINT", "--size", 0], "less than 1"),
    "no number": (lambda f: ["segmentation", "CHECKPOINT", "--limit", "many"], "invalid whole value"),
    "an empty folder": (lambda f: ["slots", "CHECKPOINT", "--data-dir", f / "empty"], "no such folder"),
    "a missing label": (lambda f: (f / "labels" / "3.png").unlink(), "1 of 7 labels are missing"),
    "an id outside the classes": (lambda f: spoil_label(f, np.full((37, 37), 9, np.uint8)), "id 9, outside 0..2"),
    "unlike sizes": (lambda f: spoil_label(f, np.zeros((37, 38), np.uint8)), "37 x 37 but its label is 38 x 37"),
}


@pytest.mark.parametrize("case, workers", [(case, 0) for case in WRONG] + [("unlike sizes", 1)])
def test_wrong_input_ends_with_one_line_and_exit_code_2(case, workers, trained, folder, capsys):
    spoil, message = WRONG[case]
    argv = spoil(folder)
    if not isinstance(argv, list):
        argv = ["segmentation", "CHECKPOINT", "--data-dir", folder, "--num-classes", 3, "--size", 32]
    code, _, out, err = run(*(trained if w == "CHECKPOINT" else w for w in argv), "--workers", workers, capsys=capsys)
    assert code == 2 and message in err and err.startswith("evaluate.py: ") and err.count("\n") == 1 and not out


def test_a_probe_never_meets_a_picture_in_the_test_that_it_learned_from(trained, folder, capsys, monkeypatch):
    opened, open_labeled = [], evaluate.open_labeled
    monkeypatch.setattr(evaluate, "open_labeled", lambda *a: opened.append(open_labeled(*a)) or opened[-1])
    code, result, _, _ = run("probe", trained, "--data-dir", folder, "--dataset", "folder", "--size", 32, capsys=capsys)
    seen, unseen = ({each.images.name(i) for i in each.indices} for each in opened)
    assert code == 0 and not seen & unseen and len(seen | unseen) == 7
    assert (result["labeled_pictures"], result["pictures"]) == (len(seen), len(unseen))
    again = ["probe", trained, "--data-dir", folder, "--dataset", "folder", "--split", "train"]
    code, _, _, err = run(*again, capsys=capsys)
    assert code == 2 and "learns on the split train" in err


def test_a_probe_whose_parts_disagree_on_the_classes_is_one_line(trained, folder, capsys):
    for part, ids in (("train", (0, 6)), ("val", (0, 2))):
        for kind, name in (("images", "0.png"), ("labels", "0.png")):
            (folder / kind / part).mkdir()
            pixels = np.full((34, 40, 3) if kind == "images" else (34, 40), ids[0], np.uint8)
            pixels[5:] = ids[1]
            Image.fromarray(pixels).save(folder / kind / part / name)
    code, _, _, err = run("probe", trained, "--data-dir", folder, "--dataset", "folder", capsys=capsys)
    assert code == 2 and "the split train has 7 classes and the one to test on 3" in err and err.count("\n") == 1


def test_a_probe_of_segments_without_names_is_refused(trained, tmp_path, capsys):
    for split in ("train", "val"):
        for kind in ("images", "segments"):
            (tmp_path / kind / split).mkdir(parents=True)
            Image.new("L", (9, 9)).save(tmp_path / kind / split / "a.png")
    code, _, _, err = run("probe", trained, "--dataset", "bsds", "--data-dir", tmp_path, capsys=capsys)
    assert code == 2 and "have no names" in err


def test_the_help_advises(capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["segmentation", "--help"])
    assert "sizes and k come from it" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_the_shell_gets_the_exit_code():
    failed = subprocess.run([sys.executable, evaluate.__file__, "slots", "none.pth"], capture_output=True, text=True)
    assert failed.returncode == 2 and failed.stderr.startswith("evaluate.py: no checkpoint") and not failed.stdout


# --------------------------------------------------------------------------------- real photographs


@pytest.mark.skipif("SLOTCON_BSDS" not in os.environ, reason="needs SLOTCON_BSDS, a folder of photographs and segments")
def test_photographs_with_segments_are_measured(trained, capsys):
    code, result, _, _ = run("segmentation", trained, "--dataset", "bsds", "--data-dir", os.environ["SLOTCON_BSDS"],
                             "--limit", 3, "--size", 64, capsys=capsys)  # fmt: skip
    assert code == 0 and -1 < result["sizes"]["64"]["adjusted_rand_index"] < 1


@pytest.mark.skipif("SLOTCON_TINY_COCO" not in os.environ, reason="needs SLOTCON_TINY_COCO, 100 COCO photographs")
def test_photographs_with_instances_are_measured_and_probed(trained, capsys):
    where = ["--dataset", "coco_things", "--data-dir", os.environ["SLOTCON_TINY_COCO"], "--limit", 3, "--size", 64]
    for command in ("segmentation", "probe"):
        code, result, _, _ = run(command, trained, *where, capsys=capsys)
        assert code == 0 and result["pictures"] == 3
