"""What LoRAs cost: a step with none, one, two and four of them, and changing them at full size.

Steps: on the embedded model, in turns, so that what disturbs the machine disturbs all alike.
Changing: a LoRA of rank 32 for all linears in the attention blocks of the full-size UNet, with
random weights in half precision (5 GB), put on and taken off again.

    OMP_NUM_THREADS=1 python -m benchmarks.adapters
"""

import argparse
import gc
import hashlib
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from benchmarks import common
from benchmarks.sdxl_architecture import write_configs
from sdxl_worker.adapters.lora import Lora, read_lora
from sdxl_worker.adapters.patching import patches_of
from sdxl_worker.inputs.adapter_files import AdapterFile
from sdxl_worker.loading.model_dir import find_model_dir
from sdxl_worker.loading.models import Models, load_models
from sdxl_worker.loading.networks import NETWORKS
from sdxl_worker.placement import Placement
from sdxl_worker.safetensors_header import read_header
from sdxl_worker.settings import EMBEDDED_MODEL_DIR, Settings
from tools.random_model import random_network

COUNTS = (0, 1, 2, 4)
RANK = 32


def lora(models: Models, folder: Path, rank: int, seed: int = 0) -> Lora:
    """For all linears of the attention blocks, with kohya's names."""
    torch.manual_seed(seed)
    tensors = {}
    for name, weight in attention_weights(models).items():
        prefix = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
        rows, columns = weight.shape
        tensors[f"{prefix}.lora_down.weight"] = torch.randn(rank, columns).half() / 100
        tensors[f"{prefix}.lora_up.weight"] = torch.randn(rows, rank).half() / 100
        tensors[f"{prefix}.alpha"] = torch.tensor(float(rank))
    path = folder / f"{seed}.safetensors"
    save_file(tensors, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    file = AdapterFile(path, digest, path.name, read_header(path))
    return read_lora(file, 1.0, "loras[0].path", models)


def attention_weights(models: Models) -> dict[str, torch.Tensor]:
    """Of all linears in the attention blocks, by name."""
    return {
        f"{name}.weight": module.weight
        for name, module in models.unet.named_modules()
        if ".attentions." in name and isinstance(module, torch.nn.Linear)
    }


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def step_ratios(models: Models, folder: Path, rounds: int) -> dict[int, list[float]]:
    """For each count of LoRAs, the time of a UNet pass by that without any in the same round."""
    loras = [lora(models, folder, 8, seed) for seed in range(max(COUNTS))]
    config = models.unet.config
    inputs = (
        torch.randn(2, config.in_channels, config.sample_size, config.sample_size),
        torch.tensor(500),
        torch.randn(2, 77, config.cross_attention_dim),
    )
    width = models.text_encoder_2.config.projection_dim
    added = {"text_embeds": torch.randn(2, width), "time_ids": torch.full((2, 6), 128.0)}
    placed = [tensor.to(models.device, models.dtype) for tensor in (inputs[0], inputs[2])]
    added = {name: tensor.to(models.device, models.dtype) for name, tensor in added.items()}

    def pass_() -> None:
        for _ in range(5):
            models.unet(placed[0], inputs[1], placed[1], added_cond_kwargs=added)

    ratios: dict[int, list[float]] = {count: [] for count in COUNTS}
    with torch.no_grad():
        pass_()
        for _ in tqdm(range(rounds), unit="round"):
            times = {}
            for count in COUNTS:
                patches_of(models).apply(loras[:count])
                times[count] = seconds(pass_, models.device)
            for count in COUNTS:
                ratios[count].append(times[count] / times[0])
    patches_of(models).restore()
    return ratios


def full_size(embedded: Models, folder: Path) -> Models:
    """The embedded model with the UNet of SDXL, in half precision and with random weights."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    network = NETWORKS["unet"]
    unet: Any = random_network(
        network, write_configs(folder) / network.folder, torch.float16, device
    )
    return replace(embedded, unet=unet, placement=Placement(device, torch.float16, resident=True))


def changing(models: Models, folder: Path, rounds: int) -> dict[str, Any]:
    one, other = (lora(models, folder, RANK, seed) for seed in (0, 1))
    patches, device = patches_of(models), models.device
    before = digests(models)
    figures: dict[str, list[float]] = {"apply_s": [], "change_s": [], "restore_s": []}
    size, lost = 0, 0.0
    for _ in tqdm(range(rounds), unit="round"):
        figures["apply_s"].append(seconds(lambda: patches.apply([one]), device))
        size, lost = patches.originals_bytes, patches.lost
        figures["change_s"].append(seconds(lambda: patches.apply([other]), device))
        figures["restore_s"].append(seconds(patches.restore, device))
    return {
        "modules": len(before),
        "rank": RANK,
        "file_mb": round((folder / "0.safetensors").stat().st_size / 1e6),
        # Of each round: in the first, the machine gives the originals their memory.
        **{name: [round(it, 2) for it in values] for name, values in figures.items()},
        "originals_gb": round(size / 1e9, 2),
        "lost": round(lost, 4),
        "bit_equal_after": before == digests(models),
    }


def digests(models: Models) -> list[str]:
    return [
        hashlib.sha256(weight.detach().cpu().view(torch.uint8).numpy().data).hexdigest()
        for weight in attention_weights(models).values()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=30, help="of steps (default: 30)")
    parser.add_argument(
        "--changes", type=int, default=5, help="at full size; 0 for none (default: 5)"
    )
    parser.add_argument("--out", type=Path, default=common.RESULTS_DIR)
    arguments = parser.parse_args()

    embedded = load_models(find_model_dir(Settings(model_dir=EMBEDDED_MODEL_DIR)))
    result: dict[str, Any] = common.machine(embedded.device.type)
    with tempfile.TemporaryDirectory() as folder:
        ratios = step_ratios(embedded, Path(folder), arguments.rounds)
        result["step_by_one_without"] = {
            str(count): {
                "median": round(statistics.median(values), 3),
                "quartiles": [round(it, 3) for it in statistics.quantiles(values, n=4)[::2]],
            }
            for count, values in ratios.items()
        }
        if arguments.changes:
            gc.collect()
            result["full_size"] = changing(
                full_size(embedded, Path(folder) / "model"), Path(folder), arguments.changes
            )
    path = arguments.out / f"adapters-{'cuda' if torch.cuda.is_available() else 'cpu'}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
