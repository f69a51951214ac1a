"""The schedulers that samplers and schedules are carried out by: a new one for each stage."""

import dataclasses
import inspect
import itertools
import subprocess
import sys
from types import MappingProxyType
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import configuration_utils
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import retrieve_timesteps
from PIL import Image

from sdxl_worker.drawing.schedulers import build_scheduler, check_sampler, timesteps_run
from sdxl_worker.drawing.stages import plan_stages, scheduler_of
from sdxl_worker.drawing.steps import Step
from sdxl_worker.errors import RequestError
from sdxl_worker.few_step import recognise, with_settings_of
from sdxl_worker.loading.models import Models
from sdxl_worker.request import parse_request
from sdxl_worker.samplers import EDM_SAMPLERS, SAMPLERS, SCHEDULES, SamplerName, ScheduleName
from tests.support import (
    PROMPT,
    REPOSITORY,
    SCHEDULERS,
    canvas_of,
    draw,
    largest_difference,
    models,
    noise_picture,
    plain_base,
)

SMALL: dict[str, Any] = {
    "prompt": PROMPT,
    "seed": 3,
    "width": 64,
    "height": 64,
    "refiner_inference_steps": 0,
}
CONFIG = dict(models().scheduler_config)
FLAGS = {
    "karras": "use_karras_sigmas",
    "exponential": "use_exponential_sigmas",
    "beta": "use_beta_sigmas",
}
PAIRS = [(name, schedule) for name, one in SAMPLERS.items() for schedule in one.schedules]


def built(name: Any, schedule: Any = None, steps: int | None = None, **options: Any) -> Any:
    scheduler = build_scheduler(
        name, CONFIG, begins_in_mid_schedule=False, schedule=schedule, **options
    )
    if steps is not None:
        scheduler.set_timesteps(steps, device="cpu")
    return scheduler


def plain(name: Any, **config: Any) -> Any:
    """The same class and configuration, as a script of diffusers' documentation has them."""
    sampler = SAMPLERS[name]
    scheduler_class = getattr(diffusers, sampler.class_name)
    return scheduler_class.from_config({**CONFIG, **sampler.config, **config})


def table(scheduler: Any) -> list[float]:
    """Where its steps are: sigmas, for those that have some, and timesteps for the others."""
    has_sigmas = len(getattr(scheduler, "sigmas", ())) > 0
    return (scheduler.sigmas if has_sigmas else scheduler.timesteps).tolist()


def drawn(name: str, some_models: Models | None = None, **more: Any) -> list[Image.Image]:
    job_input = {**SMALL, "num_inference_steps": 3, "scheduler": name, **more}
    return draw(parse_request(job_input), some_models or models())


# Those of 2.1.0 are compared in `test_generate.py`, in every mode.
@pytest.mark.parametrize("name", [name for name in SAMPLERS if name not in SCHEDULERS])
def test_pictures_are_those_of_plain_diffusers(name: SamplerName) -> None:
    base = plain_base()
    base.scheduler = plain(name)
    [expected] = base(
        PROMPT,
        width=64,
        height=64,
        num_inference_steps=3,
        guidance_scale=7.5,
        generator=[torch.Generator("cpu").manual_seed(3)],
        eta=0.3 if name == "TCD" else 0,
    ).images
    [got] = drawn(name)
    assert got.tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", SAMPLERS)
def test_each_picture_of_a_batch_is_what_it_is_alone(name: str) -> None:
    together = drawn(name, num_images=3)
    alone = [drawn(name, seed=SMALL["seed"] + i)[0] for i in range(3)]
    for one, other in zip(together, alone, strict=True):
        assert largest_difference(one, other) <= 2
    assert largest_difference(*alone[:2]) > 50


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_adds_noise_in_its_steps_is_known(name: SamplerName) -> None:
    """That noise is of each picture's generator, drawn on the host."""
    scheduler = built(name, steps=4)
    generator = torch.Generator("cpu").manual_seed(0)
    before = generator.get_state()
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator("cpu").manual_seed(1))
    takes = "generator" in inspect.signature(scheduler.step).parameters
    for timestep in scheduler.timesteps:
        options = {"generator": [generator]} if takes else {}
        scaled = scheduler.scale_model_input(latents, timestep)
        latents = scheduler.step(scaled, timestep, latents, **options, return_dict=False)[0]
    assert (not torch.equal(before, generator.get_state())) == SAMPLERS[name].adds_noise


