"""What is accepted, what is refused, and what the refusal says."""

import json
import math
import time
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest

from sdxl_worker.errors import RequestError
from sdxl_worker.field_types import MAX_SEED
from sdxl_worker.input_model import MAX_NESTING, MAX_VALUES
from sdxl_worker.request import REDRAW_STRENGTH, Request, parse_request
from sdxl_worker.request_objects import MAX_CONTROLS, MAX_IMAGE_PROMPTS
from sdxl_worker.samplers import SAMPLERS
from sdxl_worker.wording import field_schemas, rule
from tests.support import SCHEDULERS

FIELDS = field_schemas(Request)


def refusal_of(job_input: Any) -> str:
    with pytest.raises(RequestError) as caught:
        parse_request(job_input)
    return str(caught.value)


def refusal(**job_input: Any) -> str:
    return refusal_of({"prompt": "a", **job_input})


def accepted(**job_input: Any) -> Request:
    return parse_request({"prompt": "a", **job_input})


def test_names_and_defaults_are_those_of_2_1_0() -> None:
    request = parse_request({"prompt": "a"})
    assert request.model_dump(exclude={"seed"}) == {
        "prompt": "a",
        "negative_prompt": "",
        "height": None,
        "width": None,
        "scheduler": "DDIM",
        "num_inference_steps": 25,
        "refiner_inference_steps": 50,
        "guidance_scale": 7.5,
        "guidance_end": 1.0,
        "strength": 0.3,
        "image_url": None,
        "num_images": 1,
        "high_noise_frac": None,
        # Fields that 2.1.0 did not have.
        "prompt_2": None,
        "negative_prompt_2": None,
        "prompt_weighting": False,
        "clip_skip": None,
        "schedule": None,
        "guidance_rescale": None,
        "loras": None,
        "embeddings": None,
        "model": None,
        "preview": False,
        "check": False,
        "mode": None,
        "refiner_strength": 0.3,
        "fit": "crop",
        "mask_url": None,
        "mask_from_alpha": False,
        "mask_invert": False,
        "mask_blur": 0,
        "mask_padding": None,
        "controlnet": None,
        "return_maps": False,
        "ip_adapter": None,
        "hires": None,
        "upscale": None,
        "output_format": None,
        "output_quality": 95,
        "on_too_large": "error",
        "duplicate_first": True,
        "upload_urls": None,
    }


def test_the_seven_samplers_of_2_1_0_are_what_they_were() -> None:
    for name, class_name in SCHEDULERS.items():
        assert accepted(scheduler=name).scheduler == name
        assert SAMPLERS[name].class_name == class_name
        assert dict(SAMPLERS[name].config) == {}


def test_a_sampler_s_name_may_give_the_schedule_as_well() -> None:
    both = accepted(scheduler="DPM++ 2M Karras", seed=1)
    assert (both.scheduler, both.schedule) == ("DPMSolverMultistep", "karras")
    assert accepted(scheduler="DPM++ 2M Karras", schedule="Karras", seed=1) == both
    assert accepted(scheduler="DPMSolverMultistep", schedule="karras", seed=1) == both
    assert accepted(scheduler="dpmpp_2m").schedule is None
    assert refusal(scheduler="DPM++ 2M Karras", schedule="sgm_uniform") == (
        "schedule: is another than the one that the scheduler's name gives; leave this out"
    )


def test_a_sampler_that_diffusers_has_not_is_answered_with_the_nearest() -> None:
    assert refusal(scheduler="DPM++ 2S a Karras") == (
        "scheduler: DPM++ 2S a is not done by diffusers; the nearest is DPMSolverSinglestep"
    )


def test_null_means_not_given_for_every_field() -> None:
    nothing = dict.fromkeys(FIELDS)
    assert parse_request({**nothing, "prompt": "a", "seed": 1}) == accepted(seed=1)


def test_an_empty_image_url_means_not_given_as_in_2_1_0() -> None:
    assert accepted(image_url="").image_url is None


def test_an_empty_prompt_is_a_prompt() -> None:
    assert parse_request({"prompt": ""}).prompt == ""


def test_a_picture_needs_no_prompt() -> None:
    assert parse_request({"image_url": "https://example.com/a.png"}).prompt == ""


@pytest.mark.parametrize("job_input", [{}, {"prompt": None}, {"image_url": ""}, {"seed": 1}])
def test_without_prompt_and_picture_the_answer_says_what_is_missing(job_input: Any) -> None:
    with pytest.raises(RequestError, match="^prompt: required, unless image_url is given"):
        parse_request(job_input)


