"""The base redraws a picture, or what is masked in it: equal to plain diffusers where that is
right, each picture of a batch as it is alone, and by the steps that were planned."""

import dataclasses
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLInpaintPipeline
from PIL import Image, ImageDraw

from sdxl_worker.drawing import inpainting
from sdxl_worker.drawing.decoding import decode
from sdxl_worker.drawing.encoding import encode_canvas, latents_of
from sdxl_worker.drawing.schedulers import build_scheduler
from sdxl_worker.drawing.stages import as_drawn, plan_stages, total_steps
from sdxl_worker.drawing.steps import Step
from sdxl_worker.errors import RequestError
from sdxl_worker.loading.models import Models
from sdxl_worker.request import parse_request
from tests.support import (
    PROMPT,
    SCHEDULERS,
    canvas_of,
    difference,
    draw,
    fresh_models,
    largest_difference,
    models,
    noise_picture,
    plain_base,
    plain_refiner,
)

URL = {"image_url": "https://example.com/a.png"}
MASK = {**URL, "mask_url": "https://example.com/mask.png"}
REDRAW = {"prompt": PROMPT, "seed": 3, "num_inference_steps": 8, **URL, "mode": "img2img"}
BASE_ONLY = {**REDRAW, "refiner_inference_steps": 0}
REFINED = {**REDRAW, "refiner_inference_steps": 12}
ENSEMBLE = {**REDRAW, "high_noise_frac": 0.7}
SETTINGS = {"base": BASE_ONLY, "refined": REFINED, "ensemble": ENSEMBLE}

PICTURE = noise_picture(96, 128)
HOLE = np.zeros((128, 96), bool)
HOLE[32:80, 16:64] = True  # along the borders of latents, where diffusers loses nothing
CPU = torch.device("cpu")
LOADED_CONFIG = dict(plain_base().scheduler.config)


def generators(seed: int = 3) -> list[torch.Generator]:
    return [torch.Generator("cpu").manual_seed(seed)]


def scheduler(name: str, *, in_mid_schedule: bool = True) -> Any:
    if in_mid_schedule and name in ("PNDM", "KLMS"):
        return build_scheduler(name, LOADED_CONFIG, begins_in_mid_schedule=True)  # type: ignore[arg-type]
    return getattr(diffusers, SCHEDULERS[name]).from_config(LOADED_CONFIG)


def plain(kind: type, of: Any, name: str, **options: Any) -> Any:
    """A pipeline as a plain script makes it, over the base's or the refiner's networks."""
    pipeline = kind.from_pipe(of, scheduler=scheduler(name))  # type: ignore[attr-defined]
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(prompt=PROMPT, guidance_scale=7.5, **options).images


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and one.tobytes() == other.tobytes()


@pytest.mark.parametrize("name", SCHEDULERS)
class TestPixelForPixelAsPlainDiffusers:
    def test_image_to_image(self, name: str) -> None:
        request = parse_request({**BASE_ONLY, "scheduler": name, "strength": 0.6})
        [expected] = plain(
            StableDiffusionXLImg2ImgPipeline,
            plain_base(),
            name,
            image=PICTURE,
            strength=0.6,
            num_inference_steps=8,
            generator=generators(),
        )
        assert same(draw(request, models(), canvas_of(PICTURE))[0], expected)

    def test_then_the_refiner(self, name: str) -> None:
        noise = generators()
        latents = plain(
            StableDiffusionXLImg2ImgPipeline,
            plain_base(),
            name,
            image=PICTURE,
            strength=0.75,
            num_inference_steps=8,
            generator=noise,
            output_type="latent",
        )
        [expected] = plain(
            StableDiffusionXLImg2ImgPipeline,
            plain_refiner(),
            name,
            image=latents,
            strength=0.3,
            num_inference_steps=12,
            generator=noise,
        )
        request = parse_request({**REFINED, "scheduler": name})
        assert same(draw(request, models(), canvas_of(PICTURE))[0], expected)


# Not with K_EULER_ANCESTRAL: diffusers encodes the picture once more, for nothing, and takes the
# noise for it from the generator that the steps go on with.
@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "K_EULER_ANCESTRAL"])
def test_inpainting_is_as_in_plain_diffusers_but_for_rounding(name: str) -> None:
    """Its pipeline encodes in another memory order."""
    request = parse_request({**BASE_ONLY, **MASK, "scheduler": name, "strength": 0.6})
    [expected] = plain_inpainted(plain_base(), name, strength=0.6, num_inference_steps=8)
    [got] = draw(request, models(), canvas_of(PICTURE, HOLE))
    assert largest_difference(got, expected) <= 1
    assert difference(got, expected) < 0.001


