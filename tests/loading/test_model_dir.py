"""Which model is served: what `MODEL_DIR` may name, and what is found where it is not set."""

import hashlib
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdxl_worker.errors import ModelError
from sdxl_worker.loading import model_dir
from sdxl_worker.loading.model_dir import ModelDir, find_model_dir
from sdxl_worker.loading.models import Models, load_models
from sdxl_worker.request import parse_request
from sdxl_worker.settings import EMBEDDED_MODEL_DIR, Settings, load_settings
from tests.support import difference, draw

COMMIT = "462165984030d82259a11f4367a4eed129e94a7b"
BASE_JOB = {
    "prompt": "a red circle on a blue background",
    "seed": 1,
    "num_inference_steps": 4,
    "refiner_inference_steps": 0,
}


def find(folder: str | Path | None = None) -> ModelDir:
    return find_model_dir(Settings(model_dir=None if folder is None else Path(folder)))


def load(folder: Path, **settings: Any) -> Models:
    return load_from(Settings(model_dir=folder, **settings))


def load_from(settings: Settings) -> Models:
    return load_models(find_model_dir(settings), settings.dtype)


def refusal(folder: str | Path | None = None) -> str:
    with pytest.raises(ModelError) as caught:
        find(folder)
    message = str(caught.value)
    assert message.startswith("MODEL_DIR")
    return message


def add_to_cache(cache: Path, name: str, commit: str = COMMIT, *, model: str = "base") -> Path:
    """A repository as huggingface_hub lays it out: snapshots are links to blobs."""
    repo = cache / f"models--{name.replace('/', '--')}"
    for path in (EMBEDDED_MODEL_DIR / model).rglob("*"):
        if path.is_file():
            blob = repo / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
            blob.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, blob)
            link = repo / "snapshots" / commit / path.relative_to(EMBEDDED_MODEL_DIR / model)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    (repo / "refs").mkdir(exist_ok=True)
    (repo / "refs" / "main").write_text(commit)
    return repo


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The platform's cache of models, without one in it."""
    folder = tmp_path / "cache" / "hub"
    folder.mkdir(parents=True)
    monkeypatch.setattr(model_dir, "PLATFORM_CACHE", folder)
    return folder


@pytest.fixture
def baked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "baked" / "sdxl"
    shutil.copytree(EMBEDDED_MODEL_DIR, folder)
    monkeypatch.setattr(model_dir, "BAKED_MODEL_DIR", folder)
    return folder


# --- MODEL_DIR is set --------------------------------------------------------------------------


def test_a_folder_with_base_and_refiner() -> None:
    found = find(EMBEDDED_MODEL_DIR)
    assert found.base == EMBEDDED_MODEL_DIR / "base"
    assert found.refiner == EMBEDDED_MODEL_DIR / "refiner"
    assert found.name == "shapes"


def test_a_plain_diffusers_folder_is_a_base_alone() -> None:
    found = find(EMBEDDED_MODEL_DIR / "base")
    assert (found.base, found.refiner) == (EMBEDDED_MODEL_DIR / "base", None)
    loaded = load(found.root)
    assert loaded.refiner_unet is None
    assert loaded.zeros_for_empty_prompt is True


@pytest.mark.parametrize("place", ["repository", "snapshot", "name", "other case"])
def test_a_cached_model_is_found_by_its_folder_and_by_its_name(place: str, cache: Path) -> None:
    repo = add_to_cache(cache, "Org/My-Model")
    add_to_cache(cache, "org/another")
    snapshot = repo / "snapshots" / COMMIT
    values = {
        "repository": str(repo),
        "snapshot": str(snapshot),
        "name": "Org/My-Model",
        "other case": "org/my-model",
    }
    found = find(values[place])
    assert (found.root, found.refiner) == (snapshot, None)
    assert (found.name, found.revision()) == ("Org/My-Model", COMMIT)


def test_of_several_snapshots_the_main_branch_counts_then_the_newest(cache: Path) -> None:
    repo = add_to_cache(cache, "org/model", "1" * 40)
    add_to_cache(cache, "org/model", "2" * 40)
    os.utime(repo / "snapshots" / ("1" * 40), (2e9, 2e9))
    assert find(repo).root.name == "2" * 40
    (repo / "refs" / "main").write_text("3" * 40)  # a branch whose snapshot is not there
    assert find(repo).root.name == "1" * 40
    shutil.rmtree(repo / "refs")
    assert find(repo).root.name == "1" * 40


