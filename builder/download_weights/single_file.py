"""A single-file checkpoint becomes folders in diffusers layout, by way of diffusers."""

import json
import os
from pathlib import Path
from typing import Any

from builder.download_weights import DownloadError
from builder.download_weights.half_precision import read_header

UNET, VAE = "model.diffusion_model.", "first_stage_model."
ENCODER, ENCODER_2 = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
REFINER_ENCODER = "conditioner.embedders.0.model."
PARTS = {"base": (UNET, VAE, ENCODER, ENCODER_2), "refiner": (UNET, REFINER_ENCODER)}
# Tensors that mark checkpoints trained in EDM's formulation, which need other configurations.
OF_EDM = ("edm_mean", "edm_vpred.sigma_max")
# What other marks change in the scheduler's configuration; the worker reads them likewise.
MARKS: dict[str, dict[str, Any]] = {
    "v_pred": {"prediction_type": "v_prediction"},
    "ztsnr": {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
}


def check_checkpoint(path: Path, role: str, what: str) -> None:
    """Refuse what is not SDXL, before torch and diffusers have to be imported.

    Raises:
        DownloadError: the message says what is wrong with it.
    """
    tensors, data_start = read_header(path)
    end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    if path.stat().st_size != data_start + end:
        raise DownloadError(f"{what}: is cut off or damaged: its size is not what its header says")
    missing = [part for part in PARTS[role] if not any(name.startswith(part) for name in tensors)]
    if missing:
        raise DownloadError(
            f"{what}: is no single-file SDXL {role}: it has no tensors {', '.join(missing)}*"
        )
    check_channels(_channels(tensors), role, what)
    if any(mark in tensors for mark in OF_EDM):
        raise DownloadError(
            f"{what}: is trained for EDM sampling, and cannot be converted: let MODEL_DIR name the "
            "file itself"
        )


def check_channels(channels: int | None, role: str, what: str) -> None:
    """
    Args:
        channels: that the UNet takes: latents, and of a model for inpainting also the mask and
            the latents of what surrounds it.

    Raises:
        DownloadError: the worker cannot serve it.
    """
    if channels == 4 or (channels == 9 and role == "base"):
        return
    served = "4, or 9 if it is for inpainting" if role == "base" else "4"
    raise DownloadError(
        f"{what}: its UNet takes {channels} channels; a {role} that can be served takes {served}: "
        "models that edit by an instruction, for example, cannot be"
    )


def _channels(tensors: dict[str, Any]) -> int:
    conv_in = tensors.get(f"{UNET}input_blocks.0.0.weight", {"shape": [0, 0]})
    return int(conv_in["shape"][1])


def convert(checkpoint: Path, role: str, folder: Path, what: str) -> None:
    """Write the networks' weights, in fp16, into `folder`, which holds their configurations.

    Raises:
        DownloadError: it cannot be converted.
    """
    check_checkpoint(checkpoint, role, what)
    # transformers warns at import that torchvision is missing, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        import torch
        from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
        from diffusers.utils import logging
        from transformers.utils import logging as transformers_logging
    except ImportError as error:
        raise DownloadError(
            f"{what}: converting a single file needs torch and diffusers ({error}): "
            "pip install --requirement requirements.txt"
        ) from error

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    options: dict[str, Any] = {
        "config": str(folder),
        "torch_dtype": torch.float16,
        "local_files_only": True,
    }
    try:
        if role == "base":
            # The checkpoint's own VAE may be the original one, which overflows in fp16.
            _edit(folder / "vae" / "config.json", force_upcast=True)
            tensors = read_header(checkpoint)[0]
            _edit(folder / "unet" / "config.json", in_channels=_channels(tensors))
            for mark, changed in MARKS.items():
                if mark in tensors:
                    _edit(folder / "scheduler" / "scheduler_config.json", **changed)
            pipeline = StableDiffusionXLPipeline.from_single_file(str(checkpoint), **options)
            networks = {
                name: network
                for name, network in pipeline.components.items()
                if isinstance(network, torch.nn.Module)
            }
        else:
            networks = {
                "unet": UNet2DConditionModel.from_single_file(
                    str(checkpoint), subfolder="unet", **options
                )
            }
        for name, network in networks.items():
            # In one file, as the published fp16 variants are.
            network.save_pretrained(  # type: ignore[operator]
                folder / name, variant="fp16", max_shard_size="100GB"
            )
    except NotImplementedError as error:
        # This is no open end of ours. Tensors that the file does not have stay on the meta device,
        # without memory, and torch raises this where one of them is cast to fp16.
        raise DownloadError(f"{what}: lacks tensors that an SDXL {role} has") from error
    except (ValueError, RuntimeError, KeyError, OSError) as error:
        # Whatever the library raises for tensors of another shape.
        raise DownloadError(f"{what}: cannot be converted: {error}") from error


def _edit(config: Path, **changed: Any) -> None:
    values = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**values, **changed}, indent=2) + "\n", "utf-8")
