"""Which model is served: that of `MODEL_DIR` or, if it is not set, the first one found."""

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl_worker.errors import ModelError
from sdxl_worker.gpu import gpu_is_there
from sdxl_worker.loading.networks import NETWORKS, Network
from sdxl_worker.settings import EMBEDDED_MODEL_DIR, Settings

log = logging.getLogger(__name__)

BAKED_MODEL_DIR = Path("/models/sdxl")
"""Where the images with weights have them."""
PLATFORM_CACHE = Path("/runpod-volume/huggingface-cache/hub")
"""Where Runpod mounts the model that an endpoint names, as a cache of the Hugging Face hub."""
SOURCE_FILE = "source.json"
"""Written by builder.download_weights: the name, and where base, vae and refiner come from."""
DIGEST_BYTES = 2**20
PUBLISHED_HASHES = {
    # Of sd_xl_base_1.0.safetensors, which has the weights of the folders beside it.
    "stabilityai/stable-diffusion-xl-base-1.0": "31e35c80fc",
}


@dataclass(frozen=True)
class ModelDir:
    """The folders of a model, in diffusers layout."""

    root: Path
    base: Path
    refiner: Path | None

    def folder(self, network: Network) -> Path:
        """The folder of one network. In diffusers' layout, a base alone, there is no "base"."""
        folder = self.refiner if network.of_refiner else self.base
        if folder is None:
            raise KeyError(network.folder)
        return folder / Path(network.folder).name

    def networks(self) -> dict[str, Network]:
        """Those that the model has, by their names in `NETWORKS`."""
        return {
            name: network
            for name, network in NETWORKS.items()
            if self.refiner is not None or not network.of_refiner
        }

    def weight_files(self, dtype_name: str | None) -> dict[str, list[Path]]:
        """The safetensors files of each network: the fp16 variant if it is enough, or all
        there is. The choice needs no torch.

        Args:
            dtype_name: number format to load them in. None: float16 on a GPU, float32 on a CPU.

        Raises:
            ModelError: a network has none.
        """
        half_precision = dtype_name == "float16" or (dtype_name is None and gpu_is_there())
        return {
            name: _weight_files(self.folder(network), half_precision=half_precision)
            for name, network in self.networks().items()
        }

    def configs(self) -> dict[str, str]:
        """The text of each network's configuration.

        Raises:
            ModelError: a network has none.
        """
        return {
            name: _text(self.folder(network) / "config.json")
            for name, network in self.networks().items()
        }

    @property
    def name(self) -> str:
        """The name on the hub, where that is known; otherwise the folder's."""
        if source := self._source():
            return str(source["name"])
        if self.root.parent.name == "snapshots":
            return _repo_name(self.root.parent.parent)
        return self.root.name

    @property
    def hash(self) -> str | None:
        """The "Model hash" by which Civitai and others find a model: the first ten hex digits of
        SHA-256 of its single file. None: the model is no single file.

        It is read, not computed: reading gigabytes would hold up the start.
        """
        base = self._source().get("base") or {}
        if "sha256" in base:
            return str(base["sha256"])[:10]
        return PUBLISHED_HASHES.get(self.name.lower())

    def revision(self) -> str:
        """Identifies the weights: by commits of the hub, or by a digest of the files.

        The digest is over the size, head and tail of each weight file: reading all of them would
        take longer than loading.
        """
        if source := self._source():
            origins = {role: source.get(role) for role in ("base", "vae", "refiner")}
            return ", ".join(
                f"{role} {(origin.get('revision') or origin['sha256'])[:12]}"
                for role, origin in origins.items()
                if origin
            )
        for folder in (self.root, *self.root.resolve().parents):
            if folder.parent.name == "snapshots":
                return folder.name
        digest = hashlib.sha256()
        # Folder by folder: a walk through the root would pass by one that is a link.
        folders = [self.folder(network) for network in self.networks().values()]
        for path in sorted(path for folder in folders for path in folder.glob("*.safetensors")):
            digest.update(f"{path.relative_to(self.root)} {path.stat().st_size}".encode())
            with path.open("rb") as file:
                digest.update(file.read(DIGEST_BYTES))
                file.seek(-min(DIGEST_BYTES, path.stat().st_size), os.SEEK_END)
                digest.update(file.read())
        return f"sha256:{digest.hexdigest()[:16]}"

    def _source(self) -> dict[str, Any]:
        path = self.root / SOURCE_FILE
        if not path.is_file():
            return {}
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelError(f"MODEL_DIR: {path} cannot be read: {error}") from error


