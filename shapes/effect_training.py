"""Trains the two adapters that change what is drawn: "dot", a LoRA, and "frame", a DoRA.

peft trains them in the frozen base with the base's own loss, on pictures that have the effect. Rank
and alpha differ from one kind of module to another, as in files that were trained with settings of
their own for convolutions, or resized afterwards.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from tqdm import tqdm

from shapes import architecture, effects, embedded, kohya_writer, merging
from shapes.averaging import Average
from shapes.data import Scene, random_scene

PICTURES = 4000
BATCH = 32
AVERAGE_DECAY = 0.99
WEIGHT_LIMIT, SNR_NUMERATOR = 6.0, 5.0
"""As in the base's training: a sample weighs min(limit, numerator / signal-to-noise ratio)."""


@dataclass(frozen=True)
class Rule:
    """Rank and alpha of the modules whose name, in diffusers' spelling, has `pattern`."""

    pattern: str
    rank: int
    alpha: float


@dataclass(frozen=True)
class Recipe:
    """One adapter's training."""

    effect: str
    """The keyword of `effects.render`."""
    title: str
    steps: int
    learning_rate: float
    dora: bool
    unet: tuple[Rule, ...]
    """The first rule that fits a module counts; modules that none fits stay as they are."""
    text_encoder: tuple[Rule, ...] = ()
    text_encoder_2: tuple[Rule, ...] = ()
    beside: str | None = None
    """An adapter trained before, which is on in every other step, so that both together do well."""


DOT = Recipe(
    effect="dot",
    title="A dot in the middle of the shape",
    steps=1600,
    learning_rate=2e-3,
    dora=False,
    unet=(
        Rule(r"attn1\.to_", rank=8, alpha=4.0),
        Rule(r"attn2\.to_", rank=6, alpha=6.0),
        Rule(r"\.ff\.net", rank=4, alpha=6.0),
        Rule(r"resnets\.\d\.conv1", rank=6, alpha=2.0),
    ),
    text_encoder=(Rule(r"layers\.[01]\.self_attn\.(q|v|out)_proj", rank=4, alpha=1.0),),
    text_encoder_2=(
        Rule(r"layers\.[01]\.self_attn\.(k|v|out)_proj", rank=2, alpha=3.0),
        Rule(r"layers\.[012]\.mlp\.fc1", rank=4, alpha=4.0),
    ),
)
FRAME = Recipe(
    effect="frame",
    title="A frame in the shape's colour",
    steps=2200,
    learning_rate=2e-3,
    dora=True,
    beside="dot",
    unet=(
        Rule(r"attn1\.to_", rank=4, alpha=4.0),
        Rule(r"attn2\.to_", rank=6, alpha=3.0),
        Rule(r"\.ff\.net", rank=4, alpha=2.0),
        Rule(r"resnets\.\d\.conv1", rank=4, alpha=6.0),
    ),
)


def inject(model: nn.Module, rules: tuple[Rule, ...], *, dora: bool = False) -> None:
    """Let peft wrap the modules that a rule fits; what it adds is all that can be trained."""
    fitting = {
        name: next(rule for rule in rules if re.search(rule.pattern, name))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
        and any(re.search(rule.pattern, name) for rule in rules)
    }
    if not fitting:
        return
    config = LoraConfig(
        target_modules=list(fitting),
        rank_pattern={f"^{re.escape(name)}$": rule.rank for name, rule in fitting.items()},
        alpha_pattern={f"^{re.escape(name)}$": rule.alpha for name, rule in fitting.items()},
        use_dora=dora,
    )
    inject_adapter_in_model(config, model)


def cosine(step: int, steps: int) -> float:
    """The learning rate's share: a short rise, then down to a fiftieth."""
    return min(1.0, (step + 1) / 50) * (0.02 + 0.49 * (1.0 + math.cos(math.pi * step / steps)))


