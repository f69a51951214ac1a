"""A job's input becomes an immutable, fully validated `Request`, or one readable `RequestError`.

The fields of worker-sdxl 2.1.0 have their names and defaults here. Each field is declared once, in
`Request`, and what ties it to others in `request_ties`: validation, error messages, JSON Schema and
the documents' table all come from these declarations.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, GetJsonSchemaHandler, ValidationError

from sdxl_worker.errors import RequestError
from sdxl_worker.field_types import (
    MAX_IMAGES,
    MAX_SEED,
    MAX_STEPS,
    FromIntegralFloat,
    ImageUrl,
    OutputFormat,
    Prompt,
    Sampler,
    Schedule,
    Seed,
    Share,
    Side,
    Steps,
    UploadUrl,
)
from sdxl_worker.input_model import InputModel, check_extent
from sdxl_worker.request_objects import (
    MAX_ADAPTERS,
    MAX_CONTROLS,
    MAX_IMAGE_PROMPTS,
    ControlField,
    EmbeddingField,
    HiresField,
    ImagePromptField,
    LoraField,
    UpscaleField,
)
from sdxl_worker.request_ties import MASKED, broken_ties, hold, ties_json_schema
from sdxl_worker.samplers import SCHEDULE_SPELLINGS, SPELLINGS
from sdxl_worker.wording import ALIASES, RULE, problems, shown

# How much the base redraws of a picture where the request does not say.
REDRAW_STRENGTH = 0.75
# Two steps of the base, and one of the refiner where there is one.
CHECK_INPUT = {"prompt": "a red circle", "seed": 0, "num_inference_steps": 2, "strength": 0.02}


def _or_zero(schema: dict[str, Any]) -> None:
    """Publish what `NOT_GIVEN` takes for a side that is not given."""
    schema["anyOf"].insert(-1, {"const": 0})


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
        return schema | {"dependentSchemas": ties_json_schema(cls.model_fields)}

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
    seed: Seed = Field(
        default=-1,
        validate_default=True,
        description="Picture i is drawn from `seed` + i. -1 or not given: a random one of 32 "
        "bits, which the output tells.",
    )
    scheduler: Sampler = Field(
        default="DDIM",
        json_schema_extra={ALIASES: ["sampler", "sampler_name"]},
        description="The sampler of both the base and the refiner. Names of A1111, ComfyUI and "
        'diffusers are taken too; "DPM++ 2M Karras" and the like give the `schedule` as well.',
    )
    schedule: Schedule | None = Field(
        default=None,
        json_schema_extra={ALIASES: ["scheduler_type", "schedule_type", "noise_schedule"]},
        description="How the steps are spaced. Not given: as the model is configured.",
    )
    num_inference_steps: Steps = Field(
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
        yield from broken_ties(given, cls.model_fields)

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
        if any(hold(mask, given, cls.model_fields) for mask in MASKED):
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
