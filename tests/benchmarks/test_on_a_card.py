"""What is run on a card that is at hand for some minutes, tried on a CPU."""

import os
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import card_checks, common, on_a_card, pictures
from benchmarks.card_checks import CHECKS, Machine, same
from benchmarks.on_a_card import Step

CPU = Machine(torch.device("cpu"))


class TestAPlan:
    def test_a_step_that_fails_or_takes_too_long_costs_the_others_nothing(
        self, tmp_path: Path
    ) -> None:
        steps = [
            Step("fails", ("this_is_no_module",), 60),
            Step("hangs", ("http.server", "0", "--bind", "127.0.0.1"), 2),
            Step("done", ("this",), 60, {"PYTHONHASHSEED": "0"}),
        ]
        started = time.monotonic()
        ends = on_a_card.run(steps, tmp_path / "out", 5)
        assert time.monotonic() - started < 30
        assert ends["fails"].startswith("failed with status 1 after ")
        assert ends["hangs"].startswith("cut off after ")
        assert ends["done"].startswith("done after ")
        log = (tmp_path / "out" / "log.txt").read_text()
        assert "No module named this_is_no_module" in log
        assert "Beautiful is better than ugly" in log

    def test_it_ends_in_time(self, tmp_path: Path) -> None:
        hangs = ("http.server", "0", "--bind", "127.0.0.1")
        steps = [Step(f"{i}", hangs, 60) for i in range(3)]
        started = time.monotonic()
        ends = on_a_card.run(steps, tmp_path, 3 / 60)
        assert time.monotonic() - started < 20
        assert list(ends.values())[1:] == ["no time left"] * 2

    def test_both_fit_the_time_that_they_are_given(self) -> None:
        """But for what follows the most important: that is begun if time is left."""
        for steps, most in (
            (on_a_card.first_plan(Path("out"), Path("model"), None)[:5], 480),
            (on_a_card.second_plan(Path("out")), 420),
        ):
            assert sum(step.limit_s for step in steps) <= most

    def test_their_commands_are_there_and_so_are_their_rows(self) -> None:
        first = on_a_card.first_plan(Path("out"), Path("model"), Path("newer"))
        steps = [*first, *on_a_card.second_plan(Path("out"))]
        for step in steps:
            assert Path(*step.command[0].split(".")).with_suffix(".py").is_file(), step.command
        rows = {*on_a_card.LOSSLESS_ROWS, *on_a_card.COMPILED_ROWS}
        assert rows <= set(pictures.ROWS)
        kinds = {name.partition(":")[0] for name in CHECKS}
        asked = [
            word for step in first if "card_checks" in step.command[0] for word in step.command
        ]
        assert kinds <= set(asked)

    def test_the_newer_safetensors_come_before_what_is_installed(self) -> None:
        steps = {one.name: one for one in on_a_card.first_plan(Path("o"), None, Path("newer"))}
        assert steps["reading"].environment["PYTHONPATH"].split(os.pathsep)[0] == "newer"


class TestChecks:
    def test_what_needs_a_gpu_says_so_and_the_rest_holds(self, tmp_path: Path) -> None:
        names = [name for name in CHECKS if name != "blocks"]
        assert card_checks.run(names, CPU, tmp_path) == 0
        rows = {row["check"]: row for row in common.read_csv(tmp_path / "card-checks-cpu.csv")}
        assert list(rows) == names
        for name, row in rows.items():
            needs = name == "graphs" or name.startswith("waits")
            assert row["result"] == ("not possible here" if needs else "ok"), row
            assert row["date"]
            assert row["torch"]
        assert "99.0 dB" in rows["offloading"]["note"]

    def test_one_that_fails_is_told_and_the_next_is_run(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(card_checks, "SAME_IN_16_BITS_DB", 98)
        assert card_checks.run(["bfloat16", "offloading"], CPU, tmp_path) == 1
        failed, held = common.read_csv(tmp_path / "card-checks-cpu.csv")
        assert (failed["result"], held["result"]) == ("failed", "ok")
        assert "dB, not 98 or more" in failed["note"]
        assert "1 failed: bfloat16" in capsys.readouterr().out

    def test_pictures_that_differ_are_not_the_same(self) -> None:
        white, grey = (Image.new("RGB", (8, 8), color) for color in ("white", "grey"))
        assert same([white], [white], "these", 40) == 99
        with pytest.raises(AssertionError, match="these: .* dB, not 40 or more"):
            same([white], [grey], "these", 40)
