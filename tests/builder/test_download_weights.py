"""Fetching the weights, from a hub on this machine that serves the embedded model."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load, load_file, save

from builder.download_weights import __main__ as program
from builder.download_weights import sources, transfer
from sdxl_worker.loading import model_dir as model_dir_module
from sdxl_worker.loading.model_dir import find_model_dir
from sdxl_worker.loading.models import Models, load_models
from sdxl_worker.request import parse_request
from sdxl_worker.settings import EMBEDDED_MODEL_DIR, Settings
from tests import inpainting_model
from tests.hub_server import COMMIT, Fault, Hub
from tests.support import REPOSITORY, draw
from tools import original_format

TABLE = sources.pinned()
JOB = {"prompt": "a red circle", "seed": 1, "num_inference_steps": 2, "refiner_inference_steps": 4}
UNET = "unet/diffusion_pytorch_model.fp16.safetensors"
# The last piece before a connection ends can be lost.
PIECE_BYTES = 2**16
CONV_IN = "model.diffusion_model.input_blocks.0.0.weight"
BASE_UNET = f"xl-base-1.0/{UNET}"


def embedded(folder: str) -> dict[str, bytes]:
    root = EMBEDDED_MODEL_DIR / folder
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file()
    }


def wide(content: bytes) -> bytes:
    """The same weights in fp32, as most repositories have them."""
    return save({name: tensor.float() for name, tensor in load(content).items()}, {"format": "pt"})


def without_fp16(files: dict[str, bytes]) -> dict[str, bytes]:
    return {
        name.replace(".fp16", ""): wide(content) if name.endswith(".safetensors") else content
        for name, content in files.items()
    }


def edit(repo: dict[str, bytes], name: str, **values: Any) -> None:
    repo[name] = json.dumps(json.loads(repo[name]) | values).encode()


def small_table(repos: dict[str, dict[str, bytes]]) -> dict[str, Any]:
    """The pinned table with the embedded model's sizes and digests."""
    models = {}
    for name, table in TABLE.items():
        files = repos[table["repo"]]
        entries = [
            {
                **entry,
                # What is not known of SDXL is not known here.
                "bytes": entry["bytes"] and len(files[entry["file"]]),
                "sha256": hashlib.sha256(files[entry["file"]]).hexdigest(),
            }
            for entry in table["files"]
        ]
        models[name] = {**table, "files": entries}
    return {"models": models}