@pytest.mark.parametrize(("name", "schedule"), PAIRS)
def test_a_schedule_is_what_diffusers_makes_of_it(name: Any, schedule: str) -> None:
    got = table(built(name, schedule, steps=7))
    if schedule == "normal":
        assert got == table_of(plain(name))
        return
    assert got != table_of(plain(name))
    if schedule in FLAGS:
        expected = plain(name, timestep_spacing="linspace", **{FLAGS[schedule]: True})
        assert got == table_of(expected)
    elif schedule == "trailing" and "trailing" in heard(name):
        assert got == table_of(plain(name, timestep_spacing="trailing"))


def table_of(scheduler: Any, steps: int = 7) -> list[float]:
    scheduler.set_timesteps(steps)
    return table(scheduler)


def heard(name: Any) -> set[str]:
    """What changes the schedule of a class of diffusers, or is refused by it aloud."""
    normal = table_of(plain(name))
    flagged = {schedule: plain(name, **{flag: True}) for schedule, flag in FLAGS.items()}
    found = {schedule for schedule, one in flagged.items() if table_of(one) != normal}
    trailing = table_of(plain(name, timestep_spacing="trailing"))
    return found | ({"trailing"} if trailing != normal else set())


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_diffusers_silently_ignores_is_not_offered(name: SamplerName) -> None:
    by_timesteps = {"DPMSolverSinglestep", "DPMSolverSinglestepSDE", "LCM", "TCD"}
    offered = set(SAMPLERS[name].schedules) - {"normal", "ays"}
    assert offered == heard(name) | ({"trailing"} if name in by_timesteps else set())


@pytest.mark.parametrize(
    "name", [name for name, one in SAMPLERS.items() if "trailing" in one.schedules]
)
@pytest.mark.parametrize("steps", [1, 2, 4, 7, 30])
def test_trailing_begins_with_the_last_timestep_of_the_training(name: Any, steps: int) -> None:
    timesteps = built(name, "trailing", steps).timesteps
    # What repeats a step, or makes two of one, has the others in between.
    wanted = np.round(1000 - np.arange(steps) * 1000 / steps) - 1
    assert set(wanted) <= set(timesteps.tolist())
    assert timesteps[0] == 999


ABLE = [name for name, one in SAMPLERS.items() if "ays" in one.schedules]
AUTHORS = [999, 845, 730, 587, 443, 310, 193, 116, 53, 13]
# https://research.nvidia.com/labs/toronto-ai/AlignYourSteps/howto.html
AUTHORS_SIGMAS = [14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029]


@pytest.mark.parametrize("name", ABLE)
def test_ten_steps_of_ays_are_the_authors(name: SamplerName) -> None:
    timesteps = built(name, "ays", 10).timesteps
    assert torch.unique_consecutive(timesteps).tolist() == AUTHORS


@pytest.mark.parametrize("steps", [1, 5, 20, 40])
def test_other_numbers_of_steps_of_ays_are_log_linear_between_the_authors(steps: int) -> None:
    places = np.linspace(0, 10, steps + 1)
    wanted = np.exp(np.interp(places, np.arange(11), np.log(AUTHORS_SIGMAS)))[:-1]
    got = built("K_EULER", "ays", steps).sigmas[:-1].numpy()
    # Timesteps are whole, and the authors' sigmas rounded.
    np.testing.assert_allclose(got, wanted, rtol=0.05)


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("steps", [200, 999, 1000])
def test_no_two_steps_of_ays_are_one(steps: int, rescaled: bool) -> None:
    config = {**CONFIG, "rescale_betas_zero_snr": rescaled}
    scheduler = build_scheduler(
        "DPMSolverMultistep", config, begins_in_mid_schedule=False, schedule="ays"
    )
    scheduler.set_timesteps(steps, device="cpu")
    timesteps = scheduler.timesteps
    assert len(timesteps) == steps
    assert (timesteps.diff() < 0).all()
    assert 0 <= timesteps[-1] <= timesteps[0] <= 999


