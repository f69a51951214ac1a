"""Loading: the folders of a model become two pipelines that share what they have in common."""

import dataclasses
import json
import logging
import threading
from collections.abc import Callable, Mapping
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
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedModel,
)
from transformers.models.clip.modeling_clip import CLIPTextEmbeddings
from transformers.utils import logging as transformers_logging

from sdxl_worker.errors import ModelError
from sdxl_worker.model_dir import find_model_dir
from sdxl_worker.optimize import MODES, WHOLE_UNET_STEPS, optimize, steps_of
from sdxl_worker.preview import PreviewMap, fit_preview_map
from sdxl_worker.quantize import check_quantization
from sdxl_worker.schedulers import timestep_to_device
from sdxl_worker.settings import DEFAULTS, Quantization, Settings
from sdxl_worker.weights import Placement, Tensors, Weights, start_reading

log = logging.getLogger(__name__)

Network = TypeVar("Network", bound=torch.nn.Module)

# Jobs that come while the first one loads wait for it, rather than load a second time.
_loading = threading.Lock()
_loaded: dict[Settings, "Models"] = {}


@dataclass(frozen=True)
class Models:
    """Everything that jobs share. Nothing in it changes from job to job but the pipelines'
    `scheduler`, which each stage sets before it runs."""

    name: str
    base: StableDiffusionXLPipeline
    refiner: StableDiffusionXLImg2ImgPipeline | None
    scheduler_config: Mapping[str, Any]
    """As it was loaded: the source of every job's schedulers."""
    placement: Placement
    preview_map: PreviewMap
    revision: str
    """What tells these weights from others: a commit of the hub, or a digest of the files."""
    step_cache: int | None = None
    """Steps from one whole step to the next. None: all steps are whole."""
    quantization: Quantization | None = None
    """What the UNets lost beside these weights."""

    @property
    def device(self) -> torch.device:
        return self.placement.device

    @property
    def dtype(self) -> torch.dtype:
        return self.placement.dtype

    @property
    def native_size_px(self) -> int:
        return self.base.default_sample_size * self.base.vae_scale_factor


def load_models(
    settings: Settings,
    weights: Weights | None = None,
    on_base: Callable[[Models], object] = lambda _: None,
) -> Models:
    """Load base and refiner once; later calls with the same settings return the same object.

    Args:
        weights: what `start_reading` began to read for these settings, if it did.
        on_base: called with the base alone, while the weights of a refiner are still being read.

    Raises:
        ModelError: a folder, a file or a format is not as it should be; the message says which.
    """
    with _loading:
        if settings not in _loaded:
            _loaded.clear()
            weights = weights or start_reading(find_model_dir(settings), settings.dtype)
            _loaded[settings] = load(weights, settings, on_base)
        return _loaded[settings]


def load(
    weights: Weights,
    settings: Settings = DEFAULTS,
    on_base: Callable[[Models], object] = lambda _: None,
) -> Models:
    """Build the pipelines from the weights as they come in.

    Args:
        settings: what they say of speed. Model and number format are those of the weights.

    Raises:
        ModelError: as `load_models`.
    """
    # The libraries' own bars and advice would drown the worker's log.
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()

    placement = weights.placement
    steps = steps_of(settings, placement)
    check_quantization(settings.quantize, steps, placement)
    base = _load_base(weights)
    # Before the decoder is compiled, which is to be so for the pictures' size first.
    preview_map = fit_preview_map(base.vae, placement.device)
    optimize(steps, base.unet, base.vae)
    model_dir = weights.model_dir
    models = Models(
        name=model_dir.name,
        base=base,
        refiner=None,
        scheduler_config=_load_scheduler_config(model_dir.base / "scheduler"),
        placement=placement,
        preview_map=preview_map,
        revision=model_dir.revision(),
        step_cache=settings.step_cache,
        quantization=settings.quantize,
    )
    if model_dir.refiner is not None:
        on_base(models)
        refiner = _load_refiner(weights, base, model_dir.refiner)
        optimize(steps, refiner.unet)
        models = dataclasses.replace(models, refiner=refiner)
    log.info(
        "loaded %s from %s: base%s, %s on %s",
        model_dir.name,
        model_dir.root,
        " and refiner" if models.refiner else " alone, there is no refiner/",
        str(placement.dtype).removeprefix("torch."),
        placement.device,
    )
    if settings.step_cache is not None:
        left_out = MODES[settings.compile] & WHOLE_UNET_STEPS
        log.info(
            "STEP_CACHE: one step in %d is a whole one%s",
            settings.step_cache,
            f"; not beside it, of COMPILE: {', '.join(sorted(left_out))}" if left_out else "",
        )
    return models


