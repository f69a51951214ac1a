"""The larger second pass of `hires`: what a script makes by hand of a picture, an enlargement and
image to image; each picture of a batch as alone; and around a mask nothing but the enlargement."""

import dataclasses
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from PIL import Image
from scipy.ndimage import distance_transform_cdt

from sdxl_worker.drawing import generate as generate_module
from sdxl_worker.drawing import second_tries
from sdxl_worker.drawing.batches import Plan
from sdxl_worker.drawing.decoding import decode
from sdxl_worker.drawing.encoding import encode_picture
from sdxl_worker.drawing.enlarging import enlarger
from sdxl_worker.drawing.generate import generate
from sdxl_worker.drawing.stages import (
    as_drawn,
    drawn_sizes_px,
    final_size_px,
    output_size_px,
    plan_stages,
    total_steps,
)
from sdxl_worker.drawing.steering import NO_STEERING, Steering
from sdxl_worker.drawing.steps import Step
from sdxl_worker.errors import PictureError, RequestError
from sdxl_worker.few_step import LIGHTNING, with_settings_of
from sdxl_worker.inputs.canvas import Canvas, Enlarge, prepare_canvas
from sdxl_worker.loading.models import Models
from sdxl_worker.loading.upscalers import UpscalerFiles
from sdxl_worker.placement import Placement
from sdxl_worker.request import parse_request
from tests.small_upscalers import compact, write
from tests.support import (
    PROMPT,
    SCHEDULERS,
    canvas_of,
    difference,
    fresh_models,
    largest_difference,
    models,
    noise_picture,
    plain_base,
    plain_refiner,
)

SMALL = {"prompt": PROMPT, "seed": 3, "height": 64, "width": 80, "num_inference_steps": 6}
BASE = {**SMALL, "refiner_inference_steps": 0, "hires": {"strength": 0.5}}
REFINED = {**BASE, "refiner_inference_steps": 8, "strength": 0.5}
ENSEMBLE = {**BASE, "refiner_inference_steps": 8, "high_noise_frac": 0.8}
SETTINGS: dict[str, dict[str, Any]] = {"base": BASE, "refined": REFINED, "ensemble": ENSEMBLE}
LARGER = (120, 96)  # 1.5 times
PICTURE = noise_picture(80, 64)
REDRAW = {
    "image_url": "https://example.com/a.png",
    "mode": "img2img",
    "height": None,
    "width": None,
}
MASKED = {**REDRAW, "mask_url": "https://example.com/m.png"}


def by_lanczos(picture: Image.Image, size_px: tuple[int, int]) -> Image.Image:
    return picture.resize(size_px, Image.Resampling.LANCZOS)


def drawn(
    job_input: dict[str, Any],
    canvas: Canvas | None = None,
    *,
    by: Models | None = None,
    enlarge: Enlarge = by_lanczos,
    on_step: Any = lambda _: None,
    **options: Any,
) -> list[Image.Image]:
    """As a job does it."""
    request = parse_request(job_input)
    by = by or models()
    if canvas is not None and request.hires is not None:
        canvas = canvas.with_larger(request.hires.scale, enlarge)
    pictures = generate(
        request,
        plan_stages(request, by),
        by,
        canvas,
        on_step,
        steering=Steering(enlarge=enlarge),
        **options,
    )
    return [canvas.put_back(picture) for picture in pictures] if canvas else pictures


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and one.tobytes() == other.tobytes()


