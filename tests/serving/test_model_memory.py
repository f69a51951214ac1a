"""Models by name: loaded, moved and dropped for one another, and none draws otherwise for it."""

import asyncio
import gc
import random
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sdxl_worker.drawing import generate as generate_module
from sdxl_worker.errors import RequestError
from sdxl_worker.loading.controlnets import find_controlnet
from sdxl_worker.loading.model_dir import find_model_dir
from sdxl_worker.loading.models import Models, load_models
from sdxl_worker.placement import WORKING_MEMORY_BYTES
from sdxl_worker.request import parse_request
from sdxl_worker.serving import model_memory
from sdxl_worker.serving import start as start_module
from sdxl_worker.serving.model_memory import ModelMemory, is_emptied, size_bytes_of
from sdxl_worker.serving.models_kept import ModelsKept
from sdxl_worker.serving.start import put_beside, put_on_card, ready_models, start
from sdxl_worker.serving.threads import on_gpu_thread, start_on_gpu_thread
from sdxl_worker.settings import EMBEDDED_MODEL_DIR, Settings
from tests.control_networks import control, draw_controlled, union, write
from tests.support import draw
from tools import original_format

JOB = {
    "prompt": "a red circle",
    "seed": 1,
    "num_inference_steps": 2,
    "refiner_inference_steps": 0,
    "height": 64,
    "width": 64,
}
NAMES = ["a", "b", "c", "d"]