@pytest.mark.parametrize("job_input", [None, [], "a cat", 3, True, [{"prompt": "a"}]])
def test_input_that_is_no_object_is_refused(job_input: Any) -> None:
    with pytest.raises(RequestError, match="^input: must be an object"):
        parse_request(job_input)


BOUNDS = [
    # field, last value in, first value out, on either side
    ("height", 64, 56, 4096, 4104),
    ("width", 64, 56, 4096, 4104),
    ("num_inference_steps", 1, 0, 1000, 1001),
    ("refiner_inference_steps", 0, -1, 1000, 1001),
    ("guidance_scale", 0, -0.001, 100, 100.001),
    ("strength", 0, -0.001, 1, 1.001),
    ("num_images", 1, 0, 16, 17),
    ("high_noise_frac", 0, -0.001, 1, 1.001),
    ("output_quality", 1, 0, 100, 101),
    ("seed", 0, -2, MAX_SEED, MAX_SEED + 1),
]
CONTROL = {"type": "canny", "image_url": "https://example.com/a.png"}
IMAGE_PROMPT = {"image_url": "https://example.com/a.png"}
# Of objects, as above.
BOUNDS_INSIDE = [
    ("controlnet", "scale", 0, -0.001, 4, 4.001),
    ("controlnet", "start", 0, -0.001, 0.999, 1.001),
    ("controlnet", "end", 0.001, -0.001, 1, 1.001),
    ("ip_adapter", "scale", 0, -0.001, 2, 2.001),
    ("hires", "scale", 1, 0.999, 2, 2.001),
    ("hires", "strength", 0.001, 0, 1, 1.001),
    ("hires", "steps", 1, 0, 1000, 1001),
    ("upscale", "factor", 1.001, 1, 4, 4.001),
]


def around(field: str, **inside: Any) -> dict[str, Any]:
    """An input with an object in that field, and its other fields as they need to be."""
    if field == "controlnet":
        return {"controlnet": [{**CONTROL, **inside}]}
    return {field: [{**IMAGE_PROMPT, **inside}] if field == "ip_adapter" else inside}


def inside(request: Request, field: str) -> Any:
    value = getattr(request, field)
    return value[0] if isinstance(value, list) else value


@pytest.mark.parametrize(("field", "lowest", "too_low", "highest", "too_high"), BOUNDS)
def test_bounds_hold_on_both_sides(
    field: str, lowest: float, too_low: float, highest: float, too_high: float
) -> None:
    for value in (lowest, highest):
        assert getattr(accepted(**{field: value}), field) == value
    for value in (too_low, too_high):
        message = refusal(**{field: value})
        assert message == f"{field}: must be {rule(FIELDS[field])}; got {value}"


@pytest.mark.parametrize(
    ("field", "name", "lowest", "too_low", "highest", "too_high"), BOUNDS_INSIDE
)
def test_bounds_hold_inside_too(
    field: str, name: str, lowest: float, too_low: float, highest: float, too_high: float
) -> None:
    for value in (lowest, highest):
        request = accepted(**around(field, **{name: value}))
        assert getattr(inside(request, field), name) == value
    path = f"{field}[0].{name}" if field in ("controlnet", "ip_adapter") else f"{field}.{name}"
    wrong: list[Any] = [too_low, too_high, 10**400, math.nan, True, "1"]
    for one in wrong:
        assert refusal(**around(field, **{name: one})).startswith(f"{path}: must be a")


def test_control_pictures_and_their_like_have_defaults() -> None:
    request = accepted(
        controlnet=[CONTROL], ip_adapter=[IMAGE_PROMPT], hires={}, upscale={"factor": None}
    )
    assert request.model_dump(include={"controlnet", "ip_adapter", "hires", "upscale"}) == {
        "controlnet": [{**CONTROL, "preprocess": True, "scale": 1.0, "start": 0.0, "end": 1.0}],
        "ip_adapter": [{**IMAGE_PROMPT, "type": "plus", "scale": 0.6, "mask_url": None}],
        "hires": {"scale": 1.5, "strength": 0.4, "steps": None, "upscaler": "lanczos"},
        "upscale": {"factor": 2.0, "upscaler": "lanczos"},
    }


