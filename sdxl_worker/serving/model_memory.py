"""The memory of the card and of the host, and how models move between them."""

from typing import TYPE_CHECKING

from sdxl_worker.gpu import free_memory, free_pinned_memory
from sdxl_worker.host_memory import free_host_bytes, give_back_host_memory
from sdxl_worker.placement import WORKING_MEMORY_BYTES, fits

if TYPE_CHECKING:
    import torch

    from sdxl_worker.loading.companions import Companion
    from sdxl_worker.loading.models import Models


class ModelMemory:
    """`models_kept.Memory` of this machine. Without a GPU, the card is the host, and models that do
    not fit are dropped."""

    def fits_card(self, size_bytes: int) -> bool:
        import torch

        if not torch.cuda.is_available():
            return fits(size_bytes, free_host_bytes())
        free_memory()  # what torch keeps for reuse counts as taken
        return fits(size_bytes, torch.cuda.mem_get_info()[0])

    def fits_host(self, size_bytes: int) -> bool:
        import torch

        # As much is left as on the card: for pictures, and for the files that are read.
        room = free_host_bytes() - WORKING_MEMORY_BYTES
        return torch.cuda.is_available() and size_bytes <= room

    def to_card(self, models: "Models | Companion") -> None:
        if not models.placement.resident:
            return  # each network comes when its turn does
        for network in models.networks().values():
            network.to(models.device)

    def to_host(self, models: "Models | Companion") -> None:
        from sdxl_worker.loading.offload import send_home

        _leave(models)
        send_home(models.networks().values())
        free_memory()

    def drop(self, models: "Models | Companion") -> None:
        from sdxl_worker.loading.offload import end_turns

        _leave(models)
        end_turns(models.networks().values())  # or what they are on the host would be held
        for network in models.networks().values():
            _empty(network)
        free_memory()
        free_pinned_memory()
        give_back_host_memory()


def is_emptied(models: "Models | Companion") -> bool:
    """Whether its weights are gone: it was dropped."""
    return all(next(network.parameters(), None) is None for network in models.networks().values())


def size_bytes_of(models: "Models | Companion") -> int:
    return sum(
        tensor.nbytes
        for network in models.networks().values()
        for tensors in (network.parameters(), network.buffers())
        for tensor in tensors
    )


def _leave(models: "Models | Companion") -> None:
    """Before its weights move: LoRAs are taken out, and what holds addresses is forgotten."""
    from sdxl_worker.adapters.patching import patches_of
    from sdxl_worker.loading.companions import Companion
    from sdxl_worker.speed.cuda_graphs import forget_recordings

    if isinstance(models, Companion):
        return
    if not is_emptied(models):
        patches_of(models).restore()
    forget_recordings(models.unets())


def _empty(network: "torch.nn.Module") -> None:
    # A job may still hold the network, and must not hold its weights.
    for module in network.modules():
        for name in [name for name, _ in module.named_parameters(recurse=False)]:
            setattr(module, name, None)
        for name in [name for name, _ in module.named_buffers(recurse=False)]:
            setattr(module, name, None)
