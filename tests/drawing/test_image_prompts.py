"""Pictures as prompts: as plain diffusers has them, and nothing of them stays."""

import dataclasses
import functools
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.image_processor import IPAdapterMaskProcessor
from PIL import Image
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

from sdxl_worker.adapters.of_request import NO_ADAPTERS, Adapters
from sdxl_worker.drawing import batches, image_prompts
from sdxl_worker.drawing.generate import generate
from sdxl_worker.drawing.image_prompts import ImagePrompt, tokens_of_picture
from sdxl_worker.drawing.prompts import Texts, encode_pair
from sdxl_worker.drawing.stages import plan_stages
from sdxl_worker.drawing.steering import Steering
from sdxl_worker.drawing.steps import Step
from sdxl_worker.inputs.canvas import Canvas
from sdxl_worker.inputs.references import References
from sdxl_worker.loading.ip_adapters import find_ip_adapter
from sdxl_worker.loading.model_dir import find_model_dir
from sdxl_worker.loading.models import Models, load_models
from sdxl_worker.request import parse_request
from sdxl_worker.serving.beside import Beside, steering_of
from sdxl_worker.settings import EMBEDDED_MODEL_DIR, Settings
from sdxl_worker.speed.optimize import optimize
from tests import inpainting_model, random_ip_adapters
from tests.adapters.lora_files import lora_of
from tests.support import (
    PROMPT,
    canvas_of,
    data_uri,
    difference,
    error,
    fresh_models,
    largest_difference,
    noise_picture,
    picture,
)

JOB = {
    "prompt": PROMPT,
    "seed": 3,
    "num_inference_steps": 3,
    "refiner_inference_steps": 0,
    "scheduler": "DDIM",
}
FIELD = "ip_adapter[0].type"
URL = {"image_url": "https://example.com/a.png"}
SMALL: Any = {"height": 64, "width": 64}
PLAIN, PLUS = "ip-adapter_sdxl_vit-h.safetensors", "ip-adapter-plus_sdxl_vit-h.safetensors"
# What plain diffusers calls them.
FILES = {"plain": PLAIN, "plus": PLUS, "style": PLUS, "layout": PLUS}
STYLE = {"up": {"block_0": [0.0, 1.0]}}
LAYOUT = {"down": {"block_2": [1.0]}}
LEFT = np.zeros((128, 128), bool)
LEFT[:, :56] = True

Make = Callable[..., ImagePrompt]


