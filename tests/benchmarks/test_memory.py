"""The memory of a pass."""

from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from benchmarks import (
    memory,
)
from benchmarks.flops import unet_inputs
from sdxl_worker.drawing import batches as worker_memory


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("refiner UNet", worker_memory.UNET_BYTES_PER_PIXEL),
        ("base UNet", worker_memory.BASE_UNET_BYTES_PER_PIXEL),
        ("base UNet, controlled", worker_memory.CONTROLLED_UNET_BYTES_PER_PIXEL),
        ("encoder", worker_memory.ENCODER_BYTES_PER_PIXEL),
        ("decoder", worker_memory.DECODER_BYTES_PER_PIXEL),
    ],
)
def test_the_worker_plans_with_the_memory_that_is_counted(
    name: str, known: int, networks: dict[str, Any]
) -> None:
    counted = memory.count(networks, name, pictures=1).bytes_per_pixel
    assert known == pytest.approx(counted, rel=0.005)


def test_more_control_pictures_and_networks_need_no_more_than_that(
    networks: dict[str, Any],
) -> None:
    """In the order in which they are called: the union first, whose own need is the largest."""
    unet = networks["unet"].half()
    controlnet = memory.union_controlnet(unet)
    inputs = unet_inputs(unet, 2, 512, 512)
    both = torch.nn.ModuleList([unet, controlnet])

    def run() -> None:
        given = memory.residuals(controlnet, inputs, types=2)
        more = memory.residuals(controlnet, inputs)
        for place, other in zip(tree_leaves(given), tree_leaves(more), strict=True):
            place.add_(other)
        del more, other, place
        unet(**inputs, **given)

    counted = memory.peak_bytes(both, run) / 512**2
    assert counted < worker_memory.CONTROLLED_UNET_BYTES_PER_PIXEL * 1.1


def test_the_weights_are_counted_in_16_bits(networks: dict[str, Any]) -> None:
    assert memory.weights_gb(networks) == pytest.approx(11.46, abs=0.01)


def test_memory_counts_only_tensors_that_are_alive() -> None:
    network = torch.nn.Linear(1000, 1000, device="meta")

    def run() -> None:
        values = torch.empty(1000, 1000, device="meta")
        for _ in range(5):
            values = network(values)

    assert memory.peak_bytes(network, run) == 2 * 1000 * 1000 * 4
