"""The formats of what LoRA files hold for one module, and what each does to the module's weight.

Formulas: LoRA (https://arxiv.org/abs/2106.09685), LyCORIS (https://arxiv.org/abs/2309.14859, and
its library for what the paper leaves open), DoRA (https://arxiv.org/abs/2402.09353).
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Tensors = Mapping[str, torch.Tensor]

# What a key ends with, and the part that it is. A longer one goes before a shorter.
SUFFIXES = {
    ".lora_up.weight": "lora_up",
    ".lora_down.weight": "lora_down",
    ".lora_mid.weight": "lora_mid",
    ".lora_up.bias": "lora_up_bias",
    ".lora_B.weight": "lora_up",  # peft
    ".lora_A.weight": "lora_down",
    ".lora_B.bias": "lora_up_bias",
    ".lora_B.default.weight": "lora_up",  # peft, from a training state
    ".lora_A.default.weight": "lora_down",
    ".lora_B.default.bias": "lora_up_bias",
    ".lora.up.weight": "lora_up",  # diffusers before peft
    ".lora.down.weight": "lora_down",
    ".lora_linear_layer.up.weight": "lora_up",
    ".lora_linear_layer.down.weight": "lora_down",
    "_lora.up.weight": "lora_up",
    "_lora.down.weight": "lora_down",
    ".alpha": "alpha",
    ".dora_scale": "dora_scale",
    ".lora_magnitude_vector": "lora_magnitude",  # peft's name of the same
    ".lora_magnitude_vector.weight": "lora_magnitude",
    ".lora_magnitude_vector.default": "lora_magnitude",
    ".lora_magnitude_vector.default.weight": "lora_magnitude",
    **{f".hada_{part}": f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{
        f".lokr_{part}": f"lokr_{part}"
        for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
    },
    ".diff": "diff",
    ".diff_b": "diff_b",
    ".w_norm": "w_norm",
    ".b_norm": "b_norm",
    ".on_input": "on_input",
    ".weight": "ia3",
}
# Either says by how much DoRA rescales.
MAGNITUDES = frozenset({"dora_scale", "lora_magnitude"})


@dataclass(frozen=True)
class Format:
    """What one set of parts is, and the difference it makes to a weight or a bias.

    Both functions take the parts by name. `shape` may raise IndexError where one has too few
    dimensions; -1 stands for any size.
    """

    name: str
    shape: Callable[[Shapes], Shape]
    """Of the difference; () where the parts do not fit each other."""
    difference: Callable[[Tensors, torch.Tensor], torch.Tensor]
    """From the parts and the running weight. It has as many numbers as the weight."""
    rank: Callable[[Shapes], int] | None = None
    """By which alpha is divided. None: alpha has no meaning."""
    takes_dora: bool = False


def fits(shape: Shape, weight: Shape) -> bool:
    """Whether a difference of this shape is one of this weight.

    A linear layer may be written as a convolution of one pixel, a convolution as a matrix.
    """
    if -1 in shape:
        return len(weight) > 1 and all(
            one in (-1, size) for one, size in zip(shape, weight[:2], strict=True)
        )
    return _trimmed(shape) == _trimmed(weight) or (
        len(shape) == 2 and shape == (weight[0], math.prod(weight[1:]))
    )


def magnitude_axis(magnitude: Shape, part: str, weight: Shape) -> int | None:
    """The dimension of a weight that DoRA's lengths belong to; None where they fit none.

    LyCORIS' dora_scale is [out, 1, ...] or, in files from before that was an option, [1, in, ...];
    which of them is told by where the numbers are, for many weights are square. peft's has one for
    each output, whatever its shape.
    """
    of_inputs = part == "dora_scale" and magnitude[:1] == (1,) and magnitude[1:2] == weight[1:2]
    axis = 1 if of_inputs else 0
    return axis if len(weight) > 1 and math.prod(magnitude) == weight[axis] else None


def decomposed(weight: torch.Tensor, magnitude: torch.Tensor, axis: int) -> torch.Tensor:
    """DoRA: the directions of a weight, with the lengths that were trained.

    Args:
        magnitude: a length for each index along `axis`.
    """
    others = [dimension for dimension in range(weight.ndim) if dimension != axis]
    lengths = torch.linalg.vector_norm(weight, dim=others, keepdim=True)
    # A row of zeros stays one.
    lengths = lengths + torch.finfo(torch.float32).eps
    return weight * (magnitude.reshape(lengths.shape) / lengths)


def _trimmed(shape: Shape) -> Shape:
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _lora_shape(parts: Shapes) -> Shape:
    up, down = parts["lora_up"], parts["lora_down"]
    if _trimmed(up) != (up[0], down[0]):
        return ()
    return (up[0], *down[1:])


def _tucker_lora_shape(parts: Shapes) -> Shape:
    up, mid, down = parts["lora_up"], parts["lora_mid"], parts["lora_down"]
    if _trimmed(up) != (up[0], mid[0]) or _trimmed(down) != (mid[1], down[1]):
        return ()
    return (up[0], down[1], *mid[2:])


def _lora(parts: Tensors, _: torch.Tensor) -> torch.Tensor:
    return parts["lora_up"].flatten(1) @ parts["lora_down"].flatten(1)


def _tucker_lora(parts: Tensors, _: torch.Tensor) -> torch.Tensor:
    up, down = parts["lora_up"].flatten(1), parts["lora_down"].flatten(1)
    return torch.einsum("ij...,oi,jn->on...", parts["lora_mid"], up, down)


def _loha_shape(parts: Shapes) -> Shape:
    shapes = [
        _product(parts[f"hada_w{i}_a"], _flat(parts[f"hada_w{i}_b"]), parts.get(f"hada_t{i}"))
        for i in (1, 2)
    ]
    return shapes[0] if shapes[0] == shapes[1] else ()


def _loha(parts: Tensors, _: torch.Tensor) -> torch.Tensor:
    one, other = (
        _multiplied(parts[f"hada_w{i}_a"], parts[f"hada_w{i}_b"], parts.get(f"hada_t{i}"))
        for i in (1, 2)
    )
    return one * other


def _lokr_shape(parts: Shapes) -> Shape:
    first = parts.get("lokr_w1") or _product(parts["lokr_w1_a"], parts["lokr_w1_b"], None)
    second = parts.get("lokr_w2") or _product(
        parts["lokr_w2_a"], _flat(parts["lokr_w2_b"]), parts.get("lokr_t2")
    )
    if len(first) != 2 or not second:
        return ()
    return (first[0] * second[0], first[1] * second[1], *second[2:])


def _lokr(parts: Tensors, _: torch.Tensor) -> torch.Tensor:
    first, second = parts.get("lokr_w1"), parts.get("lokr_w2")
    if first is None:
        first = _multiplied(parts["lokr_w1_a"], parts["lokr_w1_b"], None)
    if second is None:
        second = _multiplied(parts["lokr_w2_a"], parts["lokr_w2_b"], parts.get("lokr_t2"))
    return torch.kron(first[(...,) + (None,) * (second.ndim - 2)], second)


def _lokr_rank(parts: Shapes) -> int:
    return (parts.get("lokr_w2_b") or parts["lokr_w1_b"])[0]


def _product(one: Shape, other: Shape, core: Shape | None) -> Shape:
    """The shape of `_multiplied`."""
    if core is None:
        return (one[0], other[1]) if one[1:] == other[:1] and len(other) == 2 else ()
    if one != (core[0], one[1]) or other != (core[1], other[1]):
        return ()
    return (one[1], other[1], *core[2:])


def _multiplied(one: torch.Tensor, other: torch.Tensor, core: torch.Tensor | None) -> torch.Tensor:
    """[out, rank] times [rank, in]; with a core [rank, rank, ...] (Tucker), [rank, out] and
    [rank, in] from both its sides."""
    if core is None:
        return one @ other.flatten(1)
    return torch.einsum("ij...,io,jn->on...", core, one, other)


def _flat(shape: Shape) -> Shape:
    return (shape[0], math.prod(shape[1:]))


def _ia3(parts: Tensors, weight: torch.Tensor) -> torch.Tensor:
    [(part, factors)] = parts.items()
    axis = 1 if part == "ia3_in" else 0
    shape = [1] * weight.ndim
    shape[axis] = -1
    return weight * factors.reshape(shape)


def _only(parts: Tensors, _: torch.Tensor) -> torch.Tensor:
    [tensor] = parts.values()
    return tensor


def _only_shape(parts: Shapes) -> Shape:
    [shape] = parts.values()
    return shape


def _rank_of(part: str) -> Callable[[Shapes], int]:
    return lambda parts: parts[part][0]


_LORA = Format("LoRA", _lora_shape, _lora, _rank_of("lora_down"), takes_dora=True)
_TUCKER = Format("LoRA", _tucker_lora_shape, _tucker_lora, _rank_of("lora_down"), takes_dora=True)
_LOHA = Format("LoHa", _loha_shape, _loha, _rank_of("hada_w1_b"), takes_dora=True)
_LOKR = Format("LoKr", _lokr_shape, _lokr, _lokr_rank, takes_dora=True)
# With two whole factors there is no rank, and alpha is left out.
_WHOLE_LOKR = Format("LoKr", _lokr_shape, _lokr, takes_dora=True)
_FULL = Format("full", _only_shape, _only)

_HADA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}

WEIGHT_FORMATS: dict[frozenset[str], Format] = {
    frozenset(parts): format_
    for format_, sets in (
        (_LORA, [{"lora_up", "lora_down"}]),
        (_TUCKER, [{"lora_up", "lora_down", "lora_mid"}]),
        (_LOHA, [_HADA, _HADA | {"hada_t1", "hada_t2"}]),
        (
            _LOKR,
            [
                {"lokr_w1_a", "lokr_w1_b", "lokr_w2"},
                *(
                    {*first, "lokr_w2_a", "lokr_w2_b", *core}
                    for first in (["lokr_w1"], ["lokr_w1_a", "lokr_w1_b"])
                    for core in ([], ["lokr_t2"])
                ),
            ],
        ),
        (_WHOLE_LOKR, [{"lokr_w1", "lokr_w2"}]),
        (_FULL, [{"diff"}, {"w_norm"}]),
        (Format("IA3", lambda parts: (-1, math.prod(parts["ia3_in"])), _ia3), [{"ia3_in"}]),
        (Format("IA3", lambda parts: (math.prod(parts["ia3_out"]), -1), _ia3), [{"ia3_out"}]),
    )
    for parts in sets
}
BIAS_FORMATS: dict[frozenset[str], Format] = {
    frozenset({part}): _FULL for part in ("diff_b", "b_norm", "lora_up_bias")
}
