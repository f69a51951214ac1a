"""Emulates, on any device, in what format a GPU sums up the products of linears: slow and exact.

A tensor core multiplies fp16 numbers in blocks of 16 along the sum (the instruction m16n8k16), adds
up a block's products at a higher precision, and rounds the running sum to fp32 or, with
`FP16_ACCUMULATION`, to fp16, after each block:
https://docs.nvidia.com/cuda/parallel-thread-execution/#warp-level-matrix-instructions-mma
"""

from typing import Any

import torch

BLOCK = 16


def sum_in(unet: Any, dtype: torch.dtype) -> None:
    """Give the linears of a network inputs, weights and outputs rounded to fp16, and sums in
    `dtype`; in place. Convolutions, which are cuDNN's, stay as they are.

    Args:
        dtype: torch.float32 or torch.float16.
    """
    for module in unet.modules():
        if isinstance(module, torch.nn.Linear):
            module.__class__ = _InFp32 if dtype == torch.float32 else _InFp16


class _InFp32(torch.nn.Linear):
    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return _with_bias(_rounded(states) @ _rounded(self.weight).T, self.bias)


class _InFp16(torch.nn.Linear):
    def forward(self, states: torch.Tensor) -> torch.Tensor:
        states, weight = _rounded(states), _rounded(self.weight)
        total = states.new_zeros(*states.shape[:-1], len(weight))
        for first in range(0, states.shape[-1], BLOCK):
            block = slice(first, first + BLOCK)
            total = _rounded(total + states[..., block] @ weight[:, block].T)
        return _with_bias(total, self.bias)


def _with_bias(total: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return _rounded(total if bias is None else total + _rounded(bias))


def _rounded(numbers: torch.Tensor) -> torch.Tensor:
    """To what fp16 can hold."""
    return numbers.half().to(numbers.dtype)