class TestPixelForPixelAsByHand:
    """Each stage goes on with the generator of the one before."""

    @pytest.fixture(params=["DDIM", "K_EULER_ANCESTRAL", "DPMSolverMultistep"])
    @staticmethod
    def sampler(request: pytest.FixtureRequest) -> str:
        return str(request.param)

    def plain(self, kind: type, of: Any, sampler: str, **options: Any) -> Any:
        config = dict(plain_base().scheduler.config)
        scheduler = getattr(diffusers, SCHEDULERS[sampler]).from_config(config)
        pipeline = kind.from_pipe(of, scheduler=scheduler)  # type: ignore[attr-defined]
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(prompt=PROMPT, guidance_scale=7.5, **options).images

    def first(self, sampler: str, noise: torch.Generator) -> Image.Image:
        [picture] = self.plain(
            StableDiffusionXLPipeline,
            plain_base(),
            sampler,
            height=64,
            width=80,
            num_inference_steps=6,
            generator=noise,
        )
        return picture.resize(LARGER, Image.Resampling.LANCZOS)

    def second(self, sampler: str, image: Any, noise: torch.Generator, **options: Any) -> Any:
        return self.plain(
            StableDiffusionXLImg2ImgPipeline,
            plain_base(),
            sampler,
            image=image,
            generator=noise,
            **{"num_inference_steps": 6, "strength": 0.5, **options},
        )

    def test_the_base_alone(self, sampler: str) -> None:
        noise = torch.Generator("cpu").manual_seed(3)
        [expected] = self.second(sampler, self.first(sampler, noise), noise)
        assert same(drawn({**BASE, "scheduler": sampler})[0], expected)

    def test_with_steps_of_its_own(self, sampler: str) -> None:
        noise = torch.Generator("cpu").manual_seed(3)
        image = self.first(sampler, noise)
        [expected] = self.second(sampler, image, noise, num_inference_steps=9)
        hires = {"strength": 0.5, "steps": 9}
        assert same(drawn({**BASE, "scheduler": sampler, "hires": hires})[0], expected)

    def test_refined(self, sampler: str) -> None:
        noise = torch.Generator("cpu").manual_seed(3)
        image = self.first(sampler, noise)
        latents = self.second(sampler, image, noise, output_type="latent")
        [expected] = self.plain(
            StableDiffusionXLImg2ImgPipeline,
            plain_refiner(),
            sampler,
            image=latents,
            strength=0.5,
            num_inference_steps=8,
            generator=noise,
        )
        assert same(drawn({**REFINED, "scheduler": sampler})[0], expected)

    def test_handed_over_to_the_refiner(self, sampler: str) -> None:
        noise = torch.Generator("cpu").manual_seed(3)
        image = self.first(sampler, noise)
        cut = {"denoising_end": 0.8, "output_type": "latent"}
        latents = self.second(sampler, image, noise, **cut)
        [expected] = self.plain(
            StableDiffusionXLImg2ImgPipeline,
            plain_refiner(),
            sampler,
            image=latents,
            denoising_start=0.8,
            num_inference_steps=6,
            generator=noise,
        )
        assert same(drawn({**ENSEMBLE, "scheduler": sampler})[0], expected)

    def test_of_an_input_picture(self, sampler: str) -> None:
        noise = torch.Generator("cpu").manual_seed(3)
        [first] = self.second(sampler, PICTURE, noise, strength=0.75)
        image = first.resize(LARGER, Image.Resampling.LANCZOS)
        [expected] = self.second(sampler, image, noise)
        job_input = {**BASE, **REDRAW, "scheduler": sampler}
        assert same(drawn(job_input, canvas_of(PICTURE))[0], expected)


def padded(picture: Image.Image, mask: np.ndarray, **options: Any) -> Canvas:
    given = {"mask_blur": 0, "mask_padding": None, "native_size_px": 64, "max_side_px": 2048}
    return prepare_canvas(picture, mask, **given | options)


HOLE = np.zeros((64, 80), bool)
HOLE[16:48, 16:40] = True
CANVASES: dict[str, tuple[dict[str, Any], Any]] = {
    "text": ({}, None),
    "picture": (REDRAW, None),
    "mask": (MASKED, HOLE),
}


@pytest.mark.parametrize(
    ("of", "start"),
    [("base", "text"), ("refined", "picture"), ("refined", "mask"), ("ensemble", "mask")],
)
def test_a_batch_gives_the_pictures_of_single_requests(of: str, start: str) -> None:
    settings = SETTINGS[of]
    fields, mask = CANVASES[start]
    canvas = canvas_of(PICTURE, mask) if fields else None
    job_input = {**settings, **fields, "scheduler": "K_EULER_ANCESTRAL"}
    batch = drawn({**job_input, "num_images": 2}, canvas)
    for i, one in enumerate(batch):
        [single] = drawn({**job_input, "seed": 3 + i}, canvas)
        assert one.size == LARGER
        assert largest_difference(one, single) <= 2, "more than rounding"
        assert difference(one, single) < 0.02
    assert difference(batch[0], batch[1]) > 0.5


