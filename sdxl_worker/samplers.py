"""The samplers and schedules: what they are, what they are called elsewhere, what they can do.

A sampler is a class of diffusers and a few values of its configuration. What a name means to
another program may differ a little from what diffusers makes of it: docs/samplers.md tells where.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

SamplerName = Literal[
    # Those of worker-sdxl 2.1.0.
    "PNDM",
    "KLMS",
    "DDIM",
    "K_EULER",
    "K_EULER_ANCESTRAL",
    "DPMSolverMultistep",
    "DPMSolverSinglestep",
    "DPMSolverMultistepSDE",
    "DPMSolverMultistepSDEHeun",
    "DPMSolverMultistepSDE3",
    "DPMSolverSinglestepSDE",
    "UniPC",
    "DEIS",
    "K_HEUN",
    "K_DPM_2",
    "K_DPM_2_ANCESTRAL",
    "SASolver",
    "DDPM",
    "LCM",
    "TCD",
]
ScheduleName = Literal["normal", "karras", "exponential", "beta", "trailing", "ays"]


@dataclass(frozen=True)
class Schedule:
    """How the steps are spaced."""

    meaning: str
    infotext: str | None
    """What A1111 calls it."""
    spellings: tuple[str, ...] = ()
    suffix: str | None = None
    """Of a sampler's name in A1111 before it had a field for the schedule."""


SCHEDULES: Mapping[ScheduleName, Schedule] = MappingProxyType(
    {
        "normal": Schedule("as the model's own configuration spaces them", None, ("Normal",)),
        "karras": Schedule(
            "sigmas of Karras et al., many of them small", "Karras", ("Karras",), " Karras"
        ),
        "exponential": Schedule(
            "sigmas evenly spaced by their logarithm",
            "Exponential",
            ("Exponential",),
            " Exponential",
        ),
        "beta": Schedule("sigmas at the quantiles of Beta(0.6, 0.6)", "Beta", ("Beta",)),
        "trailing": Schedule(
            "even timesteps, the first of them the last one of the training",
            "SGM Uniform",
            ("sgm_uniform", "SGM Uniform", "simple", "Simple"),
        ),
        "ays": Schedule(
            "Align Your Steps, its authors' ten steps for SDXL, log-linearly between them",
            "Align Your Steps",
            ("align_your_steps", "Align Your Steps"),
        ),
    }
)
BY_TIMESTEPS: tuple[ScheduleName, ...] = ("normal", "trailing")
BY_SIGMAS: tuple[ScheduleName, ...] = ("normal", "karras", "exponential", "beta", "trailing")
ALL: tuple[ScheduleName, ...] = (*BY_SIGMAS, "ays")


@dataclass(frozen=True)
class Sampler:
    module: str
    """In diffusers.schedulers."""
    class_name: str
    infotext: str
    """What A1111 calls it, or what it would."""
    schedules: tuple[ScheduleName, ...]
    """Those that it can do."""
    spellings: tuple[str, ...]
    """Other names: that of A1111 first, then of ComfyUI, diffusers, and of services."""
    combined: Mapping[str, ScheduleName] = field(default_factory=lambda: MappingProxyType({}))
    """Names of services that give a schedule as well, beside A1111's with a suffix."""
    config: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """What replaces values of the model's own configuration."""
    adds_noise: bool = False
    """In its steps: ancestral samplers, and those of stochastic differential equations."""
    calls_per_step: int = 1
    """Of the UNet. The last step takes one all the same."""
    zero_terminal_snr: bool = False
    """Whether it can begin at pure noise, for which some models were trained."""


SDE: Mapping[str, Any] = MappingProxyType({"algorithm_type": "sde-dpmsolver++"})

