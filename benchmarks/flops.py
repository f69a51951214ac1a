"""Floating-point operations of a picture, counted on tensors without memory."""

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from sdxl_worker.loading.networks import NETWORKS
from sdxl_worker.speed.quantize import quantize
from sdxl_worker.speed.step_cache import step_cache

TOKENS = 77
TIME_IDS = 5  # or 6; then the pooled text vector is shorter by as much


@dataclass(frozen=True)
class Flops:
    """TFLOP of one pass with one picture; a step with guidance is two passes."""

    base: float
    base_shallow: float
    """Of a shallow step, with a step cache."""
    refiner: float
    refiner_shallow: float
    decode: float
    text: float
    """Both encoders, one prompt."""

    def of_picture(
        self,
        base_steps: int,
        refiner_steps: int,
        interval: int = 1,
        *,
        guidance_end: float = 1.0,
    ) -> float:
        """With guidance: both texts, all steps, decoding.

        Args:
            interval: of a step cache; at 1, all steps are deep.
            guidance_end: the share of the steps of each that have guidance.
        """

        def of_steps(steps: int, deep: float, shallow: float) -> float:
            """Of one of both texts, on average."""
            guided = math.floor(steps * guidance_end)
            deep_steps = math.ceil(steps / interval)
            both = deep_steps * deep + (steps - deep_steps) * shallow
            return both * (guided + steps) / (2 * steps) if steps else 0.0

        base = of_steps(base_steps, self.base, self.base_shallow)
        refiner = of_steps(refiner_steps, self.refiner, self.refiner_shallow)
        return 2 * (base + refiner) + self.decode + 2 * self.text


@dataclass(frozen=True)
class EightBits:
    """What QUANTIZE changes in a UNet, the same in int8 and fp8."""

    share: float
    """Of the operations of a pass."""
    saved_gb: float
    """From weights in 16 bits."""

    @property
    def speedup_limit(self) -> float:
        """Of a pass, if 8 bits are twice as fast as 16."""
        return 1 / (1 - self.share / 2)


def meta_networks(model_dir: Path) -> dict[str, Any]:
    """All networks of a model folder by name, from their configurations alone."""
    return {
        name: network.build(model_dir / network.folder)
        for name, network in NETWORKS.items()
        if (model_dir / network.folder).is_dir()
    }


def count_flops(networks: dict[str, Any], width: int, height: int) -> Flops:
    """
    Args:
        networks: on the meta device; width and height in pixels.
    """
    vae = networks["vae"]
    ids = torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
    base, base_shallow = _unet_tflop(networks["unet"], width, height)
    refiner, refiner_shallow = _unet_tflop(networks["refiner_unet"], width, height)
    return Flops(
        base=base,
        base_shallow=base_shallow,
        refiner=refiner,
        refiner_shallow=refiner_shallow,
        decode=_tflop(vae.decode, *decoder_inputs(vae, 1, width, height)),
        text=sum(_tflop(networks[name], ids) for name in ("text_encoder", "text_encoder_2")),
    )


@torch.no_grad()
def count_eight_bits(unet: Any, width: int, height: int) -> EightBits:
    """
    Args:
        unet: on the meta device; width and height in pixels.
    """
    with FlopCounterMode(display=False) as counter:
        unet(**unet_inputs(unet, 1, width, height))
    of_module = counter.get_flop_counts()
    rounded = copy.deepcopy(unet)
    quantize(rounded, "int8")
    weights = {
        name.removesuffix(".weight"): parameter.numel()
        for name, parameter in rounded.named_parameters()
        if type(parameter.data) is not torch.Tensor  # a tensor class of torchao
    }
    flops = sum(sum(of_module[f"{type(unet).__name__}.{name}"].values()) for name in weights)
    return EightBits(
        share=flops / counter.get_total_flops(),
        saved_gb=sum(weights.values()) / 1e9,
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


def encoder_inputs(vae: Any, batch: int, width: int, height: int) -> tuple[torch.Tensor]:
    shape = (batch, vae.config.in_channels, height, width)
    return (torch.empty(shape, device="meta", dtype=vae.dtype),)


def _unet_tflop(unet: Any, width: int, height: int) -> tuple[float, float]:
    """Of a deep step, and of a shallow one."""
    inputs = unet_inputs(unet, 1, width, height)
    with step_cache(SimpleNamespace(unet=unet, num_timesteps=2), 2):
        return _tflop(unet, **inputs), _tflop(unet, **inputs)


@torch.no_grad()
def _tflop(forward: Any, *args: Any, **kwargs: Any) -> float:
    with FlopCounterMode(display=False) as counter:
        forward(*args, **kwargs)
    return counter.get_total_flops() / 1e12
