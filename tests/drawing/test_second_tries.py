"""What is no picture, and what does not fit: noticed, tried again, and told in the end."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from weakref import ref

import pytest
import torch
from PIL import Image

from sdxl_worker.drawing import batches
from sdxl_worker.drawing import generate as generate_module
from sdxl_worker.drawing.second_tries import COUNTS
from sdxl_worker.errors import PictureError
from sdxl_worker.gpu import is_out_of_memory
from sdxl_worker.loading.models import Models
from sdxl_worker.request import parse_request
from sdxl_worker.speed.cuda_graphs import GraphedForward, forget_recordings
from tests.support import (
    PROMPT,
    REQUESTS,
    canvas_of,
    draw,
    error,
    fresh_models,
    largest_difference,
    models,
    noise_picture,
    run,
)

BASE = {"prompt": PROMPT, "seed": 3, "num_inference_steps": 3, "refiner_inference_steps": 0}
REFINE = {"prompt": PROMPT, "seed": 3, "refiner_inference_steps": 4, "strength": 0.5}
NOISE = canvas_of(noise_picture(64, 64))


@pytest.fixture(autouse=True)
def _from_zero() -> Iterator[None]:
    COUNTS.clear()
    yield
    COUNTS.clear()


@pytest.fixture(scope="module")
def narrow() -> Models:
    """In bfloat16, so that float32 is something else to try."""
    return fresh_models(dtype=torch.bfloat16)


def after(module: Any, change: Callable[[torch.Tensor], Any], *, times: int = 1000) -> Any:
    """A hook that changes what a network gives, the first so many times."""
    left = [times]

    def hook(_: Any, __: Any, output: Any) -> Any:
        if not left[0]:
            return None
        left[0] -= 1
        [tensor, *_rest] = output if isinstance(output, tuple) else [output]
        changed = change(tensor)
        return (changed,) if isinstance(output, tuple) else changed

    return module.register_forward_hook(hook)


def nan(tensor: torch.Tensor) -> torch.Tensor:
    """In one number of one picture."""
    tensor = tensor.clone()
    tensor[-1, 0, 0, 0] = torch.nan
    return tensor


def inf(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[-1, 0, 0, 0] = torch.inf
    return tensor


def black(tensor: torch.Tensor) -> torch.Tensor:
    return torch.full_like(tensor, -1.5)


class TestNoPicture:
    @pytest.mark.parametrize("job_input", REQUESTS.values(), ids=REQUESTS)
    @pytest.mark.parametrize("change", [nan, inf])
    def test_a_unet_that_fails_once_draws_the_same_picture_the_second_time(
        self, change: Any, job_input: Any, narrow: Models
    ) -> None:
        request = parse_request({**job_input, "num_images": 2})
        expected = draw(request, narrow)
        unet = narrow.unet if "refiner_inference_steps" in job_input else narrow.refiner_unet
        hook = after(unet, change, times=1)
        again = draw(request, narrow)
        hook.remove()
        assert [one.tobytes() for one in again] == [one.tobytes() for one in expected]
        assert COUNTS["drawn again"] == 1

    @pytest.mark.parametrize("change", [nan, inf, black])
    def test_a_decoder_that_fails_is_asked_again_in_float32(
        self, change: Any, narrow: Models
    ) -> None:
        request = parse_request({**BASE, "num_images": 2})
        expected = draw(request, narrow)
        hook = after(narrow.vae.decoder, change, times=1)
        again = draw(request, narrow)
        hook.remove()
        for one, other in zip(again, expected, strict=True):
            assert largest_difference(one, other) < 16, "but for the rounding of bfloat16"
        assert COUNTS == {"decoded in float32": 1}
        assert narrow.vae.dtype == torch.bfloat16, "set back"

    @pytest.mark.parametrize(
        ("part", "change"), [("unet", nan), ("vae.decoder", nan), ("vae.decoder", black)]
    )
    def test_what_fails_twice_is_an_error(self, part: str, change: Any, narrow: Models) -> None:
        hook = after(_part(narrow, part), change)
        with pytest.raises(PictureError, match="the models gave no picture"):
            draw(parse_request(BASE), narrow)
        hook.remove()
        in_float32 = {"decoded in float32": 2} if part == "vae.decoder" else {}
        assert {"drawn again": 1, **in_float32} == COUNTS
        assert narrow.vae.dtype == torch.bfloat16
        assert draw(parse_request(BASE), narrow), "the next job draws"

    def test_an_encoder_that_fails_is_an_error(self, narrow: Models) -> None:
        hook = after(narrow.vae.encoder, nan)
        request = parse_request({**REFINE, "image_url": "https://example.com/a.png"})
        with pytest.raises(PictureError):
            draw(request, narrow, NOISE)
        hook.remove()
        assert COUNTS["encoded in float32"] == 1

    def test_an_encoder_that_fails_is_asked_again_in_float32(self, narrow: Models) -> None:
        request = parse_request({**REFINE, "image_url": "https://example.com/a.png"})
        expected = draw(request, narrow, NOISE)
        hook = after(narrow.vae.encoder, nan, times=1)
        [again] = draw(request, narrow, NOISE)
        hook.remove()
        assert largest_difference(again, expected[0]) < 32, "but for the rounding of bfloat16"
        assert COUNTS == {"encoded in float32": 1}
        assert narrow.vae.dtype == torch.bfloat16, "set back"

    def test_the_caller_is_told_and_the_worker_stays(self) -> None:
        hook = after(models().unet, nan)
        assert error(BASE).startswith("the models gave no picture: ")
        hook.remove()
        assert "images" in run(BASE)

    def test_a_dark_picture_may_become_a_black_one(self) -> None:
        request = parse_request({**REFINE, "image_url": "https://example.com/a.png"})
        hook = after(models().vae.decoder, black)
        [picture] = draw(request, models(), canvas_of(Image.new("RGB", (64, 64), (9, 8, 9))))
        assert picture.getextrema() == ((0, 0),) * 3
        with pytest.raises(PictureError):
            draw(request, models(), NOISE)
        hook.remove()

    def test_a_check_tells(self) -> None:
        hook = after(models().unet, nan, times=1)
        assert run({**BASE, "check": True})["second_tries"] == {"drawn again": 1}
        hook.remove()
        assert run({"check": True})["second_tries"] == {"drawn again": 1}, "since the start"


def _part(some_models: Models, path: str) -> Any:
    part: Any = some_models
    for name in path.split("."):
        part = getattr(part, name)
    return part


def too_large_for(module: Any, limit: int, *, failures: list[int]) -> Any:
    """A network whose pass does not fit for more than so many pictures (with guidance, twice that),
    or so many numbers a picture, where it is negative."""

    def check(_: Any, inputs: Any, options: Any) -> None:
        first: torch.Tensor = next(iter([*inputs, *options.values()]))
        size = first.shape[0] if limit > 0 else -first[0].numel()
        if (size > limit) if limit > 0 else (size < limit):
            failures.append(size)
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    return module.register_forward_pre_hook(check, with_kwargs=True)


def test_a_decoder_that_computes_in_float32_is_not_asked_twice() -> None:
    """As SDXL's own, in float16 with `force_upcast`."""
    made = fresh_models(dtype=torch.float16)
    made.vae.register_to_config(force_upcast=True)
    hook = after(made.vae.decoder, black)
    with pytest.raises(PictureError):
        draw(parse_request(BASE), made)
    hook.remove()
    assert COUNTS == {"drawn again": 1}