@pytest.mark.parametrize(
    ("service", "fields"),
    [
        ("fal", {"controlnet": [{**CONTROL, "scale": 0.5, "start": 0, "end": 0.8}]}),
        ("Replicate", {"controlnet": [{**CONTROL, "scale": 4}]}),
        ("A1111", {"controlnet": [{**CONTROL, "scale": 2, "type": "openpose"}]}),
        ("A1111", {"hires": {"scale": 2, "strength": 0.7, "steps": 20}}),
        ("A1111", {"upscale": {"factor": 4}}),
        ("fal", {"ip_adapter": [{**IMAGE_PROMPT, "scale": 1}]}),
    ],
)
def test_what_other_services_take_is_within_the_bounds(
    service: str, fields: dict[str, Any]
) -> None:
    assert accepted(**fields), service


@pytest.mark.parametrize(
    ("job_input", "name", "meant"),
    [
        # fal
        ({"controlnets": [CONTROL]}, '"controlnets"', "controlnet"),
        (around("controlnet", control_image_url="x"), "controlnet[0].control_image_url", "image_"),
        (around("controlnet", conditioning_scale=1), "controlnet[0].conditioning_scale", "scale"),
        (around("controlnet", start_percentage=0), "controlnet[0].start_percentage", "start"),
        (around("controlnet", end_percentage=1), "controlnet[0].end_percentage", "end"),
        (around("ip_adapter", mask_image_url="x"), "ip_adapter[0].mask_image_url", "mask_url"),
        # A1111
        (around("controlnet", module="canny"), "controlnet[0].module", "type"),
        (around("controlnet", weight=1), "controlnet[0].weight", "scale"),
        (around("controlnet", guidance_start=0), "controlnet[0].guidance_start", "start"),
        (around("controlnet", guidance_end=1), "controlnet[0].guidance_end", "end"),
        (around("hires", hr_scale=2), "hires.hr_scale", "scale"),
        (around("hires", denoising_strength=0.4), "hires.denoising_strength", "strength"),
        (around("hires", hr_second_pass_steps=9), "hires.hr_second_pass_steps", "steps"),
        (around("hires", hr_upscaler="x"), "hires.hr_upscaler", "upscaler"),
        (around("upscale", upscaling_resize=2), "upscale.upscaling_resize", "factor"),
    ],
)
def test_other_services_names_are_told_what_they_are_here(
    job_input: dict[str, Any], name: str, meant: str
) -> None:
    message = refusal(**job_input)
    assert f"{name}: no such field (did you mean {meant}" in message


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("openpose", "pose"),
        ("hed", "softedge"),
        ("teed", "softedge"),
        ("mlsd", "lineart"),
        ("segmentation", "segment"),
        ("inpaint", "repaint"),
    ],
)
def test_types_go_by_the_names_of_other_services_too(spelling: str, name: str) -> None:
    request = accepted(controlnet=[{**CONTROL, "type": spelling, "preprocess": False}])
    assert inside(request, "controlnet").type == name


@pytest.mark.parametrize(
    "kind", ["softedge", "hed", "scribble", "lineart", "normal", "segment", "segmentation"]
)
@pytest.mark.parametrize("preprocess", [True, None])
def test_a_type_without_a_preprocessing_needs_a_finished_map(
    kind: str, preprocess: bool | None
) -> None:
    told = refusal(controlnet=[CONTROL, {**CONTROL, "type": kind, "preprocess": preprocess}])
    word = {"hed": "hed (softedge)", "segmentation": "segmentation (segment)"}.get(kind, kind)
    assert told.startswith(f"controlnet[1].preprocess: there is no preprocessing for {word}: ")
    assert told.endswith(": send a finished map, with preprocess false")
    assert "\n" not in told


@pytest.mark.parametrize(("start", "end"), [(0.5, 0.5), (0.6, 0.5), (None, 0), (1, None), (1, 1)])
def test_a_controlnet_starts_before_it_ends(start: float | None, end: float | None) -> None:
    told = refusal(controlnet=[{**CONTROL, "start": start, "end": end}])
    assert told.startswith("controlnet[0].start: must be less than end (")


def test_all_that_is_wrong_inside_is_told_by_its_path() -> None:
    told = refusal(
        controlnet=[{"type": "cany"}, {**CONTROL, "image_url": "edges.png", "scale": 9}],
        ip_adapter=[{**IMAGE_PROMPT, "mask_url": "", "type": "faceid"}],
        hires={"upscaler": "../4x.pth", "steps": 1.5},
        upscale=2,
    )
    assert [line.partition(": ")[0] for line in told.splitlines()] == [
        "controlnet[0].type",
        "controlnet[0].image_url",
        "controlnet[1].image_url",
        "controlnet[1].scale",
        "ip_adapter[0].type",
        "ip_adapter[0].mask_url",
        "hires.steps",
        "hires.upscaler",
        "upscale",
    ]


