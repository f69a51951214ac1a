"""The objects that a request holds: the entries of its lists, `hires` and `upscale`."""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeGuard

from pydantic import ConfigDict, Field

from sdxl_worker.field_types import (
    CONTROL_SPELLINGS,
    FINISHED_MAPS,
    AdapterPath,
    ControlType,
    ImageUrl,
    Share,
    Steps,
    Upscaler,
)
from sdxl_worker.input_model import InputModel
from sdxl_worker.wording import ALIASES, RULE

# How many a request may hold.
MAX_ADAPTERS = 8
MAX_CONTROLS = 3
MAX_IMAGE_PROMPTS = 2


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
    steps: Steps | None = Field(
        default=None, json_schema_extra={ALIASES: ["hr_second_pass_steps", "num_inference_steps"]}
    )
    upscaler: Upscaler = Field(default="lanczos", json_schema_extra={ALIASES: ["hr_upscaler"]})


class UpscaleField(InputModel):
    """The enlargement of `upscale`."""

    factor: Annotated[float, Field(gt=1, le=4)] = Field(
        default=2.0, json_schema_extra={ALIASES: ["scale", "upscaling_resize"]}
    )
    upscaler: Upscaler = Field(default="lanczos", json_schema_extra={ALIASES: ["upscaler_1"]})


def _is_share(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1
