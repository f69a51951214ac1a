"""Folders that appear whole: what is fetched for one lies in `NAME.partial` until all is there."""

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

from builder.download_weights import DownloadError
from builder.download_weights.half_precision import store_as_fp16
from builder.download_weights.transfer import Download

SOURCE_FILE = "source.json"
PLAN_FILE = "plan.json"


def is_complete(folder: Path, asked: object) -> bool:
    """Whether it was made by a run that asked for the same.

    Raises:
        DownloadError: it was not made here, or holds something else.
    """
    if folder.is_mount():
        raise DownloadError(
            f"--to {folder}: is a mount point; name a folder in it, to be made there"
        )
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    record = folder / SOURCE_FILE
    if not record.is_file():
        raise DownloadError(f"--to {folder}: exists and was not made here; name another folder")
    made = json.loads(record.read_text(encoding="utf-8"))
    if made["asked"] != asked:
        raise DownloadError(
            f"--to {folder}: holds another model, {made['name']}; remove it or name another folder"
        )
    print(f"{folder} is complete already")
    return True


def begin(folder: Path, downloads: list[Download]) -> Path:
    """The folder to download to. What a run for the same files left there stays; what any other
    left is discarded."""
    partial = folder.with_name(folder.name + ".partial")
    plan = [file.identity for file in downloads]
    file = partial / PLAN_FILE
    if partial.exists() and (
        not file.is_file() or json.loads(file.read_text(encoding="utf-8")) != plan
    ):
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    _write_json(file, plan)
    return partial


def check_space(partial: Path, downloads: list[Download], made_bytes: int = 0) -> None:
    """For what is still to come, the largest copy in fp16, and other files that will be made.

    Raises:
        DownloadError: the disk has not enough.
    """
    missing = sum((file.size_bytes or 0) - file.bytes_in(partial) for file in downloads)
    wide = [
        (file.size_bytes or 0) // 2
        for file in downloads
        if file.path.endswith(".safetensors") and ".fp16" not in file.path
    ]
    archives = [file.size_bytes or 0 for file in downloads if file.path.endswith(".zip")]
    needed = missing + max(wide, default=0) + max(archives, default=0) + made_bytes
    free = shutil.disk_usage(partial).free
    if needed > free:
        raise DownloadError(
            f"{partial.parent}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free: "
            "make room, or name a folder on another disk with --to"
        )


def finish(partial: Path, folder: Path, downloads: list[Download], record: dict[str, Any]) -> None:
    """Store what was downloaded as it belongs, with a record of it, and give the folder its name.

    Raises:
        DownloadError: a file is not what its name says.
    """
    _store_weights(partial, downloads)
    for file in downloads:
        if file.path.endswith(".zip") and (partial / file.path).is_file():
            _unpack(partial / file.path, partial / file.stored_as)
    _write_json(partial / SOURCE_FILE, record)
    (partial / PLAN_FILE).unlink()
    for path in partial.rglob("*"):
        # safetensors lets only the owner read its files, and a container may run as another user.
        path.chmod(0o755 if path.is_dir() else 0o644)
    partial.rename(folder)


def _store_weights(folder: Path, downloads: list[Download]) -> None:
    groups: dict[str, list[Path]] = {}
    for file in downloads:
        path = folder / file.path
        if file.path.endswith(".safetensors") and path.is_file() and not file.as_published:
            groups.setdefault(file.stored_as, []).append(path)
    for stored_as, paths in groups.items():
        store_as_fp16(paths, folder / stored_as)


def _unpack(archive: Path, target: Path) -> None:
    """The one file of that kind in an archive; its name there is not used."""
    try:
        with zipfile.ZipFile(archive) as opened:
            [member] = [one for one in opened.namelist() if one.endswith(target.suffix)]
            unfinished = target.with_name(target.name + ".unfinished")
            with opened.open(member) as source, unfinished.open("wb") as output:
                shutil.copyfileobj(source, output, 2**20)
    except (zipfile.BadZipFile, ValueError) as error:
        raise DownloadError(f"{archive.name}: has not one {target.suffix} file: {error}") from error
    unfinished.replace(target)
    archive.unlink()


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
