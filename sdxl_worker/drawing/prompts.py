"""Prompts of any length become text embeddings.

CLIP reads 77 tokens: a start token, 75 of text, an end token. A longer prompt is cut into chunks
of 75, each is encoded on its own, and the hidden states are joined along the token axis. A prompt
of one chunk is encoded as `StableDiffusionXLPipeline.encode_prompt` does it.
"""

from dataclasses import dataclass

import torch
from transformers import CLIPTextModel, CLIPTokenizer

from sdxl_worker.loading.models import Models

# Token ids of a text, without start, end and padding, in one or more chunks of at most 75.
Chunks = list[list[int]]


@dataclass(frozen=True)
class Encoding:
    """One text as the two encoders see it, for `n` chunks."""

    hidden_1: torch.Tensor
    """Penultimate hidden states of the first encoder (CLIP-L), [1, 77 * n, width_1]."""
    hidden_2: torch.Tensor
    """Penultimate hidden states of the second encoder (OpenCLIP bigG), [1, 77 * n, width_2]."""
    pooled: torch.Tensor
    """Pooled and projected output of the second encoder for the first chunk, [1, projection]."""


def encode_pair(prompt: str, negative_prompt: str, models: Models) -> tuple[Encoding, Encoding]:
    """Encode both, the shorter one filled up with empty chunks: guidance needs equal lengths."""
    chunks = [_chunks(text, models) for text in (prompt, negative_prompt)]
    count = max(len(of_tokenizer) for of_text in chunks for of_tokenizer in of_text)
    return _encode(chunks[0], count, models), _encode(chunks[1], count, models)


def _chunks(text: str, models: Models) -> list[Chunks]:
    """The chunks of a text, as each of the two tokenizers sees it."""
    of_tokenizers = []
    for tokenizer in (models.tokenizer, models.tokenizer_2):
        # verbose=False: otherwise the tokenizer warns that the text is longer than one pass takes.
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        size = tokenizer.model_max_length - 2
        chunks = [ids[start : start + size] for start in range(0, len(ids), size)]
        of_tokenizers.append(chunks or [[]])
    return of_tokenizers


def _encode(chunks: list[Chunks], count: int, models: Models) -> Encoding:
    device = models.device
    hidden_1, _ = _run(chunks[0], count, models.tokenizer, models.text_encoder, device)
    hidden_2, pooled = _run(chunks[1], count, models.tokenizer_2, models.text_encoder_2, device)
    return Encoding(hidden_1=hidden_1, hidden_2=hidden_2, pooled=pooled)


def _run(
    chunks: Chunks,
    count: int,
    tokenizer: CLIPTokenizer,
    encoder: CLIPTextModel,
    device: torch.device,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states of all chunks, joined, and the first output for the first chunk."""
    hidden_states, first_outputs = [], []
    for chunk in chunks + [[]] * (count - len(chunks)):
        ids = [tokenizer.bos_token_id, *chunk, tokenizer.eos_token_id]
        ids += [tokenizer.pad_token_id] * (tokenizer.model_max_length - len(ids))
        # One chunk a pass: a batch would round differently from a single prompt.
        output = encoder(torch.tensor([ids], device=device), output_hidden_states=True)
        hidden_states.append(output.hidden_states[-2])
        first_outputs.append(output[0])
    return torch.cat(hidden_states, dim=1), first_outputs[0]