@pytest.mark.parametrize(
    ("field", "most"), [("controlnet", MAX_CONTROLS), ("ip_adapter", MAX_IMAGE_PROMPTS)]
)
def test_there_are_only_so_many(field: str, most: int) -> None:
    [one] = around(field)[field]
    assert len(getattr(accepted(**{field: [one] * most}), field)) == most
    told = refusal(**{field: [one] * (most + 1)})
    assert told.startswith(f"{field}: must be a list of at most {most}, each an object with ")
    assert told.endswith(f"; got a list of {most + 1}")


@pytest.mark.parametrize("field", ["controlnet", "ip_adapter"])
def test_an_empty_list_means_none(field: str) -> None:
    assert getattr(accepted(**{field: []}), field) is None
    assert refusal(return_maps=True, controlnet=[]) == "return_maps: needs controlnet"


@pytest.mark.parametrize(
    "upscaler",
    ["../x.pth", "/etc/passwd", "a/b.pth", "..\\x", "C:x", "https://example.com/x.pth", "", " x"],
)
def test_an_upscaler_is_a_file_s_name_and_no_path(upscaler: str) -> None:
    for field in ("hires", "upscale"):
        assert refusal(**{field: {"upscaler": upscaler}}) == (
            f"{field}.upscaler: must be lanczos, or a file name in the worker's UPSCALER_DIR; got "
            + json.dumps(upscaler)
        )


@pytest.mark.parametrize("field", ["height", "width"])
@pytest.mark.parametrize("value", [65, 1000 + 4, 1023])
def test_sides_are_multiples_of_8(field: str, value: int) -> None:
    assert refusal(**{field: value}).endswith(f"a multiple of 8; got {value}")


@pytest.mark.parametrize("field", ["height", "width"])
@pytest.mark.parametrize("none", [0, 0.0, None])
def test_a_side_of_0_is_not_given(field: str, none: Any) -> None:
    assert getattr(accepted(**{field: none}), field) is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("height", 1024.0),
        ("width", 64.0),
        ("seed", 7.0),
        ("num_inference_steps", 25.0),
        ("refiner_inference_steps", 0.0),
        ("num_images", 2.0),
    ],
)
def test_integral_floats_are_integers(field: str, value: float) -> None:
    got = getattr(accepted(**{field: value}), field)
    assert got == int(value)
    assert isinstance(got, int)


@pytest.mark.parametrize("field", ["guidance_scale", "strength"])
def test_integers_are_numbers(field: str) -> None:
    assert getattr(accepted(**{field: 1}), field) == 1.0


NUMERIC = [
    "height",
    "width",
    "seed",
    "num_inference_steps",
    "refiner_inference_steps",
    "guidance_scale",
    "strength",
    "num_images",
    "high_noise_frac",
]


@pytest.mark.parametrize("field", NUMERIC)
@pytest.mark.parametrize("value", [True, False, "1", "0.5", "", [], {}, math.nan, math.inf, 1e400])
def test_what_is_no_number_is_refused_for_a_number(field: str, value: Any) -> None:
    assert refusal(**{field: value}).startswith(f"{field}: must be a")


@pytest.mark.parametrize("field", ["preview", "check", "duplicate_first"])
@pytest.mark.parametrize("value", [0, 1, "true", "", []])
def test_switches_are_true_or_false(field: str, value: Any) -> None:
    assert refusal(**{field: value}).startswith(f"{field}: must be true or false; got ")


def test_a_check_needs_no_prompt_of_its_own() -> None:
    assert parse_request({"check": True}).num_inference_steps == 2
    assert parse_request({"check": True, "seed": None}).num_inference_steps == 2
    with pytest.raises(RequestError, match="prompt: required"):
        parse_request({"check": True, "seed": 3})
    assert accepted(check=True).num_inference_steps == 25


@pytest.mark.parametrize("field", [name for name in NUMERIC if "int" in rule(FIELDS[name])])
def test_fractions_are_refused_for_an_integer(field: str) -> None:
    assert refusal(**{field: 64.5}).startswith(f"{field}: must be an integer")


@pytest.mark.parametrize("field", ["prompt", "negative_prompt", "scheduler", "image_url"])
@pytest.mark.parametrize("value", [1, 1.5, True, [], ["a"], {"a": 1}])
def test_what_is_no_text_is_refused_for_text(field: str, value: Any) -> None:
    assert refusal(**{field: value}).startswith(f"{field}: must be ")