def plain_inpainted(of: Any, name: str, **options: Any) -> Any:
    return plain(
        StableDiffusionXLInpaintPipeline,
        of,
        name,
        image=PICTURE,
        mask_image=Image.fromarray(HOLE),
        generator=generators(),
        height=PICTURE.height,
        width=PICTURE.width,
        **options,
    )


MASKS = {"all of it": None, "masked": HOLE}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", ["DDIM", "K_EULER_ANCESTRAL"])
def test_a_batch_gives_the_pictures_of_single_requests(
    name: str, settings: dict[str, Any], mask: Any
) -> None:
    canvas = canvas_of(PICTURE, mask)
    request = {**settings, "scheduler": name}
    batch = draw(parse_request({**request, "num_images": 3}), models(), canvas)
    for i, one in enumerate(batch):
        [single] = draw(parse_request({**request, "seed": 3 + i}), models(), canvas)
        assert largest_difference(one, single) <= 2, "more than rounding"
        assert difference(one, single) < 0.02
    assert difference(batch[0], batch[1]) > 0.5


def latents_of_last_step(request: dict[str, Any], mask: np.ndarray) -> tuple[Any, Any]:
    """Where a batch of one ends, and the latents of the picture."""
    steps: list[Step] = []
    canvas = canvas_of(PICTURE, mask)
    with torch.no_grad():
        encoded = encode_canvas(canvas, PICTURE.size, models().vae, CPU, sees_mask=False)
    assert encoded.picture is not None
    picture = encoded.picture.sample(generators()[0]) * models().vae.config.scaling_factor
    draw(parse_request({**request, **MASK}), models(), canvas, steps.append)
    return steps[-1].latents(), picture


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_stage_keeps_to_the_mask(name: str, settings: dict[str, Any]) -> None:
    latents, picture = latents_of_last_step({**settings, "scheduler": name}, HOLE)
    kept = torch.from_numpy(~HOLE[::8, ::8])
    assert torch.equal(latents[0][:, kept], picture[0][:, kept])
    assert (latents[0][:, ~kept] - picture[0][:, ~kept]).abs().mean() > 0.1


