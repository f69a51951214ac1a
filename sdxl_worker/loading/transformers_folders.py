"""Networks that the owner has in transformers layout: a folder of config.json and safetensors."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_worker.errors import BrokenFilesError

if TYPE_CHECKING:
    import torch


def check_folder(folder: Path, setting: str) -> None:
    """
    Raises:
        BrokenFilesError: it is no such folder.
    """
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise BrokenFilesError(
            f"{setting}: {folder} must be a folder in transformers layout, with config.json and "
            "*.safetensors in it"
        )


def numbers_in(folder: Path, setting: str) -> int:
    """How many numbers the weights have.

    Raises:
        BrokenFilesError: a file cannot be read.
    """
    check_folder(folder, setting)
    from sdxl_worker.loading.companions import count_numbers  # imports torch

    return count_numbers(folder.glob("*.safetensors"), setting)


def load_folder(kind: Any, folder: Path, setting: str, dtype: "torch.dtype") -> Any:
    """The network on the host, ready for inference. Nothing is downloaded, and no code that comes
    with the weights is run.

    Args:
        kind: its class in transformers, or one of the automatic classes.
        setting: whose folder it is, for messages.

    Raises:
        BrokenFilesError: it cannot be loaded, or a part of its weights is missing.
    """
    check_folder(folder, setting)
    try:
        network, found = kind.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # of many kinds, about a file that may be anything
        told = str(error).strip().partition("\n")[0]
        raise BrokenFilesError(f"{setting}: {folder} cannot be loaded: {told}") from None
    # transformers would go on with random numbers in their place.
    wrong = sorted(found["missing_keys"]) + sorted(str(one) for one in found["mismatched_keys"])
    if wrong:
        raise BrokenFilesError(
            f"{setting}: the weights in {folder} lack {len(wrong)} of what config.json tells of, "
            f"{wrong[0]} among them"
        )
    return network.eval().requires_grad_(False)
