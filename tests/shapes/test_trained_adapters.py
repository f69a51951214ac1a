"""The adapters in models/adapters: files as their training says, and pictures that show them."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image, PngImagePlugin
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdxl_worker.adapters.lora import read_lora
from sdxl_worker.adapters.patching import patches_of
from sdxl_worker.inputs.checked_file import AdapterFile
from sdxl_worker.loading.models import Models
from sdxl_worker.safetensors_header import read_header
from sdxl_worker.settings import EMBEDDED_MODEL_DIR
from shapes import effect_training, effects, embedded, few_step_training, kohya_writer, merging
from shapes.captions import full_prompts
from shapes.data import SHAPES, Scene
from shapes.effect_training import DOT, FRAME, Rule
from shapes.evaluate_adapters import BASE, judge_effects, loras, share_right, strengths
from shapes.judge import judge
from shapes.text_training import TextModels
from tests.support import fresh_models, picture

FOLDER = EMBEDDED_MODEL_DIR.parent / "adapters"
FILES = {name: FOLDER / f"{name}.safetensors" for name in ("dot", "frame", "few-step")}
RULES: dict[str, tuple[tuple[Rule, ...], ...]] = {
    "dot": (DOT.unet, DOT.text_encoder, DOT.text_encoder_2),
    "frame": (FRAME.unet, FRAME.text_encoder, FRAME.text_encoder_2),
    "few-step": (few_step_training.RULES, (), ()),
}


@functools.cache
def own_models() -> Models:
    return fresh_models()


def put_on(*names: str) -> None:
    """On the worker's own models, by the worker; none: off."""
    own = own_models()
    # A file is told from another one by its SHA-256, in whose place the name does here.
    files = [AdapterFile(FILES[name], name, name, read_header(FILES[name])) for name in names]
    patches_of(own).apply([read_lora(file, 1.0, f"loras.{file.name}", own) for file in files])


def wrapped_by_peft(name: str) -> StableDiffusionXLPipeline:
    """A base of its own, in which peft has put what the adapter's training begins with."""
    pipeline = embedded.load(EMBEDDED_MODEL_DIR)
    parts = (pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2)
    for part, rules in zip(parts, RULES[name], strict=True):
        effect_training.inject(part, rules, dora=name == "frame")
    return pipeline


def metadata(name: str) -> dict[str, str]:
    with safe_open(FILES[name], "pt") as file:
        return dict(file.metadata())


def conditioned(unet: nn.Module, texts: TextModels) -> list[Tensor]:
    """Both encoders' states, the pooled state and the predicted noise, of two prompts."""
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        prompts = ["a red circle on a blue background", "a star"]
        states, pooled = embedded.conditioning(texts, prompts)
        conditions = {"text_embeds": pooled, "time_ids": embedded.time_ids(2)}
        timesteps = torch.tensor([900, 100])
        noise = unet(latents, timesteps, states, added_cond_kwargs=conditions).sample
    return [states, pooled, noise]


def of_pipeline(pipeline: StableDiffusionXLPipeline) -> list[Tensor]:
    return conditioned(pipeline.unet, embedded.text_models(pipeline))


def of_worker(*names: str) -> list[Tensor]:
    own = own_models()
    put_on(*names)
    texts = TextModels(own.tokenizer, own.tokenizer_2, own.text_encoder, own.text_encoder_2)
    return conditioned(own.unet, texts)


