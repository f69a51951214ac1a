"""Draws with plain diffusers and the trained IP-Adapters, and counts what the pictures have of the
reference: `python -m shapes.evaluate_ip_adapter models/ip-adapters --count 200 --sheet sheet.png`.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from diffusers.models.embeddings import ImageProjection
from PIL import Image
from tqdm import tqdm

from shapes import architecture, captions, embedded, image_encoder_training, ip_adapter_training
from shapes.captions import Meaning
from shapes.data import Scene
from shapes.image_encoder_training import draw_reference, random_meaning
from shapes.judge import CLEAR_IOU, Judgement, judge
from shapes.sheet import contact_sheet

SHEET_COLUMNS = 10
BATCH = 20

WAYS = ("empty", "a shape", "background", "partial", "contradicting")


def prompt(way: str, meaning: Meaning, rng: np.random.Generator) -> str:
    """What is said of a picture whose reference has the meaning."""
    if way == "background":
        return f"a shape on a {meaning.background} background"
    if way == "partial":
        scene = Scene(str(meaning.shape), str(meaning.color), str(meaning.background))
        return captions.caption(captions.partial_meaning(scene, rng), rng)
    if way == "contradicting":
        return captions.caption(_other(meaning, rng), rng)
    return "" if way == "empty" else way


def _other(meaning: Meaning, rng: np.random.Generator) -> Meaning:
    """Another shape in another colour, on another background."""
    while True:
        other = random_meaning(rng)
        if all(getattr(other, name) != value for name, value in vars(meaning).items() if value):
            return other


def load(model: Path, adapters: Path, name: str) -> StableDiffusionXLPipeline:
    """The base with one adapter on, as plain diffusers loads both, with DDIM."""
    pipeline = embedded.load(model)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.load_ip_adapter(
        str(adapters),
        subfolder=ip_adapter_training.FOLDER,
        weight_name=ip_adapter_training.RECIPES[name].file,
        image_encoder_folder=image_encoder_training.FOLDER,
    )
    return pipeline


@torch.no_grad()
def draw(
    pipeline: StableDiffusionXLPipeline,
    prompts: Sequence[str],
    references: Sequence[Image.Image],
    *,
    scale: float,
    guidance: float,
    seed: int,
    steps: int = 25,
    side: int = architecture.NATIVE_PX,
) -> list[Image.Image]:
    """One picture of each prompt and reference; picture i has seed `seed` + i.

    Each reference is encoded alone, by the pipeline. Left to itself, it gives every picture of a
    batch all references; and encoded ones it repeats as often as there are pictures, which are
    then mixed without an error.
    """
    pipeline.set_ip_adapter_scale(scale)
    [projection] = pipeline.unet.encoder_hid_proj.image_projection_layers
    hidden = not isinstance(projection, ImageProjection)
    drawn: list[Image.Image] = []
    for start in tqdm(range(0, len(prompts), BATCH), mininterval=5.0, leave=False):
        pairs = [
            pipeline.encode_image(reference, "cpu", 1, hidden)
            for reference in references[start : start + BATCH]
        ]
        positive, negative = (torch.stack(parts) for parts in zip(*pairs, strict=True))
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(positive))]
        encoded = [torch.cat([negative, positive]) if guidance > 1 else positive]
        with mock.patch.object(pipeline, "prepare_ip_adapter_image_embeds", return_value=encoded):
            drawn += pipeline(
                list(prompts[start : start + BATCH]),
                ip_adapter_image=list(references[start : start + BATCH]),
                guidance_scale=guidance,
                num_inference_steps=steps,
                height=side,
                width=side,
                generator=generators,
            ).images
    return drawn


def figures(seen: Sequence[Judgement], meanings: Sequence[Meaning], prompts: Sequence[str]) -> str:
    """Shares of what is the reference's, with a clear outline where all is, on one line.

    The last two tell how clean the pictures are, and how often the prompt is right where it says
    something.
    """
    names = ("shape", "color", "background")
    right = np.array(
        [
            [getattr(one, name) == getattr(meaning, name) for name in names]
            for one, meaning in zip(seen, meanings, strict=True)
        ]
    )
    clear = np.array([one.iou >= CLEAR_IOU for one in seen])
    parts = [f"{name} {share:6.1%}" for name, share in zip(names, right.mean(axis=0), strict=True)]
    followed = np.mean([one.matches(text) for one, text in zip(seen, prompts, strict=True)])
    return "  ".join(
        [
            f"all {(right.all(axis=1) & clear).mean():6.1%}",
            *parts,
            f"IoU {np.mean([one.iou for one in seen]):.3f}",
            f"flat distance {np.mean([one.flat_distance for one in seen]):4.1f}",
            f"prompt {followed:6.1%}",
        ]
    )


def main() -> None:
    """Print a line of figures for each way, and write its first pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("adapters", type=Path, help="folder of encoder and adapters")
    parser.add_argument("--model", type=Path, default=Path("models/shapes"))
    parser.add_argument("--only", choices=ip_adapter_training.RECIPES)
    parser.add_argument("--prompts", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--scales", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    parser.add_argument("--guidance-scale", type=float, nargs="+", default=[7.5])
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--side", type=int, default=128, help="of the pictures, in pixels")
    parser.add_argument("--count", type=int, default=200, help="references (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1000, help="of references and pictures")
    parser.add_argument("--sheet", type=Path, help="write the first pictures to this PNG")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rng = np.random.default_rng(arguments.seed)
    meanings = [random_meaning(rng) for _ in range(arguments.count)]
    references = [draw_reference(meaning, rng) for meaning in meanings]
    said = {way: [prompt(way, one, rng) for one in meanings] for way in WAYS}
    names = [arguments.only] if arguments.only else list(ip_adapter_training.RECIPES)
    sheet = [one.resize((arguments.side,) * 2) for one in references[:SHEET_COLUMNS]]
    for name in names:
        pipeline = load(arguments.model, arguments.adapters, name)
        for way, guidance, scale in itertools.product(
            arguments.prompts, arguments.guidance_scale, arguments.scales
        ):
            images = draw(
                pipeline,
                said[way],
                references,
                scale=scale,
                guidance=guidance,
                seed=arguments.seed,
                steps=arguments.steps,
                side=arguments.side,
            )
            seen = [judge(image) for image in images]
            label = f"{name:6}{way:14}guidance {guidance:<5}scale {scale:<5}"
            print(f"{label}{figures(seen, meanings, said[way])}", flush=True)
            sheet += images[:SHEET_COLUMNS]
    if arguments.sheet:
        contact_sheet(sheet, SHEET_COLUMNS).save(arguments.sheet)


if __name__ == "__main__":
    main()
