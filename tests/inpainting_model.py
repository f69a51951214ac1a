"""The embedded model as a checkpoint for inpainting, whose UNet takes nine channels."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from sdxl_worker.settings import EMBEDDED_MODEL_DIR


def write(folder: Path, *, in_channels: int = 9) -> Path:
    """In diffusers layout, a base alone, laid out and described as the hub's are."""
    shutil.copytree(EMBEDDED_MODEL_DIR / "base", folder)
    edit(folder / "model_index.json", _class_name="StableDiffusionXLInpaintPipeline")
    edit(folder / "unet" / "config.json", in_channels=in_channels)
    [weights] = (folder / "unet").glob("*.safetensors")
    tensors = load_file(weights)
    tensors["conv_in.weight"] = widened(tensors["conv_in.weight"], in_channels)
    save_file(tensors, weights, {"format": "pt"})
    return folder


def widened(conv_in: torch.Tensor, in_channels: int = 9) -> torch.Tensor:
    """With random weights for the further channels, so that each of them counts."""
    outputs, own, *kernel = conv_in.shape
    more = torch.randn(
        (outputs, in_channels - own, *kernel), generator=torch.Generator().manual_seed(3)
    )
    return torch.cat([conv_in, (more / 20).to(conv_in.dtype)], dim=1)


def edit(path: Path, **values: object) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(config | values), encoding="utf-8")
