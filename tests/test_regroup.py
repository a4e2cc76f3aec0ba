"""A new start of the groups: what is drawn anew, where prototypes begin, what stays; and a run
that is interrupted around it is the run that was not. regroup.py.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from scipy.cluster.vq import kmeans2

import recipes
import regroup
import toy
import train
from photometric import normalize
from slotcon import SlotCon
from staged import difference, last_of, log_of, play

B, C, K, D, WIDTH, COUNT = 6, 5, 7, 4, 11, 3


def striped_maps():
    """Features (b c h w) of three classes in stripes of four cells, and the classes (b h w).

    Channels 0 and 1 say the class. Channels 2 to 4 say where in its stripe a cell lies, and vary
    twice as much: no class, though both views of a scene would agree about it.
    """
    generator = torch.Generator().manual_seed(0)
    classes = (torch.arange(12) // 4).expand(B, 10, 12)
    maps = 0.05 * torch.randn(B, C, 10, 12, generator=generator)
    corners = torch.tensor([[1.0, 0.0], [-0.5, 0.8], [-0.5, -0.8]])
    maps[:, :2] += rearrange(corners[classes], "b h w c -> b c h w")
    phase = torch.arange(12) % 4
    for channel in (2, 3, 4):
        maps[:, channel] += 2.0 * torch.cos(torch.pi / 2 * phase + channel)
    return maps, classes


def purity(found, classes):
    """Share of the pixels in the majority class of their cluster."""
    counts = torch.zeros(COUNT, 3)
    ones = torch.ones(found.numel())
    counts.index_put_((found.flatten(), classes.flatten()), ones, accumulate=True)
    return float(counts.max(dim=1).values.sum() / found.numel())


def test_clusters_are_what_neighbors_share_and_not_what_varies_most():
    maps, classes = striped_maps()
    assert purity(regroup.clusters(maps, COUNT, seed=1), classes) > 0.99
    rows = rearrange(maps, "b c h w -> (b h w) c").double().numpy()
    plain = torch.from_numpy(kmeans2(rows, COUNT, minit="++", rng=1, iter=20)[1]).long()
    assert purity(plain, classes) < 0.7  # which is why they are not left to plain k-means


def test_clusters_are_a_function_of_the_seed_and_of_nothing_else():
    maps = torch.randn(B, C, 8, 9, generator=torch.Generator().manual_seed(0))
    first = regroup.clusters(maps, COUNT, seed=1)
    torch.rand(3)
    assert first.shape == (B, 8, 9) and set(first.unique().tolist()) == set(range(COUNT))
    assert torch.equal(first, regroup.clusters(maps, COUNT, seed=1))
    assert not torch.equal(first, regroup.clusters(maps, COUNT, seed=2))


def test_a_channel_that_never_changes_is_no_trouble():
    maps, classes = striped_maps()
    maps[:, 4] = 0.3
    assert purity(regroup.clusters(maps, COUNT, seed=1), classes) > 0.99


def test_features_that_are_all_alike_are_one_cluster_and_no_trouble(recwarn):
    assert regroup.clusters(torch.ones(2, C, 4, 4), COUNT, seed=1).unique().tolist() == [0]
    assert not recwarn.list


def test_fewer_pixels_than_clusters_are_refused():
    with pytest.raises(ValueError, match="20 clusters need as many pixels, found 18"):
        regroup.clusters(torch.randn(2, C, 3, 3), 20, seed=0)


def test_the_noise_of_a_ramp_by_hand():
    """16 differences across are 0, 12 down are (2, 4): the smaller half are zeros."""
    y, x = torch.arange(4.0)[:, None], torch.arange(6.0)[None]
    ramp = torch.stack([y.expand(4, 6), 2 * y.expand(4, 6)])[None]
    assert torch.equal(regroup.neighbor_noise(ramp), torch.zeros(2, 2))
    both = torch.stack([y + x, x - y])[None]  # every difference is (2, 2) or (2, -2)
    assert torch.equal(regroup.neighbor_noise(both).diagonal(), torch.tensor([4.0, 4.0]))


def test_the_noise_is_the_slow_loop_over_the_smaller_half_of_the_differences():
    maps = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for image in maps:
        for y in range(4):
            for x in range(5):
                if x + 2 < 5:
                    found.append(image[:, y, x + 2] - image[:, y, x])
                if y + 2 < 4:
                    found.append(image[:, y + 2, x] - image[:, y, x])
    found = sorted(found, key=lambda difference: float(difference.norm()))
    kept = found[: (len(found) + 1) // 2]  # torch's median is the lower one
    expected = sum(torch.outer(difference, difference) for difference in kept) / len(kept)
    torch.testing.assert_close(regroup.neighbor_noise(maps), expected)


def test_least_squares_finds_the_layer_that_made_the_targets():
    generator = torch.Generator().manual_seed(0)
    inputs, weight, bias = (
        torch.randn(*shape, generator=generator) for shape in ((40, 6), (3, 6), (3,))
    )
    found = regroup.least_squares(inputs, inputs @ weight.T + bias)
    torch.testing.assert_close(found, (weight, bias), atol=1e-5, rtol=1e-5)


def test_no_other_layer_comes_closer_than_that_of_least_squares():
    generator = torch.Generator().manual_seed(0)
    inputs, targets = (torch.randn(40, size, generator=generator) for size in (6, 3))
    weight, bias = regroup.least_squares(inputs, targets)
    least = (inputs @ weight.T + bias - targets).square().sum()
    for _ in range(20):
        other = weight + 1e-2 * torch.randn(3, 6, generator=generator)
        assert (inputs @ other.T + bias - targets).square().sum() > least


# -------------------------------------------------------------------------------------- the model


def trained(group_weight=0.5):
    """A small model and an optimizer that has taken a step, and images (b 3 y x)."""
    torch.manual_seed(0)
    model = SlotCon("tiny", K, WIDTH, D, group_weight=group_weight)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step()
    model.update_teacher(0.5)  # so that the two differ
    return model, optimizer, torch.randn(B, 3, 32, 40)


def test_the_backbones_stay_and_all_else_is_drawn_anew_for_student_and_teacher_alike():
    model, optimizer, images = trained()
    before = copy.deepcopy(model.state_dict())
    regroup.start_groups_anew(model, optimizer, images, COUNT, seed=3)
    after = model.state_dict()
    for name, tensor in after.items():
        if ".backbone." in name:
            assert torch.equal(tensor, before[name]), name
        elif "running" not in name and "tracked" not in name:
            zeros = bool((tensor == 0).all() or (tensor == 1).all())  # biases, and norms' scales
            assert zeros or not torch.equal(tensor, before[name]), name
            if name.startswith("student."):
                assert torch.equal(tensor, after[name.replace("student.", "teacher.")]), name
    assert all(module.training for module in model.modules())
    assert {getattr(module, "momentum", 0.1) for module in model.modules()} == {0.1}


def test_the_pixels_of_a_cluster_point_at_its_prototype_in_both_networks():
    """Toy scenes, in which even an untrained backbone has something to tell apart."""
    torch.manual_seed(0)
    model = SlotCon("tiny", K, 64, 16)
    images = normalize(toy.ToyImages(0, 16).images)
    features = model.teacher.backbone.eval()(images).detach()
    model.teacher.backbone.train()
    own = regroup.clusters(features, COUNT, seed=3)
    regroup.start_groups_anew(model, torch.optim.AdamW(model.parameters()), images, COUNT, seed=3)
    for network in (model.student, model.teacher, copy.deepcopy(model.teacher).eval()):
        z = F.normalize(network.projector(features), dim=1)
        prototypes = F.normalize(network.prototypes.weight, dim=1)
        similarity = einsum(prototypes, z, "k d, b d h w -> b k h w")
        assert (similarity.argmax(dim=1) == own).float().mean() > 0.8  # 1 in 7 by chance
    expected = similarity.mean(dim=(0, 2, 3))
    torch.testing.assert_close(model.center, expected, atol=1e-4, rtol=1e-4)


def test_the_optimizer_forgets_what_is_drawn_and_keeps_the_rest():
    model, optimizer, images = trained()
    kept = {p: optimizer.state[p]["exp_avg"].clone() for p in model.student.backbone.parameters()}
    regroup.start_groups_anew(model, optimizer, images, COUNT, seed=3)
    assert all(torch.equal(optimizer.state[p]["exp_avg"], moment) for p, moment in kept.items())
    drawn = (model.student.projector, model.student.prototypes, model.predictor)
    assert not any(p in optimizer.state for module in drawn for p in module.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    optimizer.step()  # and starts over with them
    steps = {float(optimizer.state[p]["step"]) for module in drawn for p in module.parameters()}
    assert steps == {1.0}


def test_a_second_start_is_a_function_of_the_seed_and_leaves_the_generator_alone():
    model, optimizer, images = trained()
    others = [copy.deepcopy(model) for _ in range(2)]
    state = torch.get_rng_state()
    regroup.start_groups_anew(model, optimizer, images, COUNT, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(5)
    for other, seed in zip(others, (3, 4)):
        adamw = torch.optim.AdamW(other.parameters())
        regroup.start_groups_anew(other, adamw, images, COUNT, seed)
        assert bool(difference(model.state_dict(), other.state_dict())) == (seed != 3)
        drawn = (network.student.prototypes.weight for network in (model, other))
        assert torch.equal(*drawn) == (seed == 3)


def test_a_model_without_a_slot_loss_has_a_second_start_too():
    model, optimizer, images = trained(group_weight=1.0)
    before = model.student.prototypes.weight.clone()
    regroup.start_groups_anew(model, optimizer, images, COUNT, seed=3)
    assert model.predictor is None and not torch.equal(model.student.prototypes.weight, before)


def test_more_clusters_than_prototypes_are_refused_before_anything_changes():
    model, optimizer, images = trained()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="8 clusters need as many prototypes, found 7"):
        regroup.start_groups_anew(model, optimizer, images, K + 1, seed=3)
    assert not difference(model.state_dict(), before)


# ---------------------------------------------------------------------------------------- the run

SMALL = (
    "--preset toy --dataset toy --toy-scenes 16 --toy-test-scenes 8 --batch-size 4 --epochs 2 "
    "--warmup-epochs 0.25 --base-lr 0.16 --optimizer adamw --log-every 1"
).split()
SAID = "regroup  new projector, predictor and prototypes; 5 prototypes start in clusters"


def run_of(folder, *arguments):
    [run] = play(folder, *SMALL, *arguments, photographs=None)
    assert run.process.exitcode == 0, run.output
    return run.output


def test_with_two_starts_the_second_is_halfway_and_with_one_there_is_none(tmp_path):
    said = run_of(tmp_path / "with", "--group-starts", "2")
    assert said.count(SAID) == 1  # 5 prototypes: fewer than --group-clusters
    assert SAID not in run_of(tmp_path / "without", "--group-starts", "1")
    losses = [[line["loss"] for line in log_of(tmp_path / name)] for name in ("with", "without")]
    assert losses[0][:4] == losses[1][:4] and losses[0][4] != losses[1][4]


@pytest.mark.parametrize("steps", [3, 4, 5])
def test_a_run_interrupted_around_the_second_start_is_the_run_that_was_not(steps, tmp_path):
    run_of(tmp_path / "whole", "--group-starts", "2")
    before = run_of(tmp_path / "run", "--group-starts", "2", "--max-steps", str(steps))
    after = run_of(tmp_path / "run", "--group-starts", "2")
    assert (SAID in before, SAID in after) == (steps > 4, steps <= 4)
    states = [last_of(tmp_path / name) for name in ("whole", "run")]
    for part in ("model", "optimizer", "position"):
        assert not difference(*(state[part] for state in states)), part


@pytest.mark.slow
def test_two_processes_start_anew_with_the_same_weights(tmp_path):
    both = play(
        tmp_path / "run", *SMALL, "--group-starts", "2", photographs=None, processes=2
    )
    assert [run.process.exitcode for run in both] == [0, 0], both[0].output
    assert SAID in both[0].output and SAID not in both[1].output
    weights = [
        {name: tensor for name, tensor in run.model.items()
         if "running" not in name and "tracked" not in name}
        for run in both
    ]  # fmt: skip
    assert not difference(*weights)


def test_where_it_makes_no_sense_it_is_refused_with_a_line_that_says_what_to_do(tmp_path, capsys):
    for arguments, says in (
        (["--preset", "coco-r50", "--data-dir", str(tmp_path), "--group-starts", "2"],
         "--group-starts 2 is for toy scenes, and has not been measured on photographs"),
        (["--group-starts", "1", "--group-clusters", "5"], "add --group-starts N"),
    ):  # fmt: skip
        assert train.main(arguments) == 2
        said = capsys.readouterr().err
        assert says in said and said.count("\n") == 1


def test_the_toy_preset_starts_anew_and_every_published_one_starts_once():
    assert {name for name, c in recipes.PRESETS.items() if c.group_starts > 1} == {"toy"}
