"""What a job needs beside the models: control pictures, pictures as prompts, upscalers.

It is found before anything is fetched, and loaded on the GPU thread when the job's turn comes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from sdxl_worker.drawing.control import Control
from sdxl_worker.drawing.depth_maps import depth_map
from sdxl_worker.drawing.enlarging import enlarger
from sdxl_worker.drawing.image_prompts import ImagePrompt, tokens_of_picture
from sdxl_worker.drawing.steering import NO_STEERING, Enlarge, Steering
from sdxl_worker.errors import RequestError
from sdxl_worker.inputs.control_maps import PoseFiles, check_installed
from sdxl_worker.inputs.references import REPAINT_NEEDS_A_MASK, References
from sdxl_worker.loading.controlnets import ControlNetFiles, find_controlnet
from sdxl_worker.loading.ip_adapters import IpAdapterFiles, find_ip_adapter
from sdxl_worker.loading.models import Models
from sdxl_worker.loading.offload import send_home
from sdxl_worker.loading.preprocessors import DepthFiles, find_depth, find_pose
from sdxl_worker.loading.upscalers import UpscalerFiles, find_upscaler
from sdxl_worker.request import Request
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
    if not (request.controlnet or request.ip_adapter or request.hires):
        return NO_STEERING
    return Steering(
        controls=_controls(request, beside, references, models, on_loading),
        image_prompts=_image_prompts(request, beside, references, models, on_loading),
        enlarge=_enlarge(beside.hires_upscaler, models, on_loading, check)
        if request.hires
        else None,
    )


def _controls(
    request: Request,
    beside: Beside,
    references: References,
    models: Models,
    on_loading: OnLoading,
) -> tuple[Control, ...]:
    asked = [
        (field, files, picture)
        for field, files, picture in zip(
            request.controlnet or (), beside.controlnets, references.controls, strict=True
        )
        if field.scale > 0
    ]
    networks = put_beside(models, [files for _, files, _ in asked], on_loading)
    return tuple(
        Control(network, files.mode, picture, field.scale, field.start, field.end)
        for network, (field, files, picture) in zip(networks, asked, strict=True)
    )


def _image_prompts(
    request: Request,
    beside: Beside,
    references: References,
    models: Models,
    on_loading: OnLoading,
) -> tuple[ImagePrompt, ...]:
    asked = [
        (field, files, picture, mask)
        for field, files, picture, mask in zip(
            request.ip_adapter or (),
            beside.ip_adapters,
            references.image_prompts,
            references.image_prompt_masks,
            strict=True,
        )
        if field.scale > 0
    ]
    if not asked:
        return ()
    if not models.placement.resident:
        send_home(models.networks().values())  # the encoder has the card for itself
    adapters = [files for _, files, _, _ in asked]
    # Named again, or they might have to go for these.
    controls = [
        files
        for field, files in zip(request.controlnet or (), beside.controlnets, strict=True)
        if field.scale > 0
    ]
    encoders = [files.encoder for files in adapters]
    networks: list[Any] = put_beside(models, [*adapters, *encoders, *controls], on_loading)
    count = len(asked)
    return tuple(
        ImagePrompt(
            adapter,
            tokens_of_picture(picture, encoder, adapter, models.placement),
            field.type,
            field.scale,
            mask,
        )
        for adapter, encoder, (field, _, picture, mask) in zip(
            networks[:count], networks[count : 2 * count], asked, strict=True
        )
    )


def _enlarge(
    files: UpscalerFiles | None, models: Models, on_loading: OnLoading, check: Callable[[], None]
) -> Enlarge:
    network = put_beside(models, [files], on_loading)[0] if files else None
    return enlarger(network, models.placement, check)


def upscaled(
    request: Request,
    beside: Beside,
    pictures: list[Image.Image],
    models: Models,
    on_loading: OnLoading,
    check: Callable[[], None],
) -> list[Image.Image]:
    """The finished pictures, as `request.upscale` asks for them. On the GPU thread, or anywhere for
    Lanczos."""
    return pictures
