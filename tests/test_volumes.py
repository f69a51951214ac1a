"""docs/volumes.md: the tree that it draws is built, and with the settings that stand beside it the
worker finds all of it."""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from sdxl_worker.errors import RequestError
from sdxl_worker.inputs.adapter_cache import open_cache
from sdxl_worker.inputs.adapter_sources import LocalFile, SourceError, find_source
from sdxl_worker.loading import model_dir
from sdxl_worker.loading.model_dir import PLATFORM_CACHE, ModelDir, find_model_dir
from sdxl_worker.loading.models_by_name import find_by_name
from sdxl_worker.outputs.bucket import bucket_of_owner
from sdxl_worker.request import parse_request
from sdxl_worker.serving.start import _check_folders
from sdxl_worker.settings import EMBEDDED_MODEL_DIR, Settings
from tests.own_files import write_embedding
from tests.support import REPOSITORY
from tools import original_format

GUIDE = (REPOSITORY / "docs" / "volumes.md").read_text(encoding="utf-8")
VOLUME = "/runpod-volume"
LINE = re.compile(r"(?P<indent>(│   |    )*)[├└]── (?P<name>[^\s/]+)(?P<slash>/?)( +(?P<note>.+))?")
BASE = EMBEDDED_MODEL_DIR / "base"


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
            fill_folder(root / entry.path)
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
    else:
        shutil.copy(REPOSITORY / "models" / "adapters" / path.name, path)
    assert path.is_file(), "the drawing has a file that is not filled"


def fill_folder(path: Path) -> None:
    """What stands for whole folders in the drawing."""
    if path.name in ("base", "refiner"):
        shutil.copytree(EMBEDDED_MODEL_DIR / path.name, path, dirs_exist_ok=True)
    elif path.name == model_dir.CONFIGS_DIR.name:
        no_weights = shutil.ignore_patterns("*.safetensors")
        shutil.copytree(BASE, path, dirs_exist_ok=True, ignore=no_weights)
    elif path.name.startswith("models--"):
        shutil.copytree(BASE, path / "snapshots" / "0123abc")
        (path / "refs").mkdir()
        (path / "refs" / "main").write_text("0123abc")


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
    assert len(ENTRIES) >= 15
    names = [entry.setting[0] for entry in ENTRIES if entry.setting]
    assert len(names) == len(set(names)) >= 7
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
