"""The names that SDXL was published with, as single-file checkpoints have them, become diffusers'
and transformers' own: by diffusers' converters, on tensors that are read already."""

from typing import Any

import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)

from sdxl_worker.loading.checkpoint_kind import ENCODER, ENCODER_2, UNET, VAE

Tensors = dict[str, torch.Tensor]

# A tensor that each VAE has under this name where the names are the original ones.
MARK_OF_VAE = "encoder.down.0.block.0.conv1.weight"


def with_library_names(network: str, tensors: Tensors, module: Any) -> Tensors:
    """The same tensors, but for what a checkpoint holds beside the weights. Those that have the
    libraries' names already are returned as they are.

    Args:
        network: its name in `NETWORKS`.
        module: the network, for its configuration.

    Raises:
        KeyError: one that is needed is missing.
    """
    if network == "unet" and _begin_with(UNET, tensors):
        return convert_ldm_unet_checkpoint(tensors, module.config)
    if network == "text_encoder" and _begin_with(ENCODER, tensors):
        return {name.removeprefix(ENCODER): tensor for name, tensor in tensors.items()}
    if network == "text_encoder_2" and _begin_with(ENCODER_2, tensors):
        return convert_open_clip_checkpoint(module, tensors, prefix=ENCODER_2)
    if network == "vae" and any(name in tensors for name in (MARK_OF_VAE, VAE + MARK_OF_VAE)):
        return convert_ldm_vae_checkpoint(tensors, module.config)
    return tensors


def _begin_with(prefix: str, tensors: Tensors) -> bool:
    return next(iter(tensors), "").startswith(prefix)
