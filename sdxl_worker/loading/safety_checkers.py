"""The image classifier of `SAFETY_CHECKER`. Its judgement is a guess."""

import functools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sdxl_worker.errors import ModelError
from sdxl_worker.loading.safety_labels import SETTING, flags
from sdxl_worker.loading.transformers_folders import load_folder, numbers_in
from sdxl_worker.placement import Placement

# At once: a batch of 16 pictures would take memory that drawing did not need.
_BATCH = 4
# Half precision might overflow in a classifier that was trained without it, and what is not judged
# is not sent.
_DTYPE = torch.float32


@dataclass(frozen=True)
class SafetyCheckerFiles:
    """`CompanionFiles` of the safety checker."""

    folder: Path

    @property
    def key(self) -> Hashable:
        return self.folder

    @property
    def title(self) -> str:
        return "the safety checker"

    def size_bytes(self, dtype: torch.dtype) -> int:  # noqa: ARG002
        return numbers_in(self.folder, SETTING) * _DTYPE.itemsize

    def load(self, placement: Placement) -> torch.nn.Module:
        # Only a worker with this setting pays for the import.
        from transformers import AutoModelForImageClassification

        network = load_folder(AutoModelForImageClassification, self.folder, SETTING, _DTYPE)
        labels = {int(i): str(label) for i, label in network.config.id2label.items()}
        flagged = flags([labels[i] for i in sorted(labels)], self.folder)
        processor_of(self.folder)  # what cannot prepare pictures cannot judge any
        checker = SafetyChecker(network, flagged)
        return checker.to(placement.device) if placement.resident else checker

    def prepared(
        self, pictures: Sequence[Image.Image], check: Callable[[], None] = lambda: None
    ) -> torch.Tensor:
        """What `SafetyChecker.flags` takes, on the CPU. It takes up to seconds: not for the GPU
        thread.

        Args:
            pictures: RGB, of any size.
            check: called before each. If it raises, so does this.
        """
        processor = processor_of(self.folder)
        pixels = []
        for picture in pictures:
            check()
            pixels.append(processor(images=picture, return_tensors="pt")["pixel_values"])
        return torch.cat(pixels)


@functools.lru_cache(maxsize=1)
def processor_of(folder: Path) -> Any:
    """What prepares pictures for the classifier in a folder.

    Raises:
        ModelError: it cannot be made.
    """
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(
            folder, backend="pil", local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # of many kinds
        told = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"{SETTING}: preprocessor_config.json in {folder} cannot be used: {told}"
        ) from None


class SafetyChecker(torch.nn.Module):
    """A classifier that knows its labels."""

    def __init__(self, network: torch.nn.Module, flagged: Sequence[bool]) -> None:
        """
        Args:
            flagged: of each label, whether a picture of that label is flagged.
        """
        super().__init__()
        self.network = network
        self._flagged = list(flagged)

    @torch.no_grad()
    def flags(self, pixels: torch.Tensor, check: Callable[[], None] = lambda: None) -> list[bool]:
        """Of each picture, whether the likeliest label is one that is flagged.

        Args:
            pixels: [pictures, 3, height, width], as `SafetyCheckerFiles.prepared` gives them.
            check: called before each batch. If it raises, so does this.

        Raises:
            ArithmeticError: the network gives numbers that are not finite.
        """
        flags: list[bool] = []
        weights = next(self.network.parameters())
        for batch in pixels.split(_BATCH):
            check()
            logits = self.network(batch.to(weights.device, weights.dtype)).logits
            if not bool(torch.isfinite(logits).all()):
                raise ArithmeticError("logits that are not finite")
            flags += [self._flagged[i] for i in logits.argmax(dim=-1).tolist()]
        return flags
