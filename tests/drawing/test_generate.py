"""Right pictures: equal to plain diffusers, handed over correctly, reproducible."""

import contextlib
import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline
from PIL import Image

from sdxl_worker.drawing import batches, decoding
from sdxl_worker.drawing import generate as generate_module
from sdxl_worker.drawing.generate import generate
from sdxl_worker.drawing.schedulers import build_scheduler
from sdxl_worker.drawing.stages import plan_stages
from sdxl_worker.loading.models import Models
from sdxl_worker.request import parse_request
from tests.support import (
    PROMPT,
    SCHEDULERS,
    canvas_of,
    data_uri,
    difference,
    draw,
    fresh_models,
    largest_difference,
    models,
    picture,
    pictures,
    plain_base,
    plain_refiner,
    run,
)

BASE_ONLY = {"prompt": PROMPT, "seed": 3, "num_inference_steps": 8, "refiner_inference_steps": 0}
REFINED = {**BASE_ONLY, "refiner_inference_steps": 20, "strength": 0.3}
ENSEMBLE = {**REFINED, "high_noise_frac": 0.7, "num_inference_steps": 10}


def generators(seed: int, count: int = 1) -> list[torch.Generator]:
    return [torch.Generator("cpu").manual_seed(seed + i) for i in range(count)]


def scheduler(name: str, *, in_mid_schedule: bool = False) -> Any:
    """As the diffusers documentation swaps schedulers: from the configuration that was loaded.

    Two of them go wrong in diffusers where they begin in mid-schedule, and are the worker's here;
    `test_mid_schedule.py` tests those.
    """
    if in_mid_schedule and name in ("PNDM", "KLMS"):
        return build_scheduler(name, LOADED_CONFIG, begins_in_mid_schedule=True)  # type: ignore[arg-type]
    return getattr(diffusers, SCHEDULERS[name]).from_config(LOADED_CONFIG)


LOADED_CONFIG = dict(plain_base().scheduler.config)


def plain(
    *,
    name: str = "DDIM",
    prompt: str = PROMPT,
    negative_prompt: str | None = None,
    seed: int = 3,
    steps: int = 8,
    guidance: float = 7.5,
    count: int = 1,
    **options: Any,
) -> Any:
    """The base, as a plain script runs it."""
    base = plain_base()
    base.scheduler = scheduler(name)
    options.setdefault("generator", generators(seed, count))
    return base(
        prompt=prompt,
        negative_prompt=negative_prompt,
        num_inference_steps=steps,
        guidance_scale=guidance,
        num_images_per_prompt=count,
        **options,
    ).images


def plain_refined(
    image: Any,
    *,
    name: str,
    generator: list[torch.Generator],
    steps: int,
    guidance: float = 7.5,
    **options: Any,
) -> Any:
    refiner = plain_refiner()
    refiner.scheduler = scheduler(name, in_mid_schedule=True)
    return refiner(
        prompt=PROMPT,
        image=image,
        generator=generator,
        num_inference_steps=steps,
        guidance_scale=guidance,
        **options,
    ).images


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and one.tobytes() == other.tobytes()


@pytest.mark.parametrize("name", SCHEDULERS)
class TestPixelForPixelAsPlainDiffusers:
    def test_the_base(self, name: str) -> None:
        assert same(picture(**BASE_ONLY, scheduler=name), plain(name=name)[0])

    def test_the_base_then_the_refiner(self, name: str) -> None:
        noise = generators(3)
        latents = plain(name=name, generator=noise, output_type="latent")
        [expected] = plain_refined(latents, name=name, generator=noise, steps=20, strength=0.3)
        assert same(picture(**REFINED, scheduler=name), expected)

    def test_the_ensemble(self, name: str) -> None:
        noise = generators(3)
        latents = plain(
            name=name, generator=noise, steps=10, denoising_end=0.7, output_type="latent"
        )
        [expected] = plain_refined(
            latents, name=name, generator=noise, steps=10, denoising_start=0.7
        )
        assert same(picture(**ENSEMBLE, scheduler=name), expected)

    def test_the_refiner_on_a_picture(self, name: str) -> None:
        image = Image.effect_noise((96, 128), 40).convert("RGB")
        [expected] = plain_refined(
            image, name=name, generator=generators(3), steps=12, strength=0.5
        )
        got = picture(
            prompt=PROMPT,
            image_url=data_uri(image),
            seed=3,
            scheduler=name,
            refiner_inference_steps=12,
            strength=0.5,
        )
        assert same(got, expected)


