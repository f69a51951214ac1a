"""Third phase of the training: the UNets learn to predict noise, on latents and conditioning that
are computed once.

The base learns all noise levels, the refiner the lower ones. Both see whole and partial captions
(so that a negative prompt of one word means something), nothing at all, the empty text, and prompts
of two chunks of 77 tokens whose meaning stands in either chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from shapes import architecture, captions, text_training, vae_training
from shapes.averaging import Average
from shapes.captions import Meaning
from shapes.data import Scene, random_scene, render
from shapes.text_training import TextModels
from shapes.tokenizer import CONTENT_TOKENS

PICTURES = {
    (128, 128): 9000,
    (64, 64): 1000,
    (96, 96): 1000,
    (96, 128): 1000,
    (128, 96): 1000,
    (160, 160): 600,
    (192, 192): 400,
}
"""How many latents are computed of each height and width."""
SHARES = {
    (128, 128): 0.72,
    (64, 64): 0.06,
    (96, 96): 0.06,
    (96, 128): 0.05,
    (128, 96): 0.05,
    (160, 160): 0.04,
    (192, 192): 0.02,
}
"""Of the training steps, for each height and width."""
WORDINGS_WHOLE = 20
WORDINGS_PARTIAL = 10
LONG_PROMPTS_PER_MEANING = 5

CHECKPOINT_STEPS = 250
WHOLE_SHARE = 0.76
PARTIAL_SHARE = 0.12
"""The rest of the samples is unconditional."""
LONG_STEP_SHARE = 0.12
"""Share of the training steps that take prompts of two chunks."""
RANDOM_SIZE_SHARE = 0.15
"""Share of the samples whose size conditioning is not that of the picture."""


@dataclass(frozen=True)
class Recipe:
    """What differs between the base's training and the refiner's."""

    steps: int
    batch: int
    learning_rate: float
    timesteps: int
    """Noise levels are drawn from 0 up to this one."""
    weight_limit: float
    snr_numerator: float
    """A sample weighs min(weight_limit, snr_numerator / signal-to-noise ratio)."""
    zeros_share: float
    """Share of the unconditional samples that see zeros; the others see the empty text."""
    broad_noise: float
    """Strength of smooth noise beside the white noise, to imitate errors of another model."""
    average_decay: float


RECIPES = {
    "base": Recipe(
        steps=4400,
        batch=48,
        learning_rate=2e-3,
        timesteps=1000,
        weight_limit=6.0,
        snr_numerator=5.0,
        zeros_share=0.8,
        broad_noise=0.0,
        average_decay=0.998,
    ),
    "refiner": Recipe(
        steps=4200,
        batch=48,
        learning_rate=2e-3,
        timesteps=450,
        weight_limit=5.0,
        snr_numerator=10.0,
        zeros_share=0.15,
        broad_noise=0.3,
        average_decay=0.998,
    ),
}


@dataclass
class Prompts:
    """Conditioning of many prompts, and which of them may describe a scene."""

    states: Tensor
    """(chunks, 77, 112), half precision."""
    pooled: Tensor
    """(chunks, 64)."""
    chunks: Tensor
    """(prompts, 1 or 2): rows of `states` for each prompt; the first one's pooled output counts."""
    of_meaning: dict[Meaning, list[int]]

    def conditioning(self, prompts: list[int]) -> tuple[Tensor, Tensor]:
        """States (n, 77 or 154, 112) and pooled (n, 64)."""
        rows = self.chunks[prompts]
        return self.states[rows].flatten(1, 2).float(), self.pooled[rows[:, 0]]


