"""client/options.py: options, files' columns and local checks, all from the schema."""

import argparse
import base64
import csv
import io
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from client import options
from client.options import UsageError, fields_of, load_schema
from tests.from_schema import anything, nearly, valid

SCHEMA = load_schema()
FIELDS = fields_of(SCHEMA)
QUICK = settings(
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
    max_examples=30,
)

# What a later version might have: the command must take it as it is.
LATER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "prompt": {"type": "string", "default": ""},
        "eta": {
            "type": "number",
            "minimum": 0,
            "maximum": 1,
            "description": "Noise: 100% [`eta`](eta.md).",
        },
        "tiling": {"anyOf": [{"type": "boolean"}, {"type": "null"}], "default": None},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 64}, "maxItems": 2},
        "controlnet": {
            "anyOf": [
                {"type": "array", "maxItems": 4, "items": {"$ref": "#/$defs/Control"}},
                {"type": "null"},
            ],
            "default": None,
            "x-aliases": ["control"],
        },
    },
    "$defs": {
        "Control": {
            "type": "object",
            "required": ["type", "image_url"],
            "properties": {
                "type": {"enum": ["canny", "depth"], "type": "string"},
                "image_url": {
                    "type": "string",
                    "pattern": "(?i)^(https?://[^/]|data:image/)",
                    "x-aliases": ["image"],
                },
                "scale": {"type": "number", "minimum": 0, "maximum": 2, "default": 1.0},
                "guess": {"type": "boolean", "default": False},
            },
        }
    },
}


# Of what objects in lists need.
EXAMPLES = {
    "path": "a",
    "token": "a",
    "type": "canny",
    "image_url": "https://example.com/a.png",
}


def typed(schema: dict[str, Any], *arguments: str) -> dict[str, Any]:
    """The input that these options make, checked."""
    fields = fields_of(schema)
    parser = argparse.ArgumentParser(allow_abbrev=False)
    options.add_options(parser, fields)
    job_input = options.with_files(options.given(parser.parse_args(arguments), fields), fields)
    options.check(job_input, fields)
    return job_input


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_of_the_schema_is_an_option(name: str) -> None:
    one = FIELDS[name]
    least = str(one.schema.get("minimum"))
    values = {"string": "text", "integer": least, "number": "0.5"}
    if "enum" in one.schema:
        value: tuple[str, ...] = (one.schema["enum"][0],)
    elif one.is_picture or (one.kind == "array" and "pattern" in one.items.schema):
        value = ("https://example.com/a.png",)
    elif one.kind == "array":
        value = (json.dumps([{name: EXAMPLES[name] for name in one.items.schema["required"]}]),)
    elif one.kind == "object":
        value = ("{}",)
    else:
        value = () if one.kind == "boolean" else (values[one.kind],)
    made = typed(SCHEMA, one.option, *value)
    jsonschema.validate(made[name], {**SCHEMA["properties"][name], "$defs": SCHEMA["$defs"]})
    for alias in one.aliases:
        assert typed(SCHEMA, "--" + alias.replace("_", "-"), *value) == made


def test_values_are_typed_and_keep_their_digits() -> None:
    assert typed(
        SCHEMA,
        *("--seed", "18446744073709551615", "--guidance-scale", "7", "--strength", "0.25"),
        *("--no-duplicate-first", "--mask-invert", "--prompt", "7"),
    ) == {
        "seed": 2**64 - 1,
        "guidance_scale": 7,
        "strength": 0.25,
        "duplicate_first": False,
        "mask_invert": True,
        "prompt": "7",
    }


@pytest.mark.parametrize(
    ("text", "lora"),
    [
        ("dot.safetensors", {"path": "dot.safetensors"}),
        ("dot.safetensors:0.5", {"path": "dot.safetensors", "scale": 0.5}),
        ("https://example.com/a", {"path": "https://example.com/a"}),
        ("https://example.com/a:-1", {"path": "https://example.com/a", "scale": -1}),
        ("path=a,scale=2", {"path": "a", "scale": 2}),
        ("url=https://e.com/a?b=c,d,weight=2", {"path": "https://e.com/a?b=c,d", "scale": 2}),
        ('{"path": "a", "scale": 2}', {"path": "a", "scale": 2}),
    ],
)  # fmt: skip
def test_a_lora_has_short_forms(text: str, lora: dict[str, Any]) -> None:
    assert typed(SCHEMA, "--lora", text) == {"loras": [lora]}


