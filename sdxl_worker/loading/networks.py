"""The networks of a model, their classes and folders: they are listed only here."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Network:
    folder: str
    """In this worker's layout."""
    class_path: str

    def load_class(self) -> Any:
        """Its class. Imported only when needed: the libraries take seconds."""
        module, _, name = self.class_path.partition(".")
        return getattr(importlib.import_module(module), name)

    def build(
        self, folder: Path, config_changes: Mapping[str, Any] = MappingProxyType({})
    ) -> "torch.nn.Module":
        """The network of a configuration; its tensors have no memory (on the meta device).

        Args:
            config_changes: what replaces values of the configuration, of diffusers' networks.
        """
        import torch
        from transformers import PreTrainedModel

        kind = self.load_class()
        with torch.device("meta"):
            if issubclass(kind, PreTrainedModel):
                network = kind(kind.config_class.from_pretrained(folder, local_files_only=True))
            else:
                config = kind.load_config(folder, local_files_only=True)
                network = kind.from_config({**config, **config_changes})
        return network.eval()

    @property
    def of_refiner(self) -> bool:
        return self.folder.startswith("refiner/")


# By their names in `Models`, in the order they are read: what draws the first latents comes first,
# the refiner last.
NETWORKS = {
    "text_encoder": Network("base/text_encoder", "transformers.CLIPTextModel"),
    "text_encoder_2": Network("base/text_encoder_2", "transformers.CLIPTextModelWithProjection"),
    "unet": Network("base/unet", "diffusers.UNet2DConditionModel"),
    "vae": Network("base/vae", "diffusers.AutoencoderKL"),
    "refiner_unet": Network("refiner/unet", "diffusers.UNet2DConditionModel"),
}
