"""Fetching what stands beside a model, from a hub on this machine that serves miniatures."""

import hashlib
import inspect
import io
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, ControlNetUnionModel, UNet2DConditionModel
from safetensors.torch import load, load_file, save

from builder.download_weights import __main__ as program
from builder.download_weights import extras
from sdxl_worker.settings import EMBEDDED_MODEL_DIR
from tests.hub_server import COMMIT, Fault, Hub
from tests.support import REPOSITORY
from tests.test_dockerfile import stages

TABLE = extras.pinned()
UNION = TABLE["controlnet"]["union"]
DEPTH = TABLE["preprocessor"]["depth"]
POSE = TABLE["preprocessor"]["pose"]
IP_ADAPTER = TABLE["ip-adapter"]["vit-h"]
CHECKER = TABLE["safety-checker"]["falconsai"]
ENTRIES = [entry for kind in TABLE.values() for entry in kind.values()]
WEIGHTS = "diffusion_pytorch_model.safetensors"
# The last piece before a connection ends can be lost.
PIECE_BYTES = 2**16


def wide(content: bytes) -> bytes:
    return save({name: tensor.float() for name, tensor in load(content).items()}, {"format": "pt"})


def network(config: dict[str, Any], seed: int, size: int = 200) -> dict[str, bytes]:
    """A repository of one network in fp32: what the program does not look into is made up."""
    tensors = {"weight": torch.randn(size, size, generator=torch.Generator().manual_seed(seed))}
    return {"config.json": json.dumps(config).encode(), "model.safetensors": save(tensors)}


