"""What `SAFETY_CHECKER` flags, by the labels in its folder.

Without torch: a folder that will not do is refused before anything is loaded.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from sdxl_worker.errors import ModelError
from sdxl_worker.loading.transformers_folders import numbers_in

SETTING = "SAFETY_CHECKER"
# A label with one of these in it is one that is flagged, but not "not nsfw".
FLAGGED = ("nsfw", "unsafe", "porn", "hentai", "explicit", "sexual", "sexy")
_NOT = {"no", "non", "not"}
# Of a configuration that timm wrote, transformers makes labels in ways of its own.
_OF_TIMM = "pretrained_cfg"


def check_safety_checker(folder: Path) -> None:
    """As far as that takes no time.

    Raises:
        ModelError: the folder has no such network.
    """
    numbers_in(folder, SETTING)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{SETTING}: config.json in {folder} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise ModelError(f"{SETTING}: config.json in {folder} is no JSON object")
    labels = config.get("id2label")
    if labels is None and _OF_TIMM in config:
        return
    flags(list(map(str, labels.values())) if isinstance(labels, dict) else [], folder)


def flags(labels: Sequence[str], folder: Path) -> list[bool]:
    """Of each label, whether a picture of that label is flagged.

    Args:
        folder: for messages.

    Raises:
        ModelError: all of them, or none.
    """
    flagged = [is_flagged(label) for label in labels]
    if not any(flagged) or all(flagged):
        raise ModelError(
            f"{SETTING}: the classifier in {folder} must have labels that say "
            f"{', '.join(FLAGGED[:-1])} or {FLAGGED[-1]}, and others that do not; it has "
            f"{', '.join(labels) or 'none (id2label in its config.json)'}"
        )
    return flagged


def is_flagged(label: str) -> bool:
    words = re.split(r"[^a-z]+", label.lower())
    return any(one in label.lower() for one in FLAGGED) and _NOT.isdisjoint(words)
