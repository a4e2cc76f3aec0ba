"""measures/networks.py: what is measured, and what it is compared with."""

import torch

from measures.networks import open_backbone, open_network, untrained_backbone, untrained_network
from trained import K, save_checkpoint


def test_the_untrained_network_depends_on_the_seed_alone_and_leaves_the_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    network = untrained_network("tiny", K, 12, 6, seed=3)
    assert torch.rand(1) == expected and not network.training
    assert network.prototypes.weight.shape == (K, 6)
    again = untrained_network("tiny", K, 12, 6, seed=3).prototypes.weight
    assert network.prototypes.weight.equal(again)
    for name, tensor in untrained_backbone("tiny", seed=3).state_dict().items():
        assert tensor.equal(network.backbone.state_dict()[name])
    other = next(untrained_backbone("tiny", seed=4).parameters())
    assert not other.equal(next(network.backbone.parameters()))


def test_a_backbone_comes_from_a_whole_checkpoint_or_from_a_file_of_its_own(tmp_path):
    whole = save_checkpoint(tmp_path / "last.pth", image_size=40)
    network, config = open_network(whole, "teacher", "cpu")
    assert not network.training and config["image_size"] == 40
    sizes = dict(arch="tiny", num_prototypes=K, dim_hidden=12, dim_out=6)
    assert sizes.items() <= config.items()
    for path in (whole, tmp_path / "backbone.pth"):
        backbone, config = open_backbone(path, "teacher", "cpu")
        assert config["arch"] == "tiny" and not backbone.training
        for name, tensor in backbone.state_dict().items():
            assert tensor.equal(network.backbone.state_dict()[name])
    saved = torch.load(whole, weights_only=True)["model"]
    student, _ = open_network(whole, "student", "cpu")
    assert student.prototypes.weight.equal(saved["student.prototypes.weight"])
    name, weight = next(iter(open_backbone(whole, "student", "cpu")[0].state_dict().items()))
    assert weight.equal(saved[f"student.backbone.{name}"])