def archive(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as opened:
        for name in ("20230831/detail.json", *names):
            opened.writestr(name, f"bytes of {name}")
    return file.getvalue()


def saved(model: Any, folder: Path) -> dict[str, bytes]:
    model.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def controlnets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """A single ControlNet and two unions for the miniature model, in fp32."""
    folder = tmp_path_factory.mktemp("controlnets")
    unet = UNet2DConditionModel.from_pretrained(EMBEDDED_MODEL_DIR / "base/unet", variant="fp16")
    options = {"conditioning_embedding_out_channels": (8, 16)}
    single = ControlNetModel.from_unet(unet.float(), **options)
    taken = inspect.signature(ControlNetUnionModel).parameters
    shared = {name: value for name, value in single.config.items() if name in taken}
    unions = {
        types: ControlNetUnionModel(
            **shared, num_control_type=types, num_trans_channel=48, num_trans_head=4
        )
        for types in (6, 8)
    }
    return {
        "single": saved(single, folder / "single"),
        "plain": saved(unions[6], folder / "plain"),
        "promax": saved(unions[8], folder / "promax"),
    }


@pytest.fixture(autouse=True)
def hub(
    local_hub: Hub,
    controlnets: dict[str, dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Hub:
    plain, promax = controlnets["plain"], controlnets["promax"]
    encoder = network({"architectures": ["CLIPVisionModelWithProjection"]}, 5)
    local_hub.repos |= {
        UNION["repo"]: {
            **plain,
            "config_promax.json": promax["config.json"],
            "diffusion_pytorch_model_promax.safetensors": promax[WEIGHTS],
        },
        DEPTH["repo"]: {
            **network({"architectures": ["DepthAnythingForDepthEstimation"]}, 1, 1500),
            "preprocessor_config.json": b"{}",
            "README.md": b"",
        },
        POSE["repo"]: {
            entry["file"]: archive(f"20230831/{Path(entry['file']).stem}/end2end.onnx")
            for entry in POSE["files"]
        },
        IP_ADAPTER["repo"]: {
            **{
                entry["file"]: wide(network({}, 2)["model.safetensors"])
                for entry in IP_ADAPTER["files"]
                if entry["file"].startswith("sdxl_models")
            },
            "sdxl_models/ip-adapter_sdxl.safetensors": b"of another encoder",
            **{f"models/image_encoder/{name}": content for name, content in encoder.items()},
        },
        CHECKER["repo"]: {
            **network({"architectures": ["ViTForImageClassification"]}, 3),
            "preprocessor_config.json": b"{}",
            "pytorch_model.bin": b"a pickle",
        },
        "org/canny-sdxl": controlnets["single"],
    }
    table = tmp_path / "extras.json"
    table.write_text(json.dumps({"extras": small_table(local_hub.repos)}))
    monkeypatch.setattr(extras, "PINNED", table)
    return local_hub


def small_table(repos: dict[str, dict[str, bytes]]) -> dict[str, Any]:
    """The pinned table with the miniatures' sizes and digests."""
    small = json.loads(json.dumps(TABLE))
    for kind in small.values():
        for entry in kind.values():
            for file in entry["files"]:
                content = repos[entry["repo"]][file["file"]]
                # What no list has of the real one is not known here.
                file["bytes"] = file["bytes"] and len(content)
                file["sha256"] = file["sha256"] and hashlib.sha256(content).hexdigest()
    return small


def fetch(to: Path, **asked: str) -> None:
    options = {f"--{kind.replace('_', '-')}": names for kind, names in asked.items()}
    program.main(["--to", str(to), *(word for pair in options.items() for word in pair)])


def failure(to: Path, **asked: str) -> str:
    with pytest.raises(SystemExit) as caught:
        fetch(to, **asked)
    message = caught.value.code
    assert isinstance(message, str)  # which Python prints, and exits with status 1
    assert "\n" not in message
    return message


def files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def resolved(hub: Hub) -> list[str]:
    return [request.path for request in hub.seen if "/resolve/" in request.path]


# --- the table ---------------------------------------------------------------------------------


def test_all_that_is_pinned_is_free_for_every_use_and_holds_no_pickle() -> None:
    assert {entry["licence"] for entry in ENTRIES} == {"Apache-2.0"}
    for entry in ENTRIES:
        assert re.fullmatch("[0-9a-f]{40}", entry["revision"])
        for file in entry["files"]:
            assert file["file"].endswith((".safetensors", ".json", ".zip"))
            known = file["sha256"] is not None
            assert known or file["file"] == "models/image_encoder/config.json"
            assert not known or re.fullmatch("[0-9a-f]{64}", file["sha256"])
            assert (file["bytes"] is not None) == known


def test_the_union_that_is_pinned_is_promax_alone() -> None:
    assert {file["file"]: file["as"] for file in UNION["files"]} == {
        "config_promax.json": "config.json",
        "diffusion_pytorch_model_promax.safetensors": WEIGHTS,
    }
    [weights] = [file for file in UNION["files"] if file["as"] == WEIGHTS]
    assert 2.5e9 < weights["bytes"] < 2.52e9


def test_no_two_of_the_table_belong_in_one_folder() -> None:
    folders = [entry["folder"] for entry in ENTRIES]
    assert len(folders) == len(set(folders))


# --- ControlNets -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["union", UNION["repo"], f"{UNION['repo']}@{UNION['revision']}"])
def test_the_union_is_a_folder_that_diffusers_reads(
    name: str, hub: Hub, tmp_path: Path, controlnets: dict[str, dict[str, bytes]]
) -> None:
    fetch(tmp_path, controlnet=name)
    folder = tmp_path / "controlnets" / "union"
    assert files(folder) == ["config.json", WEIGHTS, "source.json"]
    loaded = ControlNetUnionModel.from_pretrained(folder, torch_dtype=torch.float16)
    assert loaded.config.num_control_type == 8
    expected = load(controlnets["promax"][WEIGHTS])
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[key].half())
    assert len(resolved(hub)) == 2
    assert all(f"/resolve/{UNION['revision']}/" in path for path in resolved(hub))
    assert not hub.requests(f"/{WEIGHTS}")
    for path in folder.iterdir():
        assert path.stat().st_mode & 0o777 == 0o644


def test_the_record_tells_the_commit_and_the_digests(
    tmp_path: Path, controlnets: dict[str, dict[str, bytes]]
) -> None:
    fetch(tmp_path, controlnet="union,org/canny-sdxl@v1")

    def record(name: str) -> dict[str, Any]:
        return json.loads((tmp_path / "controlnets" / name / "source.json").read_text())

    def digests(files: dict[str, bytes]) -> dict[str, str]:
        return {name: hashlib.sha256(files[name]).hexdigest() for name in ("config.json", WEIGHTS)}

    assert record("union") == {
        "name": UNION["repo"],
        "revision": UNION["revision"],
        "licence": "Apache-2.0",
        "files": digests(controlnets["promax"]),
        "asked": f"{UNION['repo']}@{UNION['revision']}",
    }
    assert record("canny-sdxl") == {
        "name": "org/canny-sdxl",
        "revision": COMMIT,
        "files": digests(controlnets["single"]),
        "asked": "org/canny-sdxl@v1",
    }


def test_another_revision_of_the_union_is_promax_too_and_checked_by_the_hub_s_digest(
    hub: Hub, tmp_path: Path
) -> None:
    promax = "diffusion_pytorch_model_promax.safetensors"
    content = bytearray(hub.repos[UNION["repo"]][promax])
    content[-1] ^= 1
    hub.faults[promax] = [Fault(content=bytes(content))]
    assert "its SHA-256 is" in failure(tmp_path, controlnet="union@v2")
    fetch(tmp_path, controlnet="union@v2")
    assert all(f"/resolve/{COMMIT}/" in path for path in resolved(hub))
    folder = tmp_path / "controlnets" / "union"
    assert ControlNetUnionModel.load_config(folder)["num_control_type"] == 8
    del hub.repos[UNION["repo"]]["config_promax.json"]
    assert "@v3: config_promax.json is missing" in failure(tmp_path / "b", controlnet="union@v3")


def test_a_controlnet_of_the_hub_is_stored_in_fp16_under_its_name(
    hub: Hub, tmp_path: Path, controlnets: dict[str, dict[str, bytes]]
) -> None:
    hub.repos["org/canny-sdxl"] |= {"README.md": b"", "diffusion_pytorch_model.bin": b"a pickle"}
    fetch(tmp_path, controlnet="org/canny-sdxl")
    folder = tmp_path / "controlnets" / "canny-sdxl"
    assert files(folder) == ["config.json", WEIGHTS, "source.json"]
    theirs, ours = load(controlnets["single"][WEIGHTS]), load_file(folder / WEIGHTS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name].half()) for name, tensor in ours.items())
    ControlNetModel.from_pretrained(folder)
    # The commit that the branch had when it was asked for: the branch could move meanwhile.
    assert all(f"/resolve/{COMMIT}/" in path for path in resolved(hub))


