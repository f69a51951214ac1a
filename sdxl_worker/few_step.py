"""Models and LoRAs that draw in a few steps, and the settings that their authors publish.

Drawn with other settings they give mush, so the authors' are the defaults where a request does not
name its own.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, cast

from sdxl_worker.request import Request
from sdxl_worker.samplers import (
    SAMPLERS,
    SCHEDULES,
    SamplerName,
    ScheduleName,
    default_sampler,
)
from sdxl_worker.wording import printable

# Of `guidance_scale`. The authors write 0; to other programs that would mean the negative prompt
# alone, 1 means none to all.
OFF = 1.0


@dataclass(frozen=True)
class FewStep:
    """One published file, or several with the same settings."""

    family: str
    scheduler: SamplerName
    schedule: ScheduleName
    steps: int
    takes_steps: tuple[int, int]
    """The least and the most that it was made for."""
    guidance_scale: float = OFF
    eta: float | None = None
    """Of TCD: how much of the noise is drawn anew in each step, from 0 to 1."""
    timesteps: tuple[int, ...] | None = None
    """Where it is drawn in as many steps, they are these."""
    native_size_px: int | None = None
    """Where it is not that of SDXL."""
    config: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """What replaces values of the model's scheduler configuration."""

    def __str__(self) -> str:
        return self.family


LIGHTNING = FewStep("SDXL-Lightning", "K_EULER", "trailing", 4, (4, 4))
HYPER = FewStep("Hyper-SD", "DDIM", "trailing", 4, (4, 4))
# Drawn in one step, it is to begin at timestep 800.
HYPER_UNET = FewStep("Hyper-SD", "LCM", "normal", 1, (1, 1), timesteps=(800,))
HYPER_UNIFIED = FewStep("Hyper-SD", "TCD", "normal", 1, (1, 8), eta=1.0)
LCM_LORA = FewStep("LCM", "LCM", "normal", 4, (2, 8))
TCD_LORA = FewStep("TCD", "TCD", "normal", 4, (4, 50), eta=0.3)
# Its schedule is 999, 749, 499, 249, which LCM's own is not.
DMD2 = FewStep("DMD2", "LCM", "trailing", 4, (4, 4))
DMD2_ONE_STEP = FewStep("DMD2", "LCM", "normal", 1, (1, 1), timesteps=(399,))
TURBO = FewStep("SDXL Turbo", "K_EULER_ANCESTRAL", "trailing", 1, (1, 4), native_size_px=512)
PCM = FewStep(
    "PCM",
    "DDIM",
    "trailing",
    4,
    (4, 4),
    config=MappingProxyType({"clip_sample": False, "set_alpha_to_one": False}),
)
PCM_LIKE_LCM = FewStep("PCM", "LCM", "normal", 4, (2, 8))
FLASH = FewStep("SDXL Flash", "DPMSolverSinglestep", "trailing", 7, (6, 9), guidance_scale=3.0)
GUIDED = MappingProxyType({"guidance_scale": 5.0})
# 1 step of Lightning predicts the picture, not the noise.
PREDICTS_PICTURE = MappingProxyType({"config": MappingProxyType({"prediction_type": "sample"})})