def test_huge_numbers_get_a_short_answer() -> None:
    assert len(refusal(seed=10**300, guidance_scale=10**300)) < 300


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_prompts_have_a_length_limit(field: str) -> None:
    assert len(getattr(accepted(**{field: "x" * 20_000}), field)) == 20_000
    message = refusal(**{field: "x" * 20_001})
    assert message == (
        f"{field}: must be a string of at most 20000 characters; got a string of 20001 characters"
    )


@pytest.mark.parametrize(
    "value",
    [
        "/etc/passwd",
        "file:///etc/passwd",
        "cat.png",
        "ftp://example.com/a.png",
        "http:///etc/passwd",
        "data:text/plain;base64,aGk=",
        "//example.com/a.png",
    ],
)
def test_only_web_addresses_and_data_uris_lead_to_a_picture(value: str) -> None:
    assert refusal(image_url=value).startswith("image_url: must be an http:// or https:// address")


def test_an_unknown_scheduler_is_answered_with_the_choices_and_the_near_match() -> None:
    assert refusal(scheduler="k_eulr") == (
        f"scheduler: must be one of {', '.join(SAMPLERS)}, or a name of these in docs/samplers.md; "
        'got "k_eulr" (did you mean k_euler?)'
    )
    assert refusal(scheduler="DPM++ 2M Karas").endswith("(did you mean DPM++ 2M Karras?)")
    assert refusal(schedule="karas") == (
        "schedule: must be one of normal, karras, exponential, beta, trailing, ays, or a name of "
        'these in docs/samplers.md; got "karas" (did you mean Karras?)'
    )
    assert "did you mean" not in refusal(scheduler="nope")


def test_an_unknown_field_is_answered_with_the_fields_and_the_near_match() -> None:
    message = refusal(guidence_scale=3)
    assert message.startswith('"guidence_scale": no such field (did you mean guidance_scale?)')
    assert "the fields are prompt, negative_prompt, prompt_2" in message
    assert "(did you mean" not in refusal(colour=3)
    for name in ("quality", "image_format", "outputformat"):
        assert "(did you mean output_" in refusal(**{name: 3})
    assert "(did you mean jpeg?)" in refusal(output_format="jpg")


def test_all_problems_are_told_at_once_a_line_each() -> None:
    with pytest.raises(RequestError) as caught:
        parse_request({"height": 65, "seed": True, "scheduler": "x", "sed": 1, "strength": "1"})
    lines = str(caught.value).splitlines()
    fields = [line.partition(":")[0] for line in lines]
    assert fields == ['"sed"', "prompt", "height", "seed", "scheduler", "strength"]


def test_an_error_does_not_repeat_long_values_or_a_url_s_query() -> None:
    assert refusal(num_images="9" * 5000) == (
        "num_images: must be an integer from 1 to 16; got a string of 5000 characters"
    )
    assert "hunter2" not in refusal(image_url="ftp://user:hunter2@example.com/a?key=hunter2")


def test_an_address_that_cannot_be_parsed_is_refused_like_any_other() -> None:
    assert refusal(image_url="ftp://[bad?key=1").endswith('got "ftp://[bad"')


def test_a_seed_is_drawn_where_none_is_given() -> None:
    for job_input in ({}, {"seed": None}, {"seed": -1}, {"seed": -1.0}):
        drawn = {accepted(**job_input).seed for _ in range(20)}
        assert len(drawn) == 20
        assert all(0 <= seed < 2**32 for seed in drawn)
        assert max(drawn) >= 2**16, "2.1.0 drew 16 bits"


def test_a_request_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        accepted().seed = 3


def test_the_json_schema_has_the_bounds_and_the_defaults() -> None:
    schema = Request.model_json_schema()
    assert schema["additionalProperties"] is False
    assert json.loads(json.dumps(schema)) == schema
    steps = schema["properties"]["num_inference_steps"]
    assert (steps["minimum"], steps["maximum"], steps["default"]) == (1, 1000, 25)
    assert all("description" in field for field in schema["properties"].values())