@pytest.mark.parametrize(
    ("job_input", "options"),
    [
        ({"guidance_scale": 0}, {"guidance": 0.0}),
        ({"guidance_scale": 1}, {"guidance": 1.0}),
        ({"guidance_scale": 3.5}, {"guidance": 3.5}),
        ({"negative_prompt": "a square"}, {"negative_prompt": "a square"}),
        ({"height": 96, "width": 160}, {"height": 96, "width": 160}),
        ({"prompt": ""}, {"prompt": ""}),
        ({"prompt": "x " * 75}, {"prompt": "x " * 75}),
        ({"prompt": "\u732b \U0001f431 caf\u00e9"}, {"prompt": "\u732b \U0001f431 caf\u00e9"}),
    ],
)
def test_every_setting_reaches_the_base_as_in_plain_diffusers(
    job_input: dict[str, Any], options: dict[str, Any]
) -> None:
    assert same(picture(**{**BASE_ONLY, **job_input}), plain(**options)[0])


def test_an_empty_negative_prompt_is_zeros_for_the_base() -> None:
    # Plain diffusers takes None for zeros and "" for the encoding of an empty text.
    zeros, encoded = plain(negative_prompt=None)[0], plain(negative_prompt="")[0]
    assert not same(zeros, encoded)
    assert same(picture(**BASE_ONLY, negative_prompt=""), zeros)
    assert same(picture(**BASE_ONLY), zeros)


@pytest.mark.parametrize(
    ("job_input", "options"),
    [
        ({"guidance_scale": 1.0}, {"guidance": 1.0}),
        ({"guidance_scale": 12.0}, {"guidance": 12.0}),
        ({"negative_prompt": "a blue square"}, {"negative_prompt": "a blue square"}),
        ({"negative_prompt": ""}, {"negative_prompt": ""}),
    ],
)
def test_guidance_and_negative_prompt_reach_the_refiner(
    job_input: dict[str, Any], options: dict[str, Any]
) -> None:
    image = Image.effect_noise((128, 128), 60).convert("RGB")
    refine = {
        "prompt": PROMPT,
        "image_url": data_uri(image),
        "seed": 3,
        "refiner_inference_steps": 10,
        "strength": 0.6,
        "scheduler": "K_EULER",
    }
    expected = plain_refined(
        image, name="K_EULER", generator=generators(3), steps=10, strength=0.6, **options
    )
    got = picture(**refine, **job_input)
    assert same(got, expected[0])
    if any(job_input.values()) and job_input != {"guidance_scale": 7.5}:
        assert not same(got, picture(**refine))


# The refiner cleans up after a wrong hand-over, so that its pictures do not show one. The base
# handed over to itself shows it: done right, it is as if nothing had happened in between.
def handed_over(
    name: str,
    change: Callable[[Any, dict[str, Any]], dict[str, Any]] = lambda _, options: options,
    **more: Any,
) -> Image.Image:
    """The base as its own refiner; `change` may spoil what that one is called with."""

    class Refiner(StableDiffusionXLImg2ImgPipeline):
        def __call__(self, **options: Any) -> Any:
            return super().__call__(**change(self, options))

    job_input = {"prompt": PROMPT, "seed": 5, "scheduler": name, "high_noise_frac": 0.8}
    request = parse_request({**job_input, **more})
    first, second = plan_stages(request, models())
    assert (first.name, second.name) == ("base", "refiner")
    by_the_base = dataclasses.replace(second, name="base", pipeline=Refiner)
    return generate(request, [first, by_the_base], models())[0]


