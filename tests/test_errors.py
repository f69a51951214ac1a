"""Failures, and what they must not hold on to."""

import weakref

import pytest
import torch

from sdxl_worker.errors import let_go


def fail(held: list[weakref.ref[torch.Tensor]]) -> None:
    tensor = torch.ones(3)
    held.append(weakref.ref(tensor))
    raise RuntimeError("out of memory")


def fail_while_failing(held: list[weakref.ref[torch.Tensor]]) -> None:
    try:
        fail(held)
    except RuntimeError:
        fail(held)


@pytest.mark.parametrize("failing", [fail, fail_while_failing])
def test_an_error_that_is_kept_holds_no_tensor(
    failing: object, held: list[weakref.ref[torch.Tensor]]
) -> None:
    try:
        failing(held)  # type: ignore[operator]
    except RuntimeError as error:
        kept = error
    assert all(tensor() is not None for tensor in held), "or there would be nothing to let go"
    let_go(kept)
    assert [tensor() for tensor in held] == [None] * len(held)
    assert str(kept) == "out of memory"


@pytest.fixture
def held() -> list[weakref.ref[torch.Tensor]]:
    return []
