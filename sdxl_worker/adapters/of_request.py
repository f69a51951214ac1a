"""The LoRAs and embeddings that a request names, read and checked."""

from collections.abc import Mapping
from dataclasses import dataclass

from sdxl_worker.adapters.embeddings import TextualInversion, read_embedding
from sdxl_worker.adapters.lora import Lora, read_lora
from sdxl_worker.few_step import FewStep, recognise
from sdxl_worker.inputs.checked_file import AdapterFile
from sdxl_worker.loading.models import Models
from sdxl_worker.request import Request


@dataclass(frozen=True)
class Adapters:
    loras: tuple[Lora, ...] = ()
    """In the order of the request; those of scale 0 too."""
    embeddings: tuple[TextualInversion, ...] = ()
    few_step: FewStep | None = None
    """How the model, or a LoRA that makes it one of few steps, wants to be used."""


NO_ADAPTERS = Adapters()


def read_adapters(request: Request, files: Mapping[str, AdapterFile], models: Models) -> Adapters:
    """
    Args:
        files: by the place of their path in the request, such as "loras[0].path".

    Raises:
        RequestError: one is not for these models, or is something else.
    """
    checkpoint = models.model_dir.checkpoint
    # A hash that is found out only after the start is none of those that are known: the defaults do
    # not change under way.
    metadata = checkpoint.header.metadata if checkpoint else {}
    few_step = recognise(models.name, models.model_dir.sha256, metadata)
    embeddings = []
    for i, one in enumerate(request.embeddings or ()):
        place = f"embeddings[{i}].path"
        embeddings.append(read_embedding(files[place], one.token, place, models))
    loras = []
    for i, asked in enumerate(request.loras or ()):
        place = f"loras[{i}].path"
        file = files[place]
        loras.append(read_lora(file, asked.scale, place, models))
        if few_step is None and asked.scale > 0:
            few_step = recognise(file.name, file.sha256, file.header.metadata)
    return Adapters(tuple(loras), tuple(embeddings), few_step)
