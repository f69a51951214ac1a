"""Attack the worker in every way at hand, and tell what held.

Real workers with the embedded model, on the local endpoint, against callers, picture servers and
a platform that misbehave; and its validation, decoding and fetching in this process. The exit
status is 1 where anything broke.

    python -m benchmarks.attack
    python -m benchmarks.attack --quick --kinds validation addresses
"""

import argparse
import asyncio
import itertools
import logging
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import common
from benchmarks.attack import (
    adapters_on_workers,
    hostile_adapters,
    hostile_addresses,
    hostile_pictures,
    in_process,
    on_workers,
)
from benchmarks.attack.hostile_adapters import HostileFile
from benchmarks.attack.tally import Tally, table, write
from sdxl_worker.errors import RequestError
from sdxl_worker.inputs.adapter_files import fetch_adapters
from sdxl_worker.inputs.decode import decode, decode_mask
from sdxl_worker.inputs.fetch import fetch
from sdxl_worker.outputs.upload import UploadFailure, destination, upload
from sdxl_worker.request import parse_request
from sdxl_worker.settings import Settings

FIELD = "image_url"
# They would lead the worker's fetches elsewhere.
PROXIES = ("http_proxy", "https_proxy", "all_proxy")


def kinds(*, quick: bool, seed: int) -> dict[str, tuple[str, Callable[[Tally], None]]]:
    """What can be attacked: its name in the table, and how."""
    pictures = hostile_pictures
    return {
        "validation": (
            "fuzzed inputs, validated",
            lambda tally: in_process.attack_validation(
                tally, parse_request, count=2_000 if quick else 20_000, seed=seed
            ),
        ),
        "decoding": (
            "odd and damaged pictures, decoded",
            lambda tally: in_process.attack_decoding(
                tally, lambda data: decode(data, FIELD), pictures.small_pictures()
            ),
        ),
        "masks-decoding": (
            "the same as masks, decoded",
            lambda tally: in_process.attack_decoding_of_masks(
                tally, lambda data: decode_mask(data, "mask_url"), pictures.small_pictures()
            ),
        ),
        "addresses": (
            "private and special addresses, fetched from",
            lambda tally: in_process.attack_addresses(
                tally, lambda url: asyncio.run(fetch(url, FIELD)), hostile_addresses.addresses()
            ),
        ),
        "uploads": (
            "private and special addresses, uploaded to",
            lambda tally: in_process.attack_addresses(tally, put, hostile_addresses.addresses()),
        ),
        "adapters": (
            "hostile LoRAs and embeddings, put on and off",
            lambda tally: attack_networks(
                tally, itertools.islice(hostile_adapters.files(), 20 if quick else None)
            ),
        ),
        "adapter-addresses": (
            "private and special addresses, LoRAs fetched from",
            lambda tally: in_process.attack_addresses(
                tally, fetch_adapter, hostile_addresses.addresses()
            ),
        ),
        "jobs": (
            "good and bad jobs through real workers",
            lambda tally: on_workers.attack_with_jobs(tally, count=20 if quick else 300, seed=seed),
        ),
        "pictures": (
            "bombs and odd pictures through a real worker",
            lambda tally: on_workers.attack_with_pictures(
                tally, pictures.odd_modes() if quick else pictures.all_pictures()
            ),
        ),
        "masks": (
            "the same and odd masks through a real worker",
            lambda tally: on_workers.attack_with_pictures(
                tally,
                itertools.chain(pictures.odd_masks(), () if quick else pictures.all_pictures()),
                "mask_url",
                on_workers.UNDER_MASK,
            ),
        ),
        "server": (
            "a hostile picture server",
            lambda tally: on_workers.attack_with_a_picture_server(
                tally, *([("good", "missing", "html", "drip")] if quick else [])
            ),
        ),
        "storage": (
            "a hostile server at presigned addresses",
            lambda tally: on_workers.attack_with_storage(
                tally, *([("good", "missing", "html", "redirect-loop")] if quick else [])
            ),
        ),
        "adapter-files": (
            "the same LoRAs, and names that lead elsewhere, through a real worker",
            lambda tally: adapters_on_workers.attack_with_adapter_files(
                tally, list(itertools.islice(hostile_adapters.files(), 20 if quick else None))
            ),
        ),
        "adapter-server": (
            "a hostile server of LoRAs",
            lambda tally: adapters_on_workers.attack_with_an_adapter_server(
                tally, *([("lora", "lora-cut", "html", "lora-in-drips")] if quick else [])
            ),
        ),
        "platform": (
            "a platform in trouble",
            lambda tally: on_workers.attack_as_the_platform(
                tally, on_workers.TROUBLES[:3] if quick else on_workers.TROUBLES
            ),
        ),
    }


def put(url: str) -> str:
    """Upload something to an address.

    Raises:
        RequestError: it is not possible.
    """
    request = parse_request({"prompt": "a red circle", "upload_urls": [url]})
    where: Any = destination({}, request, Settings())
    [stored] = asyncio.run(upload([b"a picture"], "image/png", "png", where, "job"))
    if isinstance(stored, UploadFailure):
        raise RequestError(stored.cause)
    return stored


def fetch_adapter(url: str) -> object:
    """A LoRA from an address, over TLS, for others are not asked at all.

    Raises:
        RequestError: it is not possible.
    """
    url = re.sub("^http:", "https:", url, flags=re.IGNORECASE)
    field = "loras[0].path"
    return asyncio.run(fetch_adapters({field: url}, Settings(), lambda *_: None))


def attack_networks(tally: Tally, files: Iterable[HostileFile]) -> None:
    # Imported here, for torch takes seconds.
    from benchmarks.attack.own_networks import OwnNetworks

    with tempfile.TemporaryDirectory() as folder:
        networks = OwnNetworks(Path(folder))
        in_process.attack_adapters(tally, networks.put_on, networks.digest, files)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(kinds(quick=True, seed=0))
    parser.add_argument("--kinds", nargs="+", choices=names, default=names, metavar="KIND",
                        help=f"of {', '.join(names)} (default: all)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (default: 0)")
    parser.add_argument("--quick", action="store_true", help="few of each")
    parser.add_argument("--out", type=Path, help=f"a folder (all of it: {common.RESULTS_DIR})")
    arguments = parser.parse_args()
    for name in PROXIES:
        os.environ.pop(name, None)
        os.environ.pop(name.upper(), None)

    chosen = kinds(quick=arguments.quick, seed=arguments.seed)
    tallies: list[Tally] = []
    for name in arguments.kinds:
        words, attack = chosen[name]
        with tqdm(desc=words, unit=" inputs", dynamic_ncols=True) as bar:
            tallies.append(tally := Tally(words, tick=bar.update))
            # Of what is attacked in this process, whose warnings are what should come.
            logging.disable(logging.WARNING)
            try:
                attack(tally)
            finally:
                logging.disable(logging.NOTSET)
        for line in tally.breaks[:5]:
            print(f"  broke: {line}")
    is_whole = arguments.kinds == names and not arguments.quick
    if out := arguments.out or (common.RESULTS_DIR if is_whole else None):
        write(tallies, out / "attack.json", arguments.seed)
    print(table(tallies))
    return int(any(tally.breaks for tally in tallies))


if __name__ == "__main__":
    sys.exit(main())
