"""LoRAs and embeddings that are something else, or that would do harm; and names that lead out."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.attack.hostile_server import Behaviour, for_ever, head, once, with_length
from benchmarks.attack.job_inputs import Fields
from benchmarks.own_samples import FEW_STEP, Tensors, embedding, file_bytes, lora
from sdxl_worker.inputs.adapter_sources import SUFFIX

TO_Q = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
TO_Q_OF_DIFFUSERS = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
SIDE = 64
"""Of that matrix, a square."""
CONVOLUTION = "lora_unet_down_blocks_1_resnets_0_conv2"
HUGE_RANK = 1_000_000


@dataclass(frozen=True)
class HostileFile:
    name: str
    data: bytes
    field: str = "loras"
    is_taken: bool | None = False
    """Whether a picture may come of it, or a refusal. None: either."""
    zeros: int = 0
    """Bytes that follow `data`, of which the disk keeps none."""

    def write(self, path: Path) -> None:
        path.write_bytes(self.data)
        with path.open("r+b") as file:
            file.truncate(len(self.data) + self.zeros)

    def asked(self, path: str) -> Fields:
        """What a request names it by."""
        beside = {"token": "word"} if self.field == "embeddings" else {}
        return {"prompt": "a red circle, word", self.field: [{"path": path, **beside}]}


def files() -> Iterator[HostileFile]:
    """Two that are well among them."""
    yield HostileFile("a good LoRA", file_bytes(lora(1)), is_taken=True)
    yield HostileFile("a good embedding", file_bytes(embedding(1)), "embeddings", is_taken=True)
    for name, data in _other_files().items():
        for field in ("loras", "embeddings"):
            yield HostileFile(f"{name}, in {field}", data, field)
    yield from _wrong_numbers()
    yield from _huge_ones()
    yield from _strange_keys()
    yield from _for_other_models()
    yield from _strange_metadata()


def _with_header(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _tensor(begin: int, end: int, shape: list[int], dtype: str = "F16") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def _other_files() -> dict[str, bytes]:
    good = file_bytes(lora(1))
    key = f"{TO_Q}.lora_down.weight"
    return {
        "a pickle": b"\x80\x04cos\nsystem\n(S'touch /tmp/pickle'\ntR.",
        "a pickle in a zip": b"PK\x03\x04" + bytes(26) + b"archive/data.pkl" + bytes(2000),
        "a web page": b"<!DOCTYPE html><html><body>Sign in</body></html>" * 100,
        "JSON": b'{"error": "not found"}',
        "nothing": b"",
        "a header of 2^63 bytes": _with_header(b"{}", length=2**63),
        "a header of 2^64 - 1 bytes": _with_header(b"{}", length=2**64 - 1),
        "a header of 100 MB": _with_header(b"{}", length=10**8),
        "tensors that overlap": _with_header(
            {f"{TO_Q}.{end}.weight": _tensor(0, 8, [4]) for end in ("lora_up", "lora_down")},
            bytes(8),
        ),
        "a tensor beyond the end": _with_header({key: _tensor(0, 2**62, [2**61])}, bytes(8)),
        "the same key twice": _with_header(
            f'{{"{key}": {json.dumps(_tensor(0, 4, [2]))}, '
            f'"{key}": {json.dumps(_tensor(4, 8, [2]))}}}'.encode(),
            bytes(8),
        ),
        "a shape of 2^62 x 2^62 x 0": _with_header({key: _tensor(0, 0, [2**62, 2**62, 0])}),
        "a header of lists": _with_header(b'{"__metadata__":' + b"[[],[]," * 3_000_000 + b"0]}"),
        "a header nested deep": _with_header(b'{"a":' * 100_000),
        "a header of numbers without end": _with_header(b'{"a":' + b"9" * 1_000_000 + b"}"),
        "a whole file, cut": good[:-7],
        "a whole file, with more after it": good + b"more",
    }


def _changed(tensors: Tensors, end: str, value: float) -> Tensors:
    """With a number in the first tensor whose key ends so."""
    key = next(one for one in tensors if one.endswith(end))
    changed = tensors[key].copy()
    changed.reshape(-1)[0] = value
    return {**tensors, key: changed}


def _wrong_numbers() -> Iterator[HostileFile]:
    good, words = lora(1), embedding(1)
    for value in (float("nan"), float("inf"), float("-inf")):
        for end in ("lora_up.weight", "lora_down.weight", ".alpha"):
            data = file_bytes(_changed(good, end, value))
            yield HostileFile(f"{value} in {end}", data)
        data = file_bytes(_changed(words, "clip_g", value))
        yield HostileFile(f"{value} in an embedding", data, "embeddings")
    for value in (1e38, 1e12, 1e-45):
        for end in ("lora_up.weight", ".alpha"):
            data = file_bytes(_changed(good, end, value))
            yield HostileFile(f"{value} in {end}", data, is_taken=None)
        data = file_bytes(_changed(words, "clip_l", value))
        yield HostileFile(f"{value} in an embedding", data, "embeddings", is_taken=None)
    for dtype in ("F64", "U8", "BOOL", "I64", "C64", "F4", "F8_E8M0", "F99"):
        size = {"F64": 8, "I64": 8, "C64": 8, "F4": 0.5}.get(dtype, 1)
        count = int(SIDE * 4 * size)
        header = {
            f"{TO_Q}.lora_up.weight": _tensor(0, count, [SIDE, 4], dtype),
            f"{TO_Q}.lora_down.weight": _tensor(count, 2 * count, [4, SIDE], dtype),
        }
        data = _with_header(header, b"\x7f" * (2 * count))
        yield HostileFile(f"numbers of {dtype}", data, is_taken=None)


def _huge_ones() -> Iterator[HostileFile]:
    """Small on the disk, or refused by their headers, with much to multiply."""

    def of_zeros(
        name: str, parts: dict[str, list[int]], dtype: str = "F16", module: str = TO_Q
    ) -> HostileFile:
        at, header = 0, {}
        for part, shape in parts.items():
            end = at + int(np.prod(shape, dtype=np.int64)) * (1 if dtype.startswith("F8") else 2)
            header[f"{module}.{part}"] = _tensor(at, end, shape, dtype)
            at = end
        return HostileFile(name, _with_header(header), is_taken=None, zeros=at)

    yield of_zeros(
        "a LoRA of rank 10^6",
        {"lora_up.weight": [SIDE, HUGE_RANK], "lora_down.weight": [HUGE_RANK, SIDE]},
    )
    yield of_zeros(
        "a Tucker core that grows as it is multiplied",
        {
            "lora_up.weight": [SIDE, 1, 1, 1],
            "lora_mid.weight": [1, HUGE_RANK, 3, 3],
            "lora_down.weight": [HUGE_RANK, SIDE, 1, 1],
        },
        "F8_E4M3",
        CONVOLUTION,
    )
    yield of_zeros(
        "a LoKr whose product is 10^12 numbers",
        {"lokr_w1": [HUGE_RANK, 1], "lokr_w2": [HUGE_RANK, 1]},
    )
    yield of_zeros(
        "a LoKr of rank 10^6",
        {"lokr_w1_a": [8, HUGE_RANK], "lokr_w1_b": [HUGE_RANK, 8], "lokr_w2": [8, 8]},
    )
    yield of_zeros(
        "a LoHa of rank 10^6",
        {
            f"hada_w{i}_{end}": [SIDE, HUGE_RANK] if end == "a" else [HUGE_RANK, SIDE]
            for i in (1, 2)
            for end in "ab"
        },
        "F8_E4M3",
    )
    yield of_zeros("a difference of 10^6 x 64", {"diff": [HUGE_RANK, SIDE]})
    words = _with_header({"clip_g": _tensor(0, 2 * HUGE_RANK * 64, [HUGE_RANK, 64])})
    yield HostileFile("an embedding of 10^6 vectors", words, "embeddings", False, 128 * HUGE_RANK)
    many = {f"{i}.lora_up.weight": _tensor(0, 0, [0]) for i in range(100_000)}
    yield HostileFile("100,000 keys", _with_header(many))


def _strange_keys() -> Iterator[HostileFile]:
    down, up = lora(1)[f"{TO_Q}.lora_down.weight"], lora(1)[f"{TO_Q}.lora_up.weight"]
    both = {f"{TO_Q}.lora_down.weight": down, f"{TO_Q}.lora_up.weight": up}
    diffusers = {
        f"{TO_Q_OF_DIFFUSERS}.lora_A.weight": down,
        f"{TO_Q_OF_DIFFUSERS}.lora_B.weight": up,
    }
    yield HostileFile("a module under two names", file_bytes({**both, **diffusers}))
    keys = {
        "half a character": "\ud800.lora_up.weight",
        "a zero byte": "a\x00b.lora_up.weight",
        "lines and colours for a terminal": "\x1b[2J\r\nERROR\n.lora_up.weight",
        "10^6 letters": "a" * 1_000_000 + ".lora_up.weight",
        "10^6 dots": "." * 1_000_000 + "attn2.to_k.lora_up.weight",
        "nothing": "",
        "a path": "../../etc/passwd.lora_up.weight",
        "Python": "__class__.__init__.lora_up.weight",
    }
    for name, key in keys.items():
        data = _with_header({key: _tensor(0, 2, [1])}, bytes(2))
        yield HostileFile(f"a key of {name}", data)
        yield HostileFile(f"a key of {name}, in an embedding", data, "embeddings")


def _for_other_models() -> Iterator[HostileFile]:
    to_k = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    modules = {
        "Stable Diffusion 1.5": to_k,
        "Flux": "lora_unet_double_blocks_0_img_attn_qkv",
        "SD3": "lora_unet_joint_blocks_0_x_block_attn_qkv",
    }
    for model, module in modules.items():
        tensors = {
            f"{module}.lora_down.weight": np.zeros((4, 768), np.float16),
            f"{module}.lora_up.weight": np.zeros((320, 4), np.float16),
        }
        yield HostileFile(f"a LoRA for {model}", file_bytes(tensors))
    vectors = {"emb_params": np.zeros((2, 768), np.float16)}
    yield HostileFile("an embedding for SD 1.5", file_bytes(vectors), "embeddings")
    yield HostileFile("an embedding, in loras", file_bytes(embedding(1)))
    yield HostileFile("a LoRA, in embeddings", file_bytes(lora(1)), "embeddings")


def _strange_metadata() -> Iterator[HostileFile]:
    few_step = {
        "half a character as the family": {"few_step.family": "\ud800"},
        "a family of 10^6 letters": {"few_step.family": "a" * 1_000_000},
        "a family with a zero byte": {"few_step.family": "\x00\r\n"},
        "1000 steps": {"few_step.steps": "1000"},
        "10^9 steps": {"few_step.steps": "1000000000"},
        "steps of 10^5 digits": {"few_step.steps": "9" * 100_000},
        "a guidance of nan": {"few_step.guidance_scale": "nan"},
        "a sampler that is none": {"few_step.scheduler": "__init__"},
        "a schedule that the sampler cannot do": {"few_step.schedule": "ays"},
    }
    others = {
        "a model of 10^6 letters": {"ss_base_model_version": "xl" * 500_000},
        "a title of 10^6 letters": {"modelspec.title": "-_. " * 250_000},
        "half a character as the title": {"modelspec.title": "\ud800"},
        "an alpha of 400 digits": {
            "lora_adapter_metadata": '{"unet.lora_alpha": 1%s}' % ("0" * 400)
        },
        "an alpha of 10^5 digits": {
            "lora_adapter_metadata": '{"unet.lora_alpha": 1%s}' % ("0" * 10**5)
        },
        "an alpha that is a list": {"lora_adapter_metadata": '{"unet.lora_alpha": [1]}'},
        "a pattern without end": {"lora_adapter_metadata": '{"unet.alpha_pattern": {"(a+)+$": 1}}'},
        "a config nested deep": {"lora_adapter_metadata": '{"a":' * 100_000},
        "a config that is a list": {"lora_adapter_metadata": "[]"},
    }
    configs = {
        "an alpha of 400 digits": '{"unet.lora_alpha": 1' + "0" * 400 + "}",
        "an alpha of 10^5 digits": '{"unet.lora_alpha": 1' + "0" * 100_000 + "}",
        "an alpha that is a list": '{"unet.lora_alpha": [1]}',
        "a pattern without end": '{"unet.alpha_pattern": {"(a+)+$": 1}}',
        "a config nested deep": '{"a":' * 100_000,
        "a config that is a list": "[]",
    }
    told = {
        **{name: {**FEW_STEP, **changes} for name, changes in few_step.items()},
        **others,
        **{name: {"lora_adapter_metadata": config} for name, config in configs.items()},
    }
    data = np.zeros((4, SIDE), np.float16).tobytes()
    for name, metadata in told.items():
        header = {
            "__metadata__": metadata,
            f"{TO_Q}.lora_down.weight": _tensor(0, len(data), [4, SIDE]),
            f"{TO_Q}.lora_up.weight": _tensor(len(data), 2 * len(data), [SIDE, 4]),
        }
        yield HostileFile(name, _with_header(header, 2 * data), is_taken=None)


# --- names --------------------------------------------------------------------------------------

# What is in a folder beside LORA_DIR and MODELS_DIR, and must not be told of either.
OUTSIDE = "outside"
PATHS = (
    *(f"../{OUTSIDE}/one{SUFFIX}", f"style/../../{OUTSIDE}/one{SUFFIX}", f"./../{OUTSIDE}"),
    *("/etc/passwd", "//etc/passwd", "~/.ssh/id_rsa", "etc/../../../etc/passwd", "..", ".", "/"),
    *(f"linked{SUFFIX}", f"linked/one{SUFFIX}", f"looping{SUFFIX}", "style"),
    *(f"one{SUFFIX}\x00", f"\x00one{SUFFIX}", f"one\ud800{SUFFIX}", f"one\n{SUFFIX}"),
    *("a" * 100_000, "../" * 33_000, "a/" * 999, "org/" + "a" * 1900, f"{'a' * 300}{SUFFIX}"),
    *(
        "file:///etc/passwd",
        "ftp://127.0.0.1/a",
        "http://127.0.0.1/a",
        "data:,a",
        "c:\\a",
        "\\\\a\\b",
    ),
    *("org/repo/../../../etc/passwd", "org/repo/%2e%2e/%2e%2e/a", "org/repo@../../a", "../repo"),
    *("org/repo@main/../..", "org/repo?a", "org/repo#a", "org/repo/a.bin", "@", "org/@", "o/r@@@"),
    *("https://", "https://[", "https://a:99999/", "https://user:pass@/", "https://\ud800/"),
    *("https://huggingface.co/", "https://huggingface.co/../x", "https://civitai.com/models/x"),
    *("https://127.0.0.1/a", "https://169.254.169.254/latest", "https://[::1]/a", "", " ", "null"),
)
MODELS = (
    *("../x", f"../{OUTSIDE}", "/etc", ".", "..", "other/../other", "other/base", "nothing"),
    *("other\x00", "\ud800", "a" * 100_000, "../" * 33_000, "OTHER", f"other{SUFFIX}", "~"),
    *("https://127.0.0.1/a", "org/repo", "linked", "looping", " other", "other/"),
)


def lay_out(loras: Path, models: Path, outside: Path) -> None:
    """Links that lead out of the folders, beside what is well."""
    outside.mkdir()
    (outside / f"one{SUFFIX}").write_bytes(file_bytes(lora(9)))
    (loras / "style").mkdir()
    (loras / f"linked{SUFFIX}").symlink_to(outside / f"one{SUFFIX}")
    (loras / "linked").symlink_to(outside)
    (loras / f"looping{SUFFIX}").symlink_to(loras / f"looping{SUFFIX}")
    (models / "linked").symlink_to(outside)
    (models / "looping").symlink_to(models / "looping")


# --- servers ------------------------------------------------------------------------------------

GOOD_LORA = "lora"


def behaviours() -> dict[str, Behaviour]:
    """Of a server of LoRAs, beside those of `hostile_server`."""
    data = file_bytes(lora(5))
    half = data[: len(data) // 2]
    return {
        GOOD_LORA: once(with_length(data, len(data))),
        "lora-cut": once(with_length(half, len(data))),
        "lora-cut-unsaid": once(with_length(half, len(half))),
        "lora-longer": once(with_length(data + b"more", len(data) + 4)),
        "lora-in-junk-chunks": once(
            head("200 OK", "Transfer-Encoding: chunked") + b"%x\r\n" % len(data) + data + b"zz\r\n"
        ),
        "lora-that-is-a-pickle": once(with_length(b"\x80\x04" + bytes(3000), 3002)),
    }


def endless_behaviours() -> dict[str, Behaviour]:
    data = file_bytes(lora(6))
    half = data[: len(data) // 2]
    return {
        "lora-without-end": for_ever(head() + data, bytes(65536)),
        "lora-in-drips": for_ever(head() + half, b"x", 1.0),
        "lora-that-stalls": for_ever(with_length(half, len(data)), b"", 5.0),
    }
