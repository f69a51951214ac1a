"""Importing diffusers and transformers without what SDXL does not use saves a fifth of the start.

Both import far more than they are asked for. What is left out here is imported later, when
something asks for it.
"""

import contextlib
import functools
import importlib.util
import sys
from collections.abc import Iterator
from typing import Any

# Packages whose __init__ reads or imports everything below them, for names that nothing here uses.
POSTPONED = ("transformers.models", "diffusers.models.transformers")
# Libraries that diffusers and transformers import wherever they find them.
HIDDEN = ("scipy", "torchao")


@contextlib.contextmanager
def sparing_imports() -> Iterator[None]:
    """Around the first import of the libraries.

    scipy and torchao are hidden from them meanwhile: they use scipy for object detection and for
    noise schedules of other kinds, torchao to read files that it wrote. diffusers goes on without
    scipy afterwards; `schedulers.py` gives `KLMS` what it needs of it.
    """
    hidden = [name for name in HIDDEN if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # what Python takes for "not there"
    try:
        for package in POSTPONED:
            if package not in sys.modules:
                _postpone(package)
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def _postpone(package: str) -> None:
    """Put a package in place without running it; it runs when something asks for a name in it.

    Its submodules can be imported before that.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.loader is None:
        return  # another version of the library, which has no such package
    module = importlib.util.module_from_spec(spec)
    run = spec.loader.exec_module

    def on_missing_name(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        del vars(module)["__getattr__"]
        run(module)
        # Some packages put another module in their own place.
        real = sys.modules[package]
        if real is not module:
            vars(module)["__getattr__"] = functools.partial(getattr, real)
        return getattr(real, name)

    vars(module)["__getattr__"] = on_missing_name
    sys.modules[package] = module
    parent, _, child = package.rpartition(".")
    setattr(sys.modules[parent], child, module)  # as the import system does
