"""Floating-point operations of a picture, counted on tensors without memory."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from builder.random_model import NETWORKS, meta_network

TOKENS = 77
TIME_IDS = 5  # or 6, and the text's vector is shorter by as much


@dataclass(frozen=True)
class Flops:
    """TFLOP of one pass with one picture; a step with guidance is two passes."""

    base: float
    refiner: float
    decode: float
    text: float
    """Both encoders, one prompt."""

    def of_picture(self, base_steps: int, refiner_steps: int) -> float:
        """With guidance: both texts, all steps, decoding."""
        steps = 2 * (base_steps * self.base + refiner_steps * self.refiner)
        return steps + self.decode + 2 * self.text


def meta_networks(model_dir: Path) -> dict[str, Any]:
    """All networks of a model folder by name, from their configurations alone."""
    return {
        name: meta_network(kind, model_dir / name)
        for name, kind in NETWORKS.items()
        if (model_dir / name).is_dir()
    }


def count_flops(networks: dict[str, Any], width: int, height: int) -> Flops:
    """
    Args:
        networks: on the meta device; width and height in pixels.
    """
    vae = networks["base/vae"]
    ids = torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
    return Flops(
        base=_tflop(networks["base/unet"], **unet_inputs(networks["base/unet"], 1, width, height)),
        refiner=_tflop(
            networks["refiner/unet"], **unet_inputs(networks["refiner/unet"], 1, width, height)
        ),
        decode=_tflop(vae.decode, *decoder_inputs(vae, 1, width, height)),
        text=sum(
            _tflop(networks[name], ids) for name in ("base/text_encoder", "base/text_encoder_2")
        ),
    )


def unet_inputs(unet: Any, batch: int, width: int, height: int) -> dict[str, Any]:
    """What the pipelines pass; a batch of two is one picture with guidance."""
    config = unet.config
    pooled = config.projection_class_embeddings_input_dim
    pooled -= TIME_IDS * config.addition_time_embed_dim
    options: dict[str, Any] = {"device": "meta", "dtype": unet.dtype}
    return {
        "sample": torch.empty(batch, config.in_channels, height // 8, width // 8, **options),
        "timestep": torch.empty((), device="meta"),
        "encoder_hidden_states": torch.empty(batch, TOKENS, config.cross_attention_dim, **options),
        "added_cond_kwargs": {
            "text_embeds": torch.empty(batch, pooled, **options),
            "time_ids": torch.empty(batch, TIME_IDS, **options),
        },
        "return_dict": False,
    }


def decoder_inputs(vae: Any, batch: int, width: int, height: int) -> tuple[torch.Tensor]:
    shape = (batch, vae.config.latent_channels, height // 8, width // 8)
    return (torch.empty(shape, device="meta", dtype=vae.dtype),)


@torch.no_grad()
def _tflop(forward: Any, *args: Any, **kwargs: Any) -> float:
    with FlopCounterMode(display=False) as counter:
        forward(*args, **kwargs)
    return counter.get_total_flops() / 1e12
