"""A single-file checkpoint as MODEL_DIR: it draws what its folders draw, in whatever numbers it is
stored, with its own VAE or that of VAE_DIR, and as its kind is drawn with in plain diffusers."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from sdxl_worker.drawing.decoding import _decoded
from sdxl_worker.drawing.encoding import latents_of
from sdxl_worker.errors import ModelError
from sdxl_worker.loading import model_dir as model_dir_module
from sdxl_worker.loading import weights as weights_module
from sdxl_worker.loading.file_hash import hash_in_background
from sdxl_worker.loading.model_dir import find_model_dir
from sdxl_worker.loading.models import Models, load_models
from sdxl_worker.request import parse_request
from sdxl_worker.settings import EMBEDDED_MODEL_DIR, Settings
from tests import inpainting_model
from tests.support import PROMPT, difference, draw, largest_difference, plain_base
from tools import original_format

BASE = EMBEDDED_MODEL_DIR / "base"
JOB = {"prompt": PROMPT, "seed": 3, "num_inference_steps": 4, "scheduler": "K_EULER"}
CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
TO_K = "model.diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_k"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return original_format.base_checkpoint(BASE)


def load(path: Path, **settings: Any) -> Models:
    chosen = Settings(model_dir=path, **settings)
    return load_models(find_model_dir(chosen), chosen.dtype)


def drawn(loaded: Models, **fields: Any) -> bytes:
    [picture] = draw(parse_request({**JOB, **fields}), loaded)
    return picture.tobytes()


def refusal(path: Path, **settings: Any) -> str:
    with pytest.raises(ModelError) as caught:
        load(path, **settings)
    return str(caught.value)


@pytest.fixture(scope="module")
def of_folders() -> Models:
    return load(BASE)


def test_it_draws_what_its_folders_draw_bit_for_bit(
    tensors: Tensors, of_folders: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_module, "PART_BYTES", 100_000)  # as a large file is read
    path = original_format.save(tensors, tmp_path / "my model.safetensors")
    loaded = load(path)
    assert drawn(loaded) == drawn(of_folders)
    assert (loaded.name, loaded.kind) == ("my model", "epsilon")
    assert loaded.revision.startswith("sha256:")
    assert loaded.refiner_unet is None
    assert loaded.vae.config.force_upcast is True


def test_only_what_the_networks_need_is_read(tensors: Tensors, tmp_path: Path) -> None:
    """EMA weights, what trainers leave behind, the VAE where VAE_DIR has another."""
    more = {
        "model_ema.diffusion_modelinput_blocks00weight": torch.zeros(3),
        "alphas_cumprod": torch.zeros(1000),
        "v_pred": torch.empty(0),
    }
    path = original_format.save({**tensors, **more}, tmp_path / "x.safetensors")
    found = find_model_dir(Settings(model_dir=path))
    read = {
        name
        for network in found.networks()
        for part in weights_module._parts(path, found.prefix(network))
        for name in part
    }
    assert read == set(tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_other_number_formats_are_rounded_once(
    dtype: torch.dtype, tensors: Tensors, tmp_path: Path
) -> None:
    """A mixed file: only the UNet is stored so."""
    stored = {
        name: tensor.to(dtype) if name.startswith("model.") else tensor
        for name, tensor in tensors.items()
    }
    loaded = load(original_format.save(stored, tmp_path / "x.safetensors"))
    assert loaded.unet.dtype == torch.float32
    expected = stored[CONV_IN].to(torch.float32)
    assert torch.equal(loaded.unet.conv_in.weight, expected)
    assert loaded.text_encoder.dtype == torch.float32


@pytest.mark.parametrize(
    "names", [("scale_weight", "scale_input"), ("weight_scale", "input_scale")]
)
def test_scaled_fp8_is_multiplied_with_its_scales(
    names: tuple[str, str], tensors: Tensors, of_folders: Models, tmp_path: Path
) -> None:
    """As ComfyUI writes it, of the older and the newer kind."""
    stored = dict(tensors)
    for name, tensor in tensors.items():
        if name.startswith("model.") and name.endswith(".weight") and tensor.ndim == 2:
            scale = tensor.float().abs().amax() / 448  # the largest number of E4M3
            stored[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            module = name.removesuffix(".weight")
            stored[f"{module}.{names[0]}"] = scale
            stored[f"{module}.{names[1]}"] = torch.tensor(0.5)
    stored["model.diffusion_model.scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    loaded = load(original_format.save(stored, tmp_path / "x.safetensors"))
    got = loaded.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_k.weight
    scale = stored[f"{TO_K}.{names[0]}"]
    assert torch.equal(got, stored[f"{TO_K}.weight"].float() * scale)
    # Three bits of mantissa: half of 1/8 at most.
    original = tensors[f"{TO_K}.weight"].float()
    assert torch.allclose(got, original, rtol=1 / 16, atol=float(scale) * 2**-9)
    [one], [other] = (draw(parse_request(JOB), models) for models in (loaded, of_folders))
    assert 0 < difference(one, other) < 10


def plain_picture(**scheduler: Any) -> Any:
    base = plain_base()
    pipeline = StableDiffusionXLPipeline(**base.components)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(base.scheduler.config, **scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt=PROMPT,
        generator=torch.Generator("cpu").manual_seed(3),
        height=128,
        width=128,
        num_inference_steps=4,
        guidance_scale=7.5,
    ).images[0]


@pytest.mark.parametrize(
    ("marks", "scheduler", "kind", "rescale"),
    [
        ({"v_pred"}, {"prediction_type": "v_prediction"}, "v-prediction", 0.0),
        (
            {"v_pred", "ztsnr"},
            {
                "prediction_type": "v_prediction",
                "rescale_betas_zero_snr": True,
                "timestep_spacing": "trailing",
            },
            "v-prediction, zero terminal SNR",
            0.7,
        ),
    ],
)
def test_its_kind_is_drawn_with_as_plain_diffusers_does(
    marks: set[str],
    scheduler: dict[str, Any],
    kind: str,
    rescale: float,
    tensors: Tensors,
    of_folders: Models,
    tmp_path: Path,
) -> None:
    """The weights are not of that kind, so there is no picture: what counts is the same."""
    marked = {**tensors, **{mark: torch.empty(0) for mark in marks}}
    loaded = load(original_format.save(marked, tmp_path / "x.safetensors"))
    assert (loaded.kind, loaded.guidance_rescale_default) == (kind, rescale)
    [got] = draw(parse_request({**JOB, "guidance_rescale": 0}), loaded)
    assert largest_difference(got, plain_picture(**scheduler)) <= 1
    assert got.tobytes() != drawn(of_folders)


def test_prediction_type_has_the_last_word(tensors: Tensors, tmp_path: Path) -> None:
    marked = {**tensors, "v_pred": torch.empty(0)}
    path = original_format.save(marked, tmp_path / "x.safetensors")
    assert load(path, prediction_type="epsilon").kind == "epsilon"
    assert load(BASE, prediction_type="v_prediction").kind == "v-prediction"
    assert load(BASE).kind == "epsilon"


def test_playgrounds_latents_are_scaled_as_comfyui_scales_them(
    tensors: Tensors, tmp_path: Path
) -> None:
    """comfy/latent_formats.py, SDXL_Playground_2_5: (latents - mean) * 0.5 / std for the UNet,
    latents * std / 0.5 + mean for the decoder."""
    mean = torch.tensor([-1.6574, 1.886, -1.383, 2.5155]).view(1, 4, 1, 1)
    std = torch.tensor([8.4927, 5.9022, 6.5498, 5.2299]).view(1, 4, 1, 1)
    marked = {**tensors, "edm_mean": mean, "edm_std": std}
    loaded = load(original_format.save(marked, tmp_path / "x.safetensors"))
    vae = loaded.vae
    assert loaded.kind == "EDM, epsilon"

    class Fixed:
        def sample(self, _: Any) -> torch.Tensor:
            return latents

    latents = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    inward = latents_of(Fixed(), [torch.Generator()], vae)
    assert torch.allclose(inward, (latents - mean) * 0.5 / std, atol=1e-6)
    with torch.no_grad():
        outward = _decoded(inward, vae)
        expected = vae.decode(inward * std / 0.5 + mean, return_dict=False)[0]
    assert torch.allclose(outward, expected, atol=1e-5)


def test_cosxl_is_told(tensors: Tensors, tmp_path: Path) -> None:
    marked = {**tensors, "edm_vpred.sigma_max": torch.tensor(120.0)}
    loaded = load(original_format.save(marked, tmp_path / "x.safetensors"))
    assert loaded.kind == "EDM, v-prediction"
    assert loaded.guidance_rescale_default == 0


def test_a_checkpoint_for_inpainting_draws_what_its_folders_draw(
    tensors: Tensors, tmp_path: Path
) -> None:
    wide = {**tensors, CONV_IN: inpainting_model.widened(tensors[CONV_IN])}
    path = original_format.save(wide, tmp_path / "x.safetensors")
    assert drawn(load(path)) == drawn(load(inpainting_model.write(tmp_path / "folders")))


# --- what a file lacks -------------------------------------------------------------------------


def configs_only(folder: Path) -> Path:
    def weights(_: str, names: list[str]) -> list[str]:
        return [name for name in names if name.endswith(".safetensors")]

    shutil.copytree(BASE, folder / "base", ignore=weights)
    return folder


@pytest.mark.parametrize("place", ["BAKED_MODEL_DIR", "CONFIGS_DIR", "PLATFORM_CACHE", "beside"])
def test_configurations_come_from_the_first_known_folder_that_fits(
    place: str, tensors: Tensors, of_folders: Models, tmp_path: Path, monkeypatch: Any
) -> None:
    path = original_format.save(tensors, tmp_path / "x.safetensors")
    monkeypatch.setattr(model_dir_module, "EMBEDDED_MODEL_DIR", Path("/nowhere"))
    assert "has networks of other shapes than SDXL's" in refusal(path)
    if place == "PLATFORM_CACHE":
        configs_only(tmp_path / "cache/models--org--x/snapshots/1")
        monkeypatch.setattr(model_dir_module, place, tmp_path / "cache")
    elif place == "beside":
        configs_only(tmp_path / "sdxl-configs")
    else:
        monkeypatch.setattr(model_dir_module, place, configs_only(tmp_path / "known"))
    assert drawn(load(path)) == drawn(of_folders)


@pytest.mark.parametrize(
    ("file", "changed"),
    [
        ("unet", {"block_out_channels": [32, 64, 80]}),
        ("unet", {"layers_per_block": 2}),
        ("unet", {"transformer_layers_per_block": [1, 1, 2]}),
        ("unet", {"transformer_layers_per_block": [[1], [1], [1, 1]]}),
        ("unet", {"cross_attention_dim": 64}),
        ("vae", {"block_out_channels": [16, 16, 32, 32]}),
        ("text_encoder", {"num_hidden_layers": 1}),
        ("text_encoder_2", {"hidden_size": 8}),
        ("tokenizer", None),
    ],
)
def test_configurations_of_other_shapes_do_not_fit(
    file: str, changed: Any, tensors: Tensors, tmp_path: Path, monkeypatch: Any
) -> None:
    path = original_format.save(tensors, tmp_path / "x.safetensors")
    folder = configs_only(tmp_path / "baked")
    monkeypatch.setattr(model_dir_module, "BAKED_MODEL_DIR", folder)
    assert find_model_dir(Settings(model_dir=path)).base == folder / "base"
    if changed is None:
        (folder / "base" / file / "merges.txt").unlink()
    else:
        inpainting_model.edit(folder / "base" / file / "config.json", **changed)
    assert find_model_dir(Settings(model_dir=path)).base == BASE


def test_what_another_model_s_folder_says_of_its_kind_does_not_matter(
    tensors: Tensors, of_folders: Models, tmp_path: Path, monkeypatch: Any
) -> None:
    folder = configs_only(tmp_path / "baked")
    inpainting_model.edit(
        folder / "base/vae/config.json",
        scaling_factor=0.5,
        latents_mean=[1.0] * 4,
        latents_std=[2.0] * 4,
    )
    inpainting_model.edit(folder / "base/unet/config.json", in_channels=9)
    scheduler = folder / "base/scheduler/scheduler_config.json"
    inpainting_model.edit(scheduler, prediction_type="v_prediction", beta_end=0.5)
    inpainting_model.edit(folder / "base/model_index.json", force_zeros_for_empty_prompt=False)
    monkeypatch.setattr(model_dir_module, "BAKED_MODEL_DIR", folder)
    loaded = load(original_format.save(tensors, tmp_path / "x.safetensors"))
    assert loaded.model_dir.base == folder / "base"
    assert drawn(loaded) == drawn(of_folders)


def of_full_size(path: Path, blocks: int) -> Path:
    """A header as that of a file with SDXL's networks, as far as its size is told by it."""
    encoder = "conditioner.embedders.0.transformer.text_model"
    shapes: dict[str, tuple[int, ...]] = {
        f"{encoder}.embeddings.token_embedding.weight": (1, 768),
        "conditioner.embedders.1.model.token_embedding.weight": (1, 1280),
        CONV_IN: (320, 4, 3, 3),
    }
    for i in range(12):
        shapes[f"{encoder}.encoder.layers.{i}.x"] = (1,)
    for i in range(32):
        shapes[f"conditioner.embedders.1.model.transformer.resblocks.{i}.x"] = (1,)
    for i in range(9):
        shapes[f"model.diffusion_model.input_blocks.{i}.x"] = (1,)
    for i in range(blocks):
        block = f"model.diffusion_model.middle_block.1.transformer_blocks.{i}"
        shapes[f"{block}.attn2.to_k.weight"] = (1, 2048)
    for i, width in enumerate((128, 256, 512, 512)):
        shapes[f"first_stage_model.encoder.down.{i}.block.0.conv1.weight"] = (width, 1)
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    return path


