"""Inputs of jobs, good and bad, made from the request's JSON Schema: a new field is among them."""

import base64
import functools
import io
import random
import string
from collections.abc import Callable
from typing import Any

import jsonschema
from PIL import Image

from sdxl_worker.request import Request
from sdxl_worker.wording import field_schemas

Schema = dict[str, Any]
Fields = dict[str, Any]

# A miniature picture takes some tenths of a second within these.
CHEAP_MAX = {
    "height": 128,
    "width": 128,
    "num_images": 2,
    "num_inference_steps": 3,
    "refiner_inference_steps": 6,
    "mask_padding": 64,
    "steps": 6,
}
# How often valid jobs have a field. Many others go with these alone.
OFTEN = {"image_url": 0.5, "mode": 0.4, "mask_url": 0.4}
SELDOM = 0.2
# Of uploads. No worker takes it for a public one, and nothing listens there.
PRIVATE_ADDRESS = "http://127.0.0.1:9"
# What valid jobs have unless they say otherwise, since the defaults are those of a large model.
CHEAP: Fields = {
    "height": 64,
    "width": 64,
    "num_inference_steps": 2,
    "refiner_inference_steps": 0,
}
WORDS = ("a red circle", "a blue star", "two", "on white", "\u4e00\u53ea\u732b", "\U0001f431", "")
UNICODE = (
    "\x00",
    "\u202e",
    "\ud800",
    "\ufeff",
    "e\u0301" * 9,
    "\U0001f468\u200d\U0001f469",
    "\uff11",
)
# What addresses and names of files may not be, or not lead to.
STRANGE_ADDRESSES = (
    *("file:///etc/passwd", "/etc/passwd", "../../etc/passwd", "..", "a\x00.pth", "C:\\x", "~/x"),
    *(
        "http://127.0.0.1/",
        "http://169.254.169.254/latest/meta-data",
        "http://[::1]/",
        "gopher://x",
    ),
    *(
        "data:image/png;base64,",
        "data:image/png;base64,AAAA",
        "data:image/svg+xml,<svg/>",
        "data:,",
    ),
    *("https://user:hunter2@example.com/?key=hunter2", "%2e%2e%2fx", "lanczos/../x", "x" * 100_000),
)
STRANGE_NUMBERS = (
    *(0, -1, 1, 0.5, -0.0, 1e-320, 1e308, 2**31, 2**53, 2**63, 2**64, -(2**63)),
    *(10**400, float("inf"), float("-inf"), float("nan")),
)


def png_bytes(picture: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "png", **options)
    return buffer.getvalue()


def data_uri(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64," + base64.b64encode(data).decode("ascii")


@functools.cache
def picture_uri() -> str:
    """A small valid picture."""
    return data_uri(png_bytes(Image.linear_gradient("L").resize((64, 64)).convert("RGB")))


@functools.cache
def transparent_picture_uri() -> str:
    """A small valid picture that can be its own mask."""
    picture = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    picture.putalpha(_mask())
    return data_uri(png_bytes(picture))


@functools.cache
def mask_uri() -> str:
    """A small valid mask: neither empty nor full, whichever way round and wherever it is cut."""
    return data_uri(png_bytes(_mask()))


def _mask() -> Image.Image:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (20, 24, 44, 40))
    return mask


@functools.cache
def schemas() -> dict[str, Schema]:
    return field_schemas(Request)


@functools.cache
def ties() -> dict[str, jsonschema.Draft202012Validator]:
    """Of some fields, what the whole input has to be if it has the field."""
    rules = Request.model_json_schema()["dependentSchemas"]
    return {name: jsonschema.Draft202012Validator(rule) for name, rule in rules.items()}


