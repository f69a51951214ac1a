"""What a job needs beside the models: control pictures, pictures as prompts, upscalers.

It is found before anything is fetched, and loaded on the GPU thread when the job's turn comes.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from sdxl_worker.drawing.control import Control
from sdxl_worker.drawing.depth_maps import depth_map
from sdxl_worker.drawing.enlarging import OnTile, enlarger
from sdxl_worker.drawing.image_prompts import ImagePrompt, tokens_of_picture
from sdxl_worker.drawing.stages import upscaled_size_px
from sdxl_worker.drawing.steering import NO_STEERING, Steering
from sdxl_worker.errors import RequestError
from sdxl_worker.field_types import FINISHED_MAPS, ControlName
from sdxl_worker.inputs.control_maps import PoseFiles, check_installed
from sdxl_worker.inputs.masks import Mask
from sdxl_worker.inputs.references import REPAINT_NEEDS_A_MASK, References
from sdxl_worker.loading.companions import CompanionFiles
from sdxl_worker.loading.controlnets import ControlNetFiles, find_controlnet, types_of_controlnets
from sdxl_worker.loading.ip_adapters import FILES as IP_ADAPTER_TYPES
from sdxl_worker.loading.ip_adapters import IpAdapterFiles, find_ip_adapter
from sdxl_worker.loading.models import Models
from sdxl_worker.loading.offload import send_home
from sdxl_worker.loading.preprocessors import DepthFiles, find_depth, find_pose
from sdxl_worker.loading.upscalers import UpscalerFiles, find_upscaler, names_of_upscalers
from sdxl_worker.request import Request
from sdxl_worker.request_objects import ControlField, ImagePromptField
from sdxl_worker.serving.start import put_beside
from sdxl_worker.settings import Settings

OnLoading = Callable[[str], None]

# Fields, for messages.
HIRES_UPSCALER, UPSCALER = "hires.upscaler", "upscale.upscaler"
# Of the upscalers' names in a report.
MAX_NAMES_BYTES = 200


@dataclass(frozen=True)
class Beside:
    """The files, in the order of the request's lists."""

    controlnets: tuple[ControlNetFiles, ...] = ()
    ip_adapters: tuple[IpAdapterFiles, ...] = ()
    hires_upscaler: UpscalerFiles | None = None
    upscaler: UpscalerFiles | None = None
    depth: DepthFiles | None = None
    pose: PoseFiles | None = None
    """What makes maps, where one is to be made."""


def find_beside(request: Request, settings: Settings, models: Models) -> Beside:
    """
    Args:
        models: that are drawn with.

    Raises:
        RequestError: the worker has not got what the request asks for.
    """
    return Beside(
        controlnets=tuple(
            find_controlnet(
                one.type, settings.controlnet_dir, f"controlnet[{i}].type", models.unet.config
            )
            for i, one in enumerate(request.controlnet or ())
        ),
        ip_adapters=tuple(
            find_ip_adapter(one.type, settings.ip_adapter_dir, f"ip_adapter[{i}].type", models.unet)
            for i, one in enumerate(request.ip_adapter or ())
        ),
        hires_upscaler=find_upscaler(request.hires.upscaler, settings.upscaler_dir, HIRES_UPSCALER)
        if request.hires
        else None,
        upscaler=find_upscaler(request.upscale.upscaler, settings.upscaler_dir, UPSCALER)
        if request.upscale
        else None,
        **_preprocessors(request, settings),
    )


def _preprocessors(request: Request, settings: Settings) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for i, one in enumerate(request.controlnet or ()):
        field = f"controlnet[{i}].type"
        if not one.preprocess:
            continue
        if (files := _preprocessor(one.type, settings, field)) is not None:
            found[one.type] = files
        if one.type == "repaint" and not request.is_masked:
            raise RequestError(f"{field}: {REPAINT_NEEDS_A_MASK}")
    return found


def _preprocessor(
    kind: ControlName, settings: Settings, field: str = ""
) -> DepthFiles | PoseFiles | None:
    """The files of what makes maps of a type. None: it needs none.

    Raises:
        RequestError: they, or a package, are not there.
    """
    check_installed(kind, field)
    if kind == "depth":
        return find_depth(settings.controlnet_dir, field)
    if kind == "pose":
        return find_pose(settings.controlnet_dir, field)
    return None


def what_is_there(settings: Settings, models: Models) -> dict[str, list[str]]:
    """For the report of `check`: what requests with these models may name. It reads folders and
    headers of files."""
    controls = types_of_controlnets(settings.controlnet_dir, models.unet.config)
    return {
        "controlnets": list(controls),
        "preprocessors": [kind for kind in controls if _makes_maps(kind, settings)],
        "ip_adapters": [kind for kind in IP_ADAPTER_TYPES if _has_adapter(kind, settings, models)],
        "upscalers": _in_short(names_of_upscalers(settings.upscaler_dir)),
    }


def _makes_maps(kind: ControlName, settings: Settings) -> bool:
    try:
        _preprocessor(kind, settings)
    except RequestError:
        return False
    return kind not in FINISHED_MAPS


def _has_adapter(kind: str, settings: Settings, models: Models) -> bool:
    try:
        find_ip_adapter(kind, settings.ip_adapter_dir, "", models.unet)
    except RequestError:
        return False
    return True


