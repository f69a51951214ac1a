"""The host's part of a job."""

from benchmarks import (
    overhead,
)


def test_the_host_s_part_of_a_job_is_small_beside_pillow_s_png() -> None:
    """The targets are 40 and 20 ms on one core; a ratio holds on a busy machine, too."""
    ms = {name: overhead.median_ms(call, 5) for name, call in overhead.host_phases().items()}
    fast, default = (overhead.median_ms(call, 2) for call in overhead.compared_phases().values())
    assert ms["PNG"] < fast / 3
    assert sum(ms.values()) < default / 4


def test_the_sample_s_png_is_about_as_large_as_that_of_a_picture() -> None:
    """SDXL's take 1.5 to 2.8 bytes a pixel."""
    png = overhead.host_phases()["PNG"]()
    assert 1.5 < len(png) / 1024**2 < 2.8