# What the authors call their files and repositories, in lower case, with "_" for what separates.
# The whole name has to be one: a LoRA of lightning in a storm is none of these. A number in it is
# the number of steps.
NAMES: tuple[tuple[str, FewStep, Mapping[str, Any]], ...] = (
    (r"sdxl_lightning_(2|4|8)step(?:_lora|_unet)?", LIGHTNING, {}),
    (r"sdxl_lightning_(1)step(?:_unet)?_x0", LIGHTNING, PREDICTS_PICTURE),
    (r"hyper_sdxl_1step_lora", HYPER_UNIFIED, {}),
    (r"hyper_sdxl_1step_unet(?:_comfyui)?", HYPER_UNET, {}),
    (r"hyper_sdxl_(2|4|8)steps_lora", HYPER, {}),
    (r"hyper_sdxl_(8|12)steps_cfg_lora", HYPER, GUIDED),
    (r"lcm_lora_sdxl|lcm_sdxl_lora|sdxl_lcm_lora", LCM_LORA, {}),
    # This one is guided by an embedding of the scale, without a second pass.
    (r"lcm_sdxl", LCM_LORA, {"guidance_scale": 8.0}),
    (r"tcd_sdxl_lora|tcd_sdxl|sdxl_tcd_lora", TCD_LORA, {}),
    (r"dmd2_sdxl_4step(?:_lora|_unet)?", DMD2, {}),
    (r"dmd2_sdxl_1step(?:_unet)?", DMD2_ONE_STEP, {}),
    (r"sdxl_turbo|sd_xl_turbo_1_0", TURBO, {}),
    (r"pcm_sdxl_smallcfg_(2|4|8|16)step(?:_converted)?", PCM, {}),
    (r"pcm_sdxl_normalcfg_(4|8|16)step(?:_converted)?", PCM, {"guidance_scale": 7.5}),
    (r"pcm_sdxl_lcmlike_lora(?:_converted)?", PCM_LIKE_LCM, {}),
    (r"sdxl_flash(?:_mini)?(?:_lora)?", FLASH, {}),
)
PRECISION = r"(?:_(?:fp16|fp32|bf16))?"

# SHA-256 of files that also go by names that tell nothing, such as "pytorch_lora_weights": each as
# at least two independent projects publish it. What they are is told by the name.
HASHES: Mapping[str, str] = MappingProxyType(
    {
        "bf56cf2657efb15e465d81402ed481d1e11c4677e4bcce1bc11fe71ad8506b79": (
            "sdxl_lightning_4step_lora"
        ),
        "c912df184c5116792d2c604d26c6bc2aa916685f4a793755255cda1c43a3c78a": "hyper_sdxl_1step_lora",
        "12f81a27d00a751a40d68fd15597091896c5a90f3bd632fb6c475607cbdad76e": (
            "hyper_sdxl_4steps_lora"
        ),
        "ca689190e8c46038550384b5675488526cfe5a40d35f82b27acb75c100f417c1": (
            "hyper_sdxl_8steps_lora"
        ),
        "55b51334c85061afff5eff7c550b61963c8b8607a5868bbe4f26db49374719b1": (
            "hyper_sdxl_8steps_cfg_lora"
        ),
        "0b97f447b5878323a28fbe7c51ba7acebd21f4d77552ba77b04b11c8911825b6": (
            "hyper_sdxl_12steps_cfg_lora"
        ),
        "a764e6859b6e04047cd761c08ff0cee96413a8e004c9f07707530cd776b19141": "lcm_lora_sdxl",
        "a374289e9446d7f14d2037c4b3770756b7b52c292142a691377c3c755010a1bb": "dmd2_sdxl_4step_lora",
        "b3d9173815a4b595991c3a7a0e0e63ad821080f314a0b2a3cc31ecd7fcf2cbb8": "dmd2_sdxl_4step_lora",
        "e869ac7d6942cb327d68d5ed83a40447aadf20e0c3358d98b2cc9e270db0da26": "sd_xl_turbo_1_0",
    }
)

# Of those of them that are checkpoints. A worker that starts with a file of such a size waits for
# its hash; for that of any other, which takes seconds, it need not.
CHECKPOINT_BYTES = frozenset({6_938_081_905})

# Of a file's metadata: what a name there is called, by the trainers and by the Stability AI Model
# Metadata Standard (modelspec).
TITLES = ("modelspec.title", "ss_output_name")
# A caller's file must not bring as many as `MAX_STEPS` is set against, which holds for requests.
MAX_TOLD_STEPS = 50


def recognise(name: str, sha256: str | None, metadata: Mapping[str, str]) -> FewStep | None:
    """The settings of a checkpoint or a LoRA, if it is such a one.

    Args:
        name: of the file, of the repository, or both as a path.
        sha256: of the whole file, in hex.
        metadata: of its safetensors header. `few_step.family`, `.steps`, `.guidance_scale`,
            `.scheduler` and `.schedule` tell it outright.
    """
    told = _from_metadata(metadata)
    if told is not None:
        return told
    if sha256 is not None and sha256.lower() in HASHES:
        return _by_name(HASHES[sha256.lower()])
    titles = [metadata[title] for title in TITLES if title in metadata]
    for one in [*reversed(re.split(r"[/\\]", name)), *titles]:
        found = _by_name(one)
        if found is not None:
            return found
    return None


