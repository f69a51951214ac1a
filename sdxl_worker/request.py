"""A job's input becomes an immutable, fully validated `Request`, or one readable `RequestError`.

The fields of worker-sdxl 2.1.0 have their names and defaults here. Each field is declared once, in
`Request`, with the rules that tie it to others: validation, error messages, JSON Schema and the
documents' table all come from that declaration.
"""

import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, TypeGuard, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from sdxl_worker.errors import RequestError
from sdxl_worker.prompt_weights import problem
from sdxl_worker.samplers import (
    SAMPLERS,
    SCHEDULE_SPELLINGS,
    SCHEDULES,
    SPELLINGS,
    SamplerName,
    ScheduleName,
    why_not,
)
from sdxl_worker.wording import (
    ALIASES,
    IN_WORDS,
    MAX_SHOWN_CHARACTERS,
    NAMES,
    RULE,
    problems,
    shown,
)

TEXT_FIELDS = ("prompt", "negative_prompt", "prompt_2", "negative_prompt_2")
# Some 5,000 tokens: far more than a model can follow, and few enough to encode quickly.
MAX_PROMPT_CHARACTERS = 20_000
# The largest that torch's generators take. JavaScript and others keep numbers up to 2**53 exactly.
MAX_SEED = 2**64 - 1
# The models were trained with as many timesteps.
MAX_STEPS = 1000
# How much the base redraws of a picture where the request does not say.
REDRAW_STRENGTH = 0.75
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


def _or_zero(schema: dict[str, Any]) -> None:
    """Publish what `NOT_GIVEN` takes for a side that is not given."""
    schema["anyOf"].insert(-1, {"const": 0})


def _drawn(seed: int) -> int:
    return secrets.randbits(32) if seed == -1 else seed


FromIntegralFloat = BeforeValidator(_integral)
Prompt = Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS)]
MIN_SIDE_PX, MAX_SIDE_PX, SIDE_MULTIPLE_PX = 64, 4096, 8
Side = Annotated[
    int, Field(ge=MIN_SIDE_PX, le=MAX_SIDE_PX, multiple_of=SIDE_MULTIPLE_PX), FromIntegralFloat
]
Share = Annotated[float, Field(ge=0, le=1)]
ImageUrl = Annotated[
    str,
    Field(
        pattern=r"(?i)^(https?://[^/]|data:image/)",
        json_schema_extra={
            RULE: "an http:// or https:// address, or a data:image/ URI (before plain base64, put "
            "data:image/png;base64,)"
        },
    ),
]
UploadUrl = Annotated[
    str,
    Field(
        pattern=r"(?i)^https?://[^/]",
        json_schema_extra={RULE: "an http:// or https:// address"},
    ),
]
MAX_IMAGES = 16

OutputFormat = Literal["png", "jpeg", "webp"]
Schedule = Annotated[
    ScheduleName,
    Field(
        json_schema_extra={
            "enum": list(SCHEDULE_SPELLINGS),
            NAMES: list(SCHEDULES),
            RULE: "one of " + ", ".join(SCHEDULES) + ", or a name of these in docs/samplers.md",
        }
    ),
]
MAX_ADAPTERS = 8
AdapterPath = Annotated[
    str,
    Field(
        pattern=r"^(https://[^/\s]\S*|[^/\\:\s][^\\:\r\n]*)$",
        min_length=1,
        max_length=2000,
        json_schema_extra={
            ALIASES: ["url", "lora", "file", "name"],
            RULE: "an https:// address, org/repo or org/repo/file of the hub (with @revision), or "
            "a file name in the worker's LORA_DIR",
        },
    ),
]


