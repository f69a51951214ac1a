"""Control maps of the CPU: edges, poses, and what is to be repainted."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rtmlib
from PIL import Image, ImageDraw

from sdxl_worker.errors import ModelError, RequestError
from sdxl_worker.inputs.control_maps import (
    MOST_PEOPLE,
    PoseFiles,
    canny_map,
    check_installed,
    drawn_pose,
    pose_map,
    repaint_map,
)
from tests.inputs.onnx_files import (
    POSE_HEIGHT_PX,
    POSE_WIDTH_PX,
    SIDE_PX,
    write_constant_network,
    write_detector,
    write_pose_network,
)
from tests.support import REPOSITORY

FIELD = "controlnet[0].image_url"
# COCO's order: nose, eyes, ears, shoulders, elbows, wrists, hips, knees, ankles; left before right.
# Someone who stands, seen from the front, in the pixels of the pose network's input.
STANDING = [
    *((24, 10), (26, 8), (22, 8), (28, 9), (20, 9)),
    *((32, 20), (16, 20), (36, 28), (12, 28), (38, 36), (10, 36)),
    *((28, 38), (20, 38), (28, 48), (20, 48), (28, 58), (20, 58)),
]
WRIST_OF_THE_RIGHT, RIGHT_WRIST_COLOUR = STANDING[10], (170, 255, 0)
NOSE, NOSE_COLOUR = STANDING[0], (255, 0, 0)


@pytest.fixture
def pose_files(tmp_path: Path) -> PoseFiles:
    """They find one person, who fills the picture, standing."""
    files = PoseFiles(tmp_path / "yolox.onnx", tmp_path / "rtmpose.onnx")
    write_detector(files.detector, [(0, 0, SIDE_PX, SIDE_PX)])
    write_pose_network(files.pose, STANDING)
    return files


def test_edges_are_white_on_black_where_the_picture_has_them() -> None:
    picture = Image.new("RGB", (64, 48), "navy")
    ImageDraw.Draw(picture).rectangle((20, 10, 40, 30), fill="yellow")
    edges = np.asarray(canny_map(picture))
    assert edges.shape == (48, 64, 3)
    assert set(np.unique(edges)) == {0, 255}
    inside, outside = edges[14:27, 24:37], np.delete(edges, slice(16, 45), axis=1)
    assert not inside.any()
    assert not outside.any()
    assert edges[8:33, 18:43].any(axis=(0, 2)).sum() >= 20


def test_edges_are_found_at_the_thresholds_100_and_200() -> None:
    """Sobel's gradient of a step is four times the step."""
    for step, has_edge in ((45, False), (55, True)):
        picture = Image.new("RGB", (64, 64), (100, 100, 100))
        picture.paste((100 + step,) * 3, (32, 0, 64, 64))
        assert np.asarray(canny_map(picture)).any() == has_edge


def test_edges_between_colours_of_one_brightness_are_found() -> None:
    picture = Image.new("RGB", (64, 64), (30, 150, 60))
    picture.paste((215, 55, 200), (32, 0, 64, 64))
    grey = np.asarray(picture.convert("L"))
    assert int(grey.max()) - int(grey.min()) < 20
    assert np.asarray(canny_map(picture))[:, 30:34].any(axis=(1, 2)).all()


def test_what_is_repainted_is_black_and_the_rest_is_the_picture() -> None:
    picture = Image.effect_noise((16, 8), 60).convert("RGB")
    mask = np.zeros((8, 16), bool)
    mask[2:5, 3:9] = True
    pixels = np.asarray(repaint_map(picture, mask))
    assert not pixels[mask].any()
    assert np.array_equal(pixels[~mask], np.asarray(picture)[~mask])


