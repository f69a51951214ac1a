"""Small LoRAs, an embedding and a second model that fit the embedded one, of seeded random numbers.

Made without torch, for workers that are processes of their own.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save, save_file

from sdxl_worker.safetensors_header import read_header
from sdxl_worker.settings import EMBEDDED_MODEL_DIR

Tensors = dict[str, np.ndarray]

BASE = EMBEDDED_MODEL_DIR / "base"
RANK = 4
# By kohya's prefix: the network, and modules of it.
MODULES = {
    "lora_unet": (
        "unet",
        (
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
            "mid_block.attentions.0.transformer_blocks.0.ff.net.2",
            "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v",
        ),
    ),
    "lora_te1_text_model": ("text_encoder", ("encoder.layers.0.self_attn.v_proj",)),
    "lora_te2": ("text_encoder_2", ("text_model.encoder.layers.0.self_attn.v_proj",)),
}
TOKEN_EMBEDDINGS = {
    "clip_l": ("text_encoder", "embeddings.token_embedding.weight"),
    "clip_g": ("text_encoder_2", "text_model.embeddings.token_embedding.weight"),
}
WORD = "sunnyword"
OTHER_MODEL = "other"
FEW_STEP = {
    "few_step.family": "Own",
    "few_step.steps": "4",
    "few_step.scheduler": "LCM",
    "few_step.guidance_scale": "1.0",
}


def lora(seed: int) -> Tensors:
    """With kohya's names, for the UNet and both text encoders."""
    random = np.random.default_rng(seed)
    tensors: Tensors = {}
    for prefix, (network, modules) in MODULES.items():
        for module in modules:
            rows, columns = _shapes(network)[f"{module}.weight"]
            name = f"{prefix}_{module.replace('.', '_')}"
            down = random.standard_normal((RANK, columns), np.float32) / columns**0.5
            up = random.standard_normal((rows, RANK), np.float32) / (2 * RANK**0.5)
            tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = down, up
            tensors[f"{name}.alpha"] = np.full((), RANK, np.float32)
    return tensors


def embedding(seed: int) -> Tensors:
    """Two vectors for each encoder."""
    random = np.random.default_rng(seed)
    return {
        name: random.standard_normal((2, _shapes(network)[matrix][1]), np.float32)
        for name, (network, matrix) in TOKEN_EMBEDDINGS.items()
    }


def write_loras(folder: Path) -> None:
    """For `LORA_DIR`: one, two, fast (of few steps) and word (an embedding)."""
    folder.mkdir()
    save_file(lora(1), folder / "one.safetensors")
    save_file(lora(2), folder / "two.safetensors")
    save_file(lora(3), folder / "fast.safetensors", metadata=FEW_STEP)
    save_file(embedding(4), folder / "word.safetensors")


def write_models(folder: Path) -> None:
    """For `MODELS_DIR`: the embedded base with another end of its UNet, as `OTHER_MODEL`."""
    copy = folder / OTHER_MODEL / "base"
    shutil.copytree(BASE, copy)
    [path] = (copy / "unet").glob("*.safetensors")
    tensors = load_file(path)
    tensors["conv_out.weight"] *= np.float16(1.1)
    path.unlink()  # as read-only as what it is a copy of
    save_file(tensors, path)


def file_bytes(tensors: Tensors, metadata: dict[str, str] | None = None) -> bytes:
    return save(tensors, metadata)


def _shapes(network: str) -> Mapping[str, tuple[int, ...]]:
    [path] = (BASE / network).glob("*.safetensors")
    return read_header(path).shapes