def test_the_fp16_variant_is_taken_where_there_is_one(hub: Hub, tmp_path: Path) -> None:
    repo = hub.repos["org/canny-sdxl"] = dict(hub.repos["org/canny-sdxl"])
    half = {name: tensor.half() for name, tensor in load(repo[WEIGHTS]).items()}
    repo["diffusion_pytorch_model.fp16.safetensors"] = save(half)
    fetch(tmp_path, controlnet="org/canny-sdxl")
    assert files(tmp_path / "controlnets/canny-sdxl") == ["config.json", WEIGHTS, "source.json"]
    assert not hub.requests(f"/{WEIGHTS}")


def test_what_is_no_controlnet_of_sdxl_is_refused_before_its_weights_are_fetched(
    hub: Hub, tmp_path: Path
) -> None:
    repo = hub.repos["org/canny-sdxl"] = dict(hub.repos["org/canny-sdxl"])
    config = json.loads(repo["config.json"])

    def refusal(**changed: Any) -> str:
        repo["config.json"] = json.dumps({**config, **changed}).encode()
        return failure(tmp_path, controlnet="org/canny-sdxl")

    told = refusal(addition_embed_type=None)
    assert told.endswith("org/canny-sdxl: is a ControlNet of another model, not of SDXL")
    assert "is a FluxControlNetModel, not a ControlNet" in refusal(
        _class_name="FluxControlNetModel"
    )
    del repo["config.json"]
    assert "config.json is missing" in failure(tmp_path, controlnet="org/canny-sdxl")
    repo |= {"config.json": json.dumps(config).encode(), "diffusion_pytorch_model.bin": b""}
    del repo[WEIGHTS]
    told = failure(tmp_path, controlnet="org/canny-sdxl")
    assert told.endswith("it has no .safetensors weights, the only kind taken")
    assert not [path for path in resolved(hub) if not path.endswith("config.json")]
    assert files(tmp_path) == ["extras.json"]


