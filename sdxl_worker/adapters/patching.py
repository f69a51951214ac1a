"""Weights that are changed in place for a list of LoRAs, and put back bit for bit.

In place: whatever holds a weight's address, compiled code and recorded CUDA graphs included, goes
on with the new numbers, and no step takes longer than without a LoRA. All differences are added in
fp32 and rounded once. Subtracting them would not give the weights back, so the originals are kept.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary, ref

import torch

from sdxl_worker.adapters.lora import Lora, ParameterName
from sdxl_worker.adapters.module_names import NETWORKS
from sdxl_worker.errors import RequestError
from sdxl_worker.loading.models import Models
from sdxl_worker.placement import fits

log = logging.getLogger(__name__)

Key = tuple[tuple[str, float], ...]

_patches: "WeakKeyDictionary[torch.nn.Module, Patches]" = WeakKeyDictionary()


def patches_of(models: Models) -> "Patches":
    """The one for these networks; the UNet tells them apart, whatever is added to `models`."""
    unet: torch.nn.Module = models.unet
    if unet not in _patches:
        _patches[unet] = Patches(models)
    return _patches[unet]


def free_bytes(device: torch.device) -> int:
    """Of a GPU's memory, with what torch holds there and does not use."""
    reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reusable


class Patches:
    """What LoRAs have changed in the networks of one model. For one thread, the one that draws.

    Networks may move between the devices; no tensor of theirs is held.
    """

    def __init__(
        self,
        models: Models,
        *,
        fits: Callable[[int, int], bool] = fits,
        free_bytes: Callable[[torch.device], int] = free_bytes,
    ) -> None:
        # The dictionary above must not keep the networks that it is a property of.
        self._networks = {name: ref(getattr(models, name)) for name in NETWORKS}
        self._device = models.device
        self._fits = fits
        self._free_bytes = free_bytes
        self._originals: dict[ParameterName, torch.Tensor] = {}
        self._key: Key = ()
        self._lost = 0.0

    @property
    def key(self) -> Key:
        """What is on: each file's SHA-256 and scale, in order. () where nothing is."""
        return self._key

    @property
    def lost(self) -> float:
        """How much of the difference rounding to the weights' format lost: the norm of its error by
        that of the difference, over all that is changed."""
        return self._lost

    @property
    def originals_bytes(self) -> int:
        return sum(original.nbytes for original in self._originals.values())

    @property
    def touches_text_encoders(self) -> bool:
        return any(network != "unet" for network, _ in self._originals)

    @torch.no_grad()
    def apply(self, loras: Sequence[Lora], check: Callable[[], None] = lambda: None) -> None:
        """See to it that these LoRAs are on, in this order, and nothing else.

        Does nothing if they are on already. A LoRA with scale 0 is left out.

        Args:
            check: called often; what it raises ends the work.

        Raises:
            RequestError: a file cannot be read, or gives numbers that are not finite.
            BaseException: whatever else goes wrong. In each case all weights are as they were
                loaded.
        """
        loras = [lora for lora in loras if lora.scale != 0]
        key = tuple((lora.sha256, lora.scale) for lora in loras)
        if key == self._key:
            return
        try:
            self._key, self._lost = (), 0.0
            self._change(loras, check)
            self._key = key
        except BaseException:
            self.restore()
            raise

    @torch.no_grad()
    def restore(self) -> None:
        """All weights as they were loaded, bit for bit."""
        for name, original in self._originals.items():
            self._parameter(name).copy_(original)
        self._originals.clear()
        self._key, self._lost = (), 0.0

    @contextmanager
    def text_encoders_unpatched(self) -> Iterator[None]:
        """Inside, the text encoders are as they were loaded, and afterwards again as they are now,
        bit for bit. Nothing else of this class may be called inside."""
        names = [name for name in self._originals if name[0] != "unet"]
        swapped: list[ParameterName] = []
        try:
            for name in names:
                self._swap(name)
                swapped.append(name)
            yield
        finally:
            for name in swapped:
                self._swap(name)

    def move_originals_to_host(self) -> None:
        """Where memory on the GPU is short."""
        for name, original in self._originals.items():
            if original.device.type != "cpu":
                self._originals[name] = _on_host(original)

    def _change(self, loras: Sequence[Lora], check: Callable[[], None]) -> None:
        start = time.monotonic()
        wanted = {
            name: [it for it in loras if name in it.changes]
            for lora in loras
            for name in lora.changes
        }
        for name in [name for name in self._originals if name not in wanted]:
            self._parameter(name).copy_(self._originals[name])
            del self._originals[name]
        self._keep_originals([name for name in wanted if name not in self._originals], check)
        errors, differences, finite = [], [], []
        for name, its_loras in wanted.items():
            check()
            parameter = self._parameter(name)
            original = self._originals[name].to(self._device, torch.float32)
            value = original.clone()
            for lora in its_loras:
                value = lora.changed(name, value)
            rounded = value.to(parameter.dtype)
            parameter.copy_(rounded)
            # Looked at when all is done, for each look waits for the GPU.
            finite.append(rounded.isfinite().all())
            differences.append(torch.linalg.vector_norm(value - original))
            errors.append(torch.linalg.vector_norm(rounded.float() - value))
        if not wanted:
            return
        if not torch.stack(finite).all():
            self._refuse(wanted, finite)
        difference = _norm(differences)
        self._lost = _norm(errors) / difference if difference else 0.0
        log.info(
            "%d LoRAs changed %d weights in %.2f s; rounding lost %.1f%% of the difference",
            len(loras),
            len(wanted),
            time.monotonic() - start,
            100 * self._lost,
        )

    def _keep_originals(self, names: Sequence[ParameterName], check: Callable[[], None]) -> None:
        if not names:
            return
        parameters = [self._parameter(name) for name in names]
        size = sum(parameter.nbytes for parameter in parameters if parameter.is_cuda)
        on_gpu = size > 0 and self._fits(size, self._free_bytes(self._device))
        for name, parameter in zip(names, parameters, strict=True):
            check()
            original = parameter.detach()
            self._originals[name] = (
                original.clone() if on_gpu and original.is_cuda else _on_host(original)
            )
        log.info(
            "kept the originals of %d weights, %.2f GB, %s",
            len(names),
            sum(parameter.nbytes for parameter in parameters) / 1e9,
            "on the GPU" if on_gpu else "on the host",
        )

    def _refuse(self, wanted, finite):
        name = next(n for n, ok in zip(wanted, finite, strict=True) if not ok)
        for lora in wanted[name]:
            if key := lora.not_finite(name):
                raise RequestError(
                    f"{lora.field}: {lora.name} has numbers that are not finite, in {key}; use "
                    "a file that is whole"
                )
        raise RequestError(
            f"{wanted[name][-1].field}: with these scales the weight {name[1]} is too large for "
            "its number format; use smaller scales"
        )

    @torch.no_grad()
    def _swap(self, name: ParameterName) -> None:
        parameter, original = self._parameter(name), self._originals[name]
        patched = parameter.clone()
        parameter.copy_(original)
        original.copy_(patched)

    def _parameter(self, name: ParameterName) -> torch.nn.Parameter:
        network = self._networks[name[0]]()
        if network is None:
            raise ReferenceError("these models are gone")
        return network.get_parameter(name[1])


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy. Pinned, where there is a GPU that it will be copied to."""
    pinned = torch.cuda.is_available()
    return torch.empty_like(tensor, device="cpu", pin_memory=pinned).copy_(tensor)


def _norm(norms: Sequence[torch.Tensor]) -> float:
    """Of many tensors together, from their norms."""
    return math.sqrt(float(torch.stack(list(norms)).double().square().sum()))
