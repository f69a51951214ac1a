"""Versions of the libraries that decide what a picture looks like."""

import functools
from importlib.metadata import version


@functools.cache
def library_versions(*, quantized: bool = False) -> dict[str, str]:
    names = ["diffusers", "torch", "transformers"] + ["torchao"] * quantized
    return {name: version(name) for name in names}
