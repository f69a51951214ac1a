"""Every spelling of every module. What a file should call it is made here by other means than in
the code: from a converter of checkpoints, and from diffusers' own."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

from benchmarks.sdxl_architecture import CONFIGS
from sdxl_worker.adapters.module_names import Target, names_of, original_names
from sdxl_worker.loading.models import Models
from tests.adapters.lora_files import apply, changed_weights, lora_of, low_rank, weights
from tools.original_format import _unet as original_keys

# The modules of a UNet that trainers of LoRAs reach, by diffusers' names and by those of the
# published checkpoint.
UNET = {
    "kohya, by diffusers' names": lambda own, _: f"lora_unet_{own.replace('.', '_')}",
    "kohya, by the checkpoint's names": lambda _, old: f"lora_unet_{old.replace('.', '_')}",
    "LyCORIS": lambda own, _: f"lycoris_{own.replace('.', '_')}",
    "LyCORIS, with the network": lambda own, _: f"lycoris_unet_{own.replace('.', '_')}",
    "diffusers": lambda own, _: f"unet.{own}",
    "bare": lambda own, _: own,
    "peft": lambda own, _: f"base_model.model.{own}",
    "peft within diffusers": lambda own, _: f"unet.base_model.model.{own}",
    "ComfyUI": lambda _, old: f"diffusion_model.{old}",
    "OneTrainer": lambda _, old: f"unet.{old}",
}
TEXT = {
    "kohya": ("lora_te1_text_model_{_}", "lora_te2_text_model_{_}"),
    "kohya, without the level": ("lora_te1_{_}", "lora_te2_{_}"),
    "kohya, for one encoder": ("lora_te_text_model_{_}", "lora_te2_text_model_{_}"),
    "diffusers": ("text_encoder.text_model.{}", "text_encoder_2.text_model.{}"),
    "transformers 5": ("text_encoder.{}", "text_encoder_2.text_model.{}"),
    "peft": (
        "text_encoder.base_model.model.text_model.{}",
        "text_encoder_2.base_model.model.text_model.{}",
    ),
    "ComfyUI": (
        "text_encoders.clip_l.transformer.text_model.{}",
        "text_encoders.clip_g.transformer.text_model.{}",
    ),
    "OneTrainer": ("clip_l.text_model.{}", "clip_g.text_model.{}"),
}
# The parts' names of whoever writes A and B.
PARTS = {
    "kohya": (".lora_down.weight", ".lora_up.weight"),
    "peft": (".lora_A.weight", ".lora_B.weight"),
    "peft, from a training state": (".lora_A.default.weight", ".lora_B.default.weight"),
    "diffusers": (".lora.down.weight", ".lora.up.weight"),
    "diffusers, layers": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
}


def lora_modules(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights of all linears and convolutions."""
    return {
        name: module.weight.detach()
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }


@pytest.fixture(scope="module")
def old_names(shared_models: Models) -> dict[str, str]:
    modules = lora_modules(shared_models.unet)
    marks = {f"{name}.weight": torch.tensor(i) for i, name in enumerate(modules)}
    by_mark = {int(mark): key for key, mark in original_keys(marks).items()}
    return {name: by_mark[i].removesuffix(".weight") for i, name in enumerate(modules)}


@pytest.mark.parametrize("spelling", UNET)
def test_a_unet_s_modules_are_found_by_each_spelling(
    spelling: str, old_names: dict[str, str], models: Models, tmp_path: Path
) -> None:
    before = weights(models)
    parts = {name: low_rank(weight) for name, weight in lora_modules(models.unet).items()}

    def file_of(name_of: Callable[[str, str], str]) -> dict[str, torch.Tensor]:
        return {
            f"{name_of(name, old_names[name])}.{part}": tensor
            for name, tensors in parts.items()
            for part, tensor in tensors.items()
        }

    apply(models, lora_of(tmp_path, models, file_of(UNET[spelling])))
    changed = changed_weights(models, before)
    assert changed.keys() == {f"unet.{name}.weight" for name in parts}
    for name, tensors in parts.items():
        difference = tensors["lora_up.weight"].flatten(1) @ tensors["lora_down.weight"].flatten(1)
        weight = before[f"unet.{name}.weight"]
        torch.testing.assert_close(
            changed[f"unet.{name}.weight"], weight + difference.view(weight.shape) / 2
        )


