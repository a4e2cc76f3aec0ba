"""Networks of timm, where it is installed, as backbones: any by its name there."""

import difflib
from functools import partial
from types import MethodType

import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as TF


def build(name: str, pretrained: bool = False) -> nn.Module:
    """A network of timm under timm's names of tensors, which gives its last map [U].

    Any whose features form a map; tokens of a ViT are put back on their grid. Raises ValueError.
    """
    try:
        import timm
    except ImportError:
        raise ValueError(f"--arch timm:{name} needs timm: pip install timm") from None
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), 1)
        advice = f": did you mean {near[0]}?" if near else ""
        raise ValueError(f"timm has no {name}{advice}")
    create = partial(timm.create_model, name, pretrained, num_classes=0)
    try:
        try:
            model, size = create(dynamic_img_size=True), 224  # a ViT then takes views of any size
        except TypeError:
            model = create()
            size = model.pretrained_cfg["input_size"][-1]
    except Exception as error:  # of a network, a server, a file: of every kind
        line = str(error).partition("\n")[0]
        raise ValueError(f"timm could not make {name}: {line}; weights: --init FILE") from None
    model.forward = MethodType(last_map, model)
    with torch.enable_grad():
        maps = model.eval()(torch.zeros(1, 3, size, size))
        maps.sum().backward()
    for weight in model.parameters():  # one without a gradient comes after the map
        weight.requires_grad_(weight.grad is not None)
        weight.grad = None
    model.out_channels, model.stride = maps.shape[1], size // maps.shape[2]
    return model.train()


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
