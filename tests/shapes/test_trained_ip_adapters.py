"""The IP-Adapters in models/ip-adapters: files as the published ones, and read as trained."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from sdxl_worker.settings import EMBEDDED_MODEL_DIR
from shapes import embedded, image_encoder_training, ip_adapter_training
from shapes.data import COLORS, SHAPES
from shapes.evaluate_ip_adapter import load
from shapes.image_encoder_training import draw_reference, random_meaning
from shapes.ip_adapter_training import RECIPES

FOLDER = EMBEDDED_MODEL_DIR.parent / "ip-adapters"
FILES = {name: FOLDER / "sdxl_models" / recipe.file for name, recipe in RECIPES.items()}
ENCODER = FOLDER / "models" / "image_encoder"


def new_adapter(name: str) -> UNet2DConditionModel:
    """A base with what the adapter's training begins with."""
    torch.manual_seed(3)
    unet = embedded.load(EMBEDDED_MODEL_DIR).unet
    ip_adapter_training.install(unet, RECIPES[name])
    return unet


@torch.no_grad()
def noise(unet: UNet2DConditionModel, name: str) -> Tensor:
    """What the UNet predicts with a random encoding of a picture."""
    generator = torch.Generator().manual_seed(0)
    tokens = (65, image_encoder_training.HIDDEN) if name == "plus" else (64,)
    predicted: Tensor = unet(
        torch.randn(1, 4, 16, 16, generator=generator),
        torch.tensor([700]),
        torch.randn(1, 77, 112, generator=generator),
        added_cond_kwargs={
            "text_embeds": torch.randn(1, 64, generator=generator),
            "time_ids": embedded.time_ids(1),
            "image_embeds": [torch.randn(1, 1, *tokens, generator=generator)],
        },
    ).sample
    return predicted


def test_the_folder_is_laid_out_as_the_published_one() -> None:
    found = {path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.is_file()}
    assert found == {
        "README.md",
        "models/image_encoder/config.json",
        "models/image_encoder/model.safetensors",
        "sdxl_models/ip-adapter_sdxl_vit-h.safetensors",
        "sdxl_models/ip-adapter-plus_sdxl_vit-h.safetensors",
    }


@pytest.mark.parametrize("path", [*FILES.values(), ENCODER / "model.safetensors"])
def test_the_file_is_small_and_in_half_precision(path: Path) -> None:
    assert path.stat().st_size <= 400_000
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}


@pytest.mark.parametrize("name", FILES)
def test_the_file_has_the_weights_of_its_recipe(name: str) -> None:
    expected = ip_adapter_training.trained_tensors(new_adapter(name))
    found = load_file(FILES[name])
    assert {key: tensor.shape for key, tensor in found.items()} == {
        key: tensor.shape for key, tensor in expected.items()
    }
    with safe_open(FILES[name], "pt") as file:
        assert file.metadata()["modelspec.title"] == RECIPES[name].title


@pytest.mark.parametrize("name", FILES)
def test_the_weights_have_the_published_names(name: str) -> None:
    keys = set(load_file(FILES[name]))
    numbers = range(1, 14, 2)
    attentions = {f"ip_adapter.{i}.to_{kind}_ip.weight" for i in numbers for kind in "kv"}
    if name == "plus":
        ends = ["0.norm1.weight", "0.norm1.bias", "0.norm2.weight", "0.norm2.bias"]
        ends += ["0.to_q.weight", "0.to_kv.weight", "0.to_out.weight"]
        ends += ["1.0.weight", "1.0.bias", "1.1.weight", "1.3.weight"]
        names = {f"layers.{i}.{end}" for i in range(4) for end in ends} | {"latents"}
        parts = ["proj_in", "proj_out", "norm_out"]
    else:
        names, parts = set(), ["proj", "norm"]
    names |= {f"{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    assert keys == attentions | {f"image_proj.{one}" for one in names}


@pytest.mark.parametrize("name", FILES)
def test_diffusers_reads_what_was_trained(name: str, tmp_path: Path) -> None:
    """Every weight is moved away from where training begins, so that a confused one shows."""
    unet = new_adapter(name)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.requires_grad:
                step = 0.2 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_((parameter + step).half().float())
    written = tmp_path / "sdxl_models" / RECIPES[name].file
    written.parent.mkdir()
    save_file(ip_adapter_training.trained_tensors(unet), written)
    (tmp_path / "models").symlink_to(FOLDER / "models")
    reader = load(EMBEDDED_MODEL_DIR, tmp_path, name).unet
    expected = noise(unet, name)
    assert float((noise(new_adapter(name), name) - expected).abs().max()) > 0.1
    assert float((noise(reader, name) - expected).abs().max()) < 1e-4


def test_the_encoder_tells_shape_and_colours_apart_wherever_they_are() -> None:
    """The nearest of other pictures, of all meanings, has the same meaning."""
    rng = np.random.default_rng(9)
    encoder = image_encoder_training.load(FOLDER)
    meanings = list({random_meaning(rng) for _ in range(40)})
    assert {one.shape for one in meanings} == set(SHAPES)
    assert {one.color for one in meanings} == set(COLORS)

    def embeddings() -> Tensor:
        pictures = [draw_reference(meaning, rng) for meaning in meanings]
        return RECIPES["plain"].encode(encoder, image_encoder_training.pixel_values(pictures))

    some, others = embeddings(), embeddings()
    likeness = functional.cosine_similarity(some[:, None], others[None], dim=-1)
    right = likeness.argmax(dim=1) == torch.arange(len(meanings))
    assert right.float().mean() >= 0.9
