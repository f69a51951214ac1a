"""Puts adapter files on the base's weights while another adapter is trained: straight from the
formulas, since modules that peft has wrapped are not those that the worker knows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file
from torch import Tensor

from shapes.kohya_writer import modules_by_key


@contextmanager
def adapters(
    pipeline: StableDiffusionXLPipeline, scales: Mapping[Path, float]
) -> Iterator[StableDiffusionXLPipeline]:
    """Inside, the files are on the weights, one after the other, each with its scale."""
    modules = modules_by_key(pipeline)
    before: dict[str, Tensor] = {}
    try:
        for path, scale in scales.items():
            tensors = load_file(path)
            for key in {name.partition(".")[0] for name in tensors}:
                weight = cast(Tensor, modules[key].weight)
                before.setdefault(key, weight.detach().clone())
                parts = {
                    name.partition(".")[2]: tensor.float()
                    for name, tensor in tensors.items()
                    if name.partition(".")[0] == key
                }
                weight.data = merged(weight.detach(), parts, scale)
        yield pipeline
    finally:
        for key, weight in before.items():
            modules[key].weight.data = weight


def merged(weight: Tensor, parts: Mapping[str, Tensor], scale: float) -> Tensor:
    """W + scale * alpha / rank * up @ down; DoRA: scaled towards what was trained, W'.

    W' = dora_scale * (W + D) / |W + D|, the norm taken of each output row (arXiv 2402.09353).
    """
    up, down = parts["lora_up.weight"], parts["lora_down.weight"]
    rank = len(down)
    delta = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape) * (parts["alpha"] / rank)
    if "dora_scale" not in parts:
        return weight + scale * delta
    turned = weight + delta
    norm = turned.flatten(1).norm(dim=1).reshape(parts["dora_scale"].shape)
    return torch.lerp(weight, parts["dora_scale"] * turned / norm, scale)