def test_a_sampler_s_configuration_takes_the_place_of_the_model_s() -> None:
    config = {**CONFIG, "algorithm_type": "dpmsolver++", "use_karras_sigmas": True}
    scheduler = build_scheduler(
        "DPMSolverMultistepSDE", config, begins_in_mid_schedule=False, schedule="exponential"
    )
    assert scheduler.config.algorithm_type == "sde-dpmsolver++"
    assert not scheduler.config.use_karras_sigmas
    kept = build_scheduler("DPMSolverMultistep", config, begins_in_mid_schedule=False)
    assert kept.config.use_karras_sigmas, "normal is what the model's configuration says"


@pytest.mark.parametrize(("name", "schedule"), PAIRS)
def test_one_step_begins_where_a_schedule_begins(name: Any, schedule: str) -> None:
    scheduler = built(name, schedule, 1)
    assert len(scheduler.timesteps) == 1
    if schedule != "normal":
        assert scheduler.timesteps[0] == 999
        assert len(table(scheduler)) < 2 or table(scheduler)[0] > table(scheduler)[-1]


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("K_EULER", {"timesteps": [999, 499]}),
        ("K_EULER", {"sigmas": [14.6, 1.0, 0.0]}),
        ("DPMSolverMultistep", {"timesteps": [999, 499]}),
    ],
)
@pytest.mark.parametrize("in_mid_schedule", [False, True])
def test_a_schedule_of_one_s_own_is_taken_where_the_sampler_can(
    name: Any, given: dict[str, Any], in_mid_schedule: bool
) -> None:
    scheduler = build_scheduler(name, CONFIG, begins_in_mid_schedule=in_mid_schedule)
    timesteps, count = retrieve_timesteps(scheduler, device="cpu", **given)
    assert count == len(timesteps) == 2
    if "timesteps" in given:
        assert timesteps.tolist() == given["timesteps"]


def test_a_schedule_of_one_s_own_is_refused_where_the_sampler_cannot() -> None:
    with pytest.raises(ValueError, match="does not support custom"):
        retrieve_timesteps(built("DDIM"), device="cpu", timesteps=[999, 499])


def test_schedulers_are_built_from_the_loaded_configuration_alone() -> None:
    before = dict(models().scheduler_config)
    for name in SAMPLERS:
        drawn(name, num_inference_steps=2)
    assert dict(models().scheduler_config) == before
    with pytest.raises(TypeError):
        models().scheduler_config["beta_start"] = 1.0  # type: ignore[index]


@pytest.mark.parametrize(("name", "schedule"), [("K_EULER", "beta"), ("KLMS", "normal")])
def test_scipy_is_found_where_diffusers_was_imported_without_it(name: str, schedule: str) -> None:
    script = (
        "from sdxl_worker.loading.sparing_imports import sparing_imports\n"
        "with sparing_imports():\n    import diffusers\n"
        "from sdxl_worker.drawing.schedulers import build_scheduler\n"
        f"options = {{'begins_in_mid_schedule': False, 'schedule': {schedule!r}}}\n"
        f"it = build_scheduler({name!r}, {{}}, **options)\n"
        "it.set_timesteps(3, device='cpu')\n"
        "print(getattr(it, 'get_lms_coefficient', lambda *_: 1)(1, 0, 0))"
    )
    subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, check=True)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"schedule": "trailing"},
    {"high_noise_frac": 0.7, "refiner_inference_steps": 10},
    {"schedule": "karras", "high_noise_frac": 0.7, "refiner_inference_steps": 10},
    {"refiner_inference_steps": 10, "strength": 0.35},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["DDIM", "PNDM", "K_EULER", "K_HEUN", "K_DPM_2", "UniPC"])
