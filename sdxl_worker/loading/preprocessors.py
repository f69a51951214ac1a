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
        controlnet_dir: `CONTROLNET_DIR`. None: that of the image, if it has one.
        field: of the request, for messages.

    Raises:
        RequestError: the worker has none.
    """
    folder = (controlnet_dir or BAKED_CONTROLNET_DIR) / PREPROCESSORS / "depth"
    if not (folder / "config.json").is_file():
        raise _missing("depth", "Depth-Anything-V2-Small in transformers layout", field)
    return DepthFiles(folder)


def find_pose(controlnet_dir: Path | None, field: str) -> PoseFiles:
    """
    Args:
        controlnet_dir: as for `find_depth`.
        field: of the request, for messages.

    Raises:
        RequestError: the worker has none, or more files than it can tell apart.
    """
    folder = (controlnet_dir or BAKED_CONTROLNET_DIR) / PREPROCESSORS / "pose"
    files = sorted(folder.glob("*.onnx"))
    detectors = [path for path in files if path.name.lower().startswith("yolox")]
    poses = [path for path in files if path not in detectors]
    if len(detectors) != 1 or len(poses) != 1:
        raise _missing("pose", "one yolox*.onnx and one *.onnx of RTMPose or DWPose", field)
    return PoseFiles(detectors[0], poses[0])


def _missing(name: str, what: str, field: str) -> RequestError:
    return RequestError(
        f"{field}: preprocessing for {name} is not set up on this worker (its owner can put {what} "
        f"into {PREPROCESSORS}/{name} of CONTROLNET_DIR); {ELSE_SEND_A_MAP}"
    )
