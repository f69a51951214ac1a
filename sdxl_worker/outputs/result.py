"""A job's result: its pictures as links, or in it as far as the platform takes it."""

import json
from collections.abc import Sequence
from typing import Any

from PIL import Image

from sdxl_worker.errors import RequestError
from sdxl_worker.outputs.answer import build_output, data_uri, told_beside
from sdxl_worker.outputs.size_guard import fit, fits_beside_links
from sdxl_worker.outputs.upload import UploadFailure
from sdxl_worker.request import Request
from sdxl_worker.wording import without_secrets


def build_result(
    pictures: list[Image.Image],
    files: list[bytes],
    links: list[str | UploadFailure],
    request: Request,
    job_id: str,
    how: dict[str, Any],
    warnings: list[str],
    wrapping_bytes: int,
    *,
    maps: Sequence[bytes],
    nsfw: Sequence[bool] | None,
) -> dict[str, Any]:
    """Links, and what has none in the answer itself, as long as it fits. That may take seconds: not
    for the event loop.

    Args:
        files: what `encode_pictures` made of the pictures with `how`.
        links: of each file its link, or why there is none. None at all: nothing was stored.
        warnings: what there is to tell beside what becomes of the files.
        wrapping_bytes: how much is put around the answer.
        maps: as `told_beside`, and so is `nsfw`.

    Raises:
        RequestError: it does not.
    """
    images = {i: link for i, link in enumerate(links) if isinstance(link, str)}
    inline = [i for i in range(len(files)) if i not in images]
    cause = next((link.cause for link in links if isinstance(link, UploadFailure)), "")
    if cause:
        warnings = [*warnings, f"{len(inline)} of {len(files)} pictures not uploaded: {cause}"]
    told = told_beside(maps, nsfw)
    maps_bytes = len(json.dumps(told))
    if inline:
        beside: dict[str, Any] = {"images": list(images.values()), "warning": warnings, **told}
        if 0 in images:  # the first picture is not there twice, but its link is
            beside["image_url"] = images[0]
            request = request.model_copy(update={"duplicate_first": False})
        try:
            fitted = fit(
                [pictures[i] for i in inline],
                [files[i] for i in inline],
                request,
                job_id,
                numbers=inline,
                beside_bytes=len(json.dumps(beside)) + wrapping_bytes,
                **how,
            )
        except RequestError as error:
            uploaded = "".join(f"; stored: {without_secrets(link)}" for link in images.values())
            of_maps = f"; return_maps false, by {maps_bytes / 1e6:.1f} MB" if maps else ""
            raise RequestError(
                f"{cause and f'not uploaded: {cause}; '}{error}{of_maps}{uploaded}"
            ) from None
        images |= {
            i: data_uri(file, fitted.output_format)
            for i, file in zip(inline, fitted.files, strict=True)
        }
        warnings = [*warnings, *([fitted.warning] if fitted.warning else [])]
    elif maps and not fits_beside_links(maps_bytes, job_id):
        told = told_beside((), nsfw)
        warnings = [
            *warnings,
            f"maps: {maps_bytes / 1e6:.1f} MB, which the platform would not take: left out",
        ]
    in_order = [images[i] for i in range(len(files))]
    return build_output(in_order, request, warning="; ".join(warnings) or None, beside=told)