def test_the_steps_that_are_planned_are_those_that_come(
    name: SamplerName, options: dict[str, Any]
) -> None:
    if options.get("schedule", "normal") not in SAMPLERS[name].schedules:
        return
    job_input = {**SMALL, "scheduler": name, "num_inference_steps": 8, **options}
    request = parse_request(job_input)
    stages = plan_stages(request, models())
    steps: dict[str, int] = {}
    percent: list[int] = []

    def count(step: Step) -> None:
        steps[step.stage] = step.step
        percent.append(step.percent)

    draw(request, models(), on_step=count)
    assert {stage.name: stage.steps for stage in stages} == steps
    assert percent == sorted(set(percent))
    assert percent[-1] == 100


def test_steps_in_pairs_are_cut_between_pairs() -> None:
    for name in ("K_HEUN", "K_DPM_2", "K_DPM_2_ANCESTRAL"):
        for share in (0.1, 0.3, 0.5, 0.62, 0.8, 0.95):
            options = {"num_inference_steps": 10}
            first = timesteps_run(
                built(name, denoising_end=share), {**options, "denoising_end": share}
            )
            second = timesteps_run(built(name), {**options, "denoising_start": share})
            assert first % 2 == 0
            assert first + second == 2 * 10 - 1


def test_what_is_another_class_s_configuration_is_not_logged_at_each_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logged: list[str] = []
    monkeypatch.setattr(configuration_utils.logger, "warning", logged.append)
    for name in SAMPLERS:
        built(name)
    assert logged == []


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_a_mask_keeps_gets_as_much_noise_as_the_latents_have(name: SamplerName) -> None:
    """After each call: an ideal denoiser's latents are the picture with noise of that share."""
    scheduler = built(name, steps=6)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    generator = torch.Generator("cpu").manual_seed(0)
    picture, noise = torch.zeros(1, 4, 64, 64), torch.randn(1, 4, 64, 64, generator=generator)
    shares = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, dim=0).numpy()
    latents = scheduler.add_noise(picture, noise, scheduler.timesteps[:1])
    takes = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": [generator]} if takes else {}
    for timestep, following in itertools.pairwise(scheduler.timesteps):
        scaled = scheduler.scale_model_input(latents, timestep)
        share = float(np.interp(timestep, np.arange(1000), shares))
        predicted = scaled / (1 - share) ** 0.5
        latents = scheduler.step(predicted, timestep, latents, **options, return_dict=False)[0]
        kept = scheduler.add_noise(picture, noise, following[None])
        assert float(kept.std() / latents.std()) == pytest.approx(1, rel=0.03)


def test_a_base_that_a_schedule_leaves_no_step_is_refused() -> None:
    fields = {"image_url": "https://example.com/a.png", "mode": "img2img", "high_noise_frac": 0.5}
    request = parse_request(
        {**SMALL, **fields, "scheduler": "Euler Exponential", "num_inference_steps": 10}
        | {"strength": 0.6, "refiner_inference_steps": 10}
    )
    with pytest.raises(RequestError, match="strength: 0.6 leaves the base no step"):
        plan_stages(request, models())


def checked(config: dict[str, Any] | None = None, **fields: Any) -> None:
    check_sampler(parse_request({"prompt": "a", **fields}), {**CONFIG, **(config or {})})


ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
EDM = {
    "_class_name": "EDMDPMSolverMultistepScheduler",
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "sigma_data": 0.5,
    "prediction_type": "epsilon",
}


def test_every_sampler_does_its_schedules_and_is_refused_others() -> None:
    for name, sampler in SAMPLERS.items():
        for schedule in SCHEDULES:
            if schedule in sampler.schedules:
                checked(scheduler=name, schedule=schedule)
            else:
                with pytest.raises(RequestError, match=f"schedule: {name} cannot do {schedule};"):
                    checked(scheduler=name, schedule=schedule)
    with pytest.raises(RequestError) as refused:
        checked(scheduler="UniPC", schedule="ays")
    assert str(refused.value) == (
        "schedule: UniPC cannot do ays; it does normal, karras, exponential, beta or trailing"
    )


