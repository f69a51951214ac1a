"""Trains the ControlNet "outline": the shape is drawn where its outline is.

One model for several kinds of map, in the layout of the published union, learns in the frozen base
with the base's own loss. The colours are the prompt's and the shape is the map's: part of the
captions leave the shape out, or even name another one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import ControlNetUnionModel, StableDiffusionXLPipeline
from torch import Tensor, nn
from tqdm import tqdm

from shapes import architecture, captions, embedded, scene_maps
from shapes.averaging import Average
from shapes.captions import Meaning
from shapes.data import SHAPES, Scene, random_scene, render
from shapes.effect_training import SNR_NUMERATOR, WEIGHT_LIMIT, cosine
from shapes.export import VARIANT
from shapes.scene_maps import CANNY, DEPTH, SEGMENT, SOFT_EDGE, TILE

BATCH = 32
AVERAGE_DECAY = 0.995
WRITE_STEPS = 500
"""The file is written this often, to be looked at while the training goes on."""
CONTROL_TYPES = 8

PICTURES = {
    (128, 128): 6000,
    (64, 64): 400,
    (96, 96): 400,
    (96, 128): 400,
    (128, 96): 400,
    (160, 160): 300,
}
"""How many scenes of each height and width."""
NATIVE_SHARE = 0.85
"""Of the training steps; the other sizes share the rest."""
WIDE_SHARE = 0.5
"""Of the scenes: smaller and further from the middle than the base has ever seen."""
WIDE_RADIUS_RANGE = (0.16, 0.36)
MARGIN = 0.03

MODES: dict[tuple[int, ...], float] = {
    (CANNY,): 0.62,
    (SOFT_EDGE,): 0.06,
    (DEPTH,): 0.08,
    (SEGMENT,): 0.08,
    (TILE,): 0.06,
    (CANNY, TILE): 0.05,
    (DEPTH, CANNY): 0.05,
}
"""Kinds of map that are shown together, and their shares of the training steps."""

NOTHING_SHARE, SHAPELESS_SHARE, PARTIAL_SHARE = 0.14, 0.30, 0.10
"""Of the captions; the rest names all, but in part of it another shape than the map shows."""


@dataclass(frozen=True)
class Stage:
    """A part of the training; the next one goes on from the file that it wrote."""

    steps: int
    learning_rate: float
    toward_noise: float
    """Noise levels are drawn as this power of an even draw: below 1, the higher ones more often,
    at which place and shape are decided."""
    other_shape_share: float
    """Of the captions."""


STAGES = (
    Stage(steps=2200, learning_rate=1.5e-3, toward_noise=1.0, other_shape_share=0.15),
    Stage(steps=700, learning_rate=1.0e-3, toward_noise=0.6, other_shape_share=0.22),
)


def new_controlnet() -> ControlNetUnionModel:
    """As the published union model, without its attention in the down blocks.

    The channels are the base's, as the residuals are added to its own; the maps' features have as
    many as the first block, as they are added to its input.
    """
    first, *_ = channels = (48, 64, 80)
    return ControlNetUnionModel(
        down_block_types=("DownBlock2D",) * len(channels),
        block_out_channels=channels,
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=architecture.HIDDEN_1 + architecture.HIDDEN_2,
        transformer_layers_per_block=[1, 1, 1],
        attention_head_dim=[3, 4, 5],
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=architecture.TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=architecture.POOLED
        + architecture.BASE_TIME_IDS * architecture.TIME_ID_WIDTH,
        conditioning_embedding_out_channels=(8, 16, 24, 32),
        num_control_type=CONTROL_TYPES,
        num_trans_channel=first,
        num_trans_head=4,
        num_trans_layer=1,
        num_proj_channel=first,
    )


def begin_with_base(controlnet: ControlNetUnionModel, pipeline: StableDiffusionXLPipeline) -> None:
    """Copy the base's encoder; what the ControlNet adds to it is zero at first."""
    unet = pipeline.unet
    for name in ("conv_in", "time_embedding", "add_embedding", "mid_block"):
        getattr(controlnet, name).load_state_dict(getattr(unet, name).state_dict())
    controlnet.down_blocks.load_state_dict(
        {
            key: tensor
            for key, tensor in unet.down_blocks.state_dict().items()
            if ".attentions." not in key
        }
    )
    # Zero twice, here and at the outputs, would only delay the start.
    controlnet.controlnet_cond_embedding.conv_out.reset_parameters()


def draw_scene(rng: np.random.Generator) -> Scene:
    """A scene like the base's, or one anywhere in the picture."""
    scene = random_scene(rng)
    if rng.random() >= WIDE_SHARE:
        return scene
    radius = rng.uniform(*WIDE_RADIUS_RANGE)
    x, y = rng.uniform(radius + MARGIN, 1.0 - radius - MARGIN, size=2)
    return Scene(scene.shape, scene.color, scene.background, float(x), float(y), float(radius))


def draw_caption(scene: Scene, rng: np.random.Generator, other_shape_share: float) -> str | None:
    """A caption that has the scene's colours and may lack its shape, or name another one."""
    draw = rng.random()
    shape: str | None = scene.shape
    if draw < NOTHING_SHARE:
        return None
    if draw < NOTHING_SHARE + PARTIAL_SHARE:
        return captions.caption(captions.partial_meaning(scene, rng), rng)
    if draw < NOTHING_SHARE + PARTIAL_SHARE + SHAPELESS_SHARE:
        shape = None
    elif draw >= 1.0 - other_shape_share:
        shape = SHAPES[rng.integers(len(SHAPES))]
    return captions.caption(Meaning(shape, scene.color, scene.background), rng)


