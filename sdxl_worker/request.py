"""A job's input becomes an immutable, fully validated `Request`, or one readable `RequestError`.

The fields, names and defaults are those of worker-sdxl 2.1.0. Each is declared once, in `Request`:
validation, error messages, JSON Schema and the README's table all come from that declaration.
"""

import difflib
import functools
import json
import secrets
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from sdxl_worker.errors import RequestError

SchedulerName = Literal[
    "PNDM",
    "KLMS",
    "DDIM",
    "K_EULER",
    "K_EULER_ANCESTRAL",
    "DPMSolverMultistep",
    "DPMSolverSinglestep",
]

# Some 5,000 tokens: far more than a model can follow, and little enough to encode in a moment.
MAX_PROMPT_CHARACTERS = 20_000
# JSON numbers are exact up to here in every client, JavaScript's included.
MAX_SEED = 2**53 - 1
# An error describes a longer value instead of repeating it.
MAX_SHOWN_CHARACTERS = 60
# Two steps of the base, and one of the refiner where there is one.
CHECK_INPUT = {"prompt": "a red circle", "seed": 0, "num_inference_steps": 2, "strength": 0.02}


def _integral(value: object) -> object:
    """JSON has one number type: a client may well send 1024 as 1024.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


FromIntegralFloat = BeforeValidator(_integral)
Prompt = Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS)]
# With at most 2048 a side, no picture is over 2048 * 2048 pixels.
Side = Annotated[int, Field(ge=64, le=2048, multiple_of=8), FromIntegralFloat]
ImageUrl = Annotated[str, Field(pattern=r"(?i)^(https?://[^/]|data:image/)")]


class Request(BaseModel):
    """What to make. Sizes are in pixels; `seed` is never negative here: a random one is drawn."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    prompt: Prompt = Field(
        default="",
        description="What to draw. Required, unless `image_url` is given. Longer than 75 tokens "
        "is fine: the whole of it counts.",
    )
    negative_prompt: Prompt = Field(
        default="", description="What to keep out. Needs a `guidance_scale` above 1."
    )
    height: Side | None = Field(
        default=None,
        description="Pixels. Not given: the model's native size (1024 for SDXL), or what "
        "`image_url` has.",
    )
    width: Side | None = Field(default=None, description="As `height`.")
    seed: Annotated[int, Field(ge=-1, le=MAX_SEED), FromIntegralFloat] = Field(
        default=-1,
        description="Picture i is drawn from `seed` + i. -1 or not given: a random one of 32 "
        "bits, told in the output.",
    )
    scheduler: SchedulerName = Field(
        default="DDIM", description="The sampler, of the base and the refiner alike."
    )
    num_inference_steps: Annotated[int, Field(ge=1, le=150), FromIntegralFloat] = Field(
        default=25, description="Steps of the base."
    )
    refiner_inference_steps: Annotated[int, Field(ge=0, le=150), FromIntegralFloat] = Field(
        default=50,
        description="Length of the refiner's schedule, of which it runs the share `strength`. "
        "0, or a share of less than one step: no refiner.",
    )
    guidance_scale: Annotated[float, Field(ge=0, le=30)] = Field(
        default=7.5,
        description="How closely the base and the refiner follow the prompt. 1 and below: no "
        "guidance, and half the work.",
    )
    strength: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.3,
        description="How much the refiner may change: the share of its schedule that it runs. "
        "Not used with `high_noise_frac`.",
    )
    image_url: ImageUrl | None = Field(
        default=None,
        description="A picture for the refiner to refine in place of the base's: an address, or "
        "the picture itself as a data URI.",
    )
    num_images: Annotated[int, Field(ge=1, le=8), FromIntegralFloat] = Field(
        default=1, description="How many pictures."
    )
    high_noise_frac: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="Ensemble of experts: the base does this share of `num_inference_steps`, the "
        "refiner the rest; 0.8 is what SDXL was trained for. Not used with `image_url`.",
    )
    preview: bool = Field(
        default=False,
        description="Progress updates carry a small JPEG of the picture so far.",
    )
    check: bool = Field(
        default=False,
        description="Answer with a report on the worker in place of pictures. Alone, it draws a "
        "picture in 2 steps; beside other fields, the picture that they ask for.",
    )

    @property
    def refiner_steps_run(self) -> int:
        """Denoising steps of the refiner where `strength` rules, as diffusers counts them."""
        return int(self.refiner_inference_steps * self.strength)


