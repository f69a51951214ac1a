"""A job's input becomes an immutable, fully validated `Request`, or one readable `RequestError`.

The fields of worker-sdxl 2.1.0 have their names and defaults here. Each field is declared once, in
`Request`, with the rules that tie it to others: validation, error messages, JSON Schema and the
documents' table all come from that declaration.
"""

import secrets
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from sdxl_worker.errors import RequestError
from sdxl_worker.wording import IN_WORDS, MAX_SHOWN_CHARACTERS, RULE, problems, shown

SchedulerName = Literal[
    "PNDM",
    "KLMS",
    "DDIM",
    "K_EULER",
    "K_EULER_ANCESTRAL",
    "DPMSolverMultistep",
    "DPMSolverSinglestep",
]

# Some 5,000 tokens: far more than a model can follow, and few enough to encode quickly.
MAX_PROMPT_CHARACTERS = 20_000
# JSON numbers are exact up to here in every client, JavaScript's included.
MAX_SEED = 2**53 - 1
# Several times what all fields together have room for, and little enough to validate at once.
MAX_VALUES = 1000
MAX_NESTING = 8
# Two steps of the base, and one of the refiner where there is one.
CHECK_INPUT = {"prompt": "a red circle", "seed": 0, "num_inference_steps": 2, "strength": 0.02}