def test_a_network_may_enlarge_between_the_passes(tmp_path: Path) -> None:
    placement = Placement(torch.device("cpu"), torch.float32, resident=True)
    path = write(tmp_path / "a.safetensors", compact(scale=4))
    enlarge = enlarger(UpscalerFiles(path).load(placement), placement)
    seen: list[tuple[Image.Image, tuple[int, int]]] = []

    def seen_by(picture: Image.Image, size_px: tuple[int, int]) -> Image.Image:
        seen.append((picture, size_px))
        return enlarge(picture, size_px)

    [got] = drawn(BASE, enlarge=seen_by)
    assert difference(got, drawn(BASE)[0]) > 0.2
    [(first, size_px)] = seen
    assert size_px == LARGER
    assert same(first, drawn({**BASE, "hires": None})[0]), "of the picture as it is without"


def test_more_strength_changes_more() -> None:
    first = by_lanczos(drawn({**BASE, "hires": None})[0], LARGER)
    changes = [
        difference(drawn({**BASE, "hires": {"strength": strength}})[0], first)
        for strength in (0.17, 0.5, 1)
    ]
    assert changes == sorted(changes)
    assert changes[2] > 2 * changes[0]


class TestMasks:
    @pytest.mark.parametrize("size", [(85, 71), (66, 131)])
    @pytest.mark.parametrize(
        ("padding", "max_side_px"), [(None, 64), (None, 2048), (0, 2048), (10, 2048)]
    )
    def test_around_the_mask_nothing_but_the_enlargement_is_seen(
        self, size: tuple[int, int], padding: int | None, max_side_px: int
    ) -> None:
        picture = noise_picture(*size)
        mask = np.zeros(size[::-1], bool)
        mask[20:45, 15:44] = True
        canvas = padded(picture, mask, mask_padding=padding, max_side_px=max_side_px)
        job_input = {**BASE, **MASKED, "num_inference_steps": 3, "strength": 0.8}
        [got] = drawn(job_input, canvas)
        larger = round(size[0] * 1.5), round(size[1] * 1.5)
        assert got.size == larger
        expected = by_lanczos(picture, larger)
        changed = (np.asarray(got) != np.asarray(expected)).any(axis=2)
        there = np.asarray(Image.fromarray(mask).resize(larger, Image.Resampling.NEAREST))
        outside = distance_transform_cdt(~there, "chessboard") > 1
        assert not changed[outside].any()
        inside = distance_transform_cdt(there, "chessboard") > 1
        assert changed[inside].mean() > 0.9

    def test_the_latents_keep_to_the_larger_picture(self) -> None:
        canvas = canvas_of(PICTURE, HOLE)
        steps: list[Step] = []
        job_input = {**REFINED, **MASKED}
        drawn(job_input, canvas, on_step=steps.append)
        vae = models().vae
        with torch.no_grad():
            encoded = encode_picture(by_lanczos(PICTURE, LARGER), vae, torch.device("cpu"))
        picture = encoded.mean * vae.config.scaling_factor
        cells = np.asarray(Image.fromarray(HOLE).resize(LARGER, Image.Resampling.NEAREST))
        kept = torch.from_numpy(~cells.reshape(12, 8, 15, 8).any((1, 3)))
        for stage in ("hires", "refiner"):
            last = [step for step in steps if step.stage == stage][-1].latents()[0]
            assert (last[:, kept] - picture[0][:, kept]).abs().max() < 0.1
            assert (last[:, ~kept] - picture[0][:, ~kept]).abs().mean() > 0.1

    def test_what_the_first_pass_drew_is_what_the_second_begins_with(self) -> None:
        """With next to no strength it is the enlargement of what the first drew."""
        canvas = canvas_of(PICTURE, HOLE)
        [small] = drawn({**BASE, **MASKED, "hires": None}, canvas)
        hires = {"strength": 0.02, "steps": 50}
        [got] = drawn({**BASE, **MASKED, "hires": hires}, canvas)
        expected = by_lanczos(small, LARGER)
        inside = (slice(32, 64), slice(32, 52))
        one, other = (np.asarray(x, np.float32)[inside] for x in (got, expected))
        old = np.asarray(by_lanczos(PICTURE, LARGER), np.float32)[inside]
        assert np.abs(one - other).mean() < np.abs(one - old).mean() / 3

    def test_a_unet_that_sees_masks_sees_the_larger_one(self) -> None:
        made = fresh_models()
        wide = type(made.unet).from_config({**made.unet.config, "in_channels": 9}).eval()
        weights = made.unet.state_dict()
        noise = torch.Generator().manual_seed(0)
        more = torch.randn((*weights["conv_in.weight"].shape[:1], 5, 3, 3), generator=noise) / 20
        weights["conv_in.weight"] = torch.cat([weights["conv_in.weight"], more], dim=1)
        wide.load_state_dict(weights)
        seen: list[torch.Tensor] = []
        wide.conv_in.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        trained = dataclasses.replace(made, unet=wide)
        drawn({**BASE, **MASKED}, canvas_of(PICTURE, HOLE), by=trained)
        first, last = seen[0], seen[-1]
        assert first.shape[2:] == (8, 10)
        assert last.shape[2:] == (12, 15)
        assert last[0, 4].sum() == 6 * 5, "the cells of the larger hole"
        seen.clear()
        drawn(BASE, by=trained)
        assert seen[-1].shape == (2, 9, 12, 15)
        assert (seen[-1][:, 4] == 1).all()


