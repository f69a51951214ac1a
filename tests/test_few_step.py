"""Few-step models: recognised, and used as their authors say."""

import json
from typing import Any

import pytest

from sdxl_worker.few_step import HASHES, FewStep, recognise, warnings_of_settings, with_settings_of
from sdxl_worker.request import Request, parse_request

NO_METADATA: dict[str, str] = {}


def recognised(name: str) -> FewStep:
    found = recognise(name, None, NO_METADATA)
    assert found is not None, name
    return found


def accepted(**fields: Any) -> Request:
    return parse_request({"prompt": "a cat", "seed": 1, **fields})


# Of published files: sampler, schedule, steps, guidance scale, and what else is special.
PUBLISHED: dict[str, tuple[Any, ...]] = {
    "ByteDance/SDXL-Lightning/sdxl_lightning_2step_lora.safetensors": ("K_EULER", "trailing", 2, 1),
    "sdxl_lightning_4step_lora": ("K_EULER", "trailing", 4, 1),
    "sdxl_lightning_8step_unet.safetensors": ("K_EULER", "trailing", 8, 1),
    "sdxl_lightning_4step.safetensors": ("K_EULER", "trailing", 4, 1),
    "Hyper-SDXL-2steps-lora.safetensors": ("DDIM", "trailing", 2, 1),
    "ByteDance/Hyper-SD/Hyper-SDXL-8steps-lora.safetensors": ("DDIM", "trailing", 8, 1),
    "Hyper-SDXL-8steps-CFG-lora.safetensors": ("DDIM", "trailing", 8, 5),
    "Hyper-SDXL-12steps-CFG-lora.safetensors": ("DDIM", "trailing", 12, 5),
    "Hyper-SDXL-1step-lora.safetensors": ("TCD", "normal", 1, 1, {"eta": 1.0}),
    "Hyper-SDXL-1step-Unet.safetensors": ("LCM", "normal", 1, 1, {"timesteps": (800,)}),
    "Hyper-SDXL-1step-Unet-Comfyui.fp16.safetensors": (
        *("LCM", "normal", 1, 1),
        {"timesteps": (800,)},
    ),
    "latent-consistency/lcm-lora-sdxl": ("LCM", "normal", 4, 1),
    "latent-consistency/lcm-lora-sdxl/pytorch_lora_weights.safetensors": ("LCM", "normal", 4, 1),
    "lcm_lora_sdxl.safetensors": ("LCM", "normal", 4, 1),
    "latent-consistency/lcm-sdxl": ("LCM", "normal", 4, 8),
    "h1t/TCD-SDXL-LoRA/pytorch_lora_weights.safetensors": ("TCD", "normal", 4, 1, {"eta": 0.3}),
    "dmd2_sdxl_4step_lora.safetensors": ("LCM", "trailing", 4, 1),
    "tianweiy/DMD2/dmd2_sdxl_4step_lora_fp16.safetensors": ("LCM", "trailing", 4, 1),
    "dmd2_sdxl_1step_unet_fp16.bin": ("LCM", "normal", 1, 1, {"timesteps": (399,)}),
    "sd_xl_turbo_1.0.safetensors": ("K_EULER_ANCESTRAL", "trailing", 1, 1, {"native_size_px": 512}),
    "sd_xl_turbo_1.0_fp16.safetensors": ("K_EULER_ANCESTRAL", "trailing", 1, 1),
    "stabilityai/sdxl-turbo": ("K_EULER_ANCESTRAL", "trailing", 1, 1),
    "pcm_sdxl_smallcfg_2step_converted.safetensors": (
        *("DDIM", "trailing", 2, 1),
        {"config": {"clip_sample": False, "set_alpha_to_one": False}},
    ),
    "pcm_sdxl_normalcfg_16step_converted.safetensors": ("DDIM", "trailing", 16, 7.5),
    "pcm_sdxl_lcmlike_lora_converted.safetensors": ("LCM", "normal", 4, 1),
    "sd-community/sdxl-flash": ("DPMSolverSinglestep", "trailing", 7, 3),
    "SDXL-Flash.safetensors": ("DPMSolverSinglestep", "trailing", 7, 3),
    "sdxl_lightning_1step_x0.safetensors": (
        *("K_EULER", "trailing", 1, 1),
        {"config": {"prediction_type": "sample"}},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_have_their_authors_settings(name: str) -> None:
    found = recognised(name)
    scheduler, schedule, steps, guidance_scale, *special = PUBLISHED[name]
    assert (found.scheduler, found.schedule, found.steps) == (scheduler, schedule, steps)
    assert found.guidance_scale == guidance_scale
    least, most = found.takes_steps
    assert least <= steps <= most
    for field, value in (special[0] if special else {}).items():
        assert getattr(found, field) == value


@pytest.mark.parametrize(
    "name",
    [
        "lightning storm style",
        "lightning_storm_style_sdxl.safetensors",
        "sdxl_lightning_strike_lora.safetensors",
        "hyper_realism_sdxl_lora.safetensors",
        "turbo_engines_xl.safetensors",
        "sdxl_flash_photography.safetensors",
        "someone/flash/style.safetensors",
        "pytorch_lora_weights.safetensors",
        "stabilityai/stable-diffusion-xl-base-1.0",
        "sd_xl_base_1.0.safetensors",
        # Of other models, and of other people with settings of their own.
        "Hyper-SD15-8steps-lora.safetensors",
        "lcm-lora-sdv1-5",
        "lcm-lora-ssd-1b",
        "dreamshaperXL_lightningDPMSDE.safetensors",
        "",
    ],
)
def test_other_files_are_none_of_them(name: str) -> None:
    assert recognise(name, "0" * 64, NO_METADATA) is None


def test_every_hash_that_is_known_is_of_a_file_that_is_known_by_name() -> None:
    for sha256, name in HASHES.items():
        found = recognise("pytorch_lora_weights.safetensors", sha256.upper(), NO_METADATA)
        assert found == recognised(name)


def test_a_title_in_the_metadata_is_a_name_too() -> None:
    for key in ("modelspec.title", "ss_output_name"):
        found = recognise("renamed.safetensors", None, {key: "sdxl_lightning_4step_lora"})
        assert found == recognised("sdxl_lightning_4step_lora")


TOLD = {
    "few_step.family": "LCM of shapes",
    "few_step.steps": "4",
    "few_step.guidance_scale": "1.5",
    "few_step.scheduler": "LCM",
    "few_step.schedule": "trailing",
}


def test_a_file_may_tell_its_settings_outright() -> None:
    found = recognise("sdxl_lightning_8step_lora", None, TOLD)
    assert found == FewStep("LCM of shapes", "LCM", "trailing", 4, (4, 4), 1.5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"few_step.steps": "many"},
        {"few_step.steps": "0"},
        {"few_step.steps": "51"},
        {"few_step.guidance_scale": "nan"},
        {"few_step.scheduler": "best"},
        {"few_step.schedule": "best"},
    ],
)
def test_what_a_file_tells_has_to_be_possible(wrong: dict[str, str]) -> None:
    assert recognise("x", None, TOLD | wrong) is None


