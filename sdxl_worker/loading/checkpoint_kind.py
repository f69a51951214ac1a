"""What a single-file checkpoint is, told from its header before torch is imported.

Such a file has weights alone. How its model was trained to be sampled is told by tensors that mark
it (https://github.com/comfyanonymous/ComfyUI, comfy/supported_models.py) or by its metadata
(https://github.com/Stability-AI/ModelSpec); what has neither is taken for what SDXL 1.0 is.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl_worker.errors import ModelError
from sdxl_worker.safetensors_header import NotSafetensorsError, SafetensorsHeader, read_header

UNET, VAE = "model.diffusion_model.", "first_stage_model."
ENCODER, ENCODER_2 = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
# By the networks' names in `NETWORKS`.
PREFIXES = {"text_encoder": ENCODER, "text_encoder_2": ENCODER_2, "unet": UNET, "vae": VAE}
REFINER_ENCODER = "conditioner.embedders.0.model."

# Of https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0.
SCHEDULER_CONFIG: Mapping[str, Any] = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}
# Without noise that is all there is, the first step must be the last timestep:
# https://arxiv.org/abs/2305.08891.
ZERO_SNR: Mapping[str, Any] = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
# Of https://huggingface.co/playgroundai/playground-v2.5-1024px-aesthetic.
PLAYGROUND: Mapping[str, Any] = {
    "_class_name": "EDMDPMSolverMultistepScheduler",
    "prediction_type": "epsilon",
    "sigma_data": 0.5,
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "sigma_schedule": "karras",
}
PLAYGROUND_SCALING_FACTOR = 0.5
# Of https://huggingface.co/stabilityai/cosxl, where the file does not say.
COSXL: Mapping[str, Any] = {
    "_class_name": "EDMEulerScheduler",
    "prediction_type": "v_prediction",
    "sigma_data": 1.0,
    "sigma_min": 0.002,
    "sigma_max": 120.0,
    "sigma_schedule": "exponential",
}

NUMBER_FORMATS = {"F64": "d", "F32": "f", "F16": "e"}


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A single file with the networks of a base."""

    path: Path
    header: SafetensorsHeader
    scheduler_config: Mapping[str, Any]
    config_changes: Mapping[str, Mapping[str, Any]]
    """By network: what is otherwise than in the configuration of SDXL 1.0."""


def read_checkpoint(path: Path) -> Checkpoint:
    """
    Raises:
        ModelError: it is no SDXL base in a single file; the message says what it is.
    """
    header = _header(path, "MODEL_DIR")
    if other := _what_else(header):
        raise ModelError(f"MODEL_DIR: {path} {other}")
    vae: dict[str, Any] = {
        "scaling_factor": 0.13025,
        "latents_mean": None,
        "latents_std": None,
        # It may be the original VAE of SDXL, which overflows in fp16.
        "force_upcast": True,
    }
    if "edm_mean" in header.shapes and "edm_std" in header.shapes:
        scheduler_config = PLAYGROUND
        vae |= {
            "scaling_factor": PLAYGROUND_SCALING_FACTOR,
            "latents_mean": _numbers(path, header, "edm_mean"),
            "latents_std": _numbers(path, header, "edm_std"),
        }
    elif "edm_vpred.sigma_max" in header.shapes:
        limits = {
            name: _numbers(path, header, f"edm_vpred.{name}")[0]
            for name in ("sigma_min", "sigma_max")
            if f"edm_vpred.{name}" in header.shapes
        }
        scheduler_config = {**COSXL, **limits}
    else:
        scheduler_config = {
            **SCHEDULER_CONFIG,
            **({"prediction_type": "v_prediction"} if _predicts_v(header) else {}),
            **(ZERO_SNR if "ztsnr" in header.shapes else {}),
        }
    return Checkpoint(
        path, header, scheduler_config, {"unet": {"in_channels": _channels(header)}, "vae": vae}
    )


def check_vae_file(path: Path) -> None:
    """
    Raises:
        ModelError: it is no VAE that has SDXL's four channels of latents.
    """
    header = _header(path, "VAE_DIR")
    shapes = {name.removeprefix(VAE): shape for name, shape in header.shapes.items()}
    conv_in = shapes.get("decoder.conv_in.weight")
    if conv_in is None or "encoder.conv_in.weight" not in shapes:
        raise ModelError(f"VAE_DIR: {path} has no encoder and decoder: it is no VAE")
    if conv_in[1:2] != (4,):
        raise ModelError(
            f"VAE_DIR: {path} is a VAE of another model: its latents have {conv_in[1]} channels, "
            "and SDXL's have 4"
        )


def _header(path: Path, variable: str) -> SafetensorsHeader:
    try:
        return read_header(path)
    except NotSafetensorsError as error:
        raise ModelError(f"{variable}: {path} is {error}") from None
    except OSError as error:
        raise ModelError(f"{variable}: {path} cannot be read: {error}") from error