def reference(seed: int) -> Image.Image:
    """Wider than high, so that it matters that its middle is seen."""
    patches = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(patches).resize((96, 64), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def models() -> Models:
    return fresh_models()


@pytest.fixture(scope="module")
def folder(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ip-adapters")
    random_ip_adapters.make_ip_adapters(folder, models.unet)
    return folder


@pytest.fixture(scope="module")
def prompt(models: Models, folder: Path) -> Make:
    @functools.cache
    def encoded(kind: str, seed: int) -> ImagePrompt:
        files = find_ip_adapter(kind, folder, FIELD, models.unet)
        adapter, encoder = files.load(models.placement), files.encoder.load(models.placement)
        tokens = tokens_of_picture(reference(seed), encoder, adapter, models.placement)
        return ImagePrompt(adapter, tokens, kind, 1.0)

    def make(kind: str = "plain", seed: int = 0, **fields: Any) -> ImagePrompt:
        return dataclasses.replace(encoded(kind, seed), **fields)

    return make


@pytest.fixture
def plain(folder: Path) -> Callable[..., Image.Image]:
    """As a script of the diffusers documentation has it."""

    def draw(
        kinds: Sequence[str],
        scales: Any,
        kind: type = StableDiffusionXLPipeline,
        model: Path = EMBEDDED_MODEL_DIR / "base",
        lora: Path | None = None,
        **options: Any,
    ) -> Image.Image:
        encoder = CLIPVisionModelWithProjection.from_pretrained(folder / random_ip_adapters.ENCODER)
        side = encoder.config.image_size
        pipeline = kind.from_pretrained(  # type: ignore[attr-defined]
            model,
            variant="fp16",
            dtype=torch.float32,
            image_encoder=encoder,
            feature_extractor=CLIPImageProcessorPil(size=side, crop_size=side),
        )
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        if lora is not None:
            pipeline.load_lora_weights(lora)
        pipeline.load_ip_adapter(
            str(folder),
            subfolder="sdxl_models",
            weight_name=[FILES[one] for one in kinds],
            image_encoder_folder=None,
        )
        pipeline.set_ip_adapter_scale(scales)
        if "prompt_embeds" not in options:
            options["prompt"] = PROMPT
        [picture] = pipeline(
            **{"num_inference_steps": 3, "guidance_scale": 7.5, **options},
            generator=torch.Generator().manual_seed(3),
            ip_adapter_image=[reference(i) for i in range(len(kinds))],
        ).images
        return picture

    return draw


def drawn(
    models: Models,
    prompts: Sequence[ImagePrompt] = (),
    canvas: Canvas | None = None,
    on_step: Callable[[Step], None] = lambda _: None,
    adapters: Adapters = NO_ADAPTERS,
    **job: Any,
) -> list[Image.Image]:
    request = parse_request({**JOB, **job})
    return generate(
        request,
        plan_stages(request, models),
        models,
        canvas,
        on_step,
        adapters=adapters,
        steering=Steering(image_prompts=tuple(prompts)),
    )


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.tobytes() == other.tobytes()


class TestPixelForPixelAsPlainDiffusers:
    @pytest.mark.parametrize(
        ("entries", "scales"),
        [
            ([("plain", 1)], 1.0),
            ([("plain", 0.5)], 0.5),
            ([("plus", 1)], 1.0),
            ([("style", 1)], STYLE),
            ([("layout", 1), ("style", 1)], [LAYOUT, STYLE]),
            ([("plain", 0.4), ("plus", 0.7)], [0.4, 0.7]),
        ],
        ids=str,
    )
    def test_text_to_image(
        self, models: Models, prompt: Make, plain: Any, entries: Any, scales: Any
    ) -> None:
        prompts = [prompt(kind, i, scale=scale) for i, (kind, scale) in enumerate(entries)]
        [picture] = drawn(models, prompts)
        assert same(picture, plain([kind for kind, _ in entries], scales))
        assert difference(picture, drawn(models)[0]) > 0.2

    @pytest.mark.parametrize("kind", ["plain", "plus"])
    def test_without_guidance(self, models: Models, prompt: Make, plain: Any, kind: str) -> None:
        [picture] = drawn(models, [prompt(kind)], guidance_scale=1)
        assert same(picture, plain([kind], 1.0, guidance_scale=1))

    def test_image_to_image(self, models: Models, prompt: Make, plain: Any) -> None:
        image = noise_picture(96, 128)
        job: Any = {"mode": "img2img", **URL, "strength": 0.7, "num_inference_steps": 4}
        [picture] = drawn(models, [prompt("plus")], canvas_of(image), **job)
        expected = plain(
            ["plus"],
            1.0,
            StableDiffusionXLImg2ImgPipeline,
            image=image,
            strength=0.7,
            num_inference_steps=4,
        )
        assert same(picture, expected)

    @pytest.mark.parametrize("channels", [4, 9])
    def test_inpainting(
        self, prompt: Make, plain: Any, models: Models, channels: int, tmp_path: Path
    ) -> None:
        """With a model for inpainting, too: diffusers' way with others is another one, so for these
        the mask is all of the picture."""
        image = noise_picture(96, 128)
        hole = np.ones((128, 96), bool)
        model = EMBEDDED_MODEL_DIR / "base"
        if channels == 9:
            hole[:32] = hole[80:] = False
            model = inpainting_model.write(tmp_path / "model")
            models = load_models(find_model_dir(Settings(model_dir=model)))
        job: Any = {**URL, "mask_url": "https://a.org/mask.png", "num_inference_steps": 4}
        [picture] = drawn(models, [prompt()], canvas_of(image, hole), **job, strength=0.7)
        expected = plain(
            ["plain"],
            1.0,
            StableDiffusionXLInpaintPipeline,
            model,
            image=image,
            mask_image=Image.fromarray(hole),
            height=128,
            width=96,
            strength=0.7,
            num_inference_steps=4,
        )
        assert largest_difference(picture, expected) <= 1

    def test_masks(self, models: Models, prompt: Make, plain: Any) -> None:
        prompts = [prompt("plain", mask=LEFT), prompt("plus", 1)]
        everywhere = np.ones_like(LEFT)
        masks = IPAdapterMaskProcessor().preprocess(
            [Image.fromarray(mask) for mask in (LEFT, everywhere)]
        )
        expected = plain(
            ["plain", "plus"],
            [1.0, 1.0],
            cross_attention_kwargs={"ip_adapter_masks": list(masks[:, None])},
        )
        [picture] = drawn(models, prompts)
        assert largest_difference(picture, expected) <= 1
        assert difference(picture, drawn(models, [prompt("plain"), prompt("plus", 1)])[0]) > 1

    def test_a_prompt_of_several_chunks(self, models: Models, prompt: Make, plain: Any) -> None:
        text = "a red circle and " * 30
        request = parse_request({**JOB, "prompt": text, "negative_prompt": "a square"})
        one, other = encode_pair(Texts.of(request), models)
        assert one.hidden_2.shape[1] > 77
        expected = plain(
            ["plus"],
            1.0,
            prompt_embeds=torch.cat([one.hidden_1, one.hidden_2], -1),
            pooled_prompt_embeds=one.pooled,
            negative_prompt_embeds=torch.cat([other.hidden_1, other.hidden_2], -1),
            negative_pooled_prompt_embeds=other.pooled,
        )
        job: Any = {"prompt": text, "negative_prompt": "a square"}
        assert same(drawn(models, [prompt("plus")], **job)[0], expected)

    def test_beside_a_lora(self, models: Models, prompt: Make, plain: Any, tmp_path: Path) -> None:
        """On the projections of the very attentions that see the picture."""
        random, tensors = torch.Generator().manual_seed(5), {}
        for name in models.unet.attn_processors:
            for part in ("to_q", "to_k", "to_v", "to_out.0"):
                layer = f"{name.removesuffix('.processor')}.{part}"
                outputs, inputs = models.unet.get_submodule(layer).weight.shape
                down, up = (
                    torch.randn(shape, generator=random) / 8
                    for shape in ((4, inputs), (outputs, 4))
                )
                tensors[f"unet.{layer}.lora_A.weight"] = down
                tensors[f"unet.{layer}.lora_B.weight"] = up
        lora = Adapters(loras=(lora_of(tmp_path, models, tensors, name="lora.safetensors"),))
        before = drawn(models)
        [picture] = drawn(models, [prompt("plus")], adapters=lora)
        expected = plain(["plus"], 1.0, lora=tmp_path / "lora.safetensors")
        assert largest_difference(picture, expected) <= 2
        assert difference(picture, drawn(models, adapters=lora)[0]) > 1
        assert difference(picture, drawn(models, [prompt("plus")])[0]) > 1
        assert same(before[0], drawn(models)[0])


def test_each_picture_of_a_batch_is_as_alone(models: Models, prompt: Make) -> None:
    prompts = [prompt("plus", mask=LEFT), prompt("style", 1)]
    batch = drawn(models, prompts, num_images=3)
    for i, one in enumerate(batch):
        [alone] = drawn(models, prompts, seed=3 + i)
        assert largest_difference(one, alone) <= 2
    assert difference(batch[0], batch[1]) > 1


def test_the_refiner_takes_no_picture(models: Models, prompt: Make) -> None:
    jobs: list[Any] = [{"refiner_inference_steps": 4}, {"high_noise_frac": 0.5}]
    for job in jobs:
        job = {"refiner_inference_steps": 4, **job}
        [picture] = drawn(models, [prompt()], **job)
        assert difference(picture, drawn(models, **job)[0]) > 1


def test_what_its_adapter_takes_is_in_the_memory_plan(
    models: Models, prompt: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def note(plan: Any) -> Any:
        def noted(*arguments: Any, **options: Any) -> Any:
            given.append(options["image_prompts"])
            return plan(*arguments, **options)

        return noted

    monkeypatch.setattr(batches, "plan", note(batches.plan))
    monkeypatch.setattr(batches, "check_fits", note(batches.check_fits))
    one = prompt()
    drawn(models, [one])
    assert given == [(one,)] * 2


@pytest.mark.parametrize("kind", ["plain", "plus"])
def test_a_picture_counts_only_where_its_mask_is_white(
    models: Models, prompt: Make, kind: str
) -> None:
    """At an odd size, where diffusers takes 3 rows of 2 for 2 rows of 3: seen where the first
    attention to the picture is, at the lowest level."""
    mask = np.zeros((72, 64), bool)
    mask[:24] = True
    attention = models.unet.down_blocks[2].attentions[0].transformer_blocks[0].attn2
    outputs: list[torch.Tensor] = []
    hook = attention.register_forward_hook(lambda *of_pass: outputs.append(of_pass[-1].clone()))
    size: Any = {"height": 72, "width": 64, "num_inference_steps": 1}
    alone = dataclasses.replace(prompt(kind), kind="layout")
    for prompts in ([], [alone], [dataclasses.replace(alone, mask=mask)]):
        drawn(models, prompts, **size)
    hook.remove()
    without, everywhere, masked = (one.unflatten(1, (3, 2)) for one in outputs)
    assert torch.equal(masked[:, 1:], without[:, 1:])
    assert torch.equal(masked[:, 0], everywhere[:, 0])
    assert not torch.isclose(everywhere, without).any(-1).all()


def test_a_mask_goes_with_a_larger_second_pass(models: Models, prompt: Make) -> None:
    """That is: with what is drawn in another size than the mask has."""
    size: Any = {"height": 128, "width": 128, "num_inference_steps": 1}
    small, large = (np.tile(np.arange(side) < side / 2, (side, 1)) for side in (64, 128))
    one, other = (drawn(models, [prompt(mask=mask)], **size)[0] for mask in (small, large))
    assert same(one, other)
    assert difference(one, drawn(models, [prompt()], **size)[0]) > 0.2


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [(64, 128), (72, 64), (104, 72)])
def test_masks_of_any_size_give_no_warning(
    models: Models, prompt: Make, size: tuple[int, int]
) -> None:
    mask = np.zeros(size, bool)
    mask[: size[0] // 2] = True
    mask.setflags(write=False)  # as decoding gives it
    height, width = size
    drawn(models, [prompt(mask=mask)], height=height, width=width, num_inference_steps=1)


class StoppedError(Exception):
    pass


def state(models: Models) -> list[Any]:
    """Of a UNet, what a picture's prompt changes: the objects, and in which order they are."""
    unet = models.unet
    attentions = [unet.get_submodule(name[: -len(".processor")]) for name in unet.attn_processors]
    return [
        *unet.attn_processors.items(),
        *(name for name, _ in unet.named_modules()),
        unet.encoder_hid_proj,
        unet.config.encoder_hid_dim_type,
        dict(unet.config),
        list(unet._modules),
        *(list(attention._modules) for attention in attentions),
    ]


def test_nothing_stays(models: Models, prompt: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(_: Step) -> None:
        raise StoppedError

    before, [plain] = state(models), drawn(models)
    drawn(models, [prompt("plus"), prompt("style", mask=LEFT)])
    assert state(models) == before
    assert same(drawn(models)[0], plain)
    with pytest.raises(StoppedError):
        drawn(models, [prompt("plus")], on_step=stop)
    assert state(models) == before
    assert same(drawn(models)[0], plain)
    # In the midst of the work before the first step.
    monkeypatch.setattr(image_prompts, "_Attend", None)
    with pytest.raises(TypeError):
        drawn(models, [prompt("plus")])
    assert state(models) == before
    assert same(drawn(models)[0], plain)


def test_blocks_that_are_compiled_are_not_compiled_again(
    models: Models,
    prompt: Make,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With a compiler that makes nothing faster: the rest takes a minute."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    made = fresh_models()
    optimize(["compile_blocks"], made.unet)
    count = torch._dynamo.utils.counters["stats"]
    count.clear()
    [plain] = drawn(made, **SMALL)
    graphs = count["unique_graphs"]
    assert graphs > 0
    assert "COMPILE" not in caplog.text
    [picture] = drawn(made, [prompt("plus")], **SMALL)
    assert largest_difference(picture, *drawn(models, [prompt("plus")], **SMALL)) <= 1
    assert "COMPILE=blocks is left out for the base of this job" in caplog.text
    assert same(drawn(made, **SMALL)[0], plain)
    assert count["unique_graphs"] == graphs
    torch._dynamo.reset()


def test_nor_is_a_unet_that_is_compiled_as_a_whole(
    models: Models, prompt: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    calls: list[Any] = []

    def counted(forward: Any, **_: Any) -> Any:
        def compiled(*inputs: Any, **options: Any) -> Any:
            calls.append(options)
            return forward(*inputs, **options)

        return compiled

    monkeypatch.setattr(torch, "compile", counted)
    made = fresh_models()
    optimize(["compile_unet"], made.unet)
    [picture] = drawn(made, [prompt("plus")], **SMALL)
    assert not calls
    assert same(picture, drawn(models, [prompt("plus")], **SMALL)[0])
    assert "COMPILE=full is left out for the base of this job" in caplog.text
    drawn(made, **SMALL)
    assert calls


def test_the_step_cache_is_left_out(
    models: Models, prompt: Make, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    request = parse_request(JOB)
    steering = Steering(image_prompts=(prompt("plus"),))
    stages = plan_stages(request, models)
    [cached] = generate(request, stages, models, steering=steering, step_cache_interval=2)
    assert same(cached, drawn(models, [prompt("plus")])[0])
    assert "STEP_CACHE is left out for the base of this job, which has ip_adapter" in caplog.text


def test_with_products_of_keys_and_values_in_one_the_picture_is_the_same(
    models: Models, prompt: Make
) -> None:
    made = fresh_models()
    optimize(["fuse_qkv"], made.unet)
    [plain] = drawn(made)
    [picture] = drawn(made, [prompt("plus")])
    assert largest_difference(picture, *drawn(models, [prompt("plus")])) <= 1
    assert same(drawn(made)[0], plain)


def test_a_quantized_unet_sees_pictures_too(models: Models, prompt: Make) -> None:
    made = fresh_models()
    optimize(["int8"], made.unet)
    [plain] = drawn(made)
    [picture] = drawn(made, [prompt("plus")])
    [exact] = drawn(models, [prompt("plus")])
    assert 0 < difference(picture, exact) < difference(picture, plain) / 4
    assert same(drawn(made)[0], plain)


class TestOfARequest:
    @pytest.fixture
    def steered(self, models: Models, folder: Path) -> Callable[..., Steering]:
        def steering(*entries: dict[str, Any], titles: list[str] | None = None) -> Steering:
            asked = [{**URL, **entry} for entry in entries]
            request = parse_request({**JOB, "ip_adapter": asked})
            kinds = [one.type for one in request.ip_adapter or ()]
            files = tuple(find_ip_adapter(kind, folder, FIELD, models.unet) for kind in kinds)
            references = References(
                image_prompts=tuple(reference(i) for i in range(len(files))),
                image_prompt_masks=tuple(LEFT if i else None for i in range(len(files))),
            )
            on_loading = (titles if titles is not None else []).append
            beside = Beside(ip_adapters=files)
            return steering_of(request, beside, references, models, on_loading, lambda: None)

        return steering

    def test_each_entry_has_its_picture_scale_and_mask(
        self, steered: Any, models: Models, prompt: Make
    ) -> None:
        steering = steered({"type": "layout", "scale": 0.9}, {"type": "style", "scale": 0.8})
        first, second = steering.image_prompts
        assert first.adapter is second.adapter, "a file is loaded once"
        expected = [prompt("layout", scale=0.9), prompt("style", 1, scale=0.8, mask=LEFT)]
        assert same(drawn(models, [first, second])[0], drawn(models, expected)[0])

    def test_with_scale_0_the_picture_is_the_plain_one_and_nothing_is_loaded(
        self, steered: Any, models: Models
    ) -> None:
        titles: list[str] = []
        steering = steered({"type": "face", "scale": 0}, titles=titles)
        assert titles == []
        assert same(drawn(models, steering.image_prompts)[0], drawn(models)[0])


class TestThroughTheHandler:
    JOB: ClassVar = {**JOB, **SMALL}

    @pytest.fixture(autouse=True)
    def _served(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("IP_ADAPTER_DIR", str(folder))

    def test_a_picture_steers_where_its_mask_is_white_and_the_next_job_is_plain(self) -> None:
        plain = picture(**self.JOB)
        entry = {"image_url": data_uri(reference(0)), "type": "plus", "scale": 1}
        steered = picture(**self.JOB, ip_adapter=[entry])
        assert difference(steered, plain) > 1
        mask = np.zeros((64, 64), bool)
        mask[:, :16] = True
        masked = {**entry, "mask_url": data_uri(Image.fromarray(mask))}
        assert difference(picture(**self.JOB, ip_adapter=[masked]), steered) > 1
        assert same(picture(**self.JOB, ip_adapter=[{**entry, "scale": 0}]), plain)
        assert same(picture(**self.JOB), plain)

    def test_what_cannot_be_served_is_told_before_anything_is_fetched(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        entries = [{"image_url": "https://nowhere.invalid/a.png", "type": "face"}]
        monkeypatch.delenv("IP_ADAPTER_DIR")
        assert error({**self.JOB, "ip_adapter": entries}) == (
            f"{FIELD}: this worker has no IP-Adapters; its owner can set IP_ADAPTER_DIR"
        )
        damaged = tmp_path / "damaged"
        shutil.copytree(folder, damaged)
        (damaged / random_ip_adapters.FACE).write_bytes(b"<html>")
        monkeypatch.setenv("IP_ADAPTER_DIR", str(damaged))
        message = error({**self.JOB, "ip_adapter": entries})
        assert message.startswith(f"{FIELD}: ip-adapter-plus-face_sdxl_vit-h.safetensors")
        assert "a web page" in message


def test_encoding_says_nothing_in_the_log(
    models: Models,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    files = find_ip_adapter("plain", folder, FIELD, models.unet)
    adapter, encoder = files.load(models.placement), files.encoder.load(models.placement)
    tokens_of_picture(reference(0), encoder, adapter, models.placement)
    assert caplog.text == ""
    assert capfd.readouterr() == ("", "")


def test_of_a_strip_no_more_is_scaled_than_lies_around_what_is_seen(
    models: Models, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture of 4096 x 1 pixels would take gigabytes, on the thread that all jobs share."""
    files = find_ip_adapter("plain", folder, FIELD, models.unet)
    adapter, encoder = files.load(models.placement), files.encoder.load(models.placement)
    scaled: list[tuple[int, int]] = []

    class Processor(CLIPImageProcessorPil):
        def __call__(self, picture: Image.Image, **options: Any) -> Any:
            scaled.append(picture.size)
            return super().__call__(picture, **options)

    monkeypatch.setattr(image_prompts, "CLIPImageProcessorPil", Processor)
    strip = Image.new("RGB", (4096, 2), "navy")
    strip.paste("yellow", (2048 - 4, 0, 2048 + 4, 2))
    middle = Image.new("RGB", (8, 2), "yellow")
    turn = Image.Transpose.ROTATE_90
    for seen, other in ((strip, middle), (strip.transpose(turn), middle.transpose(turn))):
        tokens = tokens_of_picture(seen, encoder, adapter, models.placement)
        expected = tokens_of_picture(other, encoder, adapter, models.placement)
        assert torch.equal(tokens, expected)
    assert [max(size) for size in scaled] == [8] * 4