@pytest.mark.parametrize("settings", [BASE_ONLY, ENSEMBLE], ids=["base", "ensemble"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_in_between_the_picture_has_the_noise_of_its_timestep(
    name: str, settings: dict[str, Any]
) -> None:
    """Always the same noise, and as much of it as the models were trained with there."""
    job_input = {**settings, **MASK, "scheduler": name, "strength": 0.75}
    line = np.zeros((128, 96), bool)
    line[:8] = True
    canvas = canvas_of(PICTURE, line)
    with torch.no_grad():
        encoded = encode_canvas(canvas, PICTURE.size, models().vae, CPU, sees_mask=False)
    assert encoded.picture is not None
    picture = encoded.picture.sample(generators()[0]) * models().vae.config.scaling_factor
    steps: list[torch.Tensor] = []
    timesteps: list[float] = []
    hooks = [
        unet.register_forward_pre_hook(lambda _, inputs: timesteps.append(float(inputs[1])))
        for unet in models().unets()
    ]
    draw(parse_request(job_input), models(), canvas, lambda step: steps.append(step.latents()))
    for hook in hooks:
        hook.remove()
    alphas = scheduler("DDIM").alphas_cumprod.numpy()
    found = []
    for latents, timestep in zip(steps[:-1], timesteps[1:], strict=True):
        alpha = float(np.interp(timestep, np.arange(len(alphas)), alphas))
        found.append((latents - alpha**0.5 * picture)[:, :, 1:] / (1 - alpha) ** 0.5)
    assert len(found) == 5
    for noise in found:
        assert noise.std().item() == pytest.approx(1, abs=0.05)
        assert torch.allclose(noise, found[0], atol=0.02)


@pytest.mark.parametrize("rows", [slice(9, 15), slice(15, 16), slice(8, 9)])
def test_a_thin_line_is_not_lost_on_the_way_to_latents(rows: slice) -> None:
    line = np.zeros((128, 96), bool)
    line[rows] = True
    encoded = encode_canvas(
        canvas_of(PICTURE, line), PICTURE.size, models().vae, CPU, sees_mask=False
    )
    assert encoded.repainted is not None
    repainted = encoded.repainted[0, 0]
    assert repainted[1].all()
    assert repainted.sum() == 12, "one row of latents, and nothing beside it"


def test_latents_with_a_scale_of_their_own_come_back_as_the_picture() -> None:
    vae = fresh_models().vae
    plain_latents = encode_canvas(canvas_of(PICTURE), PICTURE.size, vae, CPU, sees_mask=False)
    vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.4], latents_std=[2.0, 3.0, 0.5, 1.5])
    assert plain_latents.picture is not None
    latents = latents_of(plain_latents.picture, generators(), vae)
    unscaled = plain_latents.picture.sample(generators()[0])
    mean, std = (
        torch.tensor(numbers).view(1, 4, 1, 1)
        for numbers in (vae.config.latents_mean, vae.config.latents_std)
    )
    assert torch.allclose(latents, (unscaled - mean) / std * vae.config.scaling_factor)
    with torch.no_grad():
        decoded = decode(latents, vae, may_be_black=False)
        expected = vae.decode(unscaled, return_dict=False)[0]
    assert decoded is not None
    levels = ((expected[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1) * 255).round().numpy()
    assert np.abs(np.asarray(decoded[0], np.int16) - levels).max() <= 1


def test_what_is_repainted_wholly_owes_nothing_to_what_was_there() -> None:
    request = parse_request({**BASE_ONLY, **MASK, "strength": 1})
    others = PICTURE.copy()
    ImageDraw.Draw(others).rectangle((16, 32, 63, 79), fill="red")
    everything = np.ones((128, 96), bool)
    one, other = (draw(request, models(), canvas_of(x, everything))[0] for x in (PICTURE, others))
    assert same(one, other)


def test_the_stages_of_a_picture_that_is_redrawn() -> None:
    def told(**job_input: Any) -> list[tuple[str, int, set[str]]]:
        stages = plan_stages(
            parse_request({**REDRAW, "num_inference_steps": 25, **job_input}), models()
        )
        assert {stage.pipeline for stage in stages} == {StableDiffusionXLImg2ImgPipeline}
        cuts = {"strength", "denoising_end", "denoising_start"}
        return [(stage.name, stage.steps, cuts & set(stage.options)) for stage in stages]

    base = ("base", 18, {"strength"})
    assert told() == [base, ("refiner", 15, {"strength"})]
    assert told(refiner_strength=0.5) == [base, ("refiner", 25, {"strength"})]
    assert told(refiner_strength=0) == told(refiner_inference_steps=0) == [base]
    assert told(strength=1, refiner_strength=0) == [("base", 25, {"strength"})]
    assert told(high_noise_frac=0.8) == [
        ("base", 13, {"strength", "denoising_end"}),
        ("refiner", 5, {"denoising_start"}),
    ]
    assert told(high_noise_frac=1) == told(high_noise_frac=0) == told()


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_planned_steps_are_done(name: str, settings: dict[str, Any]) -> None:
    request = parse_request({**settings, "scheduler": name})
    steps: list[Step] = []
    draw(request, models(), canvas_of(PICTURE), steps.append)
    assert abs(len(steps) - total_steps(plan_stages(request, models()))) <= 1
    assert steps[-1].percent >= 90
    assert [step.stage for step in steps] == sorted(step.stage for step in steps)


@pytest.mark.parametrize(
    ("job_input", "problem"),
    [
        (
            {"num_inference_steps": 25, "strength": 0.03},
            "strength: 0.03 of 25 steps leaves the base no step; the smallest value that works "
            "is 0.04",
        ),
        (
            {"num_inference_steps": 49, "strength": 0},
            "strength: 0 of 49 steps leaves the base no step; the smallest value that works "
            "is 0.021",
        ),
        (
            {"num_inference_steps": 25, "strength": 0.2, "high_noise_frac": 0.8},
            "strength: 0.2 of 25 steps, of which the refiner does 5, leaves the base no step; the "
            "smallest value that works is 0.24",
        ),
        (
            {"num_inference_steps": 1, "strength": 1, "high_noise_frac": 0.3},
            "strength: 1 of 1 steps, of which the refiner does 1, leaves the base no step; raise "
            "high_noise_frac",
        ),
    ],
)
@pytest.mark.parametrize("mask", [{}, MASK])
def test_no_step_is_refused_with_the_smallest_value_that_works(
    job_input: dict[str, Any], problem: str, mask: dict[str, Any]
) -> None:
    with pytest.raises(RequestError) as caught:
        plan_stages(parse_request({**REDRAW, **mask, **job_input}), models())
    assert str(caught.value) == problem


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 25, 29, 49, 57, 113, 150, 997, 1000])
def test_the_smallest_value_that_is_told_works_and_no_smaller_one(steps: int) -> None:
    with pytest.raises(RequestError) as caught:
        plan_stages(
            parse_request({**REDRAW, "num_inference_steps": steps, "strength": 0}), models()
        )
    told = float(str(caught.value).rpartition(" ")[2])
    for strength, works in ((told, True), (round(told - 0.001, 3), False)):
        job_input = {**REDRAW, "num_inference_steps": steps, "strength": strength}
        if works:
            plan_stages(parse_request(job_input), models())
        else:
            with pytest.raises(RequestError):
                plan_stages(parse_request(job_input), models())