def unsplit(name: str, **more: Any) -> Image.Image:
    job_input = {"prompt": PROMPT, "seed": 5, "scheduler": name, "refiner_inference_steps": 0}
    return draw(parse_request({**job_input, **more}), models())[0]


# The other schedulers are multistep: their memory of earlier steps begins anew at the hand-over.
@pytest.mark.parametrize(
    "name",
    [
        *("DDIM", "K_EULER", "K_EULER_ANCESTRAL", "K_HEUN", "K_DPM_2", "K_DPM_2_ANCESTRAL"),
        *("DDPM", "LCM", "TCD"),
    ],
)
def test_the_base_handed_over_to_itself_changes_nothing(name: str) -> None:
    assert difference(handed_over(name), unsplit(name)) < 0.02


@pytest.mark.parametrize("high_noise_frac", [0.3, 0.5, 0.8])
@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        *(("K_EULER", schedule) for schedule in ("karras", "exponential", "beta", "ays")),
        *(("K_HEUN", schedule) for schedule in ("karras", "trailing", "ays")),
        *(("K_DPM_2", "beta"), ("DDIM", "trailing"), ("LCM", "trailing")),
    ],
)
def test_nor_does_it_with_another_schedule(
    name: str, schedule: str, high_noise_frac: float
) -> None:
    more: dict[str, Any] = {"schedule": schedule, "num_inference_steps": 10}
    handed = handed_over(name, **more, high_noise_frac=high_noise_frac)
    assert difference(handed, unsplit(name, **more)) < 0.02


def other_scheduler(pipeline: Any, options: dict[str, Any]) -> dict[str, Any]:
    names = {"DDIMScheduler": "K_EULER", "EulerDiscreteScheduler": "DDIM"}
    pipeline.scheduler = scheduler(names[type(pipeline.scheduler).__name__])
    return options


def strength_in_place_of_start(_: Any, options: dict[str, Any]) -> dict[str, Any]:
    rest = {name: value for name, value in options.items() if name != "denoising_start"}
    return {**rest, "strength": 0.3}


def other_start(_: Any, options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "denoising_start": 0.7}


def other_steps(_: Any, options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "num_inference_steps": 50}


@pytest.mark.parametrize("name", ["DDIM", "K_EULER"])
@pytest.mark.parametrize(
    "mistake", [other_scheduler, strength_in_place_of_start, other_start, other_steps]
)
def test_a_wrong_hand_over_shows(name: str, mistake: Any) -> None:
    wrong = handed_over(name, mistake)
    assert difference(wrong, unsplit(name)) > 0.2


def test_the_ensemble_uses_neither_strength_nor_the_refiner_s_own_steps() -> None:
    first = picture(**ENSEMBLE)
    assert same(first, picture(**{**ENSEMBLE, "strength": 0.0}))
    assert same(first, picture(**{**ENSEMBLE, "strength": 1.0, "refiner_inference_steps": 3}))


@pytest.mark.parametrize("frac", [1e-6, 0.04, 0.5, 0.99, 1 - 1e-9])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_an_ensemble_may_be_cut_anywhere(frac: float, name: str) -> None:
    job_input = {**ENSEMBLE, "high_noise_frac": frac, "num_inference_steps": 4, "scheduler": name}
    assert picture(**job_input).size == (128, 128)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_few_steps_are_no_error(steps: int, name: str) -> None:
    job_input = {**REFINED, "num_inference_steps": steps, "refiner_inference_steps": steps}
    for strength in (0.3, 1.0):
        picture(**{**job_input, "strength": strength, "scheduler": name})


@pytest.mark.parametrize("name", ["DDIM", "K_EULER_ANCESTRAL"])
@pytest.mark.parametrize(
    "settings", [BASE_ONLY, REFINED, ENSEMBLE], ids=["base", "refined", "ensemble"]
)
def test_a_batch_gives_the_pictures_of_single_requests(name: str, settings: dict[str, Any]) -> None:
    settings = {**settings, "scheduler": name}
    batch = pictures(**{**settings, "seed": 7, "num_images": 4})
    assert len(batch) == 4
    for i, one in enumerate(batch):
        single = picture(**{**settings, "seed": 7 + i})
        assert largest_difference(one, single) <= 2, "more than rounding"
        assert difference(one, single) < 0.02
    assert difference(batch[0], batch[1]) > 1


