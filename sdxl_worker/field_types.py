"""The types of a request's fields: their bounds, and of names the spellings that are taken."""

import secrets
from typing import Annotated, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field

from sdxl_worker.samplers import (
    SAMPLERS,
    SCHEDULE_SPELLINGS,
    SCHEDULES,
    SPELLINGS,
    SamplerName,
    ScheduleName,
)
from sdxl_worker.wording import ALIASES, NAMES, RULE

# Some 5,000 tokens: far more than a model can follow, and few enough to encode quickly.
MAX_PROMPT_CHARACTERS = 20_000
# The largest that torch's generators take. JavaScript and others keep numbers up to 2**53 exactly.
MAX_SEED = 2**64 - 1
# The models were trained with as many timesteps.
MAX_STEPS = 1000
MAX_IMAGES = 16
MIN_SIDE_PX, MAX_SIDE_PX, SIDE_MULTIPLE_PX = 64, 4096, 8


def _integral(value: object) -> object:
    """JSON has one number type: a client may well send 1024 as 1024.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _drawn(seed: int) -> int:
    return secrets.randbits(32) if seed == -1 else seed


FromIntegralFloat = BeforeValidator(_integral)
Prompt = Annotated[str, Field(max_length=MAX_PROMPT_CHARACTERS)]
# The fields of this type.
TEXT_FIELDS = ("prompt", "negative_prompt", "prompt_2", "negative_prompt_2")
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
Seed = Annotated[int, Field(ge=-1, le=MAX_SEED), FromIntegralFloat, AfterValidator(_drawn)]
Steps = Annotated[int, Field(ge=1, le=MAX_STEPS), FromIntegralFloat]
OutputFormat = Literal["png", "jpeg", "webp"]
Sampler = Annotated[
    SamplerName,
    Field(
        json_schema_extra={
            "enum": list(SPELLINGS),
            NAMES: list(SAMPLERS),
            RULE: "one of " + ", ".join(SAMPLERS) + ", or a name of these in docs/samplers.md",
        }
    ),
]
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
Upscaler = Annotated[
    str,
    Field(
        pattern=r"^[^/\\:\s][^/\\:\r\n]*$",
        min_length=1,
        max_length=200,
        json_schema_extra={RULE: "lanczos, or a file name in the worker's UPSCALER_DIR"},
    ),
]
