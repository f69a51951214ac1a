"""The ControlNet in models/controlnets: a file as its training says; pictures that follow it."""

import functools
import json
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLControlNetUnionPipeline
from safetensors.torch import load_file
from scipy import ndimage

from sdxl_worker.settings import EMBEDDED_MODEL_DIR
from shapes import controlnet_training, embedded, scene_maps
from shapes.controlnet_training import CONTROL_TYPES, draw_scene, new_controlnet
from shapes.data import Scene, render
from shapes.evaluate_controlnet import CANNY_THRESHOLDS, Case, draw, in_place, load
from shapes.judge import judge
from shapes.scene_maps import CANNY, DEPTH, SEGMENT, SOFT_EDGE, TILE

FOLDER = EMBEDDED_MODEL_DIR.parent / "controlnets" / "outline"
WEIGHTS = FOLDER / "diffusion_pytorch_model.fp16.safetensors"
STAR = Scene("star", "red", "white", 0.45, 0.55, 0.3)


def config() -> dict[str, Any]:
    read: dict[str, Any] = json.loads((FOLDER / "config.json").read_text())
    return read


def maps(mode: int, count: int, seed: int = 0) -> np.ndarray:
    """Of the star, (n, 128, 128, 3), 0..255."""
    torch.manual_seed(seed)
    distances = torch.from_numpy(scene_maps.distances(STAR, 128, 128))
    pictures = torch.from_numpy(render(STAR, 128, 128)).permute(2, 0, 1).float() / 255.0
    drawn = scene_maps.draw(
        mode, distances.expand(count, -1, -1), pictures.expand(count, -1, -1, -1)
    )
    return (drawn.permute(0, 2, 3, 1) * 255.0).numpy()


def test_the_file_is_small_and_in_half_precision() -> None:
    assert WEIGHTS.stat().st_size <= 2_100_000
    assert {tensor.dtype for tensor in load_file(WEIGHTS).values()} == {torch.float16}
    assert sorted(path.name for path in FOLDER.iterdir()) == ["config.json", WEIGHTS.name]


def test_the_file_is_that_of_the_training_in_the_published_layout() -> None:
    expected = new_controlnet()
    found = load_file(WEIGHTS)
    assert {key: tensor.shape for key, tensor in found.items()} == {
        key: tensor.shape for key, tensor in expected.state_dict().items()
    }
    written = config()
    assert written["_class_name"] == "ControlNetUnionModel"
    assert written["num_control_type"] == CONTROL_TYPES == 8
    assert written["addition_embed_type"] == "text_time"
    assert not any("/" in str(value) for value in written.values()), "no path of who trained it"


def test_at_first_the_controlnet_adds_nothing() -> None:
    controlnet = new_controlnet()
    controlnet_training.begin_with_base(controlnet, embedded.load(EMBEDDED_MODEL_DIR))
    with torch.no_grad():
        down, middle = controlnet(
            torch.randn(1, 4, 16, 16),
            torch.tensor(500),
            torch.randn(1, 77, 112),
            controlnet_cond=[torch.rand(1, 3, 128, 128)],
            control_type=torch.eye(CONTROL_TYPES)[CANNY][None],
            control_type_idx=[CANNY],
            added_cond_kwargs={"text_embeds": torch.randn(1, 64), "time_ids": torch.ones(1, 6)},
            return_dict=False,
        )
    assert not any(residual.any() for residual in (*down, middle))


def test_the_training_s_outlines_are_like_those_of_canny() -> None:
    """Nearly all of what Canny finds lies within two pixels of a drawn line, and the reverse."""
    found = cv2.Canny(render(STAR, 128, 128), *CANNY_THRESHOLDS) > 0
    lines = maps(CANNY, 20)[..., 0] > 127
    near = ndimage.distance_transform_edt(~found) <= 2
    assert np.mean([line[near].sum() / line.sum() for line in lines]) > 0.9
    nearby = [ndimage.distance_transform_edt(~line) <= 2 for line in lines]
    assert np.mean([some[found].mean() for some in nearby]) > 0.9
    amounts = [line.sum() / found.sum() for line in lines]
    assert np.median(amounts) == pytest.approx(1.0, abs=0.35)
    assert len({line.tobytes() for line in lines}) == 20


@pytest.mark.parametrize("mode", [DEPTH, SEGMENT, TILE, SOFT_EDGE])
def test_the_other_maps_tell_the_shape_from_its_background(mode: int) -> None:
    inside = scene_maps.distances(STAR, 128, 128) < -64
    outside = scene_maps.distances(STAR, 128, 128) > 112
    for drawn in maps(mode, 5):
        there, elsewhere = drawn[inside].mean(axis=0), drawn[outside].mean(axis=0)
        if mode == SOFT_EDGE:
            edge = np.abs(scene_maps.distances(STAR, 128, 128)) < 8
            assert drawn[edge].mean() > 100 + max(there.mean(), elsewhere.mean())
        elif mode == TILE:
            assert elsewhere == pytest.approx((245, 245, 245), abs=25)
            assert there == pytest.approx((222, 35, 40), abs=45)
        else:
            assert np.abs(there - elsewhere).max() > 60
    colors = {tuple(drawn[64, 58].round()) for drawn in maps(SEGMENT, 5)}
    assert len(colors) == 5, "what is what, not its colour"


@functools.cache
def pipeline() -> StableDiffusionXLControlNetUnionPipeline:
    return load(EMBEDDED_MODEL_DIR, FOLDER)


@functools.cache
def scenes() -> Sequence[Scene]:
    rng = np.random.default_rng(3)
    return [draw_scene(rng) for _ in range(8)]


def share_right(case: Case) -> float:
    """Of the pictures: the outline's shape, in its place, in the prompt's colours."""
    right = [
        in_place(seen, scene)
        and (seen.shape, seen.color, seen.background)
        == (scene.shape, scene.color, scene.background)
        for image, scene in zip(draw(pipeline(), case, scenes()), scenes(), strict=True)
        for seen in [judge(image)]
    ]
    return float(np.mean(right))


def test_the_shape_is_drawn_where_its_outline_is_in_the_prompt_s_colours() -> None:
    assert share_right(Case("plain", "no shape", scale=0.0)) <= 0.25
    assert share_right(Case("controlled", "no shape")) >= 0.85


@pytest.mark.parametrize("modes", [(DEPTH,), (SEGMENT,), (CANNY, TILE)])
def test_other_maps_and_pairs_of_them_work_too(modes: tuple[int, ...]) -> None:
    assert share_right(Case("controlled", "no shape", modes)) >= 0.85
