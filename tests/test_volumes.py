"""docs/volumes.md: the tree that it draws is built, and with the settings that stand beside it the
worker finds all of it."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from builder.download_weights import extras
from sdxl_worker.errors import RequestError
from sdxl_worker.inputs.adapter_cache import open_cache
from sdxl_worker.inputs.adapter_sources import LocalFile, SourceError, find_source
from sdxl_worker.loading import model_dir
from sdxl_worker.loading.controlnets import find_controlnet
from sdxl_worker.loading.ip_adapters import find_ip_adapter
from sdxl_worker.loading.model_dir import PLATFORM_CACHE, ModelDir, find_model_dir
from sdxl_worker.loading.models_by_name import find_by_name
from sdxl_worker.loading.networks import NETWORKS
from sdxl_worker.loading.preprocessors import find_depth, find_pose
from sdxl_worker.loading.safety_labels import check_safety_checker
from sdxl_worker.loading.upscalers import find_upscaler
from sdxl_worker.outputs.bucket import bucket_of_owner
from sdxl_worker.request import parse_request
from sdxl_worker.serving.start import _check_folders
from sdxl_worker.settings import EMBEDDED_MODEL_DIR, Settings
from tests.own_files import write_embedding
from tests.random_ip_adapters import make_encoder, plain_adapter, plus_adapter
from tests.support import REPOSITORY
from tools import original_format

GUIDE = (REPOSITORY / "docs" / "volumes.md").read_text(encoding="utf-8")
VOLUME = "/runpod-volume"
LINE = re.compile(r"(?P<indent>(│   |    )*)[├└]── (?P<name>[^\s/]+)(?P<slash>/?)( +(?P<note>.+))?")
BASE = EMBEDDED_MODEL_DIR / "base"


UNET = NETWORKS["unet"].build(BASE / "unet")


@dataclass(frozen=True)
class Entry:
    """A line of the drawing."""

    path: Path
    """Below the volume."""
    is_folder: bool
    note: str
    """The setting that leads there, or a job's input that names it."""

    @property
    def setting(self) -> tuple[str, str] | None:
        name, equals, value = self.note.partition("=")
        return (name, value) if equals and not self.note.startswith("{") else None

    @property
    def job(self) -> dict[str, Any]:
        return json.loads(self.note) if self.note.startswith("{") else {}


