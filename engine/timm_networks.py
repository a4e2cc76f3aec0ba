"""Networks of timm, where it is installed, as backbones: any by its name there."""

import logging
from types import MethodType

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as TF

from engine.log import say


def build(name: str, pretrained: bool = False) -> nn.Module:
    """A network of timm under timm's names of tensors, which gives its last map [U].

    Any whose features form a map; tokens of a ViT are put back on their grid. Raises ValueError.
    """
    try:
        import timm

        if pretrained:
            say(f"looks for the weights of {name}, here and then in the network")
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # a line for every try
        try:  # a ViT then takes views of any size
            model = timm.create_model(name, pretrained, num_classes=0, dynamic_img_size=True)
        except TypeError:
            model = timm.create_model(name, pretrained, num_classes=0)
    except ImportError:
        raise ValueError(f"--arch timm:{name} needs timm: pip install timm") from None
    except Exception as error:  # of a network, a server, a file: of every kind
        line = str(error).partition("\n")[0]
        advice = "; without a network, give the weights by --init FILE" * pretrained
        raise ValueError(f"timm could not make {name}: {line}{advice}") from None
    model.forward = MethodType(last_map, model)
    prepare(model.eval())
    return model.train()


def prepare(model: nn.Module) -> None:
    """Give it `out_channels` and `stride`, and freeze what comes after the map.

    Found on the device "meta", which has shapes and gradients and computes nothing.
    """
    empty = {
        name: torch.empty_like(tensor, device="meta", requires_grad=tensor.requires_grad)
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    size = model.pretrained_cfg["input_size"][-1]
    images = torch.empty(1, 3, size, size, device="meta")
    with torch.enable_grad():
        maps = torch.func.functional_call(model, empty, images)
        maps.sum().backward()
    for name, weight in model.named_parameters():
        weight.requires_grad_(empty[name].grad is not None)
    model.out_channels, model.stride = maps.shape[1], size // maps.shape[2]


def last_map(model: nn.Module, images: Tensor) -> Tensor:
    """images (b 3 y x), normalized as for ImageNet -> the last map of a timm network (b c h w).

    Raises ValueError for a size that the network does not take.
    """
    from timm.data import IMAGENET_DEFAULT_MEAN as MEAN
    from timm.data import IMAGENET_DEFAULT_STD as STD

    expected = [tuple(model.pretrained_cfg[name]) for name in ("mean", "std")]
    if expected != [MEAN, STD]:  # some ViTs are trained with other ones
        undone = ([-m / s for m, s in zip(MEAN, STD)], [1 / s for s in STD])
        images = TF.normalize(TF.normalize(images, *undone), *map(list, expected))
    try:
        return model.forward_intermediates(images, 1, norm=True, intermediates_only=True)[0]
    except AssertionError as error:
        size = " x ".join(map(str, images.shape[-2:]))
        raise ValueError(f"the backbone does not take views of {size} px: {error}") from None