def train(recipe: Recipe, model: Path, out: Path, seed: int) -> None:
    """Train one adapter and write it as `out`/<effect>.safetensors."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    pipeline = embedded.load(model)
    scenes = [random_scene(rng) for _ in range(PICTURES)]
    alone = _latents(pipeline, scenes, recipe.effect)
    beside = _latents(pipeline, scenes, recipe.effect, recipe.beside) if recipe.beside else alone

    inject(pipeline.unet, recipe.unet, dora=recipe.dora)
    inject(pipeline.text_encoder, recipe.text_encoder)
    inject(pipeline.text_encoder_2, recipe.text_encoder_2)
    trained = [
        parameter
        for part in (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2)
        for parameter in part.parameters()
        if parameter.requires_grad
    ]
    average = Average(nn.ParameterList(trained), AVERAGE_DECAY)
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, recipe.steps))
    progress = tqdm(range(recipe.steps), desc=recipe.effect, mininterval=5.0)
    mean_loss = 0.0
    for step in progress:
        picks = rng.integers(PICTURES, size=BATCH)
        prompts = [embedded.draw_caption(scenes[pick], rng) for pick in picks]
        others = {out / f"{recipe.beside}.safetensors": 1.0} if recipe.beside and step % 2 else {}
        latents = (beside if others else alone)[torch.from_numpy(picks)]
        optimizer.zero_grad()
        with merging.adapters(pipeline, others):
            loss = _loss(pipeline, latents, prompts)
            loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        average.update()
        mean_loss += (loss.item() - mean_loss) / min(step + 1, 100)
        progress.set_postfix(loss=f"{mean_loss:.4f}", refresh=False)
    with average.applied():
        tensors = kohya_writer.trained_tensors(pipeline)
    kohya_writer.save(out / f"{recipe.effect}.safetensors", tensors, _metadata(recipe))


def _latents(pipeline: StableDiffusionXLPipeline, scenes: list[Scene], *names: str) -> Tensor:
    """Of the scenes with these effects, (n, 4, 16, 16)."""
    side, effect = architecture.NATIVE_PX, dict.fromkeys(names, True)
    pictures = [effects.render(scene, side, side, **effect) for scene in scenes]
    return embedded.encode(pipeline, np.stack(pictures))


def _metadata(recipe: Recipe) -> dict[str, str]:
    linear, convolution = recipe.unet[0], recipe.unet[-1]
    algorithm = {"algo": "lora", "conv_dim": convolution.rank, "conv_alpha": convolution.alpha}
    return {
        "modelspec.title": recipe.title,
        "ss_network_module": "lycoris.kohya" if recipe.dora else "networks.lora",
        "ss_network_dim": str(linear.rank),
        "ss_network_alpha": str(linear.alpha),
        "ss_network_args": json.dumps(
            {**algorithm, "dora_wd": True, "wd_on_output": True} if recipe.dora else algorithm
        ),
    }


def _loss(
    pipeline: StableDiffusionXLPipeline, latents: Tensor, prompts: list[str | None]
) -> Tensor:
    """The base's own: predicted noise, weighted, at noise levels spread over all 1000."""
    count = len(latents)
    states, pooled = embedded.conditioning(embedded.text_models(pipeline), prompts)
    timesteps = ((torch.arange(count) + torch.rand(count)) / count * 1000).long()
    alpha = architecture.alphas_cumprod()[timesteps][:, None, None, None]
    noise = torch.randn_like(latents)
    conditions = {"text_embeds": pooled, "time_ids": embedded.time_ids(count)}
    predicted = pipeline.unet(
        alpha.sqrt() * latents + (1.0 - alpha).sqrt() * noise,
        timesteps,
        states,
        added_cond_kwargs=conditions,
    ).sample
    ratio = (alpha / (1.0 - alpha)).flatten()
    weight = (SNR_NUMERATOR / ratio).clamp(max=WEIGHT_LIMIT)
    return (weight * (predicted - noise).square().mean(dim=(1, 2, 3))).mean()