@pytest.mark.parametrize(
    ("job_input", "accepted"),
    [
        ({"prompt": "a"}, True),
        ({"image_url": "https://example.com/a.png"}, True),
        ({"image_url": None}, False),
        ({"check": True}, True),
        ({"seed": 3}, False),
        ({}, False),
        ({"check": True, "seed": 3}, False),
        ({"check": False}, False),
        ({"prompt": "a", "check": True, "seed": 3}, True),
    ],
)
def test_the_json_schema_ties_fields_together_as_the_worker_does(
    job_input: dict[str, Any], accepted: bool
) -> None:
    assert (
        jsonschema.Draft202012Validator(Request.model_json_schema()).is_valid(job_input) == accepted
    )
    if accepted:
        parse_request(job_input)
    else:
        with pytest.raises(RequestError, match="^prompt: required, unless image_url is given"):
            parse_request(job_input)


INSIDE = ("controlnet", "ip_adapter", "hires", "upscale")
PICTURE = {"image_url": "https://example.com/a.png"}
MASK = {**PICTURE, "mask_url": "https://example.com/mask.png"}


@pytest.mark.parametrize(
    ("job_input", "field", "problem"),
    [
        ({"prompt": "a", "mode": "img2img"}, "mode", "needs image_url"),
        ({"prompt": "a", "mask_url": MASK["mask_url"]}, "mask_url", "needs image_url"),
        ({"prompt": "a", "mask_from_alpha": True}, "mask_from_alpha", "needs image_url"),
        ({**MASK, "mode": "refine"}, "mask_url", "does not go with mode refine"),
        (
            {**PICTURE, "mode": "refine", "mask_from_alpha": True},
            "mask_from_alpha",
            "does not go with mode refine",
        ),
        ({**PICTURE, "mask_blur": 1}, "mask_blur", "needs a mask: mask_url, or mask_from_alpha"),
        ({**PICTURE, "mask_padding": 8}, "mask_padding", "needs a mask"),
        ({**PICTURE, "mask_invert": True}, "mask_invert", "needs a mask"),
        ({**PICTURE, "mask_from_alpha": False, "mask_blur": 1}, "mask_blur", "needs a mask"),
        ({**PICTURE, "refiner_strength": 0.4}, "refiner_strength", "needs mode img2img"),
        ({**PICTURE, "fit": "pad"}, "fit", "needs image_url and mode"),
        *(
            (
                {**PICTURE, **fields, **around(name)},
                name,
                "is for the base, and image_url alone is for the refiner: add mode img2img",
            )
            for name in ("controlnet", "ip_adapter", "hires")
            for fields in ({}, {"mode": "refine"})
        ),
        ({"prompt": "a", "return_maps": True}, "return_maps", "needs controlnet"),
        ({"prompt": "a", "upload_urls": ["https://a/1"] * 2}, "upload_urls", "must all differ"),
        ({"prompt": "a", "upload_urls": ["https://a/1", "https://a/2"]}, "upload_urls", "got 2"),
    ],
)
def test_a_field_without_what_it_goes_with_is_refused(
    job_input: dict[str, Any], field: str, problem: str
) -> None:
    with pytest.raises(RequestError) as caught:
        parse_request(job_input)
    [line] = str(caught.value).splitlines()
    assert line.startswith(f"{field}: ")
    assert problem in line


@pytest.mark.parametrize(
    "job_input",
    [
        {**PICTURE, "mode": "img2img", "refiner_strength": 0.1, "fit": "stretch"},
        {**PICTURE, "mode": "refine", "fit": "pad"},
        {**MASK, "mask_invert": True, "mask_blur": 4, "mask_padding": 32, "refiner_strength": 0},
        {**PICTURE, "mask_from_alpha": True, "mask_invert": True, "fit": "crop"},
        {**MASK, "mask_from_alpha": False, "mask_invert": False},
        {**MASK, "mask_from_alpha": True, "mask_invert": True},
        {**PICTURE, "mask_from_alpha": False, "mask_invert": False},
        *({**PICTURE, "mode": "img2img", **around(name)} for name in INSIDE),
        *({**MASK, **around(name)} for name in INSIDE),
        {"prompt": "a", "return_maps": True, **around("controlnet")},
        {"prompt": "a", "return_maps": False},
        {**PICTURE, "controlnet": [], "ip_adapter": [], "hires": None, "return_maps": False},
        {**PICTURE, "upscale": {}},
        {
            "prompt": "a",
            "mask_invert": False,
            "mask_blur": 0,
            "fit": "crop",
            "refiner_strength": 0.3,
        },
    ],
)
def test_fields_that_go_together_are_accepted(job_input: dict[str, Any]) -> None:
    parse_request(job_input)


def test_what_belongs_beside_the_input_is_told_so() -> None:
    assert refusal(s3Config={"accessSecret": "hunter2"}) == (
        "s3Config: belongs beside input, not in it: {input: ..., s3Config: ...}"
    )