def test_a_batch_of_refined_input_pictures_has_seeds_too() -> None:
    image = Image.effect_noise((64, 64), 50).convert("RGB")
    settings = {"prompt": PROMPT, "image_url": data_uri(image), "refiner_inference_steps": 10}
    batch = pictures(**settings, seed=7, num_images=3)
    for i, one in enumerate(batch):
        assert largest_difference(one, picture(**settings, seed=7 + i)) <= 2
    assert difference(batch[0], batch[1]) > 0.1


def test_the_seed_of_the_output_is_the_first_and_makes_the_picture_again() -> None:
    output = run({**BASE_ONLY, "seed": None})
    again = run({**BASE_ONLY, "seed": output["seed"]})
    assert output["seed"] == again["seed"]
    assert output["images"] == again["images"]
    assert run({**BASE_ONLY, "seed": 2**64 - 1, "num_images": 2})["seed"] == 2**64 - 1


def test_a_job_leaves_no_trace_in_the_next() -> None:
    first = picture(**REFINED)
    image = data_uri(Image.new("RGB", (64, 64), "red"))
    for name in SCHEDULERS:
        run({**ENSEMBLE, "scheduler": name, "guidance_scale": 1, "negative_prompt": "a square"})
    run({"image_url": image, "strength": 1, "refiner_inference_steps": 3, "num_images": 2})
    run({**REFINED, "height": 64, "width": 96})
    run({"prompt": PROMPT, "height": 65})
    assert same(picture(**REFINED), first)


def test_generating_touches_no_environment_network_or_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = models()
    request = parse_request(REFINED)
    draw(request, loaded)  # libraries may read their own files the first time

    def forbidden(*arguments: Any, **_: Any) -> Any:
        raise AssertionError(f"touched {arguments}")

    monkeypatch.setattr("builtins.open", forbidden)
    monkeypatch.setattr("socket.socket", forbidden)
    monkeypatch.setattr("os.getenv", forbidden)
    assert len(draw(request, loaded)) == 1


def test_each_stage_has_a_scheduler_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    build = generate_module.scheduler_of

    def recorded(*arguments: Any, **options: Any) -> Any:
        built.append(build(*arguments, **options))
        return built[-1]

    loaded = models()  # which draws as well
    monkeypatch.setattr(generate_module, "scheduler_of", recorded)
    draw(parse_request({**ENSEMBLE, "scheduler": "KLMS"}), loaded)
    first, second = built
    assert first is not second
    assert type(first) is type(second)
    assert first.config == second.config