# What a control picture may be, and other names of that.
ControlName = Literal[
    "canny",
    "depth",
    "pose",
    "softedge",
    "scribble",
    "lineart",
    "normal",
    "segment",
    "tile",
    "repaint",
]
CONTROL_TYPES: tuple[ControlName, ...] = get_args(ControlName)
CONTROL_SPELLINGS: dict[str, str] = {name: name for name in CONTROL_TYPES} | {
    "openpose": "pose",
    "dwpose": "pose",
    "hed": "softedge",
    "soft_edge": "softedge",
    "teed": "softedge",
    "mlsd": "lineart",
    "normals": "normal",
    "seg": "segment",
    "segmentation": "segment",
    "inpaint": "repaint",
}
# Those that no preprocessing makes of a picture.
FINISHED_MAPS = ("softedge", "scribble", "lineart", "normal", "segment")
ControlType = Annotated[
    ControlName,
    Field(
        json_schema_extra={
            "enum": list(CONTROL_SPELLINGS),
            NAMES: list(CONTROL_TYPES),
            ALIASES: ["module", "control_type"],
            RULE: "one of " + ", ".join(CONTROL_TYPES),
        }
    ),
]
MAX_CONTROLS = 3
MAX_IMAGE_PROMPTS = 2
Upscaler = Annotated[
    str,
    Field(
        pattern=r"^[^/\\:\s][^/\\:\r\n]*$",
        min_length=1,
        max_length=200,
        json_schema_extra={RULE: "lanczos, or a file name in the worker's UPSCALER_DIR"},
    ),
]


