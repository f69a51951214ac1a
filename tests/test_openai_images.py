"""OpenAI's parameters become fields of ours, or an error that names them as the caller did."""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types import image_edit_params, image_generate_params, image_model

from sdxl_worker.errors import OpenAIRequestError, RequestError
from sdxl_worker.few_step import LIGHTNING, with_settings_of
from sdxl_worker.openai_images import (
    EDITS,
    GENERATIONS,
    LEVELS,
    MODELS,
    ImagesCall,
    ImagesInput,
    list_models,
    parse_openai_call,
)
from sdxl_worker.request import REDRAW_STRENGTH, Request, parse_request
from sdxl_worker.settings import Settings
from tests.from_schema import anything, nearly

PICTURE = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAA"
BASE64 = PICTURE.partition(",")[2]
EDIT = {"prompt": "a", "image": PICTURE}


def call(route: str, **fields: Any) -> ImagesCall:
    parsed = parse_openai_call({"input": {"openai_route": route, "openai_input": fields}})
    assert parsed is not None
    return parsed


def generated(**fields: Any) -> Request:
    return call(GENERATIONS, prompt="a", **fields).request


def edited(**fields: Any) -> Request:
    return call(EDITS, **{**EDIT, **fields}).request


def refusal(route: str, **fields: Any) -> str:
    with pytest.raises(OpenAIRequestError) as caught:
        call(route, **fields)
    return str(caught.value)


def test_a_prompt_alone_asks_for_what_our_own_job_does() -> None:
    own = parse_request({"prompt": "a", "seed": 1, "duplicate_first": False})
    assert generated(seed=1) == own
    assert generated(seed=1).model_fields_set == own.model_fields_set, "the rest stays open"


def test_each_parameter_sets_the_field_that_it_stands_for() -> None:
    request = generated(
        n=3, size="1024x1536", output_format="webp", output_compression=70, model="photo"
    )
    assert (request.num_images, request.width, request.height) == (3, 1024, 1536)
    assert (request.output_format, request.output_quality) == ("webp", 70)
    assert request.model == "photo"
    assert not request.duplicate_first
    assert generated(output_compression=0).output_quality == 1
    assert generated(size="64X72").width == 64
    for size in ("auto", None):
        assert generated(size=size).width is None


def test_our_own_fields_are_taken_beside_them() -> None:
    request = generated(negative_prompt="b", seed=7, loras=[{"path": "x"}], scheduler="Euler a")
    assert request.negative_prompt == "b"
    assert request.seed == 7
    assert request.loras is not None
    assert request.scheduler == "K_EULER_ANCESTRAL"
    assert generated(num_images=2, width=64, height=72).num_images == 2
    assert generated(image_url=PICTURE, mode="img2img").strength == REDRAW_STRENGTH


@pytest.mark.parametrize("name", [*get_args(image_model.ImageModel), "gpt-image-9", ""])
def test_names_of_openai_s_models_mean_the_default(name: str) -> None:
    assert generated(model=name).model is None


@pytest.mark.parametrize("name", ["photo", "my-dall-e-3", "gpt-4"])
def test_other_names_are_names_of_models_here(name: str) -> None:
    assert generated(model=name).model == name


@pytest.mark.parametrize(
    "image",
    [PICTURE, BASE64, [PICTURE], [BASE64], f"data:application/octet-stream;base64,{BASE64}"],
)
def test_a_picture_comes_in_every_form_that_clients_have(image: Any) -> None:
    assert edited(image=image).image_url == PICTURE
    assert edited(mask=image).mask_url == PICTURE


def test_a_picture_s_address_stays_one() -> None:
    assert edited(image="https://example.com/a.png").image_url == "https://example.com/a.png"
    assert call(EDITS, prompt="a", image_url=PICTURE).request.image_url == PICTURE


