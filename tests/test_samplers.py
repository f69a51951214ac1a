"""The names of samplers and schedules, as programs and services have them."""

import pytest

from sdxl_worker.request import Request
from sdxl_worker.samplers import (
    NEAREST,
    SAMPLERS,
    SCHEDULE_SPELLINGS,
    SCHEDULES,
    SPELLINGS,
    why_not,
)

# The lists of the programs, with what each name is here: None where diffusers has nothing like it.
A1111 = {
    "DPM++ 2M": "DPMSolverMultistep",
    "DPM++ SDE": "DPMSolverSinglestepSDE",
    "DPM++ 2M SDE": "DPMSolverMultistepSDE",
    "DPM++ 2M SDE Heun": "DPMSolverMultistepSDEHeun",
    "DPM++ 2S a": None,
    "DPM++ 3M SDE": "DPMSolverMultistepSDE3",
    "Euler a": "K_EULER_ANCESTRAL",
    "Euler": "K_EULER",
    "LMS": "KLMS",
    "Heun": "K_HEUN",
    "DPM2": "K_DPM_2",
    "DPM2 a": "K_DPM_2_ANCESTRAL",
    "DPM fast": None,
    "DPM adaptive": None,
    "Restart": None,
    "DDIM": "DDIM",
    "DDIM CFG++": None,
    "PLMS": "PNDM",
    "UniPC": "UniPC",
    "LCM": "LCM",
}
COMFYUI = {
    "euler": "K_EULER",
    "euler_cfg_pp": None,
    "euler_ancestral": "K_EULER_ANCESTRAL",
    "euler_ancestral_cfg_pp": None,
    "heun": "K_HEUN",
    "heunpp2": None,
    "dpm_2": "K_DPM_2",
    "dpm_2_ancestral": "K_DPM_2_ANCESTRAL",
    "lms": "KLMS",
    "dpm_fast": None,
    "dpm_adaptive": None,
    "dpmpp_2s_ancestral": None,
    "dpmpp_2s_ancestral_cfg_pp": None,
    "dpmpp_sde": "DPMSolverSinglestepSDE",
    "dpmpp_sde_gpu": "DPMSolverSinglestepSDE",
    "dpmpp_2m": "DPMSolverMultistep",
    "dpmpp_2m_cfg_pp": None,
    "dpmpp_2m_sde": "DPMSolverMultistepSDE",
    "dpmpp_2m_sde_gpu": "DPMSolverMultistepSDE",
    "dpmpp_2m_sde_heun": "DPMSolverMultistepSDEHeun",
    "dpmpp_2m_sde_heun_gpu": "DPMSolverMultistepSDEHeun",
    "dpmpp_3m_sde": "DPMSolverMultistepSDE3",
    "dpmpp_3m_sde_gpu": "DPMSolverMultistepSDE3",
    "ddpm": "DDPM",
    "lcm": "LCM",
    "ipndm": None,
    "ipndm_v": None,
    "deis": "DEIS",
    "res_multistep": None,
    "res_multistep_cfg_pp": None,
    "res_multistep_ancestral": None,
    "res_multistep_ancestral_cfg_pp": None,
    "gradient_estimation": None,
    "gradient_estimation_cfg_pp": None,
    "er_sde": None,
    "seeds_2": None,
    "seeds_3": None,
    "sa_solver": "SASolver",
    "sa_solver_pece": None,
    "ddim": "DDIM",
    "uni_pc": "UniPC",
    "uni_pc_bh2": "UniPC",
}
DIFFUSERS = {
    "DDIMScheduler": "DDIM",
    "DDPMScheduler": "DDPM",
    "DEISMultistepScheduler": "DEIS",
    "DPMSolverMultistepScheduler": "DPMSolverMultistep",
    "DPMSolverSDEScheduler": "DPMSolverSinglestepSDE",
    "DPMSolverSinglestepScheduler": "DPMSolverSinglestep",
    "EulerAncestralDiscreteScheduler": "K_EULER_ANCESTRAL",
    "EulerDiscreteScheduler": "K_EULER",
    "HeunDiscreteScheduler": "K_HEUN",
    "IPNDMScheduler": None,
    "KDPM2AncestralDiscreteScheduler": "K_DPM_2_ANCESTRAL",
    "KDPM2DiscreteScheduler": "K_DPM_2",
    "LCMScheduler": "LCM",
    "LMSDiscreteScheduler": "KLMS",
    "PNDMScheduler": "PNDM",
    "SASolverScheduler": "SASolver",
    "TCDScheduler": "TCD",
    "UniPCMultistepScheduler": "UniPC",
}
# Stability AI's first API, which some of the names of 2.1.0 come from.
STABILITY = {
    "DDIM": "DDIM",
    "DDPM": "DDPM",
    "K_DPMPP_2M": "DPMSolverMultistep",
    "K_DPMPP_2S_ANCESTRAL": None,
    "K_DPM_2": "K_DPM_2",
    "K_DPM_2_ANCESTRAL": "K_DPM_2_ANCESTRAL",
    "K_EULER": "K_EULER",
    "K_EULER_ANCESTRAL": "K_EULER_ANCESTRAL",
    "K_HEUN": "K_HEUN",
    "K_LMS": "KLMS",
}
# With a schedule in the name: A1111 before its version 1.9, fal, Replicate.
COMBINED = {
    "LMS Karras": ("KLMS", "karras"),
    "DPM2 Karras": ("K_DPM_2", "karras"),
    "DPM2 a Karras": ("K_DPM_2_ANCESTRAL", "karras"),
    "DPM++ 2M Karras": ("DPMSolverMultistep", "karras"),
    "DPM++ SDE Karras": ("DPMSolverSinglestepSDE", "karras"),
    "DPM++ 2M SDE Karras": ("DPMSolverMultistepSDE", "karras"),
    "DPM++ 2M SDE Exponential": ("DPMSolverMultistepSDE", "exponential"),
    "DPM++ 2M SDE Heun Karras": ("DPMSolverMultistepSDEHeun", "karras"),
    "DPM++ 3M SDE Karras": ("DPMSolverMultistepSDE3", "karras"),
    "DPM++ 3M SDE Exponential": ("DPMSolverMultistepSDE3", "exponential"),
    "Euler (trailing timesteps)": ("K_EULER", "trailing"),
    "LCM (trailing timesteps)": ("LCM", "trailing"),
    "KarrasDPM": ("DPMSolverMultistep", "karras"),
}
FAL_AND_REPLICATE = {"Euler A": "K_EULER_ANCESTRAL", "HeunDiscrete": "K_HEUN", "TCD": "TCD"}