def test_pictures_leave_the_gpu_in_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[torch.Tensor] = []
    copy = torch.Tensor.cpu

    def noted(tensor: torch.Tensor) -> torch.Tensor:
        copied.append(tensor)
        return copy(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", noted)
    decoding._to_pixels(torch.rand(2, 3, 8, 8), may_be_black=False)
    assert [(tensor.dtype, tensor.is_contiguous()) for tensor in copied] == [(torch.uint8, True)]


def test_base_and_refiner_share_what_they_have_in_common() -> None:
    loaded = models()
    stages = plan_stages(parse_request({"prompt": PROMPT}), loaded)
    base, refiner = (
        generate_module._pipeline(stage, loaded, unet)
        for stage, unet in zip(stages, loaded.unets(), strict=True)
    )
    for name in ("text_encoder_2", "tokenizer_2", "vae"):
        assert getattr(refiner, name) is getattr(base, name)
    assert [base.unet, refiner.unet] == loaded.unets()
    assert refiner.text_encoder is None


# --- whatever happens, the networks are left as they were -----------------------------------------


class OutOfMemoryError(Exception):
    pass


@pytest.fixture
def narrow() -> Models:
    """In float16, with a VAE that is to be upcast, as SDXL's own."""
    made = fresh_models(dtype=torch.float16)
    made.vae.register_to_config(force_upcast=True)
    return made


@pytest.mark.filterwarnings("ignore:`upcast_vae`")
@pytest.mark.parametrize("part", ["decoder", "encoder"])
def test_a_vae_that_fails_upcast_is_set_back_for_the_next_job(part: str, narrow: Models) -> None:
    """diffusers leaves it in float32, at which every later job of the worker fails."""
    refine = {"prompt": PROMPT, "seed": 3, "refiner_inference_steps": 4, "strength": 0.5}
    request = parse_request({**refine, "image_url": "https://example.com/a.png"})
    image = Image.effect_noise((64, 64), 50).convert("RGB")
    canvas = canvas_of(image)
    [expected] = draw(request, narrow, canvas)

    activations: list[weakref.ref[torch.Tensor]] = []

    def fail(*_: Any) -> None:
        large = torch.ones(3)
        activations.append(weakref.ref(large))
        assert narrow.vae.dtype == torch.float32
        raise OutOfMemoryError

    back: list[bool] = []
    to = narrow.vae.to

    def noted(*args: Any, **options: Any) -> Any:
        back.extend(tensor() is None for tensor in activations)
        return to(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(narrow.vae, "to", noted)
        hook = getattr(narrow.vae, part).register_forward_pre_hook(fail)
        with pytest.raises(OutOfMemoryError):
            draw(request, narrow, canvas)
        hook.remove()
    assert back, "set back"
    assert all(back), "what the pass held is free before memory is needed again"
    assert {parameter.dtype for parameter in narrow.vae.parameters()} == {torch.float16}
    assert same(draw(request, narrow, canvas)[0], expected)


@pytest.mark.parametrize("fails", [False, True])
def test_a_plan_s_tiles_and_slices_last_as_long_as_it_decodes(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the passes, another job that is drawn beside this one may decode in its own way."""
    made = fresh_models()
    decode, seen = made.vae.decode, []
    monkeypatch.setattr(
        batches, "plan", lambda *_, **__: batches.Plan(1, slicing=True, tiling=True)
    )

    def decoded(*arguments: Any, **options: Any) -> Any:
        seen.append((made.vae.use_slicing, made.vae.use_tiling))
        if fails:
            raise OutOfMemoryError
        return decode(*arguments, **options)

    monkeypatch.setattr(made.vae, "decode", decoded)
    with contextlib.suppress(OutOfMemoryError):
        draw(parse_request({**BASE_ONLY, "num_inference_steps": 1}), made)
    assert seen == [(True, True)]
    assert (made.vae.use_slicing, made.vae.use_tiling) == (False, False)


def hooks(made: Models) -> list[Any]:
    """What is hung on the networks, and what is put in place of their own `forward`."""
    modules = [module for network in made.networks().values() for module in network.modules()]
    return [
        (*module._forward_hooks, *module._forward_pre_hooks, vars(module).get("forward"))
        for module in modules
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_no_hook_outlasts_a_job(fails: bool) -> None:
    made = fresh_models()
    draw(parse_request(REFINED), made)  # transformers hangs up its own, once
    before = hooks(made)
    during: list[bool] = []

    def on_step(_: Any) -> None:
        during.append(hooks(made) != before)
        if fails:
            raise OutOfMemoryError

    with contextlib.suppress(OutOfMemoryError):
        draw(parse_request(REFINED), made, on_step=on_step, step_cache_interval=2)
    assert all(during)
    assert hooks(made) == before


def test_after_the_largest_seed_comes_0() -> None:
    largest = 2**64 - 1
    request = parse_request(
        {**BASE_ONLY, "num_inference_steps": 2, "seed": largest, "num_images": 2}
    )
    zero = parse_request({**BASE_ONLY, "num_inference_steps": 2, "seed": 0})
    assert [request.seed_of(i) for i in range(2)] == [largest, 0]
    assert largest_difference(draw(request, models())[1], draw(zero, models())[0]) <= 1