def test_an_edit_repaints_what_is_transparent_in_its_mask_or_else_in_its_picture() -> None:
    with_mask = call(EDITS, **EDIT, mask=PICTURE)
    assert with_mask.request.mask_url == PICTURE
    assert with_mask.request.mask_from_alpha
    assert not with_mask.takes_holes
    assert not edited(mask=PICTURE, mask_from_alpha=False).mask_from_alpha, "then, what is white"
    assert not edited(mask_url=PICTURE).mask_from_alpha
    without = call(EDITS, **EDIT)
    assert without.takes_holes
    assert (without.request.mode, without.request.strength) == ("img2img", REDRAW_STRENGTH)
    for own in ({"mask_from_alpha": True}, {"mask_url": PICTURE}, {"mode": "refine"}):
        assert not call(EDITS, **EDIT, **own).takes_holes


def test_a_form_s_text_is_a_number_a_switch_or_a_list_where_the_field_is_one() -> None:
    request = edited(
        n="2", seed="7", strength="0.5", preview="true", stream="false", num_inference_steps="4.0",
        loras='[{"path": "x", "scale": 0.5}]', negative_prompt="12", upload_urls=["http://a", "http://b"],
    )  # fmt: skip
    assert (request.num_images, request.seed, request.strength) == (2, 7, 0.5)
    assert request.preview
    assert request.num_inference_steps == 4
    assert request.loras is not None
    assert request.loras[0].scale == 0.5
    assert request.negative_prompt == "12"
    assert edited(upload_urls="http://a").upload_urls == ["http://a"]
    assert refusal(GENERATIONS, prompt="a", n="2", seed="7").splitlines() == [
        'n: must be an integer from 1 to 16; got "2"',
        'seed: must be an integer from -1 to 18446744073709551615; got "7"',
    ], "JSON has numbers"


@pytest.mark.parametrize("text", ["", "abc", "NaN", "Infinity", "9" * 5000, "[" * 9000, "1e999"])
def test_a_form_s_text_that_is_no_number_is_refused(text: str) -> None:
    for name in ("seed", "n"):
        assert re.match(
            rf"^{name}: must be an integer from .*; got .{{1,99}}$",
            refusal(EDITS, **EDIT, **{name: text}),
        )


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"n": 0}, "n: must be an integer from 1 to 16; got 0"),
        ({"size": "1000x1001"}, "size: must be auto, or WIDTHxHEIGHT, each from 64 to 4096 and a"),
        ({"size": "64"}, 'got "64"'),
        ({"size": "64x8192"}, 'got "64x8192"'),
        ({"size": "\u0661\u0660\u0662\u0664x1024"}, "size: must be auto"),
        ({"size": 1024}, "size: must be auto, or WIDTHxHEIGHT"),
        ({"quality": "best"}, "quality: must be one of low, medium, high, xhigh, max, auto, stand"),
        ({"response_format": "png"}, 'response_format: must be one of b64_json, url; got "png"'),
        ({"output_format": "gif"}, 'output_format: must be one of png, jpeg, webp; got "gif"'),
        ({"output_compression": 101}, "output_compression: must be an integer from 0 to 100; got"),
        ({"background": "transparent"}, "background: must be auto or opaque: no picture here has"),
        ({"stream": True}, "stream: must be false, or left out: pictures come when they are done"),
        ({"svg": {"model": "a"}}, "svg: must be left out: pictures are of pixels; got {"),
        ({"frame_count": 3}, "frame_count: must be left out: pictures do not move; got 3"),
        ({"markup": PICTURE}, "markup: must be left out: send a mask; got "),
        ({"image": PICTURE}, "image: is of /v1/images/edits; here, send image_url"),
        ({"mask": 3}, "mask: is of /v1/images/edits; here, send mask_url"),
        ({"n": 1, "num_images": 1}, "n: is num_images here; send this or that"),
        ({"size": "64x64", "width": 64}, "size: is width and height here; send this or that"),
        (
            {"output_compression": 9, "output_quality": 9},
            "output_compression: is output_quality here; send this or that",
        ),
        ({"check": True}, "check: send it as a job of its own, without openai_route"),
        (
            {"response_format": "b64_json", "upload_urls": ["http://a"]},
            "upload_urls: of what is uploaded the answer has links: send response_format url",
        ),
        (
            {"n": 2, "upload_urls": ["http://a"]},
            "upload_urls: must be one address for each of n (2); got 1",
        ),
        ({"num_inference_steps": 0}, "num_inference_steps: must be an integer from 1 to 1000; got"),
        ({"s3Config": {}}, "s3Config: belongs beside input"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_by_the_caller_s_name(
    fields: dict[str, Any], line: str
) -> None:
    [told] = refusal(GENERATIONS, prompt="a", **fields).splitlines()
    assert line in told


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"prompt": None}, "prompt: required, what to draw; got nothing"),
        ({"image": None}, "image: required, the picture to edit; got nothing"),
        (
            {"image": [PICTURE, PICTURE]},
            "image: must be one picture: a file of a form, base64 or a",
        ),
        ({"image": []}, "image: must be one picture"),
        ({"image": "/etc/passwd"}, 'got "/etc/passwd"'),
        ({"mask": "file:///a"}, "mask: must be one picture"),
        ({"image_url": PICTURE}, "image: is image_url here; send this or that"),
        ({"mask": PICTURE, "mask_url": PICTURE}, "mask: is mask_url here; send this or that"),
        ({"mask": PICTURE, "mode": "refine"}, "mask: does not go with mode refine"),
        ({"mask_blur": 3}, "mask_blur: needs a mask: mask, or mask_from_alpha"),
    ],
)
def test_an_edit_that_cannot_be_done_is_refused_so_too(fields: dict[str, Any], line: str) -> None:
    told = refusal(EDITS, **{**EDIT, **fields}).splitlines()
    assert line in told[0]
    assert len(told) <= 2


