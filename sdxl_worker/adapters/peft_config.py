"""What diffusers notes in a file of how peft was configured: its alphas, which are no tensors."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdxl_worker.adapters.module_names import NETWORKS

PEFT_CONFIG = "lora_adapter_metadata"
# peft takes any regular expression there; those that diffusers writes are names.
PLAIN_PATTERN = re.compile(r"\^?[\w.]+")


@dataclass(frozen=True)
class PeftConfig:
    alpha: float | None
    alphas: Mapping[str, float]
    """Of some modules, by the end of their names, or behind ^ by the whole name."""
    by_root: bool
    """rsLoRA: alpha is divided by the root of the rank (https://arxiv.org/abs/2312.03732)."""
    use_dora: bool

    def factor(self, module: str, rank: int) -> float:
        # As in the names of files, "text_model." may be there or not.
        full = f".text_model.{module.removeprefix('text_model.')}"
        alpha = self.alpha
        for pattern, own_alpha in self.alphas.items():
            if pattern.startswith("^"):
                is_meant = pattern[1:] in (module, full[1:])
            else:
                is_meant = full.endswith(f".{pattern}")
            if is_meant:
                alpha = own_alpha
                break
        return 1.0 if alpha is None else alpha / (math.sqrt(rank) if self.by_root else rank)


def peft_configs(metadata: Mapping[str, str]) -> dict[str, PeftConfig]:
    """By network. The ranks that are noted are also those of the tensors, which are used.

    Raises:
        ValueError: something is noted that is not understood.
    """
    try:
        noted = json.loads(metadata.get(PEFT_CONFIG, "{}"))
        configs = {}
        for network in NETWORKS:
            own = {
                key.removeprefix(f"{network}."): value
                for key, value in noted.items()
                if key.startswith(f"{network}.")
            }
            if own:
                alpha = own.get("lora_alpha")
                alphas = (
                    {pattern: _finite(value) for pattern, value in own["alpha_pattern"].items()}
                    if own.get("alpha_pattern")
                    else {}
                )
                if not all(map(PLAIN_PATTERN.fullmatch, alphas)):
                    raise ValueError
                configs[network] = PeftConfig(
                    None if alpha is None else _finite(alpha),
                    alphas,
                    bool(own.get("use_rslora")),
                    bool(own.get("use_dora")),
                )
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        raise ValueError(f"{PEFT_CONFIG} is not understood") from None
    return configs


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number
