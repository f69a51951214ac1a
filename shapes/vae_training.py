"""Second phase of the training: the autoencoder.

Encoder and decoder first learn together. Three latent channels are drawn towards the picture
averaged over 8x8 pixels, which makes latents smooth and quick to learn; the fourth is free for what
the average loses. Then the encoder is frozen, its latents are whitened, and the decoder goes on
alone with disturbed latents, so that it turns a sampler's small errors into clean shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from shapes import architecture
from shapes.averaging import Average
from shapes.data import random_scene, render

JOINT_STEPS = 700
DECODER_STEPS = 2400
LEARNING_RATE = 2e-3
DECODER_LEARNING_RATE = 1.5e-3
EDGE_WEIGHT = 4.0
FREE_CHANNEL_PENALTY = 0.01
FREE_CHANNEL_STD = 0.6
"""Of the whitened latents; less than 1 keeps a weakly used channel from being blown up."""
LOG_VARIANCE = -8.0
SIZES_PX = ((128, 128, 8), (128, 128, 8), (128, 128, 8), (64, 64, 24), (96, 128, 10), (160, 160, 5))
"""Heights, widths and batch sizes, drawn with equal chance."""


def _pictures(rng: np.random.Generator, height: int, width: int, count: int) -> Tensor:
    """Random scenes in -1..1, (count, 3, height, width)."""
    pictures = np.stack([render(random_scene(rng), height, width) for _ in range(count)])
    return to_tensor(pictures)


def to_tensor(pictures: np.ndarray) -> Tensor:
    """uint8 (n, height, width, 3) to floats in -1..1, (n, 3, height, width)."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float().div(127.5).sub(1.0)


def _batches(steps: int, rng: np.random.Generator) -> Iterator[Tensor]:
    for _ in range(steps):
        yield _pictures(rng, *SIZES_PX[rng.integers(len(SIZES_PX))])


def reconstruction_loss(decoded: Tensor, pictures: Tensor) -> Tensor:
    """L1 and squared error, both weighted towards edges."""
    smooth = functional.avg_pool2d(pictures, 5, stride=1, padding=2, count_include_pad=False)
    edges = (pictures - smooth).abs().amax(dim=1, keepdim=True)
    weight = 1.0 + EDGE_WEIGHT * (edges > 0.05).float()
    error = decoded - pictures
    return (weight * (error.abs() + 2.0 * error.square())).mean()


