"""The worker's settings: one declaration each, read from the environment."""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    AliasChoices,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError
from pydantic_settings import BaseSettings, SettingsConfigDict

from sdxl_worker.errors import ModelError
from sdxl_worker.field_types import MAX_STEPS, OutputFormat
from sdxl_worker.wording import IN_WORDS, RULE, problems

EMBEDDED_MODEL_DIR = Path(__file__).resolve().parent.parent / "models" / "shapes"


CompileMode = Literal["auto", "graphs", "blocks", "full"]
Quantization = Literal["int8", "fp8"]
PredictionType = Literal["epsilon", "v_prediction"]
MetadataLevel = Literal["all", "no_prompts", "none"]
# As pydantic reads a switch.
TRUE_WORDS = ("true", "1", "yes", "y", "on", "t")
FALSE_WORDS = ("false", "0", "no", "n", "off", "f")
# The values of PNG_METADATA, a switch, which METADATA was called before.
SWITCH: dict[str, MetadataLevel] = {
    **dict.fromkeys(TRUE_WORDS, "all"),
    **dict.fromkeys(FALSE_WORDS, "none"),
}
# Of a load-balancing endpoint, unless it is told otherwise; elsewhere few may listen there.
RUNPOD_PORT, USUAL_PORT = 80, 8000


def _as_level(value: object) -> object:
    return SWITCH.get(value.lower(), value) if isinstance(value, str) else value


def is_on_platform() -> bool:
    """Whether the platform gives the jobs: not for a local job or the SDK's test server, nor where
    the worker serves HTTP."""
    return bool(os.environ.get("RUNPOD_WEBHOOK_GET_JOB"))


def is_on_runpod() -> bool:
    """Whether this is a worker of an endpoint, of either kind."""
    return is_on_platform() or bool(os.environ.get("RUNPOD_ENDPOINT_ID"))


def _parsable(url: str) -> str:
    """
    Raises:
        ValueError: "http://[", or a port that is none.
    """
    urlsplit(url).port  # noqa: B018
    return url


HttpUrl = Annotated[
    str,
    AfterValidator(_parsable),
    Field(
        pattern=r"(?i)^https?://[^/?#@\s]+(/[^?#\s]*)?$",
        json_schema_extra={RULE: "an http:// or https:// address, without a query"},
    ),
]


def _as_keys(value: SecretStr) -> SecretStr:
    """
    Raises:
        PydanticCustomError: what an Authorization header cannot hold. The message holds no key.
    """
    if all(re.fullmatch(r"[!-~]+", key) for key in keys_of(value)):
        return value
    raise PydanticCustomError(
        IN_WORDS,
        "must be a key, or several with commas between them, of letters, digits and signs without "
        "a space",
    )


def keys_of(value: SecretStr) -> list[str]:
    return [key.strip() for key in value.get_secret_value().split(",")]


# What storage needs; it is set up by all of these, or not at all.
NEEDED_FOR_STORAGE = ("bucket_endpoint_url", "bucket_access_key_id", "bucket_secret_access_key")
# AWS's limit of a signature's life, seven days.
MAX_URL_EXPIRY_SECONDS = 604_800


