"""Makes a full-size SDXL with random weights: loading, memory and speed can be measured with it.

It takes a folder with the published configurations and tokenizers (`base/`, `refiner/`) and writes
a MODEL_DIR: the same files, and safetensors with random numbers in them, 11.5 GB at 2 bytes a
number. Pictures made with it are noise.

    python -m builder.random_model --configs sdxl-1.0 --out sdxl-random
    MODEL_DIR=sdxl-random DTYPE=bfloat16 python handler.py --test_input '{"input": {...}}'
"""

import argparse
import math
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

NETWORKS = {
    "base/text_encoder": CLIPTextModel,
    "base/text_encoder_2": CLIPTextModelWithProjection,
    "base/unet": UNet2DConditionModel,
    "base/vae": AutoencoderKL,
    "refiner/unet": UNet2DConditionModel,
}


def meta_network(kind: type, folder: Path) -> torch.nn.Module:
    """The network of a configuration, its tensors without memory."""
    with torch.device("meta"):
        if kind in (CLIPTextModel, CLIPTextModelWithProjection):
            network = kind(CLIPTextConfig.from_pretrained(folder))
        else:
            network = kind.from_config(kind.load_config(folder))  # type: ignore[attr-defined]
    return network.eval()


def random_network(
    kind: type, folder: Path, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> torch.nn.Module:
    """The network of a configuration, with numbers that keep activations near unit size."""
    # Made on the meta device and then given memory: a 5 GB network never exists twice.
    network = meta_network(kind, folder).to(dtype).to_empty(device=device)
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1:
            fan_in = parameter[0].numel()
            parameter.data.normal_(0.0, 1.0 / math.sqrt(fan_in))
        else:
            parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)  # biases, norm scales
    return network


def write_weights(root: Path, dtype: torch.dtype, device: str | torch.device = "cpu") -> None:
    """Beside the configurations of a MODEL_DIR."""
    for name, kind in (bar := tqdm(NETWORKS.items(), unit="network")):
        bar.set_description(name)
        variant = "fp16" if dtype == torch.float16 else None
        network = random_network(kind, root / name, dtype, device)
        network.save_pretrained(root / name, variant=variant)  # type: ignore[operator]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configs", type=Path, required=True, help="folder with base/, refiner/")
    parser.add_argument("--out", type=Path, required=True, help="the MODEL_DIR to make")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    shutil.copytree(
        arguments.configs,
        arguments.out,
        ignore=shutil.ignore_patterns("*.safetensors"),
        copy_function=shutil.copyfile,
        dirs_exist_ok=True,
    )
    write_weights(arguments.out, getattr(torch, arguments.dtype))


if __name__ == "__main__":
    main()