# --- what makes maps, IP-Adapters, the safety checker --------------------------------------------


def test_what_reads_depth_stays_as_published(hub: Hub, tmp_path: Path) -> None:
    fetch(tmp_path, preprocessor="depth")
    folder = tmp_path / "controlnets" / "preprocessors" / "depth"
    names = ["config.json", "model.safetensors", "preprocessor_config.json"]
    assert files(folder) == [*names, "source.json"]
    for name in names:
        assert (folder / name).read_bytes() == hub.repos[DEPTH["repo"]][name]


def test_what_reads_poses_comes_out_of_its_archives(tmp_path: Path) -> None:
    fetch(tmp_path, preprocessor="pose")
    folder = tmp_path / "controlnets" / "preprocessors" / "pose"
    detector, pose = [f"{Path(file['file']).stem}.onnx" for file in POSE["files"]]
    assert files(folder) == sorted([detector, pose, "source.json"])
    for name in (detector, pose):
        inside = f"20230831/{name.removesuffix('.onnx')}/end2end.onnx"
        assert (folder / name).read_text() == f"bytes of {inside}"
    # By these names the worker tells them apart.
    assert detector.startswith("yolox")
    assert not pose.startswith("yolox")


@pytest.mark.parametrize(
    "content", [archive(), archive("a.onnx", "b.onnx"), b"no archive"], ids=["none", "two", "other"]
)
def test_an_archive_of_something_else_is_refused(content: bytes, hub: Hub, tmp_path: Path) -> None:
    name = POSE["files"][1]["file"]
    hub.repos[POSE["repo"]] = {**hub.repos[POSE["repo"]], name: content}
    told = failure(tmp_path, preprocessor="pose@v2")
    assert f"{Path(name).name}: has not one .onnx file" in told
    assert not (tmp_path / "controlnets" / "preprocessors" / "pose").exists()


def test_an_archive_cannot_choose_where_its_file_goes(hub: Hub, tmp_path: Path) -> None:
    name = POSE["files"][0]["file"]
    hub.repos[POSE["repo"]] = {**hub.repos[POSE["repo"]], name: archive("../../../escaped.onnx")}
    fetch(tmp_path / "to", preprocessor="pose@v2")
    assert not list(tmp_path.rglob("escaped*"))
    assert f"{Path(name).stem}.onnx" in files(tmp_path / "to/controlnets/preprocessors/pose")


def test_the_ip_adapters_are_laid_out_as_their_repository(hub: Hub, tmp_path: Path) -> None:
    fetch(tmp_path, ip_adapter="vit-h")
    folder = tmp_path / "ip-adapters"
    assert files(folder) == sorted([*(file["file"] for file in IP_ADAPTER["files"]), "source.json"])
    for name in files(folder):
        if name.endswith(".safetensors"):
            theirs = load(hub.repos[IP_ADAPTER["repo"]][name])
            ours = load_file(folder / name)
            assert torch.equal(ours["weight"], theirs["weight"].half())
    assert not hub.requests("ip-adapter_sdxl.safetensors")


def test_a_safety_checker_stays_as_published(hub: Hub, tmp_path: Path) -> None:
    hub.repos["org/checker"] = hub.repos[CHECKER["repo"]]
    for name in ("falconsai", "org/checker"):
        to = tmp_path / name.replace("/", "-")
        fetch(to, safety_checker=name)
        folder = to / "safety-checker"
        names = ["config.json", "model.safetensors", "preprocessor_config.json"]
        assert files(folder) == [*names, "source.json"]
        content = (folder / "model.safetensors").read_bytes()
        assert content == hub.repos["org/checker"]["model.safetensors"]


