"""What a job needs beside the models: control pictures, pictures as prompts, upscalers.

It is found before anything is fetched, and loaded on the GPU thread when the job's turn comes.
"""

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
from sdxl_worker.inputs.control_maps import PoseFiles, check_installed
from sdxl_worker.inputs.masks import Mask
from sdxl_worker.inputs.references import REPAINT_NEEDS_A_MASK, References
from sdxl_worker.loading.companions import CompanionFiles
from sdxl_worker.loading.controlnets import ControlNetFiles, find_controlnet
from sdxl_worker.loading.ip_adapters import IpAdapterFiles, find_ip_adapter
from sdxl_worker.loading.models import Models
from sdxl_worker.loading.offload import send_home
from sdxl_worker.loading.preprocessors import DepthFiles, find_depth, find_pose
from sdxl_worker.loading.upscalers import UpscalerFiles, find_upscaler
from sdxl_worker.request import ControlField, ImagePromptField, Request
from sdxl_worker.serving.start import put_beside
from sdxl_worker.settings import Settings

OnLoading = Callable[[str], None]


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
        hires_upscaler=find_upscaler(
            request.hires.upscaler, settings.upscaler_dir, "hires.upscaler"
        )
        if request.hires
        else None,
        upscaler=find_upscaler(request.upscale.upscaler, settings.upscaler_dir, "upscale.upscaler")
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
        check_installed(one.type, field)
        if one.type == "depth":
            found["depth"] = find_depth(settings.controlnet_dir, field)
        if one.type == "pose":
            found["pose"] = find_pose(settings.controlnet_dir, field)
        if one.type == "repaint" and not request.is_masked:
            raise RequestError(f"{field}: {REPAINT_NEEDS_A_MASK}")
    return found


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
    [network] = put_beside(models, [beside.depth], on_loading)
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
    """On the GPU thread.

    Raises:
        RequestError: something cannot be loaded.
    """
    asked = _asked(request, beside, references)
    if not asked.files:
        enlarge = enlarger(None, models.placement, check) if request.hires else None
        return Steering(enlarge=enlarge) if enlarge else NO_STEERING
    if asked.image_prompts and not models.placement.resident:
        send_home(models.networks().values())  # an encoder has the card for itself
    # All in one call: none of them may have to go for another.
    networks = dict(zip(asked.files, put_beside(models, asked.files, on_loading), strict=True))
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
    upscaler: UpscalerFiles | None

    @property
    def files(self) -> list[CompanionFiles]:
        adapters = [files for _, files, *_ in self.image_prompts]
        return [
            *(files for _, files, _ in self.controls),
            *adapters,
            *(files.encoder for files in adapters),
            *([self.upscaler] if self.upscaler else []),
        ]


def _asked(request: Request, beside: Beside, references: References) -> _Asked:
    return _Asked(
        controls=[
            one
            for one in zip(
                request.controlnet or (), beside.controlnets, references.controls, strict=True
            )
            if one[0].scale > 0
        ],
        image_prompts=[
            one
            for one in zip(
                request.ip_adapter or (),
                beside.ip_adapters,
                references.image_prompts,
                references.image_prompt_masks,
                strict=True,
            )
            if one[0].scale > 0
        ],
        upscaler=beside.hires_upscaler,
    )


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
    network = put_beside(models, [beside.upscaler], on_loading)[0] if beside.upscaler else None
    result: list[Image.Image] = []

    def of_all(done: int, tiles: int) -> None:
        on_tile(len(result) * tiles + done, len(pictures) * tiles)

    enlarge = enlarger(network, models.placement, check, of_all)
    for picture in pictures:
        result.append(enlarge(picture, upscaled_size_px(picture.size, request.upscale.factor)))
    return result
