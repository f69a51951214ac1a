"""What to fetch: SDXL 1.0 by the pinned table, a model of the hub, or a single-file checkpoint."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.utils import get_session, hf_raise_for_status

from builder.download_weights import DownloadError
from builder.download_weights.single_file import check_channels
from builder.download_weights.transfer import (
    TIMEOUT_SECONDS,
    Download,
    file_sha256,
    headers_for,
    patiently,
    without_query,
)

PINNED = Path(__file__).with_name("sdxl.json")
CHECKPOINT_DIR = "checkpoint"
# The stem of the weight files' names, by folder.
WEIGHTS = {
    "text_encoder": "model",
    "text_encoder_2": "model",
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
}
TOKENIZER_FILES = ("vocab.json", "merges.txt")
OTHER_TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")

Role = Literal["base", "refiner"]


@dataclass(frozen=True)
class Source:
    """Where a base or a refiner comes from."""

    described: dict[str, dict[str, str] | None]
    """For source.json, by role: base, vae, refiner."""
    downloads: list[Download]
    checkpoint: Path | None = None
    """A single file to convert; relative to the model's folder where it is downloaded first."""
    name: str = ""


def pinned() -> dict[str, Any]:
    """The table's models: base, vae, refiner, each with repo, revision, folder and files."""
    return json.loads(PINNED.read_text(encoding="utf-8"))["models"]


def find_source(reference: str | None, role: Role) -> Source:
    """What `--base` or `--refiner` means. None: that of SDXL 1.0.

    Raises:
        DownloadError: there is no such model, or it is not SDXL.
    """
    table = pinned()[role]
    if reference is None or reference in (table["repo"], f"{table['repo']}@{table['revision']}"):
        return _pinned_source(role)
    if re.match(r"https?://", reference):
        return _url_source(reference, role)
    if reference.partition("#")[0].endswith((".safetensors", *PICKLES)):
        return _file_source(reference, role)
    if match := re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", reference):
        return _hub_source(match[1], match[2], role)
    raise DownloadError(
        f"--{role} {reference}: must be org/name or org/name@revision of the hub, or the path or "
        "address of a .safetensors file"
    )


def configs_source() -> Source:
    """What single-file checkpoints lack: SDXL 1.0's configurations and tokenizers."""
    return Source({"base": None}, _configs("base"), name=pinned()["base"]["repo"])


# --- SDXL 1.0 ----------------------------------------------------------------------------------


def _pinned_source(role: Role) -> Source:
    models = ["base", "vae"] if role == "base" else ["refiner"]
    return Source(
        described={name: _at(pinned()[name]) for name in models},
        downloads=[file for name in models for file in _pinned_files(name)],
        name=pinned()[role]["repo"],
    )


def _pinned_files(model: str, *, weights: bool = True) -> list[Download]:
    table = pinned()[model]
    entries = [
        entry for entry in table["files"] if weights or not entry["file"].endswith(".safetensors")
    ]
    sizes = (
        {file.rfilename: file.size for file in hub_files(table["repo"], table["revision"])[1]}
        if any(entry["bytes"] is None for entry in entries)
        else {}
    )
    return [
        _hub_download(
            table["repo"],
            table["revision"],
            entry["file"],
            folder=table["folder"],
            size_bytes=entry["bytes"] or sizes.get(entry["file"]),
            sha256=entry["sha256"],
        )
        for entry in entries
    ]


def _at(table: dict[str, Any]) -> dict[str, str]:
    return {"repo": table["repo"], "revision": table["revision"]}


# --- another model of the hub ------------------------------------------------------------------


def _hub_source(repo: str, revision: str | None, role: Role) -> Source:
    """A model in diffusers layout. It keeps its own VAE, which may have been trained with it."""
    commit, files = hub_files(repo, revision)
    sizes = {file.rfilename: file.size for file in files}
    digests = {file.rfilename: file.lfs.sha256 for file in files if file.lfs}
    what = f"{repo}@{revision}" if revision else repo

    def required(file: str) -> str:
        if file not in sizes:
            raise DownloadError(f"{what}: {file} is missing, so it is no SDXL in diffusers layout")
        return file

    _check_index(hub_json(repo, commit, required("model_index.json")), what, role)
    unet = hub_json(repo, commit, required("unet/config.json"))
    check_channels(unet.get("in_channels"), role, what)
    wanted = ["model_index.json"]
    folders = ["unet"]
    if role == "base":
        wanted.append(required("scheduler/scheduler_config.json"))
        for tokenizer in ("tokenizer", "tokenizer_2"):
            wanted += [required(f"{tokenizer}/{name}") for name in TOKENIZER_FILES]
            others = [f"{tokenizer}/{name}" for name in OTHER_TOKENIZER_FILES]
            wanted += [name for name in others if name in sizes]
        folders = list(WEIGHTS)
    for folder in folders:
        wanted.append(required(f"{folder}/config.json"))
        wanted += weight_files(sizes, f"{folder}/{WEIGHTS[folder]}", what)
    return Source(
        described={role: {"repo": repo, "revision": commit}},
        downloads=[
            _hub_download(repo, commit, file, role, sizes[file], digests.get(file))
            for file in wanted
        ],
        name=repo,
    )


