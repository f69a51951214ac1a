"""The embedded model in this process, and hostile files put on it as a job would."""

import asyncio
import hashlib
from pathlib import Path

import torch

from benchmarks.attack.hostile_adapters import HostileFile
from sdxl_worker.adapters.of_request import read_adapters
from sdxl_worker.adapters.patching import patches_of
from sdxl_worker.inputs.adapter_files import fetch_adapters
from sdxl_worker.inputs.adapter_sources import SUFFIX
from sdxl_worker.loading.model_dir import find_model_dir
from sdxl_worker.loading.models import load_models
from sdxl_worker.request import parse_request
from sdxl_worker.settings import EMBEDDED_MODEL_DIR, Settings


class OwnNetworks:
    def __init__(self, folder: Path) -> None:
        """
        Args:
            folder: for the files.
        """
        self._folder = folder
        self._models = load_models(find_model_dir(Settings(model_dir=EMBEDDED_MODEL_DIR)))
        self._count = 0

    def put_on(self, hostile: HostileFile) -> None:
        """And take it off again, as before a job without it.

        Raises:
            RequestError: it is refused.
        """
        self._count += 1
        path = self._folder / f"{self._count}{SUFFIX}"
        hostile.write(path)
        request = parse_request(hostile.asked(path.name))
        try:
            place = f"{hostile.field}[0].path"
            files = asyncio.run(
                fetch_adapters({place: path.name}, Settings(lora_dir=self._folder), lambda *_: None)
            )
            loras = read_adapters(request, files, self._models).loras
            patches_of(self._models).apply(loras)
            patches_of(self._models).apply(())
        finally:
            path.unlink()

    def digest(self) -> str:
        """Of all weights, bit for bit."""
        hashed = hashlib.sha256()
        for _, network in sorted(self._models.networks().items()):
            for tensor in network.state_dict().values():
                hashed.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
        return hashed.hexdigest()
