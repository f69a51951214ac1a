"""IP-Adapters and image encoders with random weights, in the layout of `h94/IP-Adapter`."""

import functools
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from sdxl_worker.loading.ip_adapters import attentions_to_text

PLAIN = "sdxl_models/ip-adapter_sdxl_vit-h.safetensors"
PLUS = "sdxl_models/ip-adapter-plus_sdxl_vit-h.safetensors"
FACE = "sdxl_models/ip-adapter-plus-face_sdxl_vit-h.safetensors"
ENCODER = "models/image_encoder"

Tensors = dict[str, torch.Tensor]


def make_encoder(
    folder: Path, *, hidden_size: int = 32, projection_dim: int = 24, seed: int = 0
) -> None:
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=hidden_size,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=projection_dim,
        # Larger than for training, or all pictures would look the same.
        initializer_range=0.3,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(folder)


def plain_adapter(unet: Any, *, features: int = 24, tokens: int = 4, seed: int = 1) -> Tensors:
    random = functools.partial(_random, torch.Generator().manual_seed(seed))
    width = unet.config.cross_attention_dim
    return {
        "image_proj.proj.weight": random(tokens * width, features),
        "image_proj.proj.bias": random(tokens * width),
        "image_proj.norm.weight": 1 + 0.1 * random(width),
        "image_proj.norm.bias": 0.1 * random(width),
        **_keys_and_values(unet, random),
    }


def plus_adapter(
    unet: Any, *, features: int = 32, tokens: int = 6, blocks: int = 4, seed: int = 2
) -> Tensors:
    random = functools.partial(_random, torch.Generator().manual_seed(seed))
    width, inside, heads = unet.config.cross_attention_dim, 40, 128
    tensors = {
        "latents": random(1, tokens, inside),
        "proj_in.weight": random(inside, features),
        "proj_in.bias": random(inside),
        "proj_out.weight": random(width, inside),
        "proj_out.bias": random(width),
        "norm_out.weight": 1 + 0.1 * random(width),
        "norm_out.bias": 0.1 * random(width),
    }
    for i in range(blocks):
        block = {
            "0.norm1.weight": 1 + 0.1 * random(inside),
            "0.norm1.bias": 0.1 * random(inside),
            "0.norm2.weight": 1 + 0.1 * random(inside),
            "0.norm2.bias": 0.1 * random(inside),
            "0.to_q.weight": random(heads, inside),
            "0.to_kv.weight": random(2 * heads, inside),
            "0.to_out.weight": random(inside, heads),
            "1.0.weight": 1 + 0.1 * random(inside),
            "1.0.bias": 0.1 * random(inside),
            "1.1.weight": random(4 * inside, inside),
            "1.3.weight": random(inside, 4 * inside),
        }
        tensors |= {f"layers.{i}.{name}": tensor for name, tensor in block.items()}
    in_file = {f"image_proj.{name}": tensor for name, tensor in tensors.items()}
    return {**in_file, **_keys_and_values(unet, random)}


def make_ip_adapters(folder: Path, unet: Any) -> None:
    """A folder for `IP_ADAPTER_DIR`: plain, plus and face, for a UNet of any size."""
    make_encoder(folder / ENCODER)
    for name, tensors in {
        PLAIN: plain_adapter(unet),
        PLUS: plus_adapter(unet),
        FACE: plus_adapter(unet, seed=3),
    }.items():
        save(tensors, folder / name)


def save(tensors: Tensors, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)


def _keys_and_values(unet: Any, random: Any) -> Tensors:
    return {
        f"ip_adapter.{2 * i + 1}.to_{which}_ip.weight": random(*attention.to_k.weight.shape)
        for i, attention in enumerate(attentions_to_text(unet))
        for which in "kv"
    }


def _random(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])