def test_a_name_that_a_file_tells_can_be_written_anywhere() -> None:
    found = recognise("x", None, TOLD | {"few_step.family": "L\ud800\n" + "M" * 1000})
    assert found is not None
    assert found.family.startswith(r"L\ud800\nMMM")
    assert len(found.family) < 120


LIGHTNING = recognised("sdxl_lightning_4step_lora")


def test_the_authors_settings_are_the_defaults() -> None:
    request = with_settings_of(accepted(), LIGHTNING)
    assert (request.scheduler, request.schedule) == ("K_EULER", "trailing")
    assert (request.num_inference_steps, request.guidance_scale) == (4, 1)
    assert request.refiner_inference_steps == 0
    again = json.loads(request.model_dump_json(exclude_none=True))
    assert with_settings_of(parse_request(again), LIGHTNING) == request


@pytest.mark.parametrize(
    "named",
    [
        {"scheduler": "DPM++ 2M Karras"},
        {"num_inference_steps": 25},
        {"guidance_scale": 7.5},
        {"schedule": "karras"},
        {"refiner_inference_steps": 50},
    ],
)
def test_what_a_request_names_stays_even_as_it_is_by_default(named: dict[str, Any]) -> None:
    before = accepted(**named)
    after = with_settings_of(before, LIGHTNING)
    for field in before.model_fields_set:
        assert getattr(after, field) == getattr(before, field)
    assert after != before