def test_an_empty_mask_address_is_a_mistake_not_none() -> None:
    """Without a mask, what it was to protect would be redrawn."""
    assert refusal(**{**PICTURE, "mask_url": ""}).startswith("mask_url: must be an http://")


def test_broken_ties_are_told_all_at_once_beside_other_problems() -> None:
    with pytest.raises(RequestError) as caught:
        parse_request({"prompt": "a", "mode": "img2img", "fit": "cut", "mask_blur": 3, "seed": "1"})
    fields = {line.partition(":")[0] for line in str(caught.value).splitlines()}
    assert fields == {"mode", "fit", "mask_blur", "seed"}


@pytest.mark.parametrize(
    ("job_input", "mode", "strength"),
    [
        ({"prompt": "a"}, None, 0.3),
        (PICTURE, None, 0.3),
        ({**PICTURE, "mode": "refine"}, "refine", 0.3),
        ({**PICTURE, "mode": "img2img"}, "img2img", REDRAW_STRENGTH),
        (MASK, "img2img", REDRAW_STRENGTH),
        ({**PICTURE, "mask_from_alpha": True}, "img2img", REDRAW_STRENGTH),
        ({**MASK, "strength": 0.5}, "img2img", 0.5),
    ],
)
def test_a_mask_makes_it_image_to_image_which_has_its_own_strength(
    job_input: dict[str, Any], mode: str | None, strength: float
) -> None:
    request = parse_request(job_input)
    assert (request.mode, request.strength) == (mode, strength)


@pytest.mark.parametrize("given", [{}, {"seed": -1}, {"seed": None}])
def test_no_request_has_a_seed_that_is_still_to_be_drawn(given: dict[str, Any]) -> None:
    """However it is made, and a drawn one does not count as given."""
    request = Request.model_validate({"prompt": "a", **given})
    assert request.seed >= 0
    assert ("seed" in request.model_fields_set) == (given.get("seed") == -1)


def test_a_lone_surrogate_is_refused_not_passed_on() -> None:
    message = refusal(prompt="\ud800", **{"\udfff": 1})
    assert "prompt: must be a string" in message
    assert message.encode("utf-8")


def nested(depth: int, value: Any = 1) -> Any:
    for _ in range(depth):
        value = [value]
    return value


# Made when they are needed: they take memory.
TOO_MUCH: dict[str, Callable[[], Any]] = {
    "unknown fields": lambda: {f"guidance_scal{i}": 1 for i in range(50_000)},
    "unknown fields, as many as are looked at": lambda: {
        f"guidance_scal{i}": 1 for i in range(990)
    },
    "an object": lambda: {"seed": {f"a{i}": i for i in range(300_000)}},
    "a list": lambda: {"seed": [1] * 5_000_000},
    "a list of lists": lambda: {"seed": [[0] * 1000] * 1000},
    "many small lists": lambda: {f"a{i}": [1] * 9 for i in range(99)},
    "many small objects": lambda: {"seed": [{"a": 1}] * 450},
    "text": lambda: {"seed": "1" * 20_000_000, "negative_prompt": "\u00e9" * 10_000_000},
    "a choice": lambda: {"scheduler": "K_EULER" * 3_000_000},
    "an address": lambda: {"image_url": "ftp://" + "a" * 20_000_000},
    "control pictures": lambda: {"controlnet": [CONTROL] * 1_000_000},
    "a control picture": lambda: {"controlnet": [CONTROL | {"image_url": "/" + "a" * 20_000_000}]},
    "a control picture's numbers": lambda: {
        "controlnet": [CONTROL | {"start": 10**1_000_000, "end": -(10**1_000_000)}]
    },
    "an upscaler's name": lambda: {"upscale": {"upscaler": "a" * 20_000_000}},
    "an address inside": lambda: {"image_url": ["ftp://user:hunter2@" + "a" * 20_000_000]},
    "long names": lambda: {"\u00e9" * 1_000_000 + str(i): 1 for i in range(10)},
    "long names inside": lambda: {"seed": {"a" * 1_000_000 + str(i): 1 for i in range(10)}},
    "depth": lambda: {"seed": nested(100_000)},
    "an integer": lambda: {"seed": 10**1_000_000, "guidance_scale": -(10**1_000_000)},
    "an integer as a name": lambda: {10**1_000_000: 1},
    "a tuple as a name": lambda: {tuple(range(1_000_000)): 1},
    "half characters": lambda: {"seed": "\ud800" * 1_000_000, "\udfff" * 1_000_000: 1},
    "half characters as a name": lambda: {"\udfff" * 30: 1},
    "other names": lambda: {
        1: 1,
        None: 1,
        1.5: 1,
        (1, 2): 1,
        frozenset({1}): 1,
        b"a": 1,
        math.nan: 1,
    },
    "other values": lambda: {"prompt": b"a", "seed": {1}, "height": 1j, "width": object()},
}