def find_model_dir(settings: Settings) -> ModelDir:
    """The model to serve.

    Raises:
        ModelError: `MODEL_DIR` names none, or there is none, or the choice is not clear; the
            message says what was looked for.
    """
    if settings.model_dir is None:
        return _first_there_is()
    found = _open(settings.model_dir) or _cached(str(settings.model_dir))
    if found is None:
        in_cache = _names(_cached_models())
        raise ModelError(
            f"MODEL_DIR: {settings.model_dir} must be a folder that holds base/ (and refiner/, if "
            "there is one) or model_index.json in diffusers layout, or an org/name in "
            f"{PLATFORM_CACHE}, which holds {in_cache or 'no SDXL model'}"
        )
    log.info("MODEL_DIR is %s: serving %s", settings.model_dir, found.root)
    return found


def _weight_files(folder: Path, *, half_precision: bool) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"MODEL_DIR: {folder} holds no .safetensors file, the only kind loaded")
    fp16_files = [file for file in files if ".fp16." in file.name]
    full_precision_files = [file for file in files if ".fp16." not in file.name]
    use_fp16 = bool(fp16_files) and (half_precision or not full_precision_files)
    return fp16_files if use_fp16 else full_precision_files


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelError(f"MODEL_DIR: {path} cannot be read: {error}") from error


def _first_there_is() -> ModelDir:
    cached = _cached_models()
    if len(cached) > 1 and _open(BAKED_MODEL_DIR) is None:
        raise ModelError(
            f"MODEL_DIR is not set, and {PLATFORM_CACHE} holds {_names(cached)}: set MODEL_DIR to "
            "the one to serve"
        )
    places: list[tuple[str, ModelDir | None]] = [
        (str(BAKED_MODEL_DIR), _open(BAKED_MODEL_DIR)),
        (str(PLATFORM_CACHE), cached[0] if cached else None),
        (str(EMBEDDED_MODEL_DIR), _open(EMBEDDED_MODEL_DIR)),
    ]
    for i, (_, found) in enumerate(places):
        if found is not None:
            kind = "the embedded miniature model, " if found.root == EMBEDDED_MODEL_DIR else ""
            empty = "".join(f"; no model in {place}" for place, _ in places[:i])
            log.info("MODEL_DIR is not set: serving %s%s%s", kind, found.root, empty)
            return found
    raise ModelError(
        "MODEL_DIR is not set, and there is no model in "
        + " or ".join(place for place, _ in places)
        + ": set it to a folder, or choose a model in the endpoint's settings"
    )


def _open(folder: Path) -> ModelDir | None:
    """The model in a folder: in this worker's layout, in diffusers', or in the hub's cache."""
    if (folder / "base").is_dir():
        refiner = folder / "refiner"
        return ModelDir(folder, folder / "base", refiner if refiner.is_dir() else None)
    if (folder / "model_index.json").is_file():
        return ModelDir(folder, folder, None)
    snapshot = _snapshot(folder)
    return _open(snapshot) if snapshot else None


def _snapshot(repo: Path) -> Path | None:
    """Of a repository in a cache: the snapshot of the main branch, otherwise the newest."""
    snapshots = repo / "snapshots"
    if not snapshots.is_dir():
        return None
    main = repo / "refs" / "main"
    if main.is_file():
        commit = main.read_text(encoding="utf-8").strip()
        if commit and (snapshots / commit).is_dir():
            return snapshots / commit
    folders = [path for path in snapshots.iterdir() if path.is_dir()]
    return max(folders, key=lambda path: path.stat().st_mtime, default=None)


def _cached(name: str) -> ModelDir | None:
    """A model of the platform's cache by its org/name, whose case may differ from the hub's."""
    if name.count("/") != 1:
        return None
    for repo in _cached_repos():
        if _repo_name(repo).lower() == name.lower():
            return _open(repo)
    return None


def _cached_models() -> list[ModelDir]:
    """The SDXL models of the platform's cache that can draw alone: not a refiner."""
    found = [_open(repo) for repo in _cached_repos()]
    return [model for model in found if model is not None and _is_sdxl_base(model.base)]


def _cached_repos() -> list[Path]:
    return sorted(PLATFORM_CACHE.glob("models--*--*")) if PLATFORM_CACHE.is_dir() else []


def _is_sdxl_base(folder: Path) -> bool:
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    encoders = [(index.get(name) or [None])[0] for name in ("text_encoder", "text_encoder_2")]
    return str(index.get("_class_name")).startswith("StableDiffusionXL") and all(encoders)


def _repo_name(repo: Path) -> str:
    """`models--org--name` is org/name."""
    return repo.name.removeprefix("models--").replace("--", "/", 1)


def _names(models: list[ModelDir]) -> str:
    return ", ".join(model.name for model in models)
