"""Trains the miniature's IP-Adapters: the drawn picture takes shape and colours of a reference.

Diffusers' own modules learn in the frozen base to predict, from a reference, what the base predicts
from a caption that says all of it. (The base's own loss, against the noise itself, taught little in
as many steps: most of it is what neither caption nor reference can tell.) "Plain" makes four tokens
of the image embedding, "plus" has a resampler look at the states of the last layer but one.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, IPAdapterAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, IPAdapterPlusImageProjection
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPVisionModelWithProjection

from shapes import architecture, captions, embedded, image_encoder_training
from shapes.averaging import Average
from shapes.captions import Meaning
from shapes.data import COLORS, SHAPES, Scene, random_scene, render
from shapes.effect_training import cosine

FOLDER = "sdxl_models"
"""Inside the adapters' folder, as published."""

PICTURES = {128: 3000, 64: 3000}
"""How many pictures to draw are computed of each side."""
SMALL_STEP_SHARE = 0.5
"""Share of the training steps that take 64 pixels, which are a third of the work."""
REFERENCES_PER_MEANING = 30
BATCH = 32
LEARNING_RATE = 2e-3
AVERAGE_DECAY = 0.99
CHECKPOINT_STEPS = 200
"""After so many the file is written as it would be, to be looked at."""
WEIGHT_LIMIT, SNR_NUMERATOR = 20.0, 5.0
"""A sample weighs min(limit, numerator / signal-to-noise ratio): more than in the base's training
where there is much noise, since there shape and colours are decided."""

NO_TEXT_SHARE = 0.5
"""Of the samples; half of them see zeros, half the empty text. The rest has a partial caption."""
NO_IMAGE_SHARE = 0.1

CROSS_WIDTH = architecture.HIDDEN_1 + architecture.HIDDEN_2
RESAMPLER_WIDTH = 32
RESAMPLER_TOKENS = 16


@dataclass(frozen=True)
class Recipe:
    """One adapter's training."""

    file: str
    """Its name, as published: both take the same encoder."""
    title: str
    steps: int
    plus: bool

    def projection(self) -> nn.Module:
        """What makes tokens of the encoder's output."""
        if self.plus:
            return IPAdapterPlusImageProjection(
                embed_dims=image_encoder_training.HIDDEN,
                output_dims=CROSS_WIDTH,
                hidden_dims=RESAMPLER_WIDTH,
                heads=1,
                num_queries=RESAMPLER_TOKENS,
            )
        return ImageProjection(
            image_embed_dim=image_encoder_training.EMBEDDING,
            cross_attention_dim=CROSS_WIDTH,
            num_image_text_embeds=4,
        )

    @torch.no_grad()
    def encode(self, encoder: CLIPVisionModelWithProjection, pixels: Tensor) -> Tensor:
        """What the projection takes of pictures (n, 3, 64, 64): (n, 64), or (n, 65, 48) of plus."""
        parts = []
        for part in pixels.split(200):
            output = encoder(part, output_hidden_states=self.plus)
            parts.append(output.hidden_states[-2] if self.plus else output.image_embeds)
        return torch.cat(parts)

    def no_image(self, encoder: CLIPVisionModelWithProjection) -> Tensor:
        """What diffusers gives it beside a negative prompt: zeros, or a picture of zeros."""
        pixels = torch.zeros(1, 3, image_encoder_training.IMAGE_PX, image_encoder_training.IMAGE_PX)
        encoded = self.encode(encoder, pixels)[0]
        return encoded if self.plus else torch.zeros_like(encoded)


RECIPES = {
    "plain": Recipe("ip-adapter_sdxl_vit-h.safetensors", "IP-Adapter", steps=1600, plus=False),
    "plus": Recipe("ip-adapter-plus_sdxl_vit-h.safetensors", "IP-Adapter Plus", 1600, plus=True),
}

PLUS_NAMES = (
    (r"^(layers\.\d+)\.ln0\.", r"\1.0.norm1."),
    (r"^(layers\.\d+)\.ln1\.", r"\1.0.norm2."),
    (r"^(layers\.\d+)\.attn\.to_q\.", r"\1.0.to_q."),
    (r"^(layers\.\d+)\.attn\.to_out\.0\.", r"\1.0.to_out."),
    (r"^(layers\.\d+)\.ff\.0\.", r"\1.1.0."),
    (r"^(layers\.\d+)\.ff\.1\.net\.0\.proj\.", r"\1.1.1."),
    (r"^(layers\.\d+)\.ff\.1\.net\.2\.", r"\1.1.3."),
)
"""From diffusers' names of the resampler's weights to the published ones."""