def _integral(value: object) -> object:
    """JSON has one number type: a client may well send 1024 as 1024.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _readable(name: object) -> str:
    """JSON can carry half a character (a lone surrogate), at which pydantic stops reading names.

    What can be no field's name is described, which costs less than to pass it on.
    """
    if not isinstance(name, str) or len(name) > MAX_SHOWN_CHARACTERS:
        return shown(name)
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def _drawn(seed: int) -> int:
    return secrets.randbits(32) if seed == -1 else seed


FromIntegralFloat = BeforeValidator(_integral)
Prompt = Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS)]
# With at most 2048 a side, no picture is over 2048 * 2048 pixels.
MIN_SIDE_PX, MAX_SIDE_PX, SIDE_MULTIPLE_PX = 64, 2048, 8
Side = Annotated[
    int, Field(ge=MIN_SIDE_PX, le=MAX_SIDE_PX, multiple_of=SIDE_MULTIPLE_PX), FromIntegralFloat
]
ImageUrl = Annotated[
    str,
    Field(
        pattern=r"(?i)^(https?://[^/]|data:image/)",
        json_schema_extra={RULE: "an http:// or https:// address, or a data:image/ URI"},
    ),
]


class InputModel(BaseModel):
    """An object that a caller sends, immutable once it is validated. `null` means "not given"."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @classmethod
    def as_given(cls, fields: Mapping[Any, Any]) -> dict[str, Any]:
        """The fields that were given, without those whose value means "not given"."""
        return {_readable(name): value for name, value in fields.items() if value is not None}

    @classmethod
    def broken_ties(cls, given: Mapping[Any, Any]) -> Iterator[tuple[str, str]]:  # noqa: ARG003
        """Rules between fields that the input breaks: the field, and the problem in words.

        The model's JSON Schema has to state the same rules.
        """
        yield from ()

    @model_validator(mode="wrap")
    @classmethod
    def _tell_all_problems(cls, fields: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        """Validate as pydantic does, but report broken ties together with the other problems."""
        if not isinstance(fields, Mapping):
            return validate(fields)
        given = cls.as_given(fields)
        errors = [
            InitErrorDetails(type=PydanticCustomError(IN_WORDS, problem), loc=(name,), input=None)
            for name, problem in cls.broken_ties(given)
        ]
        try:
            model = validate(given)
        except ValidationError as error:
            errors += [_again(details) for details in error.errors(include_url=False)]
        if errors:
            raise ValidationError.from_exception_data(cls.__name__, errors)
        return model


def _again(details: Any) -> InitErrorDetails:
    """An error that was raised, in a form that can be raised again."""
    kind = details["type"]
    if kind == IN_WORDS:
        kind = PydanticCustomError(IN_WORDS, details["msg"])
    again = InitErrorDetails(type=kind, loc=details["loc"], input=details["input"])
    return InitErrorDetails(**again, ctx=details["ctx"]) if "ctx" in details else again


class Request(InputModel):
    """What to make. Sizes are in pixels."""

    # Not in the docstring, which is published: once validated, `seed` is never -1.

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"required": ["prompt"]},
                {
                    "required": ["image_url"],
                    "properties": {"image_url": {"not": {"type": "null"}}},
                },
                {
                    "required": ["check"],
                    "maxProperties": 1,
                    "properties": {"check": {"const": True}},
                },
            ]
        }
    )

    prompt: Prompt = Field(
        default="",
        description="What to draw. Required, unless `image_url` is given. It may be "
        "longer than 75 tokens: all of it counts.",
    )
    negative_prompt: Prompt = Field(
        default="", description="What to keep out. Needs a `guidance_scale` above 1."
    )
    height: Side | None = Field(
        default=None,
        description="Pixels. Not given: the model's native size (1024 for SDXL), or that "
        "of the picture in `image_url`.",
    )
    width: Side | None = Field(default=None, description="As `height`.")
    seed: Annotated[int, Field(ge=-1, le=MAX_SEED), FromIntegralFloat, AfterValidator(_drawn)] = (
        Field(
            default=-1,
            validate_default=True,
            description="Picture i is drawn from `seed` + i. -1 or not given: a random one of 32 "
            "bits, which the output tells.",
        )
    )
    scheduler: SchedulerName = Field(
        default="DDIM", description="The sampler of both the base and the refiner."
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
        "picture in 2 steps of the base, and 1 of the refiner if there is one; beside other "
        "fields, the picture that they ask for.",
    )

    @classmethod
    def as_given(cls, fields: Mapping[Any, Any]) -> dict[str, Any]:
        """An empty `image_url` means none, as in 2.1.0. A check alone gets `CHECK_INPUT` too."""
        given = super().as_given(fields)
        if given.get("image_url") == "":
            del given["image_url"]
        return given | CHECK_INPUT if given == {"check": True} else given

    @classmethod
    def broken_ties(cls, given: Mapping[Any, Any]) -> Iterator[tuple[str, str]]:
        if "prompt" not in given and "image_url" not in given:
            yield "prompt", "required, unless image_url is given; got nothing"

    def seed_of(self, index: int) -> int:
        """The seed of picture `index`. After the largest seed comes 0."""
        return (self.seed + index) % (MAX_SEED + 1)

    @property
    def refiner_steps_run(self) -> int:
        """Denoising steps of the refiner where `strength` decides, as diffusers counts them."""
        return int(self.refiner_inference_steps * self.strength)


def parse_request(job_input: object) -> Request:
    """Validate `job["input"]`.

    Raises:
        RequestError: with each problem on a line of its own: the field, the rule and the value.
    """
    if not isinstance(job_input, Mapping):
        raise RequestError(f"input: must be an object with a prompt in it; got {shown(job_input)}")
    _check_extent(job_input)
    try:
        return Request.model_validate(job_input)
    except ValidationError as error:
        raise RequestError("\n".join(problems(error, Request))) from None


def _check_extent(job_input: Mapping[Any, Any]) -> None:
    """Refuse what no request looks like, before it costs time. Strings may be of any length."""
    count, level = 0, [job_input]
    for _ in range(MAX_NESTING):
        count += sum(map(len, level))
        if count > MAX_VALUES:
            raise RequestError(f"input: must hold at most {MAX_VALUES} values in all; got more")
        level = [inner for holder in level for inner in _values(holder) if _is_holder(inner)]
    if level:
        raise RequestError(f"input: must be at most {MAX_NESTING} objects or lists deep; got more")


def _is_holder(value: object) -> bool:
    return isinstance(value, (Mapping, list, tuple))


def _values(holder: Any) -> Iterable[Any]:
    return holder.values() if isinstance(holder, Mapping) else holder
