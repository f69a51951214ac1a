"""Makes a full-size SDXL with random weights, to measure loading, memory and speed with.

It takes a folder with the published configurations and tokenizers (`base/`, `refiner/`) and writes
a MODEL_DIR: the same files, and safetensors with random numbers in them, 11.5 GB at 2 bytes a
number. Pictures made with it are noise.

    python -m tools.random_model --configs sdxl-1.0 --out sdxl-random
    MODEL_DIR=sdxl-random DTYPE=bfloat16 python handler.py --test_input '{"input": {...}}'
"""

import argparse
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sdxl_worker.loading.networks import NETWORKS, Network


def random_network(
    network: Network, folder: Path, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> torch.nn.Module:
    """The network of a configuration, with numbers that keep activations near unit size."""
    # Made on the meta device and then given memory: a 5 GB network never exists twice.
    module = network.build(folder).to(dtype).to_empty(device=device)
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            fan_in = parameter[0].numel()
            parameter.data.normal_(0.0, 1.0 / math.sqrt(fan_in))
        else:
            parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)  # biases, norm scales
    return module


def write_weights(root: Path, dtype: torch.dtype, device: str | torch.device = "cpu") -> None:
    """Write them beside the configurations of a MODEL_DIR, with a refiner or without."""
    networks = [network for network in NETWORKS.values() if (root / network.folder).is_dir()]
    for network in (bar := tqdm(networks, unit="network")):
        bar.set_description(network.folder)
        folder = root / network.folder
        module: Any = random_network(network, folder, dtype, device)
        module.save_pretrained(folder, variant="fp16" if dtype == torch.float16 else None)


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
