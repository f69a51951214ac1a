"""The command line: `python -m builder.download_weights --to DIR [--base X] [--refiner Y]` for a
model, `--controlnet X` and others for what stands beside it."""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from builder.download_weights import DownloadError
from builder.download_weights import extras as beside
from builder.download_weights.folders import begin, check_space, finish, is_complete
from builder.download_weights.single_file import convert
from builder.download_weights.sources import (
    CHECKPOINT_DIR,
    Source,
    configs_source,
    find_source,
    pinned,
)
from builder.download_weights.transfer import download_all, file_sha256, without_query

NO_REFINER = "none"
CONFIGS = "configurations alone"
# By option: the folder, and what is in it.
BESIDE = {
    "controlnet": ("controlnets", "what says where things are"),
    "preprocessor": ("controlnets/preprocessors", "what makes maps of pictures"),
    "ip-adapter": ("ip-adapters", "what takes pictures as prompts"),
    "safety-checker": ("safety-checker", "what guesses which pictures are not safe for work"),
}


def download_weights(to: Path, base: str | None = None, refiner: str | None = None) -> None:
    """Make `to` a folder that `MODEL_DIR` can name. Until it is complete, it does not exist.

    Args:
        base: as `find_source` takes it. `CONFIGS`, for a folder that serves no model: it has what
            single-file checkpoints lack.

    Raises:
        DownloadError: it cannot be made; the message says why and what to do.
    """
    asked = {"base": _printable(base), "refiner": _printable(refiner)}
    if is_complete(to, asked):
        return
    sources = {"base": configs_source() if base == CONFIGS else find_source(base, "base")}
    if refiner != NO_REFINER:
        sources["refiner"] = find_source(refiner, "refiner")
    downloads = [file for source in sources.values() for file in source.downloads]

    partial = begin(to, downloads)
    check_space(partial, downloads, sum(_checkpoint_bytes(it) for it in sources.values()))
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

    record = {"name": sources["base"].name, "refiner": None, **described, "asked": asked}
    finish(partial, to, downloads, record)
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
    parser.add_argument(
        "--to",
        type=Path,
        required=True,
        metavar="DIR",
        help="the folder to make; with an option of those beside a model, the one to make it in",
    )
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
    group = parser.add_argument_group(
        "beside a model",
        "Made in --to, such as a network volume. Several with commas between them; none is nothing",
    )
    for kind, (folder, about) in BESIDE.items():
        entries = beside.pinned()[kind]
        known = ", ".join(f"{name} ({entry['repo']}, pinned)" for name, entry in entries.items())
        others = ", or org/name[@revision] of the hub" if kind in beside.LAYOUTS else ""
        group.add_argument(
            f"--{kind}", metavar="NAME", help=f"into {folder}/, {about}: {known}{others}"
        )
    options = parser.parse_args(arguments)
    # A build argument that is not given arrives as an empty string.
    base, refiner = options.base or None, options.refiner or None
    asked = {kind: getattr(options, kind.replace("-", "_")) for kind in BESIDE}
    asked = {kind: names for kind, names in asked.items() if names is not None}
    if asked and (base or refiner or options.configs):
        parser.error(f"--{next(iter(asked))}: not beside --base, --refiner and --configs")
    if options.configs:
        if base or refiner:
            parser.error("--configs: not beside --base and --refiner")
        base, refiner = CONFIGS, NO_REFINER
    try:
        if asked:
            beside.download_extras(options.to.absolute(), asked)
        else:
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


def _checkpoint_bytes(source: Source) -> int:
    """What the files that are made of a single file will take, about."""
    if source.checkpoint is None:
        return 0
    if source.checkpoint.is_absolute():
        return source.checkpoint.stat().st_size
    return source.downloads[0].size_bytes or 0


def _short(about: dict[str, str] | None) -> str:
    about = about or {}
    name = about.get("repo") or about.get("file") or about.get("url") or "none"
    return f"{name} {(about.get('revision') or about.get('sha256') or '')[:12]}".strip()


if __name__ == "__main__":
    main()
