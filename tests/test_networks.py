"""measures/networks.py: what is measured, and what it is compared with."""

import pytest
import torch
from torchvision.models import resnet18
from trained import K, save_checkpoint

from engine import checkpoint
from measures.networks import open_network, open_trunk, untrained_network, untrained_trunk


def test_the_untrained_network_is_random_always_the_same_and_leaves_the_generator_alone():
    sizes = dict(arch="tiny", num_prototypes=K, dim_hidden=12, dim_out=6)
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one = untrained_network(**sizes)
    assert torch.rand(1) == expected and not one.training
    two = untrained_network(**sizes)
    assert one.prototypes.weight.equal(two.prototypes.weight) and one.prototypes.weight.shape == (
        K,
        6,
    )


def test_the_untrained_trunk_is_that_of_the_untrained_network():
    network = untrained_network("tiny", K, 12, 6, seed=3)
    trunk = untrained_trunk("tiny", seed=3)
    for name, tensor in trunk.state_dict().items():
        assert tensor.equal(network.backbone.state_dict()[name])
    weight = next(untrained_trunk("tiny", seed=4).parameters())
    assert not weight.equal(next(trunk.parameters()))


def test_a_trunk_comes_from_a_whole_checkpoint_or_from_a_backbone(tmp_path):
    whole = save_checkpoint(tmp_path / "last.pth")
    network, _ = open_network(whole, "teacher", "cpu")
    for path in (whole, tmp_path / "backbone.pth"):
        trunk, config = open_trunk(path, "teacher", "cpu")
        assert config["arch"] == "tiny" and not trunk.training
        for name, tensor in trunk.state_dict().items():
            assert tensor.equal(network.backbone.state_dict()[name])


def test_a_trunk_of_torchvision_is_taken_with_its_classifier(tmp_path):
    torch.manual_seed(5)
    state = resnet18(weights=None).state_dict()
    checkpoint.save(tmp_path / "resnet18.pth", state)
    trunk, config = open_trunk(tmp_path / "resnet18.pth", "teacher", "cpu")
    assert config == dict(arch="resnet18") and trunk.conv1.weight.equal(state["conv1.weight"])


def test_a_backbone_has_no_network_and_no_student_and_each_refusal_is_one_line(tmp_path):
    save_checkpoint(tmp_path / "last.pth")
    for call, which, words in ((open_network, "teacher", "evaluate.py probe"),
                               (open_trunk, "student", "no student")):
        with pytest.raises(ValueError, match=words) as caught:
            call(tmp_path / "backbone.pth", which, "cpu")
        assert "backbone" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("call", [open_network, open_trunk])
def test_what_is_no_network_at_all_keeps_its_own_reason(call, tmp_path):
    checkpoint.save(tmp_path / "strange.pth", dict(model=dict(weight=torch.zeros(2))))
    with pytest.raises(ValueError, match="holds no SlotCon"):
        call(tmp_path / "strange.pth", "teacher", "cpu")
    with pytest.raises(ValueError, match="no checkpoint at"):
        call(tmp_path / "none.pth", "teacher", "cpu")