def drawing() -> list[Entry]:
    tree = GUIDE.partition("<!-- tree -->\n```text\n")[2].partition("\n```\n<!-- /tree -->")[0]
    first, *lines = tree.splitlines()
    assert first == f"{VOLUME}/"
    entries: list[Entry] = []
    folders: list[str] = []
    for line in lines:
        found = LINE.fullmatch(line)
        assert found, line
        folders = [*folders[: len(found["indent"]) // 4], found["name"]]
        entries.append(Entry(Path(*folders), bool(found["slash"]), found["note"] or ""))
    return entries


ENTRIES = drawing()


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree with the miniature model in it."""
    root = tmp_path_factory.mktemp("volume")
    for entry in ENTRIES:
        if entry.is_folder:
            (root / entry.path).mkdir()
        else:
            fill(root / entry.path, entry)
    for entry in ENTRIES:
        if entry.is_folder:
            fill_folder(root / entry.path, entry)
    return root


def fill(path: Path, entry: Entry) -> None:
    if entry.path.parts[0] == "models" and path.suffix == ".safetensors":
        original_format.save(original_format.base_checkpoint(BASE), path)
    elif entry.path.parts[0] == "models":
        shutil.copytree(BASE, path.parent, dirs_exist_ok=True)
    elif entry.path.parts[0] == "vae":
        [weights] = (BASE / "vae").glob("*.safetensors")
        original_format.save(original_format._vae(load_file(weights)), path)
    elif "embeddings" in entry.job:
        write_embedding(path, seed=1)
    elif "ip_adapter" in entry.job:
        make = plus_adapter if "plus" in path.name else plain_adapter
        save_file(make(UNET), path)
    elif "upscale" in entry.job:
        path.touch()
    else:
        shutil.copy(REPOSITORY / "models" / "adapters" / path.name, path)
    assert path.is_file(), "the drawing has a file that is not filled"


def fill_folder(path: Path, entry: Entry) -> None:
    """What stands for whole folders in the drawing."""
    if "controlnet" in entry.job:
        is_union = path.name == "union"
        kind = {"num_control_type": 8} if is_union else {"_class_name": "ControlNetModel"}
        write_network(path, "diffusion_pytorch_model", **kind)
    elif path.name == "depth":
        write_network(path, "model")
    elif path.name == "safety-checker":
        write_network(path, "model", id2label={"0": "normal", "1": "nsfw"})
    elif path.name == "image_encoder":
        make_encoder(path)
    elif path.name == "pose":
        for name in ("yolox_m.onnx", "rtmw-l.onnx"):
            (path / name).touch()
    if path.name in ("base", "refiner"):
        shutil.copytree(EMBEDDED_MODEL_DIR / path.name, path, dirs_exist_ok=True)
    elif path.name == model_dir.CONFIGS_DIR.name:
        no_weights = shutil.ignore_patterns("*.safetensors")
        shutil.copytree(BASE, path, dirs_exist_ok=True, ignore=no_weights)
    elif path.name.startswith("models--"):
        shutil.copytree(BASE, path / "snapshots" / "0123abc")
        (path / "refs").mkdir()
        (path / "refs" / "main").write_text("0123abc")


def write_network(folder: Path, stem: str, **config: Any) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"weight": torch.zeros(1)}, folder / f"{stem}.safetensors")


@pytest.fixture
def settings(volume: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Those that stand in the drawing, as the environment gives them."""
    monkeypatch.setattr(model_dir, "PLATFORM_CACHE", volume / PLATFORM_CACHE.relative_to(VOLUME))
    for entry in ENTRIES:
        if entry.setting:
            name, value = entry.setting
            monkeypatch.setenv(name, value.replace(VOLUME, str(volume)))
    for name in ("BUCKET_ACCESS_KEY_ID", "BUCKET_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("BUCKET_ENDPOINT_URL", "https://s3api-eu-ro-1.runpod.io")
    monkeypatch.setenv("BUCKET_NAME", "VOLUME_ID")
    return Settings()


def default() -> ModelDir:
    return find_model_dir(Settings(model_dir=EMBEDDED_MODEL_DIR))


def drawn_by(field: str) -> dict[str, Entry]:
    """The entries that a field of a job names, by their names."""
    found = {}
    for entry in ENTRIES:
        if field in entry.job:
            value = entry.job[field]
            found[value if isinstance(value, str) else value[0]["path"]] = entry
    return found


def test_the_drawing_is_read() -> None:
    assert len(ENTRIES) >= 27
    names = [entry.setting[0] for entry in ENTRIES if entry.setting]
    assert len(names) == len(set(names)) >= 11
    assert {name.lower() for name in names} <= set(Settings.model_fields)
    for folder in ("models", "loras"):
        assert len([one for one in ENTRIES if one.path.parts[0] == folder and one.job]) >= 3


def test_each_setting_leads_to_what_it_stands_beside(settings: Settings, volume: Path) -> None:
    for entry in ENTRIES:
        if entry.setting and entry.setting[1].startswith("/"):
            assert getattr(settings, entry.setting[0].lower()) == volume / entry.path
    _check_folders(settings)
    assert open_cache(settings).folder == volume / "lora-cache"


def test_each_model_is_found_by_its_name(settings: Settings, volume: Path) -> None:
    models = drawn_by("model")
    for name, entry in models.items():
        parse_request({"prompt": "a circle", **entry.job})
        found = find_by_name(name, settings, default())
        assert found.root == volume / entry.path
        assert found.vae == settings.vae_dir
        assert all(found.weight_files("float16").values())
        assert found.configs()
    assert find_by_name("anime", settings, default()).refiner is not None


def test_the_worker_sees_no_other_models_than_those_drawn(settings: Settings) -> None:
    with pytest.raises(RequestError) as caught:
        find_by_name("?", settings, default())
    told = str(caught.value).rpartition("it has ")[2]
    assert sorted(re.findall(r'"([^"]+)"', told)) == sorted([*drawn_by("model"), default().name])


def test_a_single_file_may_find_what_it_lacks_beside_it(
    settings: Settings, volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_dir, "EMBEDDED_MODEL_DIR", volume / "nothing")
    monkeypatch.setattr(model_dir, "PLATFORM_CACHE", volume / "nothing")
    found = find_by_name("photo", settings, default())
    assert found.base == volume / "models" / "sdxl-configs"


def test_each_adapter_is_found_by_its_path(settings: Settings, volume: Path) -> None:
    adapters = drawn_by("loras") | drawn_by("embeddings")
    for path, entry in adapters.items():
        parse_request({"prompt": "a circle", **entry.job})
        assert find_source(path, settings) == LocalFile(volume / entry.path, path)
    with pytest.raises(SourceError) as caught:
        find_source("missing.safetensors", settings)
    told = str(caught.value).partition("there are ")[2].partition("; got")[0]
    assert sorted(told.split(", ")) == sorted(adapters)


def jobs_with(field: str, volume: Path) -> list[tuple[Path, Any]]:
    """Where each entry is whose job has the field, and what the job says there."""
    found = [(volume / one.path, one.job[field]) for one in ENTRIES if field in one.job]
    assert found
    for _, value in found:
        parse_request({"prompt": "a circle", field: value})
    return found


def test_each_controlnet_is_found_by_its_type(settings: Settings, volume: Path) -> None:
    for path, [asked] in jobs_with("controlnet", volume):
        found = find_controlnet(asked["type"], settings.controlnet_dir, "controlnet[0].type")
        assert found.folder == path


def test_what_makes_maps_is_found(settings: Settings, volume: Path) -> None:
    folder = volume / "controlnets" / "preprocessors"
    assert find_depth(settings.controlnet_dir, "controlnet[0].type").folder == folder / "depth"
    pose = find_pose(settings.controlnet_dir, "controlnet[0].type")
    assert pose.detector.parent == pose.pose.parent == folder / "pose"


def test_each_ip_adapter_is_found_by_its_type(settings: Settings, volume: Path) -> None:
    for path, [asked] in jobs_with("ip_adapter", volume):
        found = find_ip_adapter(asked["type"], settings.ip_adapter_dir, "ip_adapter[0].type", UNET)
        assert found.path == path
        assert found.encoder.folder == volume / "ip-adapters" / "models" / "image_encoder"


def test_each_upscaler_is_found_by_its_name(settings: Settings, volume: Path) -> None:
    for path, asked in jobs_with("upscale", volume):
        found = find_upscaler(asked["upscaler"], settings.upscaler_dir, "upscale.upscaler")
        assert found is not None
        assert found.path == path


def test_the_safety_checker_is_one(settings: Settings) -> None:
    assert settings.safety_checker is not None
    check_safety_checker(settings.safety_checker)


def test_the_weights_program_makes_these_folders() -> None:
    """By the command of the guide, which knows every one of its names."""
    [command] = re.findall(r"--to /workspace (--controlnet(?:.*\\\n)*.+)", GUIDE)
    words = command.replace("\\\n", " ").split()
    asked = dict(zip(words[::2], words[1::2], strict=True))
    folders = {
        extras.find_extra(kind.removeprefix("--"), name).folder
        for kind, names in asked.items()
        for name in names.split(",")
    }
    every = {entry["folder"] for kind in extras.pinned().values() for entry in kind.values()}
    assert folders == every
    assert folders <= {one.path.as_posix() for one in ENTRIES if one.is_folder}
    ip_adapter = extras.pinned()["ip-adapter"]["vit-h"]
    files = {f"{ip_adapter['folder']}/{file['file']}" for file in ip_adapter["files"]}
    assert {one.path.as_posix() for one in ENTRIES if "ip_adapter" in one.job} <= files


def test_the_cached_model_is_the_default_where_it_is_named(
    settings: Settings, volume: Path
) -> None:
    found = find_model_dir(settings)
    assert found.name == str(settings.model_dir)
    [entry] = [one for one in ENTRIES if one.setting and one.setting[0] == "MODEL_DIR"]
    assert found.root.is_relative_to(volume / entry.path)


def test_the_cache_is_where_the_platform_puts_it() -> None:
    [entry] = [one for one in ENTRIES if one.path.name.startswith("models--")]
    assert Path(VOLUME) / entry.path.parent == PLATFORM_CACHE


def test_pictures_in_the_volume_s_storage_are_where_the_drawing_has_them(
    settings: Settings,
) -> None:
    bucket = bucket_of_owner(settings)
    assert bucket is not None
    assert bucket.url == "https://s3api-eu-ro-1.runpod.io/VOLUME_ID"
    [entry] = [one for one in ENTRIES if one.setting and one.setting[0] == "BUCKET_PREFIX"]
    assert bucket.key("job/0.png") == f"{entry.path}/job/0.png"


def test_folders_that_only_root_can_make_are_made_for_the_worker() -> None:
    """`make image-test` sees whose they are then."""
    script = (REPOSITORY / "start.sh").read_text(encoding="utf-8")
    made = re.findall(r"\$\{(\w+):-\}", re.search(r"for folder in (.+); do", script)[1])  # type: ignore[index]
    [line] = re.findall(r"^- (.+) are made and given to the worker", GUIDE, re.MULTILINE)
    assert re.findall(r"`(\w+)`", line) == made