def test_all_problems_are_told_at_once() -> None:
    told = refusal(EDITS, n="x", size="1x1", seed="y", foo="z", mask=["a"], num_inference_steps="0")
    names = [line.partition(":")[0] for line in told.splitlines()]
    assert names == [
        *("mask", "n", "size", "prompt", "image", '"foo"', "seed", "num_inference_steps"),
    ]  # fmt: skip


def test_an_unknown_parameter_is_answered_with_those_that_there_are() -> None:
    told = refusal(GENERATIONS, prompt="a", qualty="hd", img="a").splitlines()
    assert told[0].startswith('"qualty": no such field')
    fields = told[0].partition("; the fields are ")[2].split(", ")
    assert {"n", "size", "quality", "negative_prompt", "seed"} <= set(fields)
    assert "svg" not in fields, "which is refused"
    assert told[1].startswith('"img": no such field')


def test_a_value_of_the_caller_s_is_told_as_it_was_sent() -> None:
    assert refusal(EDITS, **EDIT, scheduler="image_url").count('"image_url"') == 1


@pytest.mark.parametrize(("route", "given"), [(EDITS, EDIT), (GENERATIONS, {"prompt": "a"})])
def test_objects_in_a_call_have_fields_of_their_own(route: str, given: dict[str, Any]) -> None:
    """Only those of the call itself are called as OpenAI calls them."""
    control = {"type": "canny", "image_url": PICTURE}

    def told(**fields: Any) -> str:
        return refusal(route, **given, **fields)

    with_fields = "an object with type, image_url, preprocess, scale, start, end; got"
    assert told(controlnet=["a"]) == f'controlnet[0]: must be {with_fields} "a"'
    assert told(controlnet=3) == f"controlnet: must be a list of at most 3, each {with_fields} 3"
    assert told(controlnet=[{**control, "image": PICTURE}]) == (
        "controlnet[0].image: no such field (did you mean image_url?); the fields are type, "
        "image_url, preprocess, scale, start, end"
    )
    assert told(ip_adapter=[{"image_url": PICTURE, "mask": PICTURE}]) == (
        "ip_adapter[0].mask: no such field (did you mean mask_url?); the fields are image_url, "
        "type, scale, mask_url"
    )
    assert told(hires={"foo": 1}) == (
        "hires.foo: no such field; the fields are scale, strength, steps, upscaler"
    )
    first, second = told(foo=1, hires={"foo": 1}).splitlines()
    assert "negative_prompt" in second
    assert ", size, " in second
    assert ", size, " not in first


