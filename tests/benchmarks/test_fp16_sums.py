"""Sums in fp16, emulated."""

import pytest
import torch

from benchmarks.fp16_sums import BLOCK, sum_in


def linear(weights: list[float]) -> torch.nn.Sequential:
    """Of one output."""
    made = torch.nn.Linear(len(weights), 1, bias=False)
    with torch.no_grad():
        made.weight.copy_(torch.tensor([weights]))
    return torch.nn.Sequential(made)


@pytest.mark.parametrize(
    ("dtype", "expected"), [(torch.float32, 2056.0), (torch.float16, 2048.0)], ids=str
)
def test_what_is_less_than_half_a_unit_of_the_sum_so_far_is_lost_in_fp16(
    dtype: torch.dtype, expected: float
) -> None:
    """From 2048 on, fp16 counts by twos."""
    blocks = [[2048.0] + [0.0] * (BLOCK - 1)] + [[1.0] + [0.0] * (BLOCK - 1)] * 8
    network = linear([weight for block in blocks for weight in block])
    sum_in(network, dtype)
    assert network(torch.ones(1, 9 * BLOCK)).item() == expected


def test_within_a_block_nothing_is_lost() -> None:
    network = linear([2048.0] + [1.0] * 8 + [0.0] * (BLOCK - 9))
    sum_in(network, torch.float16)
    assert network(torch.ones(1, BLOCK)).item() == 2056.0


def test_the_error_of_a_long_sum_is_several_times_that_of_rounding_alone() -> None:
    torch.manual_seed(0)
    states = torch.randn(32, 5120)
    errors = {}
    for dtype in (torch.float32, torch.float16):
        torch.manual_seed(1)
        network = torch.nn.Sequential(torch.nn.Linear(5120, 64))
        exact = network(states)
        sum_in(network, dtype)
        errors[dtype] = (network(states) - exact).square().mean().sqrt().item()
    assert errors[torch.float16] > 3 * errors[torch.float32] > 0
