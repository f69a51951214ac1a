"""The published JSON Schema and the worker's validation agree, on inputs drawn from the schema.

Some differences are meant: `null` and empty values of `NOT_GIVEN` mean "not given", which a client
need not send; half a character, which JSON can carry, is refused; and JSON Schema cannot say that
there are as many `upload_urls` as pictures, nor that tokens differ, nor that a ControlNet starts
before it ends.
"""

import json
import re
from typing import Annotated, Any, Literal

import jsonschema
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from sdxl_worker.errors import RequestError
from sdxl_worker.field_types import CONTROL_SPELLINGS, Side
from sdxl_worker.input_model import InputModel
from sdxl_worker.request import NOT_GIVEN, Request, parse_request
from sdxl_worker.samplers import SCHEDULE_SPELLINGS, SPELLINGS
from sdxl_worker.wording import MAX_PROBLEMS_TOLD, problems
from tests.from_schema import anything, nearly, valid

# The same inputs at each run, wherever it is and however busy the machine.
QUICK = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    max_examples=60,
)
SCHEMA = Request.model_json_schema()
PUBLISHED = jsonschema.Draft202012Validator(SCHEMA)


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_nulls(one) for name, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value


def beside(field: str) -> dict[str, Any]:
    """What any value of the field goes with."""
    with_picture = {"prompt": "a", "image_url": "https://example.com/a.png"}
    if field in ("mask_invert", "mask_blur", "mask_padding"):
        return {**with_picture, "mask_url": "https://example.com/mask.png"}
    if field in ("refiner_strength", "fit"):
        return {**with_picture, "mode": "img2img"}
    if field == "return_maps":
        control = {"type": "canny", "image_url": "https://example.com/a.png"}
        return {"prompt": "a", "controlnet": [control]}
    return with_picture if field in ("mode", "mask_url", "mask_from_alpha") else {"prompt": "a"}


def own_name(field: str, value: Any) -> Any:
    """What the worker calls a sampler, a schedule or a type of control picture, any other value as
    it is."""
    if field == "scheduler":
        return SPELLINGS[value][0]
    if field == "controlnet":
        return [{**one, "type": CONTROL_SPELLINGS[one["type"]]} for one in value]
    return SCHEDULE_SPELLINGS[value] if field == "schedule" else value


def matching(job_input: dict[str, Any]) -> dict[str, Any]:
    """The input without what only the worker takes, or only the worker refuses."""
    for name, none in NOT_GIVEN:
        if name in job_input and job_input[name] == none and job_input[name] is not False:
            job_input = {**job_input, name: None}
    if isinstance(job_input.get("upload_urls"), list):
        job_input = {**job_input, "num_images": len(job_input["upload_urls"])}
    if isinstance(job_input.get("embeddings"), list):
        job_input = {**job_input, "embeddings": job_input["embeddings"][:1]}
    if isinstance(job_input.get("controlnet"), list):
        job_input = {**job_input, "controlnet": [*map(starting, job_input["controlnet"])]}
    return job_input


def starting(control: Any) -> Any:
    """The entry of `controlnet`, without a start that is not before its end."""
    if not isinstance(control, dict):
        return control
    given = {"start": 0, "end": 1} | without_nulls(control)
    start, end = given["start"], given["end"]
    if all(isinstance(one, int | float) and 0 <= one <= 1 for one in (start, end)) and start >= end:
        return {name: one for name, one in control.items() if name not in ("start", "end")}
    return control


def refusal(model: type[InputModel], job_input: Any) -> list[str]:
    """The lines that refuse an input: none where it is accepted."""
    try:
        if model is Request:
            parse_request(job_input)
        else:
            model.model_validate(job_input)
    except RequestError as error:
        return str(error).splitlines()
    except ValidationError as error:
        return problems(error, model)
    return []


def named(line: str) -> str:
    """The field of the input that a line of a refusal is about."""
    if line.startswith('"'):  # the caller's word
        return str(json.JSONDecoder().raw_decode(line)[0])
    return re.split(r"[.\[:]", line, maxsplit=1)[0]


def broken_fields(
    model: type[InputModel], validator: jsonschema.Draft202012Validator, job_input: dict[str, Any]
) -> set[str]:
    """The fields of the input that jsonschema finds fault with."""
    broken: set[str] = set()
    for error in validator.iter_errors(job_input):
        if error.absolute_path:
            broken.add(str(error.absolute_path[0]))
        elif error.validator == "additionalProperties":
            # pydantic tells half a character in a name by its escape.
            sent = {name.encode(errors="backslashreplace").decode() for name in job_input}
            broken |= sent - set(model.model_fields)
        elif error.absolute_schema_path[0] == "dependentSchemas":
            broken.add(str(error.absolute_schema_path[1]))
        else:
            assert error.validator == "anyOf", error
            broken.add("prompt")
    return broken