@pytest.mark.parametrize("what", TOO_MUCH)
def test_too_much_of_anything_gets_a_short_answer_at_once(what: str) -> None:
    job_input = TOO_MUCH[what]()
    begin = time.thread_time()
    message = refusal_of(job_input)
    assert time.thread_time() - begin < 0.5
    assert len(message.encode()) < 4000
    assert "hunter2" not in message


@pytest.mark.parametrize(
    "make",
    [lambda: [1] * 5_000_000, lambda: "a" * 20_000_000, lambda: 10**1_000_000],
    ids=["a list", "text", "an integer"],
)
def test_what_is_no_object_at_all_gets_a_short_answer_at_once(make: Callable[[], Any]) -> None:
    job_input = make()
    begin = time.thread_time()
    message = refusal_of(job_input)
    assert time.thread_time() - begin < 0.5
    assert len(message) < 200


def test_the_number_of_values_is_limited_wherever_they_are() -> None:
    too_many = f"input: must hold at most {MAX_VALUES} values in all; got more"
    # The prompt and the seed are values themselves.
    assert refusal(seed=[0] * (MAX_VALUES - 2)).startswith("seed: must be an integer")
    assert refusal(seed=[0] * (MAX_VALUES - 1)) == too_many
    assert refusal(seed=[[0] * 10] * (MAX_VALUES // 10)) == too_many


@pytest.mark.parametrize("wrap", [lambda inner: [inner], lambda inner: {"a": inner}])
def test_the_depth_of_the_input_is_limited(wrap: Any) -> None:
    value: Any = 1
    for _ in range(MAX_NESTING - 1):
        value = wrap(value)
    assert refusal(seed=value).startswith("seed: must be an integer")
    assert refusal(seed=wrap(value)) == (
        f"input: must be at most {MAX_NESTING} objects or lists deep; got more"
    )


def largest(schema: dict[str, Any], root: dict[str, Any]) -> tuple[int, int]:
    """The most values that a schema allows inside a value, and how deep they are."""
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rpartition("/")[2]]
    if "properties" in schema:
        inside = [largest(one, root) for one in schema["properties"].values()]
        return sum(1 + count for count, _ in inside), 1 + max(depth for _, depth in inside)
    if schema.get("type") == "array":
        count, depth = largest(schema["items"], root)
        return schema["maxItems"] * (1 + count), 1 + depth
    options = [largest(one, root) for one in schema.get("anyOf") or schema.get("oneOf") or ()]
    return max((count for count, _ in options), default=0), max((d for _, d in options), default=0)


def test_whatever_the_schema_allows_is_well_within_the_limits() -> None:
    schema = Request.model_json_schema()
    count, depth = largest(schema, schema)
    assert count >= len(FIELDS)
    assert 2 * count <= MAX_VALUES, "room to be told what is wrong"
    assert depth + 2 <= MAX_NESTING


def test_a_large_picture_in_the_input_is_neither_copied_nor_searched() -> None:
    picture = "data:image/png;base64," + "A" * 20_000_000
    begin = time.thread_time()
    assert accepted(image_url=picture).image_url is picture
    control = inside(accepted(controlnet=[CONTROL | {"image_url": picture}]), "controlnet")
    assert control.image_url is picture
    assert time.thread_time() - begin < 0.5


def test_tokens_differ_by_more_than_capitals() -> None:
    embeddings = [{"path": "a", "token": "my-style"}, {"path": "b", "token": "MY-Style"}]
    with pytest.raises(RequestError, match="embeddings: each needs a token of its own"):
        accepted(embeddings=embeddings)


@pytest.mark.parametrize("schedule", ["norma", 3, ["karras"]])
def test_a_schedule_that_is_none_is_told_though_the_sampler_s_name_gives_one(
    schedule: object,
) -> None:
    with pytest.raises(RequestError, match="schedule: must be"):
        accepted(scheduler="LMS Karras", schedule=schedule)
    assert accepted(scheduler="LMS Karras", schedule="karras").schedule == "karras"