def place_of(joint: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Where in a picture that a person fills a joint is: the network gets a quarter more than the
    person, in the shape of its own input."""
    width, height = (1.25 * side for side in size)
    width = max(width, height * POSE_WIDTH_PX / POSE_HEIGHT_PX)
    height = width * POSE_HEIGHT_PX / POSE_WIDTH_PX
    return (
        round(joint[0] / POSE_WIDTH_PX * width + (size[0] - width) / 2),
        round(joint[1] / POSE_HEIGHT_PX * height + (size[1] - height) / 2),
    )


def test_a_person_is_drawn_as_openpose_draws_one(pose_files: PoseFiles) -> None:
    picture = Image.new("RGB", (96, 128))
    write_detector(pose_files.detector, [(0, 0, SIDE_PX * 3 / 4, SIDE_PX)])
    drawn = pose_map(picture, pose_files, FIELD)
    assert (drawn.size, drawn.mode) == (picture.size, "RGB")
    assert drawn.getpixel(place_of(NOSE, picture.size)) == NOSE_COLOUR
    assert drawn.getpixel(place_of(WRIST_OF_THE_RIGHT, picture.size)) == RIGHT_WRIST_COLOUR
    assert drawn.getpixel((2, 2)) == (0, 0, 0)


def test_everyone_is_drawn(pose_files: PoseFiles) -> None:
    half = SIDE_PX // 2
    write_detector(pose_files.detector, [(0, 0, half, SIDE_PX), (half, 0, SIDE_PX, SIDE_PX)])
    drawn = pose_map(Image.new("RGB", (256, 256)), pose_files, FIELD)
    noses = np.asarray(drawn) == NOSE_COLOUR
    assert noses[:, :128].all(axis=2).any()
    assert noses[:, 128:].all(axis=2).any()


def test_of_a_crowd_only_the_largest_are_looked_at(
    pose_files: PoseFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is a pass of the network, and nothing stops those of a job that is cancelled."""
    crowd = [(4 * (i % 12), 4 * (i // 12), 4 * (i % 12) + 3, 4 * (i // 12) + 3) for i in range(60)]
    large = (SIDE_PX // 2, 24, SIDE_PX, SIDE_PX)
    write_detector(pose_files.detector, [*crowd, large])
    seen: list[Any] = []
    infer = rtmlib.RTMPose.inference

    def counted(tool: Any, pixels: Any) -> Any:
        seen.append(pixels)
        return infer(tool, pixels)

    monkeypatch.setattr(rtmlib.RTMPose, "inference", counted)
    drawn = pose_map(Image.new("RGB", (256, 256)), pose_files, FIELD)
    assert len(seen) == MOST_PEOPLE
    noses = (np.asarray(drawn) == NOSE_COLOUR).all(axis=2)
    assert noses[96:].any(), "the largest is one of them"


def test_a_detector_of_many_things_gives_people_only(pose_files: PoseFiles) -> None:
    """YOLOX without a choice of boxes: places in cells, sizes as logarithms, and 80 classes."""
    cells = (SIDE_PX // 8) ** 2 + (SIDE_PX // 16) ** 2 + (SIDE_PX // 32) ** 2
    found = np.zeros((1, cells, 85))
    found[0, -4:, 4] = 1
    found[0, -4, :4] = 0.5, 1, *np.log([1, 2])  # the left half, of cells of 32 pixels
    found[0, -4, 5] = 0.9
    found[0, -3, :4] = 0.5, 1, *np.log([1, 2])  # the right half is a dog
    found[0, -3, 5 + 16] = 0.9
    write_constant_network(pose_files.detector, (1, 3, SIDE_PX, SIDE_PX), [found])
    drawn = np.asarray(pose_map(Image.new("RGB", (256, 256)), pose_files, FIELD))
    assert drawn[:, :128].any()
    assert not (drawn[:, 160:] == NOSE_COLOUR).all(axis=2).any()


@pytest.mark.parametrize("unsure", ["person", "joints"])
def test_a_picture_with_nobody_in_it_is_refused(pose_files: PoseFiles, unsure: str) -> None:
    if unsure == "person":
        write_detector(pose_files.detector, [])
    else:
        write_pose_network(pose_files.pose, STANDING, sureness=0.1)
    with pytest.raises(RequestError, match=rf"^{re.escape(FIELD)}: nobody is found"):
        pose_map(Image.new("RGB", (128, 128)), pose_files, FIELD)


@pytest.mark.parametrize("name", ["yolox.onnx", "rtmpose.onnx"])
@pytest.mark.parametrize("is_gone", [True, False])
def test_a_file_that_cannot_be_loaded_is_the_owner_s_and_nothing_is_downloaded(
    pose_files: PoseFiles, name: str, is_gone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = pose_files.pose.with_name(name)
    path.write_bytes(b"<html>")
    if is_gone:
        path.unlink()
    monkeypatch.setattr(
        "rtmlib.tools.base.download_checkpoint", lambda *_: pytest.fail("downloaded")
    )
    with pytest.raises(ModelError, match=rf"^CONTROLNET_DIR: {name} of preprocessors/pose is "):
        pose_map(Image.new("RGB", (128, 128)), pose_files, FIELD)


def test_each_network_gets_the_colours_in_the_order_that_it_was_trained_with(
    pose_files: PoseFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[int]] = {}
    for kind in (rtmlib.YOLOX, rtmlib.RTMPose):

        def noted(tool: Any, pixels: Any, *more: Any, prepare: Any = kind.preprocess) -> Any:
            seen[type(tool).__name__] = pixels[0, 0].tolist()
            return prepare(tool, pixels, *more)

        monkeypatch.setattr(kind, "preprocess", noted)
    pose_map(Image.new("RGB", (64, 64), (200, 100, 50)), pose_files, FIELD)
    assert seen == {"YOLOX": [50, 100, 200], "RTMPose": [200, 100, 50]}


def test_the_libraries_print_nothing(
    pose_files: PoseFiles, capfd: pytest.CaptureFixture[str]
) -> None:
    pose_map(Image.new("RGB", (128, 128)), pose_files, FIELD)
    assert capfd.readouterr() == ("", "")


def person(sureness: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Neck and right shoulder alone, side by side, of OpenPose's joints."""
    places, sure = np.zeros((18, 2)), np.zeros(18)
    places[1], places[2] = (120, 40), (40, 40)
    sure[1] = sure[2] = sureness
    return places, sure


def test_nobody_is_told_that_they_are_used(pose_files: PoseFiles, tmp_path: Path) -> None:
    """onnxruntime leaves an id of the machine where it reports its use."""
    program = (
        "import pathlib, sys\n"
        "from PIL import Image\n"
        "from sdxl_worker.inputs.control_maps import PoseFiles, pose_map\n"
        "files = PoseFiles(*map(pathlib.Path, sys.argv[1:]))\n"
        "pose_map(Image.new('RGB', (64, 64), 'white'), files, 'image_url')\n"
        "assert 'onnxruntime' in sys.modules\n"
    )
    environment = {name: value for name, value in os.environ.items() if "TELEMETRY" not in name}
    subprocess.run(
        [sys.executable, "-c", program, pose_files.detector, pose_files.pose],
        env={**environment, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)},
        cwd=REPOSITORY,
        check=True,
    )
    assert not list(tmp_path.rglob("*.onnxruntime*"))
    assert not list(tmp_path.rglob("deviceid"))


def test_limbs_are_darker_than_joints_and_unsure_ones_are_not_drawn() -> None:
    drawn = drawn_pose([person()], (160, 80))
    assert drawn.getpixel((80, 40)) == (153, 0, 0)
    assert drawn.getpixel((120, 40)) == (255, 85, 0)
    assert not np.asarray(drawn_pose([person(sureness=0.2)], (160, 80))).any()


@pytest.mark.parametrize(
    ("longer_side", "radius"), [(160, 4), (499, 4), (500, 8), (1024, 12), (2048, 16), (4096, 24)]
)
def test_lines_are_as_thick_as_the_networks_for_sdxl_were_trained_with(
    longer_side: int, radius: int
) -> None:
    drawn = np.asarray(drawn_pose([person()], (longer_side, 80)))
    assert drawn[:, 80].any(axis=1).sum() == pytest.approx(2 * radius + 1, abs=1)


@pytest.mark.parametrize(
    ("kind", "library"), [("canny", "cv2"), ("pose", "rtmlib"), ("pose", "onnxruntime")]
)
def test_without_its_library_preprocessing_is_refused_with_what_to_do(
    kind: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_installed(kind, FIELD)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(RequestError) as caught:
        check_installed(kind, FIELD)  # type: ignore[arg-type]
    message = str(caught.value)
    assert message.startswith(f"{FIELD}: preprocessing for {kind} is not installed")
    assert library in message
    assert "requirements-control.txt" in message
    assert "preprocess false" in message


def test_types_that_need_no_library_are_never_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("cv2", "rtmlib", "onnxruntime"):
        monkeypatch.setitem(sys.modules, library, None)
    check_installed("tile", FIELD)
    check_installed("repaint", FIELD)
