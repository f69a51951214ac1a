"""Loading: the folders of a model become networks, each loaded once, and their configurations."""

import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedModel,
)
from transformers.models.clip.modeling_clip import CLIPTextEmbeddings
from transformers.utils import logging as transformers_logging

from sdxl_worker.errors import ModelError
from sdxl_worker.loading.checkpoint_kind import SCHEDULER_CONFIG
from sdxl_worker.loading.latent_rgb import LatentRgb, fit_latent_rgb
from sdxl_worker.loading.model_dir import ModelDir
from sdxl_worker.loading.networks import NETWORKS
from sdxl_worker.loading.offload import take_turns
from sdxl_worker.loading.original_names import with_library_names
from sdxl_worker.loading.weights import Tensors, Weights, choose_placement, start_reading
from sdxl_worker.placement import Placement
from sdxl_worker.samplers import is_edm

log = logging.getLogger(__name__)

# Of the latents that a UNet takes.
CHANNELS = 4
# And of the mask, and of the latents of what surrounds it.
INPAINTING_CHANNELS = CHANNELS + 1 + CHANNELS


@dataclass(frozen=True)
class Models:
    """The networks that jobs share, and what they were configured with.

    A job may change a network while it draws with it; whatever a job changes, it changes back.
    """

    name: str
    revision: str
    """Identifies the weights: by commits of the hub, or by a digest of the files."""
    model_dir: ModelDir
    placement: Placement
    tokenizer: CLIPTokenizer
    tokenizer_2: CLIPTokenizer
    text_encoder: CLIPTextModel
    text_encoder_2: CLIPTextModelWithProjection
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler_config: Mapping[str, Any]
    """What the model was trained for: the source of every job's schedulers. Of a model trained in
    EDM's formulation, `_class_name` is one of diffusers' EDM schedulers."""
    zeros_for_empty_prompt: bool
    """How the base was trained to see "no caption": as zeros, or as the encoding of ""."""
    latent_rgb: LatentRgb
    refiner_unet: UNet2DConditionModel | None = None
    """The rest of the refiner is the base's. None: there is no refiner."""
    refiner_zeros_for_empty_prompt: bool = False
    refiner_takes_aesthetic_score: bool = True

    @property
    def hash(self) -> str | None:
        """`ModelDir.hash`."""
        return self.model_dir.hash

    @property
    def device(self) -> torch.device:
        return self.placement.device

    @property
    def dtype(self) -> torch.dtype:
        return self.placement.dtype

    @property
    def native_size_px(self) -> int:
        """Width and height of the pictures that the base was trained on."""
        return self.unet.config.sample_size * 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def kind(self) -> str:
        """How the model was trained to be sampled, in a few words."""
        is_v = self.scheduler_config.get("prediction_type") == "v_prediction"
        name = "v-prediction" if is_v else "epsilon"
        if is_edm(self.scheduler_config):
            return f"EDM, {name}"
        return f"{name}, zero terminal SNR" if self._has_zero_snr else name

    @property
    def guidance_rescale_default(self) -> float:
        """As https://arxiv.org/abs/2305.08891 has it for models without signal in the first step;
        others need none."""
        is_v = self.scheduler_config.get("prediction_type") == "v_prediction"
        return 0.7 if is_v and self._has_zero_snr else 0.0

    @property
    def refiner_scheduler_config(self) -> Mapping[str, Any]:
        """As `scheduler_config`. SDXL's refiner predicts noise, whatever a base beside it does."""
        return self.scheduler_config if self.kind == "epsilon" else SCHEDULER_CONFIG

    @property
    def _has_zero_snr(self) -> bool:
        return bool(self.scheduler_config.get("rescale_betas_zero_snr"))

    def unets(self) -> list[UNet2DConditionModel]:
        return [unet for unet in (self.unet, self.refiner_unet) if unet is not None]

    def networks(self) -> dict[str, torch.nn.Module]:
        """Those that are loaded, by their names in `NETWORKS`."""
        networks = {name: getattr(self, name) for name in NETWORKS}
        return {name: network for name, network in networks.items() if network is not None}


def load_models(model_dir: ModelDir, dtype_name: str | None = None) -> Models:
    """Load base and refiner in one call, where the start need not be quick.

    Raises:
        ModelError: as `load_base`.
    """
    files = model_dir.weight_files(dtype_name)
    weights = start_reading(model_dir, files, choose_placement(files, dtype_name))
    return add_refiner(load_base(weights), weights)


