"""The worker's settings: one declaration each, read from the environment."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from sdxl_worker.errors import ModelError
from sdxl_worker.request import MAX_STEPS
from sdxl_worker.wording import problems

EMBEDDED_MODEL_DIR = Path(__file__).resolve().parent.parent / "models" / "shapes"


CompileMode = Literal["graphs", "blocks", "full"]
Quantization = Literal["int8", "fp8"]


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
            "graph, `blocks` also compiles its transformer blocks, `full` the whole UNet and the "
            "decoder. Not set: none of these."
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
    png_metadata: Annotated[
        bool,
        Field(
            description="Write the request, the seed, the model's name, the versions and "
            "lossy settings into each PNG as text chunks."
        ),
    ] = True
    worker_concurrency: Annotated[
        int,
        Field(
            ge=1,
            le=8,
            description="How many jobs the worker takes at once. The GPU works on one job at a "
            "time; a second one fetches, encodes and posts meanwhile.",
        ),
    ] = 1
    max_steps: Annotated[
        int,
        Field(
            ge=1,
            le=MAX_STEPS,
            description="The most that a request may name as `num_inference_steps` and as "
            "`refiner_inference_steps`, each. Their defaults are taken whatever it is.",
        ),
    ] = MAX_STEPS

    @property
    def lossy(self) -> dict[str, Any]:
        """Those settings that trade quality for speed and are set, by variable."""
        lossy = {"STEP_CACHE": self.step_cache, "QUANTIZE": self.quantize}
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