SAMPLERS: Mapping[SamplerName, Sampler] = MappingProxyType(
    {
        "PNDM": Sampler(
            "scheduling_pndm",
            "PNDMScheduler",
            "PLMS",
            BY_TIMESTEPS,
            ("PLMS", "plms", "pndm", "PNDMScheduler"),
        ),
        "KLMS": Sampler(
            "scheduling_lms_discrete",
            "LMSDiscreteScheduler",
            "LMS",
            BY_SIGMAS,
            ("LMS", "lms", "K_LMS", "k_lms", "LMSDiscreteScheduler"),
        ),
        "DDIM": Sampler(
            "scheduling_ddim",
            "DDIMScheduler",
            "DDIM",
            BY_TIMESTEPS,
            ("DDIM", "ddim", "DDIMScheduler"),
            zero_terminal_snr=True,
        ),
        "K_EULER": Sampler(
            "scheduling_euler_discrete",
            "EulerDiscreteScheduler",
            "Euler",
            ALL,
            ("Euler", "euler", "k_euler", "EulerDiscreteScheduler"),
            combined={"Euler (trailing timesteps)": "trailing"},
            zero_terminal_snr=True,
        ),
        "K_EULER_ANCESTRAL": Sampler(
            "scheduling_euler_ancestral_discrete",
            "EulerAncestralDiscreteScheduler",
            "Euler a",
            BY_TIMESTEPS,
            (
                "Euler a",
                "Euler A",
                "euler_a",
                "k_euler_a",
                "euler_ancestral",
                "k_euler_ancestral",
                "EulerAncestralDiscreteScheduler",
            ),
            adds_noise=True,
            zero_terminal_snr=True,
        ),
        "DPMSolverMultistep": Sampler(
            "scheduling_dpmsolver_multistep",
            "DPMSolverMultistepScheduler",
            "DPM++ 2M",
            ALL,
            ("DPM++ 2M", "dpmpp_2m", "K_DPMPP_2M", "k_dpmpp_2m", "DPMSolverMultistepScheduler"),
            combined={"KarrasDPM": "karras", "dpmpp_2m_karras": "karras"},
            zero_terminal_snr=True,
        ),
        "DPMSolverSinglestep": Sampler(
            "scheduling_dpmsolver_singlestep",
            "DPMSolverSinglestepScheduler",
            "DPM++ 2S a",
            ALL,
            ("DPM++ 2S", "DPMSolverSinglestepScheduler"),
        ),
        "DPMSolverMultistepSDE": Sampler(
            "scheduling_dpmsolver_multistep",
            "DPMSolverMultistepScheduler",
            "DPM++ 2M SDE",
            ALL,
            ("DPM++ 2M SDE", "dpmpp_2m_sde", "dpmpp_2m_sde_gpu", "k_dpmpp_2m_sde"),
            combined={"dpmpp_2m_sde_karras": "karras"},
            config=SDE,
            adds_noise=True,
            zero_terminal_snr=True,
        ),
        "DPMSolverMultistepSDEHeun": Sampler(
            "scheduling_dpmsolver_multistep",
            "DPMSolverMultistepScheduler",
            "DPM++ 2M SDE Heun",
            ALL,
            ("DPM++ 2M SDE Heun", "dpmpp_2m_sde_heun", "dpmpp_2m_sde_heun_gpu"),
            config={**SDE, "solver_type": "heun"},
            adds_noise=True,
            zero_terminal_snr=True,
        ),
        "DPMSolverMultistepSDE3": Sampler(
            "scheduling_dpmsolver_multistep",
            "DPMSolverMultistepScheduler",
            "DPM++ 3M SDE",
            ALL,
            ("DPM++ 3M SDE", "dpmpp_3m_sde", "dpmpp_3m_sde_gpu", "k_dpmpp_3m_sde"),
            combined={"dpmpp_3m_sde_karras": "karras"},
            config={**SDE, "solver_order": 3},
            adds_noise=True,
            zero_terminal_snr=True,
        ),
        "DPMSolverSinglestepSDE": Sampler(
            "scheduling_dpmsolver_singlestep",
            "DPMSolverSinglestepScheduler",
            "DPM++ SDE",
            ALL,
            (
                "DPM++ SDE",
                "dpmpp_sde",
                "dpmpp_sde_gpu",
                "K_DPMPP_SDE",
                "k_dpmpp_sde",
                "DPMSolverSDEScheduler",
            ),
            combined={"dpmpp_sde_karras": "karras"},
            config=SDE,
            adds_noise=True,
        ),
        "UniPC": Sampler(
            "scheduling_unipc_multistep",
            "UniPCMultistepScheduler",
            "UniPC",
            BY_SIGMAS,
            ("UniPC", "unipc", "uni_pc", "uni_pc_bh2", "UniPCMultistep", "UniPCMultistepScheduler"),
            zero_terminal_snr=True,
        ),
        "DEIS": Sampler(
            "scheduling_deis_multistep",
            "DEISMultistepScheduler",
            "DEIS",
            BY_SIGMAS,
            ("DEIS", "deis", "DEISMultistep", "DEISMultistepScheduler"),
        ),
        "K_HEUN": Sampler(
            "scheduling_heun_discrete",
            "HeunDiscreteScheduler",
            "Heun",
            ALL,
            ("Heun", "heun", "k_heun", "HeunDiscrete", "HeunDiscreteScheduler"),
            calls_per_step=2,
        ),
        "K_DPM_2": Sampler(
            "scheduling_k_dpm_2_discrete",
            "KDPM2DiscreteScheduler",
            "DPM2",
            BY_SIGMAS,
            ("DPM2", "dpm_2", "k_dpm_2", "KDPM2Discrete", "KDPM2DiscreteScheduler"),
            calls_per_step=2,
        ),
        "K_DPM_2_ANCESTRAL": Sampler(
            "scheduling_k_dpm_2_ancestral_discrete",
            "KDPM2AncestralDiscreteScheduler",
            "DPM2 a",
            BY_SIGMAS,
            (
                "DPM2 a",
                "dpm_2_ancestral",
                "k_dpm_2_a",
                "k_dpm_2_ancestral",
                "KDPM2AncestralDiscrete",
                "KDPM2AncestralDiscreteScheduler",
            ),
            adds_noise=True,
            calls_per_step=2,
        ),
        "SASolver": Sampler(
            "scheduling_sasolver",
            "SASolverScheduler",
            "SA Solver",
            BY_SIGMAS,
            ("SA Solver", "sa_solver", "SASolverScheduler"),
            adds_noise=True,
        ),
        "DDPM": Sampler(
            "scheduling_ddpm",
            "DDPMScheduler",
            "DDPM",
            BY_TIMESTEPS,
            ("DDPM", "ddpm", "DDPMScheduler"),
            adds_noise=True,
            zero_terminal_snr=True,
        ),
        "LCM": Sampler(
            "scheduling_lcm",
            "LCMScheduler",
            "LCM",
            BY_TIMESTEPS,
            ("LCM", "lcm", "LCMScheduler"),
            combined={"LCM (trailing timesteps)": "trailing"},
            adds_noise=True,
            zero_terminal_snr=True,
        ),
        "TCD": Sampler(
            "scheduling_tcd",
            "TCDScheduler",
            "TCD",
            BY_TIMESTEPS,
            ("TCD", "tcd", "TCDScheduler"),
            adds_noise=True,
            zero_terminal_snr=True,
        ),
    }
)

