"""Pictures that steer a drawing: control pictures, and pictures as prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from sdxl_worker.errors import ModelError, RequestError
from sdxl_worker.inputs.canvas import Canvas
from sdxl_worker.inputs.control_maps import PoseFiles, canny_map, pose_map, repaint_map
from sdxl_worker.inputs.decoder_process import decode_apart, decode_mask_apart
from sdxl_worker.inputs.fitting import Fit
from sdxl_worker.inputs.masks import Mask
from sdxl_worker.request import Request
from sdxl_worker.request_objects import ControlField

REPAINT_NEEDS_A_MASK = (
    "repaint needs a mask: mask_url, or mask_from_alpha; or send a finished map, black where it is "
    "to be repainted, with preprocess false"
)

# Of a map that is of one colour.
_OF_ONE_COLOUR = {
    "canny": (
        "no edges were found in the picture; send one with clearer outlines, or a finished map "
        "with preprocess false"
    ),
    "repaint": "all of the picture is masked, so nothing of it steers the drawing",
}
_NOTHING_TO_SEE = (
    "the map that was made of the picture is of one colour; send another picture, or a finished "
    "map with preprocess false"
)


@dataclass(frozen=True)
class References:
    """In the order of the request's lists."""

    controls: tuple[Image.Image, ...] = ()
    """RGB, of the size that is drawn: maps, or what maps are made of."""
    image_prompts: tuple[Image.Image, ...] = ()
    """RGB, of any size."""
    image_prompt_masks: tuple[Mask | None, ...] = ()
    """[height, width] of what is drawn: true is where the picture counts. None: everywhere."""


NO_REFERENCES = References()


def addresses_of(request: Request) -> dict[str, str]:
    """Of all pictures of `controlnet` and `ip_adapter`, by their places in the request."""
    addresses = {
        f"controlnet[{i}].image_url": one.image_url
        for i, one in enumerate(request.controlnet or ())
    }
    for i, prompt in enumerate(request.ip_adapter or ()):
        addresses[f"ip_adapter[{i}].image_url"] = prompt.image_url
        if prompt.mask_url is not None:
            addresses[f"ip_adapter[{i}].mask_url"] = prompt.mask_url
    return addresses


async def decode_references(
    request: Request, contents: Mapping[str, bytes], size: tuple[int, int]
) -> dict[str, Any]:
    """The pictures and masks as they were sent, but of this size; pictures that are prompts keep
    their own. Cancelled, it ends the decoder at once.

    Args:
        contents: by places of `addresses_of`, all of them or some.
        size: width and height of the whole picture that is drawn on.

    Returns:
        By the same places, for `references_of`.

    Raises:
        RequestError: one cannot be decoded, or a mask has another shape or is empty.
    """
    decoded: dict[str, Any] = {}
    for field, data in contents.items():
        if field.endswith(".mask_url"):
            fit = Fit(size, size, "stretch")
            decoded[field] = await decode_mask_apart(data, field, fit, repaints=False)
            continue
        is_control = field.startswith("controlnet")
        found = await decode_apart(
            data,
            field,
            height_px=size[1] if is_control else None,
            width_px=size[0] if is_control else None,
            how=request.fit,
            # A prompt is not rounded to what the models can draw: it is for an encoder of its own.
            masked=not is_control,
        )
        decoded[field] = found.picture
    return decoded


def references_of(request: Request, decoded: Mapping[str, Any]) -> References:
    """
    Args:
        decoded: by all places of `addresses_of`, as `decode_references` gives them.
    """
    controls = [f"controlnet[{i}]" for i, _ in enumerate(request.controlnet or ())]
    prompts = [f"ip_adapter[{i}]" for i, _ in enumerate(request.ip_adapter or ())]
    return References(
        tuple(decoded[f"{control}.image_url"] for control in controls),
        tuple(decoded[f"{prompt}.image_url"] for prompt in prompts),
        tuple(decoded.get(f"{prompt}.mask_url") for prompt in prompts),
    )


def prepare_references(
    references: References, request: Request, canvas: Canvas | None, pose: PoseFiles | None
) -> References:
    """The part of them that is drawn on, in its size, and maps as far as the CPU makes them. It
    takes up to seconds: not for the event loop.

    Args:
        references: as `decode_references` returns them.
        pose: if a pose is to be found.

    Raises:
        RequestError: a picture cannot become a map, or a mask has nothing in that part.
    """
    controls = tuple(
        _control(
            one,
            picture if canvas is None else canvas.as_working(picture),
            canvas.mask if canvas is not None else None,
            pose,
            f"controlnet[{i}]",
        )
        if one.scale > 0 or request.return_maps
        else picture  # which nobody sees
        for i, (one, picture) in enumerate(
            zip(request.controlnet or (), references.controls, strict=True)
        )
    )
    masks: list[Mask | None] = []
    for i, mask in enumerate(references.image_prompt_masks):
        if mask is not None and canvas is not None:
            mask = canvas.mask_as_working(mask)
            if not mask.any():
                raise RequestError(
                    f"ip_adapter[{i}].mask_url: nothing of it is white in the part that is painted "
                    "(mask_padding), so the picture would count nowhere; raise mask_padding, or "
                    "leave the mask out"
                )
        masks.append(mask)
    return References(controls, references.image_prompts, tuple(masks))


def warnings_of_maps(request: Request, maps: Sequence[Image.Image]) -> list[str]:
    """What the caller may not expect: a picture of which nothing is left.

    Args:
        maps: of `controlnet`, those that are made on the GPU included.
    """
    return [
        f"controlnet[{i}]: {_OF_ONE_COLOUR.get(one.type, _NOTHING_TO_SEE)}"
        for i, (one, made) in enumerate(zip(request.controlnet or (), maps, strict=True))
        if one.preprocess and one.scale > 0 and made.getcolors(1)
    ]


def _control(
    control: ControlField,
    picture: Image.Image,
    mask: Mask | None,
    pose: PoseFiles | None,
    field: str,
) -> Image.Image:
    if not control.preprocess:
        return picture
    if control.type == "canny":
        return canny_map(picture)
    if control.type == "pose" and pose is not None:
        try:
            return pose_map(picture, pose, f"{field}.image_url")
        except ModelError as error:
            raise RequestError(error.at(f"{field}.type")) from None
    if control.type == "repaint":
        if mask is None:
            raise RequestError(f"{field}.type: {REPAINT_NEEDS_A_MASK}")
        return repaint_map(picture, mask)
    return picture  # a tile is the picture itself; depth is for the GPU
