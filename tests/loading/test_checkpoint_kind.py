"""What a single-file checkpoint is: its kind, told from marks and metadata, and what is refused."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler
from safetensors.torch import save_file

from sdxl_worker.errors import ModelError
from sdxl_worker.loading.checkpoint_kind import PREFIXES, UNET, read_checkpoint
from sdxl_worker.loading.model_dir import find_model_dir
from sdxl_worker.settings import Settings
from tests.support import REPOSITORY

ZERO = torch.zeros(1)
CONV_IN = f"{UNET}input_blocks.0.0.weight"
# As small as a header can be that has all of a base.
WHOLE = {
    **{f"{prefix}x.weight": ZERO for prefix in PREFIXES.values()},
    CONV_IN: torch.zeros(8, 4, 3, 3),
}
UNET_ALONE = {name: tensor for name, tensor in WHOLE.items() if name.startswith(UNET)}


def written(
    folder: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> Path:
    path = folder / "x.safetensors"
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, metadata)
    return path


SCHEDULES: dict[str, tuple[dict[str, torch.Tensor], dict[str, str], dict[str, Any]]] = {
    "epsilon": (
        {},
        {},
        {"prediction_type": "epsilon", "timestep_spacing": "leading", "beta_end": 0.012},
    ),
    "v-prediction": (
        {"v_pred": torch.empty(0)},
        {},
        {"prediction_type": "v_prediction", "timestep_spacing": "leading"},
    ),
    "v-prediction, zero terminal SNR": (
        {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)},
        {},
        {
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
        },
    ),
    "v-prediction, by ModelSpec": (
        {},
        {"modelspec.prediction_type": "v"},
        {"prediction_type": "v_prediction"},
    ),
    "v-prediction, by ComfyUI's metadata": (
        {},
        {"modelspec.predict_key": "v"},
        {"prediction_type": "v_prediction"},
    ),
    "epsilon, by ModelSpec": (
        {},
        {"modelspec.prediction_type": "epsilon"},
        {"prediction_type": "epsilon"},
    ),
    "Playground 2.5": (
        {"edm_mean": torch.zeros(1, 4, 1, 1), "edm_std": torch.ones(1, 4, 1, 1)},
        {},
        {
            "_class_name": "EDMDPMSolverMultistepScheduler",
            "prediction_type": "epsilon",
            "sigma_data": 0.5,
            "sigma_min": 0.002,
            "sigma_max": 80.0,
        },
    ),
    "CosXL": (
        {"edm_vpred.sigma_max": torch.tensor(100.0), "edm_vpred.sigma_min": torch.tensor(0.25)},
        {},
        {
            "_class_name": "EDMEulerScheduler",
            "prediction_type": "v_prediction",
            "sigma_data": 1.0,
            "sigma_min": 0.25,
            "sigma_max": 100.0,
        },
    ),
    "CosXL that does not say where it ends": (
        {"edm_vpred.sigma_max": torch.tensor([120.0]).bfloat16()},
        {},
        {"sigma_min": 0.002, "sigma_max": 120.0},
    ),
}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_schedule_is_that_of_the_kind(kind: str, tmp_path: Path) -> None:
    marks, metadata, expected = SCHEDULES[kind]
    config = read_checkpoint(written(tmp_path, {**WHOLE, **marks}, metadata)).scheduler_config
    assert {name: config[name] for name in expected} == expected
    if "zero" not in kind:
        assert "rescale_betas_zero_snr" not in config


@pytest.mark.parametrize(
    ("channels", "dtype"), [(4, torch.float32), (9, torch.float16), (4, torch.bfloat16)]
)
def test_channels_and_the_scale_of_latents_are_those_of_the_file(
    channels: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    plain = read_checkpoint(written(tmp_path, {**WHOLE, CONV_IN: torch.zeros(8, channels, 3, 3)}))
    assert plain.config_changes["unet"] == {"in_channels": channels}
    assert plain.config_changes["vae"] == {
        "scaling_factor": 0.13025,
        "latents_mean": None,
        "latents_std": None,
        "force_upcast": True,
    }
    mean = torch.tensor([-1.6574, 1.886, -1.383, 2.5155], dtype=dtype).view(1, 4, 1, 1)
    std = torch.tensor([8.4927, 5.9022, 6.5498, 5.2299], dtype=dtype).view(1, 4, 1, 1)
    vae = read_checkpoint(
        written(tmp_path, {**WHOLE, "edm_mean": mean, "edm_std": std})
    ).config_changes["vae"]
    assert vae["latents_mean"] == mean.flatten().tolist()
    assert vae["latents_std"] == std.flatten().tolist()
    assert vae["scaling_factor"] == 0.5


@pytest.mark.parametrize(
    ("kind", "scheduler"),
    [("Playground 2.5", EDMDPMSolverMultistepScheduler), ("CosXL", EDMEulerScheduler)],
)
def test_diffusers_denoises_with_it_as_comfyui_does(
    kind: str, scheduler: Any, tmp_path: Path
) -> None:
    """Of ComfyUI, comfy/model_sampling.py: EDM and V_PREDICTION divide the noisy latents by
    sqrt(sigma^2 + sigma_data^2) for the UNet, whose timestep is log(sigma) / 4, and add up:
    x sigma_data^2 / (sigma^2 + sigma_data^2) +- out sigma sigma_data / sqrt(...)."""
    marks, metadata, _ = SCHEDULES[kind]
    config = read_checkpoint(written(tmp_path, {**WHOLE, **marks}, metadata)).scheduler_config
    built = scheduler.from_config(dict(config))
    built.set_timesteps(5, device="cpu")
    assert float(built.sigmas[0]) == pytest.approx(config["sigma_max"], rel=1e-5)
    assert float(built.sigmas[-2]) == pytest.approx(config["sigma_min"], rel=1e-4)
    x, out = torch.randn((2, 1, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    sigma, data = built.sigmas[1], config["sigma_data"]
    root = (sigma**2 + data**2) ** 0.5
    sign = -1 if config["prediction_type"] == "v_prediction" else 1
    expected = x * data**2 / root**2 + sign * out * sigma * data / root
    assert torch.allclose(built.precondition_outputs(x, out, sigma), expected, atol=1e-5)
    assert torch.allclose(built.precondition_inputs(x, sigma), x / root, atol=1e-6)
    assert torch.allclose(built.timesteps[1], sigma.log() / 4)


OTHERS: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "LoRA": ({"lora_unet_x.lora_down.weight": ZERO}, "is a LoRA: name it in a request's `loras`"),
    "LoRA, by diffusers": ({"unet.x.lora_A.weight": ZERO}, "is a LoRA"),
    "LoKr": ({"lycoris_x.lokr_w1": ZERO}, "is a LoRA"),
    "embedding": ({"clip_l": ZERO, "clip_g": ZERO}, "is an embedding"),
    "ControlNet": ({"control_model.x": ZERO}, "is a ControlNet"),
    "Flux": ({"model.diffusion_model.double_blocks.0.x": ZERO}, "is a Flux"),
    "Flux alone": ({"double_blocks.0.x": ZERO}, "is a Flux"),
    "SD 3": ({f"{UNET}joint_blocks.0.x": ZERO}, "is a Stable Diffusion 3"),
    "refiner": (
        {**UNET_ALONE, "first_stage_model.x": ZERO, "conditioner.embedders.0.model.x": ZERO},
        "is an SDXL refiner",
    ),
    "SD 1": ({**UNET_ALONE, "cond_stage_model.transformer.x": ZERO}, "is a Stable Diffusion 1"),
    "SD 2": ({**UNET_ALONE, "cond_stage_model.model.x": ZERO}, "is a Stable Diffusion 2"),
    "renamed": (
        {**UNET_ALONE, f"{UNET}label_emb.0.0.weight": ZERO, "cond_stage_model.model.x": ZERO},
        "has its text encoders under other names (cond_stage_model.*)",
    ),
    "VAE": ({"decoder.conv_in.weight": ZERO}, "is a VAE alone: name it in VAE_DIR"),
    "VAE, prefixed": ({"first_stage_model.decoder.conv_in.weight": ZERO}, "is a VAE alone"),
    "UNet": (UNET_ALONE, "is no SDXL checkpoint in a single file: it has no tensors conditioner"),
    "UNet and VAE": ({**UNET_ALONE, "first_stage_model.x": ZERO}, "has a UNet alone, or lacks"),
    "UNet by diffusers": ({"down_blocks.0.x": ZERO}, "has a UNet alone, or lacks"),
    "edits by an instruction": (
        {**WHOLE, CONV_IN: torch.zeros(8, 8, 3, 3)},
        "edits pictures by an instruction",
    ),
    "5 channels": ({**WHOLE, CONV_IN: torch.zeros(8, 5, 3, 3)}, "takes 5 channels"),
    "quantized": (
        {**WHOLE, f"{UNET}x.weight": torch.zeros(1, dtype=torch.uint8)},
        "is quantized in a way that cannot be read (model.diffusion_model.x.weight is U8)",
    ),
    "a mark without a number": ({**WHOLE, "edm_vpred.sigma_max": torch.empty(0)}, "no number"),
    "anything": ({"x": ZERO}, "is no SDXL checkpoint in a single file: it has no tensors"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_base_is_told_by_its_name(name: str, tmp_path: Path) -> None:
    tensors, message = OTHERS[name]
    path = written(tmp_path, tensors)
    with pytest.raises(ModelError) as caught:
        find_model_dir(Settings(model_dir=path))
    assert str(caught.value).startswith(f"MODEL_DIR: {path}")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x02}q\x00", "is a PyTorch pickle"),
        (b"<!DOCTYPE html><title>Log in</title>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (b"", "is empty"),
    ],
)
def test_what_is_no_safetensors_file_is_told(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        find_model_dir(Settings(model_dir=path))


def test_a_file_that_is_cut_off_is_told(tmp_path: Path) -> None:
    path = written(tmp_path, WHOLE)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match="is cut off"):
        find_model_dir(Settings(model_dir=path))


def test_the_kind_is_told_without_torch(tmp_path: Path) -> None:
    path = written(tmp_path, {**WHOLE, "v_pred": ZERO})
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from sdxl_worker.loading.checkpoint_kind import read_checkpoint\n"
        "config = read_checkpoint(Path(sys.argv[1])).scheduler_config\n"
        "assert config['prediction_type'] == 'v_prediction'\n"
        "assert not {'torch', 'diffusers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(path)], cwd=REPOSITORY, check=True)
