"""A CLIP tokenizer in miniature: byte-level pairs, so that any text has tokens.

The vocabulary is laid out as CLIP's own: 256 bytes, the same at the end of a word, the merges,
start and end of text. Both text encoders share it and differ in the padding, as SDXL's do.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
from transformers import CLIPTokenizer

from shapes import captions

MAX_TOKENS = 77
CONTENT_TOKENS = MAX_TOKENS - 2
MERGES = 384
START, END = "<|startoftext|>", "<|endoftext|>"
PADDINGS = {"tokenizer": END, "tokenizer_2": "!"}


def byte_symbols() -> list[str]:
    """A printable character for each byte, in the order of CLIP's vocabulary (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def _word_counts(seed: int) -> Counter[str]:
    rng = np.random.default_rng(seed)
    counts: Counter[str] = Counter()
    for meaning in captions.every_meaning():
        for _ in range(6):
            counts.update(re.findall("[a-z]+", captions.plain_caption(meaning, rng)))
    for phrase in (*captions.PREFIXES, *captions.PHRASES):
        counts.update(dict.fromkeys(re.findall("[a-z]+", phrase), 20))
    return counts


def learn_merges(seed: int) -> list[tuple[str, str]]:
    """The most frequent pairs of symbols in the captions' words, merged one after the other."""
    words = {
        (*word[:-1], f"{word[-1]}</w>"): count for word, count in sorted(_word_counts(seed).items())
    }
    merges: list[tuple[str, str]] = []
    while len(merges) < MERGES:
        pairs: Counter[tuple[str, str]] = Counter()
        for symbols, count in words.items():
            for pair in itertools.pairwise(symbols):
                pairs[pair] += count
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        words = {_merge(symbols, best): count for symbols, count in words.items()}
    return merges


def _merge(symbols: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return tuple(merged)


def write_tokenizers(folder: Path, seed: int) -> None:
    """Write `tokenizer` and `tokenizer_2` in CLIP's classic form: four small files each."""
    merges = learn_merges(seed)
    symbols = byte_symbols()
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols)]
    tokens += ["".join(pair) for pair in merges]
    tokens += [START, END]
    vocabulary = json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False)
    merge_lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]

    for name, padding in PADDINGS.items():
        path = folder / name
        path.mkdir(parents=True, exist_ok=True)
        (path / "vocab.json").write_text(vocabulary, encoding="utf-8")
        (path / "merges.txt").write_text("\n".join(merge_lines) + "\n", encoding="utf-8")
        special = {
            key: {
                "content": content,
                "lstrip": False,
                "normalized": True,
                "rstrip": False,
                "single_word": False,
            }
            for key, content in (("bos_token", START), ("eos_token", END), ("unk_token", END))
        }
        _write_json(path / "special_tokens_map.json", {**special, "pad_token": padding})
        config = {
            "add_prefix_space": False,
            **{key: {"__type": "AddedToken", **token} for key, token in special.items()},
            "clean_up_tokenization_spaces": True,
            "do_lower_case": True,
            "errors": "replace",
            "model_max_length": MAX_TOKENS,
            "pad_token": padding,
            "tokenizer_class": "CLIPTokenizer",
        }
        _write_json(path / "tokenizer_config.json", config)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_tokenizers(folder: Path) -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """The pair that `write_tokenizers` wrote."""
    first, second = (CLIPTokenizer.from_pretrained(folder / name) for name in PADDINGS)
    return first, second


def content_ids(tokenizer: CLIPTokenizer, text: str) -> list[int]:
    """The tokens of a text without start, end and padding, however long."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return ids


def frame(tokenizer: CLIPTokenizer, content: list[int]) -> list[int]:
    """Start, content (cut at 75), end and padding: the 77 tokens that an encoder takes."""
    ids = [tokenizer.bos_token_id, *content[:CONTENT_TOKENS], tokenizer.eos_token_id]
    return ids + [tokenizer.pad_token_id] * (MAX_TOKENS - len(ids))
