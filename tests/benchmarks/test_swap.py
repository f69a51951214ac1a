"""`benchmarks.swap`, on the embedded model throughout."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import adapters, coldstart, swap
from benchmarks.flops import Flops
from benchmarks.sdxl_architecture import CONFIGS
from sdxl_worker.adapters.patching import patches_of
from sdxl_worker.loading.model_dir import find_model_dir
from sdxl_worker.loading.models import Models, load_models
from sdxl_worker.settings import EMBEDDED_MODEL_DIR, Settings
from tests.support import fresh_models

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    swap.write_models(folder, "embedded", "cpu")
    return folder


def test_both_layouts_have_the_same_weights(models_dir: Path) -> None:
    one, other = (
        load_models(find_model_dir(Settings(model_dir=swap.path_of(layout, models_dir))))
        for layout in swap.LAYOUTS
    )
    for name, network in one.networks().items():
        tensors = other.networks()[name].state_dict()
        assert network.state_dict().keys() == tensors.keys()
        assert all(torch.equal(it, tensors[key]) for key, it in network.state_dict().items())


def test_the_full_size_is_written_in_both_layouts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here with the embedded model's numbers of channels."""
    small = {
        name: json.loads((EMBEDDED_MODEL_DIR / name / "config.json").read_text())
        for name in CONFIGS
    }
    monkeypatch.setattr("benchmarks.sdxl_architecture.CONFIGS", small)
    swap.write_models(tmp_path, "full", "cpu")
    for layout in swap.LAYOUTS:
        found = find_model_dir(Settings(model_dir=swap.path_of(layout, tmp_path)))
        assert load_models(found).refiner_unet is None


def test_what_is_in_the_page_cache_is_known(models_dir: Path) -> None:
    files = swap.weight_files("folder", models_dir)
    assert len(files) == 4
    size = sum(path.stat().st_size for path in files)
    swap.out_of_page_cache(files)
    read = [swap.bytes_read()]
    for _ in range(2):
        swap.to_page_cache(files)
        read.append(swap.bytes_read())
    assert read[1] - read[0] >= (0 if _in_memory(models_dir) else size)
    assert read[2] == read[1]


def test_swaps_are_read_from_the_disk_or_from_the_page_cache(models_dir: Path) -> None:
    """Of a file that is in the page cache, nothing is read; a file system in memory has no disk."""
    on_disk = not _in_memory(models_dir)
    figures = swap.swaps(models_dir, ["cold", "warm"], 1, "bfloat16")
    for state in ("cold", "warm"):
        for layout in swap.LAYOUTS:
            [one] = figures[state][layout]
            assert 0 < one["first_picture_s"] < one["seconds"]
            assert (one["read_gb"] > 0) == (state == "cold" and on_disk)


def _in_memory(path: Path) -> bool:
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    [(_, kind)] = [max((m for m in mounts if path.is_relative_to(m[0])), key=lambda m: len(m[0]))]
    return kind == "tmpfs"


