"""The command line: `python -m builder.download_weights --to DIR [--base X] [--refiner Y]`."""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from builder.download_weights import DownloadError
from builder.download_weights.half_precision import store_as_fp16
from builder.download_weights.single_file import convert
from builder.download_weights.sources import (
    CHECKPOINT_DIR,
    Source,
    configs_source,
    find_source,
    pinned,
)
from builder.download_weights.transfer import (
    Download,
    download_all,
    file_sha256,
    without_query,
)

SOURCE_FILE = "source.json"
PLAN_FILE = "plan.json"
NO_REFINER = "none"
CONFIGS = "configurations alone"


def download_weights(to: Path, base: str | None = None, refiner: str | None = None) -> None:
    """Make `to` a folder that `MODEL_DIR` can name. Until it is complete, it does not exist.

    Args:
        base: as `find_source` takes it. `CONFIGS`, for a folder that serves no model: it has what
            single-file checkpoints lack.

    Raises:
        DownloadError: it cannot be made; the message says why and what to do.
    """
    asked = {"base": _printable(base), "refiner": _printable(refiner)}
    if _is_complete(to, asked):
        print(f"{to} is complete already")
        return
    sources = {"base": configs_source() if base == CONFIGS else find_source(base, "base")}
    if refiner != NO_REFINER:
        sources["refiner"] = find_source(refiner, "refiner")
    downloads = [file for source in sources.values() for file in source.downloads]

    partial = to.with_name(to.name + ".partial")
    _begin(partial, downloads)
    _check_space(partial, downloads, sources)
    download_all(downloads, partial)
    described = {
        role: about for source in sources.values() for role, about in source.described.items()
    }
    for role, source in sources.items():
        if source.checkpoint is not None:
            checkpoint = partial / source.checkpoint  # a local one is an absolute path, and stays
            print(f"converting {source.name}", file=sys.stderr, flush=True)
            convert(checkpoint, role, partial / role, source.name)
            described[role] = {**(described[role] or {}), "sha256": file_sha256(checkpoint)}
    shutil.rmtree(partial / CHECKPOINT_DIR, ignore_errors=True)
    _store_weights(partial, downloads)

    record = {"name": sources["base"].name, "refiner": None, **described, "asked": asked}
    _write_json(partial / SOURCE_FILE, record)
    (partial / PLAN_FILE).unlink()
    for path in partial.rglob("*"):
        # safetensors lets only the owner read its files, and a container may run as another user.
        path.chmod(0o755 if path.is_dir() else 0o644)
    partial.rename(to)
    print(
        f"{to} is complete: {', '.join(f'{role} {_short(it)}' for role, it in described.items())}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    table = pinned()
    parser = argparse.ArgumentParser(
        prog="python -m builder.download_weights",
        description="Fetches the weights that an image serves into a new folder. A run that was "
        "cut off is resumed by the same command.",
        epilog="HF_TOKEN is used for gated and private models, HF_ENDPOINT for mirrors.",
    )
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="the folder to make")
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="org/name[@revision] of the hub, in diffusers layout, or path or address of a "
        ".safetensors checkpoint, after which #sha256=... is checked "
        f"(default: {table['base']['repo']}, pinned, with {table['vae']['repo']})",
    )
    parser.add_argument(
        "--refiner",
        metavar="MODEL",
        help=f"likewise, or {NO_REFINER} (default: {table['refiner']['repo']}, pinned)",
    )
    parser.add_argument(
        "--configs",
        action="store_true",
        help="configurations and tokenizers of the pinned base alone, a few MB: what a worker "
        "needs to serve single-file checkpoints from a volume",
    )
    options = parser.parse_args(arguments)
    # A build argument that is not given arrives as an empty string.
    base, refiner = options.base or None, options.refiner or None
    if options.configs:
        if base or refiner:
            parser.error("--configs: not beside --base and --refiner")
        base, refiner = CONFIGS, NO_REFINER
    try:
        download_weights(options.to.absolute(), base, refiner)
    except DownloadError as error:
        sys.exit(f"The weights cannot be fetched. {error}")
    except OSError as error:
        sys.exit(f"The weights cannot be fetched. {error}")
    except KeyboardInterrupt:
        sys.exit("Interrupted. The same command goes on where this one ended.")


def _printable(reference: str | None) -> str | None:
    is_url = reference is not None and reference.startswith(("http://", "https://"))
    return without_query(reference) if is_url and reference else reference


def _is_complete(to: Path, asked: dict[str, str | None]) -> bool:
    if to.is_mount():
        raise DownloadError(f"--to {to}: is a mount point; name a folder in it, to be made there")
    if not to.exists() or (to.is_dir() and not any(to.iterdir())):
        return False
    record = to / SOURCE_FILE
    if not record.is_file():
        raise DownloadError(f"--to {to}: exists and was not made here; name another folder")
    made = json.loads(record.read_text(encoding="utf-8"))
    if made["asked"] != asked:
        raise DownloadError(
            f"--to {to}: holds another model, {made['name']}; remove it or name another folder"
        )
    return True


def _begin(partial: Path, downloads: list[Download]) -> None:
    """Go on with what a run for the same files left; discard what any other left."""
    plan = [file.identity for file in downloads]
    file = partial / PLAN_FILE
    if partial.exists() and (
        not file.is_file() or json.loads(file.read_text(encoding="utf-8")) != plan
    ):
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    _write_json(file, plan)


def _check_space(partial: Path, downloads: list[Download], sources: dict[str, Source]) -> None:
    """For what is still to come, the largest copy in fp16, and the files made of checkpoints."""
    missing = sum((file.size_bytes or 0) - file.bytes_in(partial) for file in downloads)
    wide = [
        (file.size_bytes or 0) // 2
        for file in downloads
        if file.path.endswith(".safetensors") and ".fp16" not in file.path
    ]
    checkpoints = [
        (partial / source.checkpoint).stat().st_size
        if source.checkpoint.is_absolute()
        else source.downloads[0].size_bytes or 0
        for source in sources.values()
        if source.checkpoint is not None
    ]
    needed = missing + max(wide, default=0) + sum(checkpoints)
    free = shutil.disk_usage(partial).free
    if needed > free:
        raise DownloadError(
            f"{partial.parent}: {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free: "
            "make room, or name a folder on another disk with --to"
        )


def _store_weights(folder: Path, downloads: list[Download]) -> None:
    groups: dict[str, list[Path]] = {}
    for file in downloads:
        path = folder / file.path
        if file.path.endswith(".safetensors") and path.is_file():
            groups.setdefault(file.stored_as, []).append(path)
    for stored_as, paths in groups.items():
        store_as_fp16(paths, folder / stored_as)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _short(about: dict[str, str] | None) -> str:
    about = about or {}
    name = about.get("repo") or about.get("file") or about.get("url") or "none"
    return f"{name} {(about.get('revision') or about.get('sha256') or '')[:12]}".strip()


if __name__ == "__main__":
    main()
