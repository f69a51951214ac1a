"""A file that a request names, whole and checked."""

from dataclasses import dataclass, field
from pathlib import Path

from sdxl_worker.safetensors_header import SafetensorsHeader


@dataclass(frozen=True)
class AdapterFile:
    path: Path
    """Stays there as long as this object lives."""
    sha256: str
    """Of the whole file, in hex."""
    name: str
    """For messages and metadata: a path by which a request names it, without secrets."""
    header: SafetensorsHeader = field(repr=False, compare=False)