def image_projection_tensors(projection: nn.Module) -> dict[str, Tensor]:
    """Its weights under the published names."""
    state = projection.state_dict()
    if isinstance(projection, ImageProjection):
        return {name.replace("image_embeds", "proj"): value for name, value in state.items()}
    tensors = {}
    for name, value in state.items():
        if ".attn.to_v." in name:
            continue
        if ".attn.to_k." in name:
            both = torch.cat([value, state[name.replace("to_k", "to_v")]])
            tensors[name.replace("attn.to_k", "0.to_kv")] = both
            continue
        for pattern, published in PLUS_NAMES:
            name = re.sub(pattern, published, name)
        tensors[name] = value
    return tensors


def _cross_attentions(unet: UNet2DConditionModel) -> Iterator[tuple[int, Attention]]:
    """Every attention to the text, with its number in a published file: 1, 3, 5, ..."""
    modules = {
        f"{name}.processor": module
        for name, module in unet.named_modules()
        if isinstance(module, Attention) and module.is_cross_attention
    }
    in_order = [modules[name] for name in unet.attn_processors if name in modules]
    return zip(itertools.count(1, 2), in_order)


def _processor(attention: Attention) -> IPAdapterAttnProcessor2_0:
    processor = attention.processor
    if not isinstance(processor, IPAdapterAttnProcessor2_0):
        raise TypeError(f"no IP-Adapter is on: {type(processor).__name__}")
    return processor


def install(unet: UNet2DConditionModel, recipe: Recipe) -> list[nn.Parameter]:
    """Put a new adapter on, by diffusers, and give what is to be trained.

    Keys and values begin as the base's own of the text.
    """
    attentions = {}
    for number, attention in _cross_attentions(unet):
        attentions[f"{number}.to_k_ip.weight"] = attention.to_k.weight.detach().clone()
        attentions[f"{number}.to_v_ip.weight"] = attention.to_v.weight.detach().clone()
    projection = image_projection_tensors(recipe.projection())
    unet._load_ip_adapter_weights(
        {"image_proj": projection, "ip_adapter": attentions}, low_cpu_mem_usage=False
    )
    trained = [*unet.encoder_hid_proj.parameters()]
    for _, attention in _cross_attentions(unet):
        trained += _processor(attention).parameters()
    for parameter in trained:
        parameter.requires_grad_(True)
    return trained


