"""What makes maps of pictures: `preprocessors/` in `CONTROLNET_DIR`."""

from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path

import torch

from sdxl_worker.errors import RequestError
from sdxl_worker.inputs.control_maps import ELSE_SEND_A_MAP, PoseFiles
from sdxl_worker.loading.controlnets import BAKED_CONTROLNET_DIR, PREPROCESSORS
from sdxl_worker.loading.transformers_folders import load_folder, numbers_in
from sdxl_worker.placement import Placement


@dataclass(frozen=True)
class DepthFiles:
    """`CompanionFiles` of the network that tells how near things are."""

    folder: Path

    @property
    def key(self) -> Hashable:
        return self.folder

    @property
    def title(self) -> str:
        return "the depth preprocessor"

    def size_bytes(self, dtype: torch.dtype) -> int:
        return numbers_in(self.folder, "CONTROLNET_DIR") * dtype.itemsize

    def load(self, placement: Placement) -> torch.nn.Module:
        from transformers import DepthAnythingForDepthEstimation

        network = load_folder(
            DepthAnythingForDepthEstimation, self.folder, "CONTROLNET_DIR", placement.dtype
        )
        return network.to(placement.device) if placement.resident else network


def find_depth(controlnet_dir: Path | None, field: str) -> DepthFiles:
    """
    Args:
        controlnet_dir: `CONTROLNET_DIR`. What it has not got, the image may have.
        field: of the request, for messages.

    Raises:
        RequestError: the worker has none.
    """
    for folder in _folders(controlnet_dir, "depth"):
        if (folder / "config.json").is_file():
            return DepthFiles(folder)
    raise _missing("depth", "Depth-Anything-V2-Small in transformers layout", field)


def find_pose(controlnet_dir: Path | None, field: str) -> PoseFiles:
    """
    Args:
        controlnet_dir: as for `find_depth`.
        field: of the request, for messages.

    Raises:
        RequestError: the worker has none, or more files than it can tell apart.
    """
    for folder in _folders(controlnet_dir, "pose"):
        files = sorted(folder.glob("*.onnx"))
        detectors = [path for path in files if path.name.lower().startswith("yolox")]
        poses = [path for path in files if path not in detectors]
        if len(detectors) == 1 and len(poses) == 1:
            return PoseFiles(detectors[0], poses[0])
        if files:
            break  # the owner meant these
    raise _missing("pose", "one yolox*.onnx and one *.onnx of RTMPose or DWPose", field)


def _folders(controlnet_dir: Path | None, name: str) -> list[Path]:
    """Where a preprocessor may be: the owner's first."""
    folders = (controlnet_dir, BAKED_CONTROLNET_DIR)
    return [folder / PREPROCESSORS / name for folder in folders if folder is not None]


def _missing(name: str, what: str, field: str) -> RequestError:
    return RequestError(
        f"{field}: preprocessing for {name} is not set up on this worker (its owner can put {what} "
        f"into {PREPROCESSORS}/{name} of CONTROLNET_DIR); {ELSE_SEND_A_MAP}"
    )
