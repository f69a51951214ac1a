"""Fetches the weights that an image serves: `python -m builder.download_weights --to /models/sdxl`.

Needs `builder/requirements.txt` only; converting a single-file checkpoint needs torch and
diffusers, too.
"""


class DownloadError(Exception):
    """The model cannot be fetched; the message says why and what to do."""
