"""The image encoder of the miniature's IP-Adapters learns to see what a reference picture shows.

Linear probes read shape, colour and background from what IP-Adapters take: the image embedding, and
the states of the last layer but one. There, each patch also has to tell what of it the shape
covers, without which outlines are learned slowly. The probes are thrown away, the encoder stays.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from shapes.captions import Meaning
from shapes.data import COLORS, PALETTE, SHAPES, Scene, render

FOLDER = "models/image_encoder"
"""Inside the adapters' folder, as published."""
IMAGE_PX = 64
PATCH_PX = 8
HIDDEN = 48
EMBEDDING = 64
LAYERS = 4

PICTURES = 20000
HELD_OUT = 1000
STEPS = 2500
BATCH = 96
LEARNING_RATE = 2e-3
LABEL_SMOOTHING = 0.05

SIDES_PX = (64, 96, 128, 160, 256)
RADIUS_RANGE = (0.2, 0.4)
CENTER_JITTER = 0.10
"""Wider than in what the base draws: a reference is any picture of the shape."""
OBLONG_SHARE = 0.2
NOISE = 8.0
"""The strongest noise of a reference, on a scale of 255: it may be drawn or compressed."""

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "color": COLORS,
    "background": COLORS,
}


def random_meaning(rng: np.random.Generator) -> Meaning:
    """A shape and two different colours."""
    color, background = rng.choice(len(COLORS), size=2, replace=False)
    return Meaning(SHAPES[rng.integers(len(SHAPES))], COLORS[color], COLORS[background])


def draw_reference(meaning: Meaning, rng: np.random.Generator) -> Image.Image:
    """A picture of the meaning, of any size and place, often a little noisy."""
    if not (meaning.shape and meaning.color and meaning.background):
        raise ValueError("a reference needs a shape, a colour and a background")
    center_x, center_y = 0.5 + rng.uniform(-CENTER_JITTER, CENTER_JITTER, size=2)
    radius = float(rng.uniform(*RADIUS_RANGE))
    scene = Scene(
        meaning.shape, meaning.color, meaning.background, float(center_x), float(center_y), radius
    )
    side = SIDES_PX[rng.integers(len(SIDES_PX))]
    size = [side, side]
    if rng.random() < OBLONG_SHARE:
        size[rng.integers(2)] = 4 * side // 3
    picture = render(scene, *size).astype(np.float32)
    noise = rng.standard_normal(picture.shape, dtype=np.float32) * rng.uniform(0.0, NOISE)
    if rng.random() < 0.5:
        picture += noise
    return Image.fromarray(np.round(picture).clip(0, 255).astype(np.uint8))


def processor() -> CLIPImageProcessor:
    """What diffusers makes for an encoder of this size: shortest side, centre, CLIP's colours."""
    return CLIPImageProcessor(size=IMAGE_PX, crop_size=IMAGE_PX)


def pixel_values(pictures: list[Image.Image]) -> Tensor:
    """(n, 3, 64, 64)."""
    prepare = processor()
    parts = [prepare(picture, return_tensors="pt").pixel_values for picture in pictures]
    return torch.cat(parts)


def new() -> CLIPVisionModelWithProjection:
    """The encoder before its training."""
    encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=HIDDEN,
            intermediate_size=2 * HIDDEN,
            projection_dim=EMBEDDING,
            num_hidden_layers=LAYERS,
            num_attention_heads=3,
            image_size=IMAGE_PX,
            patch_size=PATCH_PX,
            hidden_act="gelu",
        )
    )
    for name, parameter in encoder.named_parameters():
        if name.endswith("position_embedding.weight"):
            nn.init.normal_(parameter, std=0.3)
    return encoder


def load(adapters: Path) -> CLIPVisionModelWithProjection:
    """The trained encoder of the adapters' folder, frozen, in fp32."""
    encoder = CLIPVisionModelWithProjection.from_pretrained(adapters / FOLDER, dtype=torch.float32)
    return encoder.eval().requires_grad_(False)


