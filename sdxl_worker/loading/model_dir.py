"""Which model is served: that of `MODEL_DIR` or, if it is not set, the first one found."""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sdxl_worker.errors import ModelError
from sdxl_worker.gpu import gpu_is_there
from sdxl_worker.loading.checkpoint_kind import (
    PREFIXES,
    Checkpoint,
    check_vae_file,
    read_checkpoint,
)
from sdxl_worker.loading.file_hash import known_hash
from sdxl_worker.loading.layouts import SDXL, layout_of_checkpoint, layout_of_folder
from sdxl_worker.loading.networks import NETWORKS, Network
from sdxl_worker.settings import EMBEDDED_MODEL_DIR, PredictionType, Settings

log = logging.getLogger(__name__)

BAKED_MODEL_DIR = Path("/models/sdxl")
"""Where the images with weights have them."""
PLATFORM_CACHE = Path("/runpod-volume/huggingface-cache/hub")
"""Where Runpod mounts the model that an endpoint names, as a cache of the Hugging Face hub."""
CONFIGS_DIR = Path("/models/sdxl-configs")
"""Where the image without weights has SDXL's configurations and tokenizers, and nothing else. A
folder of the same name may also lie beside a checkpoint."""
SOURCE_FILE = "source.json"
"""Written by builder.download_weights: the name, and where base, vae and refiner come from."""
DIGEST_BYTES = 2**20
PUBLISHED_HASHES = {
    # Of sd_xl_base_1.0.safetensors, which has the weights of the folders beside it.
    "stabilityai/stable-diffusion-xl-base-1.0": "31e35c80fc",
}


@dataclass(frozen=True)
class ModelDir:
    """The folders of a model, in diffusers layout; or a single file, and folders that have what it
    lacks."""

    root: Path
    """The folder that is served, or the file."""
    base: Path
    refiner: Path | None
    checkpoint: Checkpoint | None = None
    """The single file. Then `base` has configurations and tokenizers for it."""
    vae: Path | None = None
    """`VAE_DIR`, a folder or a file, in place of the model's own VAE."""
    prediction_type: PredictionType | None = None
    """`PREDICTION_TYPE`, in place of what the model's files tell."""

    def folder(self, network: Network) -> Path:
        """The folder of one network. In diffusers' layout, a base alone, there is no "base"."""
        if network == NETWORKS["vae"] and self.vae is not None and self.vae.is_dir():
            return self.vae
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
        files: dict[str, list[Path]] = {}
        for name, network in self.networks().items():
            if name == "vae" and self.vae is not None and self.vae.is_file():
                files[name] = [self.vae]
            elif self.checkpoint is not None and self.folder(network) != self.vae:
                files[name] = [self.checkpoint.path]
            else:
                files[name] = _weight_files(self.folder(network), half_precision=half_precision)
        return files

    def prefix(self, network: str) -> str:
        """What the names of a network's tensors begin with in its weight files."""
        of_vae_dir = network == "vae" and self.vae is not None
        return PREFIXES[network] if self.checkpoint is not None and not of_vae_dir else ""

    def config_changes(self, network: str) -> Mapping[str, Any]:
        """What replaces values of a network's configuration."""
        if network == "vae" and self.vae is not None:
            # A single file may be the original VAE of SDXL, which overflows in fp16.
            return {"force_upcast": True} if self.vae.is_file() else {}
        return self.checkpoint.config_changes.get(network, {}) if self.checkpoint else {}

    def configs(self) -> dict[str, str]:
        """The text of each network's configuration, and of what replaces some of it.

        Raises:
            ModelError: a network has none.
        """
        return {
            name: _text(self.folder(network) / "config.json")
            + (json.dumps(changes) if (changes := self.config_changes(name)) else "")
            for name, network in self.networks().items()
        }

    @property
    def name(self) -> str:
        """The name on the hub, where that is known; otherwise the folder's."""
        if self.checkpoint is not None:
            return self.root.stem
        if source := self._source():
            return str(source["name"])
        if self.root.parent.name == "snapshots":
            return _repo_name(self.root.parent.parent)
        return self.root.name

    @property
    def hash(self) -> str | None:
        """The "Model hash" by which Civitai and others find a model: the first ten hex digits of
        SHA-256 of its single file. None: the model is no single file, or nothing has computed it
        yet: `file_hash.hash_in_background` does.
        """
        if sha256 := self.sha256:
            return sha256[:10]
        return None if self.checkpoint else PUBLISHED_HASHES.get(self.name.lower())

    @property
    def sha256(self) -> str | None:
        """Of its single file, or of the one that it was converted from. None: it is neither, or
        nothing has computed it yet."""
        if self.checkpoint is not None:
            return known_hash(self.checkpoint.path)
        base = self._source().get("base") or {}
        return str(base["sha256"]) if "sha256" in base else None

    def revision(self) -> str:
        """Identifies the weights: by commits of the hub, or by a digest of the files.

        The digest is over the size, head and tail of each weight file: reading all of them would
        take longer than loading.
        """
        if self.vae is not None:
            of_vae = _digest(sorted(_files_of(self.vae)), self.vae.parent)
            return f"{replace(self, vae=None).revision()}, vae {of_vae}"
        if self.checkpoint is not None:
            return _digest([self.root], self.root.parent)
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
        # Folder by folder: a walk through the root would pass by one that is a link.
        folders = [self.folder(network) for network in self.networks().values()]
        files = sorted(path for folder in folders for path in _files_of(folder))
        return _digest(files, self.root)

    def _source(self) -> dict[str, Any]:
        path = self.root / SOURCE_FILE
        if not path.is_file():
            return {}
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelError(f"MODEL_DIR: {path} cannot be read: {error}") from error