def farthest(some: list[Tensor], others: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("name", FILES)
def test_the_file_is_small_and_in_half_precision(name: str) -> None:
    assert FILES[name].stat().st_size <= 700_000
    assert {tensor.dtype for tensor in load_file(FILES[name]).values()} == {torch.float16}


@pytest.mark.parametrize("name", FILES)
def test_the_file_has_the_modules_ranks_and_alphas_of_its_recipe(name: str) -> None:
    expected = kohya_writer.trained_tensors(wrapped_by_peft(name))
    found = load_file(FILES[name])
    assert {key: tensor.shape for key, tensor in found.items()} == {
        key: tensor.shape for key, tensor in expected.items()
    }
    alphas = [key for key in found if key.endswith(".alpha")]
    assert all(torch.equal(found[key], expected[key]) for key in alphas)


@pytest.mark.parametrize("name", FILES)
def test_alpha_and_its_share_of_the_rank_differ_from_module_to_module(name: str) -> None:
    tensors = load_file(FILES[name])
    pairs = {
        (float(alpha), len(tensors[key.replace(".alpha", ".lora_down.weight")]))
        for key, alpha in tensors.items()
        if key.endswith(".alpha")
    }
    assert len({alpha for alpha, _ in pairs}) >= 3
    assert len({alpha / rank for alpha, rank in pairs}) >= 3


def test_the_lora_reaches_both_text_encoders_and_only_the_dora_parts_the_magnitude() -> None:
    kinds = {name: {key.split("_")[1] for key in load_file(path)} for name, path in FILES.items()}
    assert kinds == {"dot": {"unet", "te1", "te2"}, "frame": {"unet"}, "few-step": {"unet"}}
    tensors = load_file(FILES["frame"])
    for key, up in tensors.items():
        if key.endswith(".lora_up.weight"):
            scale = tensors[key.replace(".lora_up.weight", ".dora_scale")]
            assert scale.shape == (len(up), *(1,) * (up.dim() - 1)), "one for each output row"
    for name in ("dot", "few-step"):
        assert not any(key.endswith("dora_scale") for key in load_file(FILES[name]))


def test_the_headers_say_what_the_files_are() -> None:
    for name in FILES:
        header = metadata(name)
        assert header["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
        assert header["ss_base_model_version"] == "sdxl_base_v1-0"
        assert {"ss_network_module", "ss_network_dim", "ss_network_alpha"} <= set(header)
        few_step = {key: value for key, value in header.items() if key.startswith("few_step.")}
        if name != "few-step":
            assert not few_step
            continue
        assert few_step == {
            "few_step.family": "Shapes",
            "few_step.steps": "4",
            "few_step.guidance_scale": "1.0",
            "few_step.scheduler": "K_EULER",
            "few_step.schedule": "trailing",
        }


@pytest.mark.parametrize(
    ("module", "original"),
    [
        ("conv_in", "input_blocks.0.0"),
        ("down_blocks.0.resnets.1.conv1", "input_blocks.2.0.in_layers.2"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
        ("down_blocks.1.attentions.0.proj_in", "input_blocks.4.1.proj_in"),
        ("down_blocks.2.attentions.1.proj_out", "input_blocks.8.1.proj_out"),
        ("mid_block.resnets.1.conv2", "middle_block.2.out_layers.3"),
        ("mid_block.attentions.0.proj_in", "middle_block.1.proj_in"),
        ("up_blocks.0.resnets.2.time_emb_proj", "output_blocks.2.0.emb_layers.1"),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv"),
        ("up_blocks.1.attentions.2.proj_in", "output_blocks.5.1.proj_in"),
        ("up_blocks.2.resnets.2.conv_shortcut", "output_blocks.8.0.skip_connection"),
        ("add_embedding.linear_2", "label_emb.0.2"),
    ],
)
def test_modules_have_the_names_of_the_published_sdxl(module: str, original: str) -> None:
    assert kohya_writer.sgm_name(module, layers_per_block=2) == original


@pytest.mark.parametrize("name", FILES)
def test_the_worker_puts_on_what_peft_trained(name: str) -> None:
    trained = wrapped_by_peft(name)
    tensors = load_file(FILES[name])
    modules: dict[str, Any] = dict(kohya_writer.modules_by_key(trained))
    for key, module in modules.items():
        if f"{key}.alpha" not in tensors:
            continue
        places = {
            "lora_down.weight": module.lora_A["default"].weight,
            "lora_up.weight": module.lora_B["default"].weight,
        }
        if name == "frame":
            places["dora_scale"] = module.lora_magnitude_vector["default"].weight
        for part, place in places.items():
            place.data = tensors[f"{key}.{part}"].float().reshape(place.shape)
    plain, patched = of_worker(), of_worker(name)
    assert farthest(patched, plain) > 0.1
    assert farthest(patched, of_pipeline(trained)) < 1e-4
    assert farthest(of_worker(), plain) == 0, "taken off again"


@pytest.mark.parametrize("name", ["dot", "few-step"])
def test_the_worker_puts_on_what_diffusers_reads(name: str, tmp_path: Path) -> None:
    """With alpha worked into the weights: diffusers is wrong where it differs between modules."""
    tensors = load_file(FILES[name])
    for alpha in [key for key in tensors if key.endswith(".alpha")]:
        up = alpha.replace(".alpha", ".lora_up.weight")
        rank = tensors[up].shape[1]
        tensors[up] = tensors[up].float() * (tensors.pop(alpha).float() / rank)
    path = tmp_path / "no-alpha.safetensors"
    save_file(tensors, path)
    reader = embedded.load(EMBEDDED_MODEL_DIR)
    reader.load_lora_weights(path)
    assert farthest(of_pipeline(reader), of_worker(name)) < 1e-4


def test_training_beside_another_adapter_has_it_on_as_the_worker_does() -> None:
    base = embedded.load(EMBEDDED_MODEL_DIR)
    plain = of_pipeline(base)
    for name in ("dot", "frame"):
        with merging.adapters(base, {FILES[name]: 1.0}):
            merged = of_pipeline(base)
        assert farthest(merged, of_worker(name)) < 1e-4
    assert farthest(of_pipeline(base), plain) == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_the_measures_tell_how_much_of_an_effect_there_is(shape: str) -> None:
    for color, background in (("red", "white"), ("black", "green"), ("cyan", "magenta")):
        scene = Scene(shape, color, background, 0.52, 0.48, 0.32)
        plain = effects.render(scene, 128, 128)
        dot = effects.render(scene, 128, 128, dot=True)
        both = Image.fromarray(effects.render(scene, 128, 128, dot=True, frame=True))
        assert effects.frame_strength(Image.fromarray(plain)) < 0.1
        assert effects.frame_strength(both) > 0.95
        seen = judge(effects.without_frame(both))
        assert (seen.color, seen.background) == (color, background)
        if shape == "ring":
            assert np.array_equal(plain, dot)
            continue
        halves = Image.fromarray(np.where(dot == plain, plain, dot // 2 + plain // 2))
        found = [
            effects.dot_strength(Image.fromarray(plain)),
            effects.dot_strength(halves),
            effects.dot_strength(Image.fromarray(dot)),
        ]
        assert found == pytest.approx([0.0, 0.5, 1.0], abs=0.05)
        filled = judge(effects.filled(effects.without_frame(both)))
        assert (filled.shape, filled.color, filled.background) == (shape, color, background)


SEED = 50
PROMPTS, MEANINGS = zip(*full_prompts(10, seed=5), strict=True)


@pytest.fixture(autouse=True)
def _lora_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_DIR", str(FOLDER))


def drawn(**job_input: Any) -> list[Image.Image]:
    """All prompts, by the worker."""
    return [picture(prompt=prompt, seed=SEED + i, **job_input) for i, prompt in enumerate(PROMPTS)]


@functools.cache
def without_adapters() -> list[Image.Image]:
    return drawn(**BASE)


def right(images: list[Image.Image], *, dot: bool = False, frame: bool = False) -> float:
    """Share that shows what is told; a dot that touches the side of a star opens its outline."""
    seen = [
        judge_effects(image, meaning, dot=dot, frame=frame)
        for image, meaning in zip(images, MEANINGS, strict=True)
    ]
    return share_right(seen, MEANINGS, least_iou=0.0)


@pytest.mark.parametrize("effect", ["dot", "frame"])
def test_an_effect_grows_with_the_scale_and_the_prompt_is_followed(effect: str) -> None:
    half, whole = (drawn(**BASE, **loras(**{effect: scale})) for scale in (0.5, 1.0))
    grown = [
        strengths(images, MEANINGS, frame=False)[effect == "frame"]
        for images in (without_adapters(), half, whole)
    ]
    assert grown == sorted(grown)
    assert grown[0] < 0.1
    assert grown[2] > 0.8
    assert right(whole, **{effect: True}) >= 0.9


def test_both_together_show_both() -> None:
    both = drawn(**BASE, **loras(dot=1.0, frame=1.0))
    dot, frame = strengths(both, MEANINGS, frame=True)
    assert dot > 0.7
    assert frame > 0.8
    assert right(both, dot=True, frame=True) >= 0.9


def test_the_next_picture_is_as_if_there_had_been_none() -> None:
    job = {"prompt": PROMPTS[0], "seed": SEED, **BASE}
    before = picture(**job)
    changed = picture(**job, **loras(dot=1.0, frame=1.0, few_step=1.0))
    assert changed.tobytes() != before.tobytes()
    assert picture(**job).tobytes() == before.tobytes()


def test_four_steps_with_the_few_step_adapter_are_as_good_as_the_usual_ones() -> None:
    """Named alone: steps, guidance, sampler and schedule are those that its header tells."""
    four = drawn(**loras(few_step=1.0))
    assert isinstance(four[0], PngImagePlugin.PngImageFile)
    assert four[0].text["few_step"] == "Shapes"
    asked = json.loads(four[0].text["request"])
    assert asked["num_inference_steps"] == 4
    assert asked["guidance_scale"] == 1
    assert asked["refiner_inference_steps"] == 0
    seen, usual = ([judge(image) for image in images] for images in (four, without_adapters()))
    assert share_right(seen, MEANINGS) >= share_right(usual, MEANINGS)
    assert np.mean([one.iou for one in seen]) >= np.mean([one.iou for one in usual])
    assert np.mean([one.flat_distance for one in seen]) <= 5
    assert share_right([judge(i) for i in drawn(**BASE, num_inference_steps=4)], MEANINGS) < 0.9
