"""Trains the adapter "few-step", a LoRA with which four steps without guidance are enough.

Distillation by trajectory: the base with guidance goes from noise to a picture in many small Euler
steps; the base with the adapter learns to be at the same places after each of four large ones
(as Progressive Distillation, arXiv 2202.00512, and its kin SDXL-Lightning, arXiv 2402.13929, but
without an adversary). It learns on its own way, not on the teacher's, so that each step also makes
up for the errors of those before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor, nn
from tqdm import tqdm

from shapes import architecture, effect_training, embedded, kohya_writer
from shapes.averaging import Average
from shapes.data import random_scene
from shapes.effect_training import Rule

STEPS = 4
TEACHER_STEPS_EACH = 5
TEACHER_GUIDANCE = 4.0
TRAJECTORIES = 1440
TRAINING_STEPS = 500
BATCH = 20
LEARNING_RATE = 1e-3
LAST_WEIGHT = 2.0
"""Of the last step's error, which is the picture's."""
AVERAGE_DECAY = 0.98
RULES = (
    Rule(r"attn2\.to_|time_embedding|add_embedding", rank=8, alpha=8.0),
    Rule(r"attn1\.to_|\.ff\.net|proj_(in|out)", rank=10, alpha=5.0),
    Rule(r"conv_(in|out)|conv_shortcut|time_emb_proj", rank=4, alpha=3.0),
    Rule(r"resnets\.\d\.conv[12]|samplers\.0\.conv", rank=3, alpha=2.0),
)
METADATA = {
    "modelspec.title": "Four steps without guidance",
    "few_step.family": "Shapes",
    "few_step.steps": str(STEPS),
    "few_step.guidance_scale": "1.0",
    "few_step.scheduler": "K_EULER",
    "few_step.schedule": "trailing",
    "ss_network_module": "networks.lora",
    "ss_network_dim": "10",
    "ss_network_alpha": "5.0",
    "ss_network_args": '{"algo": "lora", "conv_dim": 3, "conv_alpha": 2.0}',
}


@dataclass
class Trajectories:
    """Where the teacher was at the five ends of the four steps, and what it was told to draw."""

    places: Tensor
    """(n, 5, 4, 16, 16), pictures with noise of strength sigma on them (not rescaled)."""
    states: Tensor
    pooled: Tensor


def timesteps(each: int = 1) -> list[int]:
    """999, 749, 499, 249 ("trailing" spacing), or each of their steps in so many parts."""
    parts = STEPS * each
    return [round(1000 - i * 1000 / parts) - 1 for i in range(parts)]


def sigmas(times: list[int]) -> list[float]:
    """Noise per signal at each timestep, and 0 after the last."""
    alphas = architecture.alphas_cumprod()[times]
    return [*((1.0 - alphas) / alphas).sqrt().tolist(), 0.0]


def predict(
    pipeline: StableDiffusionXLPipeline,
    places: Tensor,
    time: int,
    sigma: float,
    states: Tensor,
    pooled: Tensor,
) -> Tensor:
    """The noise that the UNet sees, (n, 4, 16, 16)."""
    conditions = {"text_embeds": pooled, "time_ids": embedded.time_ids(len(places))}
    predicted: Tensor = pipeline.unet(
        places / (sigma**2 + 1.0) ** 0.5, time, states, added_cond_kwargs=conditions
    ).sample
    return predicted


@torch.no_grad()
def teach(pipeline: StableDiffusionXLPipeline, seed: int) -> Trajectories:
    """Let the base draw random captions with guidance, against no conditioning at all."""
    rng = np.random.default_rng(seed)
    models = embedded.text_models(pipeline)
    prompts = [
        embedded.draw_caption(random_scene(rng), rng) or "a shape" for _ in range(TRAJECTORIES)
    ]
    times = timesteps(TEACHER_STEPS_EACH)
    levels = sigmas(times)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in tqdm(range(0, TRAJECTORIES, 48), desc="teacher", mininterval=5.0):
        states, pooled = embedded.conditioning(models, prompts[start : start + 48])
        both = (
            torch.cat([torch.zeros_like(states), states]),
            torch.cat([torch.zeros_like(pooled), pooled]),
        )
        side = architecture.NATIVE_PX // architecture.LATENT_FACTOR
        place = torch.randn(len(states), architecture.LATENT_CHANNELS, side, side) * levels[0]
        kept = [place]
        for i, time in enumerate(times):
            predicted = predict(pipeline, place.repeat(2, 1, 1, 1), time, levels[i], *both)
            without, told = predicted.chunk(2)
            noise = without + TEACHER_GUIDANCE * (told - without)
            place = place + (levels[i + 1] - levels[i]) * noise
            if (i + 1) % TEACHER_STEPS_EACH == 0:
                kept.append(place)
        parts.append((torch.stack(kept, dim=1), states, pooled))
    return Trajectories(*(torch.cat(column) for column in zip(*parts, strict=True)))


def train(model: Path, out: Path, seed: int) -> None:
    """Train the adapter and write it as `out`/few-step.safetensors."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    pipeline = embedded.load(model)
    taught = teach(pipeline, seed)
    effect_training.inject(pipeline.unet, RULES)
    trained = [one for one in pipeline.unet.parameters() if one.requires_grad]
    average = Average(nn.ParameterList(trained), AVERAGE_DECAY)
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: effect_training.cosine(step, TRAINING_STEPS)
    )
    progress = tqdm(range(TRAINING_STEPS), desc="few-step", mininterval=5.0)
    errors = torch.zeros(STEPS)
    for step in progress:
        picks = torch.from_numpy(rng.integers(TRAJECTORIES, size=BATCH))
        optimizer.zero_grad()
        errors += (_backward(pipeline, taught, picks) - errors) / min(step + 1, 50)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        average.update()
        shown = " ".join(f"{error:.4f}" for error in errors)
        progress.set_postfix(errors=shown, refresh=False)
    with average.applied():
        tensors = kohya_writer.trained_tensors(pipeline)
    kohya_writer.save(out / "few-step.safetensors", tensors, METADATA)


def _backward(pipeline: StableDiffusionXLPipeline, taught: Trajectories, picks: Tensor) -> Tensor:
    """Take the four steps, add up their gradients, give their errors (4,).

    An error is measured where the UNet would see it: in units of the noisy picture's spread.
    """
    states, pooled = taught.states[picks], taught.pooled[picks]
    times = timesteps()
    levels = sigmas(times)
    place = taught.places[picks, 0]
    errors = []
    for i, time in enumerate(times):
        noise = predict(pipeline, place, time, levels[i], states, pooled)
        reached = place + (levels[i + 1] - levels[i]) * noise
        error = (reached - taught.places[picks, i + 1]).square().mean() / (levels[i + 1] ** 2 + 1)
        (error * (LAST_WEIGHT if i == STEPS - 1 else 1.0)).backward()
        errors.append(error.detach())
        place = reached.detach()
    return torch.stack(errors)
