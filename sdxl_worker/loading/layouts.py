"""Whether a folder's configurations are those of a single-file checkpoint, which has none."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl_worker.loading.checkpoint_kind import ENCODER, ENCODER_2, UNET, VAE

Shapes = Mapping[str, tuple[int, ...]]
TOKENIZER_FILES = ("vocab.json", "merges.txt")


@dataclass(frozen=True)
class Layout:
    """The numbers that tell networks of SDXL's kind apart."""

    unet_width: int
    unet_levels: int
    """Blocks on the way down, convolutions included."""
    transformer_blocks: int
    text_width: int
    """Of both encoders' states side by side."""
    vae_widths: tuple[int, ...]
    encoders: tuple[tuple[int, int], ...]
    """Width and layers of each."""


# Of https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0.
SDXL = Layout(320, 9, 70, 2048, (128, 256, 512, 512), ((768, 12), (1280, 32)))


def layout_of_checkpoint(shapes: Shapes) -> Layout:
    def count(pattern: str) -> int:
        """Of different matches."""
        found = (re.match(pattern, name) for name in shapes)
        return len({match[0] for match in found if match})

    def size(pattern: str, dimension: int) -> int:
        """Of the first tensor that matches; 0: there is none."""
        name = next((name for name in shapes if re.fullmatch(pattern, name)), "")
        return [*shapes.get(name, ()), 0, 0][dimension]

    unet, vae = re.escape(UNET), re.escape(VAE)
    encoder, encoder_2 = re.escape(ENCODER), re.escape(ENCODER_2)
    levels = count(rf"{vae}encoder\.down\.\d+\.")
    return Layout(
        size(rf"{unet}input_blocks\.0\.0\.weight", 0),
        count(rf"{unet}input_blocks\.\d+\."),
        count(rf"{unet}.*\.attn2\.to_k\.weight"),
        size(rf"{unet}.*\.attn2\.to_k\.weight", 1),
        tuple(size(rf"{vae}encoder\.down\.{i}\.block\.0\.conv1\.weight", 0) for i in range(levels)),
        (
            (size(rf"{encoder}.*token_embedding\.weight", 1), count(rf"{encoder}.*layers\.\d+\.")),
            (
                size(rf"{encoder_2}token_embedding\.weight", 1),
                count(rf"{encoder_2}transformer\.resblocks\.\d+\."),
            ),
        ),
    )


def layout_of_folder(base: Path) -> Layout | None:
    """Of a base in diffusers layout. None: it lacks something, or is of another kind."""
    if not all(
        (base / tokenizer / name).is_file()
        for tokenizer in ("tokenizer", "tokenizer_2")
        for name in TOKENIZER_FILES
    ):
        return None
    try:
        unet, vae, *encoders = (
            json.loads((base / name / "config.json").read_text(encoding="utf-8"))
            for name in ("unet", "vae", "text_encoder", "text_encoder_2")
        )
        widths, layers = unet["block_out_channels"], unet["layers_per_block"]
        return Layout(
            widths[0],
            len(widths) * (layers + 1),
            _transformer_blocks(unet),
            unet["cross_attention_dim"],
            tuple(vae["block_out_channels"]),
            tuple((config["hidden_size"], config["num_hidden_layers"]) for config in encoders),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _transformer_blocks(unet: dict[str, Any]) -> int:
    """
    Raises:
        TypeError: a level has layers of different depths, as in SSD-1B.
    """
    depths = unet["transformer_layers_per_block"]
    down, up = unet["down_block_types"], unet["up_block_types"]
    depths = [depths] * len(down) if isinstance(depths, int) else depths
    layers = unet["layers_per_block"]
    with_attention = [
        *(layers * depth for kind, depth in zip(down, depths, strict=True) if "CrossAttn" in kind),
        depths[-1],
        *(
            (layers + 1) * depth
            for kind, depth in zip(up, reversed(depths), strict=True)
            if "CrossAttn" in kind
        ),
    ]
    return sum(with_attention)
