"""Weights that are changed in place for a list of LoRAs, and put back bit for bit.

In place: whatever holds a weight's address, compiled code and recorded CUDA graphs included, goes
on with the new numbers, and no step takes longer than without a LoRA. All differences are added in
fp32 and rounded once. Subtracting them would not give the weights back, so the originals are kept.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from weakref import WeakKeyDictionary, ref

import torch

from sdxl_worker.adapters.changes import Lora, ParameterName
from sdxl_worker.adapters.module_names import NETWORKS
from sdxl_worker.errors import RequestError, let_go
from sdxl_worker.gpu import free_bytes
from sdxl_worker.loading.models import Models
from sdxl_worker.placement import fits

log = logging.getLogger(__name__)

Key = tuple[tuple[str, float], ...]


def key_of(loras: Iterable[Lora]) -> Key:
    """Of a list of LoRAs, what tells it from others: those of scale 0 do not count."""
    return tuple((lora.sha256, lora.scale) for lora in loras if lora.scale != 0)


_patches: "WeakKeyDictionary[torch.nn.Module, Patches]" = WeakKeyDictionary()


def patches_of(models: Models) -> "Patches":
    """The one for these networks; the UNet tells them apart, whatever is added to `models`."""
    unet: torch.nn.Module = models.unet
    if unet not in _patches:
        _patches[unet] = Patches(models)
    return _patches[unet]


class Patches:
    """What LoRAs have changed in the networks of one model. For one thread, the one that draws.

    Networks may move between the devices; no tensor of theirs is held.
    """

    def __init__(
        self,
        models: Models,
        *,
        fits: Callable[[int, int], bool] = fits,
        free_bytes: Callable[[torch.device], int | None] = free_bytes,
    ) -> None:
        # The dictionary above must not keep the networks that it is a property of.
        self._networks = {name: ref(getattr(models, name)) for name in NETWORKS}
        self._placement = models.placement
        self._fits = fits
        self._free_bytes = free_bytes
        self._originals: dict[ParameterName, torch.Tensor] = {}
        self._key: Key = ()
        self._lost = 0.0
        self._users = 0

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
        key = key_of(loras)
        loras = [lora for lora in loras if lora.scale != 0]
        if key == self._key:
            return
        if self._users:
            raise RuntimeError("somebody draws with other LoRAs")
        try:
            self._key, self._lost = (), 0.0
            self._change(loras, check)
            self._key = key
        except BaseException:
            self.restore()
            raise

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Around what draws with them. If it fails, all weights are put back, unless somebody else
        draws with them as well."""
        self._users += 1
        try:
            yield
        except BaseException as error:
            let_go(error)
            if self._users == 1:
                self.restore()
            raise
        finally:
            self._users -= 1

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
        errors, differences = [], []
        for name, its_loras in wanted.items():
            check()
            parameter = self._parameter(name)
            original = self._originals[name].to(self._placement.device, torch.float32)
            value = original.clone()
            for lora in its_loras:
                value = lora.changed(name, value)
            rounded = value.to(parameter.dtype)
            parameter.copy_(rounded)
            # Looked at when all is done, for each look waits for the GPU.
            differences.append(torch.linalg.vector_norm(value - original))
            errors.append(torch.linalg.vector_norm(value.sub_(rounded)))
        if not wanted:
            return
        # Where a number is not finite, neither is the error.
        is_finite = torch.stack(errors).isfinite().tolist()
        if not all(is_finite):
            bad = next(name for name, fine in zip(wanted, is_finite, strict=True) if not fine)
            raise _not_finite(bad, wanted[bad])
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
        size = sum(self._parameter(name).nbytes for name in names)
        # Where networks take turns on the GPU, there is no room for what stays there.
        free = self._free_bytes(self._placement.device)
        beside = self._placement.resident and free is not None and self._fits(size, free)
        for name in names:
            check()
            original = self._parameter(name).detach()
            self._originals[name] = original.clone() if beside else _on_host(original)
        log.info(
            "keeping the originals of %d weights, %.2f GB, on %s",
            len(names),
            size / 1e9,
            self._placement.device if beside else "the host",
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


def _not_finite(name: ParameterName, loras: Sequence[Lora]) -> RequestError:
    for lora in loras:
        if key := lora.not_finite(name):
            return RequestError(
                f"{lora.field}: {lora.name} has numbers that are not finite, in {key}; use a file "
                "that is whole"
            )
    return RequestError(
        f"{loras[-1].field}: with these scales, numbers of {name[1]} are too large for the "
        "weights' number format; use smaller scales"
    )


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy. Pinned, where there is a GPU that it will be copied to."""
    pinned = torch.cuda.is_available()
    return torch.empty_like(tensor, device="cpu", pin_memory=pinned).copy_(tensor)


def _norm(norms: Sequence[torch.Tensor]) -> float:
    """Of many tensors together, from their norms."""
    return math.sqrt(float(torch.stack(list(norms)).double().square().sum()))