def test_where_no_configurations_fit_it_is_said_what_to_do(tmp_path: Path) -> None:
    whole = refusal(of_full_size(tmp_path / "x.safetensors", 70))
    assert "has weights alone, and none of /nowhere, " in whole
    assert f"builder.download_weights --configs --to {tmp_path}/sdxl-configs" in whole
    fewer = refusal(of_full_size(tmp_path / "x.safetensors", 30))
    assert "an SDXL with fewer blocks (30 transformer blocks, not 70), as SSD-1B" in fewer


@pytest.mark.parametrize("name", ["conditioner.embedders.1.model.ln_final.bias", f"{TO_K}.weight"])
def test_a_file_that_lacks_a_tensor_is_named(name: str, tensors: Tensors, tmp_path: Path) -> None:
    fewer = {key: tensor for key, tensor in tensors.items() if key != name}
    path = original_format.save(fewer, tmp_path / "x.safetensors")
    assert refusal(path).startswith(f"MODEL_DIR: {path} cannot be loaded: ")


# --- VAE_DIR -----------------------------------------------------------------------------------


@pytest.fixture
def other_vae(tmp_path: Path) -> Path:
    """A folder with another VAE than the embedded one."""
    folder = Path(shutil.copytree(BASE / "vae", tmp_path / "other vae"))
    [path] = folder.glob("*.safetensors")
    vae = load_file(path)
    vae["decoder.conv_out.bias"] += 0.5
    save_file(vae, path, {"format": "pt"})
    return folder