def _is_share(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


@dataclass(frozen=True)
class Tie:
    """A rule for a field that makes sense only beside some others, or without some others."""

    field: str
    words: str
    needs: tuple[Mapping[str, Any], ...] = ()
    """One of these has to hold, if there are any: fields and their values, `...` for any, None for
    none."""
    clashes: tuple[Mapping[str, Any], ...] = ()
    """None of these may hold."""

    def is_broken(self, given: Mapping[str, Any]) -> bool:
        return _is_used(self.field, given) and (
            (bool(self.needs) and not any(_hold(others, given) for others in self.needs))
            or any(_hold(others, given) for others in self.clashes)
        )

    def json_schema(self) -> dict[str, Any]:
        """What the object has to be if it has the field."""
        kept: list[dict[str, Any]] = [{"not": _held(others)} for others in self.clashes]
        if self.needs:
            kept.append({"anyOf": [_held(others) for others in self.needs]})
        return {"anyOf": [{"not": _held({self.field: ...})}, {"allOf": kept}]}


def _is_used(name: str, given: Mapping[str, Any]) -> bool:
    """A field that is given as it is by default may stand anywhere: some clients send them all."""
    return given.get(name) not in (None, Request.model_fields[name].default)


def _hold(others: Mapping[str, Any], given: Mapping[str, Any]) -> bool:
    return all(
        _is_used(name, given) == (value is not None)
        if value in (..., None)
        else given.get(name) in (value if isinstance(value, tuple) else (value,))
        for name, value in others.items()
    )


def _held(others: Mapping[str, Any]) -> dict[str, Any]:
    """`_hold` as JSON Schema."""
    values = {
        name: {"not": {"const": Request.model_fields[name].default}}
        if value is ...
        else {"enum": list(value)}
        if isinstance(value, tuple)
        else {"const": value}
        for name, value in others.items()
        if value is not None
    }
    unused = [{"not": _held({name: ...})} for name, value in others.items() if value is None]
    held: dict[str, Any] = {"required": list(values), "properties": values}
    return {**held, "allOf": unused} if unused else held


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

        The model's JSON Schema has to state the same rules, as far as it can.
        """
        yield from ()

    @classmethod
    def with_implied(cls, given: dict[str, Any]) -> dict[str, Any]:
        """The fields with those that follow from them."""
        return given

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
            model = validate(cls.with_implied(given))
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


# Values with which clients leave a field out.
NOT_GIVEN: tuple[tuple[str, Any], ...] = (
    ("image_url", ""),
    ("height", 0),
    ("width", 0),
    ("prompt_2", ""),
    ("negative_prompt_2", ""),
    ("model", ""),
    ("loras", []),
    ("embeddings", []),
    ("controlnet", []),
    ("ip_adapter", []),
)
MASKED: tuple[Mapping[str, Any], ...] = ({"mask_url": ...}, {"mask_from_alpha": ...})
REDRAWN: tuple[Mapping[str, Any], ...] = ({"mode": "img2img"}, *MASKED)
WITH_PICTURE: tuple[Mapping[str, Any], ...] = ({"image_url": ...},)

# What a sampler's name that gives a schedule does not go with: the names of the others.
OTHER_SCHEDULES: tuple[Mapping[str, Any], ...] = tuple(
    {
        "scheduler": tuple(name for name, (_, given) in SPELLINGS.items() if given == schedule),
        "schedule": tuple(name for name, one in SCHEDULE_SPELLINGS.items() if one != schedule),
    }
    for schedule in SCHEDULES
    if any(given == schedule for _, given in SPELLINGS.values())
)

# Which fields go with which. Of a field's broken ties, the first is told.
TIES = (
    Tie("mode", "needs image_url, the picture to start from", WITH_PICTURE),
    Tie("mask_url", "needs image_url, the picture to repaint", WITH_PICTURE),
    Tie("mask_from_alpha", "needs image_url, a picture with transparency", WITH_PICTURE),
    *(
        Tie(
            name,
            "does not go with mode refine; leave mode out, for the base to repaint",
            clashes=({"mode": "refine"},),
        )
        for name in ("mask_url", "mask_from_alpha")
    ),
    *(
        Tie(name, "needs a mask: mask_url, or mask_from_alpha", MASKED)
        for name in ("mask_invert", "mask_blur", "mask_padding")
    ),
    Tie(
        "refiner_strength",
        "needs mode img2img; without it, the refiner's share is strength: send that",
        REDRAWN,
    ),
    Tie(
        "loras",
        "are for the base, and image_url alone is for the refiner: add mode img2img",
        ({"image_url": None}, *REDRAWN),
    ),
    Tie(
        "controlnet",
        "is for the base, and image_url alone is for the refiner: add mode img2img",
        ({"image_url": None}, *REDRAWN),
    ),
    Tie(
        "ip_adapter",
        "is for the base, and image_url alone is for the refiner: add mode img2img",
        ({"image_url": None}, *REDRAWN),
    ),
    Tie(
        "hires",
        "is for the base, and image_url alone is for the refiner: add mode img2img, or take "
        "upscale, which redraws nothing",
        ({"image_url": None}, *REDRAWN),
    ),
    Tie("return_maps", "needs controlnet", ({"controlnet": ...},)),
    Tie(
        "schedule",
        "is another than the one that the scheduler's name gives; leave this out",
        clashes=OTHER_SCHEDULES,
    ),
    Tie(
        "fit",
        "needs image_url and mode (without mode, a picture keeps its size), or controlnet",
        ({"mode": ...}, *MASKED, {"controlnet": ...}),
    ),
)


class LoraField(InputModel):
    """One LoRA of `loras`."""

    path: AdapterPath
    scale: Annotated[float, Field(ge=-5, le=5)] = Field(
        default=1.0, json_schema_extra={ALIASES: ["weight", "strength", "lora_scale"]}
    )


class EmbeddingField(InputModel):
    """One textual inversion of `embeddings`."""

    path: AdapterPath
    token: Annotated[
        str,
        Field(
            pattern=r"^[!-~]{1,50}$",
            json_schema_extra={
                ALIASES: ["tokens", "trigger"],
                RULE: "what stands for it in the prompt: 1 to 50 letters, digits and signs, "
                "without spaces",
            },
        ),
    ]


class ControlField(InputModel):
    """One control picture of `controlnet`."""

    # That `start` is less than `end`, JSON Schema cannot say.
    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {
                    "properties": {
                        "type": {
                            "enum": [
                                spelling
                                for spelling, name in CONTROL_SPELLINGS.items()
                                if name not in FINISHED_MAPS
                            ]
                        }
                    }
                },
                {"required": ["preprocess"], "properties": {"preprocess": {"const": False}}},
            ]
        }
    )

    type: ControlType
    image_url: ImageUrl = Field(
        json_schema_extra={ALIASES: ["image", "input_image", "control_image", "control_image_url"]}
    )
    preprocess: bool = True
    scale: Annotated[float, Field(ge=0, le=4)] = Field(
        default=1.0, json_schema_extra={ALIASES: ["weight", "strength", "conditioning_scale"]}
    )
    start: Share = Field(
        default=0.0, json_schema_extra={ALIASES: ["start_percentage", "guidance_start"]}
    )
    end: Share = Field(default=1.0, json_schema_extra={ALIASES: ["end_percentage", "guidance_end"]})

    @classmethod
    def broken_ties(cls, given: Mapping[Any, Any]) -> Iterator[tuple[str, str]]:
        kind = cls.with_implied(dict(given)).get("type")
        if kind in FINISHED_MAPS and given.get("preprocess", True) is True:
            word = given["type"]
            name = kind if word == kind else f"{word} ({kind})"
            yield (
                "preprocess",
                f"there is no preprocessing for {name}: send a finished map, with preprocess false",
            )
        start, end = given.get("start", 0.0), given.get("end", 1.0)
        if _is_share(start) and _is_share(end) and start >= end:
            yield "start", f"must be less than end ({end:g}); got {start:g}"

    @classmethod
    def with_implied(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Other names of a type become its own."""
        kind = given.get("type")
        if isinstance(kind, str) and kind in CONTROL_SPELLINGS:
            return {**given, "type": CONTROL_SPELLINGS[kind]}
        return given


class ImagePromptField(InputModel):
    """One reference picture of `ip_adapter`."""

    image_url: ImageUrl = Field(
        json_schema_extra={ALIASES: ["image", "ip_adapter_image", "ip_adapter_image_url"]}
    )
    type: Literal["plus", "face", "style", "layout", "plain"] = "plus"
    scale: Annotated[float, Field(ge=0, le=2)] = Field(
        default=0.6, json_schema_extra={ALIASES: ["weight", "strength"]}
    )
    mask_url: ImageUrl | None = Field(
        default=None, json_schema_extra={ALIASES: ["mask", "mask_image_url"]}
    )


class HiresField(InputModel):
    """The larger second pass of `hires`."""

    scale: Annotated[float, Field(ge=1, le=2)] = Field(
        default=1.5, json_schema_extra={ALIASES: ["hr_scale", "factor"]}
    )
    strength: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.4, json_schema_extra={ALIASES: ["denoising_strength"]}
    )
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS), FromIntegralFloat] | None = Field(
        default=None, json_schema_extra={ALIASES: ["hr_second_pass_steps", "num_inference_steps"]}
    )
    upscaler: Upscaler = Field(default="lanczos", json_schema_extra={ALIASES: ["hr_upscaler"]})