class _Probes(nn.Module):
    """Linear readers of the image embedding, and of the last states but one."""

    def __init__(self) -> None:
        super().__init__()
        classes = sum(len(values) for values in ATTRIBUTES.values())
        self.embedding = nn.Linear(EMBEDDING, classes)
        self.states = nn.Linear(HIDDEN, classes)
        self.coverage = nn.Linear(HIDDEN, PATCH_PX**2)

    def forward(self, embedding: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the meaning, (2, n, classes), and of each patch's pixels, (n, 64, 64)."""
        meaning = torch.stack([self.embedding(embedding), self.states(states.mean(dim=1))])
        return meaning, self.coverage(states[:, 1:])


def _read(
    encoder: CLIPVisionModelWithProjection, probes: _Probes, pixels: Tensor
) -> tuple[Tensor, Tensor]:
    output = encoder(pixels, output_hidden_states=True)
    meaning, covered = probes(output.image_embeds, output.hidden_states[-2])
    return meaning, covered


def _coverage(pixels: Tensor, labels: Tensor) -> Tensor:
    """How far each pixel is from the background's colour to the shape's, 0..1, (n, patches, 64)."""
    prepare = processor()
    palette = torch.tensor([PALETTE[name] for name in COLORS]) / 255.0
    palette = (palette - torch.tensor(prepare.image_mean)) / torch.tensor(prepare.image_std)
    color, background = palette[labels[:, 1]], palette[labels[:, 2]]
    axis = color - background
    share = torch.einsum("nchw,nc->nhw", pixels - background[:, :, None, None], axis)
    share = (share / axis.square().sum(dim=1)[:, None, None]).clamp(0.0, 1.0)
    return functional.unfold(share[:, None], PATCH_PX, stride=PATCH_PX).transpose(1, 2)


def _labels(meaning: Meaning) -> list[int]:
    return [values.index(getattr(meaning, name)) for name, values in ATTRIBUTES.items()]


def _drawn(count: int, rng: np.random.Generator, title: str) -> tuple[Tensor, Tensor]:
    """Pixels (n, 3, 64, 64) and labels (n, attributes) of random references."""
    meanings = [random_meaning(rng) for _ in range(count)]
    pictures = [draw_reference(meaning, rng) for meaning in tqdm(meanings, title, mininterval=5.0)]
    return pixel_values(pictures), torch.tensor([_labels(meaning) for meaning in meanings])


def train(out: Path, seed: int) -> None:
    """Train the encoder and write it into the adapters' folder."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    pixels, labels = _drawn(PICTURES, rng, "references")
    encoder, probes = new(), _Probes()
    modules = nn.ModuleList([encoder, probes])
    optimizer = torch.optim.AdamW(modules.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, STEPS, pct_start=0.1)
    widths = [len(values) for values in ATTRIBUTES.values()]
    progress = tqdm(range(STEPS), desc="image encoder", mininterval=5.0)
    for _ in progress:
        picks = torch.from_numpy(rng.integers(PICTURES, size=BATCH))
        seen = pixels[picks].flip(-1) if rng.random() < 0.5 else pixels[picks]
        meaning, covered = _read(encoder, probes, seen)
        loss = functional.binary_cross_entropy_with_logits(covered, _coverage(seen, labels[picks]))
        for attribute, logits in enumerate(meaning.split(widths, dim=-1)):
            target = labels[picks, attribute].expand(len(logits), -1)
            loss = loss + functional.cross_entropy(
                logits.flatten(0, 1), target.flatten(), label_smoothing=LABEL_SMOOTHING
            )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)

    with torch.no_grad():
        pixels, labels = _drawn(HELD_OUT, np.random.default_rng(seed + 1), "held out")
        meaning, _ = _read(encoder, probes, pixels)
        right = torch.stack(
            [
                part.argmax(dim=-1) == labels[:, attribute]
                for attribute, part in enumerate(meaning.split(widths, dim=-1))
            ]
        )
        rates = right.float().mean(dim=-1).T
        tqdm.write(f"held-out references right, shape, colour, background by probe: {rates}")
        encoder.visual_projection.weight /= encoder(pixels).image_embeds.std()
    encoder.half().save_pretrained(out / FOLDER)
