"""What one file changes in the networks."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sdxl_worker.adapters.lora_formats import Format, decomposed
from sdxl_worker.adapters.tensor_file import TensorFile
from sdxl_worker.errors import RequestError

ParameterName = tuple[str, str]
"""The network, as in `module_names.NETWORKS`, and the parameter's name within it."""


@dataclass(frozen=True)
class Change:
    """What a file does to one weight or bias."""

    format: Format
    keys: Mapping[str, str]
    """The file's keys, by part."""
    factor: float
    """alpha / rank, or what stands for it."""
    magnitude: tuple[str, int] | None
    """For DoRA: the key, and the weight's dimension that it belongs to."""


@dataclass(frozen=True, eq=False)
class Lora:
    """A file that fits the networks, at a scale. Its tensors are read when they are used, from the
    file as it was, which may be removed meanwhile.
    """

    name: str
    """For messages, metadata and logs."""
    sha256: str
    scale: float
    field: str
    """The request's field, for messages."""
    changes: Mapping[ParameterName, Change]
    _file: TensorFile

    def changed(self, parameter: ParameterName, value: torch.Tensor) -> torch.Tensor:
        """A parameter with this LoRA, at its scale.

        DoRA at a part of its strength lies between the weight without and the weight with it, so
        that 0 is off. LyCORIS' own multiplier is another: it leaves the difference of the LoRA
        whole, and rescales less.

        Args:
            value: in fp32; as it is with the LoRAs before this one.

        Raises:
            RequestError: the file cannot be read any more.
        """
        change = self.changes[parameter]
        parts = {part: self._read(key, value.device) for part, key in change.keys.items()}
        difference = change.format.difference(parts, value).reshape(value.shape)
        if change.magnitude is None:
            return value.add_(difference, alpha=self.scale * change.factor)
        key, axis = change.magnitude
        whole = value.add(difference, alpha=change.factor)
        return value.lerp_(decomposed(whole, self._read(key, value.device), axis), self.scale)

    def not_finite(self, parameter: ParameterName) -> str | None:
        """The first key of a change that holds a NaN or an infinity."""
        change = self.changes[parameter]
        keys = [*change.keys.values(), *([change.magnitude[0]] if change.magnitude else [])]
        cpu = torch.device("cpu")
        return next((key for key in keys if not self._read(key, cpu).isfinite().all()), None)

    def _read(self, key: str, device: torch.device) -> torch.Tensor:
        try:
            tensor = self._file.read(key)
        except OSError as error:
            raise RequestError(
                f"{self.field}: {self.name} could not be read ({error.strerror or error}); "
                "send the job again"
            ) from error
        return tensor.to(device).float()
