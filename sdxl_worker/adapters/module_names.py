"""The names by which files of LoRAs call the modules of the networks.

Each program that trains has its own spelling, and some of them write `_` for `.`, which cannot be
undone. So names are never taken apart: every spelling of every module that is there is made, and
looked up.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from sdxl_worker.loading.models import Models

NETWORKS = ("unet", "text_encoder", "text_encoder_2")
# What the known formats can change.
MODULES = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.GroupNorm, torch.nn.LayerNorm)

# The names that the UNet was published with, by diffusers' names.
ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
IN_A_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
# With dots, and with underscores.
UNET_PREFIXES = (
    "",  # as a script of peft may save it
    "unet.",  # diffusers, and OneTrainer's newer files
    "base_model.model.",  # peft
    "unet.base_model.model.",
    "diffusion_model.",  # ComfyUI
)
UNET_UNDERSCORED = (
    "lora_unet_",  # kohya, and whoever follows it
    "lycoris_",  # LyCORIS used as a library
    "lycoris_unet_",
)
# The text encoder of Stable Diffusion 1.x is the first one of SDXL: "te" without a number is it.
TEXT_PREFIXES = {
    "text_encoder": (
        "text_encoder.",
        "text_encoder.base_model.model.",
        "clip_l.",  # OneTrainer's newer files
        "text_encoders.clip_l.transformer.",  # ComfyUI
    ),
    "text_encoder_2": (
        "text_encoder_2.",
        "text_encoder_2.base_model.model.",
        "clip_g.",
        "text_encoders.clip_g.transformer.",
    ),
}
TEXT_UNDERSCORED = {
    "text_encoder": ("lora_te1_", "lora_te_"),
    "text_encoder_2": ("lora_te2_",),
}
# Early versions of diffusers kept a LoRA in the attention's processor, by the names of the UNet for
# all networks.
PROCESSOR = {
    ".to_q": ".processor.to_q",
    ".to_k": ".processor.to_k",
    ".to_v": ".processor.to_v",
    ".to_out.0": ".processor.to_out",
    ".q_proj": ".to_q",
    ".k_proj": ".to_k",
    ".v_proj": ".to_v",
    ".out_proj": ".to_out",
}


@dataclass(frozen=True)
class Target:
    """A module that a LoRA may change."""

    network: str
    """One of `NETWORKS`."""
    module: str
    """Its name within the network."""


def names_of(models: Models) -> dict[str, Target]:
    """The module of each name, in all spellings."""
    unet: Any = models.unet
    names = {}
    for module, original in original_names(unet).items():
        target = Target("unet", module)
        for dotted in (module, original):
            names.update(dict.fromkeys(_spellings(dotted, UNET_PREFIXES, UNET_UNDERSCORED), target))
    for network, prefixes in TEXT_PREFIXES.items():
        for module in _modules(getattr(models, network)):
            # In transformers 5, one class has this level and the other has not. Files may or not.
            short = module.removeprefix("text_model.")
            for dotted in (short, f"text_model.{short}"):
                spellings = _spellings(dotted, prefixes, TEXT_UNDERSCORED[network])
                names.update(dict.fromkeys(spellings, Target(network, module)))
    return names


def original_names(unet: Any) -> dict[str, str]:
    """The name in the published checkpoint of each module, by diffusers' name."""
    places = dict(ENDS)
    # A level has one block for each of its layers, and on its way down one that halves the size.
    layers = len(unet.down_blocks[0].resnets) + 1
    for way, original, first in (("down", "input", 1), ("up", "output", 0)):
        for level, block in enumerate(getattr(unet, f"{way}_blocks")):
            for layer in range(len(block.resnets)):
                place = f"{original}_blocks.{layers * level + layer + first}"
                places[f"{way}_blocks.{level}.resnets.{layer}"] = f"{place}.0"
                places[f"{way}_blocks.{level}.attentions.{layer}"] = f"{place}.1"
    for level in range(len(unet.down_blocks)):
        end = layers * (level + 1)
        places[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{end}.0.op"
        # All that enlarge have attention: it is the third there.
        places[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{end - 1}.2.conv"
    return {module: _original_name(module, places) for module in _modules(unet)}


def _original_name(module: str, places: dict[str, str]) -> str:
    if module in places:
        return places[module]
    # BLOCK.LEVEL.KIND.LAYER.REST, or without a level in the middle.
    [place] = [place for place in places if module.startswith(f"{place}.")]
    rest = module.removeprefix(f"{place}.")
    return f"{places[place]}.{IN_A_RESNET[rest] if '.resnets.' in module else rest}"


def _modules(network: torch.nn.Module) -> Iterator[str]:
    return (name for name, module in network.named_modules() if isinstance(module, MODULES))


def _spellings(
    dotted: str, prefixes: tuple[str, ...], underscored: tuple[str, ...]
) -> Iterator[str]:
    yield from (prefix + dotted for prefix in prefixes)
    yield from (prefix + dotted.replace(".", "_") for prefix in underscored)
    for end, early in PROCESSOR.items():
        if dotted.endswith(end):
            yield from (prefix + dotted.removesuffix(end) + early for prefix in prefixes)
