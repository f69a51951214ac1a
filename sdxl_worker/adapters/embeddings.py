"""Textual inversion: vectors that were trained to stand for a new word, in a small file.

They take the place of the word's token vectors for the passes that need them. Tokenizers and
embedding matrices stay as they are, so that there is nothing to undo.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from sdxl_worker.adapters.tensor_file import DTYPES, TensorFile
from sdxl_worker.errors import RequestError
from sdxl_worker.inputs.checked_file import AdapterFile
from sdxl_worker.loading.models import Models

# A word of more would not fit into one chunk of the prompt.
MAX_VECTORS = 75
# The names under which files for SDXL keep the vectors of the two encoders: A1111, ComfyUI, kohya
# and diffusers; and cog-sdxl with earlier diffusers.
NAMES = (("clip_l", "text_encoders_0"), ("clip_g", "text_encoders_1"))
# Whose encoder has tokens of such a width, where a file does not say which encoder it is for.
MADE_FOR = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x"}


@dataclass(frozen=True)
class Word:
    """A word as one of the encoders learned it. Equal if word and file are."""

    token: str
    """How it is written in prompts."""
    sha256: str
    """Of the file."""
    vectors: torch.Tensor = field(compare=False, repr=False)
    """[n, width of the encoder]."""


@dataclass(frozen=True)
class TextualInversion:
    token: str
    words: tuple[Word | None, Word | None]
    """For each of the two encoders. None: for this one, the token is text as any other."""


def read_embedding(file: AdapterFile, token: str, field: str, models: Models) -> TextualInversion:
    """
    Args:
        token: the word in the prompts that the vectors stand for.
        field: where the request names the file, for messages: "embeddings[0].path".

    Raises:
        RequestError: the file is no textual inversion for these models.
    """
    encoders = (models.text_encoder, models.text_encoder_2)
    widths = [encoder.get_input_embeddings().embedding_dim for encoder in encoders]
    try:
        names = _names(file.header.shapes, widths)
        one, other = (name and Word(token, file.sha256, _read(file, name)) for name in names)
    except ValueError as error:
        raise RequestError(f"{field}: {file.name} {error}") from error
    return TextualInversion(token, (one or None, other or None))


@contextlib.contextmanager
def standing_in(encoder: PreTrainedModel, places: Sequence[tuple[int, Word]]) -> Iterator[None]:
    """Words' vectors, each from a place on, for passes of one row of tokens."""
    if not places:
        yield
        return

    def put_in(_: torch.nn.Module, __: object, embedded: torch.Tensor) -> torch.Tensor:
        embedded = embedded.clone()
        for start, word in places:
            embedded[0, start : start + len(word.vectors)] = word.vectors.to(embedded)
        return embedded

    hook = encoder.get_input_embeddings().register_forward_hook(put_in)
    try:
        yield
    finally:
        hook.remove()


def pattern(tokens: Sequence[str]) -> re.Pattern[str]:
    """Finds tokens in a text, one group for each, in any case: CLIP's tokenizer knows none either.

    None is found within a word. Of two that begin alike, the one that comes first is found.
    """
    groups = []
    for token in tokens:
        before = r"(?<!\w)" if re.match(r"\w", token) else ""
        after = r"(?!\w)" if re.search(r"\w\Z", token) else ""
        groups.append(f"({before}{re.escape(token)}{after})")
    return re.compile("|".join(groups), re.IGNORECASE)


def _names(
    shapes: Mapping[str, tuple[int, ...]], widths: Sequence[int]
) -> tuple[str | None, str | None]:
    """Which tensor is for which encoder.

    Raises:
        ValueError: what the file is, or what is wrong with it; to be put after its name.
    """
    known = [next((name for name in names if name in shapes), None) for names in NAMES]
    if not any(known) and len(shapes) == 1:
        [(name, shape)] = shapes.items()
        # The first encoder's width is that of Stable Diffusion 1's, whose files look the same.
        if shape and shape[-1] == widths[1] != widths[0]:
            known = [None, name]
        elif shape and (shape[-1] in MADE_FOR or shape[-1] == widths[0]):
            model = MADE_FOR.get(shape[-1], MADE_FOR[768])
            raise ValueError(
                f"is a textual inversion for {model} (one tensor, {shape[-1]} wide); use one for "
                "SDXL, with tensors clip_l and clip_g"
            )
    strange = sorted(shapes.keys() - set(known))
    if not any(known) or strange:
        lora = any("lora" in name.lower() for name in shapes)
        raise ValueError(
            "is a LoRA; give it in loras"
            if lora
            else f"is no textual inversion for SDXL: it has {_listed(strange)}, not only clip_l "
            "and clip_g"
        )
    for found, width in zip(known, widths, strict=True):
        if found is None:
            continue
        name, shape = found, shapes[found]
        if len(shape) not in (1, 2) or shape[-1] != width:
            raise ValueError(
                f"does not fit these models: {name} has shape {list(shape)}, and their vectors are "
                f"{width} wide"
            )
        if len(shape) == 2 and not 1 <= shape[0] <= MAX_VECTORS:
            raise ValueError(
                f"has {shape[0]} vectors in {name}; a word may have 1 to {MAX_VECTORS}"
            )
    return known[0], known[1]


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name[:60]) for name in names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown or "no tensors"


def _read(file: AdapterFile, name: str) -> torch.Tensor:
    if file.header.dtypes[name] not in DTYPES:
        raise ValueError(f"has values in {name} of a format that is not read")
    try:
        vectors = TensorFile(file.path, file.header).read(name)
    except OSError as error:
        raise ValueError("cannot be read: send the job again") from error
    if not vectors.is_floating_point() or not vectors.float().isfinite().all():
        raise ValueError(f"has values in {name} that are no finite numbers")
    return vectors.reshape(-1, vectors.shape[-1])