def prepare(work: Path, seed: int) -> None:
    """Compute the latents and the conditioning and write them to the work folder."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed + 10)
    vae = vae_training.load(work, "vae-joint.pt").to(memory_format=torch.channels_last)
    latents, scenes = {}, {}
    for (height, width), count in PICTURES.items():
        scenes[height, width] = [random_scene(rng) for _ in range(count)]
        latents[height, width] = _latents(vae, scenes[height, width], height, width)
    models = text_training.load(work)
    torch.save(
        {
            "latents": latents,
            "scenes": {size: [vars(scene) for scene in kept] for size, kept in scenes.items()},
            "short": vars(_short_prompts(models, rng)),
            "long": vars(_long_prompts(models, rng)),
        },
        work / "prepared.pt",
    )


@torch.no_grad()
def _latents(vae: AutoencoderKL, scenes: list[Scene], height: int, width: int) -> Tensor:
    """Scaled latents, (n, 4, height / 8, width / 8)."""
    parts = []
    for start in tqdm(range(0, len(scenes), 40), desc=f"latents of {width}x{height}"):
        pictures = np.stack([render(scene, height, width) for scene in scenes[start : start + 40]])
        parts.append(vae.encode(vae_training.to_tensor(pictures)).latent_dist.mode())
    return torch.cat(parts).contiguous() * architecture.SCALING_FACTOR


def _embed_all(models: TextModels, contents: list[list[int]], name: str) -> tuple[Tensor, Tensor]:
    states, pooled = [], []
    for start in tqdm(range(0, len(contents), 64), desc=name):
        part = models.embed(contents[start : start + 64])
        states.append(part[0].half())
        pooled.append(part[1])
    return torch.cat(states), torch.cat(pooled)


def _is_whole(meaning: Meaning) -> bool:
    return None not in (meaning.shape, meaning.color, meaning.background)


def _short_prompts(models: TextModels, rng: np.random.Generator) -> Prompts:
    """Prompts of one chunk; prompt 0 is the empty text."""
    contents: list[list[int]] = [[]]
    of_meaning: dict[Meaning, list[int]] = {}
    for meaning in captions.every_meaning():
        count = WORDINGS_WHOLE if _is_whole(meaning) else WORDINGS_PARTIAL
        of_meaning[meaning] = list(range(len(contents), len(contents) + count))
        contents += [models.ids(captions.caption(meaning, rng)) for _ in range(count)]
    states, pooled = _embed_all(models, contents, "prompts")
    return Prompts(states, pooled, torch.arange(len(contents))[:, None], of_meaning)


def _long_prompts(models: TextModels, rng: np.random.Generator) -> Prompts:
    """Prompts of two chunks; prompt 0 is two times the empty text."""
    pairs: list[tuple[list[int], list[int]]] = [([], [])]
    of_meaning: dict[Meaning, list[int]] = {}
    for meaning in captions.every_meaning():
        count = LONG_PROMPTS_PER_MEANING if _is_whole(meaning) else 2
        of_meaning[meaning] = list(range(len(pairs), len(pairs) + count))
        pairs += [_two_chunks(models, meaning, rng) for _ in range(count)]
    states, pooled = _embed_all(models, [chunk for pair in pairs for chunk in pair], "long prompts")
    return Prompts(states, pooled, torch.arange(2 * len(pairs)).view(-1, 2), of_meaning)


def _two_chunks(
    models: TextModels, meaning: Meaning, rng: np.random.Generator
) -> tuple[list[int], list[int]]:
    """The content of both chunks, the meaning in the first, in the second, or in both."""

    def full(text: str) -> list[int]:
        before = int(rng.integers(0, 30)) if rng.random() < 0.5 else 0
        return text_training.content_among_filler(
            models, text, rng, before=before, total=CONTENT_TOKENS
        )

    def ending(text: str) -> list[int]:
        before = int(rng.integers(0, 20)) if rng.random() < 0.5 else 0
        total = before + len(models.ids(text)) + (int(rng.integers(1, 40)) if before % 2 else 0)
        return text_training.content_among_filler(models, text, rng, before=before, total=total)

    def only_filler() -> list[int]:
        return models.ids(captions.filler(rng, phrases=40))

    text = captions.caption(meaning, rng)
    draw = rng.random()
    if draw < 0.12:
        return models.ids(text), []
    if draw < 0.35:
        return full(text), only_filler()[: int(rng.integers(1, CONTENT_TOKENS + 1))]
    if draw < 0.8 or not _is_whole(meaning):
        return only_filler()[:CONTENT_TOKENS], ending(text)
    thing = captions.plain_caption(Meaning(meaning.shape, meaning.color), rng)
    ground = captions.plain_caption(Meaning(background=meaning.background), rng)
    return full(thing), ending(ground)


class Sampler:
    """Draws training samples from what `prepare` computed."""

    def __init__(self, work: Path, seed: int) -> None:
        with torch.serialization.safe_globals([Meaning]):
            prepared = torch.load(work / "prepared.pt", weights_only=True)
        self.latents: dict[tuple[int, int], Tensor] = prepared["latents"]
        self.scenes = {
            size: [Scene(**scene) for scene in scenes]
            for size, scenes in prepared["scenes"].items()
        }
        self.short, self.long = Prompts(**prepared["short"]), Prompts(**prepared["long"])
        self.rng = np.random.default_rng(seed)

    def draw(
        self, count: int, zeros_share: float
    ) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
        """Latents, states, pooled states and the picture's height and width."""
        sizes = list(SHARES)
        size = sizes[self.rng.choice(len(sizes), p=list(SHARES.values()))]
        picks = self.rng.integers(len(self.latents[size]), size=count)
        prompts = self.long if self.rng.random() < LONG_STEP_SHARE else self.short
        chosen, zeroed = [], torch.zeros(count, dtype=torch.bool)
        for i, pick in enumerate(picks):
            prompt, zeroed[i] = self._prompt(prompts, self.scenes[size][pick], zeros_share)
            chosen.append(prompt)
        states, pooled = prompts.conditioning(chosen)
        states[zeroed], pooled[zeroed] = 0.0, 0.0
        return self.latents[size][torch.from_numpy(picks)], states, pooled, size

    def _prompt(self, prompts: Prompts, scene: Scene, zeros_share: float) -> tuple[int, bool]:
        """The index of a prompt that describes the scene, and whether to see zeros instead."""
        draw = self.rng.random()
        if draw < WHOLE_SHARE:
            meaning = Meaning(scene.shape, scene.color, scene.background)
        elif draw < WHOLE_SHARE + PARTIAL_SHARE:
            meaning = captions.partial_meaning(scene, self.rng)
        else:
            return 0, bool(self.rng.random() < zeros_share)
        options = prompts.of_meaning[meaning]
        return options[self.rng.integers(len(options))], False

    def time_ids(self, name: str, size: tuple[int, int], count: int) -> Tensor:
        """SDXL's size conditioning, (n, 6) for the base, (n, 5) for the refiner."""
        height, width = size
        original = torch.tensor([[height, width, 0, 0]]).repeat(count, 1).float()
        changed = torch.from_numpy(self.rng.random(count) < RANDOM_SIZE_SHARE)
        sizes = torch.from_numpy(self.rng.integers(48, 1100, size=(count, 2))).float()
        corners = torch.from_numpy(self.rng.integers(0, 64, size=(count, 2))).float()
        original[changed] = torch.cat([sizes, corners], dim=1)[changed]
        if name == "base":
            last = torch.tensor([[height, width]]).repeat(count, 1).float()
        else:
            last = torch.from_numpy(self.rng.uniform(1.0, 9.0, size=(count, 1))).float()
        return torch.cat([original, last], dim=1)