def test_from_the_host_nothing_is_loaded_and_nothing_drawn(models_dir: Path) -> None:
    figures = swap.swaps(models_dir, ["host"], 2, "bfloat16")
    swapped = [one for layout in swap.LAYOUTS for one in figures["host"][layout]]
    assert len(swapped) == 4
    assert all(one["first_picture_s"] == one["read_gb"] == 0 for one in swapped)


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "bfloat16"), ("cuda", "float16")])
def test_swaps_from_the_host_are_measured_on_a_gpu_alone(
    device: str, dtype: str, models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere the card is the host, and nothing moves."""
    asked: list[tuple[list[str], str]] = []

    def swaps(_: Path, states: list[str], __: int, dtype: str) -> dict[str, object]:
        asked.append((states, dtype))
        return {state: {"file": []} for state in states}

    monkeypatch.setattr(swap, "swaps", swaps)
    figures = swap.measure_swap(models_dir, 1, torch.device(device))
    host = [(["host"], dtype)] if device == "cuda" else []
    assert asked == [*host, (["cold", "warm"], dtype)]
    assert figures["from_host"] == ({"file": []} if device == "cuda" else None)
    assert figures["from_disk"].keys() == {"cold", "warm"}


def test_starts_are_of_both_layouts_in_turns(
    models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, str]] = []

    def measure(_: object, environment: dict[str, str]) -> coldstart.Start:
        started.append(environment)
        return coldstart.Start(ready_s=float(len(started)), cpu_s=1.0)

    monkeypatch.setattr(coldstart, "measure", measure)
    seconds = swap.starts(models_dir, 2, "bfloat16")
    folder, file = (str(swap.path_of(layout, models_dir)) for layout in swap.LAYOUTS)
    assert [one["MODEL_DIR"] for one in started] == [file, folder, folder, file, file, folder]
    assert seconds == {"folder": [3.0, 6.0], "file": [4.0, 5.0]}
    ratio = swap.ratios(seconds["file"], seconds["folder"])
    assert ratio == {"median": round((4 / 3 + 5 / 6) / 2, 3), "range": [0.833, 1.333]}


def test_pictures_are_in_few_steps_with_the_lora_and_in_many_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = fresh_models(), fresh_models()
    adapters.lora(one, tmp_path, 4)
    monkeypatch.setattr(swap, "FEW_STEP_LORA", tmp_path / "0.safetensors")
    for name, fields in swap.REQUESTS.items():
        monkeypatch.setitem(swap.REQUESTS, name, {**fields, "height": 64, "width": 64})
    passes: list[tuple[str, int, int]] = []

    def note(what: str, models: Models, unet: torch.nn.Module) -> None:
        unet.register_forward_pre_hook(
            lambda _, inputs: passes.append((what, len(inputs[0]), len(patches_of(models).key)))
        )

    note("many", one, one.unet)
    note("few", other, other.unet)
    assert one.refiner_unet is not None
    note("refiner", one, one.refiner_unet)
    used = {"default": one, "base": one, "few_steps": other}
    given = dict.fromkeys(used, swap.NO_ADAPTERS) | {"few_steps": swap.few_step_adapters(other)}
    seconds = swap.pictures(used, given, rounds=1)
    # In each of two rounds; guidance makes two of each picture.
    of_round = 25 * [("many", 2, 0)] + 15 * [("refiner", 2, 0)] + 25 * [("many", 2, 0)]
    assert passes == 2 * (of_round + 4 * [("few", 1, 1)])
    assert all(len(of_request) == 1 and of_request[0] > 0 for of_request in seconds.values())


def test_without_its_lora_the_settings_alone_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    flops = Flops(base=3, base_shallow=0, refiner=2, refiner_shallow=0, decode=5, text=1)
    monkeypatch.setattr(swap, "count_flops", lambda *_: flops)
    monkeypatch.setattr(swap, "FEW_STEP_LORA", Path("nowhere.safetensors"))
    monkeypatch.setattr(swap, "pictures", lambda *_: {name: [2.0, 2.0] for name in swap.REQUESTS})
    figures = swap.measure_pictures(2, CPU)
    assert (figures["model"], figures["few_step_lora"]) == ("embedded", False)
    assert figures["by_default"]["few_steps"]["median"] == 1
    operations = (4 * 3 + 5 + 1) / (2 * (25 * 3 + 15 * 2) + 5 + 2)
    assert figures["few_steps_of_operations"] == round(operations, 4)


def test_one_part_is_measured_anew_and_the_others_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "swap-cpu.json").write_text('{"swap": {"kept": 1}, "pictures": {"old": 1}}')
    monkeypatch.setattr(swap, "measure_pictures", lambda *_: {"new": 1})
    monkeypatch.setattr(
        sys, "argv", ["swap", "--device", "cpu", "--only", "pictures", "--out", str(tmp_path)]
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    swap.main()
    result = json.loads((tmp_path / "swap-cpu.json").read_text())
    assert result["swap"] == {"kept": 1}
    assert result["pictures"]["new"] == 1
    assert "old" not in result["pictures"]
    assert {"date", "device", "cores", "torch"} <= result["pictures"].keys()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_not_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["swap", "--device", "cuda"])
    with pytest.raises(SystemExit):
        swap.main()
    assert "--device cuda: there is none" in capsys.readouterr().err
