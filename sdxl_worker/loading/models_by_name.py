"""The models in `MODELS_DIR`, among which requests choose by name."""

from pathlib import Path

from sdxl_worker.errors import ModelError, RequestError
from sdxl_worker.loading.model_dir import CONFIGS_DIR, ModelDir, open_model, with_vae
from sdxl_worker.settings import Settings
from sdxl_worker.wording import near_match, shown

SUFFIX = ".safetensors"
# In diffusers' layout, or in the hub's cache.
PARTS_OF_FOLDERS = ("base", "model_index.json", "snapshots")
MAX_NAMES_TOLD = 20
MAX_REASON_CHARACTERS = 300


def find_by_name(name: str, settings: Settings, default: ModelDir) -> ModelDir:
    """
    Args:
        name: of a folder, or of a .safetensors file, with or without that ending; or that of the
            default.
        default: that of `MODEL_DIR`, which one in `MODELS_DIR` of the same name comes before.

    Raises:
        RequestError: there is none of that name, or it cannot be served.
    """
    folder = settings.models_dir
    stem = name.removesuffix(SUFFIX)
    places = {} if folder is None else _places(folder)
    if stem not in places and stem == default.name.removesuffix(SUFFIX):
        return default
    if folder is None:
        raise RequestError(
            f"model: this worker has one model, {shown(default.name)}, and chooses among no "
            "others: leave the field out, or let the worker's owner set MODELS_DIR"
        )
    place = places.get(stem)
    if place is None or (name.endswith(SUFFIX) and place.name != name):
        raise RequestError(
            f"model: this worker has no {shown(name)}{near_match(stem, places)}; it has "
            f"{_told(places)}; left out, the field means {shown(default.name)}"
        )
    try:
        found = open_model(place)
    except ModelError as error:
        raise RequestError(f"model: {reason(error, place)}") from None
    if found is None:
        raise RequestError(
            f"model: {shown(name)} is no model: a folder must hold base/ or model_index.json in "
            "diffusers layout"
        )
    return with_vae(found, settings.vae_dir)


def names_of_models(settings: Settings, default: ModelDir) -> dict[str, Path]:
    """Where the models are that a request may name, by name: the default, then the others. Whether
    they can be served shows when one is asked for.
    """
    others = {} if settings.models_dir is None else _places(settings.models_dir)
    others = {name: place for name, place in others.items() if _may_be_model(place)}
    return {default.name: default.root} | dict(sorted(others.items()))


def reason(error: ModelError, place: Path) -> str:
    """Why a model cannot be had, for a caller, who is not told where on the worker it lies."""
    text = str(error).removeprefix("MODEL_DIR: ").replace(str(place), place.name)
    text = text.replace(str(place.parent), "MODELS_DIR")
    text = " ".join(text.split())
    cut = text[:MAX_REASON_CHARACTERS]
    return cut if cut == text else f"{cut}..."


def _places(folder: Path) -> dict[str, Path]:
    """By name. A file comes before a folder of the same name."""
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return {}
    entries = [path for path in entries if not path.name.startswith(".")]
    folders = {
        path.name: path for path in entries if path.is_dir() and path.name != CONFIGS_DIR.name
    }
    files = {path.name.removesuffix(SUFFIX): path for path in entries if path.suffix == SUFFIX}
    return folders | files


def _may_be_model(place: Path) -> bool:
    return place.is_file() or any((place / part).exists() for part in PARTS_OF_FOLDERS)


def _told(places: dict[str, Path]) -> str:
    names = sorted(name for name, place in places.items() if _may_be_model(place))
    if not names:
        return "none: its MODELS_DIR has no models, or cannot be read"
    told = ", ".join(shown(name) for name in names[:MAX_NAMES_TOLD])
    more = len(names) - MAX_NAMES_TOLD
    return f"{told} and {more} more" if more > 0 else told
