"""Prompts of any length become text embeddings.

CLIP reads 77 tokens: a start token, 75 of text, an end token. A longer prompt is cut into chunks
of 75, each is encoded on its own, and the hidden states are joined along the token axis. A prompt
that fits gives what `StableDiffusionXLPipeline.encode_prompt` gives.
"""

from dataclasses import dataclass

import torch
from transformers import CLIPTextModel, CLIPTokenizer

from sdxl_worker.models import Models


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
    chunked = [
        [_chunks(text, tokenizer) for tokenizer in (models.base.tokenizer, models.base.tokenizer_2)]
        for text in (prompt, negative_prompt)
    ]
    count = max(len(chunks) for pair in chunked for chunks in pair)
    positive, negative = (_encode(*pair, count, models) for pair in chunked)
    return positive, negative


def _chunks(text: str, tokenizer: CLIPTokenizer) -> list[list[int]]:
    """Token ids of the text alone, cut to what one pass takes; at least one chunk."""
    # verbose=False: the tokenizer would warn that the text is longer than one pass takes.
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    size = tokenizer.model_max_length - 2
    return [ids[start : start + size] for start in range(0, len(ids), size)] or [[]]


def _encode(
    chunks_1: list[list[int]], chunks_2: list[list[int]], count: int, models: Models
) -> Encoding:
    base, device = models.base, models.device
    hidden_1, _ = _run(chunks_1, count, base.tokenizer, base.text_encoder, device)
    hidden_2, pooled = _run(chunks_2, count, base.tokenizer_2, base.text_encoder_2, device)
    return Encoding(hidden_1=hidden_1, hidden_2=hidden_2, pooled=pooled)


def _run(
    chunks: list[list[int]],
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
        # One chunk a pass: a batch would round otherwise than a single prompt does.
        output = encoder(torch.tensor([ids], device=device), output_hidden_states=True)
        hidden_states.append(output.hidden_states[-2])
        first_outputs.append(output[0])
    return torch.cat(hidden_states, dim=1), first_outputs[0]