def test_what_is_no_image_classifier_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.repos["org/checker"] = {
        **network({"architectures": ["CLIPModel"]}, 1),
        "preprocessor_config.json": b"{}",
    }
    told = failure(tmp_path, safety_checker="org/checker")
    assert "org/checker: is a CLIPModel, not an image classifier" in told
    assert not hub.requests("model.safetensors")


# --- faults ------------------------------------------------------------------------------------


def test_wrong_bytes_are_removed_and_said_to_be(hub: Hub, tmp_path: Path) -> None:
    content = bytearray(hub.repos[DEPTH["repo"]]["model.safetensors"])
    content[-1] ^= 1
    hub.faults["model.safetensors"] = [Fault(content=bytes(content))]
    told = failure(tmp_path, preprocessor="depth")
    assert f"its SHA-256 is {hashlib.sha256(content).hexdigest()}, and should be" in told
    folder = tmp_path / "controlnets" / "preprocessors"
    assert not [name for name in files(folder) if "model" in name]
    assert not (folder / "depth").exists()
    fetch(tmp_path, preprocessor="depth")


def test_the_digest_that_the_hub_publishes_is_checked(hub: Hub, tmp_path: Path) -> None:
    content = bytearray(hub.repos["org/canny-sdxl"][WEIGHTS])
    content[-1] ^= 1
    hub.faults[f"canny-sdxl/{WEIGHTS}"] = [Fault(content=bytes(content))]
    assert "its SHA-256 is" in failure(tmp_path, controlnet="org/canny-sdxl")