def test_a_model_that_begins_at_pure_noise_needs_a_sampler_that_can() -> None:
    for name, sampler in SAMPLERS.items():
        takes = "rescale_betas_zero_snr" in plain(name).config
        assert takes == sampler.zero_terminal_snr
        if takes:
            checked(ZERO_SNR, scheduler=name)
        else:
            with pytest.raises(RequestError, match=f"scheduler: {name} cannot begin at pure noise"):
                checked(ZERO_SNR, scheduler=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("name", "schedule"), [pair for pair in PAIRS if SAMPLERS[pair[0]].zero_terminal_snr]
)
def test_from_pure_noise_an_ideal_model_is_followed(
    name: Any, schedule: ScheduleName, dtype: torch.dtype
) -> None:
    config = {**CONFIG, **ZERO_SNR, "timestep_spacing": "trailing"}
    for steps in (1, 2, 25):
        scheduler = build_scheduler(name, config, begins_in_mid_schedule=False, schedule=schedule)
        scheduler.set_timesteps(steps, device="cpu")
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        generator = torch.Generator("cpu").manual_seed(0)
        picture, noise = (torch.randn(1, 4, 8, 8, generator=generator) for _ in range(2))
        options = {"generator": [generator]} if SAMPLERS[name].adds_noise else {}
        latents = (noise * scheduler.init_noise_sigma).to(dtype)
        shares = scheduler.alphas_cumprod.numpy()
        for timestep in scheduler.timesteps:
            scaled = scheduler.scale_model_input(latents, timestep).float()
            share = float(np.interp(timestep, np.arange(1000), shares))
            epsilon = (scaled - share**0.5 * picture) / (1 - share) ** 0.5
            velocity = share**0.5 * epsilon - (1 - share) ** 0.5 * picture
            latents = scheduler.step(
                velocity.to(dtype), timestep, latents, **options, return_dict=False
            )[0]
        assert float((latents.float() - picture).std()) < 0.1


def edm_models() -> Models:
    return dataclasses.replace(models(), scheduler_config=MappingProxyType(EDM))


def test_continuous_noise_levels_need_a_sampler_that_can() -> None:
    for name in SAMPLERS:
        if name in EDM_SAMPLERS:
            checked(EDM, scheduler=name)
        else:
            with pytest.raises(RequestError, match=f"scheduler: {name} cannot do this model"):
                checked(EDM, scheduler=name)
    with pytest.raises(RequestError, match="K_EULER cannot do ays; it does normal, karras or exp"):
        checked(EDM, scheduler="K_EULER", schedule="ays")
    with pytest.raises(RequestError, match="high_noise_frac: this model"):
        checked(EDM, scheduler="K_EULER", high_noise_frac=0.8)


@pytest.mark.parametrize("schedule", ["normal", "karras", "exponential"])
@pytest.mark.parametrize("name", EDM_SAMPLERS)
def test_continuous_noise_levels_give_the_pictures_of_plain_diffusers(
    name: SamplerName, schedule: str
) -> None:
    base = plain_base()
    scheduler_class = getattr(diffusers, EDM_SAMPLERS[name].class_name)
    changes = {} if schedule == "normal" else {"sigma_schedule": schedule}
    base.scheduler = scheduler_class.from_config({**EDM, **changes})
    [expected] = base(
        PROMPT,
        width=64,
        height=64,
        num_inference_steps=3,
        guidance_scale=7.5,
        generator=[torch.Generator("cpu").manual_seed(3)],
    ).images
    [got] = drawn(name, edm_models(), schedule=schedule)
    assert got.tobytes() == expected.tobytes()
    canvas = canvas_of(noise_picture(64, 64), np.eye(64, dtype=bool))
    fields = {"image_url": "https://example.com/a.png", "mode": "img2img", "strength": 0.7}
    job_input = {**SMALL, **fields, "scheduler": name, "schedule": schedule}
    del job_input["width"], job_input["height"]
    request = parse_request({**job_input, "num_inference_steps": 6})
    [redrawn] = draw(request, edm_models(), canvas)
    assert redrawn.size == (64, 64)