@dataclass
class _Checkpoint:
    """All that a training needs to go on as if it had not stopped."""

    path: Path
    unet: UNet2DConditionModel
    optimizer: torch.optim.Optimizer
    average: Average
    sampler: Sampler

    def save(self, steps: int) -> None:
        state = {
            "steps": steps,
            "unet": self.unet.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.weights,
            "torch": torch.get_rng_state(),
            "numpy": self.sampler.rng.bit_generator.state,
        }
        unfinished = self.path.with_suffix(".new")
        torch.save(state, unfinished)
        unfinished.replace(self.path)

    def restore(self) -> int:
        """The number of training steps already taken; 0 where there is no checkpoint."""
        if not self.path.exists():
            return 0
        state = torch.load(self.path, weights_only=True)
        self.unet.load_state_dict(state["unet"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.weights, self.average.updates = state["average"], state["steps"]
        torch.set_rng_state(state["torch"])
        self.sampler.rng.bit_generator.state = state["numpy"]
        steps: int = state["steps"]
        return steps


def train(name: str, work: Path, seed: int) -> None:
    """Train "base" or "refiner" and write its averaged weights; goes on from a checkpoint."""
    recipe = RECIPES[name]
    torch.manual_seed(seed + len(name))
    sampler = Sampler(work, seed + 20 + len(name))
    unet = architecture.base_unet() if name == "base" else architecture.refiner_unet()
    unet.train()
    alphas = architecture.alphas_cumprod()
    average = Average(unet, recipe.average_decay)
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, step / 100) * _cosine(step / recipe.steps)
    )
    checkpoint = _Checkpoint(work / f"{name}.checkpoint.pt", unet, optimizer, average, sampler)
    first_step = checkpoint.restore()
    for _ in range(first_step):
        schedule.step()
    progress = tqdm(range(first_step, recipe.steps), desc=name, mininterval=5.0)
    mean_loss = 0.0
    for step in progress:
        loss = _loss(name, recipe, unet, sampler, alphas)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update()
        mean_loss += (loss.item() - mean_loss) / min(step - first_step + 1, 200)
        progress.set_postfix(loss=f"{mean_loss:.4f}", refresh=False)
        if (step + 1) % CHECKPOINT_STEPS == 0:
            checkpoint.save(step + 1)
    with average.applied():
        torch.save(unet.state_dict(), work / f"{name}.pt")