def _by_name(name: str) -> FewStep | None:
    stem = re.sub(r"\.(safetensors|bin|ckpt)$", "", name.lower())
    stem = re.sub(r"[-_. ]+", "_", stem)
    for pattern, few_step, changes in NAMES:
        found = re.fullmatch(f"(?:{pattern}){PRECISION}", stem)
        if found:
            steps = next((int(one) for one in found.groups() if one), None)
            if steps is not None:
                changes = {"steps": steps, "takes_steps": (steps, steps), **changes}
            return replace(few_step, **changes)
    return None


def _from_metadata(metadata: Mapping[str, str]) -> FewStep | None:
    """None as well where what is told cannot be."""
    prefix = "few_step."
    told = {
        key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)
    }
    scheduler, schedule = told.get("scheduler"), told.get("schedule", "normal")
    if "family" not in told or scheduler not in SAMPLERS or schedule not in SCHEDULES:
        return None
    try:
        steps, guidance_scale = int(told["steps"]), float(told.get("guidance_scale", OFF))
    except (KeyError, ValueError):
        return None
    if not (1 <= steps <= MAX_TOLD_STEPS and 0 <= guidance_scale <= 100):
        return None
    return FewStep(
        printable(told["family"][:100]),
        cast(SamplerName, scheduler),
        cast(ScheduleName, schedule),
        steps,
        (steps, steps),
        guidance_scale,
    )


REFINER_FIELDS = frozenset({"refiner_inference_steps", "refiner_strength", "high_noise_frac"})


def with_settings_of(
    request: Request, few_step: FewStep | None, scheduler_config: Mapping[str, Any] | None = None
) -> Request:
    """The request with the settings that its models need, where it does not name its own.

    The refiner, which was trained to go on with pictures of another model, is off beside a few-step
    model and beside LoRAs, whose effect it would paint over, unless the request names something of
    it.

    Args:
        few_step: None: the models are no such ones.
        scheduler_config: of the model.
    """
    # From now on, the sampler is one that the request names.
    settings: dict[str, Any] = {"scheduler": request.scheduler}
    named = request.model_fields_set
    of_model = default_sampler(scheduler_config or {})
    if of_model is not None:
        settings["scheduler"] = of_model
    if few_step is not None:
        settings["scheduler"] = few_step.scheduler
        settings["num_inference_steps"] = few_step.steps
        settings["guidance_scale"] = few_step.guidance_scale
        if "scheduler" not in named:  # the spacing belongs to the sampler
            settings["schedule"] = few_step.schedule
        if few_step.native_size_px is not None and request.image_url is None:
            settings["width"] = settings["height"] = few_step.native_size_px
    is_another_model = few_step is not None or any(lora.scale for lora in request.loras or ())
    refiner_alone = request.image_url is not None and request.mode != "img2img"
    if is_another_model and named.isdisjoint(REFINER_FIELDS) and not refiner_alone:
        settings["refiner_inference_steps"] = 0
    return request.model_copy(
        update={name: value for name, value in settings.items() if name not in named}
    )


def warnings_of_settings(request: Request, few_step: FewStep | None) -> list[str]:
    """What the caller may not expect of a request, with the settings that it ended up with."""
    told = []
    if few_step is not None:
        least, most = few_step.takes_steps
        if not least <= request.num_inference_steps <= most:
            made_for = f"{least}" if least == most else f"{least} to {most}"
            told.append(
                f"num_inference_steps: a model or LoRA of few steps ({few_step.family}) was made "
                f"for {made_for} steps; got {request.num_inference_steps}"
            )
    if request.guidance_scale <= 1:
        told += [
            f"{name}: has no effect with a guidance_scale of 1 or below; got "
            f"{request.guidance_scale:g}"
            for name in ("negative_prompt", "negative_prompt_2")
            if getattr(request, name)
        ]
    return told
