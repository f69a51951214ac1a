"""A MODEL_DIR of SDXL's size with random numbers, 11.5 GB: it loads and draws as fast as others.

python -m benchmarks.full_size_model --out sdxl-random
"""

import argparse
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.sdxl_architecture import write_configs


def write(folder: Path) -> Path:
    """The folder, which is made."""
    import torch

    from tools.random_model import write_weights

    root = write_configs(folder)
    torch.manual_seed(0)
    write_weights(root, torch.float16, "cuda" if torch.cuda.is_available() else "cpu")
    return root


@contextlib.contextmanager
def model_dir(name: str) -> Iterator[dict[str, str]]:
    """The worker's variables for a model.

    Args:
        name: "full", or "" for that of MODEL_DIR, the embedded one if it is not set.
    """
    if not name:
        yield {}
        return
    with tempfile.TemporaryDirectory() as folder:
        yield {"MODEL_DIR": str(write(Path(folder) / "model"))}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder to make")
    write(parser.parse_args().out)


if __name__ == "__main__":
    main()