@pytest.mark.parametrize("address", ["https://example.com:8000/a.png", "data:image/png;base64,A="])
def test_control_pictures_and_their_like_have_short_forms(address: str) -> None:
    made = typed(
        SCHEMA,
        *("--controlnet", f"canny:{address}"),
        *("--controlnet", f"type=hed,image={address},preprocess=false,weight=0.5"),
        *("--ip-adapter", f"{address}:face"),
        *("--ip-adapter", f"image_url={address},scale=1,mask_url={address}"),
        *("--hires", "1.5:0.3", "--upscale", "2"),
    )
    assert typed(SCHEMA, "--ip-adapter", address) == {"ip_adapter": [{"image_url": address}]}
    assert made == {
        "controlnet": [
            {"type": "canny", "image_url": address},
            {"type": "hed", "image_url": address, "preprocess": False, "scale": 0.5},
        ],
        "ip_adapter": [
            {"image_url": address, "type": "face"},
            {"image_url": address, "scale": 1, "mask_url": address},
        ],
        "hires": {"scale": 1.5, "strength": 0.3},
        "upscale": {"factor": 2},
    }
    assert typed(SCHEMA, "--hires", "steps=20,hr_upscaler=4x.pth") == {
        "hires": {"steps": 20, "upscaler": "4x.pth"}
    }
    assert typed(SCHEMA, "--hires", "{}") == {"hires": {}}


@pytest.mark.parametrize(
    ("text", "address", "scale"),
    [
        ("https://example.com/a.png:0.5", "https://example.com/a.png", 0.5),
        ("https://example.com:8000/a.png:1", "https://example.com:8000/a.png", 1),
        ("data:image/png;base64,A=:2", "data:image/png;base64,A=", 2),
        ("https://example.com:8000", "https://example.com:8000", None),
        ("https://example.com/a:443", "https://example.com/a:443", None),
        ("https://example.com/a:b", "https://example.com/a:b", None),
    ],
)
def test_a_picture_s_short_form_ends_with_its_scale(
    text: str, address: str, scale: float | None
) -> None:
    given = {} if scale is None else {"scale": scale}
    assert typed(SCHEMA, "--controlnet", f"canny:{text}") == {
        "controlnet": [{"type": "canny", "image_url": address, **given}]
    }
    assert typed(SCHEMA, "--ip-adapter", text) == {"ip_adapter": [{"image_url": address, **given}]}


def test_a_file_with_colons_in_its_name_is_that_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "a.png:0.5", "a.png:face"):
        Image.new("RGB", (8, 8), "red" if name == "a.png" else "blue").save(name, "PNG")
    red, blue = (options.data_uri(name, "") for name in ("a.png", "a.png:face"))
    made = typed(
        SCHEMA,
        *("--controlnet", "canny:a.png:0.5", "--controlnet", "canny:a.png:0.5:0.5"),
        *("--controlnet", "canny:a.png:1"),
        *("--ip-adapter", "a.png:face", "--ip-adapter", "a.png:style:0.7"),
    )
    assert made["controlnet"] == [
        {"type": "canny", "image_url": blue},
        {"type": "canny", "image_url": blue, "scale": 0.5},
        {"type": "canny", "image_url": red, "scale": 1},
    ]
    assert made["ip_adapter"] == [
        {"image_url": blue},
        {"image_url": red, "type": "style", "scale": 0.7},
    ]


CONTROL, PROMPT_PICTURE = "TYPE:FILE[:SCALE]", "FILE[:TYPE][:SCALE]"
HIRES, UPSCALE = "SCALE[:STRENGTH]", "FACTOR[:UPSCALER]"


