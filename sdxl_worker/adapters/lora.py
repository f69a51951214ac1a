"""A file becomes what it changes in the networks: understood and checked whole before any of it is
used."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from sdxl_worker.adapters.changes import Change, Lora, ParameterName
from sdxl_worker.adapters.foreign_files import ADVICE, foreign_kind, of_text_width
from sdxl_worker.adapters.lora_formats import (
    BIAS_FORMATS,
    MAGNITUDES,
    SUFFIXES,
    WEIGHT_FORMATS,
    Format,
    Shape,
    fits,
    magnitude_axis,
)
from sdxl_worker.adapters.module_names import Target, names_of
from sdxl_worker.adapters.peft_config import peft_configs
from sdxl_worker.adapters.tensor_file import DTYPES, TensorFile
from sdxl_worker.errors import RequestError
from sdxl_worker.inputs.checked_file import AdapterFile
from sdxl_worker.loading.models import Models
from sdxl_worker.safetensors_header import SafetensorsHeader
from sdxl_worker.wording import printable

# Of the keys that are wrong, how many a message names.
SHOWN = 3
LONGEST_SHOWN = 120
# The largest in common use is 256. A file of some hundred MB may have one of a million, which takes
# many GB to multiply.
MAX_RANK = 4096
# What attends to the text.
KEYS_OF_THE_TEXT = re.compile(r"attn2[._](processor\.)?to_k$")
WEIGHT_PARTS = frozenset[str]().union(*WEIGHT_FORMATS)


def read_lora(file: AdapterFile, scale: float, field: str, models: Models) -> Lora:
    """Understand a file's header, and check that all of it fits the networks.

    Args:
        field: of the request, for messages.

    Raises:
        RequestError: it is not a LoRA for these networks, or not one that is understood whole. The
            message says what it is, or which keys are wrong.
    """
    if kind := foreign_kind(file.header):
        raise RequestError(f"{field}: {file.name} is {kind}")
    try:
        tensors = TensorFile(file.path, file.header)
    except OSError as error:
        raise RequestError(
            f"{field}: {file.name} could not be read ({error.strerror or error}); send the job "
            "again"
        ) from error
    try:
        changes = _Reader(file.header, tensors, models).changes()
    except _RefusedError as error:
        tensors.close()  # whoever holds the error would hold it open
        raise RequestError(f"{field}: {file.name} {error}") from error
    return Lora(file.name, file.sha256, scale, field, changes, tensors)


class _RefusedError(Exception):
    """The message is to be put after the file's name."""


class _IncompleteError(Exception):
    """The parts for a module are no whole format."""


class _MisfitError(Exception):
    """The parts are not of the module's sizes. The message gives both."""


