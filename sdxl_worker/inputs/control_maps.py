"""Control maps that are made of a picture on the CPU: edges, poses, and what is to be repainted.

OpenCV, rtmlib and onnxruntime are optional, and imported where they are needed.
"""

import colorsys
import functools
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sdxl_worker.errors import ModelError, RequestError
from sdxl_worker.field_types import ControlName
from sdxl_worker.inputs.masks import Mask

# The libraries that a type's preprocessing needs.
LIBRARIES: dict[ControlName, tuple[str, ...]] = {
    "canny": ("cv2",),
    "pose": ("cv2", "rtmlib", "onnxruntime"),
}
ELSE_SEND_A_MAP = "a finished map works, with preprocess false"

# Of the gradient: what the ControlNets for edges were trained with by default.
CANNY_THRESHOLDS = 100, 200

# A joint of which the network is less sure is not drawn.
_LEAST_SURE = 0.3
# Each is a pass of the network. A crowd would be hundreds.
MOST_PEOPLE = 20
_PERSON = 0  # the first class of the detectors that know more than people

# Of OpenPose's 18 joints, in its order: 0 nose, 1 neck, 2 to 4 right arm, 5 to 7 left arm, 8 to 10
# right leg, 11 to 13 left leg, 14 and 15 eyes, 16 and 17 ears. Each limb and each joint has the
# colour of its own number.
_JOINTS = 18
_LIMBS = (
    *((1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7)),
    *((1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13)),
    *((1, 0), (0, 14), (14, 16), (0, 15), (15, 17)),
)
_COLOURS = [
    tuple(round(255 * part) for part in colorsys.hsv_to_rgb(i / _JOINTS, 1, 1))
    for i in range(_JOINTS)
]
_LIMB_BRIGHTNESS = 0.6


@dataclass(frozen=True)
class PoseFiles:
    """ONNX files: one finds people, the other their joints."""

    detector: Path
    pose: Path


def check_installed(kind: ControlName, field: str) -> None:
    """
    Raises:
        RequestError: the worker lacks a library that the preprocessing of this type needs.
    """
    missing = [name for name in LIBRARIES.get(kind, ()) if not _is_installed(name)]
    if missing:
        raise RequestError(
            f"{field}: preprocessing for {kind} is not installed on this worker ({missing[0]} is "
            "missing; its owner can build the image with requirements-control.txt); "
            f"{ELSE_SEND_A_MAP}"
        )


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # of a module that was put in place of one that is not there
        return False


def canny_map(picture: Image.Image) -> Image.Image:
    """Its edges, white on black, RGB.

    OpenCV takes each pixel's steepest channel. In grey, the edge between two colours of one
    brightness would be lost.
    """
    import cv2

    edges = cv2.Canny(np.asarray(picture), *CANNY_THRESHOLDS)
    return Image.fromarray(edges).convert("RGB")


def repaint_map(picture: Image.Image, mask: Mask) -> Image.Image:
    """The picture, black where it is repainted.

    Args:
        mask: [height, width] of the picture: true is repainted.
    """
    pixels = np.asarray(picture).copy()
    pixels[mask] = 0
    return Image.fromarray(pixels)


def pose_map(picture: Image.Image, files: PoseFiles, field: str) -> Image.Image:
    """The people in it as OpenPose draws them, RGB on black.

    Args:
        field: the place of the picture in the request, for messages.

    Raises:
        RequestError: there is nobody.
        ModelError: a file is no such network.
    """
    people = _PoseFinder.of(files).joints_of(np.asarray(picture))
    if not any((sureness >= _LEAST_SURE).any() for _, sureness in people):
        raise RequestError(
            f"{field}: nobody is found in the picture, so pose has nothing to go by; send a "
            "picture with a person who is larger in it, or a finished map with preprocess false"
        )
    return drawn_pose(people, picture.size)


