"""Files go to the caller's or the owner's storage, and do not hold the end of the worker."""

import contextlib

from sdxl_worker.errors import RequestError
from sdxl_worker.field_types import OutputFormat
from sdxl_worker.outputs.files import MEDIA_TYPES
from sdxl_worker.outputs.upload import Destination, UploadFailure, check_storage, upload
from sdxl_worker.serving.ending import not_holding_the_end


async def store(
    files: list[bytes], output_format: OutputFormat, storage: Destination, job_id: str
) -> list[str | UploadFailure]:
    """Of each file its link, or why there is none."""
    outcomes: list[str | UploadFailure] = [UploadFailure("the worker was told to end")] * len(files)
    with contextlib.suppress(RequestError):  # what is made still reaches the caller
        async with not_holding_the_end("the upload"):
            await upload(
                files,
                MEDIA_TYPES[output_format],
                output_format,
                storage,
                job_id,
                outcomes=outcomes,
            )
    return outcomes


async def storage_checked(storage: Destination) -> str:
    """For the report of `check`: what `check_storage` finds."""
    try:
        async with not_holding_the_end("the storage"):
            return await check_storage(storage)
    except RequestError:
        return "not checked: the worker was told to end"
