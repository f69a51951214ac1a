"""Writes what peft trained as the adapter files that are in circulation: kohya's names and keys.

`lora_unet_` and the original SDXL's ("sgm") name of the module, `lora_te1_` and `lora_te2_` and the
transformers name of the text encoders' modules, dots as underscores; below each `lora_down.weight`,
`lora_up.weight`, `alpha` and, where magnitude and direction are parted (DoRA), `dora_scale`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from sdxl_worker.adapters.module_names import original_names

ARCHITECTURE = "stable-diffusion-xl-v1-base/lora"
ADAPTER = "default"
"""The name that peft gives the only adapter there is."""


def _key(prefix: str, name: str) -> str:
    return f"{prefix}_{name.replace('.', '_')}"


def modules_by_key(pipeline: StableDiffusionXLPipeline) -> dict[str, nn.Module]:
    """Every module that an adapter may name, by its kohya key.

    Of a module that peft has wrapped, the wrapper.
    """
    found: dict[str, nn.Module] = {}
    with torch.device("meta"):  # as it was before peft put its own within
        plain = UNet2DConditionModel.from_config(pipeline.unet.config)
    for name, original in original_names(plain).items():
        found[_key("lora_unet", original)] = pipeline.unet.get_submodule(name)
    for number, encoder in enumerate((pipeline.text_encoder, pipeline.text_encoder_2), start=1):
        for name, module in _modules(encoder):
            if "encoder.layers." in name:
                # Only some releases of transformers have the level "text_model".
                whole = "text_model." + name.removeprefix("text_model.")
                found[_key(f"lora_te{number}", whole)] = module
    return found


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        within_wrapper = {"base_layer", f"lora_A.{ADAPTER}", f"lora_B.{ADAPTER}"}
        if isinstance(module, (nn.Linear, nn.Conv2d, LoraLayer)) and not any(
            name.endswith(f".{part}") for part in within_wrapper
        ):
            yield name, module


def trained_tensors(pipeline: StableDiffusionXLPipeline) -> dict[str, Tensor]:
    """What peft trained in UNet and text encoders, under kohya's keys, in half precision."""
    tensors: dict[str, Tensor] = {}
    for key, module in modules_by_key(pipeline).items():
        if not isinstance(module, LoraLayer):
            continue
        up = module.lora_B[ADAPTER].weight
        tensors[f"{key}.lora_down.weight"] = module.lora_A[ADAPTER].weight
        tensors[f"{key}.lora_up.weight"] = up
        tensors[f"{key}.alpha"] = torch.tensor(float(module.lora_alpha[ADAPTER]))
        if ADAPTER in module.lora_magnitude_vector:
            # One number for each output row, with as many axes as the weight.
            magnitude = module.lora_magnitude_vector[ADAPTER].weight
            tensors[f"{key}.dora_scale"] = magnitude.reshape(-1, *(1,) * (up.dim() - 1))
    return {
        name: tensor.detach().half().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write the file; what every adapter's header says is added to `metadata`."""
    common = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": ARCHITECTURE,
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.license": "MIT",
        "modelspec.prediction_type": "epsilon",
        "modelspec.resolution": "128x128",
        "ss_base_model_version": "sdxl_base_v1-0",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), path, metadata={**common, **metadata})