@pytest.mark.parametrize("layout", ["folder", "diffusers", "original", "prefixed"])
@pytest.mark.parametrize("model", ["folder", "file"])
def test_vae_dir_takes_the_place_of_the_model_s_own(
    layout: str, model: str, other_vae: Path, tensors: Tensors, of_folders: Models, tmp_path: Path
) -> None:
    expected_dir = Path(shutil.copytree(BASE, tmp_path / "expected"))
    shutil.rmtree(expected_dir / "vae")
    shutil.copytree(other_vae, expected_dir / "vae")
    expected = drawn(load(expected_dir))
    assert expected != drawn(of_folders)

    path = BASE
    if model == "file":
        path = original_format.save(tensors, tmp_path / "x.safetensors")
    vae = other_vae
    [weights] = other_vae.glob("*.safetensors")
    if layout == "diffusers":
        vae = weights
    elif layout != "folder":
        original = original_format._vae(load_file(weights))
        prefix = "first_stage_model." if layout == "prefixed" else ""
        vae = original_format.save(
            {prefix + name: tensor for name, tensor in original.items()},
            tmp_path / "vae.safetensors",
        )
    loaded = load(path, vae_dir=vae)
    assert drawn(loaded) == expected
    own = load(path)
    assert loaded.revision.startswith(f"{own.revision}, vae sha256:")


