"""First phase of the training: the text encoders learn to carry what a caption means.

Linear probes read shape, colours and background from the states that later condition the UNets; the
probes are thrown away, the encoders stay as they are from then on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from shapes import architecture, captions
from shapes.captions import Meaning
from shapes.data import COLORS, SHAPES
from shapes.tokenizer import CONTENT_TOKENS, content_ids, frame, load_tokenizers

STEPS = 600
BATCH = 96
LEARNING_RATE = 2e-3
LABEL_SMOOTHING = 0.05
LONG_SHARE = 0.2
"""Share of the captions that get so many filler words that all 75 places are taken."""

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": SHAPES,
    "color": COLORS,
    "background": COLORS,
    "either": COLORS,
}


@dataclass
class TextModels:
    """Both tokenizers and encoders."""

    tokenizer: CLIPTokenizer
    tokenizer_2: CLIPTokenizer
    encoder: CLIPTextModel
    encoder_2: CLIPTextModelWithProjection

    @torch.no_grad()
    def embed(self, contents: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Chunks of at most 75 tokens to SDXL's conditioning: (n, 77, 112) and pooled (n, 64)."""
        return self.conditioning(contents)

    def conditioning(self, contents: list[list[int]]) -> tuple[Tensor, Tensor]:
        """The same as `embed`, for a training that goes through the encoders."""
        first, second = self.frame(contents)
        states_1 = self.encoder(first, output_hidden_states=True).hidden_states[-2]
        output = self.encoder_2(second, output_hidden_states=True)
        states = torch.cat([states_1, output.hidden_states[-2]], dim=-1)
        return states, output.text_embeds

    def frame(self, contents: list[list[int]]) -> tuple[Tensor, Tensor]:
        """Token ids for the first and the second encoder, (n, 77) each."""
        first = [frame(self.tokenizer, content) for content in contents]
        second = [frame(self.tokenizer_2, content) for content in contents]
        return torch.tensor(first), torch.tensor(second)

    def ids(self, text: str) -> list[int]:
        """The content tokens of a text; the same for both encoders."""
        return content_ids(self.tokenizer, text)


def save(models: TextModels, work: Path) -> None:
    """Keep the trained encoders in the work folder."""
    state = {"encoder": models.encoder.state_dict(), "encoder_2": models.encoder_2.state_dict()}
    torch.save(state, work / "text.pt")


def load(work: Path) -> TextModels:
    """The trained encoders, frozen."""
    models = _new(work)
    state = torch.load(work / "text.pt", weights_only=True)
    models.encoder.load_state_dict(state["encoder"])
    models.encoder_2.load_state_dict(state["encoder_2"])
    models.encoder.eval().requires_grad_(False)
    models.encoder_2.eval().requires_grad_(False)
    return models


def _new(work: Path) -> TextModels:
    tokenizer, tokenizer_2 = load_tokenizers(work)
    vocabulary = len(tokenizer)
    return TextModels(
        tokenizer,
        tokenizer_2,
        architecture.text_encoder(vocabulary),
        architecture.text_encoder_2(vocabulary),
    )


def content_among_filler(
    models: TextModels, text: str, rng: np.random.Generator, *, before: int, total: int
) -> list[int]:
    """The tokens of a caption after `before` filler tokens, filled up to `total` tokens."""
    comma = models.ids(",")
    content = models.ids(text)
    filler = models.ids(captions.filler(rng, phrases=40))
    head = [*filler[: before - 1], *comma] if before else []
    tail = [*comma, *models.ids(captions.filler(rng, phrases=40))]
    return [*head, *content, *tail][:total]


def _labels(meaning: Meaning) -> list[int]:
    """One class for each attribute; 0 where nothing is said."""
    return [
        values.index(getattr(meaning, name)) + 1 if getattr(meaning, name) else 0
        for name, values in ATTRIBUTES.items()
    ]


def _batch(
    models: TextModels, meanings: list[Meaning], size: int, rng: np.random.Generator
) -> tuple[list[list[int]], Tensor]:
    contents, labels = [], []
    for _ in range(size):
        meaning = meanings[rng.integers(len(meanings))]
        text = captions.caption(meaning, rng)
        if text and rng.random() < LONG_SHARE:
            before = int(rng.integers(0, 50))
            content = content_among_filler(models, text, rng, before=before, total=CONTENT_TOKENS)
        else:
            content = models.ids(text)
        contents.append(content)
        labels.append(_labels(meaning))
    return contents, torch.tensor(labels)


