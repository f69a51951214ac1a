"""Where the model is."""

import logging
from pathlib import Path

from sdxl_worker.errors import ModelError
from sdxl_worker.settings import EMBEDDED_MODEL_DIR, Settings

log = logging.getLogger(__name__)


def find_model_dir(settings: Settings) -> Path:
    """The folder with base/ and refiner/.

    Raises:
        ModelError: there is none.
    """
    model_dir = settings.model_dir
    if model_dir is None:
        log.info("MODEL_DIR is not set: using the embedded miniature model, %s", EMBEDDED_MODEL_DIR)
        model_dir = EMBEDDED_MODEL_DIR
    if not (model_dir / "base").is_dir():
        raise ModelError(
            f"MODEL_DIR: {model_dir} must be a folder that holds base/ (and refiner/, if there "
            "is one) in diffusers layout"
        )
    return model_dir