class _Reader:
    def __init__(self, header: SafetensorsHeader, tensors: TensorFile, models: Models) -> None:
        self._shapes, self._dtypes = header.shapes, header.dtypes
        self._tensors = tensors
        self._models = models
        try:
            self._peft = peft_configs(header.metadata)
        except ValueError as error:
            raise _RefusedError(f"has metadata of which {error}; {ADVICE}") from error

    def changes(self) -> dict[ParameterName, Change]:
        """
        Raises:
            _RefusedError: something is wrong in the file.
        """
        changes: dict[ParameterName, Change] = {}
        incomplete: list[str] = []
        misfits: list[str] = []
        modules = self._modules()
        for target, keys in modules.items():
            try:
                changes |= self._changes_of(target, keys)
            except _IncompleteError:
                incomplete += keys.values()
            except _MisfitError as error:
                misfits.append(str(error))
        if incomplete:
            raise _RefusedError(
                f"has keys without those that belong to them: {_shown(incomplete)}; use a file "
                "that is whole"
            )
        if misfits:
            every = "all " if len(misfits) == len(modules) else ""
            raise _RefusedError(
                f"is for a model of other sizes, in {every}{len(misfits)} modules: "
                f"{_shown(misfits)}; use a LoRA that was made for this model"
            )
        return changes

    def _modules(self) -> dict[Target, dict[str, str]]:
        """The keys for each module, by part."""
        by_name: dict[str, dict[str, str]] = {}
        unknown, doubled = [], []
        for key, dtype in self._dtypes.items():
            suffix = next((suffix for suffix in SUFFIXES if key.endswith(suffix)), None)
            if suffix is None or dtype not in DTYPES:
                unknown.append(key)
            else:
                parts = by_name.setdefault(key.removesuffix(suffix), {})
                other = parts.setdefault(SUFFIXES[suffix], key)
                if other != key:
                    doubled += [other, key]
        self._check_text_width(by_name)
        names = names_of(self._models)
        modules: dict[Target, dict[str, str]] = {}
        for name, keys in by_name.items():
            if name not in names:
                unknown += keys.values()
                continue
            parts = modules.setdefault(names[name], {})
            for part, key in keys.items():
                other = parts.setdefault(part, key)
                if other != key:
                    doubled += [other, key]
        if unknown or not modules:
            raise _RefusedError(f"has keys that fit no part of SDXL: {_shown(unknown)}; {ADVICE}")
        if doubled:
            raise _RefusedError(
                f"has two keys for the same part of a module: {_shown(doubled)}; use a file that "
                "has one of each"
            )
        return modules

    def _check_text_width(self, by_name: Mapping[str, Mapping[str, str]]) -> None:
        """What tells the models of this family apart, also where other names are the same."""
        own = self._models.unet.config.cross_attention_dim
        for name, keys in by_name.items():
            if KEYS_OF_THE_TEXT.search(name):
                format_ = WEIGHT_FORMATS.get(frozenset(keys) & WEIGHT_PARTS)
                shape = _shape(format_, self._shapes_of(keys)) if format_ else ()
                if len(shape) > 1 and shape[1] not in (own, -1):
                    raise _RefusedError(f"is {of_text_width(shape[1], own)}")

    def _changes_of(self, target: Target, keys: Mapping[str, str]) -> dict[ParameterName, Change]:
        keys = dict(keys)
        if "ia3" in keys and "on_input" in keys:
            side = "in" if self._number(keys.pop("on_input")) else "out"
            keys[f"ia3_{side}"] = keys.pop("ia3")
        weight_keys = {part: keys[part] for part in keys if part in WEIGHT_PARTS}
        bias_keys = {part: keys[part] for part in keys if frozenset({part}) in BIAS_FORMATS}
        magnitudes = [part for part in keys if part in MAGNITUDES]
        format_ = WEIGHT_FORMATS.get(frozenset(weight_keys))
        is_whole = format_ is not None or (
            not weight_keys and not magnitudes and bias_keys.keys() <= {"diff_b", "b_norm"}
        )
        if (
            not is_whole
            or not (weight_keys or bias_keys)
            or len(bias_keys) > 1
            or len(magnitudes) > 1
            or (magnitudes and format_ and not format_.takes_dora)
            or ("lora_up_bias" in bias_keys and "lora_up" not in weight_keys)
        ):
            raise _IncompleteError
        changes: dict[ParameterName, Change] = {}
        factor = 1.0
        if format_ is not None:
            name = (target.network, f"{target.module}.weight")
            weight = self._own_shape(name)
            shapes = self._shapes_of(weight_keys)
            shape = _shape(format_, shapes)
            if not fits(shape, weight):
                raise _MisfitError(_misfit(next(iter(weight_keys.values())), shape, weight))
            self._check_rank(weight_keys.values(), weight)
            if format_.rank:
                config = self._peft.get(target.network)
                rank = format_.rank(shapes)
                if "alpha" in keys:
                    factor = self._number(keys["alpha"]) / rank
                elif config and "lora_up" in weight_keys:
                    if config.use_dora and not magnitudes:
                        raise _IncompleteError
                    factor = config.factor(target.module, rank)
            magnitude = None
            for part in magnitudes:
                axis = magnitude_axis(self._shapes[keys[part]], part, weight)
                if axis is None:
                    raise _MisfitError(_misfit(keys[part], self._shapes[keys[part]], weight))
                magnitude = (keys[part], axis)
            changes[name] = Change(format_, weight_keys, factor, magnitude)
        for part, key in bias_keys.items():
            name = (target.network, f"{target.module}.bias")
            bias = self._own_shape(name)
            if self._shapes[key] != bias:
                raise _MisfitError(_misfit(key, self._shapes[key], bias))
            changes[name] = Change(
                BIAS_FORMATS[frozenset({part})],
                {part: key},
                factor if part == "lora_up_bias" else 1.0,
                None,
            )
        return changes

    def _check_rank(self, keys: Iterable[str], weight: Shape) -> None:
        """Of parts that fit the weight, what is longer than it is a rank."""
        most = max(MAX_RANK, *weight, math.prod(weight[1:]))
        if key := next((key for key in keys if max(self._shapes[key], default=0) > most), None):
            raise _RefusedError(
                f"has a rank of more than {MAX_RANK}, in {_shown([key])}; use one of a smaller rank"
            )

    def _own_shape(self, name: ParameterName) -> Shape:
        """() for a bias that is not there."""
        parameter = parameter_of(self._models, name)
        if parameter is None:
            return ()
        # torchao's tensors are of classes of their own.
        if type(parameter.data) is not torch.Tensor or not parameter.is_floating_point():
            raise _RefusedError(
                "cannot be used: this worker's weights are held in 8 bits (QUANTIZE), and are not "
                "changed for a job; leave `loras` out"
            )
        return tuple(parameter.shape)

    def _shapes_of(self, keys: Mapping[str, str]) -> dict[str, Shape]:
        return {part: self._shapes[key] for part, key in keys.items() if part in WEIGHT_PARTS}

    def _number(self, key: str) -> float:
        if math.prod(self._shapes[key]) != 1:
            raise _RefusedError(f"has more than one number in {_shown([key])}; {ADVICE}")
        try:
            number = self._tensors.read(key).float().item()
        except OSError as error:
            raise _RefusedError(
                f"could not be read ({error.strerror or error}); send the job again"
            ) from error
        if not math.isfinite(number):
            raise _RefusedError(
                f"has no finite number in {_shown([key])}; use a file that is whole"
            )
        return number


def parameter_of(models: Models, name: ParameterName) -> torch.nn.Parameter | None:
    """None for a bias that is not there."""
    network, path = name
    module, _, parameter = path.rpartition(".")
    found: Any = getattr(getattr(models, network).get_submodule(module), parameter)
    return found


def _shape(format_: Format, shapes: Mapping[str, Shape]) -> Shape:
    """() where the parts do not fit each other."""
    if any(0 in shape for shape in shapes.values()):
        return ()
    try:
        return format_.shape(shapes)
    except IndexError:
        return ()


def _misfit(key: str, shape: Shape, own: Shape) -> str:
    return f"{key[:LONGEST_SHOWN]} gives {list(shape) or 'no shape'}, here {list(own) or 'none'}"


def _shown(items: Sequence[str]) -> str:
    first = ", ".join(printable(item[:LONGEST_SHOWN]) for item in items[:SHOWN])
    return first if len(items) <= SHOWN else f"{first} and {len(items) - SHOWN} more"