def parse_request(job_input: object) -> Request:
    """Validate `job["input"]`.

    `null` means "not given" for every field, and so does an empty `image_url`, as in 2.1.0.
    `{"check": true}` alone stands for a small request of its own.

    Raises:
        RequestError: with every problem, one a line: the field, the rule and the value.
    """
    if not isinstance(job_input, Mapping):
        raise RequestError(f"input: must be an object with a prompt in it; got {shown(job_input)}")
    given = {name: value for name, value in job_input.items() if value is not None}
    if given.get("image_url") == "":
        del given["image_url"]

    if given == {"check": True}:
        given |= CHECK_INPUT

    problems = [_unknown_field(name) for name in given if name not in Request.model_fields]
    if "prompt" not in given and "image_url" not in given:
        problems.append("prompt: required, unless image_url is given; got nothing")
    try:
        known = {name: given[name] for name in Request.model_fields if name in given}
        request = Request.model_validate(known)
    except ValidationError as error:
        # A field that breaks several of its rules gets one line all the same.
        names = dict.fromkeys(str(problem["loc"][0]) for problem in error.errors())
        problems += [_broken_rule(name, given[name]) for name in names]
    if problems:
        raise RequestError("\n".join(problems))

    if request.seed == -1:
        # model_copy keeps the record of which fields were given, which tells wish from default.
        request = request.model_copy(update={"seed": secrets.randbits(32)})
    return request


@functools.cache
def field_schemas() -> dict[str, dict[str, Any]]:
    """JSON Schema of each field, with the bounds of an optional one at its top level."""
    schemas = {}
    for name, schema in Request.model_json_schema()["properties"].items():
        given, *_ = schema.get("anyOf", [schema])
        schemas[name] = {**schema, **given}
    return schemas


def rule(name: str) -> str:
    """The rule of field `name` in words: "an integer from 1 to 8"."""
    schema = field_schemas()[name]
    if "enum" in schema:
        return "one of " + ", ".join(schema["enum"])
    if "pattern" in schema:
        return "an http:// or https:// address, or a data:image/ URI"
    if schema["type"] == "boolean":
        return "true or false"
    words = {"integer": "an integer", "number": "a number", "string": "a string"}[schema["type"]]
    if "minimum" in schema:
        words += f" from {schema['minimum']} to {schema['maximum']}"
    if "exclusiveMinimum" in schema:
        words += f" above {schema['exclusiveMinimum']} and below {schema['exclusiveMaximum']}"
    if "multipleOf" in schema:
        words += f", a multiple of {schema['multipleOf']}"
    if "maxLength" in schema:
        words += f" of at most {schema['maxLength']} characters"
    return words


def _unknown_field(name: object) -> str:
    fields = Request.model_fields
    return (
        f"{shown(name)}: no such field{_near_match(name, fields)}; "
        f"the fields are {', '.join(fields)}"
    )


def _broken_rule(name: str, value: object) -> str:
    hint = _near_match(value, field_schemas()[name].get("enum", ()))
    return f"{name}: must be {rule(name)}; got {shown(value)}{hint}"


def _near_match(value: object, choices: Iterable[str]) -> str:
    by_lower_case = {choice.lower(): choice for choice in choices}
    matches = difflib.get_close_matches(str(value)[:100].lower(), by_lower_case, n=1)
    return f" (did you mean {by_lower_case[matches[0]]}?)" if matches else ""


def shown(value: object) -> str:
    """A value as JSON, for an error message: short, and without the secrets of a URL's query."""
    if isinstance(value, str):
        if len(value) > MAX_SHOWN_CHARACTERS:
            return f"a string of {len(value)} characters"
        if "?" in value and "://" in value:
            value = without_secrets(value)
    text = json.dumps(value, ensure_ascii=False, default=lambda other: type(other).__name__)
    # JSON can carry half a character (a lone surrogate), which no answer can be encoded with.
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= MAX_SHOWN_CHARACTERS else text[:MAX_SHOWN_CHARACTERS] + "..."


def without_secrets(url: str) -> str:
    """The address without user, password, query and fragment, any of which may hold a secret.

    It need not be a valid one, and is not parsed: `urlsplit` raises at "http://[".
    """
    scheme, _, rest = url.partition("://")
    authority, slash, path = rest.partition("?")[0].partition("#")[0].partition("/")
    return f"{scheme}://{authority.rpartition('@')[2]}{slash}{path}"