def _predicts_v(header: SafetensorsHeader) -> bool:
    """ModelSpec's name for it is "v"; ComfyUI writes the same under another key."""
    names = ("modelspec.prediction_type", "modelspec.predict_key")
    told = {header.metadata.get(name, "").lower() for name in names}
    return "v_pred" in header.shapes or not told.isdisjoint({"v", "v_prediction", "v-prediction"})


def _channels(header: SafetensorsHeader) -> int:
    """That the UNet takes."""
    return [*header.shapes.get(f"{UNET}input_blocks.0.0.weight", ()), 0, 0][1]


def _numbers(path: Path, header: SafetensorsHeader, name: str) -> list[float]:
    begin, end = header.offsets[name]
    with path.open("rb") as file:
        file.seek(begin)
        data = file.read(end - begin)
    dtype = header.dtypes[name]
    if dtype == "BF16":  # the upper half of a float32
        pairs = struct.iter_unpack("2s", data)
        data, dtype = b"".join(b"\0\0" + pair for (pair,) in pairs), "F32"
    if dtype not in NUMBER_FORMATS or not data:
        raise ModelError(f"MODEL_DIR: {path}: its tensor {name} holds no number")
    return [number for (number,) in struct.iter_unpack(f"<{NUMBER_FORMATS[dtype]}", data)]


# What some tensor's name begins with or, after "*", contains; the first that is found counts.
OTHER_FILES = (
    (
        ("lora_unet_", "lora_te", "*.lora_", "*.lora.", "*hada_w", "*lokr_w"),
        "is a LoRA: name it in a request's `loras`",
    ),
    (
        ("clip_l", "clip_g", "emb_params", "string_to_param"),
        "is an embedding (textual inversion): name it in a request's `embeddings`",
    ),
    (("control_model.", "controlnet_"), "is a ControlNet, which is not served"),
    (("*double_blocks.", "*double_stream"), "is a Flux, not an SDXL"),
    (("*joint_blocks.", "*joint_transformer_blocks."), "is a Stable Diffusion 3, not an SDXL"),
    (
        (REFINER_ENCODER,),
        "is an SDXL refiner, which goes on with what a base has drawn: name the base, and convert "
        "both with builder.download_weights to have them together",
    ),
    (("cond_stage_model.model.",), "is a Stable Diffusion 2, not an SDXL"),
    (("cond_stage_model.",), "is a Stable Diffusion 1, not an SDXL"),
)
NEEDS_A_WHOLE_CHECKPOINT = "take the whole checkpoint, with text encoders and VAE in it"


def _what_else(header: SafetensorsHeader) -> str | None:
    """What a file is that is no SDXL base which can be served."""
    names = header.shapes.keys()

    def has(mark: str) -> bool:
        if mark.startswith("*"):
            return any(mark[1:] in name for name in names)
        return any(name.startswith(mark) for name in names)

    missing = [prefix for prefix in PREFIXES.values() if not has(prefix)]
    if missing:
        if has("cond_stage_model.") and has(f"{UNET}label_emb."):
            return (
                "has its text encoders under other names (cond_stage_model.*) than SDXL's files: "
                "take the file as its author published it"
            )
        for marks, what in OTHER_FILES:
            if any(has(mark) for mark in marks):
                return what
        if not has(UNET) and (has("decoder.conv_in.") or has(f"{VAE}decoder.conv_in.")):
            return "is a VAE alone: name it in VAE_DIR"
        if has("input_blocks.") or has("down_blocks.") or missing == [*PREFIXES.values()][:2]:
            return f"has a UNet alone, or lacks the text encoders: {NEEDS_A_WHOLE_CHECKPOINT}"
        return (
            "is no SDXL checkpoint in a single file: it has no tensors "
            f"{', '.join(f'{prefix}*' for prefix in missing)}"
        )
    channels = _channels(header)
    if channels == 8:
        return (
            "edits pictures by an instruction (its UNet takes 8 channels), which is not served; "
            "models of 4 channels are, and those of 9, for inpainting"
        )
    if channels not in (4, 9):
        return (
            f"has a UNet that takes {channels} channels; those that can be served take 4, or 9 if "
            "they are for inpainting"
        )
    odd = next((name for name in names if _is_odd_weight(name, header)), None)
    if odd is not None:
        return (
            f"is quantized in a way that cannot be read ({odd} is {header.dtypes[odd]}): take the "
            "file in fp16 or fp8"
        )
    return None


def _is_odd_weight(name: str, header: SafetensorsHeader) -> bool:
    is_weight = name.endswith(".weight") and name.startswith(tuple(PREFIXES.values()))
    return is_weight and not header.dtypes[name].startswith(("F64", "F32", "F16", "BF16", "F8_E"))
