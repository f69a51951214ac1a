"""The start of a worker, up to its first picture, and of further models that requests name: on the
GPU thread.

torch is imported where it is first needed, because that takes seconds.
"""

import asyncio
import contextlib
import gc
import itertools
import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_worker.errors import BrokenFilesError, ModelError, PictureError, RequestError, let_go
from sdxl_worker.few_step import CHECKPOINT_BYTES, with_settings_of
from sdxl_worker.gpu import free_memory, is_out_of_memory
from sdxl_worker.loading.file_hash import hash_in_background
from sdxl_worker.loading.model_dir import ModelDir, find_model_dir
from sdxl_worker.loading.models_by_name import find_by_name, reason
from sdxl_worker.loading.read_ahead import read_ahead
from sdxl_worker.loading.safety_labels import check_safety_checker
from sdxl_worker.loading.sparing_imports import sparing_imports
from sdxl_worker.request import CHECK_INPUT, parse_request
from sdxl_worker.serving.model_memory import ModelMemory, is_emptied, size_bytes_of
from sdxl_worker.serving.models_kept import ModelsKept
from sdxl_worker.serving.threads import in_thread, start_on_gpu_thread
from sdxl_worker.settings import Settings

if TYPE_CHECKING:
    import torch

    from sdxl_worker.loading.companions import CompanionFiles
    from sdxl_worker.loading.models import Models

log = logging.getLogger(__name__)

# On a CPU, a full-size model takes minutes at its native size.
CHECK_INPUT_ON_CPU = {**CHECK_INPUT, "height": 64, "width": 64}

_lock = threading.Lock()
_starts: dict[Settings, "Future[Models]"] = {}
# Those that were loaded since the last start, by `ModelDir.root` or a companion's key, and those
# that are being loaded.
_kept: ModelsKept[Hashable, Any] = ModelsKept(ModelMemory())
_loads: dict[Path, "Future[Models]"] = {}


def start(
    settings: Settings, before_drawing: Callable[[], object] = lambda: None
) -> "Future[Models]":
    """Begin to make the models ready, or return what an earlier call began.

    Args:
        before_drawing: called on the GPU thread before the first picture.

    Returns:
        The models, once they have drawn. The future raises `ModelError` if they cannot be loaded,
        or draw nothing because the GPU or the weights are broken.
    """
    with _lock:
        begun = _starts.get(settings)
        failed = begun is not None and begun.done() and (begun.cancelled() or begun.exception())
        if begun is None or failed:
            _starts.clear()
            _loads.clear()
            _kept.forget()
            _starts[settings] = start_on_gpu_thread(_start, settings, before_drawing)
        return _starts[settings]


async def ready_models(
    settings: Settings,
    name: str | None = None,
    on_loading: Callable[[str], None] = lambda _: None,
) -> "Models":
    """A model, once it is ready. A job that is cancelled meanwhile ends neither the start nor the
    loading of another model.

    Args:
        name: of one in `MODELS_DIR`. None: that of `MODEL_DIR`.
        on_loading: called on the GPU thread with the model's name, where it has to be read from
            the disk.

    Raises:
        RequestError: there is no such model, or it cannot be loaded.
        ModelError: that of `MODEL_DIR` cannot be loaded.
    """
    first = await asyncio.shield(asyncio.wrap_future(start(settings)))
    if name is None:
        return _kept.get(first.model_dir.root) or first
    model_dir = await in_thread(find_by_name, name, settings, first.model_dir)
    if model_dir.root == first.model_dir.root:
        return _kept.get(model_dir.root) or first
    if (kept := _kept.get(model_dir.root)) is not None:
        return kept
    with _lock:
        load = _loads.get(model_dir.root)
        if load is None or load.done():
            load = start_on_gpu_thread(_bring, model_dir, settings, on_loading)
            _loads[model_dir.root] = load
    return await asyncio.shield(asyncio.wrap_future(load))


def put_on_card(
    models: "Models", settings: Settings, on_loading: Callable[[str], None] = lambda _: None
) -> "Models":
    """The same model, ready to be drawn with: since `ready_models` gave it, it may have been moved
    to the host, or dropped for others. On the GPU thread, before each job's drawing.

    Args:
        on_loading: called with the model's name, where it is not on the card.

    Raises:
        RequestError: it was dropped, and cannot be loaded again.
    """
    if _kept.get(models.model_dir.root) is None and not is_emptied(models):
        return models  # of an earlier start, or made by someone else: nobody moves it
    return _bring(models.model_dir, settings, on_loading)