@pytest.mark.parametrize(
    "names",
    [A1111, COMFYUI, DIFFUSERS, STABILITY, FAL_AND_REPLICATE],
    ids=lambda it: next(iter(it)),
)
def test_every_name_of_a_program_is_taken_or_answered_with_the_nearest(
    names: dict[str, str | None],
) -> None:
    for name, sampler in names.items():
        if sampler is None:
            assert name not in SPELLINGS
            assert (why_not(name) or "").endswith(f"the nearest is {NEAREST[name]}")
        else:
            assert SPELLINGS[name] == (sampler, None)
            assert why_not(name) is None


def test_a_name_may_give_a_schedule_as_well() -> None:
    for name, both in COMBINED.items():
        assert SPELLINGS[name] == both


def test_a_schedule_that_a_name_gives_is_one_that_the_sampler_can_do() -> None:
    for sampler, schedule in SPELLINGS.values():
        assert schedule is None or schedule in SAMPLERS[sampler].schedules


def test_a_reason_is_given_with_a_schedule_too() -> None:
    assert why_not("DPM++ 2S a Karras") == why_not("DPM++ 2S a")
    assert why_not("nothing") is None


def test_no_name_means_two_samplers() -> None:
    names = [name for one in SAMPLERS.values() for name in (*one.spellings, *one.combined)]
    assert len(names) == len(set(names))
    assert SPELLINGS.keys().isdisjoint(NEAREST)
    assert all(SPELLINGS[name] == (name, None) for name in SAMPLERS)


@pytest.mark.parametrize(
    ("spelling", "schedule"),
    [
        *((label, name) for name, one in SCHEDULES.items() for label in (name, one.infotext)),
        ("sgm_uniform", "trailing"),
        ("simple", "trailing"),
        ("align_your_steps", "ays"),
    ],
)
def test_a_schedule_has_its_names_elsewhere(spelling: str | None, schedule: str) -> None:
    if spelling is not None:
        assert SCHEDULE_SPELLINGS[spelling] == schedule


def test_the_published_names_are_these() -> None:
    properties = Request.model_json_schema()["properties"]
    assert properties["scheduler"]["enum"] == list(SPELLINGS)
    assert properties["schedule"]["anyOf"][0]["enum"] == list(SCHEDULE_SPELLINGS)
