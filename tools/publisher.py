"""Who publishes the worker, and what its image is called: both from `repository` in pyproject.toml.

`python3 -m tools.publisher` prints the image's name, for the workflow that pushes it. It needs the
standard library alone.
"""

import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"
REGISTRY = "ghcr.io"


def publisher() -> str:
    """The owner and name on GitHub, which are those of the Hub's listing as well."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    return str(project["urls"]["repository"]).removeprefix("https://github.com/")


def image() -> str:
    """The name of the image that a release pushes, without a tag. Registries take no capitals."""
    return f"{REGISTRY}/{publisher()}".lower()


if __name__ == "__main__":
    print(image())
