"""Small LoRAs, embeddings and checkpoints that fit the embedded model, of seeded random numbers."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.support import models

RANK = 4
WORD = "sunnyword"
# The modules of one LoRA: of the UNet, and of each text encoder.
UNET_MODULES = (
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v",
    "mid_block.attentions.0.transformer_blocks.0.ff.net.2",
    "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0",
)
TEXT_MODULE = "encoder.layers.0.self_attn.v_proj"


def write_lora(path: Path, seed: int, *, texts: bool = True, size: float = 0.5) -> Path:
    """In diffusers' and peft's naming, without alpha."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}

    def add(name: str, weight: torch.Tensor) -> None:
        rows, columns = weight.shape
        down = torch.randn(RANK, columns, generator=generator) / columns**0.5
        up = torch.randn(rows, RANK, generator=generator) / RANK**0.5 * size
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = down, up

    own = models()
    for module in UNET_MODULES:
        add(f"unet.{module}", own.unet.get_submodule(module).weight)
    if texts:
        first, second = own.text_encoder, own.text_encoder_2
        add(f"text_encoder.text_model.{TEXT_MODULE}", first.get_submodule(TEXT_MODULE).weight)
        module = second.get_submodule(f"text_model.{TEXT_MODULE}")
        add(f"text_encoder_2.text_model.{TEXT_MODULE}", module.weight)
    save_file(tensors, path)
    return path


def write_embedding(path: Path, seed: int, vectors: int = 2) -> Path:
    generator = torch.Generator().manual_seed(seed)
    own = models()
    widths = {
        "clip_l": own.text_encoder.config.hidden_size,
        "clip_g": own.text_encoder_2.config.hidden_size,
    }
    tensors = {
        name: torch.randn(vectors, width, generator=generator) for name, width in widths.items()
    }
    save_file(tensors, path)
    return path