@pytest.fixture(autouse=True)
def hub(local_hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    base = embedded("base")
    vae = {name.removeprefix("vae/"): base[name] for name in list(base) if name.startswith("vae/")}
    edit(vae, "config.json", force_upcast=False)  # as the published one has it
    local_hub.repos |= {
        "stabilityai/stable-diffusion-xl-base-1.0": base,
        "madebyollin/sdxl-vae-fp16-fix": without_fp16(vae),
        "stabilityai/stable-diffusion-xl-refiner-1.0": embedded("refiner"),
        "org/other": without_fp16(base),
    }
    table = tmp_path / "table.json"
    table.write_text(json.dumps(small_table(local_hub.repos)))
    monkeypatch.setattr(sources, "PINNED", table)
    return local_hub


@pytest.fixture
def to(tmp_path: Path) -> Path:
    return tmp_path / "sdxl"


def fetch(to: Path, *arguments: str) -> None:
    program.main(["--to", str(to), *arguments])


def failure(to: Path, *arguments: str) -> str:
    """The message of a run that must fail, and leave no model."""
    with pytest.raises(SystemExit) as caught:
        fetch(to, *arguments)
    assert not to.exists()
    message = caught.value.code
    assert isinstance(message, str)  # which Python prints, and exits with status 1
    assert "\n" not in message
    return message


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def model(folder: Path) -> Models:
    return load_models(find_model_dir(Settings(model_dir=folder)))


def picture(folder: Path, **job: Any) -> Image.Image:
    return draw(parse_request({**JOB, **job}), model(folder))[0]


# --- SDXL 1.0 ----------------------------------------------------------------------------------


def test_the_table_has_the_files_of_an_image_and_none_twice() -> None:
    tokenizers = [
        f"base/{folder}/{name}"
        for folder in ("tokenizer", "tokenizer_2")
        for name in ("merges.txt", "special_tokens_map.json", "tokenizer_config.json", "vocab.json")
    ]
    networks = {
        "base/text_encoder": "model.fp16.safetensors",
        "base/text_encoder_2": "model.fp16.safetensors",
        "base/unet": "diffusion_pytorch_model.fp16.safetensors",
        "base/vae": "diffusion_pytorch_model.safetensors",
        "refiner/unet": "diffusion_pytorch_model.fp16.safetensors",
    }
    entries = {
        f"{table['folder']}/{entry['file']}": entry
        for table in TABLE.values()
        for entry in table["files"]
    }
    assert sorted(entries) == sorted(
        ["base/model_index.json", "base/scheduler/scheduler_config.json", *tokenizers]
        + [f"{folder}/config.json" for folder in networks]
        + [f"{folder}/{name}" for folder, name in networks.items()]
    )
    for entry in entries.values():
        assert re.fullmatch("[0-9a-f]{64}", entry["sha256"])
    assert all(re.fullmatch("[0-9a-f]{40}", table["revision"]) for table in TABLE.values())
    # The two sizes that the hub is asked for: parameters times bytes, in the configurations' order.
    unknown = {name for name, entry in entries.items() if entry["bytes"] is None}
    assert unknown == {f"base/vae/{networks['base/vae']}", f"refiner/unet/{networks['base/unet']}"}
    known = sum(entry["bytes"] or 0 for entry in entries.values())
    stored = known + 83_653_863 * 2 + 2_259_526_660 * 2
    assert 11.4e9 < stored < 11.5e9


def test_the_default_is_a_model_that_draws_what_the_embedded_one_draws(to: Path) -> None:
    fetch(to)
    loaded = model(to)
    assert loaded.refiner_unet is not None
    [drawn] = draw(parse_request(JOB), loaded)
    assert drawn.tobytes() == picture(EMBEDDED_MODEL_DIR).tobytes()
    assert loaded.name == "stabilityai/stable-diffusion-xl-base-1.0"
    assert loaded.revision == "base 462165984030, vae 207b116dae70, refiner 5d4cfe854c9a"


def test_it_is_laid_out_in_fp16_with_nothing_beside(to: Path) -> None:
    fetch(to)
    expected = {name for name in files(EMBEDDED_MODEL_DIR) if name.startswith("base/")}
    refiner = {"refiner/unet/config.json", f"refiner/{UNET}"}
    assert files(to) == sorted(expected | refiner | {"source.json"})
    assert not to.with_name("sdxl.partial").exists()
    for path in to.rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}
        assert path.stat().st_mode & 0o777 == 0o644


def test_each_file_is_fetched_once_at_its_pinned_revision(hub: Hub, to: Path) -> None:
    fetch(to)
    fetched = [request for request in hub.seen if "/resolve/" in request.path]
    assert len(fetched) == len({request.path for request in fetched}) == 20
    revisions = {table["repo"]: table["revision"] for table in TABLE.values()}
    for request in fetched:
        owner, name, _, revision = request.path.split("/")[1:5]
        assert revision == revisions[f"{owner}/{name}"]