def test_in_a_line_on_such_an_object_the_call_s_fields_are_still_openai_s() -> None:
    parsed = call(EDITS, **EDIT)
    with pytest.raises(OpenAIRequestError) as caught, parsed.in_its_words():
        raise RequestError("controlnet[0].type: repaint needs a mask: mask_url")
    assert str(caught.value) == "controlnet[0].type: repaint needs a mask: mask"


@pytest.mark.parametrize("route", ["/v1/chat/completions", "", None, 3, ["/v1/models"], {}])
def test_another_route_is_answered_with_those_that_there_are(route: Any) -> None:
    with pytest.raises(OpenAIRequestError, match="^openai_route: must be one of /v1/images/gen"):
        parse_openai_call({"input": {"openai_route": route, "openai_input": {}}})


@pytest.mark.parametrize("name", ["check", "prompt", "seed"])
def test_a_field_of_ours_does_not_go_beside_the_route(name: str) -> None:
    for route in (GENERATIONS, MODELS):
        with pytest.raises(OpenAIRequestError, match=f"^{name}: does not go beside openai_route"):
            parse_openai_call(
                {"input": {"openai_route": route, "openai_input": {"prompt": "a"}, name: True}}
            )


@pytest.mark.parametrize("openai_input", [..., None, {}, {"x": 1}, "a"])
def test_the_list_of_models_takes_no_input(openai_input: Any) -> None:
    beside = {} if openai_input is ... else {"openai_input": openai_input}
    assert parse_openai_call({"input": {"openai_route": MODELS, **beside}}) is None


@pytest.mark.parametrize("openai_input", [..., None, [], "a", 3])
def test_pictures_need_an_object(openai_input: Any) -> None:
    beside = {} if openai_input is ... else {"openai_input": openai_input}
    with pytest.raises(OpenAIRequestError, match="^openai_input: must be an object"):
        parse_openai_call({"input": {"openai_route": GENERATIONS, **beside}})


@pytest.mark.parametrize(
    ("fields", "job", "links"),
    [
        ({}, {}, False),
        ({"response_format": "url"}, {}, True),
        ({"response_format": "b64_json"}, {"s3Config": {"a": "b"}}, False),
        ({}, {"s3Config": {"a": "b"}}, True),
        ({"upload_urls": ["http://a"]}, {}, True),
    ],
)
def test_the_answer_has_links_where_they_are_asked_for(
    fields: dict[str, Any], job: dict[str, Any], links: bool
) -> None:
    openai_input = {"prompt": "a", **fields}
    parsed = parse_openai_call(
        {"input": {"openai_route": GENERATIONS, "openai_input": openai_input}, **job}
    )
    assert parsed is not None
    assert parsed.wants_links == links


def with_quality(quality: str, max_steps: int = 1000, few_step: Any = None, **own: Any) -> Request:
    parsed = call(GENERATIONS, prompt="a", quality=quality, **own)
    request = with_settings_of(parsed.request, few_step)
    return parsed.with_quality(request, Settings(max_steps=max_steps))


def test_a_quality_is_a_number_of_steps_with_or_without_the_refiner() -> None:
    for quality, level in LEVELS.items():
        request = with_quality(quality)
        assert request.num_inference_steps == (level.steps or 25)
        assert request.refiner_inference_steps == (50 if level.is_refined else 0)
    steps = [
        with_quality(name).num_inference_steps for name in ("low", "auto", "hd", "xhigh", "max")
    ]
    assert steps == sorted(set(steps))


def test_what_is_named_stands_above_a_quality() -> None:
    assert with_quality("high", num_inference_steps=7).num_inference_steps == 7
    assert with_quality("low", refiner_inference_steps=9).refiner_inference_steps == 9
    assert with_quality("low", high_noise_frac=0.8).refiner_inference_steps == 50
    assert with_quality("high", few_step=LIGHTNING).num_inference_steps == 4, "as its authors say"
    assert with_quality("high", max_steps=30).num_inference_steps == 30, "as the owner allows"
    assert with_quality("high", max_steps=5).num_inference_steps == 25, "as without a quality"
    assert with_quality("low", image_url=PICTURE).refiner_inference_steps == 50, "it alone draws"


