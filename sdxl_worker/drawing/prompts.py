"""Prompts of any length become text embeddings.

CLIP reads 77 tokens: a start token, 75 of text, an end token. A longer prompt is cut into chunks
of 75, each is encoded on its own, and the hidden states are joined along the token axis. A prompt
of one chunk is encoded as `StableDiffusionXLPipeline.encode_prompt` does it.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Self, TypeAlias

import torch
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from sdxl_worker.adapters.embeddings import TextualInversion, pattern
from sdxl_worker.drawing.chunks import Chunk, chunks_of
from sdxl_worker.drawing.text_passes import run_pass
from sdxl_worker.errors import RequestError
from sdxl_worker.field_types import TEXT_FIELDS
from sdxl_worker.loading.models import Models
from sdxl_worker.prompt_weights import Piece, names_networks, parse
from sdxl_worker.request import Request

TextEncoder: TypeAlias = CLIPTextModel | CLIPTextModelWithProjection

# SDXL was trained with the hidden states of the last layer but one.
NORMAL_LAYER = 2


@dataclass(frozen=True)
class Texts:
    """What a request says in words."""

    prompt: str
    negative_prompt: str = ""
    prompt_2: str | None = None
    """For the second encoder. None or empty: the same as for the first."""
    negative_prompt_2: str | None = None
    weighted: bool = False
    """Whether brackets are weights, as `prompt_weights` reads them."""

    @classmethod
    def of(cls, request: Request) -> Self:
        return cls(
            request.prompt,
            request.negative_prompt,
            request.prompt_2,
            request.negative_prompt_2,
            weighted=request.prompt_weighting,
        )

    @property
    def has_negative(self) -> bool:
        return bool(self.negative_prompt or self.negative_prompt_2)

    def parts(self, text: str) -> list[list[Piece]]:
        """What begins in a chunk of its own, of one of these texts."""
        return parse(text) if self.weighted else [[Piece(text)]]


@dataclass(frozen=True)
class Encoding:
    """One text as the two encoders see it, for `n` chunks."""

    hidden_1: torch.Tensor
    """Hidden states of the first encoder (CLIP-L), [1, 77 * n, width_1]."""
    hidden_2: torch.Tensor
    """Hidden states of the second encoder (OpenCLIP bigG), [1, 77 * n, width_2]."""
    pooled: torch.Tensor
    """Pooled and projected output of the second encoder for the first chunk, [1, projection]."""


@torch.no_grad()
def encode_pair(
    texts: Texts,
    models: Models,
    *,
    embeddings: Sequence[TextualInversion] = (),
    clip_skip: int | None = None,
    state: Hashable = (),
) -> tuple[Encoding, Encoding]:
    """Encode prompt and negative prompt. The shorter of the two is filled up with empty chunks:
    guidance needs equal lengths.

    Args:
        texts: their weights are within bounds.
        clip_skip: a layer that `check_clip_skip` lets pass.
        state: tells what was done to the encoders' weights; equal if the weights are.
    """
    firsts = (texts.prompt, texts.negative_prompt)
    seconds = (texts.prompt_2 or texts.prompt, texts.negative_prompt_2 or texts.negative_prompt)
    words_1 = [word for one in embeddings if (word := one.words[0])]
    words_2 = [word for one in embeddings if (word := one.words[1])]
    chunks_1 = [chunks_of(texts.parts(text), models.tokenizer, words_1) for text in firsts]
    chunks_2 = [chunks_of(texts.parts(text), models.tokenizer_2, words_2) for text in seconds]
    count = max(map(len, chunks_1 + chunks_2))
    layer = max(NORMAL_LAYER, clip_skip or 0)

    def encode(
        chunks: list[Chunk], tokenizer: CLIPTokenizer, encoder: TextEncoder
    ) -> tuple[torch.Tensor, torch.Tensor]:
        chunks = chunks + chunks_of([], tokenizer) * (count - len(chunks))
        # One chunk a pass: a batch would round differently from a single prompt.
        passes = [
            run_pass(encoder, chunk, models.device, layer=layer, state=state) for chunk in chunks
        ]
        hidden = torch.cat([one.hidden for one in passes], dim=1)
        return _weighted(hidden, chunks), passes[0].pooled.clone()

    def encoding(of_first: list[Chunk], of_second: list[Chunk]) -> Encoding:
        hidden_1, _ = encode(of_first, models.tokenizer, models.text_encoder)
        hidden_2, pooled = encode(of_second, models.tokenizer_2, models.text_encoder_2)
        return Encoding(hidden_1, hidden_2, pooled)

    prompt, negative_prompt = map(encoding, chunks_1, chunks_2)
    return prompt, negative_prompt


def check_clip_skip(request: Request, models: Models) -> None:
    """Whether the models have the layer. 1 and 2 are SDXL's normal one, the last but one, as in
    A1111, which counts the same; 3 is the layer before it, and so on.

    Raises:
        RequestError: they have fewer layers.
    """
    encoders = (models.text_encoder, models.text_encoder_2)
    layers = min(encoder.config.num_hidden_layers for encoder in encoders)
    if (request.clip_skip or 0) > layers:
        raise RequestError(
            f"clip_skip: the text encoders of {models.name} have no more than {layers} layers in "
            f"common; give 1 to {layers} (1 and 2 are what SDXL was trained with)"
        )


def warnings_of(texts: Texts, embeddings: Sequence[TextualInversion] = ()) -> list[str]:
    """What stands in the texts, or does not, without having the effect that was meant."""
    fields = {name: getattr(texts, name) or "" for name in TEXT_FIELDS}
    warnings = [
        f"{name}: <lora:...> and the like do nothing in a prompt"
        f"{' and were taken out' if texts.weighted else ''}; give LoRAs in loras"
        for name, text in fields.items()
        if names_networks(text)
    ]
    seen = " ".join(
        piece.text for text in fields.values() for part in texts.parts(text) for piece in part
    )
    return warnings + [
        f"embeddings[{index}].token: stands in none of the prompts, so it had no effect"
        for index, embedding in enumerate(embeddings)
        if not pattern([embedding.token]).search(seen)
    ]


def _weighted(hidden: torch.Tensor, chunks: Sequence[Chunk]) -> torch.Tensor:
    """Each token's hidden state times its weight. The mean is not restored, as A1111 does by
    default: with SDXL that gives artefacts (its pull request 14874)."""
    weights = [weight for chunk in chunks for weight in chunk.weights]
    if set(weights) == {1.0}:
        return hidden
    factors = torch.tensor(weights, dtype=torch.float32, device=hidden.device)
    return (hidden.float() * factors[None, :, None]).to(hidden.dtype)