class TestStages:
    def plan(self, **fields: Any) -> list[tuple[str, int, set[str]]]:
        cuts = {"denoising_end", "denoising_start", "strength"}
        request = parse_request({"prompt": PROMPT, **fields})
        return [
            (stage.label, stage.steps, cuts & set(stage.options))
            for stage in plan_stages(request, models())
        ]

    def test_the_second_pass_comes_between_base_and_refiner(self) -> None:
        second = ("hires", 10, {"strength"})
        refiner = ("refiner", 15, {"strength"})
        assert self.plan(hires={}) == [("base", 25, set()), second, refiner]
        assert self.plan(hires={}, **REDRAW) == [("base", 18, {"strength"}), second, refiner]
        assert self.plan(hires={"steps": 20}, refiner_inference_steps=0) == [
            ("base", 25, set()),
            ("hires", 8, {"strength"}),
        ]

    def test_the_second_pass_is_the_one_that_hands_over(self) -> None:
        assert self.plan(hires={"steps": 50}, high_noise_frac=0.8) == [
            ("base", 25, set()),
            ("hires", 10, {"strength", "denoising_end"}),
            ("refiner", 10, {"denoising_start"}),
        ]

    def test_without_a_refiner_the_base_does_both(self) -> None:
        alone = dataclasses.replace(models(), refiner_unet=None)
        request = parse_request({"prompt": PROMPT, "hires": {}})
        stages = plan_stages(request, alone)
        assert [stage.label for stage in stages] == ["base", "hires"]
        assert as_drawn(request, stages).refiner_inference_steps == 0
        with pytest.raises(RequestError, match="high_noise_frac: needs the refiner"):
            plan_stages(parse_request({**SMALL, "hires": {}, "high_noise_frac": 0.8}), alone)

    @pytest.mark.parametrize(
        ("fields", "problem"),
        [
            (
                {"hires": {"strength": 0.03}},
                "hires.strength: 0.03 of 25 steps leaves the second pass no step; the smallest "
                "value that works is 0.04",
            ),
            (
                {"hires": {"steps": 2}},
                "hires.strength: 0.4 of 2 steps leaves the second pass no step; the smallest "
                "value that works is 0.5",
            ),
            (
                {"hires": {"strength": 0.2}, "high_noise_frac": 0.8},
                "hires.strength: 0.2 of 25 steps, of which the refiner does 5, leaves the second "
                "pass no step; the smallest value that works is 0.24",
            ),
        ],
    )
    def test_no_step_is_refused_with_the_smallest_value_that_works(
        self, fields: dict[str, Any], problem: str
    ) -> None:
        with pytest.raises(RequestError) as caught:
            plan_stages(parse_request({"prompt": PROMPT, **fields}), models())
        assert str(caught.value) == problem

    def test_a_few_step_model_s_steps_are_those_of_both_passes(self) -> None:
        few_step = dataclasses.replace(LIGHTNING, steps=4)
        request = parse_request({"prompt": PROMPT, "hires": {}})
        request = with_settings_of(request, few_step)
        stages = plan_stages(request, models())
        assert [(stage.label, stage.steps) for stage in stages] == [("base", 4), ("hires", 1)]

    @pytest.mark.parametrize("name", ["DDIM", "K_DPM_2_ANCESTRAL"])
    @pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
    def test_the_planned_steps_are_done_and_told(self, settings: dict[str, Any], name: str) -> None:
        settings = {**settings, "hires": {"strength": 0.8}}
        steps: list[Step] = []
        request = parse_request({**settings, "scheduler": name})
        drawn({**settings, "scheduler": name, "num_images": 2}, on_step=steps.append)
        stages = plan_stages(request, models())
        assert len(steps) == total_steps(stages)
        assert list(dict.fromkeys(step.stage for step in steps)) == [s.label for s in stages]
        percents = [step.percent for step in steps]
        assert percents == sorted(percents)
        assert percents[-1] == 100
        sizes = {step.stage: step.latents().shape[2:] for step in steps}
        assert sizes["base"] == (8, 10)
        assert sizes["hires"] == (12, 15)


