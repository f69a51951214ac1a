"""What a job needs beside the models: control pictures, pictures as prompts, upscalers.

It is found before anything is fetched, and loaded on the GPU thread when the job's turn comes.
"""

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from sdxl_worker.drawing.control import Control
from sdxl_worker.drawing.enlarging import OnTile, enlarger
from sdxl_worker.drawing.image_prompts import ImagePrompt
from sdxl_worker.drawing.stages import upscaled_size_px
from sdxl_worker.drawing.steering import NO_STEERING, Steering
from sdxl_worker.inputs.canvas import Enlarge
from sdxl_worker.inputs.references import References
from sdxl_worker.loading.controlnets import ControlNetFiles, find_controlnet
from sdxl_worker.loading.ip_adapters import IpAdapterFiles, find_ip_adapter
from sdxl_worker.loading.models import Models
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


def find_beside(request: Request, settings: Settings) -> Beside:
    """
    Raises:
        RequestError: the worker has not got what the request asks for.
    """
    return Beside(
        controlnets=tuple(
            find_controlnet(one.type, settings.controlnet_dir, f"controlnet[{i}].type")
            for i, one in enumerate(request.controlnet or ())
        ),
        ip_adapters=tuple(
            find_ip_adapter(one.type, settings.ip_adapter_dir, f"ip_adapter[{i}].type")
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
    )


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
    return ()


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