def _in_short(names: list[str]) -> list[str]:
    """As many of the names as the report has room for."""
    count = len(names)
    while len(json.dumps(names[:count])) > MAX_NAMES_BYTES:
        count -= 1
    more = [f"and {len(names) - count} more"] if count < len(names) else []
    return names[:count] + more


def with_depth_maps(
    request: Request, beside: Beside, references: References, models: Models, on_loading: OnLoading
) -> References:
    """With maps in the place of the pictures that these are made of on the GPU. On its thread.

    Raises:
        RequestError: the network for it cannot be loaded.
    """
    wanted = [
        i
        for i, one in enumerate(request.controlnet or ())
        if one.type == "depth" and one.preprocess and (one.scale > 0 or request.return_maps)
    ]
    if not wanted or beside.depth is None:
        return references
    fields = [f"controlnet[{wanted[0]}].type"]
    [network] = put_beside(models, [beside.depth], on_loading, fields)
    controls = list(references.controls)
    for i in wanted:
        controls[i] = depth_map(controls[i], network, models.placement)
    return replace(references, controls=tuple(controls))


def steering_of(
    request: Request,
    beside: Beside,
    references: References,
    models: Models,
    on_loading: OnLoading,
    check: Callable[[], None],
) -> Steering:
    """On the GPU thread. What will enlarge the finished pictures is loaded too: where that fails,
    nothing has been drawn for nothing.

    Raises:
        RequestError: something cannot be loaded.
    """
    asked = _asked(request, beside, references)
    if not asked.fields:
        enlarge = enlarger(None, models.placement, check) if request.hires else None
        return Steering(enlarge=enlarge) if enlarge else NO_STEERING
    if asked.image_prompts and not models.placement.resident:
        send_home(models.networks().values())  # an encoder has the card for itself
    # All in one call: none of them may have to go for another.
    files, fields = list(asked.fields), list(asked.fields.values())
    networks = dict(zip(files, put_beside(models, files, on_loading, fields), strict=True))
    upscaler = networks[beside.hires_upscaler] if beside.hires_upscaler else None
    return Steering(
        controls=tuple(
            Control(networks[files], files.mode, picture, field.scale, field.start, field.end)
            for field, files, picture in asked.controls
        ),
        image_prompts=tuple(
            _image_prompt(field, networks[files], networks[files.encoder], picture, mask, models)
            for field, files, picture, mask in asked.image_prompts
        ),
        enlarge=enlarger(upscaler, models.placement, check) if request.hires else None,
    )


@dataclass(frozen=True)
class _Asked:
    """What counts: of the fields' entries those whose scale is not 0, with their files and
    pictures."""

    controls: list[tuple[ControlField, ControlNetFiles, Image.Image]]
    image_prompts: list[tuple[ImagePromptField, IpAdapterFiles, Image.Image, Mask | None]]
    fields: dict[CompanionFiles, str]
    """By what is to be loaded: of the request, that which asks for it first."""


def _asked(request: Request, beside: Beside, references: References) -> _Asked:
    controls, image_prompts = [], []
    asked: list[tuple[CompanionFiles | None, str]] = []
    for i, control in enumerate(
        zip(request.controlnet or (), beside.controlnets, references.controls, strict=True)
    ):
        if control[0].scale > 0:
            controls.append(control)
            asked.append((control[1], f"controlnet[{i}].type"))
    for i, prompt in enumerate(
        zip(
            request.ip_adapter or (),
            beside.ip_adapters,
            references.image_prompts,
            references.image_prompt_masks,
            strict=True,
        )
    ):
        if prompt[0].scale > 0:
            image_prompts.append(prompt)
            field = f"ip_adapter[{i}].type"
            asked += [(prompt[1], field), (prompt[1].encoder, field)]
    asked.append((beside.hires_upscaler, HIRES_UPSCALER))
    asked.append((beside.upscaler, UPSCALER))
    fields: dict[CompanionFiles, str] = {}
    for files, field in asked:
        if files is not None:
            fields.setdefault(files, field)
    return _Asked(controls, image_prompts, fields)


def _image_prompt(
    field: ImagePromptField,
    adapter: Any,
    encoder: Any,
    picture: Image.Image,
    mask: Mask | None,
    models: Models,
) -> ImagePrompt:
    tokens = tokens_of_picture(picture, encoder, adapter, models.placement)
    return ImagePrompt(adapter, tokens, field.type, field.scale, mask)


def upscaled(
    request: Request,
    beside: Beside,
    pictures: list[Image.Image],
    models: Models,
    on_loading: OnLoading,
    check: Callable[[], None],
    on_tile: OnTile,
) -> list[Image.Image]:
    """The finished pictures, as `request.upscale` asks for them. On the GPU thread, or anywhere for
    Lanczos.

    Args:
        on_tile: as `enlarger`, of all pictures together.

    Raises:
        RequestError: the upscaler cannot be loaded.
        PictureError: it gives no picture.
    """
    if request.upscale is None:
        return pictures
    network = None
    if beside.upscaler is not None:
        [network] = put_beside(models, [beside.upscaler], on_loading, [UPSCALER])
    result: list[Image.Image] = []

    def of_all(done: int, tiles: int) -> None:
        on_tile(len(result) * tiles + done, len(pictures) * tiles)

    enlarge = enlarger(network, models.placement, check, of_all)
    for picture in pictures:
        result.append(enlarge(picture, upscaled_size_px(picture.size, request.upscale.factor)))
    return result
