"""A model in diffusers layout as a single-file checkpoint, with the names SDXL was published with.

The inverse of what diffusers' `from_single_file` does.
"""

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
OPEN_CLIP = {
    "text_model.encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.final_layer_norm": "ln_final",
}


def base_checkpoint(base: Path, *, wide: bool = False) -> Tensors:
    """Of a base in diffusers layout; in fp32 where `wide`."""
    tensors = {
        **_prefixed("model.diffusion_model.", _unet(_load(base / "unet"))),
        **_prefixed("first_stage_model.", _vae(_load(base / "vae"))),
        **_prefixed(
            "conditioner.embedders.0.transformer.text_model.", _load(base / "text_encoder")
        ),
        **_prefixed("conditioner.embedders.1.model.", _open_clip(_load(base / "text_encoder_2"))),
        # What the published files hold beside the weights.
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(77),
        "conditioner.embedders.1.model.logit_scale": torch.tensor(4.6, dtype=torch.float16),
    }
    return {
        name: tensor.float() if wide and tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


def refiner_checkpoint(model: Path) -> Tensors:
    encoder = _open_clip(_load(model / "base" / "text_encoder_2"))
    return {
        **_prefixed("model.diffusion_model.", _unet(_load(model / "refiner" / "unet"))),
        **_prefixed("conditioner.embedders.0.model.", encoder),
    }


def save(tensors: Tensors, path: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def _load(folder: Path) -> Tensors:
    [path] = folder.glob("*.safetensors")
    return load_file(path)


def _prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _renamed(name: str, names: dict[str, str]) -> str:
    for new, old in names.items():
        name = re.sub(rf"(^|(?<=\.)){re.escape(new)}(?=\.|$)", old, name)
    return name


def _unet(tensors: Tensors) -> Tensors:
    layers = 1 + max(
        int(m[1]) for name in tensors if (m := re.match(r"down.*resnets\.(\d+)", name))
    )
    with_attention = {m[1] for name in tensors if (m := re.match(r"(up_blocks\.\d+)\.att", name))}

    def old(name: str) -> str:
        if match := re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name):
            way, kind, rest = match[1], match[3], match[5]
            block, layer = int(match[2]), int(match[4])
            if way == "down":
                number = block * (layers + 1) + layer + 1
                if kind == "downsamplers":
                    return (
                        f"input_blocks.{(block + 1) * (layers + 1)}.0.{rest.replace('conv', 'op')}"
                    )
                place = f"input_blocks.{number}"
            else:
                place = f"output_blocks.{block * (layers + 1) + layer}"
                if kind == "upsamplers":
                    last = 2 if f"up_blocks.{block}" in with_attention else 1
                    return f"output_blocks.{block * (layers + 1) + layers}.{last}.{rest}"
            return (
                f"{place}.0.{_renamed(rest, RESNET)}" if kind == "resnets" else f"{place}.1.{rest}"
            )
        if match := re.match(r"mid_block\.(\w+)\.(\d+)\.(.+)", name):
            if match[1] == "attentions":
                return f"middle_block.1.{match[3]}"
            return f"middle_block.{2 * int(match[2])}.{_renamed(match[3], RESNET)}"
        return _renamed(name, UNET_ENDS)

    return {old(name): tensor for name, tensor in tensors.items()}


def _vae(tensors: Tensors) -> Tensors:
    blocks = 1 + max(int(m[1]) for name in tensors if (m := re.search(r"down_blocks\.(\d+)", name)))
    old = {}
    for name, tensor in tensors.items():
        if "attentions" in name:
            name = _renamed(name, VAE_ATTENTION)
            # They were convolutions of one pixel.
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        name = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{blocks - 1 - int(m[1])}", name)
        name = re.sub(r"down_blocks\.(\d+)", r"down.\1", name)
        name = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        name = name.replace("mid_block.attentions.0", "mid.attn_1").replace(".resnets.", ".block.")
        name = re.sub(r"(up|down)samplers\.0\.", r"\1sample.", name)
        name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        old[name] = tensor
    return old


def _open_clip(tensors: Tensors) -> Tensors:
    old = {}
    for name, tensor in tensors.items():
        if name == "text_projection.weight":
            old["text_projection"] = tensor.T
        elif match := re.fullmatch(r"(.+)\.self_attn\.q_proj\.(weight|bias)", name):
            parts = [tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            layer = _renamed(match[1], OPEN_CLIP)
            old[f"{layer}.attn.in_proj_{match[2]}"] = torch.cat(parts)
        elif not re.search(r"[kv]_proj", name):
            old[_renamed(name, OPEN_CLIP)] = tensor
    return old