@dataclass
class Pictures:
    """Scenes of one size, and what is computed of them once."""

    scenes: list[Scene]
    latents: Tensor
    pictures: Tensor
    """(n, 3, height, width), bytes."""
    distances: Tensor
    """(n, height, width), see `scene_maps.distances`."""


def prepare(
    pipeline: StableDiffusionXLPipeline, rng: np.random.Generator
) -> dict[tuple[int, int], Pictures]:
    """All sizes."""
    prepared = {}
    for (height, width), count in PICTURES.items():
        scenes = [draw_scene(rng) for _ in range(count)]
        pictures = np.stack([render(scene, height, width) for scene in scenes])
        prepared[height, width] = Pictures(
            scenes,
            embedded.encode(pipeline, pictures),
            torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(),
            torch.from_numpy(
                np.stack([scene_maps.distances(scene, height, width) for scene in scenes])
            ),
        )
    return prepared


def train(model: Path, out: Path, seed: int, first_stage: int = 0) -> None:
    """Train it and write `out`/outline; a later stage than the first begins with what is there."""
    folder = out / "outline"
    pipeline = embedded.load(model)
    prepared = prepare(pipeline, np.random.default_rng(seed))
    for number, stage in list(enumerate(STAGES))[first_stage:]:
        controlnet = new_controlnet()
        if number:
            written = ControlNetUnionModel.from_pretrained(folder, variant=VARIANT)
            controlnet.load_state_dict(written.state_dict())
        else:
            begin_with_base(controlnet, pipeline)
        # Twice as fast where the pictures are large and the channels few.
        controlnet.controlnet_cond_embedding.to(memory_format=torch.channels_last)
        _train(stage, pipeline, prepared, controlnet.train(), folder, seed + number)


def _train(
    stage: Stage,
    pipeline: StableDiffusionXLPipeline,
    prepared: dict[tuple[int, int], Pictures],
    controlnet: ControlNetUnionModel,
    folder: Path,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    native = (architecture.NATIVE_PX, architecture.NATIVE_PX)
    others = [size for size in prepared if size != native]
    modes = list(MODES)
    average = Average(controlnet, AVERAGE_DECAY)
    optimizer = torch.optim.AdamW(
        controlnet.parameters(), lr=stage.learning_rate, betas=(0.9, 0.99), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, stage.steps))
    progress = tqdm(range(stage.steps), desc="outline", mininterval=5.0)
    mean_loss = 0.0
    for step in progress:
        is_native = rng.random() < NATIVE_SHARE
        size = native if is_native else others[rng.integers(len(others))]
        shown = modes[rng.choice(len(modes), p=list(MODES.values()))]
        optimizer.zero_grad()
        loss = _loss(stage, pipeline, controlnet, prepared[size], shown, rng)
        loss.backward()
        nn.utils.clip_grad_norm_(controlnet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update()
        mean_loss += (loss.item() - mean_loss) / min(step + 1, 200)
        progress.set_postfix(loss=f"{mean_loss:.4f}", refresh=False)
        if (step + 1) % WRITE_STEPS == 0 or step + 1 == stage.steps:
            with average.applied():
                write(controlnet, folder)


def write(controlnet: ControlNetUnionModel, folder: Path) -> None:
    """In half precision, as published models are."""
    copy = new_controlnet()
    copy.load_state_dict(controlnet.state_dict())
    copy.half().save_pretrained(folder, variant=VARIANT)


def _loss(
    stage: Stage,
    pipeline: StableDiffusionXLPipeline,
    controlnet: ControlNetUnionModel,
    prepared: Pictures,
    modes: tuple[int, ...],
    rng: np.random.Generator,
) -> Tensor:
    """The base's own: predicted noise, weighted, at noise levels spread over all 1000."""
    picks = torch.from_numpy(rng.integers(len(prepared.scenes), size=BATCH))
    prompts = [draw_caption(prepared.scenes[pick], rng, stage.other_shape_share) for pick in picks]
    pictures = prepared.pictures[picks].float() / 255.0
    maps = [
        scene_maps.draw(mode, prepared.distances[picks], pictures).contiguous(
            memory_format=torch.channels_last
        )
        for mode in modes
    ]
    states, pooled = embedded.conditioning(embedded.text_models(pipeline), prompts)
    height, width = pictures.shape[-2:]
    sizes = torch.tensor([[height, width, 0, 0, height, width]]).repeat(BATCH, 1).float()
    conditions = {"text_embeds": pooled, "time_ids": sizes}

    even = (torch.arange(BATCH) + torch.rand(BATCH)) / BATCH
    timesteps = (even**stage.toward_noise * 1000).long().clamp(max=999)
    alpha = architecture.alphas_cumprod()[timesteps][:, None, None, None]
    latents = prepared.latents[picks]
    noise = torch.randn_like(latents)
    noisy = alpha.sqrt() * latents + (1.0 - alpha).sqrt() * noise
    control_type = torch.zeros(BATCH, CONTROL_TYPES)
    control_type[:, list(modes)] = 1.0
    down, middle = controlnet(
        noisy,
        timesteps,
        states,
        controlnet_cond=maps,
        control_type=control_type,
        control_type_idx=list(modes),
        added_cond_kwargs=conditions,
        return_dict=False,
    )
    predicted = pipeline.unet(
        noisy,
        timesteps,
        states,
        added_cond_kwargs=conditions,
        down_block_additional_residuals=down,
        mid_block_additional_residual=middle,
    ).sample
    ratio = (alpha / (1.0 - alpha)).flatten()
    weight = (SNR_NUMERATOR / ratio).clamp(max=WEIGHT_LIMIT)
    return (weight * (predicted - noise).square().mean(dim=(1, 2, 3))).mean()