def load_base(weights: Weights) -> Models:
    """Build the base as its weights come in. Those of a refiner may still be read meanwhile.

    Raises:
        ModelError: a folder, a file or a format is not as it should be; the message says which.
    """
    # The libraries' progress bars and advice would flood the worker's log.
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()

    model_dir, placement = weights.model_dir, weights.placement
    folder = model_dir.base
    networks = {
        name: _load(name, weights) for name, network in NETWORKS.items() if not network.of_refiner
    }
    vae, unet = networks["vae"], networks["unet"]
    # By default a tile is as large as a native picture, which may not fit.
    vae.tile_latent_min_size = unet.config.sample_size // 2
    vae.tile_sample_min_size = vae.tile_latent_min_size * 2 ** (
        len(vae.config.block_out_channels) - 1
    )
    if not placement.resident:
        take_turns(networks.values(), placement.device)
    models = Models(
        name=model_dir.name,
        revision=model_dir.revision(),
        model_dir=model_dir,
        placement=placement,
        tokenizer=_load_tokenizer(folder / "tokenizer"),
        tokenizer_2=_load_tokenizer(folder / "tokenizer_2"),
        **networks,
        scheduler_config=MappingProxyType(_scheduler_config(model_dir)),
        zeros_for_empty_prompt=model_dir.checkpoint is not None
        or _pipeline_option(folder, "force_zeros_for_empty_prompt", True),
        latent_rgb=fit_latent_rgb(vae, placement.device),
    )
    log.info(
        "loaded the base of %s (%s) from %s%s, %s on %s",
        models.name,
        models.kind,
        model_dir.root,
        "" if model_dir.refiner else " (there is no refiner/)",
        str(placement.dtype).removeprefix("torch."),
        placement.device,
    )
    return models


def add_refiner(models: Models, weights: Weights) -> Models:
    """The same models with the refiner's UNet, once its weights are read.

    Raises:
        ModelError: as `load_base`.
    """
    folder = weights.model_dir.refiner
    if folder is None:
        return models
    models = dataclasses.replace(
        models,
        refiner_unet=_load("refiner_unet", weights),
        refiner_zeros_for_empty_prompt=_pipeline_option(
            folder, "force_zeros_for_empty_prompt", False
        ),
        refiner_takes_aesthetic_score=_pipeline_option(folder, "requires_aesthetics_score", True),
    )
    if not models.placement.resident:
        take_turns(models.networks().values(), models.device)
    log.info("loaded the refiner")
    return models


def _load(name: str, weights: Weights) -> Any:
    """One network: made without memory of its own, then given the tensors that were read."""
    network = NETWORKS[name]
    model_dir = weights.model_dir
    folder = model_dir.folder(network)
    try:
        module: Any = network.build(folder, model_dir.config_changes(name))
        if isinstance(module, UNet2DConditionModel):
            _check_channels(module, folder, of_refiner=network.of_refiner)
        tensors = with_library_names(name, weights.take(name), module)
        if isinstance(module, PreTrainedModel):
            _load_text_encoder(module, tensors)
        else:
            # Files of early versions have other names for the parts of attention.
            module._fix_state_dict_keys_on_load(tensors)
            module.load_state_dict(tensors, assign=True)
    except ModelError:
        raise
    except Exception as error:
        # Whatever a wrong config or a file that does not fit it raises, the worker cannot run.
        if name == "vae" and model_dir.vae is not None:
            raise ModelError(f"VAE_DIR: {model_dir.vae} cannot be loaded: {error}") from error
        what = model_dir.checkpoint.path if model_dir.checkpoint else folder
        raise ModelError(f"MODEL_DIR: {what} cannot be loaded: {error}") from error
    return module


def _check_channels(unet: Any, folder: Path, *, of_refiner: bool) -> None:
    taken = unet.config.in_channels
    if taken == CHANNELS or (taken == INPAINTING_CHANNELS and not of_refiner):
        return
    served = f"a refiner takes {CHANNELS}"
    if not of_refiner:
        served = (
            f"those that can be served take {CHANNELS}, or {INPAINTING_CHANNELS} if they are for "
            "inpainting"
        )
    raise ModelError(f"MODEL_DIR: the UNet of {folder} takes {taken} channels; {served}")


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


def _scheduler_config(model_dir: ModelDir) -> dict[str, Any]:
    checkpoint, prediction_type = model_dir.checkpoint, model_dir.prediction_type
    if checkpoint is not None:
        config = dict(checkpoint.scheduler_config)
    else:
        config = _json(model_dir.base / "scheduler" / "scheduler_config.json")
    return config | ({"prediction_type": prediction_type} if prediction_type else {})


def _load_tokenizer(folder: Path) -> CLIPTokenizer:
    # Without its files transformers would make an empty vocabulary and warn.
    for name in ("vocab.json", "merges.txt"):
        if not (folder / name).is_file():
            raise ModelError(f"MODEL_DIR: {folder / name} is missing")
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def _pipeline_option(folder: Path, name: str, default: bool) -> bool:
    """An option of the pipeline that model_index.json records beside the components."""
    index = folder / "model_index.json"
    return _json(index).get(name, default) if index.is_file() else default


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"MODEL_DIR: {path} cannot be read: {error}") from error