def test_a_named_sampler_is_not_spaced_as_another_s() -> None:
    assert with_settings_of(accepted(scheduler="DDIM"), LIGHTNING).schedule is None


@pytest.mark.parametrize(
    "named", [{"refiner_inference_steps": 50}, {"high_noise_frac": 0.8}, {"strength": 0.3}]
)
def test_the_refiner_is_on_only_where_something_of_it_is_named(named: dict[str, Any]) -> None:
    is_on = with_settings_of(accepted(**named), LIGHTNING).refiner_inference_steps == 50
    assert is_on == ("strength" not in named)


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({}, 0),
        ({"refiner_inference_steps": 50}, 50),
        ({"high_noise_frac": 0.8}, 50),
        ({"image_url": "https://example.com/a.png", "mode": "img2img"}, 0),
        ({"image_url": "https://example.com/a.png", "mode": "img2img", "refiner_strength": 1}, 50),
    ],
)
def test_beside_loras_the_refiner_which_takes_none_is_off(
    fields: dict[str, Any], steps: int
) -> None:
    request = accepted(loras=[{"path": "a.safetensors"}], **fields)
    assert with_settings_of(request, None).refiner_inference_steps == steps
    off = accepted(loras=[{"path": "a.safetensors", "scale": 0}], **fields)
    assert with_settings_of(off, None).refiner_inference_steps == 50


def test_a_model_of_another_size_draws_in_its_own() -> None:
    turbo = recognised("sd_xl_turbo_1.0")
    request = with_settings_of(accepted(width=768), turbo)
    assert (request.width, request.height) == (768, 512)
    redrawn = accepted(image_url="https://example.com/a.png", mode="img2img")
    assert with_settings_of(redrawn, turbo).width is None, "a picture has its own size"
    assert with_settings_of(accepted(), LIGHTNING).width is None


def test_where_there_is_nothing_but_the_refiner_it_stays() -> None:
    request = accepted(image_url="https://example.com/a.png")
    assert with_settings_of(request, LIGHTNING).refiner_inference_steps == 50


def test_without_a_few_step_model_nothing_changes() -> None:
    assert with_settings_of(accepted(), None) == accepted()


@pytest.mark.parametrize(
    ("class_name", "sampler"),
    [
        ("EDMDPMSolverMultistepScheduler", "DPMSolverMultistep"),
        ("EDMEulerScheduler", "K_EULER"),
        ("EulerDiscreteScheduler", "DDIM"),
    ],
)
def test_a_model_of_continuous_noise_levels_has_its_own_default(
    class_name: str, sampler: str
) -> None:
    config = {"_class_name": class_name}
    assert with_settings_of(accepted(), None, config).scheduler == sampler
    assert with_settings_of(accepted(scheduler="UniPC"), None, config).scheduler == "UniPC"


def test_a_number_of_steps_that_the_file_is_not_for_is_told() -> None:
    request = with_settings_of(accepted(num_inference_steps=25), LIGHTNING)
    assert warnings_of_settings(request, LIGHTNING) == [
        "num_inference_steps: a model or LoRA of few steps (SDXL-Lightning) was made for 4 steps; "
        "got 25"
    ]
    assert warnings_of_settings(with_settings_of(accepted(), LIGHTNING), LIGHTNING) == []
    unified = recognised("Hyper-SDXL-1step-lora")
    assert warnings_of_settings(accepted(num_inference_steps=8), unified) == []
    assert (
        "for 1 to 8 steps; got 9"
        in warnings_of_settings(accepted(num_inference_steps=9), unified)[0]
    )


@pytest.mark.parametrize("few_step", [None, LIGHTNING])
def test_a_negative_prompt_without_guidance_is_told(few_step: FewStep | None) -> None:
    request = accepted(negative_prompt="a dog", guidance_scale=1, num_inference_steps=4)
    assert warnings_of_settings(request, few_step) == [
        "negative_prompt: has no effect with a guidance_scale of 1 or below; got 1"
    ]
    assert warnings_of_settings(request.model_copy(update={"guidance_scale": 1.1}), few_step) == []
