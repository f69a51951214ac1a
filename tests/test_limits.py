"""What an owner allows of what a request may ask for."""

from typing import Any

import pytest

from sdxl_worker.errors import RequestError
from sdxl_worker.limits import check_limits
from sdxl_worker.request import parse_request
from sdxl_worker.settings import Settings

PROMPT = {"prompt": "a red circle"}


def check(max_steps: int, job_input: dict[str, Any]) -> None:
    check_limits(parse_request(job_input), Settings(max_steps=max_steps))


def test_steps_over_the_owner_s_limit_are_refused_each_by_its_name() -> None:
    with pytest.raises(RequestError) as caught:
        check(30, PROMPT | {"num_inference_steps": 31, "refiner_inference_steps": 500})
    assert str(caught.value) == (
        "num_inference_steps: must be 30 or less, as this worker's owner has set; got 31\n"
        "refiner_inference_steps: must be 30 or less, as this worker's owner has set; got 500"
    )


def test_the_steps_of_the_second_pass_are_held_to_it_too() -> None:
    check(30, PROMPT | {"hires": {"steps": 30}})
    check(10, PROMPT | {"hires": {}})
    with pytest.raises(RequestError) as caught:
        check(30, PROMPT | {"hires": {"steps": 31}})
    assert str(caught.value) == (
        "hires.steps: must be 30 or less, as this worker's owner has set; got 31"
    )


def test_steps_up_to_the_limit_are_taken() -> None:
    check(30, PROMPT | {"num_inference_steps": 30, "refiner_inference_steps": 30})


def test_a_default_over_the_limit_refuses_nobody_who_does_not_name_the_field() -> None:
    check(10, PROMPT)
    check(30, PROMPT | {"num_inference_steps": 30})
    with pytest.raises(RequestError, match="refiner_inference_steps: .* got 50"):
        check(30, PROMPT | {"refiner_inference_steps": 50})


@pytest.mark.parametrize("max_steps", [1, 2, 1000])
def test_a_check_alone_has_steps_of_its_own(max_steps: int) -> None:
    check(max_steps, {"check": True})


def test_a_check_of_a_picture_that_a_caller_asks_for_is_held_to_the_limit() -> None:
    with pytest.raises(RequestError, match="num_inference_steps: .* got 31"):
        check(30, PROMPT | {"check": True, "num_inference_steps": 31})


def test_without_a_setting_all_steps_that_a_request_may_have_are_taken() -> None:
    check_limits(parse_request(PROMPT | {"num_inference_steps": 1000}), Settings())


def test_the_second_pass_is_held_to_the_limit_too() -> None:
    with pytest.raises(RequestError) as caught:
        check(30, PROMPT | {"hires": {"steps": 31}})
    assert str(caught.value) == (
        "hires.steps: must be 30 or less, as this worker's owner has set; got 31"
    )
    check(30, PROMPT | {"hires": {"steps": 30}})
    check(10, PROMPT | {"hires": {}})