def test_a_complete_model_is_left_alone_without_asking_anyone(
    hub: Hub, to: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fetch(to)
    hub.seen.clear()
    fetch(to)
    assert not hub.seen
    assert "is complete already" in capsys.readouterr().out


def test_another_model_is_never_mixed_in(to: Path) -> None:
    fetch(to)
    with pytest.raises(SystemExit, match="holds another model, stabilityai/.*; remove it or name"):
        fetch(to, "--base", "org/other")
    shutil.rmtree(to)
    to.mkdir()
    (to / "notes.txt").touch()
    with pytest.raises(SystemExit, match="exists and was not made here"):
        fetch(to)


def test_an_empty_build_argument_is_the_default(to: Path) -> None:
    fetch(to, "--base", "", "--refiner", "")
    fetch(to)


def test_without_refiner_there_is_only_a_base(to: Path) -> None:
    fetch(to, "--refiner", "none")
    assert not (to / "refiner").exists()
    assert model(to).refiner_unet is None


# --- faults ------------------------------------------------------------------------------------


def test_a_dropped_connection_is_resumed_where_it_ended(hub: Hub, to: Path) -> None:
    size = len(hub.repos["stabilityai/stable-diffusion-xl-base-1.0"][UNET])
    hub.faults[BASE_UNET] = [Fault(drop_after=3_000_000), Fault(drop_after=1_500_000)]
    fetch(to)
    first, *others = hub.requests(BASE_UNET)
    assert "Range" not in first.headers
    assert len(others) == 2
    # What was in the client's buffer when the connection ended is asked for again.
    again = first.sent + sum(request.sent for request in others) - size
    assert 0 <= again <= 2 * PIECE_BYTES


def test_a_run_that_was_cut_off_is_resumed_by_the_next(hub: Hub, to: Path) -> None:
    size = len(hub.repos["stabilityai/stable-diffusion-xl-base-1.0"][UNET])
    hub.faults[BASE_UNET] = [Fault(drop_after=4_000_000), *[Fault(status=503)] * 3]
    assert "the server answers HTTP 503; the same command goes on" in failure(to)
    partial = to.with_name("sdxl.partial")
    there = (partial / "base" / f"{UNET}.incomplete").stat().st_size
    assert 4_000_000 - PIECE_BYTES <= there <= 4_000_000
    complete = {name for name in files(partial) if not name.endswith((".incomplete", "plan.json"))}
    hub.seen.clear()
    fetch(to)
    [rest] = hub.requests(BASE_UNET)
    assert rest.sent == size - there
    assert len([request for request in hub.seen if request.sent]) <= 20 - len(complete)


def test_what_another_model_left_unfinished_is_not_used(hub: Hub, to: Path) -> None:
    hub.faults["vocab.json"] = [Fault(status=404)]
    failure(to)
    fetch(to, "--base", "org/other", "--refiner", "none")
    assert "refiner/unet/config.json" not in files(to)
    assert picture(to, refiner_inference_steps=0).tobytes() == (
        picture(EMBEDDED_MODEL_DIR, refiner_inference_steps=0).tobytes()
    )


@pytest.mark.parametrize("path", [UNET, "vocab.json", f"/revision/{TABLE['vae']['revision']}"])
def test_a_server_that_fails_for_a_while_is_asked_again(path: str, hub: Hub, to: Path) -> None:
    hub.faults[path] = [Fault(status=503), Fault(status=429)]
    fetch(to)
    assert not hub.faults[path]


def test_wrong_bytes_are_removed_and_said_to_be(hub: Hub, to: Path) -> None:
    content = bytearray(hub.repos["stabilityai/stable-diffusion-xl-base-1.0"][UNET])
    content[-1] ^= 1
    hub.faults[f"xl-base-1.0/{UNET}"] = [Fault(content=bytes(content))]
    message = failure(to)
    assert UNET in message
    assert f"its SHA-256 is {hashlib.sha256(content).hexdigest()}, and should be" in message
    partial = to.with_name("sdxl.partial")
    assert not [name for name in files(partial) if name.startswith(f"base/{UNET}")]
    fetch(to)


def test_a_small_file_of_another_size_is_refused(hub: Hub, to: Path) -> None:
    hub.faults["merges.txt"] = [Fault(content=b"#version: 0.2\n")] * 4
    assert "it has 14 bytes, and should have" in failure(to)


def test_a_missing_file_is_named(hub: Hub, to: Path) -> None:
    del hub.repos["stabilityai/stable-diffusion-xl-base-1.0"]["tokenizer/vocab.json"]
    message = failure(to)
    assert "tokenizer/vocab.json: not found (HTTP 404)" in message


def test_no_network_is_one_readable_line(to: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    message = failure(to)
    assert "no answer (ConnectError" in message
    assert "Check the network; the same command goes on where this one ended" in message


def test_offline_mode_is_told(to: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set: unset it" in failure(to)


def test_a_full_disk_is_found_before_anything_is_fetched(
    hub: Hub, to: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # To come: what is fetched, with a VAE of 2.8 MB in fp32, and 1.4 MB for it in fp16.
    needed = sum(len(content) for content in embedded("base").values())
    needed += 2_841_452 - 1_420_726 + 2_841_452 // 2 + 2_283_464 + 1_788
    usage = SimpleNamespace(free=int(needed * 0.99))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert "0.0 GB are needed and 0.0 GB are free: make room, or name" in failure(to)
    assert not [request for request in hub.seen if "/resolve/" in request.path]
    usage.free = int(needed * 1.01)
    fetch(to)


def test_a_mount_point_is_refused_at_once() -> None:
    with pytest.raises(SystemExit, match="is a mount point"):
        fetch(Path("/"))


@pytest.mark.parametrize("status", [None, 403])
def test_a_gated_model_asks_for_a_token(
    status: int | None, hub: Hub, to: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.gated.add("org/other")
    arguments = ("--base", "org/other", "--refiner", "none")
    if status:
        hub.faults["/api/models/org/other"] = [Fault(status=status)]
    assert "set HF_TOKEN to a token that may read it" in failure(to, *arguments)
    monkeypatch.setenv("HF_TOKEN", "secret")
    fetch(to, *arguments)


def test_the_token_goes_to_the_hub_alone_and_is_never_printed(
    hub: Hub, to: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    hub.faults[UNET] = [Fault(status=503)]
    fetch(to)
    for request in hub.seen:
        sent = "Authorization" in request.headers or "authorization" in request.headers
        assert sent == ("/resolve/" in request.path or "/api/" in request.path), request.path
    output = "".join(capfd.readouterr())
    assert "secret" not in output
    assert "signature" not in output
    assert "HTTP 503; trying again" in output


def test_progress_in_a_log_is_whole_lines(
    to: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(transfer, "LOG_INTERVAL_SECONDS", 0.0)
    fetch(to)
    lines = capsys.readouterr().err.splitlines()
    assert lines
    assert all(re.match(r" *\d+%\|.*\| \S+/\S+ \[.*B/s\]$", line) for line in lines), lines
    assert lines[-1].startswith("100%")


# --- other models of the hub -------------------------------------------------------------------


def test_a_model_in_fp32_is_stored_as_fp16(hub: Hub, to: Path) -> None:
    fetch(to, "--base", "org/other@v1", "--refiner", "none")
    assert {path.name for path in to.rglob("*.safetensors")} == {
        "model.fp16.safetensors",
        "diffusion_pytorch_model.fp16.safetensors",
    }
    for path in to.rglob("*.safetensors"):
        ours = load_file(EMBEDDED_MODEL_DIR / path.relative_to(to))
        theirs = load_file(path)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    record = json.loads((to / "source.json").read_text())
    assert record["base"] == {"repo": "org/other", "revision": COMMIT}
    assert record["refiner"] is None
    loaded = model(to)
    assert (loaded.name, loaded.revision) == ("org/other", f"base {COMMIT[:12]}")
    # Its own VAE, and its commit, not its branch, which could move meanwhile.
    assert not [request for request in hub.seen if "fp16-fix" in request.path]
    assert {r.path.split("/")[4] for r in hub.seen if "/resolve/" in r.path} == {COMMIT}


def test_the_fp16_variant_is_taken_where_there_is_one(hub: Hub, to: Path) -> None:
    hub.repos["org/other"] |= embedded("base")
    fetch(to, "--base", "org/other", "--refiner", "none")
    assert len([r for r in hub.seen if r.path.endswith(".safetensors") and not r.sent]) == 4
    assert not [r for r in hub.seen if r.path.endswith("model.safetensors")]


@pytest.mark.parametrize("name", ["{stem}-{n:05}-of-00002", "{stem}.fp16-{n:05}-of-00002"])
def test_shards_become_one_file(name: str, hub: Hub, to: Path) -> None:
    repo = hub.repos["org/other"]
    tensors = load(repo.pop("unet/diffusion_pytorch_model.safetensors"))
    if "fp16" in name:
        tensors = {key: tensor.half() for key, tensor in tensors.items()}
    for n in (1, 2):
        shard = {key: tensors[key] for key in sorted(tensors)[n - 1 :: 2]}
        stem = name.format(stem="unet/diffusion_pytorch_model", n=n)
        repo[f"{stem}.safetensors"] = save(shard)
    fetch(to, "--base", "org/other", "--refiner", "none")
    [path] = (to / "base" / "unet").glob("*.safetensors")
    ours = load_file(EMBEDDED_MODEL_DIR / "base" / UNET)
    assert all(torch.equal(ours[key], tensor) for key, tensor in load_file(path).items())
    assert picture(to, refiner_inference_steps=0)


def test_a_missing_shard_is_told(hub: Hub, to: Path) -> None:
    repo = hub.repos["org/other"]
    name = "unet/diffusion_pytorch_model"
    repo[f"{name}-00002-of-00003.safetensors"] = repo.pop(f"{name}.safetensors")
    message = failure(to, "--base", "org/other")
    assert "org/other: unet/ has 1 of 3 shards" in message


def test_what_is_not_sdxl_is_refused_before_its_weights_are_fetched(hub: Hub, to: Path) -> None:
    repo = hub.repos["org/other"]
    arguments = ("--base", "org/other", "--refiner", "none")

    edit(repo, "unet/config.json", in_channels=8)
    message = failure(to, *arguments)
    assert "its UNet takes 8 channels; a base that can be served takes 4, or 9 if it" in message
    edit(repo, "model_index.json", text_encoder=[None, None])
    assert "it is a refiner, not a base" in failure(to, *arguments)
    edit(repo, "model_index.json", _class_name="StableDiffusionPipeline", text_encoder_2=None)
    assert "is a StableDiffusionPipeline, not an SDXL model" in failure(to, *arguments)
    del repo["model_index.json"]
    assert "model_index.json is missing, so it is no SDXL" in failure(to, *arguments)
    assert not [request for request in hub.seen if request.path.endswith(".safetensors")]


def test_a_model_for_inpainting_is_taken_as_a_base(hub: Hub, to: Path, tmp_path: Path) -> None:
    folder = inpainting_model.write(tmp_path / "inpainting")
    repo = {name: (folder / name).read_bytes() for name in files(folder)}
    hub.repos["diffusers/inpainting"] = repo
    fetch(to, "--base", "diffusers/inpainting", "--refiner", "none")
    assert model(to).unet.config["in_channels"] == 9
    alone = {"refiner_inference_steps": 0}
    assert picture(to, **alone).tobytes() == picture(folder, **alone).tobytes()
    hub.repos["org/refiner"] = embedded("refiner")
    edit(hub.repos["org/refiner"], "unet/config.json", in_channels=9)
    message = failure(to.with_name("other"), "--refiner", "org/refiner")
    assert "its UNet takes 9 channels; a refiner that can be served takes 4:" in message


def test_weights_as_pickles_are_refused(hub: Hub, to: Path) -> None:
    repo = hub.repos["org/other"]
    repo["vae/diffusion_pytorch_model.bin"] = repo.pop("vae/diffusion_pytorch_model.safetensors")
    message = failure(to, "--base", "org/other")
    assert message.endswith("vae/ has no .safetensors weights, the only kind taken")


def test_numbers_too_large_for_fp16_are_refused(hub: Hub, to: Path) -> None:
    repo = hub.repos["org/other"]
    name = "vae/diffusion_pytorch_model.safetensors"
    tensors = load(repo[name])
    tensors["decoder.conv_in.bias"][0] = 1e6
    repo[name] = save(tensors)
    message = failure(to, "--base", "org/other", "--refiner", "none")
    assert "decoder.conv_in.bias: has numbers too large for fp16" in message


def test_the_digest_that_the_hub_publishes_is_checked(hub: Hub, to: Path) -> None:
    content = bytearray(hub.repos["org/other"]["unet/diffusion_pytorch_model.safetensors"])
    content[-1] ^= 1
    hub.faults["other/unet/diffusion_pytorch_model.safetensors"] = [Fault(content=bytes(content))]
    assert "its SHA-256 is" in failure(to, "--base", "org/other")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/none", "not found, or access denied"),
        ("org/other@missing", "org/other@missing: there is no such revision"),
        ("other", "must be org/name or org/name@revision of the hub, or the path or address"),
        ("nowhere.safetensors", "there is no such file"),
    ],
)
def test_a_model_that_is_not_there_is_told(name: str, message: str, to: Path) -> None:
    assert message in failure(to, "--base", name)


def test_another_refiner_brings_its_options(hub: Hub, to: Path) -> None:
    hub.repos["org/refiner"] = without_fp16(embedded("refiner"))
    edit(hub.repos["org/refiner"], "model_index.json", force_zeros_for_empty_prompt=True)
    fetch(to, "--refiner", "org/refiner")
    loaded = model(to)
    assert loaded.refiner_unet is not None
    assert loaded.refiner_zeros_for_empty_prompt is True
    shutil.rmtree(to)
    assert "it is a base, not a refiner" in failure(to, "--refiner", "org/other")


# --- single-file checkpoints -------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "my model.safetensors"
    tensors = original_format.base_checkpoint(EMBEDDED_MODEL_DIR / "base", wide=True)
    return original_format.save(tensors, path)


def test_a_checkpoint_of_the_disk_draws_the_same(checkpoint: Path, hub: Hub, to: Path) -> None:
    fetch(to, "--base", str(checkpoint))
    loaded = model(to)
    [drawn] = draw(parse_request(JOB), loaded)
    assert drawn.tobytes() == picture(EMBEDDED_MODEL_DIR).tobytes()
    sha256 = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert loaded.name == "my model"
    assert loaded.revision == f"base {sha256[:12]}, refiner 5d4cfe854c9a"
    assert loaded.hash == sha256[:10]
    record = json.loads((to / "source.json").read_text())
    assert record["base"] == {"file": checkpoint.name, "sha256": sha256}
    for path in to.rglob("*.safetensors"):
        assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}
        assert path.stat().st_mode & 0o777 == 0o644
    # Its VAE may be the original one, whatever the pinned configuration says.
    assert json.loads((to / "base/vae/config.json").read_text())["force_upcast"] is True
    # Configurations and vocabularies are the pinned ones, and no weights come with them.
    fetched = [request.path for request in hub.seen if "xl-base" in request.path]
    assert all(TABLE["base"]["revision"] in path for path in fetched)
    assert not [path for path in fetched if path.endswith(".safetensors")]


def test_a_checkpoint_by_address_is_resumed_checked_and_its_secrets_kept(
    checkpoint: Path,
    hub: Hub,
    to: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    content = checkpoint.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    hub.repos["org/files"] = {"download": content}
    address = f"{hub.large_files}/org/files/download?token=hidden"
    arguments = ("--base", f"{address}#sha256={sha256}", "--refiner", "none")
    name = "/org/files/download"

    # The first request of each run is for the size.
    hub.faults[name] = [Fault(), Fault(drop_after=5_000_000)]
    wrong = failure(to, "--base", f"{address}#sha256={'0' * 64}", "--refiner", "none")
    assert f"its SHA-256 is {sha256}" in wrong
    _, first, second = hub.requests(name)
    assert 0 <= first.sent + second.sent - len(content) <= PIECE_BYTES

    hub.faults[name] = [Fault(), Fault(drop_after=5_000_000), *[Fault(status=500)] * 3]
    assert "HTTP 500" in failure(to, *arguments)
    fetch(to, *arguments)
    rest = hub.requests(name)[-1].sent
    assert 0 <= rest - (len(content) - 5_000_000) <= PIECE_BYTES

    base = [name for name in files(EMBEDDED_MODEL_DIR) if name.startswith("base/")]
    assert files(to) == [*base, "source.json"]
    printed = "".join(capfd.readouterr()) + (to / "source.json").read_text() + wrong
    assert "hidden" not in printed
    assert "secret" not in printed
    for request in hub.requests(name):
        assert "authorization" not in {header.lower() for header in request.headers}


def test_halves_of_two_checkpoints_are_never_put_together(
    checkpoint: Path, hub: Hub, to: Path
) -> None:
    content = checkpoint.read_bytes()
    hub.repos["org/files"] = {"download": content}
    arguments = ("--base", f"{hub.large_files}/org/files/download", "--refiner", "none")
    hub.faults["download"] = [Fault(), Fault(drop_after=5_000_000), *[Fault(status=500)] * 3]
    failure(to, *arguments)
    hub.repos["org/files"]["download"] = content[:-4] + bytes(4)  # another, of the same size
    fetch(to, *arguments)
    assert hub.requests("download")[-1].sent == len(content)


def test_an_address_that_gives_no_checkpoint_is_refused(hub: Hub, to: Path) -> None:
    hub.files["/login"] = b"<html>Please log in</html>"
    message = failure(to, "--base", f"{hub.endpoint}/login?a=b")
    assert message.endswith("is no safetensors file (a page to log in, perhaps, or a pickle)")


def test_a_refiner_can_be_a_checkpoint(to: Path, tmp_path: Path) -> None:
    tensors = original_format.refiner_checkpoint(EMBEDDED_MODEL_DIR)
    path = original_format.save(tensors, tmp_path / "refiner.safetensors")
    fetch(to, "--refiner", str(path))
    assert picture(to).tobytes() == picture(EMBEDDED_MODEL_DIR).tobytes()


def test_a_checkpoint_for_inpainting_becomes_what_its_folders_are(
    checkpoint: Path, to: Path, tmp_path: Path
) -> None:
    tensors = load_file(checkpoint)
    tensors[CONV_IN] = inpainting_model.widened(tensors[CONV_IN])
    path = original_format.save(tensors, tmp_path / "inpainting.safetensors")
    fetch(to, "--base", str(path), "--refiner", "none")
    assert json.loads((to / "base/unet/config.json").read_text())["in_channels"] == 9
    folder = inpainting_model.write(tmp_path / "folders")
    alone = {"refiner_inference_steps": 0}
    assert picture(to, **alone).tobytes() == picture(folder, **alone).tobytes()


def test_a_checkpoint_for_v_prediction_is_drawn_with_as_one(
    checkpoint: Path, to: Path, tmp_path: Path
) -> None:
    marks = {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}
    path = original_format.save({**load_file(checkpoint), **marks}, tmp_path / "v.safetensors")
    fetch(to, "--base", str(path), "--refiner", "none")
    as_file = load_models(find_model_dir(Settings(model_dir=path)))
    assert model(to).kind == as_file.kind == "v-prediction, zero terminal SNR"
    alone = {"refiner_inference_steps": 0}
    [expected] = draw(parse_request({**JOB, **alone}), as_file)
    assert picture(to, **alone).tobytes() == expected.tobytes()


def test_configurations_alone_serve_a_single_file(
    checkpoint: Path, hub: Hub, to: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch(to, "--configs")
    assert not list(to.rglob("*.safetensors"))
    assert not [request.path for request in hub.seen if request.path.endswith(".safetensors")]
    assert not (to / "refiner").exists()
    fetch(to, "--configs")  # complete already
    with pytest.raises(SystemExit, match="holds another model"):
        fetch(to)
    with pytest.raises(SystemExit):
        fetch(to, "--configs", "--base", "org/other")
    monkeypatch.setattr(model_dir_module, "CONFIGS_DIR", to)
    monkeypatch.setattr(model_dir_module, "EMBEDDED_MODEL_DIR", Path("/nowhere"))
    found = find_model_dir(Settings(model_dir=checkpoint))
    assert found.base == to / "base"
    [drawn] = draw(parse_request({**JOB, "refiner_inference_steps": 0}), load_models(found))
    alone = picture(EMBEDDED_MODEL_DIR, refiner_inference_steps=0)
    assert drawn.tobytes() == alone.tobytes()


def test_what_cannot_be_converted_is_told(checkpoint: Path, to: Path) -> None:
    path = to.with_name("checkpoint.safetensors")
    arguments = ("--base", str(path), "--refiner", "none")
    tensors = load_file(checkpoint)

    def refusal(change: Mapping[str, torch.Tensor | None]) -> str:
        changed = {**tensors, **change}
        kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
        original_format.save(kept, path)
        return failure(to, *arguments)

    encoder_2 = {name: None for name in tensors if name.startswith("conditioner.embedders.1.")}
    assert "is no single-file SDXL base: it has no tensors conditioner" in refusal(encoder_2)
    assert "takes 8 channels; a base that can be served" in refusal(
        {CONV_IN: torch.zeros(48, 8, 3, 3)}
    )
    for mark in ("edm_mean", "edm_vpred.sigma_max"):
        assert "trained for EDM sampling, and cannot be converted" in refusal(
            {mark: torch.zeros(1)}
        )
    one = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    for name in (one, "conditioner.embedders.1.model.ln_final.bias"):
        assert "lacks tensors that an SDXL base has" in refusal({name: None})
    assert "cannot be converted" in refusal({one: torch.zeros(1, 1, 3, 3)})
    path.write_bytes(checkpoint.read_bytes()[:-1])
    assert "is cut off or damaged" in failure(to, *arguments)
    path.write_bytes(b"PK\x03\x04 a pickle inside")
    assert "is no safetensors file" in failure(to, *arguments)
    pickle = path.rename(path.with_suffix(".ckpt"))
    message = failure(to, "--base", str(pickle))
    assert "is a pickle, which can run any code when it is read" in message


def test_a_digest_that_is_none_is_refused(checkpoint: Path, to: Path) -> None:
    assert "after # must be sha256=" in failure(to, "--base", f"{checkpoint}#sha256=12")
    assert "is not the one after the #" in failure(to, "--base", f"{checkpoint}#sha256={'0' * 64}")


# --- as a process ------------------------------------------------------------------------------


def process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "builder.download_weights", *arguments],
        cwd=REPOSITORY,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_needs_neither_torch_nor_diffusers() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'diffusers', 'transformers', 'safetensors', 'sdxl_worker'):\n"
        "    sys.modules[name] = None\n"
        "from builder.download_weights.__main__ import main\n"
        "main(['--help'])\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        env=os.environ | {"COLUMNS": "400"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "stabilityai/stable-diffusion-xl-base-1.0, pinned" in run.stdout


def test_a_failure_is_one_line_and_an_exit_status(hub: Hub, to: Path) -> None:
    run = process("--to", str(to), "--base", "org/none", HF_ENDPOINT=hub.endpoint)
    assert run.returncode == 1
    [line] = run.stderr.splitlines()
    assert line.startswith("The weights cannot be fetched. org/none: not found, or access denied")


def test_progress_is_told_while_files_are_being_completed(tmp_path: Path) -> None:
    """At any moment a file is where it comes in or where it belongs."""
    files = [
        transfer.Download(f"https://example.com/{i}", f"{i}", 3, None, stored_as=f"{i}")
        for i in range(2000)
    ]
    for file in files:
        (tmp_path / f"{file.path}.incomplete").write_bytes(b"abc")

    def complete() -> None:
        for file in files:
            (tmp_path / f"{file.path}.incomplete").rename(tmp_path / file.path)

    thread = threading.Thread(target=complete)
    thread.start()
    while thread.is_alive():
        assert sum(file.bytes_in(tmp_path) for file in files) == 3 * len(files)
    thread.join()