class _PoseFinder:
    """The two networks, as rtmlib uses them."""

    def __init__(self, files: PoseFiles) -> None:
        # Imported without this, it writes an id of the machine into the user's folder, and reports
        # its use to its makers.
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"
        import onnxruntime
        import rtmlib
        import rtmlib.tools.base as tools

        # It prints a line for each file that it loads.
        vars(tools)["print"] = lambda *_: None
        onnxruntime.set_default_logger_severity(3)  # errors; it warns of GPUs that are not there
        # Paths of files that are there: of others it would download something.
        self._detector = _loaded(rtmlib.YOLOX, files.detector)
        self._pose = _loaded(rtmlib.RTMPose, files.pose, to_openpose=True)
        height, width = _input_size(self._detector)
        self._detector.model_input_size = height, width
        height, width = _input_size(self._pose)
        self._pose.model_input_size = width, height

    @staticmethod
    @functools.lru_cache(maxsize=1)
    def of(files: PoseFiles) -> "_PoseFinder":
        """Loaded once: they take half a second, and some 400 MB of the host's memory.

        Raises:
            ModelError: a file cannot be loaded.
        """
        return _PoseFinder(files)

    def joints_of(self, pixels: NDArray[np.uint8]) -> list[tuple[NDArray[Any], NDArray[Any]]]:
        """Of each person the places of the joints [joints, 2], x and y in pixels, and how sure
        these are [joints]; of a crowd, those of the largest `MOST_PEOPLE`.

        Args:
            pixels: RGB, [height, width, 3].
        """
        people = self._boxes(pixels[..., ::-1])  # it was trained with BGR, the other with RGB
        if not len(people):  # it would take the whole picture for a person
            return []
        sizes = (people[:, 2] - people[:, 0]) * (people[:, 3] - people[:, 1])
        people = people[np.argsort(-sizes, kind="stable")[:MOST_PEOPLE]]
        places, sureness = self._pose(pixels, bboxes=people)
        return list(zip(places[:, :_JOINTS], sureness[:, :_JOINTS], strict=True))

    def _boxes(self, pixels: NDArray[np.uint8]) -> NDArray[Any]:
        """Of the people [people, 4]: left, top, right, bottom."""
        padded, ratio = self._detector.preprocess(np.ascontiguousarray(pixels))
        found = self._detector.inference(padded)[0]
        # Those that end with the choice of boxes (five numbers for each) know people alone.
        if found.shape[-1] == 5:
            return self._detector.postprocess(found, ratio)
        self._detector.det_mode = "multiclass"
        boxes, kinds = self._detector.postprocess(found, ratio)
        return boxes[kinds == _PERSON]


def _loaded(kind: Any, path: Path, **options: Any) -> Any:
    if not path.is_file():
        raise ModelError(f"CONTROLNET_DIR: {path.name} of preprocessors/pose is gone")
    try:
        tool = kind(str(path), backend="onnxruntime", device="cpu", **options)
        _input_size(tool)
    except Exception:  # onnxruntime has a dozen kinds, with paths in their words
        raise ModelError(
            f"CONTROLNET_DIR: {path.name} of preprocessors/pose is no ONNX network that takes a "
            "picture of one size"
        ) from None
    return tool


def _input_size(tool: Any) -> tuple[int, int]:
    """Height and width."""
    *_, height, width = tool.session.get_inputs()[0].shape
    return int(height), int(width)


def drawn_pose(
    people: list[tuple[NDArray[Any], NDArray[Any]]], size: tuple[int, int]
) -> Image.Image:
    """
    Args:
        people: places [18, 2] and sureness [18] of each one's joints, in OpenPose's order.
        size: width and height.
    """
    import cv2

    canvas = np.zeros((size[1], size[0], 3), np.uint8)
    radius = _stick_radius_px(size)
    for places, sureness in people:
        for i, (begin, end) in enumerate(_LIMBS):
            if min(sureness[begin], sureness[end]) < _LEAST_SURE:
                continue
            across, along = np.subtract(places[end], places[begin])
            middle = np.add(places[end], places[begin]) / 2
            outline = cv2.ellipse2Poly(
                (round(float(middle[0])), round(float(middle[1]))),
                (round(float(np.hypot(across, along)) / 2), radius),
                round(float(np.degrees(np.arctan2(along, across)))),
                0,
                360,
                1,
            )
            darker = [round(_LIMB_BRIGHTNESS * part) for part in _COLOURS[i]]
            cv2.fillConvexPoly(canvas, outline, darker)
    for places, sureness in people:
        points = [(round(float(x)), round(float(y))) for x, y in places]
        for point, is_sure, colour in zip(points, sureness >= _LEAST_SURE, _COLOURS, strict=True):
            if is_sure:
                cv2.circle(canvas, point, radius, colour, -1)
    return Image.fromarray(canvas)


def _stick_radius_px(size: tuple[int, int]) -> int:
    """OpenPose draws 4 pixels at any size. xinsir's networks were trained on twice that from 500
    pixels of the longer side on, three times from 1000 on, and so forth."""
    longer = max(size)
    return 4 * (1 if longer < 500 else min(2 + longer // 1000, 7))