def put_beside(
    models: "Models",
    companions: "Sequence[CompanionFiles]",
    on_loading: Callable[[str], None] = lambda _: None,
    fields: Sequence[str] = (),
) -> "list[torch.nn.Module]":
    """Companions, ready to be used beside a model that is on the card. On the GPU thread.

    Args:
        on_loading: called with the title of each that is not on the card.
        fields: of the request, of each companion that which asks for it. None: it is the owner who
            asks for them.

    Raises:
        RequestError: one cannot be loaded.
    """
    beside = [models.model_dir.root, *(files.key for files in companions)]
    networks = []
    for files, field in itertools.zip_longest(companions, fields):
        try:
            if not is_beside(files):
                on_loading(files.title)
            networks.append(_bring_beside(models, files, beside))
        except ModelError as error:
            log.warning("%s cannot be loaded: %s", files.title, error)
            raise RequestError(_told(error, files.title, field)) from None
    return networks


def _told(error: ModelError, title: str, field: str | None) -> str:
    """Of a companion that cannot be loaded, for a caller."""
    if isinstance(error, BrokenFilesError):
        what = f"{title} cannot be loaded; the worker's owner should fetch it again"
        return f"{field}: {what}" if field else what
    return error.at(field) if field else str(error)


def is_beside(files: "CompanionFiles") -> bool:
    """Whether the companion is on the card: nothing has to go for it. On the GPU thread."""
    return _kept.is_on_card(files.key)


def _bring_beside(
    models: "Models", files: "CompanionFiles", beside: Sequence[Hashable]
) -> "torch.nn.Module":
    """
    Args:
        beside: those that stay where they are.

    Raises:
        ModelError: the companion cannot be loaded.
    """
    from sdxl_worker.loading.companions import Companion
    from sdxl_worker.speed.cuda_graphs import forget_recordings

    def load() -> Companion:
        with _timed(f"loaded {files.title}"):
            return Companion(files.title, models.placement, files.load(models.placement))

    def bring() -> "torch.nn.Module":
        size_bytes = 0 if _kept.get(files.key) else files.size_bytes(models.dtype)
        return _kept.bring(files.key, size_bytes, load, beside).network

    try:
        return bring()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        let_go(error)
    # What CUDA graphs keep is needed only by later jobs.
    forget_recordings(models.unets())
    free_memory()
    return bring()  # one that could not go to the card is kept no more


def _bring(model_dir: ModelDir, settings: Settings, on_loading: Callable[[str], None]) -> "Models":
    root = model_dir.root

    def load() -> "Models":
        return _load_and_draw(model_dir, settings)

    if _kept.is_on_card(root):
        return _kept.bring(root, 0, load)
    on_loading(model_dir.name)
    try:
        if _kept.get(root) is not None:
            with _timed(f"brought {model_dir.name} to the card from the host's memory"):
                return _kept.bring(root, 0, load)
        with _timed(f"brought {model_dir.name} to the card from the disk"):
            from sdxl_worker.loading.weights import bytes_of

            files = model_dir.weight_files(settings.dtype)
            return _kept.bring(root, bytes_of(files, settings.dtype), load)
    except ModelError as error:
        log.warning("%s cannot be loaded: %s", model_dir.name, error)
        raise RequestError(f"model: {reason(error, root)}") from None


def _start(settings: Settings, before_drawing: Callable[[], object]) -> "Models":
    # Importing the libraries makes millions of objects, which all stay: searching them for garbage
    # took a sixth of the time.
    gc.disable()
    try:
        _check_folders(settings)
        model_dir = find_model_dir(settings)
        models = _load_and_draw(model_dir, settings, before_drawing, compiles=True)
        _kept.bring(model_dir.root, size_bytes_of(models), lambda: models)
        if settings.safety_checker is not None:
            from sdxl_worker.loading.safety_checkers import SafetyCheckerFiles

            files = SafetyCheckerFiles(settings.safety_checker)
            _bring_beside(models, files, [model_dir.root])
        return models
    finally:
        gc.freeze()
        gc.enable()