def few_step_scheduler(name: str, **fields: Any) -> Any:
    few_step = recognise(name, None, {})
    request = with_settings_of(parse_request({**SMALL, **fields}), few_step)
    [stage] = plan_stages(request, models())
    scheduler = scheduler_of(stage, request, models(), few_step)
    scheduler.set_timesteps(request.num_inference_steps, device="cpu")
    return scheduler


@pytest.mark.parametrize(
    ("name", "fields", "timesteps"),
    [
        ("sdxl_lightning_4step_lora", {}, [999, 749, 499, 249]),
        ("Hyper-SDXL-2steps-lora", {}, [999, 499]),
        ("Hyper-SDXL-1step-Unet", {}, [800]),
        ("Hyper-SDXL-1step-Unet", {"num_inference_steps": 2}, [999, 499]),
        ("Hyper-SDXL-1step-lora", {}, [999]),
        ("lcm-lora-sdxl", {}, [999, 759, 499, 259]),
        ("TCD-SDXL-LoRA", {}, [999, 759, 499, 259]),
        ("dmd2_sdxl_4step_lora", {}, [999, 749, 499, 249]),
        ("dmd2_sdxl_1step_unet", {}, [399]),
        ("sdxl-turbo", {}, [999]),
        ("sdxl-flash", {}, [999, 856, 713, 570, 428, 285, 142]),
    ],
)
def test_few_step_models_have_their_authors_timesteps(
    name: str, fields: dict[str, Any], timesteps: list[int]
) -> None:
    assert few_step_scheduler(name, **fields).timesteps.tolist() == timesteps


def test_few_step_models_have_their_authors_configuration() -> None:
    assert few_step_scheduler("sdxl_lightning_1step_x0").config.prediction_type == "sample"
    other = few_step_scheduler("sdxl_lightning_1step_x0", scheduler="DDIM")
    assert other.config.prediction_type == "epsilon", "it is another sampler's"
    config = {**CONFIG, "clip_sample": True, "set_alpha_to_one": True}
    pcm = recognise("pcm_sdxl_smallcfg_2step_converted", None, {})
    scheduler = build_scheduler("DDIM", config, begins_in_mid_schedule=False, few_step=pcm)
    assert not scheduler.config.clip_sample
    assert not scheduler.config.set_alpha_to_one


@pytest.mark.parametrize(
    ("name", "eta"), [("Hyper-SDXL-1step-lora", 1.0), ("TCD-SDXL-LoRA", 0.3), (None, 0.3)]
)
def test_tcd_draws_as_much_noise_anew_as_its_authors_say(name: str | None, eta: float) -> None:
    """The pipelines pass an eta of 0."""
    few_step = name and recognise(name, None, {})
    got, expected = built("TCD", steps=4, few_step=few_step), plain("TCD")
    expected.set_timesteps(4)
    latents, prediction = torch.ones(2, 1, 4, 8, 8)
    one, other = (
        scheduler.step(
            prediction,
            scheduler.timesteps[0],
            latents,
            eta=given,
            generator=[torch.Generator("cpu").manual_seed(0)],
        ).prev_sample
        for scheduler, given in ((got, 0), (expected, eta))
    )
    assert torch.equal(one, other)


@pytest.mark.parametrize("guidance_scale", [0, 1, 1.5])
def test_a_guidance_scale_of_1_or_below_halves_the_work(guidance_scale: float) -> None:
    sizes: list[int] = []
    hook = models().unet.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    try:
        drawn("K_EULER", guidance_scale=guidance_scale)
    finally:
        hook.remove()
    assert sizes == [2 if guidance_scale > 1 else 1] * 3
