"""The ControlNets of `CONTROLNET_DIR`: which of them serves a type, and how it is loaded.

A union serves many types. The numbers of its types are those that xinsir's was trained with:
https://huggingface.co/xinsir/controlnet-union-sdxl-1.0. Any other serves the types that the name of
its folder has in it.
"""

import json
import logging
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sdxl_worker.errors import BrokenFilesError, ModelError, RequestError
from sdxl_worker.field_types import CONTROL_SPELLINGS, CONTROL_TYPES, ControlName
from sdxl_worker.gpu import is_out_of_memory
from sdxl_worker.loading.companions import count_numbers, read_tensors
from sdxl_worker.placement import Placement

log = logging.getLogger(__name__)

BAKED_CONTROLNET_DIR = Path("/models/controlnets")
"""Where the images with ControlNets have them."""
# Beside them: what makes maps of pictures.
PREPROCESSORS = "preprocessors"
UNION_MODES: dict[ControlName, int] = {
    "pose": 0,
    "depth": 1,
    "softedge": 2,
    "scribble": 2,
    "canny": 3,
    "lineart": 3,
    "normal": 4,
    "segment": 5,
    "tile": 6,
    "repaint": 7,
}
WEIGHTS = "diffusion_pytorch_model"
# xinsir's repository has two networks in one folder: the second knows two types more.
PROMAX = "promax"
# Between the words of "OpenPoseXL".
CAMEL_CASE = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
# Of a configuration that does not name them, by diffusers.
DEFAULTS: Mapping[str, Any] = {
    "in_channels": 4,
    "cross_attention_dim": 1280,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "addition_embed_type": None,
    "projection_class_embeddings_input_dim": None,
}
# What must be as in the UNet: the text that it reads, and the features that are added to.
LIKE_THE_UNET = [name for name in DEFAULTS if name != "in_channels"]
CHANNELS = 4


@dataclass(frozen=True)
class ControlNetFiles:
    """`CompanionFiles` of a ControlNet."""

    folder: Path
    mode: int | None
    """Of the type that was asked for, in a union; None: it is no union."""

    @property
    def key(self) -> Hashable:
        return self.folder

    @property
    def title(self) -> str:
        return f"the ControlNet {self.folder.name}"

    def size_bytes(self, dtype: torch.dtype) -> int:
        return count_numbers(self._weight_files(dtype), "CONTROLNET_DIR") * dtype.itemsize

    def load(self, placement: Placement) -> torch.nn.Module:
        from diffusers import ControlNetModel, ControlNetUnionModel

        config = _config(self.folder)
        kind: Any = ControlNetUnionModel if _is_union(config) else ControlNetModel
        tensors = read_tensors(self._weight_files(placement.dtype), placement, "CONTROLNET_DIR")
        try:
            with torch.device("meta"):
                network: Any = kind.from_config({**config, "_class_name": kind.__name__}).eval()
            network._fix_state_dict_keys_on_load(tensors)  # of early versions
            network.load_state_dict(tensors, assign=True)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            # Whatever a wrong config or a file that does not fit it raises. torch lists all names.
            what = " ".join(str(error).split())
            what = what if len(what) < 300 else f"{what[:300]}..."
            name = self.folder.name
            raise BrokenFilesError(f"CONTROLNET_DIR: {name} cannot be loaded: {what}") from error
        if placement.device.type != "cpu":  # as the UNets
            network.to(memory_format=torch.channels_last)
        return network

    def _weight_files(self, dtype: torch.dtype) -> list[Path]:
        """The fp16 variant if it is enough, or all there is; one file or several that belong
        together."""
        stem = f"{WEIGHTS}_{PROMAX}" if _has_promax(self.folder) else WEIGHTS
        part = r"(-\d+-of-\d+)?"
        pattern = re.compile(rf"{stem}(\.fp16)?{part}(\.fp16)?\.safetensors")
        every = sorted(self.folder.glob("*.safetensors"))
        # A folder may hold further versions under other names, or one file of any name.
        files = [path for path in every if pattern.fullmatch(path.name)] or every
        if not files or (len(every) > 1 and files is every):
            what = "more than one .safetensors file, none of them" if every else "no file"
            raise ModelError(
                f"CONTROLNET_DIR: {self.folder.name} holds {what} {WEIGHTS}.safetensors, the only "
                "kind loaded"
            )
        half = [path for path in files if ".fp16" in path.name]
        full = [path for path in files if ".fp16" not in path.name]
        return half if half and (dtype == torch.float16 or not full) else full


@dataclass(frozen=True)
class _Found:
    folder: Path
    config: Mapping[str, Any]
    modes: Mapping[str, int | None]
    """By the types that it serves."""