def test_what_is_not_used_is_told_where_it_may_matter() -> None:
    parsed = call(
        GENERATIONS, prompt="a", style="vivid", input_fidelity="high", complexity="low",
        user="u", moderation="low", safety_identifier="s", background="auto", partial_images=2,
    )  # fmt: skip
    assert parsed.warnings == [
        "style: not used here",
        "input_fidelity: not used here",
        "complexity: not used here",
    ]
    assert call(GENERATIONS, prompt="a").warnings == []


def params_of(module: Any) -> set[str]:
    return {
        name
        for kind in vars(module).values()
        if isinstance(kind, type)
        and kind.__name__.startswith(("ImageEditParams", "ImageGenerateP"))
        for name in kind.__annotations__
    }


def test_there_is_a_decision_on_every_parameter_of_the_official_client() -> None:
    known = params_of(image_generate_params) | params_of(image_edit_params)
    assert {"prompt", "stream", "mask", "partial_images", "output_compression"} <= known
    assert known == (known & Request.model_fields.keys()) | ImagesInput.model_fields.keys()


def test_every_quality_of_the_official_client_has_a_level() -> None:
    kind = get_type_hints(image_generate_params.ImageGenerateParamsBase)["quality"]
    assert {name for part in get_args(kind) for name in get_args(part)} == set(LEVELS)


def test_models_have_the_form_of_openai_s(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    listed = list_models({"a": tmp_path / "a", "gone": tmp_path / "b"})
    assert listed["object"] == "list"
    assert [(one["id"], one["object"], one["owned_by"]) for one in listed["data"]] == [
        ("a", "model", "sdxl-worker"),
        ("gone", "model", "sdxl-worker"),
    ]
    assert listed["data"][0]["created"] > 1_700_000_000
    assert listed["data"][1]["created"] == 0


QUICK = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    max_examples=300,
)
OWN, OPENAI = Request.model_json_schema(), ImagesInput.model_json_schema()
HOSTILE = st.sampled_from(
    [
        *("\ud800", "\x00", "a\nb: c", "x" * 5000, "data:,", "data:image/png;base64,", "1e5000"),
        *("[" * 5000, '{"a":' * 5000, "null", "true", "[null]", "-0", "0x10", "9" * 5000),
        *([PICTURE] * 3, [[PICTURE]], {"url": PICTURE}, 2**70, -1, 1.5, True, [], {}),
    ]
)


def test_whatever_is_sent_is_taken_or_refused_in_few_words() -> None:
    outcomes: Counter[str] = Counter()

    @QUICK
    @given(
        st.sampled_from([GENERATIONS, EDITS]),
        nearly(OPENAI, OPENAI) | st.just({}),
        nearly(OWN, OWN) | st.just({}),
        st.dictionaries(
            st.sampled_from([*ImagesInput.model_fields, *Request.model_fields])
            | st.text(max_size=9),
            HOSTILE | anything,
            max_size=4,
        ),
    )
    def check(route: str, openai: Any, own: Any, hostile: dict[str, Any]) -> None:
        fields: dict[str, Any] = {"prompt": "a"}
        for part in (own, openai, hostile):
            fields |= part if isinstance(part, Mapping) else {}
        told = ""
        try:
            assert isinstance(call(route, **fields).request, Request)
        except OpenAIRequestError as error:
            told = str(error)
            told.encode()
        outcomes["refused" if told else "taken"] += 1
        assert len(told) < 6000

    check()
    assert min(outcomes["refused"], outcomes["taken"]) > 10


def test_a_huge_input_is_refused_at_once() -> None:
    many = {f"x{i}": "7" for i in range(200_000)}
    told = "input: must hold at most 1000 values in all; got more"
    assert refusal(EDITS, **EDIT, n=99, **many) == told, "before anything else is looked at"
    deep: Any = []
    for _ in range(400):
        deep = [deep]
    assert len(refusal(EDITS, prompt="a", image=deep, seed=deep)) < 1000