def assert_both_judge_alike(
    model: type[InputModel], validator: jsonschema.Draft202012Validator, job_input: dict[str, Any]
) -> None:
    lines = refusal(model, job_input)
    told = {named(line) for line in lines[:MAX_PROBLEMS_TOLD]}
    broken = broken_fields(model, validator, without_nulls(job_input))
    if len(lines) > MAX_PROBLEMS_TOLD:
        assert told <= broken
    else:
        assert told == broken, lines


@pytest.mark.parametrize("field", SCHEMA["properties"])
def test_what_the_schema_allows_in_a_field_is_accepted_and_kept(field: str) -> None:
    @QUICK
    @given(valid(SCHEMA["properties"][field], SCHEMA))
    def check(value: Any) -> None:
        job_input = matching({**beside(field), field: value})
        PUBLISHED.validate(without_nulls(job_input))
        kept = parse_request(job_input).model_dump(mode="json", exclude_unset=True)
        if job_input[field] is not None and (field, value) != ("seed", -1):
            assert kept[field] == own_name(field, without_nulls(job_input[field]))

    check()


@pytest.mark.parametrize("field", SCHEMA["properties"])
def test_what_the_schema_forbids_in_a_field_is_refused_by_its_name(field: str) -> None:
    @QUICK
    @given(nearly(SCHEMA["properties"][field], SCHEMA))
    def check(value: Any) -> None:
        job_input = matching({**beside(field), field: value})
        assert_both_judge_alike(Request, PUBLISHED, job_input)

    check()


@pytest.mark.parametrize("side", ["height", "width"])
def test_a_side_of_0_is_allowed_and_not_given(side: str) -> None:
    for zero in (0, 0.0):
        job_input = {"prompt": "a", side: zero}
        PUBLISHED.validate(job_input)
        assert getattr(parse_request(job_input), side) is None
    assert not PUBLISHED.is_valid({"prompt": "a", side: False})
    assert named(refusal(Request, {"prompt": "a", side: False})[0]) == side


@QUICK
@given(valid(SCHEMA, SCHEMA))
def test_what_the_schema_allows_is_accepted_and_a_request_can_be_sent_again(
    job_input: dict[str, Any],
) -> None:
    job_input = matching(job_input)
    # Without an empty `controlnet`, `return_maps` may stand alone.
    assume(PUBLISHED.is_valid(job_input))
    request = parse_request(job_input)
    again = json.loads(request.model_dump_json(exclude_none=True))
    PUBLISHED.validate(again)
    assert parse_request(again) == request


@settings(QUICK, max_examples=300)
@given(nearly(SCHEMA, SCHEMA))
def test_the_schema_and_the_worker_find_fault_with_the_same_fields(job_input: Any) -> None:
    if not isinstance(job_input, dict):
        assert named(refusal(Request, job_input)[0]) == "input"
        return
    assert_both_judge_alike(Request, PUBLISHED, matching(job_input))


@QUICK
@given(st.text(st.characters(categories=["Cs"]), min_size=1, max_size=9))
def test_half_a_character_is_refused_wherever_it_is(text: str) -> None:
    assert named(refusal(Request, {"prompt": text})[0]) == "prompt"
    assert "no such field" in refusal(Request, {"prompt": "a", text: 1})[0]


class Part(InputModel):
    kind: Literal["one", "other"]
    scale: Annotated[float, Field(gt=-5, le=5)] = 1.0


class Wide(InputModel):
    """Fields of more kinds than a request has today."""

    parts: Annotated[list[Part | Annotated[str, Field(max_length=9)]], Field(max_length=3)] = []  # noqa: RUF012
    part: Part | None = None
    sides: list[Side] | Side | None = None


@settings(QUICK, max_examples=300)
@given(
    nearly(Wide.model_json_schema(), Wide.model_json_schema()).filter(lambda v: isinstance(v, dict))
)
def test_so_they_do_for_objects_and_lists_inside(job_input: dict[str, Any]) -> None:
    schema = Wide.model_json_schema()
    assert_both_judge_alike(Wide, jsonschema.Draft202012Validator(schema), job_input)


@QUICK
@given(st.dictionaries(st.text(max_size=3) | st.sampled_from(list(SCHEMA["properties"])), anything))
def test_any_json_is_accepted_or_refused_in_few_words(job_input: dict[str, Any]) -> None:
    assert len("\n".join(refusal(Request, job_input))) < 4000