class _Probes(nn.Module):
    """Linear readers of the conditioning: at the end of text, after it, on average, and pooled."""

    def __init__(self) -> None:
        super().__init__()
        classes = sum(len(values) + 1 for values in ATTRIBUTES.values())
        self.end_1 = nn.Linear(architecture.HIDDEN_1, classes)
        self.after_1 = nn.Linear(architecture.HIDDEN_1, classes)
        self.mean_1 = nn.Linear(architecture.HIDDEN_1, classes)
        self.end_2 = nn.Linear(architecture.HIDDEN_2, classes)
        self.after_2 = nn.Linear(architecture.HIDDEN_2, classes)
        self.mean_2 = nn.Linear(architecture.HIDDEN_2, classes)
        self.pooled = nn.Linear(architecture.POOLED, classes)

    def forward(self, states_1: Tensor, states_2: Tensor, pooled: Tensor, end: Tensor) -> Tensor:
        """Logits of every probe, (probes, n, classes)."""
        rows = torch.arange(len(end))
        after = (end + 1).clamp(max=states_1.shape[1] - 1)
        return torch.stack(
            [
                self.end_1(states_1[rows, end]),
                self.after_1(states_1[rows, after]),
                self.mean_1(states_1.mean(dim=1)),
                self.end_2(states_2[rows, end]),
                self.after_2(states_2[rows, after]),
                self.mean_2(states_2.mean(dim=1)),
                self.pooled(pooled),
            ]
        )


def _logits(models: TextModels, probes: _Probes, contents: list[list[int]]) -> Tensor:
    first, second = models.frame(contents)
    end = torch.tensor([min(len(content), CONTENT_TOKENS) + 1 for content in contents])
    states_1 = models.encoder(first, output_hidden_states=True).hidden_states[-2]
    output = models.encoder_2(second, output_hidden_states=True)
    logits: Tensor = probes(states_1, output.hidden_states[-2], output.text_embeds, end)
    return logits


def train(work: Path, seed: int) -> None:
    """Train both encoders and write them to the work folder."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    models, probes = _new(work), _Probes()
    for encoder in (models.encoder, models.encoder_2):
        embeddings = encoder.get_input_embeddings()
        nn.init.normal_(embeddings.weight, std=0.3)
        for name, parameter in encoder.named_parameters():
            if name.endswith("position_embedding.weight"):
                nn.init.normal_(parameter, std=0.1)

    meanings = captions.every_meaning()
    widths = [len(values) + 1 for values in ATTRIBUTES.values()]
    modules = nn.ModuleList([models.encoder, models.encoder_2, probes])
    optimizer = torch.optim.AdamW(modules.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, STEPS, pct_start=0.1)
    progress = tqdm(range(STEPS), desc="text encoders")
    for _ in progress:
        contents, labels = _batch(models, meanings, BATCH, rng)
        loss = torch.zeros(())
        per_attribute = _logits(models, probes, contents).split(widths, dim=-1)
        for attribute, logits in enumerate(per_attribute):
            target = labels[:, attribute].expand(len(logits), -1)
            loss = loss + functional.cross_entropy(
                logits.flatten(0, 1), target.flatten(), label_smoothing=LABEL_SMOOTHING
            )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)

    with torch.no_grad():
        contents, labels = _batch(models, meanings, 1000, np.random.default_rng(seed + 1))
        logits = _logits(models, probes, contents)
        right = torch.stack(
            [
                part.argmax(dim=-1) == labels[:, attribute]
                for attribute, part in enumerate(logits.split(widths, dim=-1))
            ]
        )
        rates = right.float().mean(dim=(1, 2))
        tqdm.write(f"held-out captions right, by probe: {right.all(dim=0).float().mean(dim=1)}")
        tqdm.write(f"by attribute: {dict(zip(ATTRIBUTES, rates.tolist(), strict=True))}")
        pooled = models.embed(contents)[1]
        models.encoder_2.text_projection.weight /= pooled.std()
    save(models, work)