class UpscaleField(InputModel):
    """The enlargement of `upscale`."""

    factor: Annotated[float, Field(gt=1, le=4)] = Field(
        default=2.0, json_schema_extra={ALIASES: ["scale", "upscaling_resize"]}
    )
    upscaler: Upscaler = Field(default="lanczos", json_schema_extra={ALIASES: ["upscaler_1"]})


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
            ],
        }
    )

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: GetJsonSchemaHandler) -> Any:
        schema = handler.resolve_ref_schema(handler(core))
        ties: dict[str, dict[str, Any]] = {}
        for tie in TIES:
            ties.setdefault(tie.field, {"allOf": []})["allOf"].append(tie.json_schema())
        return schema | {"dependentSchemas": ties}

    prompt: Prompt = Field(
        default="",
        description="What to draw. Required, unless `image_url` is given. It may be "
        "longer than 75 tokens: all of it counts.",
    )
    negative_prompt: Prompt = Field(
        default="", description="What to keep out. Needs a `guidance_scale` above 1."
    )
    prompt_2: Prompt | None = Field(
        default=None,
        description="What the second text encoder reads, and the refiner with it, where that is "
        "not `prompt`.",
    )
    negative_prompt_2: Prompt | None = Field(
        default=None, description="As `prompt_2`, of `negative_prompt`."
    )
    prompt_weighting: bool = Field(
        default=False,
        description="The prompts are in A1111's syntax: `(word:1.2)` weighs a word, `BREAK` begins "
        "a new chunk. Otherwise parentheses are parentheses.",
    )
    clip_skip: Annotated[int, Field(ge=0, le=12), FromIntegralFloat] | None = Field(
        default=None,
        description="Which layer of the text encoders is taken, counted from the last as in A1111: "
        "2 is SDXL's own and the default, and 0 and 1 are the same; 3 is the one before it.",
    )
    height: Side | None = Field(
        default=None,
        json_schema_extra=_or_zero,
        description="Pixels. Not given, or 0: the model's native size (1024 for SDXL), or that "
        "of the picture in `image_url`. Not used with `image_url` alone, without `mode`.",
    )
    width: Side | None = Field(default=None, json_schema_extra=_or_zero, description="As `height`.")
    seed: Annotated[int, Field(ge=-1, le=MAX_SEED), FromIntegralFloat, AfterValidator(_drawn)] = (
        Field(
            default=-1,
            validate_default=True,
            description="Picture i is drawn from `seed` + i. -1 or not given: a random one of 32 "
            "bits, which the output tells.",
        )
    )
    scheduler: SamplerName = Field(
        default="DDIM",
        json_schema_extra={
            "enum": list(SPELLINGS),
            NAMES: list(SAMPLERS),
            ALIASES: ["sampler", "sampler_name"],
            RULE: "one of " + ", ".join(SAMPLERS) + ", or a name of these in docs/samplers.md",
        },
        description="The sampler of both the base and the refiner. Names of A1111, ComfyUI and "
        'diffusers are taken too; "DPM++ 2M Karras" and the like give the `schedule` as well.',
    )
    schedule: Schedule | None = Field(
        default=None,
        json_schema_extra={ALIASES: ["scheduler_type", "schedule_type", "noise_schedule"]},
        description="How the steps are spaced. Not given: as the model is configured.",
    )
    num_inference_steps: Annotated[int, Field(ge=1, le=MAX_STEPS), FromIntegralFloat] = Field(
        default=25, json_schema_extra={ALIASES: ["steps"]}, description="Steps of the base."
    )
    refiner_inference_steps: Annotated[int, Field(ge=0, le=MAX_STEPS), FromIntegralFloat] = Field(
        default=50,
        description="Length of the refiner's schedule, of which it runs the share `strength`, "
        "with mode `img2img` the share `refiner_strength`. 0, or a share of less than one step: "
        "no refiner. Beside `loras`, which it does not take, it is off unless the request names "
        "it, `refiner_strength` or `high_noise_frac`.",
    )
    guidance_scale: Annotated[float, Field(ge=0, le=100)] = Field(
        default=7.5,
        json_schema_extra={
            ALIASES: ["guidance", "cfg_scale"],
            RULE: "a number from 0 to 100 (1 turns guidance off)",
        },
        description="How closely the base and the refiner follow the prompt. 1 and below: no "
        "guidance, and half the work.",
    )
    guidance_end: Share = Field(
        default=1.0,
        json_schema_extra={ALIASES: ["end_cfg_frac", "cfg_end", "cfg_cutoff"]},
        description="The share of the steps after which there is no guidance: those that are left "
        "are half the work.",
    )
    guidance_rescale: Share | None = Field(
        default=None,
        description="How much of guidance's excess contrast is taken back. Not given: 0, or 0.7 "
        "for models of v-prediction with zero terminal SNR.",
    )
    loras: Annotated[list[LoraField], Field(max_length=MAX_ADAPTERS)] | None = Field(
        default=None,
        json_schema_extra={ALIASES: ["lora", "lora_weights", "lora_url"]},
        description="LoRAs for the base and its text encoders, each with a `path` and a `scale` "
        "from -5 to 5, by default 1. [docs/lora.md](docs/lora.md) has the forms of `path`.",
    )
    embeddings: Annotated[list[EmbeddingField], Field(max_length=MAX_ADAPTERS)] | None = Field(
        default=None,
        json_schema_extra={ALIASES: ["textual_inversion", "textual_inversions"]},
        description="Textual inversions, each with a `path` and the `token` that stands for it in "
        "the prompt.",
    )
    model: Annotated[str, Field(max_length=200)] | None = Field(
        default=None,
        json_schema_extra={
            ALIASES: ["model_name", "checkpoint", "sd_model_checkpoint"],
            RULE: "a model's name, of at most 200 characters",
        },
        description="One of the worker's models in `MODELS_DIR`, by its name. Not given: that of "
        "`MODEL_DIR`.",
    )
    strength: Share = Field(
        default=0.3,
        json_schema_extra={ALIASES: ["denoising_strength", "prompt_strength"]},
        description="How much the refiner may change: the share of its schedule that it runs. "
        "Not used with `high_noise_frac`. With mode `img2img`: how much the base may change "
        f"`image_url`, by default {REDRAW_STRENGTH}.",
    )
    image_url: ImageUrl | None = Field(
        default=None,
        json_schema_extra={ALIASES: ["image", "init_image", "input_image"]},
        description="A picture to start from: an address, or the picture itself as a data URI. "
        "`mode` says what is done with it.",
    )
    mode: Literal["img2img", "refine"] | None = Field(
        default=None,
        json_schema_extra={RULE: "img2img (with mask_url, that is inpainting) or refine"},
        description="What is done with `image_url`. `img2img`: the base redraws it, and the "
        "refiner refines what comes out. `refine`, or not given: the refiner refines it.",
    )
    refiner_strength: Share = Field(
        default=0.3,
        description="With mode `img2img`: how much the refiner may change, as `strength` does "
        "without it.",
    )
    fit: Literal["crop", "pad", "stretch"] = Field(
        default="crop",
        description="How `image_url` is brought to `height` and `width` of another shape, and the "
        "pictures of `controlnet` to the shape that is drawn: what is too much cut off, what is "
        "missing filled up from the edges, or distorted.",
    )
    mask_url: ImageUrl | None = Field(
        default=None,
        json_schema_extra={ALIASES: ["mask", "mask_image"]},
        description="Inpainting: what is white in this picture is repainted in `image_url`, by "
        "mode `img2img`, and what is black stays as it is.",
    )
    mask_from_alpha: bool = Field(
        default=False,
        description="As `mask_url`, with transparency for white: that of `image_url` or, where "
        "`mask_url` is given, of that picture. What is transparent is repainted.",
    )
    mask_invert: bool = Field(
        default=False,
        json_schema_extra={ALIASES: ["inpainting_mask_invert"]},
        description="The other way round: what is black, or opaque, is repainted.",
    )
    mask_blur: Annotated[int, Field(ge=0, le=256), FromIntegralFloat] = Field(
        default=0,
        description="Pixels by which old and new are blended into each other, on either side of "
        "the mask's edge.",
    )
    mask_padding: Annotated[int, Field(ge=0, le=4096), FromIntegralFloat] | None = Field(
        default=None,
        json_schema_extra={ALIASES: ["padding_mask_crop", "inpaint_full_res_padding"]},
        description="Only the mask and so many pixels around it are painted, at the model's "
        "native size, and put back in their place: more detail in small places.",
    )
    controlnet: Annotated[list[ControlField], Field(max_length=MAX_CONTROLS)] | None = Field(
        default=None,
        json_schema_extra={ALIASES: ["controlnets", "control"]},
        description="Pictures that say where things are, for the base: each a `type`, an "
        "`image_url`, `preprocess` (by default true; false: it is a finished map), `scale` (by "
        "default 1), and `start` and `end`, the share of the schedule in which it counts. "
        "[docs/control.md](docs/control.md) has the types.",
    )
    return_maps: bool = Field(
        default=False,
        description="The answer holds `maps` too: what `controlnet` made of its pictures, as PNG.",
    )
    ip_adapter: Annotated[list[ImagePromptField], Field(max_length=MAX_IMAGE_PROMPTS)] | None = (
        Field(
            default=None,
            json_schema_extra={ALIASES: ["ip_adapters", "image_prompts"]},
            description="Pictures as prompts, for the base: each an `image_url`, a `type` (`plus`, "
            "`plain`, `face`; `style` or `layout` alone), a `scale` from 0 to 2, by default 0.6, "
            "and a `mask_url`, white where it counts. See [docs/control.md](docs/control.md).",
        )
    )
    hires: HiresField | None = Field(
        default=None,
        json_schema_extra={ALIASES: ["hires_fix", "hr"]},
        description="A larger second pass: what the base drew is enlarged by `scale` (up to 2, by "
        "default 1.5) with `upscaler`, and redrawn by the base with `strength` (0.4) of `steps` "
        "(those of the first pass); the refiner comes after that.",
    )
    upscale: UpscaleField | None = Field(
        default=None,
        description="Finished pictures are enlarged by `factor` (up to 4, by default 2) with "
        "`upscaler`: `lanczos`, or a file in the worker's `UPSCALER_DIR`. Nothing is redrawn.",
    )
    num_images: Annotated[int, Field(ge=1, le=MAX_IMAGES), FromIntegralFloat] = Field(
        default=1,
        json_schema_extra={ALIASES: ["num_outputs", "n", "samples"]},
        description="How many pictures.",
    )
    high_noise_frac: Share | None = Field(
        default=None,
        json_schema_extra={RULE: "a number from 0 to 1 (0 and 1 turn it off)"},
        description="Ensemble of experts: the base does this share of `num_inference_steps`, the "
        "refiner the rest; 0.8 is what SDXL was trained for. 0 and 1: off. Not used where the "
        "refiner refines `image_url`.",
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
    output_format: OutputFormat | None = Field(
        default=None,
        json_schema_extra={ALIASES: ["format", "image_format"]},
        description="Of the pictures. Not given: what the worker's owner set, otherwise `png`.",
    )
    output_quality: Annotated[int, Field(ge=1, le=100), FromIntegralFloat] = Field(
        default=95,
        json_schema_extra={ALIASES: ["quality", "image_quality"]},
        description="Of `jpeg` and `webp`: the higher, the larger. `webp` of 100 is lossless.",
    )
    on_too_large: Literal["error", "jpeg"] = Field(
        default="error",
        description="What becomes of pictures that the platform would not take for their size: "
        "an error, or JPEG of the best quality that fits.",
    )
    duplicate_first: bool = Field(
        default=True,
        description="The answer holds the first picture twice, in `images` and as `image_url`, "
        "as that of 2.1.0. `false`: no `image_url`, unless it is a link.",
    )
    upload_urls: (
        Annotated[
            list[UploadUrl],
            Field(min_length=1, max_length=MAX_IMAGES, json_schema_extra={"uniqueItems": True}),
        ]
        | None
    ) = Field(
        default=None,
        description="One presigned PUT address for each picture, which is uploaded there.",
    )

    @classmethod
    def as_given(cls, fields: Mapping[Any, Any]) -> dict[str, Any]:
        """An empty `image_url` and sides of 0 mean none, as in 2.1.0, and so do other empty
        values. A check alone gets `CHECK_INPUT` too.
        """
        given = super().as_given(fields)
        for name, none in NOT_GIVEN:
            if name in given and given[name] == none and given[name] is not False:
                del given[name]
        return given | CHECK_INPUT if given == {"check": True} else given

    @classmethod
    def broken_ties(cls, given: Mapping[Any, Any]) -> Iterator[tuple[str, str]]:
        if "prompt" not in given and "image_url" not in given:
            yield "prompt", "required, unless image_url is given; got nothing"
        for tie in TIES:
            if tie.is_broken(given):
                yield tie.field, tie.words
        if given.get("prompt_weighting") is True:
            for name in TEXT_FIELDS:
                text = given.get(name)
                if isinstance(text, str) and len(text) <= MAX_PROMPT_CHARACTERS:
                    wrong = problem(text)
                    if wrong is not None:
                        yield name, wrong
        scheduler = given.get("scheduler")
        no_sampler = why_not(scheduler) if isinstance(scheduler, str) else None
        if no_sampler is not None:
            yield "scheduler", no_sampler
        embeddings = given.get("embeddings")
        if isinstance(embeddings, list):
            tokens = [
                str(one.get("token")).lower() for one in embeddings if isinstance(one, Mapping)
            ]
            if len(set(tokens)) < len(tokens):
                yield "embeddings", "each needs a token of its own, whatever its capitals"
        urls, num_images = given.get("upload_urls"), given.get("num_images", 1)
        if isinstance(urls, list) and any(urls.count(url) > 1 for url in urls[: MAX_IMAGES + 1]):
            yield "upload_urls", "must all differ, or one picture would overwrite another"
        if isinstance(urls, list) and isinstance(num_images, int) and len(urls) != num_images:
            yield (
                "upload_urls",
                f"must be one address for each of num_images ({num_images}); got {len(urls)}",
            )

    @classmethod
    def with_implied(cls, given: dict[str, Any]) -> dict[str, Any]:
        """A mask makes it image to image, which has its own default of `strength`. Samplers and
        schedules get their own names.
        """
        scheduler, schedule = given.get("scheduler"), given.get("schedule")
        if isinstance(schedule, str) and schedule in SCHEDULE_SPELLINGS:
            given = {**given, "schedule": SCHEDULE_SPELLINGS[schedule]}
        if isinstance(scheduler, str) and scheduler in SPELLINGS:
            name, of_name = SPELLINGS[scheduler]
            given = {**given, "scheduler": name}
            if of_name is not None and given.get("schedule") in (None, of_name):
                given["schedule"] = of_name
        if any(_hold(mask, given) for mask in MASKED):
            given = {"mode": "img2img", **given}
        return {"strength": REDRAW_STRENGTH, **given} if given.get("mode") == "img2img" else given

    def seed_of(self, index: int) -> int:
        """The seed of picture `index`. After the largest seed comes 0."""
        return (self.seed + index) % (MAX_SEED + 1)

    @property
    def is_masked(self) -> bool:
        return self.mask_url is not None or self.mask_from_alpha

    @property
    def refiner_steps_run(self) -> int:
        """Denoising steps of the refiner where a strength decides, as diffusers counts them."""
        share = self.refiner_strength if self.mode == "img2img" else self.strength
        return int(self.refiner_inference_steps * share)


def parse_request(job_input: object) -> Request:
    """Validate `job["input"]`.

    Raises:
        RequestError: with each problem on a line of its own: the field, the rule and the value.
    """
    if not isinstance(job_input, Mapping):
        raise RequestError(f"input: must be an object with a prompt in it; got {shown(job_input)}")
    check_extent(job_input)
    if "s3Config" in job_input:
        raise RequestError("s3Config: belongs beside input, not in it: {input: ..., s3Config: ...}")
    try:
        return Request.model_validate(job_input)
    except ValidationError as error:
        raise RequestError("\n".join(problems(error, Request))) from None


def check_extent(job_input: Mapping[Any, Any]) -> None:
    """Refuse what no request looks like, before it costs time. Strings may be of any length.

    Raises:
        RequestError: it has too many values, or too deep ones.
    """
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