class TestSizes:
    @pytest.mark.parametrize(
        ("fields", "drawn_px", "final_px"),
        [
            ({}, (128, 128), (128, 128)),
            ({"hires": {}}, (192, 192), (192, 192)),
            ({"width": 72, "hires": {"scale": 1.3}}, (96, 168), (96, 168)),
            ({"width": 72, "upscale": {"factor": 1.3}}, (72, 128), (94, 166)),
            ({"width": 72, "hires": {}, "upscale": {"factor": 4}}, (112, 192), (448, 768)),
            ({"hires": {"scale": 1.01}}, (128, 128), (128, 128)),
        ],
    )
    def test_of_a_text(
        self, fields: dict[str, Any], drawn_px: tuple[int, int], final_px: tuple[int, int]
    ) -> None:
        request = parse_request({"prompt": PROMPT, **fields})
        stages = plan_stages(request, models())
        assert drawn_sizes_px(stages, None)[-1] == output_size_px(stages, None) == drawn_px
        assert final_size_px(request, stages, None) == final_px

    def test_of_a_picture_and_of_one_that_nothing_is_done_to(self) -> None:
        canvas = canvas_of(PICTURE)
        request = parse_request({"prompt": PROMPT, **REDRAW, "hires": {}, "upscale": {"factor": 3}})
        stages = plan_stages(request, models())
        assert drawn_sizes_px(stages, canvas) == [(80, 64), LARGER]
        assert final_size_px(request, stages, canvas) == (360, 288)
        url = {"image_url": "https://example.com/a.png", "strength": 0}
        request = parse_request({"prompt": PROMPT, **url, "upscale": {"factor": 1.1}})
        assert plan_stages(request, models()) == ()
        assert final_size_px(request, (), canvas) == (88, 70)

    def test_of_a_mask_it_is_the_picture_s_and_what_is_drawn_another(self) -> None:
        canvas = canvas_of(noise_picture(85, 71), np.ones((71, 85), bool))
        request = parse_request({"prompt": PROMPT, **MASKED, "hires": {}})
        stages = plan_stages(request, models())
        assert drawn_sizes_px(stages, canvas) == [(88, 72), (128, 112)]
        assert final_size_px(request, stages, canvas) == (128, 106)

    @pytest.mark.parametrize(
        ("fields", "problem"),
        [
            (
                {"width": 2688, "height": 1536, "hires": {"scale": 2}},
                "hires.scale: 2688 x 1536 would become 5376 x 3072, and no side may be over 4096; "
                "1.52 is the most that works",
            ),
            (
                {"width": 1344, "height": 768, "hires": {}, "upscale": {}},
                None,
            ),
            (
                {"width": 1344, "height": 768, "hires": {}, "upscale": {"factor": 3}},
                "upscale.factor: 2016 x 1152 would become 6048 x 3456, and no side may be over "
                "4096; 2.03 is the most that works",
            ),
            (
                {"width": 4096, "height": 64, "upscale": {"factor": 1.5}},
                "upscale.factor: 4096 x 64 would become 6144 x 96, and no side may be over 4096; "
                "leave it out",
            ),
        ],
    )
    def test_sides_beyond_the_limit_are_refused_by_the_field(
        self, fields: dict[str, Any], problem: str | None
    ) -> None:
        request = parse_request({"prompt": PROMPT, **fields})
        if problem is None:
            plan_stages(request, models())
            return
        with pytest.raises(RequestError) as caught:
            plan_stages(request, models())
        assert str(caught.value) == problem

    def test_what_is_drawn_of_a_small_box_counts_too(self) -> None:
        mask = np.ones((64, 64), bool)
        canvas = padded(noise_picture(64, 64), mask, mask_padding=0, native_size_px=2048)
        assert canvas.working.size == (2048, 2048)
        request = parse_request({"prompt": PROMPT, **MASKED, "hires": {"scale": 2}})
        stages = plan_stages(request, models())
        assert final_size_px(request, stages, canvas) == (128, 128)