def test_a_full_disk_is_found_before_anything_is_fetched(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While an archive is unpacked, both it and its file are there."""
    sizes = [len(content) for content in hub.repos[POSE["repo"]].values()]
    usage = SimpleNamespace(free=sum(sizes) + max(sizes) - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert "free: make room" in failure(tmp_path, preprocessor="pose")
    assert not resolved(hub)
    usage.free += 1
    fetch(tmp_path, preprocessor="pose")


def test_a_small_file_of_another_content_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.faults["config_promax.json"] = [Fault(content=b"{}")]
    assert "it has 2 bytes, and should have" in failure(tmp_path, controlnet="union")


def test_a_missing_file_is_named(hub: Hub, tmp_path: Path) -> None:
    del hub.repos[DEPTH["repo"]]["preprocessor_config.json"]
    told = failure(tmp_path, preprocessor="depth")
    assert "preprocessor_config.json: not found (HTTP 404)" in told


def test_a_run_that_was_cut_off_is_resumed_by_the_next(hub: Hub, tmp_path: Path) -> None:
    size = len(hub.repos[DEPTH["repo"]]["model.safetensors"])
    name = f"{DEPTH['repo']}/model.safetensors"
    hub.faults[name] = [Fault(drop_after=4_000_000), *[Fault(status=503)] * 3]
    assert "the same command goes on" in failure(tmp_path, preprocessor="depth")
    partial = tmp_path / "controlnets" / "preprocessors" / "depth.partial"
    there = (partial / "model.safetensors.incomplete").stat().st_size
    assert 4_000_000 - PIECE_BYTES <= there <= 4_000_000
    hub.seen.clear()
    fetch(tmp_path, preprocessor="depth")
    [rest] = hub.requests("model.safetensors")
    assert rest.sent == size - there
    assert not partial.exists()


def test_a_gated_one_asks_for_a_token(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.gated.add("org/canny-sdxl")
    told = failure(tmp_path, controlnet="org/canny-sdxl")
    assert "set HF_TOKEN to a token that may read it" in told
    monkeypatch.setenv("HF_TOKEN", "secret")
    fetch(tmp_path, controlnet="org/canny-sdxl")


def test_what_is_whole_stays_when_another_fails(hub: Hub, tmp_path: Path) -> None:
    del hub.repos["org/canny-sdxl"]
    assert "org/canny-sdxl: not found" in failure(tmp_path, controlnet="union,org/canny-sdxl")
    hub.seen.clear()
    fetch(tmp_path, controlnet="union")
    assert not hub.seen


# --- the command -------------------------------------------------------------------------------


def test_several_are_fetched_by_one_command_and_none_of_them_twice(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {
        "controlnet": "union, org/canny-sdxl",
        "preprocessor": "depth,pose",
        "ip_adapter": "vit-h",
        "safety_checker": "falconsai",
    }
    to = tmp_path / "volume"
    fetch(to, **asked)
    folders = {path.parent.relative_to(to).as_posix() for path in to.rglob("source.json")}
    assert folders == {entry["folder"] for entry in ENTRIES} | {"controlnets/canny-sdxl"}
    hub.seen.clear()
    capsys.readouterr()
    fetch(to, **asked)
    assert not hub.seen
    assert capsys.readouterr().out.count("is complete already") == 6


@pytest.mark.parametrize("names", ["", "none", " , "])
def test_nothing_is_fetched_where_nothing_is_asked_for(
    names: str, hub: Hub, tmp_path: Path
) -> None:
    fetch(tmp_path / "models", controlnet=names, ip_adapter=names)
    assert files(tmp_path / "models") == []
    assert not hub.seen


def test_another_one_in_the_same_folder_is_refused(
    hub: Hub, tmp_path: Path, controlnets: dict[str, dict[str, bytes]]
) -> None:
    hub.repos["other/canny-sdxl"] = controlnets["single"]
    told = failure(tmp_path, controlnet="org/canny-sdxl,other/canny-sdxl")
    assert "org/canny-sdxl and other/canny-sdxl both belong in controlnets/canny-sdxl" in told
    assert not hub.seen
    fetch(tmp_path, controlnet="org/canny-sdxl")
    told = failure(tmp_path, controlnet="other/canny-sdxl")
    assert "holds another model, org/canny-sdxl; remove it or name another folder" in told


@pytest.mark.parametrize(
    ("kind", "name", "told"),
    [
        ("controlnet", "onion", "must be union, or org/name or org/name@revision of the hub"),
        ("controlnet", "org/..", "must be union"),
        ("preprocessor", "org/other", "--preprocessor org/other: must be depth, pose"),
        ("ip_adapter", "faceid", "--ip-adapter faceid: must be vit-h"),
        ("safety_checker", "other", "must be falconsai, or org/name"),
    ],
)
def test_a_name_that_is_none_is_told_before_anything_is_fetched(
    kind: str, name: str, told: str, hub: Hub, tmp_path: Path
) -> None:
    assert told in failure(tmp_path, **{"controlnet": "union", kind: f"{name},union"})
    assert not hub.seen


@pytest.mark.parametrize("other", [["--base", "org/other"], ["--refiner", "none"], ["--configs"]])
def test_a_model_is_fetched_by_a_command_of_its_own(
    other: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        program.main(["--to", str(tmp_path / "a"), "--controlnet", "union", *other])
    assert "--controlnet: not beside --base, --refiner" in capsys.readouterr().err


@pytest.mark.parametrize("asked", [{}, {"CONTROLNET": "org/canny-sdxl", "SAFETY_CHECKER": "org/c"}])
def test_the_image_s_build_fetches_what_its_arguments_say(
    asked: dict[str, str], hub: Hub, tmp_path: Path
) -> None:
    """The stage's command, in a shell: an argument that is not given is an empty variable."""
    hub.repos["org/c"] = hub.repos[CHECKER["repo"]]
    [script] = [value for name, value in stages()["extras"][1] if name == "RUN"]
    script = re.sub(r"^(--mount=\S+ )*", "", script).replace("/extras/", f"{tmp_path}/")
    environment = {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "HF_ENDPOINT": hub.endpoint,
        **asked,
    }
    done = subprocess.run(
        ["sh", "-ec", script], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = {
        path.relative_to(tmp_path).as_posix()
        for path in [*tmp_path.rglob("*.safetensors"), *tmp_path.rglob("source.json")]
    }
    if not asked:
        assert not found
        assert not hub.seen
    else:
        assert found == {
            f"control/controlnets/canny-sdxl/{WEIGHTS}",
            "control/controlnets/canny-sdxl/source.json",
            "safety/safety-checker/model.safetensors",
            "safety/safety-checker/source.json",
        }
    # What is copied into the image has to be there.
    assert {"control", "image", "safety"} <= {path.name for path in tmp_path.iterdir()}