def weight_files(files: Iterable[str], stem: str, what: str) -> list[str]:
    """The files of a network: the fp16 variant where there is one, whole or in shards.

    Args:
        stem: of their names, with the folder.

    Raises:
        DownloadError: there are none, or some are missing.
    """
    place = f"{stem.rpartition('/')[0]}/ has" if "/" in stem else "it has"
    stem, number = re.escape(stem), r"(\d+)-of-(\d+)"
    for pattern in (
        rf"{stem}\.fp16\.safetensors",
        rf"{stem}\.fp16-{number}\.safetensors",
        rf"{stem}-{number}\.fp16\.safetensors",
        rf"{stem}\.safetensors",
        rf"{stem}-{number}\.safetensors",
    ):
        found = [match for name in sorted(files) if (match := re.fullmatch(pattern, name))]
        if found:
            shards = int(found[0][2]) if found[0].re.groups else 1
            if len(found) != shards:
                raise DownloadError(f"{what}: {place} {len(found)} of {shards} shards")
            return [match[0] for match in found]
    raise DownloadError(f"{what}: {place} no .safetensors weights, the only kind taken")


def _check_index(index: dict[str, Any], what: str, role: Role) -> None:
    kind = str(index.get("_class_name"))
    encoders = [bool((index.get(name) or [None])[0]) for name in ("text_encoder", "text_encoder_2")]
    if not kind.startswith("StableDiffusionXL") or not encoders[1]:
        raise DownloadError(f"{what}: is a {kind}, not an SDXL model")
    if role == "base" and not encoders[0]:
        raise DownloadError(f"{what}: has one text encoder only: it is a refiner, not a base")
    if role == "refiner" and encoders[0]:
        raise DownloadError(f"{what}: has two text encoders: it is a base, not a refiner")


def hub_files(repo: str, revision: str | None) -> tuple[str, list[Any]]:
    """The commit of a revision (None: of the main branch), and its files with sizes and digests.

    Raises:
        DownloadError: there is no such repository or revision, or no answer.
    """
    info = patiently(
        lambda: HfApi().model_info(
            repo, revision=revision, files_metadata=True, timeout=TIMEOUT_SECONDS
        ),
        f"{repo}@{revision}" if revision else repo,
    )
    return info.sha or "", info.siblings or []


def hub_json(repo: str, commit: str, file: str) -> dict[str, Any]:
    """
    Raises:
        DownloadError: it is not there, or is no JSON.
    """
    url = hf_hub_url(repo, file, revision=commit)

    def ask() -> dict[str, Any]:
        response = get_session().get(url, headers=headers_for(url), timeout=TIMEOUT_SECONDS)
        hf_raise_for_status(response)
        return response.json()

    try:
        return patiently(ask, without_query(url))
    except ValueError:
        raise DownloadError(f"{without_query(url)}: is not JSON") from None


def _hub_download(
    repo: str,
    revision: str,
    file: str,
    folder: str,
    size_bytes: int | None,
    sha256: str | None,
) -> Download:
    path = f"{folder}/{file}"
    return Download(
        url=hf_hub_url(repo, file, revision=revision),
        path=path,
        size_bytes=size_bytes,
        sha256=sha256,
        stored_as=_fp16_name(path) if path.endswith(".safetensors") else path,
    )


def _fp16_name(path: str) -> str:
    folder = path.rpartition("/")[0]
    return f"{folder}/{WEIGHTS[folder.rpartition('/')[2]]}.fp16.safetensors"


# --- a single-file checkpoint ------------------------------------------------------------------


def _file_source(reference: str, role: Role) -> Source:
    name, sha256 = _split_digest(reference)
    path = Path(name)
    _check_suffix(path.name)
    if not path.is_file():
        raise DownloadError(f"--{role} {path}: there is no such file")
    if sha256 is not None and file_sha256(path) != sha256:
        raise DownloadError(f"--{role} {path}: its SHA-256 is not the one after the #")
    return Source({role: {"file": path.name}}, _configs(role), path.absolute(), path.stem)


def _url_source(reference: str, role: Role) -> Source:
    url, sha256 = _split_digest(reference)
    name = Path(unquote(urlsplit(url).path)).name or urlsplit(url).netloc
    _check_suffix(name)
    size_bytes, etag = patiently(lambda: _probe(url), without_query(url))
    path = f"{CHECKPOINT_DIR}/{role}.safetensors"
    download = Download(url, path, size_bytes, sha256, stored_as=path, etag=etag)
    name = name.removesuffix(".safetensors")
    return Source(
        {role: {"url": without_query(url)}}, [download, *_configs(role)], Path(path), name
    )


def _configs(role: Role) -> list[Download]:
    """A checkpoint holds weights alone: configurations and vocabularies are those of SDXL 1.0."""
    models = ["base", "vae"] if role == "base" else ["refiner"]
    return [file for model in models for file in _pinned_files(model, weights=False)]


def _split_digest(reference: str) -> tuple[str, str | None]:
    """The digest is given as for pip: `https://host/model.safetensors#sha256=<64 digits>`."""
    name, hash_sign, fragment = reference.partition("#")
    match = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", fragment)
    if hash_sign and not match:
        raise DownloadError(f"{without_query(name)}: after # must be sha256= and 64 hex digits")
    return name, match[1].lower() if match else None


def _check_suffix(name: str) -> None:
    if name.endswith(PICKLES):
        raise DownloadError(
            f"{name}: is a pickle, which can run any code when it is read: take the "
            ".safetensors file of the same model"
        )


def _probe(url: str) -> tuple[int | None, str | None]:
    """Size and ETag, by a request for the first bytes: signed addresses often refuse HEAD."""
    headers = headers_for(url) | {"Range": "bytes=0-8"}
    with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT_SECONDS) as response:
        hf_raise_for_status(response)
        first = next(response.iter_bytes(9), b"")
    if first[8:9] != b"{":
        raise DownloadError(
            f"{without_query(url)}: is no safetensors file (a page to log in, perhaps, or a pickle)"
        )
    whole = response.headers.get("Content-Range", "").rpartition("/")[2]
    size = whole if response.status_code == 206 else response.headers.get("Content-Length", "")
    return int(size) if size.isdigit() else None, response.headers.get("ETag")
