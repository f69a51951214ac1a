"""Depth maps, as ControlNets for depth were trained with: what is near is white."""

import torch
from PIL import Image

from sdxl_worker.loading.companions import at_work
from sdxl_worker.placement import Placement

# Depth Anything V2: https://huggingface.co/depth-anything/Depth-Anything-V2-Small-hf, in its
# preprocessor_config.json. The patches have 14 pixels, and the shorter side is as in training.
_SIDE_PX, _PATCH_PX = 518, 14
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# A strip of a picture would have as many tokens as it is long.
_MOST_SIDE_PX = 4 * _SIDE_PX
_FLAT = 1e-4


@torch.no_grad()
def depth_map(picture: Image.Image, network: torch.nn.Module, placement: Placement) -> Image.Image:
    """
    Args:
        picture: RGB.
        network: as `DepthFiles.load` returns it.

    Returns:
        Grey as RGB, of the picture's size: white at the nearest point, black at the furthest. All
        black if the network sees no depth.
    """
    resized = picture.resize(_size_seen(picture.size), Image.Resampling.BICUBIC)
    width, height = resized.size
    pixels = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8)
    pixels = pixels.reshape(1, height, width, 3).permute(0, 3, 1, 2).float() / 255
    mean, deviation = (torch.tensor(each)[None, :, None, None] for each in (_MEAN, _DEVIATION))
    pixels = (pixels - mean) / deviation
    with at_work(network, placement):
        seen = pixels.to(placement.device, next(network.parameters()).dtype)
        nearness = network(pixel_values=seen).predicted_depth.float().cpu()
    nearness = torch.nn.functional.interpolate(
        nearness[:, None], (picture.height, picture.width), mode="bicubic", align_corners=False
    )[0, 0]
    nearness = nearness.nan_to_num(0, 0, 0)
    furthest, nearest = nearness.aminmax()
    span = nearest - furthest
    if span <= _FLAT * nearest.abs():  # what is left is rounding
        return Image.new("RGB", picture.size)
    levels = (255 * (nearness - furthest) / span).round().to(torch.uint8)
    return Image.fromarray(levels.numpy()).convert("RGB")


def _size_seen(size: tuple[int, int]) -> tuple[int, int]:
    """Width and height that the network gets."""
    scale = min(_SIDE_PX / min(size), _MOST_SIDE_PX / max(size))
    width, height = (max(_PATCH_PX, round(side * scale / _PATCH_PX) * _PATCH_PX) for side in size)
    return width, height