@pytest.mark.parametrize("spelling", TEXT)
def test_the_text_encoders_modules_are_found_by_each_spelling(
    spelling: str, models: Models, tmp_path: Path
) -> None:
    before = weights(models)
    tensors: dict[str, torch.Tensor] = {}
    expected: dict[str, torch.Tensor] = {}
    encoders = (models.text_encoder, models.text_encoder_2)
    for encoder, network, pattern in zip(
        encoders, ("text_encoder", "text_encoder_2"), TEXT[spelling], strict=True
    ):
        for name, weight in lora_modules(encoder).items():
            if name == "text_projection":
                continue
            short = name.removeprefix("text_model.")
            parts = low_rank(weight)
            key = pattern.format(short, _=short.replace(".", "_"))
            tensors |= {f"{key}.{part}": tensor for part, tensor in parts.items()}
            expected[f"{network}.{name}.weight"] = (
                weight + parts["lora_up.weight"] @ parts["lora_down.weight"] / 2
            )
    apply(models, lora_of(tmp_path, models, tensors))
    changed = changed_weights(models, before)
    assert changed.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(changed[name], weight)


@pytest.mark.parametrize(
    "name", ["lora_te2_text_projection", "text_encoder_2.text_projection", "clip_g.text_projection"]
)
def test_the_text_projection_is_found(name: str, models: Models) -> None:
    assert names_of(models)[name] == Target("text_encoder_2", "text_projection")


@pytest.mark.parametrize("spelling", PARTS)
def test_a_loras_parts_are_found_by_each_spelling(
    spelling: str, models: Models, tmp_path: Path
) -> None:
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
    weight = models.unet.get_submodule(name).weight
    before = weight.detach().clone()
    down, up = torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)
    tensors = {
        f"unet.{name}{suffix}": it for suffix, it in zip(PARTS[spelling], (down, up), strict=True)
    }
    apply(models, lora_of(tmp_path, models, tensors))
    torch.testing.assert_close(weight.detach(), before + up @ down)


@pytest.mark.parametrize(
    ("early", "network", "module"),
    [
        ("unet.{}.attn2.processor.to_k_lora", "unet", "{}.attn2.to_k"),
        ("{}.attn1.processor.to_out_lora", "unet", "{}.attn1.to_out.0"),
        ("text_encoder.{}.self_attn.to_q_lora", "text_encoder", "{}.self_attn.q_proj"),
        ("text_encoder_2.{}.self_attn.to_out_lora", "text_encoder_2", "{}.self_attn.out_proj"),
    ],
)
def test_the_attention_processors_of_early_files_are_found(
    early: str, network: str, module: str, models: Models, tmp_path: Path
) -> None:
    places = {
        "unet": "mid_block.attentions.0.transformer_blocks.0",
        "text_encoder": "encoder.layers.1",
        "text_encoder_2": "text_model.encoder.layers.1",
    }
    weight = getattr(models, network).get_submodule(module.format(places[network])).weight
    before = weight.detach().clone()
    down, up = torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)
    key = early.format(places[network])
    tensors = {f"{key}.down.weight": down, f"{key}.up.weight": up}
    apply(models, lora_of(tmp_path, models, tensors))
    torch.testing.assert_close(weight.detach(), before + up @ down)


def test_the_checkpoints_names_are_those_of_diffusers_converter_at_full_size() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(CONFIGS["base/unet"])
    names = original_names(unet)
    marks = {}
    for i, name in enumerate(names):
        marks[f"model.diffusion_model.{names[name]}.weight"] = torch.tensor([i])
        marks[f"model.diffusion_model.{names[name]}.bias"] = torch.tensor([i])
    config = dict(unet.config) | {"class_embed_type": None, "addition_embed_type": "text_time"}
    converted = convert_ldm_unet_checkpoint(marks, config)
    own = {f"{name}.weight": i for i, name in enumerate(names)}
    assert {key: int(mark) for key, mark in converted.items() if key in own} == own


def test_no_two_modules_share_a_name(models: Models) -> None:
    """Were one overwritten by another, its own names would lead elsewhere."""
    names = names_of(models)
    for network in ("unet", "text_encoder", "text_encoder_2"):
        for module in lora_modules(getattr(models, network)):
            assert names[f"{network}.{module}"] == Target(network, module)
    assert len(set(original_names(models.unet).values())) == len(original_names(models.unet))
    # From "." to "_" two could become one.
    flat = {name.replace(".", "_"): target for name, target in names.items()}
    assert all(flat[name.replace(".", "_")] == target for name, target in names.items())
