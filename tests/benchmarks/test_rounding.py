"""`benchmarks.rounding` draws in all of its ways, and tells one picture from another."""

import random
from typing import Any

import pytest

from benchmarks import rounding
from benchmarks.company import any_request, side_by_side
from sdxl_worker.drawing.stages import plan_stages
from sdxl_worker.loading.models import Models
from sdxl_worker.request import parse_request


@pytest.fixture(scope="module")
def models() -> Models:
    return rounding.models_on("cpu")


@pytest.mark.parametrize("way", rounding.WAYS)
def test_each_way_is_drawn(way: str, models: Models) -> None:
    job = {**rounding.WAYS[way], "num_inference_steps": 5}
    [one] = rounding.draw(models, **job, seed=1)
    [other] = rounding.draw(models, **job, seed=2)
    assert rounding.compared([one], [one]) == ("0", "0.000%", "99 dB")
    assert rounding.compared([one], [other])[0] != "0"


def test_the_psnr_is_that_of_the_worst_picture(models: Models) -> None:
    job: dict[str, Any] = {"num_inference_steps": 2, "refiner_inference_steps": 0}
    one, other = (rounding.draw(models, **job, seed=seed)[0] for seed in (1, 2))
    worst = rounding.compared([one], [other])[2]
    assert worst != "99 dB"
    assert rounding.compared([one, one, one], [one, other, one])[2] == worst


def test_pictures_in_company_are_compared_with_those_alone(
    models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And passes are shared: a fault in one of more rows than a drawing has shows."""
    name, levels, share, worst = rounding.in_company(models, 3)
    assert name.startswith("3 mixes, ")
    assert int(levels) <= 2
    assert float(share.rstrip("%")) < 1
    assert float(worst.removesuffix(" dB")) > 50
    forward = models.unet.forward

    def spoilt(sample, *arguments, **options):  # type: ignore[no-untyped-def]
        (output,) = forward(sample, *arguments, **options)
        # Four: as many rows as a drawing may have by itself, two pictures with guidance.
        return (output + (len(sample) > 4),)

    monkeypatch.setattr(models.unet, "forward", spoilt)
    assert int(rounding.in_company(models, 3)[1]) > 2


def test_what_fails_in_company_is_told() -> None:
    def fail() -> None:
        raise ValueError("no picture")

    with pytest.raises(ValueError, match="no picture"):
        side_by_side([lambda: None, fail], random.Random(1))  # noqa: S311 - no secret


def test_requests_of_any_kind_are_of_every_kind_and_all_can_be_drawn(models: Models) -> None:
    choose = random.Random(1)  # noqa: S311 - no secret
    requests = [any_request(choose) for _ in range(1000)]
    for request in requests:
        plan_stages(parse_request(request), models)
    for field in ("high_noise_frac", "negative_prompt", "image_url"):
        assert 0 < sum(field in request for request in requests) < 1000
    assert len({request["scheduler"] for request in requests}) == 10
    assert {request["num_images"] for request in requests} == {1, 2}
