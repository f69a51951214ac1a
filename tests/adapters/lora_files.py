"""Files of LoRAs, written for the tests."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from sdxl_worker.adapters.lora import Lora, read_lora
from sdxl_worker.adapters.patching import patches_of
from sdxl_worker.inputs.adapter_files import AdapterFile
from sdxl_worker.loading.models import Models
from sdxl_worker.safetensors_header import read_header

FIELD = "loras[0].path"
NETWORKS = ("unet", "text_encoder", "text_encoder_2")

Tensors = Mapping[str, torch.Tensor]


def adapter_file(
    path: Path, tensors: Tensors, metadata: dict[str, str] | None = None
) -> AdapterFile:
    """What a job gets of such a file, once it is fetched."""
    contiguous = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
    save_file(contiguous, path, metadata=metadata)
    return saved(path)


def saved(path: Path) -> AdapterFile:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return AdapterFile(path, digest, path.name, read_header(path))


def lora_of(
    folder: Path,
    models: Models,
    tensors: Tensors,
    scale: float = 1.0,
    *,
    name: str = "style.safetensors",
    metadata: dict[str, str] | None = None,
) -> Lora:
    return read_lora(adapter_file(folder / name, tensors, metadata), scale, FIELD, models)


def apply(models: Models, *loras: Lora) -> None:
    patches_of(models).apply(loras)


def weights(models: Models) -> dict[str, torch.Tensor]:
    """A copy of all that a LoRA may change."""
    return {
        f"{network}.{name}": tensor.detach().clone()
        for network in NETWORKS
        for name, tensor in getattr(models, network).named_parameters()
    }


def changed_weights(models: Models, before: Tensors) -> dict[str, torch.Tensor]:
    now = weights(models)
    return {
        name: now[name] for name, tensor in before.items() if not torch.equal(tensor, now[name])
    }


def low_rank(weight: torch.Tensor, rank: int = 4) -> dict[str, torch.Tensor]:
    """A LoRA for a weight, in kohya's parts, about a tenth of it in size."""
    weight = weight.detach()
    down = torch.randn(rank, *weight.shape[1:]) * weight.std() * 0.1
    up = torch.randn(weight.shape[0], rank, *[1] * (weight.ndim - 2))
    return {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(rank / 2)}