def find_controlnet(
    kind: ControlName,
    folder: Path | None,
    field: str,
    unet_config: Mapping[str, Any] | None = None,
) -> ControlNetFiles:
    """
    Args:
        folder: `CONTROLNET_DIR`. None: that of the image, if it has one.
        field: of the request, for messages.
        unet_config: of the base that is drawn with. None: whether they fit is not looked at.

    Raises:
        RequestError: there is none for this type; the message tells for which there is one.
    """
    folder = folder or (BAKED_CONTROLNET_DIR if BAKED_CONTROLNET_DIR.is_dir() else None)
    if folder is None:
        raise RequestError(
            f"{field}: this worker has no ControlNet; its owner has to set CONTROLNET_DIR to a "
            "folder of ControlNets"
        )
    found, remarks = _look_into(folder)
    misfits = [_misfit(one.config, unet_config) if unet_config else None for one in found]
    fitting = [one for one, misfit in zip(found, misfits, strict=True) if misfit is None]
    for one in fitting:
        if kind in one.modes:
            return ControlNetFiles(one.folder, one.modes[kind])
    # Those that would serve it come first.
    of_others = sorted(
        (kind not in one.modes, f"{one.folder.name} is for another kind of model: {misfit}")
        for one, misfit in zip(found, misfits, strict=True)
        if misfit is not None
    )
    remarks = [remark for _, remark in of_others] + remarks
    log.warning("no ControlNet for %s in %s: %s", kind, folder, "; ".join(remarks) or "none fits")
    there = _types_of(fitting)
    raise RequestError(
        "; ".join(
            [
                f"{field}: this worker has no ControlNet for {kind}",
                f"it has {', '.join(there)} (CONTROLNET_DIR)"
                if there
                else "CONTROLNET_DIR has none that can be used",
                *remarks[:2],
            ]
        )
    )


def types_of_controlnets(folder: Path | None, unet_config: Mapping[str, Any]) -> list[ControlName]:
    """Those that `find_controlnet` finds a ControlNet for.

    Args:
        folder: as for it, and so is `unet_config`.
    """
    found, _ = _look_into(folder or BAKED_CONTROLNET_DIR)
    return _types_of([one for one in found if _misfit(one.config, unet_config) is None])


def _types_of(found: Sequence[_Found]) -> list[ControlName]:
    return [name for name in CONTROL_TYPES if any(name in one.modes for one in found)]


def _look_into(folder: Path) -> tuple[list[_Found], list[str]]:
    """What is in a folder, in the order of preference, and what has to be said about the rest."""
    try:
        folders = [folder] if (folder / "config.json").is_file() else sorted(folder.iterdir())
    except OSError as error:
        return [], [f"the folder cannot be read ({error.strerror})"]
    found, remarks = [], []
    for one in folders:
        if one.name == PREPROCESSORS or not (one / "config.json").is_file():
            continue
        try:
            config = _config(one)
            found.append(_Found(one, config, _modes(one, config)))
        except ModelError as error:
            remarks.append(str(error).removeprefix("CONTROLNET_DIR: "))
    # What was made for a type alone, then what knows the most.
    return sorted(found, key=lambda one: (_is_union(one.config), -len(one.modes))), remarks


def _modes(folder: Path, config: Mapping[str, Any]) -> dict[str, int | None]:
    """
    Raises:
        ModelError: it is no ControlNet of SDXL, or its name tells no type.
    """
    if _is_union(config):
        known = config.get("num_control_type", 6)
        return {name: mode for name, mode in UNION_MODES.items() if mode < known}
    if (class_name := config.get("_class_name")) != "ControlNetModel":
        what = class_name or "its config.json has no _class_name"
        raise ModelError(f"CONTROLNET_DIR: {folder.name} is no ControlNet for SDXL: {what}")
    words = _words(folder.name) + _words(CAMEL_CASE.sub("-", folder.name))
    kinds = {kind for name, kind in CONTROL_SPELLINGS.items() if _words(name) in words}
    if not kinds:
        raise ModelError(
            f"CONTROLNET_DIR: {folder.name} tells no type: the name of its folder must have one in "
            f"it, such as {folder.name}-canny"
        )
    return dict.fromkeys(kinds)


def _words(name: str) -> str:
    """In small letters, with a hyphen before and after each."""
    return f"-{re.sub(r'[^a-z0-9]+', '-', name.lower())}-"


def _is_union(config: Mapping[str, Any]) -> bool:
    # xinsir's own says that it is a ControlNetModel.
    return "num_control_type" in config or config.get("_class_name") == "ControlNetUnionModel"


def _has_promax(folder: Path) -> bool:
    names = (f"config_{PROMAX}.json", f"{WEIGHTS}_{PROMAX}.safetensors")
    return all((folder / name).is_file() for name in names)


def _config(folder: Path) -> dict[str, Any]:
    """
    Raises:
        ModelError: it cannot be read.
    """
    path = folder / (f"config_{PROMAX}.json" if _has_promax(folder) else "config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        what = f"CONTROLNET_DIR: {folder.name}/{path.name} cannot be read: {error}"
        raise ModelError(what) from error
    if not isinstance(config, dict):
        raise ModelError(f"CONTROLNET_DIR: {folder.name}/{path.name} is no JSON object")
    return config


def _misfit(config: Mapping[str, Any], unet_config: Mapping[str, Any]) -> str | None:
    """Why it is not for a UNet. None: it is."""

    def value(of: Mapping[str, Any], name: str) -> Any:
        found = of.get(name, DEFAULTS[name])
        return list(found) if isinstance(found, tuple) else found

    if value(config, "in_channels") != CHANNELS:
        return f"it takes {value(config, 'in_channels')} channels of latents, not {CHANNELS}"
    for name in LIKE_THE_UNET:
        own, expected = value(config, name), value(unet_config, name)
        if own != expected:
            return f"its {name} is {own}, and this model's {expected}"
    return None