def test_the_memory_is_planned_for_the_larger_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    models()  # their start draws, too
    asked: list[dict[str, Any]] = []

    def fits(*_: Any, **size: Any) -> None:
        asked.append(size)

    def plan(*_: Any, **what: Any) -> Plan:
        asked.append(what)
        return Plan(2, slicing=False, tiling=False)

    monkeypatch.setattr(generate_module.batches, "check_fits", fits)
    monkeypatch.setattr(generate_module.batches, "plan", plan)
    drawn({**BASE, "num_images": 2})
    steered: dict[str, Any] = {"controls": (), "image_prompts": ()}
    assert asked == [
        {"width_px": 120, "height_px": 96, **steered},
        {"num_images": 2, "pixels": 120 * 96, "encodes": True, **steered},
    ]


class TestWhatGoesWrong:
    @pytest.fixture
    @staticmethod
    def counted() -> Any:
        before = dict(second_tries.COUNTS)
        return lambda what: second_tries.COUNTS[what] - before.get(what, 0)

    def test_a_first_pass_without_a_picture_is_drawn_again(
        self, monkeypatch: pytest.MonkeyPatch, counted: Any
    ) -> None:
        outcomes: list[bool] = []

        def fails_once(latents: torch.Tensor, vae: Any, *, may_be_black: bool) -> Any:
            outcomes.append(len(outcomes) > 0)
            return decode(latents, vae, may_be_black=may_be_black) if outcomes[-1] else None

        expected = drawn(BASE)[0]
        monkeypatch.setattr(generate_module, "decode", fails_once)
        assert same(drawn(BASE)[0], expected)
        assert counted("drawn again") == 1
        assert len(outcomes) == 3
        monkeypatch.setattr(generate_module, "decode", lambda *_, **__: None)
        with pytest.raises(PictureError, match="the models gave no picture"):
            drawn(BASE)

    def test_what_is_too_large_to_encode_is_encoded_in_tiles(self, counted: Any) -> None:
        made = fresh_models()
        encode = made.vae.encode

        def fail(image: torch.Tensor) -> Any:
            if image.shape[2] == 96 and not made.vae.use_tiling:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return encode(image)

        made.vae.encode = fail
        assert drawn(BASE, by=made)[0].size == LARGER
        assert counted("encoded in tiles") == 1
        assert not made.vae.use_tiling, "nothing stays"

    @pytest.mark.parametrize("stage", ["base", "hires", "refiner", "enlarging"])
    def test_it_ends_where_it_is_stopped_and_the_next_is_as_ever(self, stage: str) -> None:
        class StoppedError(Exception):
            pass

        plain = {**SMALL, "refiner_inference_steps": 0}
        [expected] = drawn(plain)

        def stop(step: Step) -> None:
            if step.stage == stage:
                raise StoppedError

        def enlarge(picture: Image.Image, size_px: tuple[int, int]) -> Image.Image:
            if stage == "enlarging":
                raise StoppedError
            return by_lanczos(picture, size_px)

        with pytest.raises(StoppedError):
            drawn(REFINED, on_step=stop, enlarge=enlarge)
        assert same(drawn(plain)[0], expected)


def test_without_a_way_to_enlarge_it_is_lanczos() -> None:
    request = parse_request(BASE)
    stages = plan_stages(request, models())
    [got] = generate(request, stages, models(), steering=NO_STEERING)
    assert same(got, drawn(BASE)[0])


@pytest.mark.parametrize("interval", [2, 3])
def test_the_step_cache_begins_anew_in_the_second_pass(interval: int) -> None:
    [got] = drawn(BASE, step_cache_interval=interval)
    assert got.size == LARGER
    assert 0 < difference(got, drawn(BASE)[0]) < 40