def find_model_dir(settings: Settings) -> ModelDir:
    """The model to serve, with the VAE of `VAE_DIR` and by `PREDICTION_TYPE`.

    Raises:
        ModelError: `MODEL_DIR` or `VAE_DIR` names none, or there is none, or the choice is not
            clear; the message says what was looked for.
    """
    found = with_vae(_find(settings), settings.vae_dir)
    return replace(found, prediction_type=settings.prediction_type)


def with_vae(model_dir: ModelDir, vae: Path | None) -> ModelDir:
    """
    Args:
        vae: `VAE_DIR`.

    Raises:
        ModelError: it is no VAE.
    """
    if vae is None:
        return model_dir
    if vae.is_file():
        check_vae_file(vae)
    elif not (vae / "config.json").is_file():
        raise ModelError(
            f"VAE_DIR: {vae} must be a folder in diffusers layout, with the config.json of a VAE, "
            "or a .safetensors file"
        )
    return replace(model_dir, vae=vae)


def open_model(path: Path) -> ModelDir | None:
    """The model of a single file, or in a folder: in this worker's layout, in diffusers', or in the
    hub's cache. None: there is no model.

    Raises:
        ModelError: the file is no SDXL base, or nothing here has configurations for it.
    """
    if not path.is_file():
        return _open(path)
    checkpoint = read_checkpoint(path)
    return ModelDir(path, _configs_for(checkpoint), None, checkpoint)


def _find(settings: Settings) -> ModelDir:
    if settings.model_dir is None:
        return _first_there_is()
    found = open_model(settings.model_dir) or _cached(str(settings.model_dir))
    if found is None:
        in_cache = _names(_cached_models())
        raise ModelError(
            f"MODEL_DIR: {settings.model_dir} must be a folder that holds base/ (and refiner/, if "
            "there is one) or model_index.json in diffusers layout, a .safetensors checkpoint, or "
            "an org/name in "
            f"{PLATFORM_CACHE}, which holds {in_cache or 'no SDXL model'}"
        )
    log.info("MODEL_DIR is %s: serving %s", settings.model_dir, found.root)
    return found


def _configs_for(checkpoint: Checkpoint) -> Path:
    """The first base, of those that are known, whose networks have the shapes of a checkpoint's.

    Raises:
        ModelError: there is none.
    """
    layout = layout_of_checkpoint(checkpoint.header.shapes)
    path = checkpoint.path
    beside = path.parent / CONFIGS_DIR.name
    places = [BAKED_MODEL_DIR, CONFIGS_DIR, beside, *_cached_repos(), EMBEDDED_MODEL_DIR]
    for place in places:
        found = _open(place)
        if found is not None and layout_of_folder(found.base) == layout:
            log.info("%s: configurations and tokenizers are those of %s", path.name, found.base)
            return found.base
    if layout == SDXL:
        raise ModelError(
            f"MODEL_DIR: {path} has weights alone, and none of {BAKED_MODEL_DIR}, {CONFIGS_DIR}, "
            f"{beside} and {PLATFORM_CACHE} has SDXL's configurations and tokenizers: take an "
            "image that has them (MODEL=none, or with SDXL's weights), or run python -m "
            f"builder.download_weights --configs --to {beside}"
        )
    if layout.text_width == SDXL.text_width and layout.transformer_blocks < SDXL.transformer_blocks:
        raise ModelError(
            f"MODEL_DIR: {path} is an SDXL with fewer blocks ({layout.transformer_blocks} "
            f"transformer blocks, not {SDXL.transformer_blocks}), as SSD-1B and Segmind-Vega: take "
            "its folder in diffusers layout"
        )
    raise ModelError(
        f"MODEL_DIR: {path} has networks of other shapes than SDXL's: take its folder in diffusers "
        "layout, if there is one"
    )


def _files_of(place: Path) -> list[Path]:
    return [place] if place.is_file() else list(place.glob("*.safetensors"))


def _digest(files: Iterable[Path], root: Path) -> str:
    """Over size, head and tail of each file, and where it lies in `root`."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(root)} {path.stat().st_size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(DIGEST_BYTES))
            file.seek(-min(DIGEST_BYTES, path.stat().st_size), os.SEEK_END)
            digest.update(file.read())
    return f"sha256:{digest.hexdigest()[:16]}"


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