def test_a_cached_model_draws_as_its_files_do(cache: Path) -> None:
    add_to_cache(cache, "org/model")
    request = parse_request(BASE_JOB)
    loaded = load(Path("org/model"))
    [expected] = draw(request, load(EMBEDDED_MODEL_DIR))
    assert draw(request, loaded)[0].tobytes() == expected.tobytes()
    assert (loaded.name, loaded.revision) == ("org/model", COMMIT)


def test_a_whole_repository_is_loaded_from_its_fp16_files_with_its_vae_in_fp32(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The platform caches everything: fp32 beside fp16, and the VAE that overflows in fp16."""
    snapshot = add_to_cache(cache, "org/model") / "snapshots" / COMMIT
    for path in list(snapshot.rglob("*.fp16.safetensors")):
        # Were it loaded, the pictures would be others.
        tensors = {name: torch.zeros_like(it).float() for name, it in load_file(path).items()}
        save_file(tensors, path.with_name(path.name.replace(".fp16", "")), {"format": "pt"})
        (path.parent / "openvino_model.bin").touch()
    loaded = load(snapshot, dtype="float16")
    vae = loaded.vae
    assert (vae.dtype, vae.config.force_upcast) == (torch.float16, True)
    assert all(torch.isfinite(part).all() for part in vars(loaded.latent_rgb).values())

    decoded_in = []
    decode = vae.decode

    def recording(*arguments: Any, **options: Any) -> Any:
        decoded_in.append(vae.dtype)
        return decode(*arguments, **options)

    monkeypatch.setattr(vae, "decode", recording)
    request = parse_request(BASE_JOB)
    [picture] = draw(request, loaded)
    assert decoded_in == [torch.float32]
    [expected] = draw(request, load(EMBEDDED_MODEL_DIR))
    assert difference(picture, expected) < 2


@pytest.mark.usefixtures("baked")
@pytest.mark.parametrize("value", ["/nowhere", "org/missing", "no such name"])
def test_what_leads_to_no_model_is_refused_with_what_was_looked_for(
    value: str, cache: Path
) -> None:
    add_to_cache(cache, "org/model")
    message = refusal(value)
    assert message.startswith(f"MODEL_DIR: {value} must be a folder that holds base/")
    assert message.endswith(f"or an org/name in {cache}, which holds org/model")


# --- MODEL_DIR is not set ----------------------------------------------------------------------


def test_the_baked_model_comes_first(
    cache: Path, baked: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    add_to_cache(cache, "org/model")
    add_to_cache(cache, "org/another")  # not asked for, so not unclear
    assert find().root == baked
    assert caplog.messages == [f"MODEL_DIR is not set: serving {baked}"]


def test_the_cached_model_comes_next(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    repo = add_to_cache(cache, "org/model")
    add_to_cache(cache, "org/refiner", model="refiner")
    language_model = cache / "models--org--language-model" / "snapshots" / COMMIT
    language_model.mkdir(parents=True)
    (language_model / "config.json").write_text("{}")
    snapshot = repo / "snapshots" / COMMIT
    assert find().root == snapshot
    assert caplog.messages == [f"MODEL_DIR is not set: serving {snapshot}; no model in /nowhere"]


def test_several_cached_models_are_not_chosen_from(cache: Path) -> None:
    add_to_cache(cache, "org/one")
    add_to_cache(cache, "org/two")
    message = refusal()
    assert f"{cache} holds org/one, org/two: set MODEL_DIR to the one to serve" in message


def test_the_embedded_model_comes_last_and_is_said_to_be_used(
    caplog: pytest.LogCaptureFixture, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("MODEL_DIR", "")  # as the Hub sends what is not given
    loaded = load_from(load_settings())
    assert loaded.name == "shapes"
    assert loaded.native_size_px == 128
    assert caplog.messages[0] == (
        "MODEL_DIR is not set: serving the embedded miniature model, "
        f"{EMBEDDED_MODEL_DIR}; no model in /nowhere; no model in {cache}"
    )


def test_no_model_anywhere_names_the_places(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(model_dir, "EMBEDDED_MODEL_DIR", tmp_path / "shapes")
    monkeypatch.setattr(model_dir, "PLATFORM_CACHE", tmp_path / "cache")
    message = refusal()
    for place in ("/nowhere", f"{tmp_path}/cache", f"{tmp_path}/shapes"):
        assert place in message


# --- name and revision -------------------------------------------------------------------------


def source(folder: Path, **values: Any) -> Path:
    (folder / "base").mkdir(parents=True)
    (folder / "source.json").write_text(json.dumps({"name": "org/model", **values}))
    return folder


def test_name_and_revision_are_those_that_were_written_with_the_weights(tmp_path: Path) -> None:
    folder = source(
        tmp_path / "model",
        base={"repo": "org/model", "revision": COMMIT},
        vae={"repo": "org/vae", "revision": "b" * 40},
        refiner={"file": "refiner.safetensors", "sha256": "c" * 64},
    )
    found = find(folder)
    assert found.name == "org/model"
    assert found.revision() == "base 462165984030, vae bbbbbbbbbbbb, refiner cccccccccccc"
    alone = find(source(tmp_path / "alone", base={"revision": COMMIT}, refiner=None))
    assert alone.revision() == "base 462165984030"
    (folder / "source.json").write_text("{")
    with pytest.raises(ModelError, match=r"source\.json cannot be read"):
        _ = found.name


def test_the_model_hash_is_that_of_the_single_file_or_the_published_one(tmp_path: Path) -> None:
    sha256 = "0123456789abcdef" * 4
    single = {"name": "my model", "base": {"file": "my model.safetensors", "sha256": sha256}}
    converted = find(source(tmp_path / "single", **single))
    assert (converted.hash, converted.sha256) == ("0123456789", sha256)
    name = "stabilityai/stable-diffusion-xl-base-1.0"
    folders = {"name": name, "base": {"repo": name, "revision": COMMIT}}
    # https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0, sd_xl_base_1.0.safetensors
    assert find(source(tmp_path / "folders", **folders)).hash == "31e35c80fc"
    other = {"name": "org/other", "base": {"repo": "org/other", "revision": COMMIT}}
    assert find(source(tmp_path / "other", **other)).hash is None
    embedded = find(EMBEDDED_MODEL_DIR)
    assert embedded.hash is None
    assert load(EMBEDDED_MODEL_DIR).hash is None


def test_the_revision_tells_weights_apart(tmp_path: Path) -> None:
    def revision(name: str, content: bytes) -> str:
        (tmp_path / name / "base" / "unet").mkdir(parents=True)
        (tmp_path / name / "base" / "unet" / "a.safetensors").write_bytes(content)
        return find(tmp_path / name).revision()

    one = revision("one", b"1" * 100)
    assert one.startswith("sha256:")
    assert one == revision("same", b"1" * 100)
    assert one != revision("other", b"1" * 99 + b"2")
    assert revision(f"models--a--b/snapshots/{COMMIT}", b"1") == COMMIT


def test_the_base_is_read_before_the_refiner() -> None:
    files = find(EMBEDDED_MODEL_DIR).weight_files("float16")
    assert list(files)[-1] == "refiner_unet"
    assert len(files) == 5


@pytest.mark.parametrize(
    ("dtype_name", "on_gpu", "chosen"),
    [
        (None, True, "unet.fp16.safetensors"),
        (None, False, "unet.safetensors"),
        ("float16", False, "unet.fp16.safetensors"),
        ("float32", True, "unet.safetensors"),
        ("bfloat16", True, "unet.safetensors"),
    ],
)
def test_the_files_are_those_of_the_number_format_they_are_loaded_in(
    dtype_name: str | None,
    on_gpu: bool,
    chosen: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is read ahead is what is loaded: on a CPU, of both kinds, the full ones."""
    monkeypatch.setattr(model_dir, "gpu_is_there", lambda: on_gpu)
    shutil.copytree(EMBEDDED_MODEL_DIR / "base", tmp_path / "base")
    for folder in ("unet", "vae", "text_encoder", "text_encoder_2"):
        for name in ("unet.fp16.safetensors", "unet.safetensors"):
            (tmp_path / "base" / folder / name).touch()
        for path in (tmp_path / "base" / folder).glob("*model*.safetensors"):
            path.unlink()
    files = find(tmp_path).weight_files(dtype_name)
    assert files.keys() == {"text_encoder", "text_encoder_2", "unet", "vae"}
    assert all([path.name for path in paths] == [chosen] for paths in files.values())


def test_a_network_without_a_configuration_is_a_wrong_model(tmp_path: Path) -> None:
    shutil.copytree(EMBEDDED_MODEL_DIR, tmp_path / "model")
    (tmp_path / "model" / "base" / "vae" / "config.json").unlink()
    with pytest.raises(ModelError, match="vae/config.json cannot be read"):
        find(tmp_path / "model").configs()


def test_a_revision_is_that_of_the_files_also_where_a_folder_is_a_link(tmp_path: Path) -> None:
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "base").symlink_to(EMBEDDED_MODEL_DIR / "base")
    shutil.copytree(EMBEDDED_MODEL_DIR / "base", tmp_path / "copied" / "base")
    linked, copied = find(tmp_path / "linked").revision(), find(tmp_path / "copied").revision()
    assert linked == copied
    assert linked != f"sha256:{hashlib.sha256().hexdigest()[:16]}"