@pytest.mark.parametrize(
    ("option", "text", "told", "form"),
    [
        ("--controlnet", "canny", "[0].image_url: is missing", CONTROL),
        ("--controlnet", "cany:a.png", '[0].type: must be one of canny, depth, pose, ', CONTROL),
        ("--controlnet", "a.png:canny", '[0].type: must be one of canny, depth, pose, ', CONTROL),
        ("--controlnet", "canny:a.png:9", "[0].scale: must be a number from 0 to 4; ", CONTROL),
        ("--controlnet", "canny:no.png:1", '[0].image_url: "no.png" is neither an ', CONTROL),
        ("--controlnet", "canny:a.png:x", '[0].image_url: "a.png:x" is neither an ', CONTROL),
        ("--ip-adapter", "a.png:faceid", '[0].type: must be one of plus, face, ', PROMPT_PICTURE),
        ("--ip-adapter", "a.png:plus:3", "[0].scale: must be a number from 0 to 2", PROMPT_PICTURE),
        ("--ip-adapter", "no.png:plus:1", '[0].image_url: "no.png" is neither an', PROMPT_PICTURE),
        ("--hires", "1.5:much", '.strength: must be a number above 0 and of at most 1', HIRES),
        ("--hires", "big", '.scale: must be a number from 1 to 2; got "big"', HIRES),
        ("--upscale", "lanczos", ".factor: must be a number above 1 and of at most 4", UPSCALE),
        ("--upscale", "2:a/b", ".upscaler: must be lanczos, or a file name", UPSCALE),
    ],
)  # fmt: skip
def test_a_mistake_in_a_short_form_is_told_with_the_form(
    option: str, text: str, told: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("a.png")
    with pytest.raises(UsageError) as caught:
        typed(SCHEMA, option, text)
    assert str(caught.value).startswith(f"{option}{told}")
    assert str(caught.value).endswith(f"; the form is {form}, or key=value,key=value")


def test_each_of_several_is_told_by_its_place() -> None:
    with pytest.raises(UsageError) as caught:
        typed(SCHEMA, *("--lora", "a", "--lora", "b:9", "--lora", "c:8", "--upscale", "1"))
    places = [line.partition(":")[0] for line in str(caught.value).splitlines()]
    assert places == ["--loras[1].scale", "--loras[2].scale", "--upscale.factor"]
    with pytest.raises(UsageError) as caught:
        options.from_row({"loras": "b:9", "upscale": "1"}, FIELDS)
    places = [line.partition(":")[0] for line in str(caught.value).splitlines()]
    assert places == ["--loras[0].scale", "--upscale.factor"]


@pytest.mark.parametrize(
    ("option", "text", "told"),
    [
        ("--hires", "scale=1.5,foo=2", "--hires.foo: no such field; the fields are scale, streng"),
        ("--hires", "foo=2", "--hires.foo: no such field; the fields are scale, strength, steps"),
        ("--upscale", "factr=2", "--upscale.factr: no such field (did you mean factor?); the f"),
        ("--controlnet", "typ=canny", "--controlnet[0].typ: no such field (did you mean type?)"),
        ("--controlnet", "type=canny,foo=1", "--controlnet[0].foo: no such field"),
        ("--controlnet", "image_url=a.png,foo=1", "--controlnet[0].foo: no such field"),
        ("--ip-adapter", "foo=a.png", "--ip-adapter[0].foo: no such field"),
    ],
)  # fmt: skip
def test_a_key_that_is_no_field_is_told(
    option: str, text: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("a.png")
    with pytest.raises(UsageError) as caught:
        typed(SCHEMA, option, text)
    assert str(caught.value).startswith(told)


def test_what_looks_like_a_key_may_belong_to_a_name_or_an_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a=b.png", "a,b=c.png"):
        Image.new("RGB", (8, 8)).save(name)
    uri = options.data_uri("a=b.png", "")
    made = typed(SCHEMA, "--ip-adapter", "a=b.png", "--ip-adapter", "image_url=a,b=c.png,scale=1")
    assert made["ip_adapter"] == [{"image_url": uri}, {"image_url": uri, "scale": 1}]
    address = "https://example.com/a,b=c"
    made = typed(SCHEMA, "--controlnet", f"type=canny,image_url={address},scale=1")
    assert made["controlnet"] == [{"type": "canny", "image_url": address, "scale": 1}]


def test_files_in_lists_are_sent_as_pictures(tmp_path: Path) -> None:
    file, odd = tmp_path / "edges.png", tmp_path / "a:b=c,d.png"
    for path in (file, odd):
        Image.new("RGB", (8, 8)).save(path)
    made = typed(
        SCHEMA,
        *("--controlnet", f"depth:{file}", "--controlnet", f"canny:{odd}"),
        *("--ip-adapter", f"image_url={file},mask_url={file}"),
    )
    sent = "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
    assert [one["image_url"] for one in made["controlnet"]] == [sent, sent]
    assert made["ip_adapter"] == [{"image_url": sent, "mask_url": sent}]
    with pytest.raises(UsageError, match=r"--controlnet\[0\]\.image_url: .*No such file"):
        typed(SCHEMA, "--controlnet", f"canny:{tmp_path}/none.png")


def test_bounds_that_are_out_themselves_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError) as caught:
        typed(SCHEMA, "--hires", "strength=0", "--upscale", "factor=1")
    assert str(caught.value).splitlines() == [
        "--hires.strength: must be a number above 0 and of at most 1; got 0",
        "--upscale.factor: must be a number above 1 and of at most 4; got 1",
    ]
    parser = argparse.ArgumentParser()
    options.add_options(parser, FIELDS)
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    for one in ("TYPE:FILE[:SCALE]", "FILE[:TYPE][:SCALE]", "SCALE[:STRENGTH]", "PATH[:SCALE]"):
        assert one in told


def test_a_side_of_0_is_sent_as_it_is() -> None:
    assert typed(SCHEMA, "--width", "0", "--height", "0") == {"width": 0, "height": 0}


def test_a_list_s_option_may_be_given_several_times() -> None:
    made = typed(SCHEMA, "--loras", '[{"path": "a"}, {"path": "b"}]', "--lora", "c:2")
    assert made == {"loras": [{"path": "a"}, {"path": "b"}, {"path": "c", "scale": 2}]}
    assert typed(SCHEMA, "--embeddings", "a.pt:<word>") == {
        "embeddings": [{"path": "a.pt", "token": "<word>"}]
    }


def test_fields_that_nobody_knew_of_are_options_too(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "edges.png")
    made = typed(
        LATER,
        *("--eta", "0.5", "--tiling", "--sizes", "64", "--sizes", "128"),
        *("--controlnet", f"type=canny,image={tmp_path}/edges.png,scale=0.8,guess=true"),
        *("--control", '{"type": "depth", "image_url": "https://example.com/d.png"}'),
    )
    first, second = made.pop("controlnet")
    assert made == {"eta": 0.5, "tiling": True, "sizes": [64, 128]}
    assert (
        base64.b64decode(first.pop("image_url").partition(",")[2])
        == (tmp_path / "edges.png").read_bytes()
    )
    assert first == {"type": "canny", "scale": 0.8, "guess": True}
    assert second == {"type": "depth", "image_url": "https://example.com/d.png"}


def test_the_help_of_a_later_field_is_its_description(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    options.add_options(parser, fields_of(LATER))
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    assert "Noise: 100% eta. (a number from 0 to 1)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--eta", "2"), "--eta: must be a number from 0 to 1; got 2"),
        (("--eta", "nan"), "--eta: must be a number from 0 to 1; got NaN"),
        (("--controlnet", "type=canny"), "--controlnet[0].image_url: is missing"),
        (
            ("--controlnet", "type=cany,image_url=https://a.b/c"),
            '--controlnet[0].type: must be one of canny, depth; got "cany" (did you mean canny?)',
        ),
        (
            ("--controlnet", '{"typ": "canny"}'),
            "controlnet[0].typ: unknown field (did you mean type?)",
        ),
        (("--controlnet", "{"), '--controlnet: "{" is not valid JSON'),
        (("--sizes", "64") * 3, "--sizes: must be a list of at most 2, each an integer"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_by_its_option(arguments: tuple[str, ...], told: str) -> None:
    with pytest.raises(UsageError) as caught:
        typed(LATER, *arguments)
    assert told in str(caught.value)


@pytest.mark.parametrize("name", FIELDS)
@QUICK
@given(data=st.data())
def test_the_local_check_agrees_with_the_schema(name: str, data: st.DataObject) -> None:
    schema = SCHEMA["properties"][name]
    value = data.draw(valid(schema, SCHEMA) | nearly(schema, SCHEMA) | anything)
    # What of an object's fields goes with what, the worker judges.
    untied = {
        name: {key: rule for key, rule in one.items() if key != "anyOf"}
        for name, one in SCHEMA["$defs"].items()
    }
    judge = jsonschema.Draft202012Validator({**schema, "$defs": untied})
    if value is None or (isinstance(value, list) and len({*map(str, value)}) < len(value)):
        return  # not sent; that items are unique, the worker judges
    told = options.problems({name: value}, FIELDS)
    if not judge.is_valid(value):
        assert told, value
    elif not _has_null(value):
        assert told == [], value


def _has_null(value: Any) -> bool:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return value is None or any(_has_null(one) for one in values)


def test_a_table_s_columns_are_fields() -> None:
    table = 'prompt,steps,loras,preview\na cat,4,a:0.5,true\n"a, b",,,\n'
    rows = csv.DictReader(io.StringIO(table))
    first, second = (options.from_row(options.own_names(row, FIELDS), FIELDS) for row in rows)
    assert first == {
        "prompt": "a cat",
        "num_inference_steps": 4,
        "loras": [{"path": "a", "scale": 0.5}],
        "preview": True,
    }
    assert second == {"prompt": "a, b"}


def test_other_services_names_become_the_fields_and_nulls_go() -> None:
    assert options.own_names({"steps": 4, "seed": None}, FIELDS) == {"num_inference_steps": 4}
    with pytest.raises(UsageError, match="num_inference_steps, which is given as well"):
        options.own_names({"num_inference_steps": 4, "steps": 4}, FIELDS)


def test_a_picture_is_sent_as_it_is_with_its_type(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "named.png", "JPEG")
    uri = typed(SCHEMA, "--image", str(tmp_path / "named.png"))["image_url"]
    assert uri.startswith("data:image/jpeg;base64,")
    for address in ("https://example.com/a.png", "data:image/png;base64,AA"):
        assert typed(SCHEMA, "--image", address) == {"image_url": address}


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("none.png", None, "No such file"),
        ("a.png", b"text", "no picture"),
        (".", None, "directory"),
    ],
)
def test_a_file_that_is_no_picture_is_not_sent(
    name: str, content: bytes | None, reason: str, tmp_path: Path
) -> None:
    if content:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=f"--mask-url: .*{reason}"):
        typed(SCHEMA, "--mask", str(tmp_path / name))


def test_pictures_that_are_left_out_are_found_wherever_they_are() -> None:
    job_input = {
        "prompt": "data:image/png",
        "controlnet": [
            {"image_url": "https://example.com/a.png"},
            {"image_url": "data:image/png;base64,AA"},
            {"image_url": "data:image/png;base64"},
            {"image_url": "a.png"},
        ],
    }
    fields = fields_of(LATER)
    found = list(options.pictures_left_out(job_input, fields))
    assert found == ["controlnet[2].image_url", "controlnet[3].image_url"]
    assert list(options.pictures_left_out(job_input, fields, without=["controlnet"])) == []


def test_a_worker_s_error_names_the_options() -> None:
    error = "mask_blur: needs mask_url\nloras[0].path: was not found\nthe worker: is full"
    assert options.with_options_named(error, FIELDS) == (
        "--mask-blur: needs mask_url\n--loras[0].path: was not found\nthe worker: is full"
    )