def _check_folders(settings: Settings) -> None:
    if settings.safety_blank and settings.safety_checker is None:
        raise ModelError("SAFETY_BLANK: needs SAFETY_CHECKER, without which nothing is flagged")
    for name in (
        *("lora_dir", "models_dir", "controlnet_dir", "ip_adapter_dir", "upscaler_dir"),
        "safety_checker",
    ):
        folder = getattr(settings, name)
        if folder is not None and not folder.is_dir():
            raise ModelError(f"{name.upper()}: {folder} must be a folder; is its volume attached?")
    if settings.safety_checker is not None:
        check_safety_checker(settings.safety_checker)


def _load_and_draw(
    model_dir: ModelDir,
    settings: Settings,
    before_drawing: Callable[[], object] = lambda: None,
    *,
    compiles: bool = False,
) -> "Models":
    """The weights are read while the libraries are imported, those of a refiner also while the
    base draws its first picture.

    Args:
        compiles: whether it may, or takes what was compiled at the start: for networks of the same
            configuration.
    """
    with _timed("imported the libraries"):
        files = model_dir.weight_files(settings.dtype)
        configs = model_dir.configs()
        # A file that several networks share is read once.
        read_ahead(dict.fromkeys(path for paths in files.values() for path in paths))

        from sdxl_worker.loading.weights import choose_placement, start_reading

        placement = choose_placement(files, settings.dtype)
        weights = start_reading(model_dir, files, placement)
        with sparing_imports():
            import torch

            from sdxl_worker.drawing import generate  # noqa: F401  what a picture needs
            from sdxl_worker.loading.models import add_refiner, load_base
            from sdxl_worker.speed import compiling
            from sdxl_worker.speed.host_bound import is_host_bound, unet_pass
            from sdxl_worker.speed.optimize import (
                MODES,
                OF_A_WHOLE_UNET,
                optimizations_of,
                optimize,
            )

    optimizations = set(optimizations_of(settings, placement))
    judges = settings.compile == "auto" and "cuda_graphs" in optimizations
    if judges:
        optimizations.remove("cuda_graphs")
    if settings.step_cache is not None:
        left_out = MODES[settings.compile] & OF_A_WHOLE_UNET
        log.info(
            "STEP_CACHE: one step in %d is a deep one%s",
            settings.step_cache,
            f"; not beside it, of COMPILE: {', '.join(sorted(left_out))}" if left_out else "",
        )
    with contextlib.ExitStack() as around:
        if compiles:
            folder = settings.compile_cache_dir
            around.enter_context(compiling.kept(folder, optimizations, placement, configs))
            around.enter_context(compiling.at_the_start(optimizations))
        with _timed("loaded the base"):
            models = load_base(weights)
            optimize(optimizations, models.unet, models.vae)
        before_drawing()
        _draw_first_picture(models, settings)
        if model_dir.refiner is not None:
            with _timed("loaded the refiner"):
                models = add_refiner(models, weights)
                optimize(optimizations, models.refiner_unet)
            _draw_first_picture(models, settings)
    # Now no thread that reads weights takes time from the host. The base is judged for both: where
    # the refiner is not bound by the host, its recordings cost memory, and no step is slower.
    if judges and is_host_bound(unet_pass(models.unet), torch.cuda.synchronize):
        for unet in models.unets():
            optimize(["cuda_graphs"], unet)
    if model_dir.checkpoint is not None:
        path = model_dir.checkpoint.path
        hashing = hash_in_background(path)
        if path.stat().st_size in CHECKPOINT_BYTES:
            hashing.join()
    return models


def _draw_first_picture(models: "Models", settings: Settings) -> None:
    """The first picture takes longer than later ones, and shows whether there can be any."""
    from sdxl_worker.drawing.generate import generate
    from sdxl_worker.drawing.stages import plan_stages

    with _timed("drew a first picture"):
        on_gpu = models.device.type == "cuda"
        request = parse_request(CHECK_INPUT if on_gpu else CHECK_INPUT_ON_CPU)
        request = with_settings_of(request, None, models.scheduler_config)
        stages = plan_stages(request, models)
        try:
            [picture] = generate(request, stages, models, step_cache_interval=settings.step_cache)
            is_empty = len(picture.getcolors(picture.width * picture.height) or []) == 1
        except PictureError:
            is_empty = True
    if is_empty:
        raise ModelError("the models draw an empty picture: the GPU or the weights are broken")


@contextlib.contextmanager
def _timed(what: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds = time.perf_counter() - started
    log.info("%s in %.1f s", what, seconds, extra={"seconds": round(seconds, 2)})
