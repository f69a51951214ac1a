"""What makes maps of pictures, in `CONTROLNET_DIR`."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sdxl_worker.errors import ModelError, RequestError
from sdxl_worker.loading import preprocessors
from sdxl_worker.loading.preprocessors import DepthFiles, find_depth, find_pose
from sdxl_worker.placement import Placement
from tests.loading.transformers_networks import save_depth_network

FIELD = "controlnet[1].type"
CPU = Placement(torch.device("cpu"), torch.float32, resident=True)


@pytest.fixture(autouse=True)
def _no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preprocessors, "BAKED_CONTROLNET_DIR", Path("/nowhere"))


@pytest.mark.parametrize("is_set", [True, False])
@pytest.mark.parametrize("find", [find_depth, find_pose])
def test_what_is_not_there_is_refused_with_what_the_owner_and_the_caller_can_do(
    find: object, is_set: bool, tmp_path: Path
) -> None:
    with pytest.raises(RequestError) as caught:
        find(tmp_path if is_set else None, FIELD)  # type: ignore[operator]
    message = str(caught.value)
    assert message.startswith(f"{FIELD}: preprocessing for ")
    assert "CONTROLNET_DIR" in message
    assert "preprocess false" in message


def test_those_of_the_image_are_found_where_the_owner_s_folder_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, image = tmp_path / "own", tmp_path / "image"
    monkeypatch.setattr(preprocessors, "BAKED_CONTROLNET_DIR", image)
    own.mkdir()
    for folder in (image, own):
        save_depth_network(folder / "preprocessors" / "depth")
        save_pose_files(folder)
        expected = folder / "preprocessors"
        assert find_depth(own, FIELD) == DepthFiles(expected / "depth")
        assert find_pose(own, FIELD).pose.parent == expected / "pose"
    assert find_depth(None, FIELD) == DepthFiles(image / "preprocessors" / "depth")
    assert find_pose(None, FIELD).pose.parent == image / "preprocessors" / "pose"
    (own / "preprocessors" / "pose" / "other.onnx").touch()
    with pytest.raises(RequestError, match="one yolox"):  # not another one without a word
        find_pose(own, FIELD)


def save_pose_files(folder: Path) -> Path:
    folder = folder / "preprocessors" / "pose"
    folder.mkdir(parents=True)
    for name in ("dw-ll_ucoco_384.onnx", "yolox_l.onnx", "README.md"):
        (folder / name).touch()
    return folder


def test_the_two_networks_of_poses_are_told_apart_by_their_names(tmp_path: Path) -> None:
    folder = save_pose_files(tmp_path)
    files = find_pose(tmp_path, FIELD)
    assert (files.detector.name, files.pose.name) == ("yolox_l.onnx", "dw-ll_ucoco_384.onnx")
    (folder / "rtmpose.onnx").touch()
    with pytest.raises(RequestError, match="one yolox"):
        find_pose(tmp_path, FIELD)


def test_the_depth_network_is_loaded_from_its_folder_alone(tmp_path: Path) -> None:
    save_depth_network(tmp_path)
    files, tensors = DepthFiles(tmp_path), load_file(tmp_path / "model.safetensors")
    network = files.load(CPU)
    head = {name: one for name, one in network.state_dict().items() if name.startswith("head.")}
    assert head
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in head.items())
    assert not network.training
    numbers = sum(tensor.numel() for tensor in tensors.values())
    assert files.size_bytes(torch.float16) == 2 * numbers
    half = Placement(torch.device("cpu"), torch.float16, resident=True)
    assert {one.dtype for one in files.load(half).parameters()} == {torch.float16}


@pytest.mark.parametrize("content", [None, b"<html>"])
def test_a_depth_network_that_cannot_be_loaded_is_the_owner_s(
    content: bytes | None, tmp_path: Path
) -> None:
    save_depth_network(tmp_path)
    path = tmp_path / "model.safetensors"
    path.unlink() if content is None else path.write_bytes(content)
    for act in (
        lambda: DepthFiles(tmp_path).load(CPU),
        lambda: DepthFiles(tmp_path).size_bytes(CPU.dtype),
    ):
        with pytest.raises(ModelError, match=r"^CONTROLNET_DIR: "):
            act()