class Settings(BaseSettings):
    """Immutable and hashable. An empty string, which the Hub sends, counts as unset."""

    model_config = SettingsConfigDict(env_ignore_empty=True, frozen=True, extra="ignore")

    model_dir: Annotated[
        Path | None,
        Field(
            description="The model: a folder with `base/` and, if there is one, `refiner/`, in "
            "diffusers layout; a folder as diffusers or the hub's cache has it; or the `org/name` "
            "of the endpoint's cached model. Not set: the first one found."
        ),
    ] = None
    models_dir: Annotated[
        Path | None,
        Field(
            description="More models, for example on a network volume, among which a request may "
            "choose by `model`: single files, and folders as `MODEL_DIR` takes them. Not set: none."
        ),
    ] = None
    vae_dir: Annotated[
        Path | None,
        Field(
            description="A VAE that takes the place of the model's own: a folder in diffusers "
            "layout, or a single file. Not set: the model's own."
        ),
    ] = None
    prediction_type: Annotated[
        PredictionType | None,
        Field(
            description="What the model of `MODEL_DIR` predicts, `epsilon` (noise) or "
            "`v_prediction`. Not set: what its file or its scheduler's configuration tells."
        ),
    ] = None
    lora_dir: Annotated[
        Path | None,
        Field(
            description="Folder, for example on a network volume, of LoRAs and embeddings that "
            "requests may name by their file names. Not set: none."
        ),
    ] = None
    lora_cache_dir: Annotated[
        Path | None,
        Field(
            description="Folder that keeps downloaded LoRAs and embeddings; workers may share it. "
            "Not set: one in the system's folder of temporary files."
        ),
    ] = None
    lora_cache_gb: Annotated[
        float,
        Field(
            gt=0,
            le=10_000,
            allow_inf_nan=False,
            description="The most that downloaded LoRAs and embeddings may take, in GB of 10^9 "
            "bytes. Those that were not used for longest go first.",
        ),
    ] = 10.0
    controlnet_dir: Annotated[
        Path | None,
        Field(
            description="Folder, for example on a network volume, of ControlNets in diffusers "
            "layout, or one of them, and of what makes maps of pictures. Not set: that of the "
            "image, if it has one."
        ),
    ] = None
    ip_adapter_dir: Annotated[
        Path | None,
        Field(
            description="Folder of IP-Adapters and their image encoders, as `h94/IP-Adapter` on "
            "the hub. Not set: that of the image, if it has one."
        ),
    ] = None
    upscaler_dir: Annotated[
        Path | None,
        Field(
            description="Folder of upscalers, safetensors or .pth files, that requests may name in "
            "`hires` and `upscale`. Not set: `lanczos` alone."
        ),
    ] = None
    safety_checker: Annotated[
        Path | None,
        Field(
            description="Folder of an image classifier in transformers layout. Answers then tell "
            "`nsfw` of each picture: its guess, never a sure judgement. Not set: nothing is told."
        ),
    ] = None
    safety_blank: Annotated[
        bool,
        Field(
            description="A picture that `SAFETY_CHECKER` flags is replaced by a blank one, and "
            "jobs have no previews."
        ),
    ] = False
    hf_token: Annotated[
        SecretStr | None,
        Field(description="For LoRAs from private and gated repositories of the hub."),
    ] = None
    hf_endpoint: Annotated[
        HttpUrl,
        Field(description="The Hugging Face hub, or a mirror of it."),
    ] = "https://huggingface.co"
    civitai_token: Annotated[
        SecretStr | None, Field(description="For LoRAs from Civitai, most of which need one.")
    ] = None
    dtype: Annotated[
        Literal["float16", "bfloat16", "float32"] | None,
        Field(
            description="Number format of the weights. Not set: `float16` on a GPU, "
            "`float32` on a CPU."
        ),
    ] = None
    compile: Annotated[
        CompileMode | None,
        Field(
            description="Faster pictures for a slower start. `graphs` replays each UNet as a CUDA "
            "graph, `auto` does where the host takes at least 0.9 of a pass to launch it, judged "
            "at the start; `blocks` also compiles its transformer blocks, `full` the whole UNet "
            "and the decoder. Not set: none of these."
        ),
    ] = None
    compile_cache_dir: Annotated[
        Path | None,
        Field(
            description="Folder, for example on a network volume, that keeps what `COMPILE` "
            "compiled for workers with the same GPU and versions. It holds code: let only workers "
            "write to it."
        ),
    ] = None
    step_cache: Annotated[
        int | None,
        Field(
            ge=2,
            le=5,
            description="Faster pictures of a lower quality: every n-th step, with n from 2 to 5, "
            "runs the whole UNet, the others only its outermost level. It turns off what `COMPILE` "
            "does to a whole UNet: the CUDA graphs and, in `full`, compiling it. Not set: off.",
        ),
    ] = None
    quantize: Annotated[
        Quantization | None,
        Field(
            description="Lossy: the UNets' transformer blocks multiply in 8 bits, `int8` or, on "
            "Ada, Hopper and newer GPUs, `fp8`. On a GPU, needs `COMPILE=blocks` or "
            "`full`. Not set: off."
        ),
    ] = None
    fp16_accumulation: Annotated[
        bool,
        Field(
            description="Lossy: products of float16 matrices are summed up in float16, which GPUs "
            "for games do faster. Needs a GPU, and `DTYPE` as `float16`."
        ),
    ] = False
    metadata: Annotated[
        MetadataLevel | None,
        BeforeValidator(_as_level),
        Field(
            validation_alias=AliasChoices("metadata", "png_metadata"),
            json_schema_extra={
                RULE: "one of all, no_prompts, none (or true or false, as PNG_METADATA)"
            },
            description="What a picture's file tells of how it was made: `all`, the request, the "
            "seed, the model, the versions and lossy settings; `no_prompts`, all but the prompts; "
            "`none`, nothing. Not set: `no_prompts` on the platform, `all` elsewhere. "
            "`PNG_METADATA` is its old name: `true` is `all`, `false` is `none`.",
        ),
    ] = None
    default_output_format: Annotated[
        OutputFormat,
        Field(
            description="Of pictures where the request has no `output_format`: `png`, `jpeg` or "
            "`webp`."
        ),
    ] = "png"
    worker_concurrency: Annotated[
        int,
        Field(
            ge=1,
            le=8,
            description="How many jobs the worker takes at once, at least `BATCH_JOBS`. Without "
            "that, the GPU works on one job at a time; a second one fetches, encodes and posts "
            "meanwhile.",
        ),
    ] = 1
    batch_jobs: Annotated[
        int,
        Field(
            ge=1,
            le=16,
            description="How many jobs are drawn side by side, where they want the same weights "
            "and size: more pictures for the money, each a little later. 1: one after the other.",
        ),
    ] = 1
    serve_http: Annotated[
        bool,
        Field(
            description="Serve HTTP, as for a load-balancing endpoint, also where the platform has "
            "a queue for this worker. `--serve` does the same."
        ),
    ] = False
    port: Annotated[
        int | None,
        Field(
            ge=1,
            le=65_535,
            description="Where HTTP is served. A worker that has no queue serves HTTP where this "
            f"is set. Not set: {RUNPOD_PORT} on Runpod, {USUAL_PORT} elsewhere.",
        ),
    ] = None
    port_health: Annotated[
        int | None,
        Field(ge=1, le=65_535, description="Where `/ping` is served too. Not set: at `PORT` only."),
    ] = None
    api_key: Annotated[
        Annotated[SecretStr, AfterValidator(_as_keys)] | None,
        Field(
            description="What those who use the worker's HTTP have to send as "
            "`Authorization: Bearer KEY`; several keys with commas between them. Not set: no key "
            "is asked for, and on Runpod none is needed."
        ),
    ] = None
    queue_limit: Annotated[
        int,
        Field(
            ge=0,
            le=1000,
            description="How many jobs may wait where the worker serves HTTP, beside those that it "
            "works at. More are answered with 429 at once.",
        ),
    ] = 32
    max_steps: Annotated[
        int,
        Field(
            ge=1,
            le=MAX_STEPS,
            description="The most that a request may name as `num_inference_steps` and as "
            "`refiner_inference_steps`, each. Their defaults are taken whatever it is.",
        ),
    ] = MAX_STEPS
    bucket_endpoint_url: Annotated[
        HttpUrl | None,
        Field(
            description="Pictures are uploaded to this S3 storage, and answers hold links. The "
            "bucket may be in its host (`https://BUCKET.s3.REGION.amazonaws.com`) or in its path. "
            "Not set: answers hold the pictures."
        ),
    ] = None
    bucket_access_key_id: Annotated[
        str | None, Field(description="Of the storage. Needed with `BUCKET_ENDPOINT_URL`.")
    ] = None
    bucket_secret_access_key: Annotated[
        SecretStr | None, Field(description="Of the storage. Needed with `BUCKET_ENDPOINT_URL`.")
    ] = None
    bucket_name: Annotated[
        str | None,
        Field(
            description="The bucket, where `BUCKET_ENDPOINT_URL` does not have it. If neither "
            "has: named after the month, `11-26`, as in 2.1.0."
        ),
    ] = None
    bucket_region: Annotated[
        str | None,
        Field(description="Not set: what the host tells, otherwise `us-east-1`."),
    ] = None
    bucket_prefix: Annotated[
        str | None,
        Field(
            description="Folder in the bucket. Not set: none, but the month, `11-26`, where "
            "`BUCKET_ENDPOINT_URL` has the bucket and `BUCKET_NAME` is not set, as in 2.1.0."
        ),
    ] = None
    bucket_url_expiry_seconds: Annotated[
        int,
        Field(ge=1, le=MAX_URL_EXPIRY_SECONDS, description="How long links are valid."),
    ] = MAX_URL_EXPIRY_SECONDS
    bucket_public_url: Annotated[
        HttpUrl | None,
        Field(
            description="Where everyone can read the bucket, a CDN for example. Links lead there "
            "and do not expire. Not set: signed links."
        ),
    ] = None

    @model_validator(mode="after")
    def _storage_is_whole(self) -> Self:
        names = [name for name in Settings.model_fields if name.startswith("bucket_")]
        given = [name for name in names if name in self.model_fields_set]
        given = [name for name in given if name != "bucket_url_expiry_seconds"]
        missing = [name for name in NEEDED_FOR_STORAGE if name not in given]
        if given and missing:
            kind = PydanticCustomError(IN_WORDS, f"required beside {given[0].upper()}; got nothing")
            errors = [InitErrorDetails(type=kind, loc=(name,), input=None) for name in missing]
            raise ValidationError.from_exception_data("Settings", errors)
        return self

    @property
    def metadata_level(self) -> MetadataLevel:
        return self.metadata or ("no_prompts" if is_on_runpod() else "all")

    @property
    def jobs_at_once(self) -> int:
        """How many the worker takes."""
        return max(self.worker_concurrency, self.batch_jobs)

    @property
    def http_port(self) -> int:
        return self.port or (RUNPOD_PORT if is_on_runpod() else USUAL_PORT)

    @property
    def api_keys(self) -> list[str]:
        return keys_of(self.api_key) if self.api_key else []

    @property
    def lossy(self) -> dict[str, Any]:
        """Those settings that trade quality for speed and are set, by variable."""
        lossy = {
            "STEP_CACHE": self.step_cache,
            "QUANTIZE": self.quantize,
            "FP16_ACCUMULATION": self.fp16_accumulation or None,
        }
        return {name: value for name, value in lossy.items() if value is not None}


def load_settings() -> Settings:
    """Read the settings from the environment.

    Raises:
        ModelError: a variable has a value that is not allowed; the message names it.
    """
    try:
        return Settings()
    except ValidationError as error:
        lines = [line.partition(":") for line in problems(error, Settings)]
        told = "; ".join(f"{name.upper()}{colon}{rest}" for name, colon, rest in lines)
        raise ModelError(f"wrong environment variable: {told}") from None
