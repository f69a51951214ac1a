"""A request's `path` of an adapter becomes a whole, checked file on disk."""

from dataclasses import dataclass, field
from pathlib import Path

from sdxl_worker.safetensors_header import SafetensorsHeader


@dataclass(frozen=True)
class AdapterFile:
    path: Path
    """Readable as long as the job runs that asked for it."""
    sha256: str
    """Of the whole file, in hex."""
    name: str
    """For messages and metadata: without secrets, and without the worker's folders."""
    header: SafetensorsHeader = field(repr=False, compare=False)