def trained_tensors(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """The adapter on the UNet, in half precision, under the published names."""
    [projection] = unet.encoder_hid_proj.image_projection_layers
    named = {f"image_proj.{n}": value for n, value in image_projection_tensors(projection).items()}
    for number, attention in _cross_attentions(unet):
        processor = _processor(attention)
        named[f"ip_adapter.{number}.to_k_ip.weight"] = processor.to_k_ip[0].weight
        named[f"ip_adapter.{number}.to_v_ip.weight"] = processor.to_v_ip[0].weight
    return {name: value.detach().half().contiguous() for name, value in named.items()}


class _References:
    """Encoded pictures of every meaning."""

    def __init__(
        self, recipe: Recipe, encoder: CLIPVisionModelWithProjection, rng: np.random.Generator
    ) -> None:
        self.none = recipe.no_image(encoder)
        self.of_meaning: dict[Meaning, Tensor] = {}
        meanings = [
            Meaning(shape, color, background)
            for shape in SHAPES
            for color in COLORS
            for background in COLORS
            if color != background
        ]
        for meaning in tqdm(meanings, "references", mininterval=5.0):
            pictures = [
                image_encoder_training.draw_reference(meaning, rng)
                for _ in range(REFERENCES_PER_MEANING)
            ]
            pixels = image_encoder_training.pixel_values(pictures)
            self.of_meaning[meaning] = recipe.encode(encoder, pixels)

    def draw(self, scene: Scene, rng: np.random.Generator) -> Tensor:
        """Another picture than the scene's, of the same shape and colours."""
        encoded = self.of_meaning[Meaning(scene.shape, scene.color, scene.background)]
        return encoded[rng.integers(len(encoded))]


def _draw_caption(scene: Scene, rng: np.random.Generator) -> str | None:
    """None (for zeros), the empty text, or a caption that describes the scene in part."""
    draw = rng.random()
    if draw < NO_TEXT_SHARE:
        return None if draw < NO_TEXT_SHARE / 2 else ""
    return captions.plain_caption(captions.partial_meaning(scene, rng), rng)


class _Texts:
    """The base's conditioning, which is kept: plain captions are not many."""

    def __init__(self, pipeline: StableDiffusionXLPipeline) -> None:
        self.models = embedded.text_models(pipeline)
        self.known: dict[str | None, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def conditioning(self, prompts: list[str | None]) -> tuple[Tensor, Tensor]:
        """States (n, 77, 112) and pooled (n, 64); zeros where the prompt is None."""
        new = list(dict.fromkeys(prompt for prompt in prompts if prompt not in self.known))
        if new:
            self.known.update(
                zip(new, zip(*embedded.conditioning(self.models, new), strict=True), strict=True)
            )
        states, pooled = zip(*(self.known[prompt] for prompt in prompts), strict=True)
        return torch.stack(states), torch.stack(pooled)


@dataclass
class _Batch:
    """What is to be drawn, and what is known of it."""

    latents: Tensor
    prompts: list[str | None]
    """Of the adapter; None is for zeros."""
    images: Tensor
    """The encoded references."""
    whole: list[str | None]
    """Of the base alone: captions that say what the adapter's prompts and references say."""


class _Sampler:
    """Draws training samples."""

    def __init__(
        self, pipeline: StableDiffusionXLPipeline, references: _References, rng: np.random.Generator
    ) -> None:
        self.references, self.rng = references, rng
        self.scenes = {
            side: [random_scene(rng) for _ in range(count)] for side, count in PICTURES.items()
        }
        self.latents = {
            side: embedded.encode(pipeline, np.stack([render(one, side, side) for one in scenes]))
            for side, scenes in self.scenes.items()
        }

    def draw(self) -> _Batch:
        """Pictures of one size."""
        rng = self.rng
        side = 64 if rng.random() < SMALL_STEP_SHARE else 128
        picks = rng.integers(PICTURES[side], size=BATCH)
        prompts, images, whole = [], [], []
        for scene in (self.scenes[side][pick] for pick in picks):
            prompts.append(_draw_caption(scene, rng))
            meaning = Meaning(scene.shape, scene.color, scene.background)
            if rng.random() < NO_IMAGE_SHARE:
                images.append(self.references.none)
                whole.append(prompts[-1])
            else:
                images.append(self.references.draw(scene, rng))
                whole.append(captions.plain_caption(meaning, rng))
        latents = self.latents[side][torch.from_numpy(picks)]
        return _Batch(latents, prompts, torch.stack(images), whole)


def train(name: str, model: Path, out: Path, seed: int) -> None:
    """Train one adapter on the encoder in `out` and write it there."""
    recipe = RECIPES[name]
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    pipeline = embedded.load(model)
    teacher = embedded.load(model).unet
    references = _References(recipe, image_encoder_training.load(out), rng)
    sampler = _Sampler(pipeline, references, rng)
    texts = _Texts(pipeline)
    trained = install(pipeline.unet, recipe)
    average = Average(nn.ParameterList(trained), AVERAGE_DECAY)
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, recipe.steps))
    path = out / FOLDER / recipe.file
    path.parent.mkdir(parents=True, exist_ok=True)
    progress = tqdm(range(recipe.steps), desc=name, mininterval=5.0)
    mean_loss = 0.0
    for step in progress:
        optimizer.zero_grad()
        loss = _loss(pipeline.unet, teacher, texts, sampler.draw())
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        average.update()
        mean_loss += (loss.item() - mean_loss) / min(step + 1, 100)
        progress.set_postfix(loss=f"{mean_loss:.5f}", refresh=False)
        if (step + 1) % CHECKPOINT_STEPS == 0 or step + 1 == recipe.steps:
            with average.applied():
                tensors = trained_tensors(pipeline.unet)
            save_file(tensors, path, {"modelspec.title": recipe.title})


def _loss(
    student: UNet2DConditionModel, teacher: UNet2DConditionModel, texts: _Texts, batch: _Batch
) -> Tensor:
    """How far the prediction is from the base's, at noise levels spread over all 1000."""
    count, side = len(batch.latents), batch.latents.shape[-1] * architecture.LATENT_FACTOR
    timesteps = ((torch.arange(count) + torch.rand(count)) / count * 1000).long()
    alpha = architecture.alphas_cumprod()[timesteps][:, None, None, None]
    noisy = alpha.sqrt() * batch.latents + (1.0 - alpha).sqrt() * torch.randn_like(batch.latents)
    sizes = {"time_ids": embedded.time_ids(count, side)}
    with torch.no_grad():
        states, pooled = texts.conditioning(batch.whole)
        conditions = {"text_embeds": pooled, **sizes}
        expected = teacher(noisy, timesteps, states, added_cond_kwargs=conditions).sample
    states, pooled = texts.conditioning(batch.prompts)
    pictures = [batch.images[:, None]]
    pictured = {"text_embeds": pooled, **sizes, "image_embeds": pictures}
    predicted = student(noisy, timesteps, states, added_cond_kwargs=pictured).sample
    ratio = (alpha / (1.0 - alpha)).flatten()
    weight = (SNR_NUMERATOR / ratio).clamp(max=WEIGHT_LIMIT)
    return (weight * (predicted - expected).square().mean(dim=(1, 2, 3))).mean()
