"""What stands beside a model: ControlNets, what makes their maps, IP-Adapters, a safety checker.

Each is some files of one repository of the hub, in a folder of its own.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import hf_hub_url

from builder.download_weights import DownloadError
from builder.download_weights.folders import begin, check_space, finish, is_complete
from builder.download_weights.sources import hub_files, hub_json, weight_files
from builder.download_weights.transfer import Download, download_all, file_sha256

PINNED = Path(__file__).with_name("extras.json")
CONTROLNETS = ("ControlNetModel", "ControlNetUnionModel", "ControlNetModel_Union")
NOTHING = "none"


@dataclass(frozen=True)
class Layout:
    """Of the repositories of a kind, whoever published them."""

    folder: str
    stem: str
    """Of the names of its weight files."""
    configs: tuple[str, ...]
    as_published: bool
    """As `Download` has it."""


LAYOUTS = {
    "controlnet": Layout(
        "controlnets/{name}", "diffusion_pytorch_model", ("config.json",), as_published=False
    ),
    "safety-checker": Layout(
        "safety-checker", "model", ("config.json", "preprocessor_config.json"), as_published=True
    ),
}


@dataclass(frozen=True)
class Extra:
    """One that is asked for; nothing of it is looked up yet."""

    kind: str
    repo: str
    revision: str | None
    folder: str
    """Where it belongs, relative to `--to`."""
    entry: Mapping[str, Any] | None
    """That of the table, which says which files it needs. None: those of its kind's `Layout`."""

    @property
    def name(self) -> str:
        return f"{self.repo}@{self.revision}" if self.revision else self.repo


class Listing(NamedTuple):
    """What the hub tells of a repository."""

    commit: str
    sizes_bytes: dict[str, int]
    digests: dict[str, str]
    """Of large files alone."""


def pinned() -> dict[str, dict[str, Any]]:
    """The table's entries by kind and name, each with repo, revision, licence, folder and files."""
    return json.loads(PINNED.read_text(encoding="utf-8"))["extras"]


def download_extras(to: Path, asked: Mapping[str, str]) -> None:
    """Make the folders in `to` that are not there yet. Until one is complete, it does not exist.

    Args:
        asked: for each kind, names and repositories with commas between them; "" and "none" are
            nothing.

    Raises:
        DownloadError: one cannot be made; the message says why and what to do.
    """
    extras: dict[str, Extra] = {}
    for kind, references in asked.items():
        for reference in filter(None, map(str.strip, references.split(","))):
            if reference != NOTHING:
                extra = find_extra(kind, reference)
                if (other := extras.setdefault(extra.folder, extra)) != extra:
                    raise DownloadError(
                        f"--{kind}: {other.name} and {extra.name} both belong in {extra.folder}: "
                        "take one of them"
                    )
    to.mkdir(parents=True, exist_ok=True)
    for extra in extras.values():
        if not is_complete(to / extra.folder, extra.name):
            _download(to / extra.folder, extra)


def find_extra(kind: str, reference: str) -> Extra:
    """
    Args:
        reference: a name of the table, or org/name, either with @REVISION.

    Raises:
        DownloadError: it is none of these.
    """
    name, _, revision = reference.partition("@")
    for known, entry in pinned()[kind].items():
        if name in (known, entry["repo"]):
            return Extra(kind, entry["repo"], revision or entry["revision"], entry["folder"], entry)
    layout = LAYOUTS.get(kind)
    if layout and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?", reference):
        folder = layout.folder.format(name=name.rpartition("/")[2])
        return Extra(kind, name, revision or None, folder, None)
    names = ", ".join(pinned()[kind])
    raise DownloadError(
        f"--{kind} {reference}: must be {names}"
        + (", or org/name or org/name@revision of the hub" if layout else "")
    )


def _download(folder: Path, extra: Extra) -> None:
    commit, downloads = _of_table(extra, extra.entry) if extra.entry else _of_layout(extra)
    partial = begin(folder, downloads)
    check_space(partial, downloads)
    download_all(downloads, partial)
    record = {
        "name": extra.repo,
        "revision": commit,
        **({"licence": extra.entry["licence"]} if extra.entry else {}),
        "files": {file.path: file.sha256 or file_sha256(partial / file.path) for file in downloads},
        "asked": extra.name,
    }
    finish(partial, folder, downloads, record)
    print(f"{folder} is complete: {extra.repo} {commit[:12]}")


def _of_table(extra: Extra, table: Mapping[str, Any]) -> tuple[str, list[Download]]:
    """Its commit and files: of the pinned revision as the table has them, of another as the hub
    says."""
    entries = table["files"]
    is_pinned = extra.revision == table["revision"]
    commit, sizes, digests = Listing(table["revision"], {}, {})
    if not is_pinned or any(entry["bytes"] is None for entry in entries):
        commit, sizes, digests = _listed(extra)
    downloads = []
    for entry in entries:
        file = entry["file"]
        if not is_pinned and file not in sizes:
            raise DownloadError(f"{extra.name}: {file} is missing")
        size, sha256 = (entry["bytes"], entry["sha256"]) if is_pinned else (None, None)
        stored_as = entry.get("as", file)
        downloads.append(
            Download(
                url=hf_hub_url(extra.repo, file, revision=commit),
                # An archive has a name beside that of the file in it.
                path=Path(file).name if file.endswith(".zip") else stored_as,
                size_bytes=size or sizes.get(file),
                sha256=sha256 or digests.get(file),
                stored_as=stored_as,
                as_published=table.get("as_published", False),
            )
        )
    return commit, downloads


def _of_layout(extra: Extra) -> tuple[str, list[Download]]:
    """Its commit and files, once its configuration is that of what it is to be."""
    layout = LAYOUTS[extra.kind]
    commit, sizes, digests = _listed(extra)
    for file in layout.configs:
        if file not in sizes:
            raise DownloadError(f"{extra.name}: {file} is missing")
    _check(extra, hub_json(extra.repo, commit, "config.json"))
    weights = weight_files(sizes, layout.stem, extra.name)
    if layout.as_published and len(weights) > 1:
        raise DownloadError(f"{extra.name}: its weights are in shards; one file is taken")
    return commit, [
        Download(
            url=hf_hub_url(extra.repo, file, revision=commit),
            path=file,
            size_bytes=sizes[file],
            sha256=digests.get(file),
            stored_as=f"{layout.stem}.safetensors" if file in weights else file,
            as_published=layout.as_published,
        )
        for file in [*layout.configs, *weights]
    ]


def _check(extra: Extra, config: Mapping[str, Any]) -> None:
    """
    Raises:
        DownloadError: the worker has no use for it.
    """
    if extra.kind == "controlnet":
        kind = config.get("_class_name")
        if kind not in CONTROLNETS:
            raise DownloadError(f"{extra.name}: is a {kind}, not a ControlNet in diffusers layout")
        # Micro-conditioning, which of all models with ControlNets only SDXL has.
        if config.get("addition_embed_type") != "text_time":
            raise DownloadError(f"{extra.name}: is a ControlNet of another model, not of SDXL")
    else:
        kinds = config.get("architectures") or ["None"]
        if not str(kinds[0]).endswith("ForImageClassification"):
            raise DownloadError(
                f"{extra.name}: is a {kinds[0]}, not an image classifier in transformers layout"
            )


def _listed(extra: Extra) -> Listing:
    commit, files = hub_files(extra.repo, extra.revision)
    sizes = {file.rfilename: file.size for file in files}
    return Listing(commit, sizes, {file.rfilename: file.lfs.sha256 for file in files if file.lfs})