def test_without_a_refiner_the_base_redraws_alone_and_says_so() -> None:
    alone = dataclasses.replace(models(), refiner_unet=None)
    request = parse_request(REDRAW)
    stages = plan_stages(request, alone)
    assert [stage.name for stage in stages] == ["base"]
    assert as_drawn(request, stages).refiner_inference_steps == 0
    for asked in ({"refiner_strength": 0.4}, {"high_noise_frac": 0.8}):
        with pytest.raises(RequestError, match=f"{next(iter(asked))}: needs the refiner"):
            plan_stages(parse_request({**REDRAW, **asked}), alone)
    plan_stages(parse_request({**REDRAW, "high_noise_frac": 1}), alone)
    with pytest.raises(RequestError, match='let the base redraw it, with mode "img2img"'):
        plan_stages(parse_request(URL), alone)


class TestInpaintingUnet:
    """A UNet of nine channels, which sees the mask and what surrounds it."""

    @pytest.fixture(scope="class")
    @staticmethod
    def trained() -> Models:
        """The embedded one, with random weights for the further channels."""
        made = fresh_models()
        narrow = made.unet
        wide = type(narrow).from_config({**narrow.config, "in_channels": 9}).eval()
        weights = narrow.state_dict()
        more = torch.randn(
            (*weights["conv_in.weight"].shape[:1], 5, 3, 3), generator=generators()[0]
        )
        weights["conv_in.weight"] = torch.cat([weights["conv_in.weight"], more / 20], dim=1)
        wide.load_state_dict(weights)
        return dataclasses.replace(made, unet=wide)

    @pytest.mark.parametrize("name", ["DDIM", "K_EULER", "DPMSolverMultistep"])
    def test_it_inpaints_as_in_plain_diffusers(self, name: str, trained: Models) -> None:
        base = plain_base()
        pipeline = StableDiffusionXLInpaintPipeline.from_pipe(
            base, unet=trained.unet, scheduler=scheduler(name)
        )
        pipeline.set_progress_bar_config(disable=True)
        [expected] = pipeline(
            prompt=PROMPT,
            guidance_scale=7.5,
            image=PICTURE,
            mask_image=Image.fromarray(HOLE),
            generator=generators(),
            height=PICTURE.height,
            width=PICTURE.width,
            strength=0.75,
            num_inference_steps=8,
        ).images
        request = parse_request({**BASE_ONLY, **MASK, "scheduler": name})
        [got] = draw(request, trained, canvas_of(PICTURE, HOLE))
        assert largest_difference(got, expected) <= 1
        assert difference(got, expected) < 0.01

    @pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
    @pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
    def test_it_draws_every_picture_of_a_batch_as_it_is_alone(
        self, settings: dict[str, Any], mask: Any, trained: Models
    ) -> None:
        canvas = canvas_of(PICTURE, mask)
        batch = draw(parse_request({**settings, "num_images": 2}), trained, canvas)
        for i, one in enumerate(batch):
            [single] = draw(parse_request({**settings, "seed": 3 + i}), trained, canvas)
            assert largest_difference(one, single) <= 2
        assert difference(batch[0], batch[1]) > 0.5

    def test_it_draws_from_nothing_with_all_of_it_masked(self, trained: Models) -> None:
        seen: list[torch.Tensor] = []
        hook = trained.unet.conv_in.register_forward_pre_hook(
            lambda _, inputs: seen.append(inputs[0])
        )
        job_input = {"prompt": PROMPT, "seed": 3, "num_inference_steps": 2, "num_images": 2}
        draw(parse_request(job_input), trained)
        hook.remove()
        for latents in seen:
            assert latents.shape == (4, 9, 16, 16), "two pictures, with guidance"
            assert (latents[:, 4] == 1).all()
            assert torch.equal(latents[0, 5:], latents[2, 5:])
        assert not trained.unet._forward_pre_hooks, "nothing outlasts the job"

    def test_it_is_told_from_its_channels(self, trained: Models) -> None:
        assert inpainting.takes_mask(trained.unet)
        assert not inpainting.takes_mask(models().unet)
        assert not inpainting.takes_mask(models().refiner_unet)
