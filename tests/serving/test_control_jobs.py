"""Jobs with control pictures: where these come from, what becomes of them, what is told of them."""

import asyncio
import base64
import io
import json
import logging
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

import handler
from sdxl_worker.inputs.control_maps import canny_map
from sdxl_worker.outputs import size_guard
from sdxl_worker.serving import beside, fetching, preparing
from tests.inputs.onnx_files import SIDE_PX, write_detector, write_pose_network
from tests.loading.transformers_networks import save_depth_network
from tests.random_ip_adapters import (
    ENCODER,
    PLAIN,
    PLUS,
    make_encoder,
    plain_adapter,
    plus_adapter,
)
from tests.s3_server import ACCESS_KEY_ID, SECRET_ACCESS_KEY, S3Server
from tests.support import (
    PROMPT,
    data_uri,
    decoded,
    error,
    models,
    noise_picture,
    replace_generate,
    run,
)
from tests.support import picture as picture_of

QUICK: dict[str, Any] = {
    "prompt": PROMPT,
    "seed": 1,
    "num_inference_steps": 2,
    "refiner_inference_steps": 0,
    "height": 64,
    "width": 72,
}
SIZE = (72, 64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ControlNet with random weights for all types that have preprocessing, and what that
    needs."""
    folder = tmp_path_factory.mktemp("controlnets")
    torch.manual_seed(0)
    network = ControlNetModel.from_unet(models().unet)
    with torch.no_grad():
        zeros = [*network.controlnet_down_blocks, network.controlnet_mid_block]
        for block in [*zeros, network.controlnet_cond_embedding.conv_out]:
            block.weight.normal_(std=0.05)
    network.save_pretrained(folder / "own-canny-depth-pose-tile-repaint")
    save_depth_network(folder / "preprocessors" / "depth")
    (folder / "preprocessors" / "pose").mkdir()
    write_detector(folder / "preprocessors" / "pose" / "yolox.onnx", [(0, 0, SIDE_PX, SIDE_PX)])
    write_pose_network(folder / "preprocessors" / "pose" / "rtmpose.onnx", [(24, 32)] * 17)
    return folder


@pytest.fixture(autouse=True)
def _controlnet_dir(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONTROLNET_DIR", str(folder))


def shape(size: tuple[int, int] = SIZE) -> Image.Image:
    picture = Image.new("RGB", size, "navy")
    ImageDraw.Draw(picture).ellipse((10, 10, size[0] - 20, size[1] - 15), fill="yellow")
    return picture


def entry(kind: str = "canny", picture: Image.Image | None = None, **fields: Any) -> dict[str, Any]:
    return {"type": kind, "image_url": data_uri(picture or shape()), **fields}


def maps_of(*entries: dict[str, Any], **fields: Any) -> list[Image.Image]:
    output = run({**QUICK, "controlnet": list(entries), "return_maps": True, **fields})
    assert "error" not in output, output["error"]
    return [decoded(uri) for uri in output["maps"]]


def drawn(**fields: Any) -> bytes:
    """The pixels alone: the file tells of the request."""
    return picture_of(**QUICK, **fields).tobytes()


def test_the_map_that_is_drawn_with_is_sent_back_where_it_is_asked_for() -> None:
    [edges] = maps_of(entry())
    assert edges.tobytes() == canny_map(shape()).tobytes()
    assert "maps" not in run({**QUICK, "controlnet": [entry()]})


def test_a_picture_is_preprocessed_into_what_a_finished_map_would_be() -> None:
    edges = canny_map(shape())
    made = drawn(controlnet=[entry()])
    assert made == drawn(controlnet=[entry(picture=edges, preprocess=False)])
    assert made != drawn()


def test_each_type_has_its_map_in_the_order_of_the_request() -> None:
    entries = [entry("tile"), entry("depth"), entry("pose")]
    tile, depth, pose = maps_of(*entries)
    assert tile.tobytes() == shape().tobytes()
    levels = np.asarray(depth)
    assert (levels.min(), levels.max()) == (0, 255)
    assert (levels == levels[..., :1]).all(), "depth is grey"
    assert {size.size for size in (tile, depth, pose)} == {SIZE}
    assert pose.getpixel((0, 0)) == (0, 0, 0)
    assert pose.getbbox() is not None


def test_a_finished_map_is_sent_back_as_it_was_fitted() -> None:
    [fitted] = maps_of(entry(picture=noise_picture(*SIZE), preprocess=False))
    assert fitted.tobytes() == noise_picture(*SIZE).tobytes()
    [cut] = maps_of(entry(picture=Image.new("RGB", (300, 100), "red"), preprocess=False))
    assert cut.size == SIZE


def test_depth_reaches_the_network_as_a_map() -> None:
    [depth] = maps_of(entry("depth"))
    made = drawn(controlnet=[entry("depth")])
    assert made == drawn(controlnet=[entry("depth", depth, preprocess=False)])
    assert made != drawn(controlnet=[entry("tile")])


def test_a_map_of_scale_0_changes_nothing_and_is_sent_back_all_the_same() -> None:
    output = run({**QUICK, "controlnet": [entry("depth", scale=0)], "return_maps": True})
    assert decoded(output["images"][0]).tobytes() == drawn()
    assert len(decoded(output["maps"][0]).getcolors(64 * 72) or ()) > 2


@pytest.mark.parametrize("padding", [None, 8])
def test_in_a_picture_that_is_repainted_maps_lie_where_it_is_drawn(padding: int | None) -> None:
    picture = noise_picture(*SIZE).point(lambda level: max(1, level))
    mask = Image.new("L", SIZE)
    ImageDraw.Draw(mask).rectangle((8, 8, 39, 39), fill="white")
    fields = {"image_url": data_uri(picture), "mask_url": data_uri(mask), "mask_padding": padding}
    repaint, tile = maps_of(entry("repaint", picture), entry("tile", picture), **fields)
    native = models().native_size_px
    assert repaint.size == tile.size == (SIZE if padding is None else (native, native))
    black = (np.asarray(repaint) == 0).all(axis=2)
    assert np.array_equal(np.asarray(repaint)[~black], np.asarray(tile)[~black])
    if padding is None:
        assert np.array_equal(black, np.asarray(mask) > 0)
    else:
        assert black[native // 2, native // 2]


def test_repaint_without_a_mask_is_refused_before_anything_is_fetched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fetching, "fetch", lambda *_: pytest.fail("fetched"))
    message = error({**QUICK, "controlnet": [entry(), entry("repaint")]})
    assert message.startswith("controlnet[1].type: repaint needs a mask: mask_url")


@pytest.mark.parametrize("kind", ["depth", "pose"])
def test_what_is_not_set_up_is_refused_before_anything_is_fetched(
    kind: str, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = "own-canny-depth-pose-tile-repaint"
    (tmp_path / network).symlink_to(folder / network)
    monkeypatch.setenv("CONTROLNET_DIR", str(tmp_path))
    with monkeypatch.context() as without:
        without.setattr(fetching, "fetch", lambda *_: pytest.fail("fetched"))
        message = error({**QUICK, "controlnet": [entry(), entry(kind)]})
    assert message.startswith(f"controlnet[1].type: preprocessing for {kind} is not set up")
    assert "images" in run({**QUICK, "controlnet": [entry(kind, preprocess=False)]})


def damaged(path: Path) -> None:
    """Its last bytes are gone, as after a download that was cut off."""
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("kind", "file", "title"),
    [
        ("canny", "a-canny/diffusion_pytorch_model.safetensors", "the ControlNet a-canny"),
        ("depth", "preprocessors/depth/model.safetensors", "the depth preprocessor"),
    ],
)
def test_what_cannot_be_loaded_is_told_by_the_field_that_asks_for_it(
    kind: str,
    file: str,
    title: str,
    tmp_path: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """And without the words of a library, which are for the log."""
    shutil.copytree(folder, tmp_path / "controlnets")
    [network] = (tmp_path / "controlnets").glob("own-*")
    shutil.copytree(network, tmp_path / "controlnets" / "a-canny")
    network.rename(network.with_name("own-depth-tile"))
    damaged(tmp_path / "controlnets" / file)
    monkeypatch.setenv("CONTROLNET_DIR", str(tmp_path / "controlnets"))
    message = error({**QUICK, "controlnet": [entry("tile"), entry(kind)]})
    assert message == (
        f"controlnet[1].type: {title} cannot be loaded; the worker's owner should fetch it again"
    )
    assert f"{title} cannot be loaded: CONTROLNET_DIR: " in caplog.text


def test_so_is_a_pose_network_that_is_none(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder, tmp_path / "controlnets")
    (tmp_path / "controlnets" / "preprocessors" / "pose" / "yolox.onnx").write_bytes(b"<html>")
    monkeypatch.setenv("CONTROLNET_DIR", str(tmp_path / "controlnets"))
    message = error({**QUICK, "controlnet": [entry("tile"), entry("pose")]})
    assert message.startswith("controlnet[1].type: yolox.onnx of preprocessors/pose is no ONNX")


@pytest.mark.parametrize(
    ("file", "title"),
    [
        (PLAIN, "the IP-Adapter ip-adapter_sdxl_vit-h"),
        (f"{ENCODER}/model.safetensors", "the image encoder models/image_encoder"),
    ],
)
def test_so_is_an_ip_adapter_and_its_encoder(
    file: str, title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sdxl_models").mkdir()
    save_file(plain_adapter(models().unet), tmp_path / PLAIN)
    save_file(plus_adapter(models().unet), tmp_path / PLUS)
    make_encoder(tmp_path / ENCODER)
    monkeypatch.setenv("IP_ADAPTER_DIR", str(tmp_path))
    one = {"image_url": data_uri(shape())}
    prompts = [{**one, "scale": 0}, {**one, "type": "plain"}]
    find_beside = beside.find_beside

    def broken_then(*of: Any) -> Any:
        found = find_beside(*of)
        tensors = load_file(tmp_path / file)
        tensors.pop(sorted(tensors)[0])
        save_file(tensors, tmp_path / file)
        return found

    monkeypatch.setattr(preparing, "find_beside", broken_then)
    assert error({**QUICK, "ip_adapter": prompts}) == (
        f"ip_adapter[1].type: {title} cannot be loaded; the worker's owner should fetch it again"
    )


def test_a_picture_of_which_no_map_can_be_made_is_told_of() -> None:
    """The drawing goes on, steered by a map that is all black."""
    flat = Image.new("RGB", SIZE, "white")
    clear, flat_tile = entry(), entry("tile", flat)
    output = run({**QUICK, "controlnet": [clear, entry(picture=flat), flat_tile]})
    assert output["warning"] == (
        "controlnet[1]: no edges were found in the picture; send one with clearer outlines, or a "
        "finished map with preprocess false; controlnet[2]: the map that was made of the picture "
        "is of one colour; send another picture, or a finished map with preprocess false"
    )
    for quiet in ({"preprocess": False}, {"scale": 0}):
        assert "warning" not in run({**QUICK, "controlnet": [clear, entry(picture=flat, **quiet)]})


def test_the_folders_are_looked_into_beside_the_event_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They may be on a network volume, which may take its time."""
    found: list[threading.Thread] = []
    find_controlnet = beside.find_controlnet

    def noted(*of: Any) -> Any:
        found.append(threading.current_thread())
        return find_controlnet(*of)

    monkeypatch.setattr(beside, "find_controlnet", noted)
    maps_of(entry())
    assert found
    assert threading.main_thread() not in found


def test_what_cannot_be_fetched_or_decoded_is_told_by_its_place() -> None:
    wrong = entry() | {"image_url": "http://127.0.0.1:9/secret.png"}
    message = error({**QUICK, "controlnet": [entry(), wrong]})
    assert message.startswith("controlnet[1].image_url: ")
    assert "public" in message
    assert "secret" not in message
    wrong = entry() | {"image_url": "data:image/png;base64,aGVsbG8="}
    message = error({**QUICK, "controlnet": [wrong]})
    assert message.startswith("controlnet[0].image_url: not a picture")


def test_what_several_entries_name_is_fetched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[str] = []

    async def picture(_: str, field: str) -> bytes:
        fetched.append(field)
        buffer = io.BytesIO()
        shape().save(buffer, "PNG")
        return buffer.getvalue()

    monkeypatch.setattr(fetching, "fetch", picture)
    addresses = ["https://example.com/a", "https://example.com/b", "https://example.com/a"]
    entries = [entry("tile") | {"image_url": address} for address in addresses]
    maps = maps_of(*entries)
    assert sorted(fetched) == ["controlnet[0].image_url", "controlnet[1].image_url"]
    assert [one.tobytes() for one in maps] == [shape().tobytes()] * 3


def test_no_more_than_two_files_are_in_memory_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each may be of 50 MB, and several jobs may be at it."""
    there: list[int] = []
    most: list[int] = []

    class File(bytes):
        def __del__(self) -> None:
            there.pop()

    async def picture(*_: str) -> bytes:
        file = File(base64.b64decode(data_uri(shape()).partition(",")[2]))
        there.append(1)
        most.append(len(there))
        return file

    monkeypatch.setattr(fetching, "fetch", picture)
    entries = [entry("tile") | {"image_url": f"https://example.com/{i}"} for i in range(3)]
    maps_of(*entries)
    assert most == [1, 2, 1]


def test_where_the_memory_does_not_do_leaving_the_networks_out_is_advised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA oom")

    replace_generate(monkeypatch, fail)
    message = error({**QUICK, "controlnet": [entry("tile")]})
    assert message.endswith("(num_images, height, width), or leave out controlnet")
    assert error(QUICK).endswith("(num_images, height, width)")
    fields = {"prompt": PROMPT, "size": "64x64", "controlnet": [entry("tile")]}
    job_input = {"openai_route": "/v1/images/generations", "openai_input": fields}
    output = asyncio.run(handler.handler({"id": "test", "input": job_input}))
    assert output["error"].endswith(", or leave out controlnet")


def test_addresses_and_prompts_stay_out_of_logs_and_files(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)

    async def picture(*_: str) -> bytes:
        return base64.b64decode(data_uri(shape()).partition(",")[2])

    monkeypatch.setattr(fetching, "fetch", picture)
    secret = entry() | {"image_url": "https://example.com/a.png?signature=hush"}
    output = run({**QUICK, "controlnet": [secret, entry("tile")]})
    assert "hush" not in caplog.text
    assert PROMPT not in caplog.text
    assert "base64" not in caplog.text
    file = Image.open(io.BytesIO(base64.b64decode(output["images"][0].partition(",")[2])))
    told = json.loads(file.info["request"])["controlnet"]
    assert [one["image_url"] for one in told] == [
        "https://example.com/a.png",
        "data:image/png;base64",
    ]


def test_maps_count_for_the_size_of_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNPOD_WEBHOOK_GET_JOB", "http://127.0.0.1:9/job-take/$ID?gpu=TEST")
    # Noise, which PNG makes no smaller.
    asked = {**QUICK, "controlnet": [entry("tile", noise_picture(*SIZE))]}
    plain, whole = run(asked), run({**asked, "return_maps": True})
    sizes = [len(json.dumps({"output": output})) for output in (plain, whole)]
    monkeypatch.setattr(size_guard, "RUN_LIMIT_BYTES", sizes[1] + 100)
    assert run({**asked, "return_maps": True}) == whole
    monkeypatch.setattr(size_guard, "RUN_LIMIT_BYTES", sizes[0] + 1000)
    assert run(asked) == plain
    message = error({**asked, "return_maps": True})
    assert message.startswith("the result is ")
    assert "; return_maps false, by 0.0 MB" in message


def test_beside_links_maps_are_in_the_answer_or_left_out_with_a_word(
    s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUCKET_ENDPOINT_URL", s3.url)
    monkeypatch.setenv("BUCKET_NAME", "pics")
    monkeypatch.setenv("BUCKET_ACCESS_KEY_ID", ACCESS_KEY_ID)
    monkeypatch.setenv("BUCKET_SECRET_ACCESS_KEY", SECRET_ACCESS_KEY)
    asked = {**QUICK, "controlnet": [entry()], "return_maps": True}
    output = run(asked)
    assert output["images"][0].startswith("http")
    assert decoded(output["maps"][0]).tobytes() == canny_map(shape()).tobytes()
    monkeypatch.setenv("RUNPOD_WEBHOOK_GET_JOB", "http://127.0.0.1:9/job-take/$ID?gpu=TEST")
    monkeypatch.setattr(size_guard, "RUN_LIMIT_BYTES", 2000)
    output = run(asked)
    assert "maps" not in output
    assert output["warning"].startswith("maps: ")
    assert output["images"][0].startswith("http")


def test_openai_s_answers_hold_maps_too() -> None:
    fields = {
        **{name: QUICK[name] for name in ("prompt", "num_inference_steps")},
        **{"size": "72x64", "quality": "low", "controlnet": [entry()], "return_maps": True},
    }
    job_input = {"openai_route": "/v1/images/generations", "openai_input": fields}
    output = asyncio.run(handler.handler({"id": "test", "input": job_input}))
    assert decoded(output["maps"][0]).tobytes() == canny_map(shape()).tobytes()


def test_after_such_a_job_the_plain_request_gives_the_same_bytes() -> None:
    before = run(QUICK)
    maps_of(entry(), entry("depth"))
    error(
        {
            **QUICK,
            "controlnet": [
                entry("pose", Image.new("RGB", (64, 64))),
                entry() | {"image_url": "data:image/png;base64,aGVsbG8="},
            ],
        }
    )
    assert run(QUICK) == before
