"""Which ControlNet of CONTROLNET_DIR serves a type, and how it is loaded."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdxl_worker.errors import ModelError, RequestError
from sdxl_worker.field_types import CONTROL_SPELLINGS, CONTROL_TYPES
from sdxl_worker.loading import companions, controlnets
from sdxl_worker.loading.companions import at_work
from sdxl_worker.loading.controlnets import UNION_MODES, find_controlnet
from sdxl_worker.placement import Placement
from sdxl_worker.serving import start as start_module
from sdxl_worker.serving.models_kept import ModelsKept
from sdxl_worker.serving.start import put_beside
from tests.control_networks import single, union, write
from tests.support import models

FIELD = "controlnet[0].type"
WEIGHTS = "diffusion_pytorch_model"
CPU = Placement(torch.device("cpu"), torch.float32, resident=True)


def config(folder: Path, **values: Any) -> Path:
    """A ControlNet as far as looking for one reads it."""
    folder.mkdir(parents=True)
    whole = {"_class_name": "ControlNetModel", **dict(single().config), **values}
    (folder / "config.json").write_text(json.dumps(whole, default=str), "utf-8")
    return folder


def found(kind: Any, folder: Path | None) -> tuple[str, int | None]:
    files = find_controlnet(kind, folder, FIELD, models().unet.config)
    return files.folder.name, files.mode


def refusal(kind: Any, folder: Path | None) -> str:
    with pytest.raises(RequestError) as caught:
        found(kind, folder)
    return str(caught.value)


def test_a_union_serves_the_types_that_it_was_trained_for(tmp_path: Path) -> None:
    config(tmp_path / "union", _class_name="ControlNetUnionModel", num_control_type=6)
    for kind in CONTROL_TYPES:
        if kind in ("tile", "repaint"):
            assert refusal(kind, tmp_path) == (
                f"controlnet[0].type: this worker has no ControlNet for {kind}; it has canny, "
                "depth, pose, softedge, scribble, lineart, normal, segment (CONTROLNET_DIR)"
            )
        else:
            assert found(kind, tmp_path) == ("union", UNION_MODES[kind])
    assert UNION_MODES["softedge"] == UNION_MODES["scribble"] == 2
    assert UNION_MODES["canny"] == UNION_MODES["lineart"] == 3


def test_xinsir_s_own_folder_is_a_union_and_its_second_network_is_taken(tmp_path: Path) -> None:
    """Its configuration names another class."""
    folder = config(tmp_path / "controlnet-union-sdxl-1.0", num_control_type=6)
    assert found("depth", tmp_path) == (folder.name, 1)
    refusal("tile", tmp_path)
    text = (folder / "config.json").read_text("utf-8")
    promax = text.replace('"num_control_type": 6', '"num_control_type": 8')
    (folder / "config_promax.json").write_text(promax, "utf-8")
    refusal("tile", tmp_path)
    (folder / f"{WEIGHTS}_promax.safetensors").touch()
    assert found("tile", tmp_path) == (folder.name, 6)
    assert found("repaint", tmp_path) == (folder.name, 7)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *CONTROL_SPELLINGS.items(),
        ("controlnet-depth-sdxl-1.0", "depth"),
        ("xinsir-tile", "tile"),
        ("OpenPoseXL2", "pose"),
        ("controlnet_openposeXL", "pose"),
        ("SoftEdge", "softedge"),
        ("LineArt-anime", "lineart"),
        ("diffusers_xl_canny_full", "canny"),
    ],
)
def test_one_for_a_single_type_is_told_by_the_name_of_its_folder(
    name: str, kind: str, tmp_path: Path
) -> None:
    config(tmp_path / name)
    assert found(kind, tmp_path) == (name, None)


@pytest.mark.parametrize("name", ["mine", "versatile", "unnormalized", "washed"])
def test_a_name_that_tells_no_type_is_told_and_never_guessed(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config(tmp_path / name)
    for kind in CONTROL_TYPES:
        told = refusal(kind, tmp_path)
        assert told.startswith(f"controlnet[0].type: this worker has no ControlNet for {kind}; ")
        assert f"{name} tells no type: the name of its folder must have one in it" in told
    assert f"{name} tells no type" in caplog.text


def test_one_for_the_type_alone_goes_before_a_union_and_the_union_that_knows_more_first(
    tmp_path: Path,
) -> None:
    config(tmp_path / "a-union", num_control_type=6)
    config(tmp_path / "b-union", num_control_type=8)
    config(tmp_path / "my-canny")
    assert found("canny", tmp_path) == ("my-canny", None)
    assert found("pose", tmp_path) == ("b-union", 0)


def test_the_setting_may_name_one_of_them(tmp_path: Path) -> None:
    folder = config(tmp_path / "controlnet-canny")
    assert found("canny", folder) == (folder.name, None)


def test_what_makes_maps_is_none_of_them(tmp_path: Path) -> None:
    config(tmp_path / "preprocessors", num_control_type=8)
    config(tmp_path / "preprocessors" / "canny")
    config(tmp_path / "pose")
    assert refusal("canny", tmp_path) == (
        "controlnet[0].type: this worker has no ControlNet for canny; it has pose (CONTROLNET_DIR)"
    )


def test_without_the_setting_there_are_those_of_the_image_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert refusal("canny", None) == (
        "controlnet[0].type: this worker has no ControlNet; its owner has to set CONTROLNET_DIR "
        "to a folder of ControlNets"
    )
    config(tmp_path / "canny")
    monkeypatch.setattr(controlnets, "BAKED_CONTROLNET_DIR", tmp_path)
    assert found("canny", None) == ("canny", None)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"cross_attention_dim": 768}, "its cross_attention_dim is 768, and this model's 112"),
        (
            {"block_out_channels": [48, 64, 80, 80]},
            "its block_out_channels is [48, 64, 80, 80], and this model's [48, 64, 80]",
        ),
        ({"layers_per_block": 2}, "its layers_per_block is 2, and this model's 1"),
        ({"addition_embed_type": None}, "its addition_embed_type is None, and this model's text"),
        ({"in_channels": 9}, "it takes 9 channels of latents, not 4"),
    ],
)
def test_one_for_another_kind_of_model_is_refused_by_name(
    changes: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    config(tmp_path / "sd15-canny", **changes)
    config(tmp_path / "pose")
    told = refusal("canny", tmp_path)
    assert told.startswith("controlnet[0].type: this worker has no ControlNet for canny; it has ")
    assert f"sd15-canny is for another kind of model: {problem}" in told
    config(tmp_path / "union", num_control_type=6)
    assert found("canny", tmp_path) == ("union", 3), "one that fits is taken"


def test_of_stable_diffusion_1_5_the_configuration_s_defaults_tell_it(tmp_path: Path) -> None:
    folder = config(tmp_path / "canny")
    (folder / "config.json").write_text('{"_class_name": "ControlNetModel"}', "utf-8")
    assert "its cross_attention_dim is 1280, and this model's 112" in refusal("canny", tmp_path)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "canny/config.json cannot be read: "),
        ("[]", "canny/config.json is no JSON object"),
        ("{}", "canny is no ControlNet for SDXL: its config.json has no _class_name"),
        ('{"_class_name": "FluxControlNetModel"}', "canny is no ControlNet for SDXL: FluxControl"),
    ],
)
def test_a_configuration_that_is_none_is_told(text: str, problem: str, tmp_path: Path) -> None:
    folder = config(tmp_path / "canny")
    (folder / "config.json").write_text(text, "utf-8")
    told = refusal("canny", tmp_path)
    assert f"CONTROLNET_DIR has none that can be used; {problem}" in told
    assert str(tmp_path) not in told


def test_a_folder_that_went_away_is_told(tmp_path: Path) -> None:
    assert "the folder cannot be read (No such file or directory)" in refusal(
        "canny", tmp_path / "gone"
    )


def loaded(folder: Path, kind: Any = "canny", placement: Placement = CPU) -> Any:
    return find_controlnet(kind, folder, FIELD, models().unet.config).load(placement)


def equal(one: Any, other: Any) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[name].float(), theirs[name].float()) for name in ours
    )


@pytest.mark.parametrize("network", [union, single])
def test_it_is_loaded_as_by_diffusers(network: Any, tmp_path: Path) -> None:
    folder = write(network(), tmp_path / "canny")
    got = loaded(folder)
    assert type(got) is type(network())
    assert equal(got, network())
    assert not got.training
    size = find_controlnet("canny", folder, FIELD).size_bytes(torch.float32)
    assert size == sum(parameter.nbytes for parameter in got.parameters())


def test_several_files_that_belong_together_are_read_together(tmp_path: Path) -> None:
    folder = write(union(), tmp_path / "union", shard="500KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert equal(loaded(folder), union())


def test_the_fp16_variant_is_read_where_it_is_enough_and_other_versions_never(
    tmp_path: Path,
) -> None:
    folder = write(single(), tmp_path / "canny")
    half = {
        name: tensor.half() for name, tensor in load_file(folder / f"{WEIGHTS}.safetensors").items()
    }
    half["conv_in.bias"] += 1
    save_file(half, folder / f"{WEIGHTS}.fp16.safetensors")
    save_file({"x": torch.ones(1)}, folder / f"{WEIGHTS}_V2.safetensors")
    in_half = loaded(folder, placement=Placement(torch.device("cpu"), torch.float16, resident=True))
    assert torch.equal(in_half.conv_in.bias, half["conv_in.bias"])
    assert in_half.dtype == torch.float16
    assert equal(loaded(folder), single())
    (folder / f"{WEIGHTS}.safetensors").unlink()
    only = loaded(folder)
    assert only.dtype == torch.float32
    assert torch.equal(only.conv_in.bias, half["conv_in.bias"].float())


def test_of_xinsir_s_folder_the_second_network_is_loaded(tmp_path: Path) -> None:
    folder = write(union(6), tmp_path / "xinsir", _class_name="ControlNetModel")
    assert equal(loaded(folder), union(6))
    other = write(union(8), tmp_path / "other", _class_name="ControlNetModel")
    shutil.move(other / "config.json", folder / "config_promax.json")
    shutil.move(other / f"{WEIGHTS}.safetensors", folder / f"{WEIGHTS}_promax.safetensors")
    assert equal(loaded(folder, "tile"), union(8))


def test_it_is_read_straight_to_the_device_in_the_memory_order_of_the_unet(tmp_path: Path) -> None:
    folder = write(single(), tmp_path / "canny")
    on_device = loaded(folder, placement=Placement(torch.device("meta"), torch.float16, True))
    assert {parameter.device.type for parameter in on_device.parameters()} == {"meta"}
    assert on_device.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    in_turn = loaded(folder, placement=Placement(torch.device("meta"), torch.float16, False))
    assert {parameter.device.type for parameter in in_turn.parameters()} == {"cpu"}


def damaged(folder: Path, how: str) -> Path:
    """
    Args:
        how: it is damaged.
    """
    path = folder / f"{WEIGHTS}.safetensors"
    tensors = load_file(path)
    if how == "other config":
        whole = json.loads((folder / "config.json").read_text("utf-8"))
        changed = whole | {"conditioning_embedding_out_channels": [16, 16, 16, 16]}
        (folder / "config.json").write_text(json.dumps(changed), "utf-8")
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "no file":
        path.unlink()
    elif how == "pickle":
        path.rename(folder / f"{WEIGHTS}.bin")
    elif how == "tensor":
        del tensors["conv_in.weight"]
        save_file(tensors, path)
    elif how == "two versions":
        path.rename(folder / "one.safetensors")
        shutil.copy(folder / "one.safetensors", folder / "other.safetensors")
    return folder


@pytest.mark.parametrize(
    ("how", "problem"),
    [
        ("other config", "canny cannot be loaded: Error(s) in loading state_dict"),
        (
            "tensor",
            "canny cannot be loaded: Error(s) in loading state_dict for ControlNetModel: Mis",
        ),
        ("cut", f"{WEIGHTS}.safetensors cannot be read: "),
        ("no file", f"canny holds no file {WEIGHTS}.safetensors"),
        ("pickle", f"canny holds no file {WEIGHTS}.safetensors"),
        ("two versions", "canny holds more than one .safetensors file, none of them"),
    ],
)
def test_what_is_wrong_with_it_is_told_by_the_setting_and_its_folder(
    how: str, problem: str, tmp_path: Path
) -> None:
    folder = damaged(write(single(), tmp_path / "canny"), how)
    with pytest.raises(ModelError) as caught:
        loaded(folder)
    told = str(caught.value)
    assert told.startswith(f"CONTROLNET_DIR: {problem}")
    assert str(tmp_path) not in told
    assert len(told) < 400


class TestBesideTheModel:
    """As a job has it loaded."""

    @pytest.fixture(autouse=True)
    def _kept_by_nobody_else(self, monkeypatch: pytest.MonkeyPatch) -> None:
        models()
        monkeypatch.setattr(start_module, "_kept", ModelsKept(start_module.ModelMemory()))

    def test_it_is_loaded_once_and_told(self, tmp_path: Path) -> None:
        folder = write(union(), tmp_path / "union")
        files = [find_controlnet(kind, folder, FIELD) for kind in ("canny", "pose")]
        told: list[str] = []
        one, other = put_beside(models(), files, told.append)
        assert one is other
        assert put_beside(models(), files, told.append) == [one, one]
        assert told == ["the ControlNet union"]

    def test_one_that_cannot_be_loaded_fails_its_job_alone(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder = damaged(write(single(), tmp_path / "canny"), "cut")
        files = find_controlnet("canny", folder, FIELD)
        with pytest.raises(RequestError) as caught:
            put_beside(models(), [files], fields=[FIELD])
        assert str(caught.value) == (
            f"{FIELD}: the ControlNet canny cannot be loaded; the worker's owner should fetch it "
            "again"
        )
        assert "incomplete" in caplog.text or "cut off" in caplog.text, "the owner is told why"
        shutil.rmtree(folder)
        write(single(), folder)
        [network] = put_beside(models(), [files])
        assert equal(network, single())

    def test_what_its_owner_has_to_know_of_one_is_told_in_full(self, tmp_path: Path) -> None:
        files = find_controlnet(
            "canny", damaged(write(single(), tmp_path / "canny"), "no file"), FIELD
        )
        with pytest.raises(RequestError, match=rf"^{re.escape(FIELD)}: canny holds no file"):
            put_beside(models(), [files], fields=[FIELD])

    def test_too_little_memory_is_tried_again_without_recordings(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        files = find_controlnet("canny", write(single(), tmp_path / "canny"), FIELD)
        done: list[str] = []
        load = type(files).load

        def too_large_at_first(files: Any, placement: Placement) -> Any:
            done.append("load")
            if len(done) == 1:
                raise torch.OutOfMemoryError
            return load(files, placement)

        from sdxl_worker.speed import cuda_graphs

        monkeypatch.setattr(type(files), "load", too_large_at_first)
        monkeypatch.setattr(cuda_graphs, "forget_recordings", lambda _: done.append("forget"))
        put_beside(models(), [files])
        assert done == ["load", "forget", "load"]

    def test_one_that_does_not_come_from_the_host_to_the_card_has_room_made_anew(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        files = find_controlnet("canny", write(single(), tmp_path / "canny"), FIELD)
        put_beside(models(), [files])
        kept = start_module._kept
        kept._kept[files.key].on_card = False
        asked: list[int] = []

        def no_room(_: Any) -> None:
            raise torch.OutOfMemoryError

        monkeypatch.setattr(kept._memory, "to_card", no_room)
        fits_card = kept._memory.fits_card

        def noted(size_bytes: int) -> bool:
            asked.append(size_bytes)
            return fits_card(size_bytes)

        monkeypatch.setattr(kept._memory, "fits_card", noted)
        kept._kept["other"] = kept._kept[files.key]  # there is something that might have to go
        put_beside(models(), [files])
        size_bytes = files.size_bytes(models().dtype)
        assert kept._kept[files.key].size_bytes == size_bytes
        assert asked[-1] == size_bytes


@pytest.mark.parametrize("resident", [True, False])
def test_one_that_waits_on_the_host_is_on_the_device_only_for_its_passes(
    resident: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever model had it loaded: that one's networks may take turns, or not. No network can
    really go to the device that is taken for a GPU here; `test_visits` has those that can go."""
    told: list[tuple[str, Any]] = []

    class Told:
        def __init__(self, network: Any, device: torch.device) -> None:
            assert device.type == "meta"
            told.append(("comes", network))
            self.end = lambda: told.append(("leaves", network))

    monkeypatch.setattr(companions, "Visit", Told)
    placement = Placement(torch.device("meta"), torch.float32, resident)
    waiting, there = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1, device="meta")
    with at_work(waiting, placement), at_work(there, placement):
        assert told == [("comes", waiting)]
    assert told == [("comes", waiting), ("leaves", waiting)]
    with pytest.raises(ValueError, match="stopped"), at_work(waiting, placement):
        raise ValueError("stopped")
    assert told[-1] == ("leaves", waiting)
