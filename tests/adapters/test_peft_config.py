"""Files of diffusers and peft: peft wraps the networks, diffusers saves, and the pictures' networks
give what they give with ours."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

from sdxl_worker.adapters.lora import read_lora
from sdxl_worker.adapters.peft_config import peft_configs
from sdxl_worker.loading.models import Models
from tests.adapters.lora_files import FIELD, apply, lora_of, saved

UNET = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "ff.net.2"]
TEXT = ["q_proj", "out_proj", "fc1"]
CONFIGS: dict[str, dict[str, Any]] = {
    "one alpha": {"r": 4, "lora_alpha": 6},
    "ranks of some modules": {"r": 4, "lora_alpha": 6, "rank_pattern": {"to_q": 2, "q_proj": 3}},
    "alphas of some modules": {
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": {"attn2.to_k": 2, "out_proj": 3},
        "alpha_pattern": {
            "attn2.to_k": 5,
            "layers.1.self_attn.out_proj": 1,
            "^mid_block.resnets.0.conv1": 9,
        },
    },
    "rsLoRA": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "DoRA": {"r": 4, "lora_alpha": 6, "use_dora": True},
    "biases": {"r": 4, "lora_alpha": 6, "lora_bias": True, "target_modules": ["ff.net.2", "fc1"]},
}


def wrapped(network: torch.nn.Module, config: LoraConfig) -> Any:
    """A copy in peft's wrappers, with random numbers."""
    network = inject_adapter_in_model(config, copy.deepcopy(network))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
            elif "lora_" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    return network


def run(models: Models, unet: Any, encoder: Any, encoder_2: Any) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 800, (1, 77), generator=generator)
    added = {
        "text_embeds": torch.randn(1, 64, generator=generator),
        "time_ids": torch.tensor([[128.0, 128, 0, 0, 128, 128]]),
    }
    return [
        unet(
            torch.randn(1, 4, 16, 16, generator=generator),
            torch.tensor(500),
            torch.randn(1, 77, models.unet.config.cross_attention_dim, generator=generator),
            added_cond_kwargs=added,
        ).sample,
        encoder(tokens).last_hidden_state,
        encoder_2(tokens).text_embeds,
    ]


@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_a_file_that_diffusers_saved_does_what_peft_does(
    kind: str, models: Models, tmp_path: Path
) -> None:
    plain = run(models, models.unet, models.text_encoder, models.text_encoder_2)
    layers, notes, theirs = {}, {}, []
    for network, targets in (("unet", UNET), ("text_encoder", TEXT), ("text_encoder_2", TEXT)):
        config = LoraConfig(**{"target_modules": targets, **CONFIGS[kind]})
        module = wrapped(getattr(models, network), config)
        theirs.append(module)
        layers[f"{network}_lora_layers"] = get_peft_model_state_dict(module)
        notes[f"{network}_lora_adapter_metadata"] = {
            key: sorted(value) if isinstance(value, set) else value
            for key, value in config.to_dict().items()
        }
    StableDiffusionXLPipeline.save_lora_weights(tmp_path, **layers, **notes)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    expected = run(models, *theirs)
    apply(models, read_lora(saved(path), 1.0, FIELD, models))
    ours = run(models, models.unet, models.text_encoder, models.text_encoder_2)
    for mine, its, without in zip(ours, expected, plain, strict=True):
        assert (its - without).norm() > 0.01 * without.norm()
        assert (mine - its).norm() < 1e-5 * (its - without).norm() + 1e-5 * without.norm()


def test_what_peft_itself_saves_is_read_too(models: Models, tmp_path: Path) -> None:
    config = LoraConfig(r=4, lora_alpha=4, target_modules=UNET)
    state = get_peft_model_state_dict(wrapped(models.unet, config))
    plain = lora_of(tmp_path, models, {f"unet.{key}": it for key, it in state.items()})
    by_peft = {f"base_model.model.{key}": tensor for key, tensor in state.items()}
    assert lora_of(tmp_path, models, by_peft, name="b").changes.keys() == plain.changes.keys()


@pytest.mark.parametrize(
    "noted",
    [
        "no JSON",
        "[1]",
        '{"unet.lora_alpha": "large"}',
        '{"unet.lora_alpha": NaN}',
        f'{{"unet.lora_alpha": 1{"0" * 400}}}',
        '{"unet.alpha_pattern": [1]}',
        '{"unet.alpha_pattern": {"(a+)+$": 1}}',
        "[" * 100_000,
    ],
)
def test_what_is_not_understood_is_refused(noted: str) -> None:
    with pytest.raises(ValueError, match="not understood"):
        peft_configs({"lora_adapter_metadata": noted})