# Names of others for what diffusers has no class of, and what comes nearest.
NEAREST: Mapping[str, SamplerName] = MappingProxyType(
    {
        # The ancestral form, of which DPMSolverSinglestep is the one that adds no noise.
        "DPM++ 2S a": "DPMSolverSinglestep",
        "dpmpp_2s_ancestral": "DPMSolverSinglestep",
        "K_DPMPP_2S_ANCESTRAL": "DPMSolverSinglestep",
        "k_dpmpp_2s_a": "DPMSolverSinglestep",
        "DPM fast": "DPMSolverSinglestep",
        "dpm_fast": "DPMSolverSinglestep",
        "k_dpm_fast": "DPMSolverSinglestep",
        "DPM adaptive": "DPMSolverSinglestep",
        "dpm_adaptive": "DPMSolverSinglestep",
        "k_dpm_adaptive": "DPMSolverSinglestep",
        "Restart": "K_HEUN",
        "heunpp2": "K_HEUN",
        "HeunPP2": "K_HEUN",
        "euler_cfg_pp": "K_EULER",
        "euler_ancestral_cfg_pp": "K_EULER_ANCESTRAL",
        "DDIM CFG++": "DDIM",
        "dpmpp_2s_ancestral_cfg_pp": "DPMSolverSinglestep",
        "dpmpp_2m_cfg_pp": "DPMSolverMultistep",
        "ipndm": "PNDM",
        "IPNDM": "PNDM",
        "ipndm_v": "PNDM",
        "IPNDMScheduler": "PNDM",
        "res_multistep": "DPMSolverMultistep",
        "res_multistep_cfg_pp": "DPMSolverMultistep",
        "res_multistep_ancestral": "DPMSolverMultistepSDE",
        "res_multistep_ancestral_cfg_pp": "DPMSolverMultistepSDE",
        "gradient_estimation": "K_EULER",
        "gradient_estimation_cfg_pp": "K_EULER",
        "er_sde": "DPMSolverMultistepSDE3",
        "seeds_2": "DPMSolverSinglestepSDE",
        "seeds_3": "DPMSolverSinglestepSDE",
        "sa_solver_pece": "SASolver",
    }
)