class TestOutOfMemory:
    def test_the_unet_draws_the_same_pictures_in_smaller_batches(self) -> None:
        request = parse_request({**BASE, "num_images": 5})
        expected = draw(request, models())
        failures: list[int] = []
        hook = too_large_for(models().unet, 2 * 2, failures=failures)
        percents: list[int] = []
        pictures = draw(request, models(), on_step=lambda step: percents.append(step.percent))
        hook.remove()
        assert failures == [2 * 5]
        assert COUNTS == {"drawn in smaller batches": 1}
        for one, other in zip(pictures, expected, strict=True):
            assert largest_difference(one, other) <= 1
        assert percents[-1] == 100
        assert percents == sorted(percents)

    def test_what_the_failed_pass_held_is_free_before_room_is_made(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Else torch could not give its memory back."""
        held: list[ref[torch.Tensor]] = []
        free: list[bool] = []

        def fail(_: Any, __: Any) -> None:
            if not held:
                activation = torch.zeros(8)
                held.append(ref(activation))
                raise torch.OutOfMemoryError

        monkeypatch.setattr(generate_module, "_make_room", lambda _: free.append(held[0]() is None))
        hook = models().unet.register_forward_pre_hook(fail)
        draw(parse_request(BASE), models())
        hook.remove()
        assert free == [True]

    def test_a_step_that_fails_late_draws_the_same_picture(self) -> None:
        """Its generators have drawn noise by then."""
        request = parse_request({**BASE, "scheduler": "K_EULER_ANCESTRAL", "num_images": 2})
        expected = draw(request, models())
        passes = [0]

        def fail_late(*_: Any) -> None:
            passes[0] += 1
            if passes[0] == 3:
                raise torch.OutOfMemoryError

        hook = models().unet.register_forward_pre_hook(fail_late)
        pictures = draw(request, models())
        hook.remove()
        for one, other in zip(pictures, expected, strict=True):
            assert largest_difference(one, other) <= 1

    def test_the_decoder_goes_on_in_tiles_without_drawing_again(self) -> None:
        fresh = fresh_models()
        request = parse_request({**BASE, "num_images": 2})
        [whole, _] = draw(request, fresh)
        steps: list[Any] = []
        failures: list[int] = []
        side = fresh.unet.config.sample_size
        hook = too_large_for(fresh.vae.decoder, -4 * (side // 2) ** 2, failures=failures)
        [tiled, _] = draw(request, fresh, on_step=steps.append)
        hook.remove()
        assert len(failures) == 1
        assert COUNTS == {"decoded in tiles": 1}
        assert len(steps) == 3
        assert tiled.size == whole.size
        assert not fresh.vae.use_tiling, "set back"

    def test_the_encoder_goes_on_in_tiles(self) -> None:
        fresh = fresh_models()
        picture = Image.effect_noise((256, 256), 50).convert("RGB")
        request = parse_request({**REFINE, "image_url": "https://example.com/a.png"})
        failures: list[int] = []
        hook = too_large_for(fresh.vae.encoder, -3 * 128 * 128, failures=failures)
        [refined] = draw(request, fresh, canvas_of(picture))
        hook.remove()
        assert len(failures) == 1
        assert COUNTS == {"encoded in tiles": 1}
        assert not fresh.vae.use_tiling, "set back"
        assert refined.size == (256, 256)

    @pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
    def test_a_text_encoder_is_asked_again(self, part: str) -> None:
        expected = draw(parse_request(BASE), models())
        fresh = fresh_models()  # which have encoded nothing yet
        left = [1]

        def fail_once(*_: Any) -> None:
            if left[0]:
                left[0] -= 1
                raise torch.OutOfMemoryError

        getattr(fresh, part).register_forward_pre_hook(fail_once)
        again = draw(parse_request(BASE), fresh)
        assert left == [0]
        assert again[0].tobytes() == expected[0].tobytes()

    def test_recordings_are_given_up_for_room(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made: list[Any] = []
        monkeypatch.setattr(GraphedForward, "_record", lambda _, key: made.append(key))
        recorded = GraphedForward(lambda: None, torch.device("cpu"))
        for _ in range(2):
            recorded._graph(())
        given_up: list[Any] = []

        def forget(unets: Any) -> None:
            given_up.extend(unets)
            forget_recordings([SimpleNamespace(forward=recorded)])

        monkeypatch.setattr(generate_module, "forget_recordings", forget)
        hook = too_large_for(models().unet, 2, failures=[])
        draw(parse_request({**BASE, "num_images": 2}), models())
        hook.remove()
        assert given_up == models().unets()
        recorded._graph(())
        assert made == [(), ()], "once before, and once after"

    def test_what_never_fits_fails_alone(self) -> None:
        failures: list[int] = []
        hook = too_large_for(models().unet, -1, failures=failures)
        message = error({**BASE, "num_images": 4})
        hook.remove()
        assert message.startswith("not enough GPU memory for this job; ask for fewer or smaller")
        assert len(failures) == len([4, 2, 1, "in tiles"])
        assert "images" in run({**BASE, "num_images": 4})

    def test_another_error_is_not_tried_again(self) -> None:
        passes: list[int] = []

        def fail(*_: Any) -> None:
            passes.append(1)
            raise RuntimeError("a shape that does not fit")

        hook = models().unet.register_forward_pre_hook(fail)
        assert error({**BASE, "num_images": 4}).startswith("the worker failed at this job (Runtime")
        hook.remove()
        assert len(passes) == 1

    @pytest.mark.parametrize(
        ("raised", "expected"),
        [
            (torch.OutOfMemoryError("CUDA out of memory"), True),
            (
                RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
                True,
            ),
            (torch.AcceleratorError("CUDA error: out of memory"), True),
            (RuntimeError("cuDNN error: CUDNN_STATUS_..._DEVICE_ALLOCATION_FAILED"), True),
            (RuntimeError("Triton Error [CUDA]: out of memory"), True),
            (RuntimeError("FIND was unable to find an engine to execute this computation"), True),
            (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
            (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
            (ValueError("out of memory"), False),
        ],
    )
    def test_what_counts_as_out_of_memory(self, raised: Exception, expected: bool) -> None:
        assert is_out_of_memory(raised) is expected

    def test_what_it_came_from_counts(self) -> None:
        with pytest.raises(RuntimeError) as caught:  # noqa: PT012
            try:
                raise torch.OutOfMemoryError
            except RuntimeError:
                raise RuntimeError("the capture failed")  # noqa: B904
        assert is_out_of_memory(caught.value)

    def test_smaller_plans_come_to_an_end(self) -> None:
        plan: batches.Plan | None = batches.Plan(8, slicing=False, tiling=False)
        seen = []
        while plan is not None:
            seen.append((plan.batch_size, plan.slicing, plan.tiling))
            plan = plan.smaller()
        assert seen == [
            (8, False, False),
            (4, True, False),
            (2, True, False),
            (1, False, False),
            (1, False, True),
        ]