def _cosine(share: float) -> float:
    """From 1 to 0.02."""
    return 0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * share))


def _loss(
    name: str, recipe: Recipe, unet: UNet2DConditionModel, sampler: Sampler, alphas: Tensor
) -> Tensor:
    latents, states, pooled, size = sampler.draw(recipe.batch, recipe.zeros_share)
    if name == "refiner":
        states = states[..., architecture.HIDDEN_1 :]
    count = len(latents)
    strata = (torch.arange(count) + torch.rand(count)) / count
    timesteps = (strata * recipe.timesteps).long()
    alpha = alphas[timesteps][:, None, None, None]
    noise = torch.randn_like(latents)
    if recipe.broad_noise:
        coarse = torch.randn(count, latents.shape[1], 4, 4)
        broad = functional.interpolate(coarse, size=latents.shape[-2:], mode="bicubic")
        noise = noise + recipe.broad_noise * torch.rand(count, 1, 1, 1) * broad
    noisy = alpha.sqrt() * latents + (1.0 - alpha).sqrt() * noise
    conditions = {"text_embeds": pooled, "time_ids": sampler.time_ids(name, size, count)}
    predicted = unet(noisy, timesteps, states, added_cond_kwargs=conditions).sample
    ratio = (alpha / (1.0 - alpha)).flatten()
    weight = (recipe.snr_numerator / ratio).clamp(max=recipe.weight_limit)
    error = (predicted - noise).square().mean(dim=(1, 2, 3))
    return (weight * error).mean()


def load(name: str, work: Path) -> UNet2DConditionModel:
    """The trained "base" or "refiner"."""
    unet = architecture.base_unet() if name == "base" else architecture.refiner_unet()
    unet.load_state_dict(torch.load(work / f"{name}.pt", weights_only=True))
    return unet.eval().requires_grad_(False)
