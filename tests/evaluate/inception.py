"""FID's Inception with random weights: the architecture of inception-2015-12-05.pt, its names and its forward."""

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn


class Inception(nn.Module):
    """`layers` (3, 299, 299) -> (2048, 1, 1), `output` the classifier of 1008 classes, and the same arguments of forward."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers
        self.output = nn.Linear(2048, 1008)
        nn.init.normal_(self.output.weight, std=0.001)  # else random features make every class certain

    def forward(
        self, img: Tensor, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ) -> Tensor:
        grid = torch.eye(2, 3).unsqueeze(0).repeat(len(img), 1, 1)
        grid = nn.functional.affine_grid(grid, [len(img), 3, 299, 299], align_corners=False)
        img = nn.functional.grid_sample(img, grid, "bilinear", "border", align_corners=False)
        features = self.layers((img - 128) / 128).view(-1, 2048)
        if return_features:
            return features
        if no_output_bias:
            return nn.functional.softmax(nn.functional.linear(features, self.output.weight), dim=1)
        return nn.functional.softmax(self.output(features), dim=1)


def _layers() -> nn.Sequential:
    """The convolutions with the blocks that clean-fid patches to be TensorFlow's, and statistics that keep random features alive."""
    from cleanfid import inception_pytorch as blocks
    from torchvision.models import inception_v3

    net = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    patched = {
        "Mixed_5b": blocks.FIDInceptionA(192, pool_features=32),
        "Mixed_5c": blocks.FIDInceptionA(256, pool_features=64),
        "Mixed_5d": blocks.FIDInceptionA(288, pool_features=64),
        "Mixed_6b": blocks.FIDInceptionC(768, channels_7x7=128),
        "Mixed_6c": blocks.FIDInceptionC(768, channels_7x7=160),
        "Mixed_6d": blocks.FIDInceptionC(768, channels_7x7=160),
        "Mixed_6e": blocks.FIDInceptionC(768, channels_7x7=192),
        "Mixed_7b": blocks.FIDInceptionE_1(1280),
        "Mixed_7c": blocks.FIDInceptionE_2(2048),
    }
    for name, block in patched.items():
        setattr(net, name, block)
    order = (
        "Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "maxpool1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "maxpool2",
        "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e",
        "Mixed_7a", "Mixed_7b", "Mixed_7c",
    )  # fmt: skip
    return nn.Sequential(*(getattr(net, name) for name in order), nn.AvgPool2d(8, 8))


def save_inception(path: Path, seed: int = 0) -> Path:
    """A TorchScript file of it."""
    torch.manual_seed(seed)
    layers = _layers().train().requires_grad_(False)
    for norm in layers.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None  # the statistics of the batch below
    layers(torch.rand(2, 3, 299, 299) * 2 - 1)
    layers.eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.jit", category=FutureWarning)
        traced = torch.jit.trace(layers, torch.zeros(2, 3, 299, 299), check_trace=False)
        torch.jit.save(torch.jit.script(Inception(traced).eval()), str(path))
    return path