class Room(ModelMemory):
    """For two models on the card and one on the host, which are one here."""

    kept: ModelsKept[Path, Models]

    def fits_card(self, size_bytes: int) -> bool:  # noqa: ARG002
        return self._count(on_card=True) < 2

    def fits_host(self, size_bytes: int) -> bool:
        # `size_bytes` is less by what would be dropped for it.
        return size_bytes <= 0 or self._count(on_card=False) < 1

    def _count(self, *, on_card: bool) -> int:
        return sum(one.on_card == on_card for one in self.kept._kept.values())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four models that draw different pictures."""
    folder = tmp_path_factory.mktemp("models")
    tensors = original_format.base_checkpoint(EMBEDDED_MODEL_DIR / "base")
    for i, name in enumerate(NAMES):
        changed = dict(tensors)
        changed["model.diffusion_model.out.2.bias"] = torch.full((4,), i / 50).half()
        original_format.save(changed, folder / f"{name}.safetensors")
    return folder


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Iterator[Room]:
    room = Room()
    room.kept = ModelsKept(room)
    monkeypatch.setattr(start_module, "_kept", room.kept)
    monkeypatch.setattr(start_module, "_starts", {})
    monkeypatch.setattr(start_module, "_loads", {})
    yield room
    gc.unfreeze()


def drawn(models: Models) -> bytes:
    return draw(parse_request(JOB), models)[0].tobytes()


def drawn_by(settings: Settings, name: str | None, loads: list[str]) -> bytes:
    """As a job draws."""

    def work(models: Models) -> bytes:
        return drawn(put_on_card(models, settings, loads.append))

    async def job() -> bytes:
        models = await ready_models(settings, name, loads.append)
        return await on_gpu_thread(work, models)

    return asyncio.run(job())


Known = dict[int, "weakref.ref[torch.nn.Parameter]"]


def bytes_since(known: Known) -> int:
    """Of the parameters that are not among those. None is held."""
    return sum(
        one.nbytes for one in parameters_alive() if known.get(id(one), lambda: None)() is not one
    )


def parameters_alive() -> list[torch.nn.Parameter]:
    """Of the whole process."""
    gc.unfreeze()  # each start hides what there is from the garbage collector
    gc.collect()
    return [one for one in gc.get_objects() if isinstance(one, torch.nn.Parameter)]


def test_fifty_random_changes_leave_each_picture_as_it_is(folder: Path, room: Room) -> None:
    settings = Settings(model_dir=folder / "a.safetensors", models_dir=folder)
    alone = {
        name: drawn(load_models(find_model_dir(Settings(model_dir=folder / f"{name}.safetensors"))))
        for name in NAMES
    }
    assert len(set(alone.values())) == 4
    # Those of earlier tests may go meanwhile.
    before = {id(one): weakref.ref(one) for one in parameters_alive()}
    choose = random.Random(1)  # noqa: S311
    loads: list[str] = []
    held = []
    for i in range(50):
        name = choose.choice(NAMES)
        assert drawn_by(settings, name, loads) == alone[name]
        if i % 10 == 9:
            [one] = [room.kept.get(folder / f"{name}.safetensors")]
            assert one is not None
            # Two on the card, one on the host, and nothing of those that were dropped.
            held.append(bytes_since(before) / size_bytes_of(one))
    assert all(2.5 < one < 3.1 for one in held), held
    assert held[0] == held[-1]
    assert 10 < len(loads) < 50


def test_the_one_that_was_used_least_recently_goes(folder: Path, room: Room) -> None:
    settings = Settings(model_dir=folder / "a.safetensors", models_dir=folder)
    loads: list[str] = []
    for name in (None, "b", None, "c", None, "b", "d", None):
        drawn_by(settings, name, loads)
    # "b" comes back from the host; "d" moves the model of MODEL_DIR there, and "c" is dropped.
    assert loads == ["b", "c", "b", "d", "a"]
    assert room.kept.get(folder / "c.safetensors") is None


def test_the_log_tells_how_long_a_change_took_and_from_where(
    folder: Path,
    room: Room,  # noqa: ARG001
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    settings = Settings(model_dir=folder / "a.safetensors", models_dir=folder)
    for name in (None, "b", "c", None):
        drawn_by(settings, name, [])
    told = [record for record in caplog.records if "to the card" in record.getMessage()]
    assert [record.getMessage().partition(" in ")[0] for record in told] == [
        "brought b to the card from the disk",
        "brought c to the card from the disk",
        "brought a to the card from the host's memory",
    ]
    assert all(vars(record)["seconds"] >= 0 for record in told)


def test_a_job_whose_model_was_dropped_meanwhile_still_draws(folder: Path, room: Room) -> None:
    settings = Settings(model_dir=folder / "a.safetensors", models_dir=folder)
    waiting = start(settings).result()
    expected = drawn(waiting)
    for name in "bcd":
        drawn_by(settings, name, [])
    assert room.kept.get(folder / "a.safetensors") is None
    assert is_emptied(waiting)
    assert not list(waiting.vae.parameters())
    loads: list[str] = []
    again = start_on_gpu_thread(put_on_card, waiting, settings, loads.append).result()
    assert loads == ["a"]
    assert drawn(again) == expected
    assert asyncio.run(ready_models(settings)) is again


def test_a_controlnet_moves_and_is_dropped_as_models_are_and_draws_the_same(
    folder: Path, room: Room, tmp_path: Path
) -> None:
    settings = Settings(model_dir=folder / "a.safetensors", models_dir=folder)
    files = find_controlnet("canny", write(union(), tmp_path / "union"), "controlnet[0].type")
    key: Any = files.key
    told: list[str] = []

    def controlled() -> bytes:
        models = put_on_card(first, settings)
        [network] = put_beside(models, [files], told.append)
        assert room.kept.is_on_card(models.model_dir.root)
        assert room.kept.is_on_card(key)
        return draw_controlled(parse_request(JOB), models, [control(network)])[0].tobytes()

    first = start(settings).result()
    expected = start_on_gpu_thread(controlled).result()
    assert expected == draw_controlled(parse_request(JOB), first, [control()])[0].tobytes()
    assert expected != drawn(first)
    for changes in ("b", "bc"):
        for name in changes:
            drawn_by(settings, name, [])
        assert start_on_gpu_thread(controlled).result() == expected
    assert told == ["the ControlNet union"] * 3, "from the disk, then back from the host"
    kept: Any = room.kept.get(key)
    room.kept._drop(key)
    assert is_emptied(kept), "whoever still holds it holds no weights"
    assert start_on_gpu_thread(controlled).result() == expected


@pytest.mark.usefixtures("room")
def test_a_model_that_nobody_keeps_is_left_alone(folder: Path) -> None:
    path = folder / "a.safetensors"
    own = load_models(find_model_dir(Settings(model_dir=path)))
    assert put_on_card(own, Settings(model_dir=path)) is own


@pytest.mark.usefixtures("room")
def test_the_model_of_model_dir_is_the_same_by_its_name(folder: Path) -> None:
    settings = Settings(
        model_dir=folder / "a.safetensors", models_dir=folder, prediction_type="v_prediction"
    )
    by_name = asyncio.run(ready_models(settings, "a"))
    assert by_name is start(settings).result()
    assert by_name.kind == "v-prediction"
    assert asyncio.run(ready_models(settings, "b")).kind == "epsilon"


@pytest.mark.usefixtures("room")
def test_a_model_that_cannot_be_loaded_fails_its_job_alone(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    tensors = original_format.base_checkpoint(EMBEDDED_MODEL_DIR / "base")
    fewer = {name: tensor for name, tensor in tensors.items() if "middle_block" not in name}
    original_format.save(fewer, tmp_path / "fewer.safetensors")
    tensors["model.diffusion_model.out.2.bias"] = torch.full((4,), torch.nan).half()
    original_format.save(tensors, tmp_path / "nan.safetensors")
    settings = Settings(model_dir=tmp_path / "a.safetensors", models_dir=tmp_path)
    expected = drawn_by(settings, None, [])
    for name, message in {
        "fewer": "model: fewer.safetensors has networks of other shapes than SDXL's",
        "nan": "model: the models draw an empty picture",
        "none": 'model: this worker has no "none"',
    }.items():
        with pytest.raises(RequestError) as caught:
            drawn_by(settings, name, [])
        assert str(caught.value).startswith(message)
        assert str(tmp_path) not in str(caught.value)
        assert len(str(caught.value)) < 400
        assert drawn_by(settings, None, []) == expected


@pytest.mark.usefixtures("room")
def test_jobs_that_wait_share_a_load_which_none_of_them_ends(folder: Path) -> None:
    settings = Settings(model_dir=folder / "a.safetensors", models_dir=folder)
    start(settings).result()
    loads: list[str] = []

    async def jobs() -> list[Any]:
        waiting = [
            asyncio.ensure_future(ready_models(settings, "b", loads.append)) for _ in range(3)
        ]
        await asyncio.sleep(0.05)
        waiting[0].cancel()
        return await asyncio.gather(*waiting, return_exceptions=True)

    cancelled, one, other = asyncio.run(jobs())
    assert isinstance(cancelled, asyncio.CancelledError)
    assert one is other
    assert loads == ["b"]


@pytest.mark.usefixtures("room")
def test_loras_are_taken_out_before_a_model_moves(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(model_dir=folder / "a.safetensors", models_dir=folder)
    models = start(settings).result()
    restored = []
    from sdxl_worker.adapters import patching

    monkeypatch.setattr(patching.Patches, "restore", lambda self: restored.append(self))
    for name in "bcd":
        drawn_by(settings, name, [])
    assert restored[0] is patching.patches_of(models)
    assert len(restored) == 3  # of the first one twice: to the host, and from there to nowhere


@pytest.mark.usefixtures("room")
def test_the_optimizations_are_those_of_the_settings_and_a_first_picture_is_drawn(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sdxl_worker.speed import optimize as optimize_module

    optimized: list[Any] = []
    pictures: list[Any] = []
    optimize, generate = optimize_module.optimize, generate_module.generate

    def noted_optimize(*given: Any) -> None:
        optimized.append(given)
        optimize(*given)

    def noted_generate(*given: Any, **options: Any) -> Any:
        pictures.append(given)
        return generate(*given, **options)

    monkeypatch.setattr(optimize_module, "optimize", noted_optimize)
    monkeypatch.setattr(generate_module, "generate", noted_generate)
    settings = Settings(model_dir=folder / "a.safetensors", models_dir=folder)
    for name in (None, "b"):
        asyncio.run(ready_models(settings, name))
    assert len(optimized) == len(pictures) == 2


@pytest.mark.parametrize("missing_bytes", [0, 1])
def test_without_a_gpu_models_stay_as_long_as_the_host_has_room(
    missing_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 10**9 + WORKING_MEMORY_BYTES - missing_bytes
    monkeypatch.setattr(model_memory, "free_host_bytes", lambda: free)
    memory = ModelMemory()
    assert memory.fits_card(10**9) == (missing_bytes == 0)
    assert not memory.fits_host(1)


@pytest.mark.parametrize("missing_bytes", [0, 1])
def test_on_a_gpu_working_memory_is_left_on_the_card_and_on_the_host(
    missing_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 10**9 + WORKING_MEMORY_BYTES - missing_bytes
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 0))
    monkeypatch.setattr(model_memory, "free_host_bytes", lambda: free)
    assert ModelMemory().fits_card(10**9) == (missing_bytes == 0)
    assert ModelMemory().fits_host(10**9) == (missing_bytes == 0)