def _spellings() -> Iterator[tuple[str, tuple[SamplerName, ScheduleName | None]]]:
    for name, sampler in SAMPLERS.items():
        for spelling in (name, *sampler.spellings):
            yield spelling, (name, None)
        for schedule in sampler.schedules:
            suffix = SCHEDULES[schedule].suffix
            if suffix is not None:
                yield sampler.spellings[0] + suffix, (name, schedule)
        for spelling, schedule in sampler.combined.items():
            yield spelling, (name, schedule)


SPELLINGS: Mapping[str, tuple[SamplerName, ScheduleName | None]] = MappingProxyType(
    dict(_spellings())
)
"""Every name that is taken: the sampler, and the schedule if the name gives one."""

SCHEDULE_SPELLINGS: Mapping[str, ScheduleName] = MappingProxyType(
    {
        spelling: name
        for name, schedule in SCHEDULES.items()
        for spelling in (name, *schedule.spellings)
    }
)


def why_not(name: str) -> str | None:
    """Of a sampler's name elsewhere that nothing here can do: the reason, in words."""
    bare = name
    for schedule in SCHEDULES.values():
        bare = bare.removesuffix(schedule.suffix or "")
    if bare not in NEAREST:
        return None
    return f"{bare} is not done by diffusers; the nearest is {NEAREST[bare]}"


# Of models that were trained with continuous noise levels (https://arxiv.org/abs/2206.00364). What
# is "normal" to them are sigmas of Karras et al.
EDM_SCHEDULES: tuple[ScheduleName, ...] = ("normal", "karras", "exponential")
EDM_SAMPLERS: Mapping[SamplerName, Sampler] = MappingProxyType(
    {
        "K_EULER": Sampler("scheduling_edm_euler", "EDMEulerScheduler", "Euler", EDM_SCHEDULES, ()),
        "DPMSolverMultistep": Sampler(
            "scheduling_edm_dpmsolver_multistep",
            "EDMDPMSolverMultistepScheduler",
            "DPM++ 2M",
            EDM_SCHEDULES,
            (),
        ),
    }
)


def is_edm(config: Mapping[str, Any]) -> bool:
    """
    Args:
        config: of a model's scheduler.
    """
    return str(config.get("_class_name", "")).startswith("EDM")


def default_sampler(config: Mapping[str, Any]) -> SamplerName | None:
    """That of a model which cannot be drawn with the default of a request.

    Args:
        config: of the model's scheduler.
    """
    class_name = config.get("_class_name")
    of_class = (name for name, one in EDM_SAMPLERS.items() if one.class_name == class_name)
    return next(of_class, "DPMSolverMultistep") if is_edm(config) else None
