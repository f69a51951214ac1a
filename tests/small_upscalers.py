"""Files of small upscalers, as trainers write them, with random weights."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

FEATURES = 8


def compact(scale: int = 2, *, channels: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors of a "Real-ESRGAN Compact", which looks no further than three pixels: it adds what
    its convolutions find to each pixel of the picture, repeated."""
    torch.manual_seed(seed)
    layers = {
        "body.0": nn.Conv2d(channels, FEATURES, 3),
        "body.1": nn.PReLU(FEATURES),
        "body.2": nn.Conv2d(FEATURES, FEATURES, 3),
        "body.3": nn.PReLU(FEATURES),
        "body.4": nn.Conv2d(FEATURES, channels * scale**2, 3),
    }
    return {
        f"{name}.{key}": tensor.detach().clone()
        for name, layer in layers.items()
        for key, tensor in layer.state_dict().items()
    }


def write(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """As .safetensors, or as a pickle of torch."""
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path
