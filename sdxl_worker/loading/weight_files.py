"""The weight files of a model, and reading them into the page cache ahead of time.

Nothing here needs torch, whose import takes longer than a fast disk needs for the first files.
"""

import os
import threading
from collections.abc import Iterable
from pathlib import Path

from sdxl_worker.errors import ModelError
from sdxl_worker.loading.model_dir import ModelDir
from sdxl_worker.loading.networks import NETWORKS

# Linux reads one window of a request and drops the rest; this is the smallest one in use.
READ_AHEAD_BYTES = 128 * 1024


def weight_files(folder: Path, *, half_precision: bool) -> list[Path]:
    """The safetensors files of one network: the fp16 variant where that is all there is, or enough.

    Raises:
        ModelError: the folder holds none.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"MODEL_DIR: {folder} holds no .safetensors file, the only kind loaded")
    fp16_files = [file for file in files if ".fp16." in file.name]
    full_precision_files = [file for file in files if ".fp16." not in file.name]
    use_fp16 = bool(fp16_files) and (half_precision or not full_precision_files)
    return fp16_files if use_fp16 else full_precision_files


def network_files(model_dir: ModelDir, *, half_precision: bool) -> dict[str, list[Path]]:
    """The weight files of each network that the model has.

    Raises:
        ModelError: a network has none.
    """
    return {
        name: weight_files(model_dir.folder(network), half_precision=half_precision)
        for name, network in NETWORKS.items()
        if model_dir.refiner is not None or not network.of_refiner
    }


def read_ahead(files: Iterable[Path]) -> threading.Thread:
    """Have the system read files into its page cache, in a thread that nobody waits for."""
    thread = threading.Thread(target=_advise, args=(list(files),), daemon=True)
    thread.start()
    return thread


def _advise(files: list[Path]) -> None:
    if not hasattr(os, "posix_fadvise"):  # macOS
        return
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            for offset in range(0, file.stat().st_size, READ_AHEAD_BYTES):
                os.posix_fadvise(descriptor, offset, READ_AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)
