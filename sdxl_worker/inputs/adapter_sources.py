"""What a request's `path` of an adapter means: a file of LORA_DIR, of the Hub, of Civitai, or any
address.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from sdxl_worker.inputs import connections
from sdxl_worker.settings import Settings
from sdxl_worker.wording import shown, without_secrets

SUFFIX = ".safetensors"
# The name that diffusers and the training scripts of the Hub give to a LoRA.
HUB_DEFAULT = f"pytorch_lora_weights{SUFFIX}"
HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
# One service under several names; accounts and tokens are the same for all.
CIVITAI = ("https://civitai.com", "https://civitai.red", "https://civitai.green")
# Of a Civitai address, what may be told: which of a version's files is meant.
CIVITAI_CHOICE = ("type", "format", "size", "fp", "fileId")
COMMIT = re.compile("[0-9a-f]{40}")
HUB_PATH = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+?)(/(?P<file>[^@\\]+))?(@(?P<revision>[\w./-]+))?", re.ASCII
)
HUB_LINK = re.compile(
    r"/(?P<repo>[\w.-]+/[\w.-]+)"
    r"(/(blob|resolve|raw|tree)/(?P<revision>refs/\w+/\w+|[^/]+)(/(?P<file>.+))?)?/?",
    re.ASCII,
)
MAX_LISTED = 20

PATH_FORMS = (
    "send an https:// address, org/repo or org/repo/file of the Hub, or a file name in the "
    "worker's LORA_DIR"
)


class SourceError(Exception):
    """There is no such file, or it cannot be had. The message is for the caller, to be put after
    "FIELD: "; it holds no secret, and nothing of an address but what `without_secrets` leaves."""


@dataclass(frozen=True)
class LocalFile:
    path: Path
    name: str
    """Below LORA_DIR."""


@dataclass(frozen=True)
class RemoteFile:
    address: str = field(repr=False)
    """Of the file; or, with `listing`, of a JSON text that tells which file it is."""
    name: str
    """The address without its secrets, or how a request names the file."""
    is_pinned: bool = False
    """Whether the address always has the same file."""
    listing: Literal["hub", "civitai"] | None = None


def find_source(path: str, settings: Settings) -> LocalFile | RemoteFile:
    """
    Raises:
        SourceError: the path names nothing.
    """
    if local := _local(path, settings.lora_dir):
        return local
    if "://" in path:
        return _of_address(path, settings)
    if path.startswith("/") or ".." in path.split("/"):
        raise SourceError(
            f"no absolute path and no .. may be in it; {PATH_FORMS}; got {shown(path)}"
        )
    match = HUB_PATH.fullmatch(path)
    if match and (match["revision"] or "").endswith(SUFFIX):
        raise SourceError("its revision must stand at the end: send org/repo/file@revision")
    if match and (match["file"] or not match["repo"].endswith(SUFFIX)):
        return _of_hub(match["repo"], match["file"], match["revision"], settings)
    raise SourceError(_not_there(path, settings.lora_dir))


def chosen(source: RemoteFile, listing: Any, settings: Settings) -> RemoteFile:
    """The file that a listing tells.

    Args:
        listing: what JSON the address of `source` gave.

    Raises:
        SourceError: none, or not one alone.
    """
    try:
        if source.listing == "civitai":
            version = int(listing["modelVersions"][0]["id"])
            return _of_civitai(origin_of(source.address), f"/api/download/models/{version}", "")
        names = [str(file["rfilename"]) for file in listing["siblings"]]
    except (TypeError, KeyError, IndexError, ValueError):
        raise SourceError(f"{source.name} has no files; send another") from None
    repo, _, revision = source.name.partition("@")
    files = [name for name in names if name.endswith(SUFFIX)]
    if len(files) > 1 and HUB_DEFAULT in files:
        files = [HUB_DEFAULT]
    if not files:
        raise SourceError(f"the repository {source.name} has no {SUFFIX} file; send another")
    if len(files) > 1:
        raise SourceError(
            f"the repository {source.name} has several files; send org/repo/file with one of "
            f"{_listed(files)}"
        )
    return _of_hub(repo, files[0], revision or None, settings)


# --- LORA_DIR ----------------------------------------------------------------------------------


def _local(name: str, folder: Path | None) -> LocalFile | None:
    """A file of the folder, or of a folder in it. Links that lead out of it are not followed."""
    if folder is None or name.startswith("/") or ".." in name.split("/"):
        return None
    try:
        path = (folder / name).resolve(strict=True)
        if path.is_file() and path.is_relative_to(folder.resolve()):
            return LocalFile(path, name)
    # Not there, too long, a link that leads to itself (before Python 3.13), or with a zero byte.
    except (OSError, RuntimeError, ValueError):
        pass
    return None


def _not_there(name: str, folder: Path | None) -> str:
    if folder is None:
        return f"no such file: this worker has no LORA_DIR; {PATH_FORMS}; got {shown(name)}"
    if _is_link(folder, name):
        return (
            f"{shown(name)} is a link that leads out of LORA_DIR, or nowhere, and is not followed; "
            "its owner should put the file itself there"
        )
    names = sorted(
        str(path.relative_to(folder))
        for path in folder.rglob(f"*{SUFFIX}")
        if _local(str(path.relative_to(folder)), folder)
    )
    # Without what all have in common, which would make all of them near.
    stems = {one.removesuffix(SUFFIX).lower(): one for one in names}
    near = difflib.get_close_matches(name[:200].removesuffix(SUFFIX).lower(), stems)
    hint = f"did you mean {_listed([stems[stem] for stem in near])}? " if near else ""
    there = f"there are {_listed(names)}" if names else f"it has no {SUFFIX} files"
    return f"LORA_DIR has no such file; {hint}{there}; got {shown(name)}"


def _is_link(folder: Path, name: str) -> bool:
    if name.startswith("/") or ".." in name.split("/"):
        return False
    try:
        return (folder / name).is_symlink()
    except (OSError, ValueError):
        return False


def _listed(names: Sequence[str]) -> str:
    more = len(names) - MAX_LISTED
    listed = ", ".join(shown(name).strip('"') for name in names[:MAX_LISTED])
    return f"{listed} and {more} more" if more > 0 else listed


# --- addresses ---------------------------------------------------------------------------------


def _of_address(address: str, settings: Settings) -> RemoteFile:
    try:
        connections.url(address)
        if not may_be_asked(address, settings):
            raise SourceError("its address must begin with https://")
        parts, origin = urlsplit(address), origin_of(address)
    except ValueError:
        raise SourceError("not an address that can be used; correct it") from None
    if is_civitai(origin):
        return _of_civitai(origin, parts.path, parts.query)
    match = HUB_LINK.fullmatch(unquote(parts.path))
    is_hub = origin == hub_origin(settings) or parts.hostname in HUB_HOSTS
    if is_hub and match and not match["repo"].startswith(("api/", "datasets/", "spaces/")):
        return _of_hub(match["repo"], match["file"], match["revision"], settings)
    return RemoteFile(address.partition("#")[0], without_secrets(address))


def _of_hub(repo: str, file: str | None, revision: str | None, settings: Settings) -> RemoteFile:
    at = f"@{revision}" if revision else ""
    is_pinned = COMMIT.fullmatch(revision or "") is not None
    endpoint = settings.hf_endpoint.rstrip("/")
    if file is None:
        asked = f"/revision/{quote(revision, safe='')}" if revision else ""
        address = f"{endpoint}/api/models/{repo}{asked}"
        return RemoteFile(address, f"{repo}{at}", is_pinned, listing="hub")
    address = f"{endpoint}/{repo}/resolve/{quote(revision or 'main', safe='')}/{quote(file)}"
    return RemoteFile(address, f"{repo}/{file}{at}", is_pinned)


def _of_civitai(origin: str, path: str, query: str) -> RemoteFile:
    given = dict(parse_qsl(query))
    if match := re.fullmatch(r"/models/(\d+)(/[^/]*)?/?", path, re.ASCII):
        version = given.get("modelVersionId", "")
        if not version:
            name = f"{origin}/models/{match[1]}"
            return RemoteFile(f"{origin}/api/v1/models/{match[1]}", name, listing="civitai")
        if not re.fullmatch(r"\d+", version, re.ASCII):
            raise SourceError("its modelVersionId must be a number; correct it")
        path, query = f"/api/download/models/{version}", ""
    elif match := re.fullmatch(r"/model-versions/(\d+)/?", path, re.ASCII):
        path, query = f"/api/download/models/{match[1]}", ""
    choice = urlencode([one for one in parse_qsl(query) if one[0] in CIVITAI_CHOICE])
    address = f"{origin}{path}"
    return RemoteFile(_with_query(address, query), _with_query(address, choice))


def _with_query(address: str, query: str) -> str:
    return f"{address}?{query}" if query else address


# --- whose address it is -----------------------------------------------------------------------


def origin_of(address: str) -> str:
    """Scheme, host and port, in one spelling."""
    return str(connections.url(address).origin()).lower()


def hub_origin(settings: Settings) -> str:
    return origin_of(settings.hf_endpoint)


def may_be_asked(address: str, settings: Settings) -> bool:
    """Over http only where private addresses may be: the owner's mirror of the Hub is one."""
    scheme = urlsplit(address).scheme.lower()
    return scheme == "https" or (scheme == "http" and may_be_private(address, settings))


def may_be_private(address: str, settings: Settings) -> bool:
    return connections.are_private_allowed() or origin_of(address) == hub_origin(settings)


def is_civitai(origin: str) -> bool:
    return origin in CIVITAI


def token_for(address: str, settings: Settings) -> str | None:
    """The owner's token, for its own service only: whoever redirects elsewhere does not pass it on.

    A caller who sends a token of their own, in the address, is not given the owner's.
    """
    origin, given = origin_of(address), dict(parse_qsl(urlsplit(address).query))
    tokens: Iterable[tuple[bool, Any]] = (
        (origin == hub_origin(settings), settings.hf_token),
        (is_civitai(origin) and "token" not in given, settings.civitai_token),
    )
    return next((token.get_secret_value() for is_its, token in tokens if is_its and token), None)
