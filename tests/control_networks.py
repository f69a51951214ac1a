"""ControlNets of the embedded model's size with random weights, and drawing with them."""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel, ControlNetUnionModel
from PIL import Image

from sdxl_worker.drawing.control import Control
from sdxl_worker.drawing.generate import generate
from sdxl_worker.drawing.stages import plan_stages
from sdxl_worker.drawing.steering import Steering
from sdxl_worker.drawing.steps import Step
from sdxl_worker.inputs.canvas import Canvas
from sdxl_worker.loading.models import Models
from sdxl_worker.request import Request
from sdxl_worker.settings import EMBEDDED_MODEL_DIR

SHARED_WITH_THE_UNET = (
    *("addition_embed_type", "addition_time_embed_dim", "attention_head_dim"),
    *("block_out_channels", "cross_attention_dim", "down_block_types", "layers_per_block"),
    *("norm_num_groups", "projection_class_embeddings_input_dim", "transformer_layers_per_block"),
    "use_linear_projection",
)
# What they were trained for; xinsir's first union knows six types.
TYPES_OF_PROMAX = 8


@functools.cache
def union(types: int = TYPES_OF_PROMAX) -> Any:
    width = _unet_config()["block_out_channels"][0]
    return _random(
        ControlNetUnionModel,
        num_control_type=types,
        num_trans_channel=width,
        num_proj_channel=width,
    )


@functools.cache
def single(seed: int = 1) -> Any:
    return _random(ControlNetModel, seed)


def control_picture(width: int = 128, height: int = 128, seed: int = 5) -> Image.Image:
    """In colours, so that their order counts."""
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(levels)


def control(network: Any = None, mode: int | None = 3, **changes: Any) -> Control:
    """Of a union, if nothing else is said."""
    given = {"map": control_picture(), "scale": 0.8, "start": 0.0, "end": 1.0, **changes}
    return Control(network if network is not None else union(), mode, **given)


def draw_controlled(
    request: Request,
    models: Models,
    controls: Sequence[Control],
    canvas: Canvas | None = None,
    on_step: Callable[[Step], None] = lambda _: None,
    **options: Any,
) -> list[Image.Image]:
    steering = Steering(controls=tuple(controls))
    stages = plan_stages(request, models)
    return generate(request, stages, models, canvas, on_step, steering=steering, **options)


def write(
    network: Any, folder: Path, *, variant: str | None = None, shard: str = "10GB", **config: Any
) -> Path:
    """In diffusers layout.

    Args:
        config: what its configuration says otherwise.
    """
    network.save_pretrained(folder, variant=variant, max_shard_size=shard)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | config), "utf-8")
    return folder


def _random(kind: Any, seed: int = 0, **own: Any) -> Any:
    """With weights that count, also where a training begins with zeros."""
    config = {name: value for name, value in _unet_config().items() if name in SHARED_WITH_THE_UNET}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = kind(**config, conditioning_embedding_out_channels=(8, 8, 16, 16), **own).eval()
        for parameter in network.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.05)
    return network.requires_grad_(requires_grad=False)


def _unet_config() -> dict[str, Any]:
    path = EMBEDDED_MODEL_DIR / "base" / "unet" / "config.json"
    config: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return config