def valid_value(random_: random.Random, schema: Schema, highest: int | None = None) -> Any:
    """A value that the schema allows.

    Args:
        highest: a bound below the schema's own.
    """
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return random_.choice(schema["enum"])
    if (options := schema.get("anyOf") or schema.get("oneOf")) and "type" not in schema:
        return valid_value(random_, random_.choice(options), highest)
    match schema.get("type"):
        case "boolean":
            return random_.random() < 0.5
        case "integer":
            multiple = schema.get("multipleOf", 1)
            least, most = _bounds(schema, highest)
            return multiple * random_.randint(-(-int(least) // multiple), int(most) // multiple)
        case "number":
            least, most = _bounds(schema, highest)
            # Three decimals stay between the bounds where these are excluded.
            return round(least + (most - least) * random_.uniform(0.01, 0.99), 3)
        case "array":
            fewest = schema.get("minItems", 0)
            count = random_.randint(fewest, min(schema.get("maxItems", 3), fewest + 2))
            return [valid_value(random_, schema.get("items", {})) for _ in range(count)]
        case "object":
            return _valid_object(random_, schema)
        case "string":
            if "data:image" in schema.get("pattern", ""):
                return picture_uri()
            if "https?://" in schema.get("pattern", ""):
                return f"{PRIVATE_ADDRESS}/picture"
            if "[!-~]" in schema.get("pattern", ""):
                return f"token{random_.getrandbits(64)}"  # each needs one of its own
            words = " ".join(random_.choices(WORDS, k=random_.randint(1, 5))).strip()
            return words[: schema.get("maxLength")] or "x"
    return None


def _valid_object(random_: random.Random, schema: Schema) -> Fields:
    needed = schema.get("required", ())
    ties_inside = [jsonschema.Draft202012Validator(tie) for tie in schema.get("anyOf", ())]
    while True:
        fields = {
            name: valid_value(random_, one, CHEAP_MAX.get(name))
            for name, one in schema.get("properties", {}).items()
            if name in needed or random_.random() < 0.5
        }
        keeps_ties = not ties_inside or any(tie.is_valid(fields) for tie in ties_inside)
        # JSON Schema cannot say the last of it.
        if keeps_ties and fields.get("start", 0) < fields.get("end", 1):
            return fields


def valid(random_: random.Random) -> Fields:
    """A quick job with some of the fields, which `parse_request` takes."""
    job_input = {"prompt": valid_value(random_, {"type": "string"}), **CHEAP}
    for name, schema in schemas().items():
        if name not in job_input and random_.random() < OFTEN.get(name, SELDOM):
            job_input[name] = valid_value(random_, schema, CHEAP_MAX.get(name))
    # An empty list is a field that is not given: nothing goes with it.
    job_input = {name: value for name, value in job_input.items() if value != []}
    while broken := [
        name for name, rule in ties().items() if name in job_input and not rule.is_valid(job_input)
    ]:
        del job_input[broken[0]]
    if "mask_url" in job_input:
        job_input["mask_url"] = mask_uri()
    if job_input.get("mask_from_alpha"):
        job_input["image_url"] = transparent_picture_uri()
    if "upload_urls" in job_input:
        count = job_input.get("num_images", 1)
        job_input["upload_urls"] = [f"{PRIVATE_ADDRESS}/{i}" for i in range(count)]
    return job_input


def junk(random_: random.Random, depth: int = 0) -> Any:
    """Any JSON, mostly strange; with numbers that only Python takes for JSON."""
    makers: list[Callable[[], Any]] = [
        lambda: random_.choice((None, True, False, [], {}, "")),
        lambda: random_.choice(STRANGE_NUMBERS),
        lambda: "".join(random_.choices(string.printable, k=random_.randint(1, 30))),
        lambda: "".join(random_.choices(UNICODE, k=random_.randint(1, 5))),
        lambda: random_.choice("ab\u00e9") * random_.choice((100, 20_000, 20_001, 300_000)),
        lambda: random_.choice(("http://[", "https://", *STRANGE_ADDRESSES)),
    ]
    if depth < 4:
        makers += [
            lambda: [junk(random_, depth + 1) for _ in range(random_.randint(1, 4))],
            lambda: {
                str(junk(random_, 4))[:40]: junk(random_, depth + 1)
                for _ in range(random_.randint(1, 4))
            },
        ]
        if depth == 0:
            makers.append(lambda: _nested(random_.choice((50, 400)), random_.random() < 0.5))
    return random_.choice(makers)()


def edge(random_: random.Random, schema: Schema) -> Any:
    """A value at a bound of the schema, or just beyond it, or of a type beside the right one."""
    bounds = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
    numbers = [schema[name] + step for name in bounds if name in schema for step in (-1, 0, 1, 0.5)]
    right = valid_value(random_, schema)
    near = [str(right), [right], {"value": right}, *numbers]
    if "maxLength" in schema:
        near += ["x" * (schema["maxLength"] + step) for step in (-1, 0, 1)]
    if "enum" in schema:
        near += [str(right).lower(), f"{right} ", str(right)[:-1]]
    return random_.choice(near)


def wrong_inside(random_: random.Random, schema: Schema) -> Any:
    """Of an object, or of a list of objects: one that is right but for what is inside it."""
    if schema.get("type") == "array" and "items" in schema:
        entries = [wrong_inside(random_, schema["items"]) for _ in range(random_.randint(1, 3))]
        return entries * random_.choice((1, 1, 1, 4, 400))
    fields = schema.get("properties")
    if not fields:
        return junk(random_)
    value = _valid_object(random_, schema)
    name = random_.choice(list(fields))
    value[name] = random_.choice(
        (
            lambda: edge(random_, fields[name]),
            lambda: random_.choice(STRANGE_ADDRESSES),
            lambda: junk(random_, 2),
        )
    )()
    if random_.random() < 0.1:
        del value[random_.choice(list(value))]
    return value


def fuzzed(random_: random.Random) -> Any:
    """An input that may be wrong in any way, or in none."""
    if random_.random() < 0.05:
        return junk(random_)
    chosen = random_.sample(list(schemas().items()), random_.randint(0, 6))
    job_input: Fields = {"prompt": "a red circle"} if random_.random() < 0.5 else {}
    for name, schema in chosen:
        makers = (
            lambda schema=schema: valid_value(random_, schema),
            lambda schema=schema: edge(random_, schema),
            lambda schema=schema: wrong_inside(random_, schema),
            lambda: junk(random_),
        )
        value = random_.choice(makers)()
        if random_.random() < 0.1:
            name = random_.choice((name.upper(), f"{name} ", name[1:], str(junk(random_, 4))))
        job_input[name] = value
    return job_input


def _bounds(schema: Schema, highest: int | None) -> tuple[float, float]:
    def given(default: float, *names: str) -> float:
        return next((schema[name] for name in names if name in schema), default)

    least = given(0, "minimum", "exclusiveMinimum")
    most = given(least + 1000, "maximum", "exclusiveMaximum")
    return least, most if highest is None else min(most, highest)


def _nested(depth: int, in_lists: bool) -> Any:
    value: Any = "deep"
    for _ in range(depth):
        value = [value] if in_lists else {"x": value}
    return value
