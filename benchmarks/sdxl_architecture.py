"""The configurations of SDXL 1.0, so that it can be measured at full size without its files.

What is not listed is the default of diffusers and transformers. A test compares all of it with the
published configurations, where they are at hand.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from sdxl_worker.settings import EMBEDDED_MODEL_DIR

_UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "sample_size": 128,
    "use_linear_projection": True,
}
_CLIP: dict[str, Any] = {
    "model_type": "clip_text_model",
    "bos_token_id": 0,
    "eos_token_id": 2,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "base/text_encoder": _CLIP
    | {
        "hidden_act": "quick_gelu",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "projection_dim": 768,
    },
    "base/text_encoder_2": _CLIP
    | {
        "hidden_act": "gelu",
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_attention_heads": 20,
        "num_hidden_layers": 32,
        "projection_dim": 1280,
    },
    "base/unet": _UNET
    | {
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "projection_class_embeddings_input_dim": 2816,
        "transformer_layers_per_block": [1, 2, 10],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    },
    "base/vae": {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "force_upcast": False,  # as in the VAE that is made for fp16; true in the original
        "layers_per_block": 2,
        "sample_size": 1024,
        "scaling_factor": 0.13025,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
    "refiner/unet": _UNET
    | {
        "attention_head_dim": [6, 12, 24, 24],
        "block_out_channels": [384, 768, 1536, 1536],
        "cross_attention_dim": 1280,
        "down_block_types": [
            "DownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
            "DownBlock2D",
        ],
        "projection_class_embeddings_input_dim": 2560,
        "transformer_layers_per_block": 4,
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    },
}


def write_configs(folder: Path) -> Path:
    """Make a model folder without weights: the configurations, and the rest from the embedded
    model. Its tokenizers' vocabulary is small, but speed depends on the number of tokens alone.

    Returns:
        The folder.
    """
    for network, config in CONFIGS.items():
        path = folder / network / "config.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(config))
    for part in ("base/tokenizer", "base/tokenizer_2", "base/scheduler", "refiner/scheduler"):
        shutil.copytree(EMBEDDED_MODEL_DIR / part, folder / part)
    for index in ("base/model_index.json", "refiner/model_index.json"):
        shutil.copyfile(EMBEDDED_MODEL_DIR / index, folder / index)
    return folder
