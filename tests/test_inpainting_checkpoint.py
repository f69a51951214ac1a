"""A checkpoint for inpainting as MODEL_DIR: recognised by its UNet's nine channels, and used as
plain diffusers uses it in every mode."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLInpaintPipeline
from PIL import Image

from sdxl_worker.errors import ModelError
from sdxl_worker.loading import model_dir
from sdxl_worker.loading.model_dir import find_model_dir
from sdxl_worker.loading.models import Models, load_models
from sdxl_worker.request import parse_request
from sdxl_worker.serving.start import start
from sdxl_worker.settings import EMBEDDED_MODEL_DIR, Settings
from tests import inpainting_model
from tests.support import (
    PROMPT,
    canvas_of,
    data_uri,
    difference,
    draw,
    error,
    largest_difference,
    noise_picture,
    picture,
    run,
)

JOB = {"prompt": PROMPT, "seed": 3, "num_inference_steps": 8, "scheduler": "K_EULER"}
URL = {"image_url": "https://example.com/a.png"}
PICTURE = noise_picture(96, 128)
HOLE = np.zeros((128, 96), bool)
HOLE[32:80, 16:64] = True  # along the borders of latents, where diffusers loses nothing
MODES: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "text to image": ({"height": 128, "width": 96}, None, None),
    "img2img": ({**URL, "mode": "img2img"}, PICTURE, None),
    "inpaint": ({**URL, "mask_url": "https://example.com/mask.png"}, PICTURE, HOLE),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return inpainting_model.write(tmp_path_factory.mktemp("hub") / "inpainting")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Models:
    return load_models(find_model_dir(Settings(model_dir=folder)))


@pytest.mark.parametrize("mode", MODES)
def test_it_draws_in_every_mode_as_in_plain_diffusers(
    mode: str, folder: Path, loaded: Models
) -> None:
    fields, image, hole = MODES[mode]
    pipeline = StableDiffusionXLInpaintPipeline.from_pretrained(
        folder, variant="fp16", dtype=torch.float32
    )
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    [expected] = pipeline(
        prompt=PROMPT,
        image=image or PICTURE,
        mask_image=Image.fromarray(np.ones_like(HOLE) if hole is None else hole),
        generator=[torch.Generator("cpu").manual_seed(3)],
        height=128,
        width=96,
        strength=0.75 if image else 1.0,
        num_inference_steps=8,
        guidance_scale=7.5,
    ).images
    canvas = canvas_of(image, hole) if image else None
    [got] = draw(parse_request({**JOB, **fields}), loaded, canvas)
    assert largest_difference(got, expected) <= 1
    assert difference(got, expected) < 0.01


def test_a_worker_serves_it_and_its_report_says_what_it_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEL_DIR", str(folder))
    small = {"prompt": PROMPT, "seed": 3, "num_inference_steps": 4}
    image = {"image_url": data_uri(PICTURE), "mask_url": data_uri(Image.fromarray(HOLE))}
    report = run({"check": True})
    assert (report["inpainting"], report["refiner"]) == (True, False)
    assert picture(**small).size == (128, 128)
    assert picture(**small, image_url=image["image_url"], mode="img2img").size == (96, 128)
    inpainted = np.asarray(picture(**small, **image))
    assert np.array_equal(inpainted[~HOLE], np.asarray(PICTURE)[~HOLE])
    assert not np.array_equal(inpainted, np.asarray(PICTURE))
    told = error({"prompt": PROMPT, "image_url": image["image_url"]})
    assert told.startswith("image_url: needs the refiner, and this model has none")


def test_other_models_are_not_told_to_be_for_inpainting() -> None:
    assert run({"check": True})["inpainting"] is False


def test_with_a_refiner_beside_it_the_refiner_keeps_to_the_mask(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base").symlink_to(folder)
    (tmp_path / "refiner").symlink_to(EMBEDDED_MODEL_DIR / "refiner")
    monkeypatch.setenv("MODEL_DIR", str(tmp_path))
    image = {"image_url": data_uri(PICTURE), "mask_url": data_uri(Image.fromarray(HOLE))}
    job = {"prompt": PROMPT, "seed": 3, "num_inference_steps": 4, **image}
    refined = picture(**job, refiner_inference_steps=8)
    for one in (refined, picture(**job, high_noise_frac=0.5)):
        assert np.array_equal(np.asarray(one)[~HOLE], np.asarray(PICTURE)[~HOLE])
    assert difference(refined, picture(**job, refiner_inference_steps=0)) > 0.1


def test_the_platforms_cache_is_searched_for_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = tmp_path / "models--diffusers--stable-diffusion-xl-1.0-inpainting-0.1"
    (repo / "snapshots").mkdir(parents=True)
    (repo / "snapshots" / "115134f363124c53c7d878647567d04daf26e41e").symlink_to(folder)
    monkeypatch.setattr(model_dir, "PLATFORM_CACHE", tmp_path)
    found = find_model_dir(Settings())
    assert found.name == "diffusers/stable-diffusion-xl-1.0-inpainting-0.1"
    assert start(Settings()).result().unet.config["in_channels"] == 9


@pytest.mark.parametrize("in_channels", [5, 8])
def test_unets_that_take_something_else_are_refused_at_the_start(
    in_channels: int, tmp_path: Path
) -> None:
    """Of 8 channels are those that edit by an instruction."""
    folder = inpainting_model.write(tmp_path / "model", in_channels=in_channels)
    with pytest.raises(ModelError) as caught:
        start(Settings(model_dir=folder)).result()
    assert str(caught.value) == (
        f"MODEL_DIR: the UNet of {folder / 'unet'} takes {in_channels} channels; those that can be "
        "served take 4, or 9 if they are for inpainting"
    )


def test_a_refiner_is_never_for_inpainting(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "base").symlink_to(EMBEDDED_MODEL_DIR / "base")
    (tmp_path / "refiner").symlink_to(folder)
    with pytest.raises(ModelError, match="takes 9 channels; a refiner takes 4"):
        load_models(find_model_dir(Settings(model_dir=tmp_path)))
