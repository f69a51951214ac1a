"""The operations of a picture."""

from typing import Any

import pytest
import torch

from benchmarks.flops import Flops, count_eight_bits, count_flops


@pytest.fixture(scope="module")
def flops(networks: dict[str, Any]) -> Flops:
    return count_flops(networks, 1024, 1024)


def test_operations_are_counted_as_they_are_known(flops: Flops) -> None:
    """T-GATE's authors count 2.989 TMAC for a pass of the base without attention's products."""
    assert flops.base == pytest.approx(6.761, abs=0.001)
    assert flops.base * (1 - 0.116) == pytest.approx(2 * 2.989, rel=0.01)
    assert flops.refiner == pytest.approx(7.286, abs=0.001)
    assert flops.decode == pytest.approx(10.47, abs=0.01)
    assert flops.text == pytest.approx(0.110, abs=0.002)
    assert flops.of_picture(25, 15) == pytest.approx(567.1, rel=0.001)


def test_a_shallow_step_takes_a_fifteenth_of_the_operations(flops: Flops) -> None:
    assert flops.base_shallow / flops.base == pytest.approx(0.066, abs=0.001)
    assert flops.refiner_shallow / flops.refiner == pytest.approx(0.088, abs=0.001)
    shares = [flops.of_picture(25, 15, n) / flops.of_picture(25, 15) for n in (1, 2, 3, 5)]
    assert shares == pytest.approx([1, 0.569, 0.410, 0.274], abs=0.001)


def test_what_is_quantized_is_counted_and_left_as_it_is(networks: dict[str, Any]) -> None:
    refiner = networks["refiner_unet"]
    counted = count_eight_bits(refiner, 1024, 1024)
    assert counted.share == pytest.approx(0.489, abs=0.001)
    assert counted.speedup_limit == pytest.approx(1.324, abs=0.001)
    assert counted.saved_gb == pytest.approx(1.23, abs=0.005)
    assert all(type(parameter.data) is torch.Tensor for parameter in refiner.parameters())