def test_a_single_vae_that_may_overflow_is_decoded_in_float32(other_vae: Path) -> None:
    inpainting_model.edit(other_vae / "config.json", force_upcast=False)
    [weights] = other_vae.glob("*.safetensors")
    assert load(BASE, vae_dir=other_vae).vae.config.force_upcast is False
    assert load(BASE, vae_dir=weights).vae.config.force_upcast is True


def test_what_is_no_vae_is_told(other_vae: Path, tmp_path: Path) -> None:
    assert "must be a folder in diffusers layout" in refusal(BASE, vae_dir=tmp_path)
    assert "must be a folder in diffusers layout" in refusal(BASE, vae_dir=tmp_path / "none")
    (tmp_path / "vae.pt").write_bytes(b"\x80\x02}q\x00")
    assert "is a PyTorch pickle" in refusal(BASE, vae_dir=tmp_path / "vae.pt")
    path = tmp_path / "vae.safetensors"
    save_file({"x": torch.zeros(1)}, path)
    assert "it is no VAE" in refusal(BASE, vae_dir=path)
    conv = {f"{part}.conv_in.weight": torch.zeros(8, 16, 3, 3) for part in ("encoder", "decoder")}
    save_file(conv, path)
    assert "latents have 16 channels, and SDXL's have 4" in refusal(BASE, vae_dir=path)
    [weights] = other_vae.glob("*.safetensors")
    vae = load_file(weights)
    del vae["decoder.conv_out.bias"]
    save_file(vae, path)
    message = refusal(BASE, vae_dir=path)
    assert message.startswith(f"VAE_DIR: {path} cannot be loaded: ")


# --- its hash ----------------------------------------------------------------------------------


def test_the_model_hash_is_computed_where_nobody_waits_for_it(
    tensors: Tensors, tmp_path: Path
) -> None:
    path = original_format.save(tensors, tmp_path / "x.safetensors")
    loaded = load(path)
    assert loaded.hash is None
    hash_in_background(path).join()
    assert loaded.hash == hashlib.sha256(path.read_bytes()).hexdigest()[:10]
    path.write_bytes(b"")  # another file by now
    assert loaded.hash is None
    hash_in_background(tmp_path / "missing").join()