def _encode(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    latents: Tensor = vae.encode(pictures).latent_dist.mode()
    return latents


def train_joint(work: Path, seed: int) -> None:
    """Train encoder and decoder together, whiten, and write `vae-joint.pt`."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    vae = architecture.vae().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, JOINT_STEPS, pct_start=0.1
    )
    progress = tqdm(range(JOINT_STEPS), desc="autoencoder")
    for step, pictures in zip(progress, _batches(JOINT_STEPS, rng), strict=True):
        share = step / JOINT_STEPS
        latents = _encode(vae, pictures)
        noise = torch.randn_like(latents) * torch.rand(len(latents), 1, 1, 1) * 0.07
        decoded = vae.decode(latents + noise).sample
        averages = functional.avg_pool2d(pictures, architecture.LATENT_FACTOR)
        supervised = functional.mse_loss(latents[:, :3], averages)
        loss = reconstruction_loss(decoded, pictures)
        loss = loss + 10.0 * max(0.1, 1.0 - share) * supervised
        loss = loss + FREE_CHANNEL_PENALTY * latents[:, 3].square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(
            loss=f"{loss.item():.4f}", averages=f"{supervised.item():.5f}", refresh=False
        )
    vae.eval()
    tqdm.write(f"joint training: {_quality(vae, seed)}")
    _whiten(vae, np.random.default_rng(seed + 1))
    tqdm.write(f"whitened: {_quality(vae, seed)}")
    torch.save(vae.state_dict(), work / "vae-joint.pt")


@torch.no_grad()
def _whiten(vae: AutoencoderKL, rng: np.random.Generator) -> None:
    """Fold unit variance, SDXL's scaling and a small posterior variance into the 1x1 layers."""
    batches = [_encode(vae, _pictures(rng, 128, 128, 32)) for _ in range(16)]
    latents = torch.cat(batches).permute(1, 0, 2, 3).flatten(1)
    mean = latents.mean(dim=1)
    centred = latents - mean[:, None]
    values, vectors = torch.linalg.eigh(centred[:3] @ centred[:3].T / centred.shape[1])
    tqdm.write(f"standard deviations, averages and free: {values.sqrt()}, {centred[3].std():.4f}")
    forward, backward = torch.eye(4), torch.eye(4)
    forward[:3, :3] = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    backward[:3, :3] = vectors @ torch.diag(values.sqrt()) @ vectors.T
    forward[3, 3] = FREE_CHANNEL_STD / centred[3].std()
    backward[3, 3] = 1.0 / forward[3, 3]
    forward = forward / architecture.SCALING_FACTOR
    backward = backward * architecture.SCALING_FACTOR

    quant, post = vae.quant_conv, vae.post_quant_conv
    weight, bias = quant.weight[:4, :, 0, 0], quant.bias[:4]
    quant.weight[:4] = (forward @ weight)[..., None, None]
    quant.bias[:4] = forward @ (bias - mean)
    quant.weight[4:] = 0.0
    quant.bias[4:] = LOG_VARIANCE
    post_weight = post.weight[:, :, 0, 0].clone()
    post.bias += post_weight @ mean
    post.weight.copy_((post_weight @ backward)[..., None, None])


@torch.no_grad()
def _quality(vae: AutoencoderKL, seed: int) -> str:
    pictures = _pictures(np.random.default_rng(seed + 2), 128, 128, 32)
    decoded = vae.decode(_encode(vae, pictures)).sample.clamp(-1.0, 1.0)
    error = functional.mse_loss(decoded, pictures) / 4.0
    return f"{-10.0 * float(error.log10()):.1f} dB at 128 px"


def disturb(latents: Tensor) -> Tensor:
    """Whitened latents with errors as samplers make them: white, broad, and overshoot."""

    def uniform(limit: float) -> Tensor:
        return torch.rand(len(latents), 1, 1, 1) * limit

    coarse = torch.randn(len(latents), latents.shape[1], 3, 3)
    broad = functional.interpolate(coarse, size=latents.shape[-2:], mode="bicubic")
    plain = torch.randn(len(latents), latents.shape[1], 1, 1)
    contrast = 1.0 + 0.06 * torch.randn(len(latents), 1, 1, 1)
    noise = torch.randn_like(latents) * uniform(0.16) + broad * uniform(0.12) + plain * uniform(0.1)
    untouched = (torch.rand(len(latents), 1, 1, 1) < 0.15).float()
    return untouched * latents + (1.0 - untouched) * (latents * contrast + noise)


def train_decoder(work: Path, seed: int) -> None:
    """Train the decoder alone on disturbed latents and write `vae.pt`."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed + 3)
    vae = load(work, "vae-joint.pt").to(memory_format=torch.channels_last)
    decoder = nn.ModuleList([vae.post_quant_conv, vae.decoder]).requires_grad_(True).train()
    average = Average(decoder, decay=0.998)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=DECODER_LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, DECODER_LEARNING_RATE, DECODER_STEPS, pct_start=0.05
    )
    scaling = architecture.SCALING_FACTOR
    progress = tqdm(range(DECODER_STEPS), desc="decoder")
    for _, pictures in zip(progress, _batches(DECODER_STEPS, rng), strict=True):
        with torch.no_grad():
            latents = disturb(_encode(vae, pictures) * scaling) / scaling
        loss = reconstruction_loss(vae.decode(latents).sample, pictures)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update()
        progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    with average.applied():
        vae.eval()
        tqdm.write(f"decoder alone: {_quality(vae, seed)}")
        torch.save(vae.state_dict(), work / "vae.pt")


def load(work: Path, name: str = "vae.pt") -> AutoencoderKL:
    """An autoencoder of the work folder, frozen."""
    vae = architecture.vae()
    vae.load_state_dict(torch.load(work / name, weights_only=True))
    vae.eval().requires_grad_(False)
    return vae
