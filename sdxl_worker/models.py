"""Loading: the folders of a model become two pipelines that share what they have in common."""

import functools
import json
import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from diffusers import (
    AutoencoderKL,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging as diffusers_logging
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from sdxl_worker.errors import ModelError
from sdxl_worker.model_dir import find_model
from sdxl_worker.preview import PreviewMap, fit_preview_map
from sdxl_worker.settings import Settings

log = logging.getLogger(__name__)

# What a 1024 x 1024 picture may need beside the weights: activations of the UNet and the decoder,
# CUDA's own context. An estimate on the safe side; it was not measured.
WORKING_MEMORY_BYTES = 5 * 1024**3

Component = TypeVar("Component")

# Jobs that come while the first one loads wait for it, rather than load a second time.
_loading = threading.Lock()


@dataclass(frozen=True)
class Models:
    """Everything that jobs share. Nothing in it changes from job to job but the pipelines'
    `scheduler`, which each stage sets before it runs."""

    name: str
    base: StableDiffusionXLPipeline
    refiner: StableDiffusionXLImg2ImgPipeline | None
    scheduler_config: Mapping[str, Any]
    """As it was loaded: the source of every job's schedulers."""
    device: torch.device
    dtype: torch.dtype
    preview_map: PreviewMap
    revision: str
    """What tells these weights from others: a commit of the hub, or a digest of the files."""

    @property
    def native_size_px(self) -> int:
        return self.base.default_sample_size * self.base.vae_scale_factor


def load_models(settings: Settings) -> Models:
    """Load base and refiner once; later calls with the same settings return the same object.

    Raises:
        ModelError: a folder, a file or a format is not as it should be; the message says which.
    """
    with _loading:
        return _load_models(settings)


@functools.lru_cache(maxsize=1)
def _load_models(settings: Settings) -> Models:
    model_dir = find_model(settings)
    base_dir, refiner_dir = model_dir.base, model_dir.refiner
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    default_dtype = "float16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, settings.dtype or default_dtype)
    free_bytes = torch.cuda.mem_get_info()[0] if device.type == "cuda" else None

    # The libraries' own bars and advice would drown the worker's log.
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()

    base = StableDiffusionXLPipeline(
        vae=_load(AutoencoderKL, base_dir / "vae", dtype),
        text_encoder=_load(CLIPTextModel, base_dir / "text_encoder", dtype),
        text_encoder_2=_load(CLIPTextModelWithProjection, base_dir / "text_encoder_2", dtype),
        tokenizer=_load_tokenizer(base_dir / "tokenizer"),
        tokenizer_2=_load_tokenizer(base_dir / "tokenizer_2"),
        unet=_load(UNet2DConditionModel, base_dir / "unet", dtype),
        scheduler=None,
        force_zeros_for_empty_prompt=_pipeline_option(
            base_dir, "force_zeros_for_empty_prompt", True
        ),
        add_watermarker=False,
    )
    refiner = None
    if refiner_dir is not None:
        refiner = StableDiffusionXLImg2ImgPipeline(
            vae=base.vae,
            text_encoder=None,
            text_encoder_2=base.text_encoder_2,
            tokenizer=None,
            tokenizer_2=base.tokenizer_2,
            unet=_load(UNet2DConditionModel, refiner_dir / "unet", dtype),
            scheduler=None,
            requires_aesthetics_score=_pipeline_option(
                refiner_dir, "requires_aesthetics_score", True
            ),
            force_zeros_for_empty_prompt=_pipeline_option(
                refiner_dir, "force_zeros_for_empty_prompt", False
            ),
            add_watermarker=False,
        )
    pipelines = [base] if refiner is None else [base, refiner]
    _place(pipelines, device, free_bytes)
    for pipeline in pipelines:
        pipeline.set_progress_bar_config(disable=True)

    log.info(
        "loaded %s from %s: base%s, %s on %s",
        model_dir.name,
        model_dir.root,
        " and refiner" if refiner else " alone, there is no refiner/",
        str(dtype).removeprefix("torch."),
        device,
    )
    return Models(
        name=model_dir.name,
        base=base,
        refiner=refiner,
        scheduler_config=_load_scheduler_config(base_dir / "scheduler"),
        device=device,
        dtype=dtype,
        preview_map=fit_preview_map(base.vae, device),
        revision=model_dir.revision(),
    )


def fits(weights_bytes: int, free_bytes: int) -> bool:
    """Whether all weights can stay on the card and leave room for a picture to be made."""
    return weights_bytes + WORKING_MEMORY_BYTES <= free_bytes


def _place(pipelines: list[Any], device: torch.device, free_bytes: int | None) -> None:
    """Put the pipelines on the device for good, or offload them where they do not fit."""
    if free_bytes is None:
        return
    modules = {
        id(module): module
        for pipeline in pipelines
        for module in pipeline.components.values()
        if isinstance(module, torch.nn.Module)
    }
    weights_bytes = sum(
        tensor.numel() * tensor.element_size()
        for module in modules.values()
        for tensor in module.parameters()
    )
    resident = fits(weights_bytes, free_bytes)
    log.info(
        "weights %.1f GB, free on the GPU %.1f GB: %s",
        weights_bytes / 1e9,
        free_bytes / 1e9,
        "resident" if resident else "too small, so models are offloaded to the host in turn",
    )
    for pipeline in pipelines:
        if resident:
            pipeline.to(device)
        else:
            pipeline.enable_model_cpu_offload(device=device)
    # One picture at a time through the decoder, whose activations are the peak of a batch.
    pipelines[0].vae.enable_slicing()


def _load(component: type[Component], folder: Path, dtype: torch.dtype) -> Component:
    """Load one network from safetensors: the fp16 variant where that is all there is, or enough."""
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"MODEL_DIR: {folder} holds no .safetensors file, the only kind loaded")
    fp16_files = [name for name in files if ".fp16." in name]
    full_precision_files = [name for name in files if ".fp16." not in name]
    use_fp16 = bool(fp16_files) and (dtype == torch.float16 or not full_precision_files)
    try:
        return component.from_pretrained(  # type: ignore[attr-defined]
            folder,
            dtype=dtype,
            variant="fp16" if use_fp16 else None,
            use_safetensors=True,
            local_files_only=True,
        )
    except Exception as error:
        # Whatever a damaged file or a wrong config raises, the worker cannot run.
        raise ModelError(f"MODEL_DIR: {folder} cannot be loaded: {error}") from error


def _load_tokenizer(folder: Path) -> CLIPTokenizer:
    # Without its files transformers would make an empty vocabulary and warn.
    for name in ("vocab.json", "merges.txt"):
        if not (folder / name).is_file():
            raise ModelError(f"MODEL_DIR: {folder / name} is missing")
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def _load_scheduler_config(folder: Path) -> Mapping[str, Any]:
    return MappingProxyType(_json(folder / "scheduler_config.json"))


def _pipeline_option(folder: Path, name: str, default: bool) -> bool:
    """An option of the pipeline that model_index.json records beside the components."""
    index = folder / "model_index.json"
    return _json(index).get(name, default) if index.is_file() else default


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"MODEL_DIR: {path} cannot be read: {error}") from error
