"""Small networks as ONNX files, whose outputs are always the same; the package that makes such
files is not needed. https://github.com/onnx/onnx/blob/main/onnx/onnx.proto3 has the numbers."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

FLOAT = 1


def _varint(number: int) -> bytes:
    out = b""
    while number > 0x7F:
        out += bytes([number & 0x7F | 0x80])
        number >>= 7
    return out + bytes([number])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes | str) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def _tensor(name: str, array: np.ndarray) -> bytes:
    dims = b"".join(_number(1, side) for side in array.shape)
    return dims + _number(2, FLOAT) + _bytes(8, name) + _bytes(9, array.tobytes())


def _value(name: str, shape: Sequence[int]) -> bytes:
    dims = b"".join(_bytes(1, _number(1, side)) for side in shape)
    tensor_type = _number(1, FLOAT) + _bytes(2, dims)
    return _bytes(1, name) + _bytes(2, _bytes(1, tensor_type))


def write_constant_network(
    path: Path, input_shape: Sequence[int], outputs: Sequence[np.ndarray]
) -> None:
    """A network that takes a picture, and gives these arrays whatever is in it."""
    graph = b""
    for i, array in enumerate(outputs):
        node = _bytes(1, f"constant_{i}") + _bytes(2, f"output_{i}") + _bytes(4, "Identity")
        graph += _bytes(1, node) + _bytes(5, _tensor(f"constant_{i}", np.float32(array)))
        graph += _bytes(12, _value(f"output_{i}", array.shape))
    graph += _bytes(2, "graph") + _bytes(11, _value("input", input_shape))
    path.write_bytes(_number(1, 8) + _bytes(7, graph) + _bytes(8, _number(2, 13)))


SIDE_PX = 64
POSE_WIDTH_PX, POSE_HEIGHT_PX = 48, 64


def write_detector(path: Path, people: Sequence[tuple[float, float, float, float]]) -> None:
    """One that chooses the boxes itself: left, top, right, bottom, in pixels of its input."""
    found = np.zeros((1, max(1, len(people)), 5))
    for i, box in enumerate(people):
        found[0, i] = *box, 0.9
    write_constant_network(path, (1, 3, SIDE_PX, SIDE_PX), [found])


def write_pose_network(
    path: Path, places: Sequence[tuple[int, int]], *, sureness: float = 0.8
) -> None:
    """Of COCO's 17 joints, at these places of its input, in pixels."""
    across = np.zeros((1, len(places), 2 * POSE_WIDTH_PX))
    down = np.zeros((1, len(places), 2 * POSE_HEIGHT_PX))
    for i, (x, y) in enumerate(places):
        across[0, i, 2 * x] = down[0, i, 2 * y] = sureness
    write_constant_network(path, (1, 3, POSE_HEIGHT_PX, POSE_WIDTH_PX), [across, down])