def _load_base(weights: Weights) -> StableDiffusionXLPipeline:
    folder = weights.model_dir.base
    pipeline = StableDiffusionXLPipeline(
        text_encoder=_build(CLIPTextModel, weights, "base/text_encoder"),
        text_encoder_2=_build(CLIPTextModelWithProjection, weights, "base/text_encoder_2"),
        tokenizer=_load_tokenizer(folder / "tokenizer"),
        tokenizer_2=_load_tokenizer(folder / "tokenizer_2"),
        unet=_build(UNet2DConditionModel, weights, "base/unet"),
        vae=_build(AutoencoderKL, weights, "base/vae"),
        scheduler=None,
        force_zeros_for_empty_prompt=_pipeline_option(folder, "force_zeros_for_empty_prompt", True),
        add_watermarker=False,
    )
    # By itself a tile is as large as a native picture, which is what has to fit.
    pipeline.vae.tile_latent_min_size = pipeline.default_sample_size // 2
    pipeline.vae.tile_sample_min_size = (
        pipeline.vae.tile_latent_min_size * pipeline.vae_scale_factor
    )
    _set_up(pipeline, weights.placement)
    return pipeline


def _load_refiner(
    weights: Weights, base: StableDiffusionXLPipeline, folder: Path
) -> StableDiffusionXLImg2ImgPipeline:
    """Its own UNet; the rest is the base's."""
    pipeline = StableDiffusionXLImg2ImgPipeline(
        vae=base.vae,
        text_encoder=None,
        text_encoder_2=base.text_encoder_2,
        tokenizer=None,
        tokenizer_2=base.tokenizer_2,
        unet=_build(UNet2DConditionModel, weights, "refiner/unet"),
        scheduler=None,
        requires_aesthetics_score=_pipeline_option(folder, "requires_aesthetics_score", True),
        force_zeros_for_empty_prompt=_pipeline_option(
            folder, "force_zeros_for_empty_prompt", False
        ),
        add_watermarker=False,
    )
    _set_up(pipeline, weights.placement)
    return pipeline


def _set_up(pipeline: Any, placement: Placement) -> None:
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.register_forward_pre_hook(timestep_to_device, with_kwargs=True)
    if not placement.resident:
        pipeline.enable_model_cpu_offload(device=placement.device)


def _build(kind: type[Network], weights: Weights, network: str) -> Network:
    """One network: made without memory of its own, then given the tensors that were read."""
    folder = weights.model_dir.folder(network)
    try:
        with torch.device("meta"):
            if issubclass(kind, PreTrainedModel):
                module = kind(CLIPTextConfig.from_pretrained(folder, local_files_only=True))
            else:
                config = kind.load_config(folder, local_files_only=True)  # type: ignore[attr-defined]
                module = kind.from_config(config)  # type: ignore[attr-defined]
        if issubclass(kind, PreTrainedModel):
            _load_text_encoder(module, weights.take(network))
        else:
            tensors = weights.take(network)
            # Files of early versions have other names for the parts of attention.
            module._fix_state_dict_keys_on_load(tensors)  # type: ignore[operator]
            module.load_state_dict(tensors, assign=True)
    except ModelError:
        raise
    except Exception as error:
        # Whatever a wrong config or a file that does not fit it raises, the worker cannot run.
        raise ModelError(f"MODEL_DIR: {folder} cannot be loaded: {error}") from error
    return module.eval()


def _load_text_encoder(module: PreTrainedModel, tensors: Tensors) -> None:
    """What transformers does beyond `load_state_dict` for files that older versions wrote."""
    own_names = module.state_dict().keys()
    module.load_state_dict(
        {
            name if name in own_names else name.removeprefix("text_model."): tensor
            for name, tensor in tensors.items()
            if not name.endswith("position_ids")
        },
        assign=True,
    )
    # The one buffer that no file holds.
    positions = torch.arange(module.config.max_position_embeddings, device=module.device)
    for part in module.modules():
        if isinstance(part, CLIPTextEmbeddings):
            part.position_ids = torch.nn.Buffer(positions.expand((1, -1)), persistent=False)


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
