"""Draws with the trained ControlNet, by plain diffusers, and counts what is where its map says:
`python -m shapes.evaluate_controlnet models/controlnets/outline --count 200 --sheet sheet.png`.

The outlines are those that OpenCV's Canny finds in the scene's picture.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from diffusers import (
    ControlNetUnionModel,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLControlNetUnionPipeline,
)
from PIL import Image

from shapes import captions, embedded, scene_maps
from shapes.architecture import NATIVE_PX
from shapes.captions import Meaning
from shapes.controlnet_training import draw_scene
from shapes.data import SHAPES, Scene, random_scene, render
from shapes.export import VARIANT
from shapes.judge import Judgement, judge
from shapes.scene_maps import CANNY, DEPTH, SEGMENT, SOFT_EDGE, TILE
from shapes.sheet import contact_sheet

TOLERANCE = 0.05
"""Of centre and radius, in shares of the side."""
CANNY_THRESHOLDS = (100, 200)
AT_ONCE = 20
SHEET_COLUMNS = 10
STEPS, GUIDANCE = 25, 7.5
SCHEDULERS = {"DDIM": DDIMScheduler, "Euler": EulerDiscreteScheduler}


@dataclass(frozen=True)
class Case:
    """What is asked for."""

    label: str
    says: str = "its shape"
    """What the prompt says beside the colours: "its shape", "no shape" or "another shape"."""
    modes: tuple[int, ...] = (CANNY,)
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    scheduler: str = "DDIM"


CASES = [
    Case("scale 0", scale=0.0),
    Case("scale 0, no shape said", "no shape", scale=0.0),
    Case("scale 0.5", scale=0.5),
    Case("scale 1"),
    Case("scale 1, Euler", scheduler="Euler"),
    Case("scale 0.5, no shape said", "no shape", scale=0.5),
    Case("scale 1, no shape said", "no shape"),
    Case("scale 0.5, another shape said", "another shape", scale=0.5),
    Case("scale 1, another shape said", "another shape"),
    Case("end 0.5, no shape said", "no shape", end=0.5),
    Case("end 0.3, no shape said", "no shape", end=0.3),
    Case("start 0.5, no shape said", "no shape", start=0.5),
    Case("start 0.8, no shape said", "no shape", start=0.8),
    Case("soft edge, no shape said", "no shape", (SOFT_EDGE,)),
    Case("depth, no shape said", "no shape", (DEPTH,)),
    Case("segment, no shape said", "no shape", (SEGMENT,)),
    Case("tile, no shape said", "no shape", (TILE,)),
    Case("canny and depth, no shape said", "no shape", (CANNY, DEPTH)),
    Case("canny and tile, no shape said", "no shape", (CANNY, TILE)),
]


def load(model: Path, controlnet: Path) -> StableDiffusionXLControlNetUnionPipeline:
    """The base with the ControlNet, in fp32."""
    base = embedded.load(model)
    # Read from half precision, as a worker reads it.
    net = ControlNetUnionModel.from_pretrained(controlnet, variant=VARIANT).float().eval()
    net.controlnet_cond_embedding.to(memory_format=torch.channels_last)
    pipeline = StableDiffusionXLControlNetUnionPipeline(**base.components, controlnet=net)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def maps(scene: Scene, mode: int, side: int = NATIVE_PX) -> Image.Image:
    """The map of a scene; an outline as Canny finds it, the others as in training."""
    picture = render(scene, side, side)
    if mode == CANNY:
        return Image.fromarray(cv2.Canny(picture, *CANNY_THRESHOLDS)).convert("RGB")
    drawn = scene_maps.draw(
        mode,
        torch.from_numpy(scene_maps.distances(scene, side, side))[None],
        torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255.0,
    )
    return Image.fromarray((drawn[0].permute(1, 2, 0) * 255.0).round().byte().numpy())


def prompt(scene: Scene, says: str, rng: np.random.Generator) -> str:
    """In the scene's colours."""
    shape: str | None = scene.shape
    if says == "no shape":
        shape = None
    elif says == "another shape":
        shape = SHAPES[(SHAPES.index(scene.shape) + rng.integers(1, len(SHAPES))) % len(SHAPES)]
    return captions.caption(Meaning(shape, scene.color, scene.background), rng)


def draw(
    pipeline: StableDiffusionXLControlNetUnionPipeline, case: Case, scenes: Sequence[Scene]
) -> list[Image.Image]:
    """A picture for each scene; prompts and noise are the same each time."""
    rng = np.random.default_rng(1)
    torch.manual_seed(1)
    pipeline.scheduler = SCHEDULERS[case.scheduler].from_config(pipeline.scheduler.config)
    images: list[Image.Image] = []
    for begin in range(0, len(scenes), AT_ONCE):
        some = scenes[begin : begin + AT_ONCE]
        pictures = [[maps(scene, mode) for scene in some] for mode in case.modes]
        images += pipeline(
            [prompt(scene, case.says, rng) for scene in some],
            control_image=pictures,
            control_mode=list(case.modes),
            controlnet_conditioning_scale=[case.scale] * len(case.modes),
            control_guidance_start=[case.start] * len(case.modes),
            control_guidance_end=[case.end] * len(case.modes),
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=[torch.Generator().manual_seed(begin + i) for i in range(len(some))],
        ).images
    return images


def in_place(seen: Judgement, scene: Scene) -> bool:
    """Whether the shape's place and size are the outline's."""
    return (
        abs(seen.center[0] - scene.center_x) <= TOLERANCE
        and abs(seen.center[1] - scene.center_y) <= TOLERANCE
        and abs(seen.radius - scene.radius) <= TOLERANCE
    )


def main() -> None:
    """Print a line for each case."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("controlnet", type=Path, help="its folder")
    parser.add_argument("--model", type=Path, default=Path("models/shapes"), help="folder of base/")
    parser.add_argument("--count", type=int, default=200, help="pictures for each case")
    parser.add_argument("--only", help="a regular expression: cases whose label has it")
    parser.add_argument("--narrow", action="store_true", help="scenes like the base's own only")
    parser.add_argument("--sheet", type=Path, help="a picture of ten of each case")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pipeline = load(arguments.model, arguments.controlnet)
    rng = np.random.default_rng(100)
    new_scene = random_scene if arguments.narrow else draw_scene
    scenes = [new_scene(rng) for _ in range(arguments.count)]
    sheet = [maps(scene, CANNY) for scene in scenes[:SHEET_COLUMNS]]
    for case in CASES:
        if arguments.only and not re.search(arguments.only, case.label):
            continue
        images = draw(pipeline, case, scenes)
        seen = [judge(image) for image in images]
        pairs = list(zip(seen, scenes, strict=True))
        shape = [one.shape == scene.shape for one, scene in pairs]
        place = [in_place(one, scene) for one, scene in pairs]
        colors = [
            (one.color, one.background) == (scene.color, scene.background) for one, scene in pairs
        ]
        together = [all(each) for each in zip(shape, place, colors, strict=True)]
        print(
            f"{case.label:32}all {np.mean(together):6.1%}  shape {np.mean(shape):6.1%}"
            f"  place {np.mean(place):6.1%}  colours {np.mean(colors):6.1%}"
            f"  IoU {np.mean([one.iou for one in seen]):.3f}"
            f"  flat distance {np.mean([one.flat_distance for one in seen]):4.1f}",
            flush=True,
        )
        sheet += images[:SHEET_COLUMNS]
    if arguments.sheet:
        contact_sheet(sheet, SHEET_COLUMNS).save(arguments.sheet)


if __name__ == "__main__":
    main()
