"""Pictures become larger: by Lanczos, or by a network, tile by tile."""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image

from sdxl_worker.drawing import second_tries
from sdxl_worker.errors import PictureError, let_go
from sdxl_worker.gpu import free_memory, is_out_of_memory
from sdxl_worker.inputs.canvas import Box, Enlarge
from sdxl_worker.loading.companions import at_work
from sdxl_worker.placement import Placement

# Sides of what a network gets at once. Its activations are those of the larger picture.
TILE_PX = 512
LEAST_TILE_PX = 128
# What a network sees of the tiles beside, on each side, and is cut off again.
OVERLAP_PX = 32

OnTile = Callable[[int, int], None]


def enlarger(
    network: Any | None,
    placement: Placement,
    check: Callable[[], None] = lambda: None,
    on_tile: OnTile = lambda _, __: None,
) -> Enlarge:
    """
    Args:
        network: as `UpscalerFiles.load` returns it; None for Lanczos.
        check: called often. If it raises, so does the enlarging.
        on_tile: called after each tile of a network with how many of the picture's are done, and of
            how many.
    """

    def enlarge(picture: Image.Image, size_px: tuple[int, int]) -> Image.Image:
        """
        Raises:
            PictureError: the network gives no picture, not even in float32.
            torch.OutOfMemoryError: a small tile does not fit.
        """
        check()
        if network is None or picture.size == size_px:
            return picture.resize(size_px, Image.Resampling.LANCZOS)
        with at_work(network, placement), torch.no_grad():
            return _by_network(network, placement.device, picture, size_px, check, on_tile)

    return enlarge


def _by_network(
    network: Any,
    device: torch.device,
    picture: Image.Image,
    size_px: tuple[int, int],
    check: Callable[[], None],
    on_tile: OnTile,
) -> Image.Image:
    """Each part of the larger picture is made by itself, so that no more than that is in memory:
    by the network, and from its size to the one that is asked for by Lanczos."""
    dtype, tile_px = network.dtype, TILE_PX
    result = Image.new("RGB", size_px)
    try:
        while True:
            tiles = list(_tiles(size_px, picture.size, tile_px))
            try:
                for i, tile in enumerate(tiles):
                    check()
                    part = _part(network, device, picture, size_px, tile)
                    result.paste(part, tile[:2])
                    on_tile(i + 1, len(tiles))
            except RuntimeError as error:
                if tile_px <= LEAST_TILE_PX or not is_out_of_memory(error):
                    raise
                let_go(error)
                free_memory()
                second_tries.note("enlarged in smaller tiles")
                tile_px //= 2
            else:
                return result
    finally:
        network.to(dtype)


def _tiles(size_px: tuple[int, int], before_px: tuple[int, int], tile_px: int) -> Iterator[Box]:
    """Parts of the larger picture, made of so many pixels of the smaller one, with the overlap."""
    spans = []
    for side, before in zip(size_px, before_px, strict=True):
        count = 1 if before <= tile_px else math.ceil(before / (tile_px - 2 * OVERLAP_PX))
        borders = [side * i // count for i in range(count + 1)]
        spans.append(list(itertools.pairwise(borders)))
    across, down = spans
    for (top, bottom), (left, right) in itertools.product(down, across):
        yield left, top, right, bottom


def _part(
    network: Any,
    device: torch.device,
    picture: Image.Image,
    size_px: tuple[int, int],
    tile: Box,
) -> Image.Image:
    """
    Args:
        tile: of the larger picture.
    """
    across, down = (before / after for before, after in zip(picture.size, size_px, strict=True))
    used = (tile[0] * across, tile[1] * down, tile[2] * across, tile[3] * down)
    left, top = (max(0, math.floor(place) - OVERLAP_PX) for place in used[:2])
    right, bottom = (
        min(side, math.ceil(place) + OVERLAP_PX)
        for place, side in zip(used[2:], picture.size, strict=True)
    )
    seen = np.array(picture.crop((left, top, right, bottom)))
    pixels = torch.from_numpy(seen).to(device).permute(2, 0, 1)[None].contiguous()
    larger = _pixels(network, pixels)
    box = [
        network.scale * (place - offset)
        for place, offset in zip(used, (left, top, left, top), strict=True)
    ]
    # Rounding must not lead beyond the edge.
    box[2:] = [min(place, side) for place, side in zip(box[2:], larger.size, strict=True)]
    return larger.resize(
        (tile[2] - tile[0], tile[3] - tile[1]),
        Image.Resampling.LANCZOS,
        box=(box[0], box[1], box[2], box[3]),
    )


def _pixels(network: Any, pixels: torch.Tensor) -> Image.Image:
    """
    Args:
        pixels: in 8 bits, [1, 3, height, width].

    Raises:
        PictureError: what comes out are not numbers.
    """
    larger = network(pixels.to(network.dtype) / 255)
    if larger is None and network.dtype != torch.float32:
        second_tries.note("enlarged in float32")
        network.float()  # for the tiles to come as well
        larger = network(pixels.float() / 255)
    if larger is None:
        raise PictureError(
            f"{network.title} gave no picture: numbers that are not finite; take another one, or "
            "lanczos"
        )
    in_8_bits = larger[0].float().mul(255).round().to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(in_8_bits.contiguous().cpu().numpy())
