"""What the files tell of how they were made, read back by others: Pillow, piexif, an XML parser."""

import dataclasses
import io
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import piexif
import piexif.helper
import pytest
from PIL import Image

import sdxl_worker
from sdxl_worker.field_types import OutputFormat
from sdxl_worker.inputs.checked_file import AdapterFile
from sdxl_worker.outputs.answer import encode_pictures
from sdxl_worker.outputs.exif import MAX_JPEG_EXIF_BYTES
from sdxl_worker.outputs.metadata import About, describe
from sdxl_worker.request import parse_request
from sdxl_worker.safetensors_header import SafetensorsHeader
from sdxl_worker.settings import MetadataLevel, load_settings
from tests.outputs.samples import ABOUT, sample
from tests.support import data_uri

FORMATS: tuple[OutputFormat, ...] = ("png", "jpeg", "webp")
WORD = "hunter2"
HOSTILE = (
    "a cat, a dog: \"two\" 'quotes', <lora:x:0.8> & </rdf:RDF> \\ \\u0041\nSteps: 1, Seed: 2\n"
    "caf\u00e9 \u732b \U0001f600 \x00\x07\x7f\u0085\u2028\ufeff\ufffe\uffff end"
)


def made(output_format: OutputFormat, about: About = ABOUT, **fields: Any) -> bytes:
    request = parse_request({"prompt": "a cat", "seed": 7, **fields})
    [data] = encode_pictures([sample(64)], request, output_format=output_format, about=about)
    return data


def told(data: bytes) -> dict[str, str]:
    """By names of text chunks, whatever the format."""
    image: Any = Image.open(io.BytesIO(data))
    image.load()
    if image.format == "PNG":
        return {name: str(text) for name, text in image.text.items()}
    assert bool(image.getexif()) == ("xmp" in image.info)
    if "xmp" not in image.info:
        return {}
    by_piexif = piexif.load(data)
    comment = by_piexif["Exif"][piexif.ExifIFD.UserComment]
    assert image.getexif().get_ifd(0x8769)[0x9286] == comment
    software = image.getexif()[0x0131]
    assert by_piexif["0th"][piexif.ImageIFD.Software].decode() == software
    root = ET.fromstring(image.info["xmp"])  # noqa: S314
    properties = {re.sub("{.*}", "", one.tag): one.text or "" for one in root[0][0]}
    assert properties.pop("CreatorTool") == software
    # A1111 reads it with these very functions.
    assert piexif.load(image.info["exif"])["Exif"] == by_piexif["Exif"]
    infotext = piexif.helper.UserComment.load(comment)
    return {"Software": software, **properties, "parameters": infotext}


def parsed(infotext: str) -> dict[str, str]:
    """As A1111 reads it: the last line, and what is before it, with the negative prompt's mark."""
    *lines, last = infotext.strip().split("\n")
    prompt, _, negative = "\n".join(["", *lines]).partition("\nNegative prompt: ")
    found = re.findall(r'\s*([\w ]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    values = {name: json.loads(text) if text[:1] == '"' else text for name, text in found}
    return {"prompt": prompt.strip(), "negative": negative.strip(), **values}


@pytest.mark.parametrize("output_format", FORMATS)
def test_all_formats_tell_the_same(output_format: OutputFormat) -> None:
    text = told(made(output_format, negative_prompt="a dog"))
    request = parse_request({"prompt": "a cat", "negative_prompt": "a dog", "seed": 7})
    assert text == describe(request, 0, (64, 64), ABOUT)
    assert list(text) == ["Software", "model", "request", "versions", "parameters"]
    assert text["Software"] == f"sdxl-worker {sdxl_worker.__version__}"
    lossy = About("m", "all", lossy={"STEP_CACHE": 2})
    assert json.loads(told(made(output_format, lossy))["settings"]) == {"STEP_CACHE": 2}


@pytest.mark.parametrize("output_format", FORMATS)
def test_hostile_prompts_come_back_as_they_were(output_format: OutputFormat) -> None:
    fields: dict[str, Any] = {"prompt": HOSTILE, "negative_prompt": HOSTILE[::-1]}
    text = told(made(output_format, **fields))
    request = json.loads(text["request"])
    assert {name: request[name] for name in fields} == fields
    infotext = text["parameters"]
    assert infotext.startswith(f"{HOSTILE}\nNegative prompt: {HOSTILE[::-1]}\nSteps: ")
    assert parsed(infotext)["Seed"] == "7"
    assert parse_request(request).prompt == HOSTILE


def test_the_infotext_is_that_of_a1111() -> None:
    infotext = told(made("png", negative_prompt="a dog", scheduler="K_EULER_ANCESTRAL"))
    assert infotext["parameters"] == (
        "a cat\nNegative prompt: a dog\nSteps: 25, Sampler: Euler a, CFG scale: 7.5, Seed: 7, "
        "Size: 64x64, Model hash: 31e35c80fc, Model: an/sdxl, "
        f"Version: sdxl-worker {sdxl_worker.__version__}"
    )


SAMPLERS = {
    "PNDM": "PLMS",
    "KLMS": "LMS",
    "DDIM": "DDIM",
    "K_EULER": "Euler",
    "K_EULER_ANCESTRAL": "Euler a",
    "DPMSolverMultistep": "DPM++ 2M",
    "DPMSolverSinglestep": "DPM++ 2S a",
}
IMAGE_URL = "https://example.com/a.png"
CANNY = {"type": "canny", "image_url": IMAGE_URL}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        *(({"scheduler": name}, {"Sampler": sampler}) for name, sampler in SAMPLERS.items()),
        ({"num_inference_steps": 30}, {"Steps": "30", "Denoising strength": None}),
        (
            {"image_url": IMAGE_URL, "strength": 0.4, "refiner_inference_steps": 20},
            {"Steps": "20", "Denoising strength": "0.4", "Mask blur": None},
        ),
        (
            {"image_url": IMAGE_URL, "mode": "img2img", "num_inference_steps": 30},
            {"Steps": "30", "Denoising strength": "0.75", "Mask blur": None},
        ),
        ({"image_url": IMAGE_URL, "mask_url": IMAGE_URL, "mask_blur": 4}, {"Mask blur": "4"}),
        ({"image_url": IMAGE_URL, "mask_from_alpha": True}, {"Mask blur": "0"}),
        ({"prompt": "", "image_url": IMAGE_URL}, {"prompt": "", "Size": "64x64"}),
        (
            {"hires": {"scale": 1.6, "steps": 20, "upscaler": "4x-Some.pth"}},
            {
                "Size": "40x40",
                "Denoising strength": "0.4",
                "Hires upscale": "1.6",
                "Hires steps": "20",
                "Hires upscaler": "4x-Some",
            },
        ),
        (
            {"image_url": IMAGE_URL, "mode": "img2img", "hires": {"scale": 2}},
            {
                "Size": "32x32",
                "Denoising strength": "0.75",
                "Hires steps": None,
                "Hires upscaler": "Lanczos",
            },
        ),
        (
            {"upscale": {"factor": 4}, "hires": {"scale": 2}},
            {
                "Size": "8x8",
                "Postprocess upscale by": "4.0",
                "Postprocess upscaler": "Lanczos",
                "Hires upscale": "2.0",
            },
        ),
        (
            {"controlnet": [CANNY, {**CANNY, "preprocess": False, "scale": 0.5, "end": 0.6}]},
            {
                "ControlNet 0": (
                    "Module: canny, Model: None, Weight: 1.0, Guidance Start: 0.0, "
                    "Guidance End: 1.0"
                ),
                "ControlNet 1": (
                    "Module: none, Model: None, Weight: 0.5, Guidance Start: 0.0, Guidance End: 0.6"
                ),
                "ControlNet 2": None,
            },
        ),
        ({}, {"ControlNet 0": None, "Hires upscale": None, "Postprocess upscale by": None}),
        ({"prompt": "x", "negative_prompt": "y\nz"}, {"prompt": "x", "negative": "y\nz"}),
    ],
    ids=str,
)
def test_the_infotext_tells_what_was_done(
    fields: dict[str, Any], expected: dict[str, str | None]
) -> None:
    infotext = parsed(told(made("png", **fields))["parameters"])
    assert {name: infotext.get(name) for name in expected} == expected


def test_a_model_without_a_hash_is_told_without_one_and_an_odd_name_is_quoted() -> None:
    infotext = parsed(told(made("png", About('a, "b": c', "all")))["parameters"])
    assert infotext["Model"] == 'a, "b": c'
    assert "Model hash" not in infotext


def test_a_controlnet_s_name_breaks_no_infotext() -> None:
    about = dataclasses.replace(ABOUT, controlnets=('my "union", Weight: 9',))
    infotext = parsed(told(made("png", about, controlnet=[CANNY]))["parameters"])
    name, *others = re.findall(r"(\w+): ([^,]*)", infotext["ControlNet 0"])[1:]
    assert name == ("Model", 'my "union"  Weight  9')
    assert others[0] == ("Weight", "1.0")
    assert infotext["Version"].startswith("sdxl-worker")


@pytest.mark.parametrize("factor", [1.1, 1.5, 2.7, 4.0])
@pytest.mark.parametrize("scale", [1.01, 1.25, 1.3, 1.5, 2.0])
def test_the_size_is_that_before_the_picture_was_enlarged(scale: float, factor: float) -> None:
    request = parse_request(
        {"prompt": "a", "hires": {"scale": scale}, "upscale": {"factor": factor}}
    )
    for width in range(64, 2000, 136):
        height = 1024
        larger = (8 * round(side * scale / 8) for side in (width, height))
        size_px = tuple(round(side * factor) for side in larger)
        infotext = describe(request, 0, size_px, ABOUT)["parameters"]  # type: ignore[arg-type]
        assert parsed(infotext)["Size"] == f"{width}x{height}"


def test_each_picture_tells_its_own_seed() -> None:
    request = parse_request({"prompt": "a cat", "seed": 2**64 - 1, "num_images": 2})
    files = encode_pictures([sample(64)] * 2, request, output_format="jpeg", about=ABOUT)
    assert [parsed(told(data)["parameters"])["Seed"] for data in files] == [str(2**64 - 1), "0"]
    assert [json.loads(told(data)["request"])["seed"] for data in files] == [2**64 - 1, 0]


# --- what is not told --------------------------------------------------------------------------


@pytest.mark.parametrize("output_format", FORMATS)
def test_without_prompts_there_is_no_word_of_them_anywhere(output_format: OutputFormat) -> None:
    about = About("m", "no_prompts")
    data = made(output_format, about, prompt=WORD, negative_prompt=f"no {WORD}")
    for encoding in ("utf-8", "utf-16-be", "utf-16-le"):
        assert WORD.encode(encoding) not in data
    text = told(data)
    assert text["parameters"].startswith("Steps: 25, ")
    request = json.loads(text["request"])
    assert request["seed"] == 7
    assert not {"prompt", "negative_prompt"} & set(request)


@pytest.mark.parametrize("output_format", FORMATS)
def test_none_is_nothing_at_all(output_format: OutputFormat) -> None:
    data = made(output_format, About("m", "none"), prompt=WORD)
    assert told(data) == {}
    assert b"sdxl" not in data


@pytest.mark.parametrize("output_format", FORMATS)
def test_no_secret_and_no_picture_goes_into_the_file(output_format: OutputFormat) -> None:
    picture = data_uri(Image.new("RGB", (64, 64)))
    fields: dict[str, Any] = {
        "image_url": f"https://user:{WORD}@example.com:8000/a.png?token={WORD}#{WORD}",
        "mask_url": picture,
        "upload_urls": [f"https://bucket.example.com/key?X-Amz-Signature={WORD}"],
        "mode": "img2img",
    }
    fields["controlnet"] = [
        {**CANNY, "image_url": fields["image_url"]},
        {**CANNY, "type": "depth", "image_url": picture},
    ]
    fields["ip_adapter"] = [{"image_url": picture, "mask_url": fields["image_url"]}]
    data = made(output_format, **fields)
    assert WORD.encode() not in data
    assert picture[-40:].encode() not in data
    request = json.loads(told(data)["request"])
    assert request["image_url"] == "https://example.com:8000/a.png"
    assert request["mask_url"] == "data:image/png;base64"
    assert "upload_urls" not in request
    assert [one["image_url"] for one in request["controlnet"]] == [
        "https://example.com:8000/a.png",
        "data:image/png;base64",
    ]
    assert request["ip_adapter"] == [
        {
            "image_url": "data:image/png;base64",
            "type": "plus",
            "scale": 0.6,
            "mask_url": "https://example.com:8000/a.png",
        }
    ]


def test_the_request_holds_what_makes_the_picture_and_nothing_that_is_not_used() -> None:
    delivery: dict[str, Any] = {"preview": True, "duplicate_first": False, "on_too_large": "jpeg"}
    assert set(json.loads(told(made("png", **delivery))["request"])) == {
        "prompt",
        "negative_prompt",
        "seed",
        "scheduler",
        "num_inference_steps",
        "refiner_inference_steps",
        "guidance_scale",
        "strength",
        "num_images",
    }
    cut = json.loads(told(made("png", guidance_end=0.6))["request"])
    assert cut["guidance_end"] == 0.6
    masked = {
        "image_url": IMAGE_URL,
        "mask_url": IMAGE_URL,
        "mask_blur": 4,
        "output_format": "jpeg",
    }
    request = json.loads(describe(parse_request(masked), 0, (64, 64), ABOUT)["request"])
    assert request.items() >= {**masked, "mode": "img2img", "output_quality": 95}.items()
    parse_request(request)


def test_the_request_makes_an_enlarged_picture_of_a_control_picture_again() -> None:
    fields: dict[str, Any] = {
        "prompt": "a",
        "controlnet": [{**CANNY, "scale": 0.5}],
        "return_maps": True,
        "ip_adapter": [{"image_url": IMAGE_URL}],
        "hires": {"steps": 9},
        "upscale": {"factor": 3},
    }
    request = parse_request(fields)
    told = json.loads(describe(request, 0, (64, 64), ABOUT)["request"])
    assert "return_maps" not in told, "how it was delivered"
    again = parse_request(told)
    assert again == request.model_copy(update={"return_maps": False})


# --- room --------------------------------------------------------------------------------------

LONG = 20_000


@pytest.mark.parametrize("character", ["a", "\U0001f600", "\x00", "&", '"', "\uffff"])
@pytest.mark.parametrize("output_format", FORMATS)
def test_the_longest_prompts_fail_no_picture(output_format: OutputFormat, character: str) -> None:
    prompts: dict[str, Any] = {"prompt": character * LONG, "negative_prompt": character * LONG}
    text = told(made(output_format, **prompts))
    assert parsed(text["parameters"])["Seed"] == "7"
    request = json.loads(text["request"])
    kept = {name: request[name] for name in prompts if name in request}
    # The segments of a JPEG have no room for both. None is cut: what is told is true.
    assert kept == ({} if output_format == "jpeg" else prompts)


def test_a_jpeg_has_room_for_one_long_prompt_up_to_the_last_byte() -> None:
    def length(prompt: str) -> int:
        image: Any = Image.open(io.BytesIO(made("jpeg", prompt=prompt, negative_prompt="x" * LONG)))
        return len(image.info["exif"])

    room = (MAX_JPEG_EXIF_BYTES - length("a")) // 2
    assert 10_000 < room < LONG
    assert MAX_JPEG_EXIF_BYTES - 1 <= length("a" * (1 + room)) <= MAX_JPEG_EXIF_BYTES
    assert length("a" * (2 + room)) < 1000


def test_a_prompt_that_is_long_in_xml_alone_fails_no_jpeg() -> None:
    assert "&" not in told(made("jpeg", prompt="&" * LONG))["parameters"]
    assert told(made("jpeg", prompt="&" * 10_000))["parameters"].startswith("&" * 10_000)


@pytest.mark.parametrize("output_format", FORMATS)
def test_an_address_without_end_is_cut(output_format: OutputFormat) -> None:
    long = "https://example.com/" + '"&' * 50_000
    control = {"type": "canny", "image_url": long}
    text = told(made(output_format, image_url=long, mask_url=long, controlnet=[control]))
    request = json.loads(text["request"])
    assert request["image_url"] == request["controlnet"][0]["image_url"] == long[:2000]


# --- the setting -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "level"),
    [
        ({}, "all"),
        ({"RUNPOD_WEBHOOK_GET_JOB": "https://example.com"}, "no_prompts"),
        ({"RUNPOD_WEBHOOK_GET_JOB": "https://example.com", "METADATA": "all"}, "all"),
        ({"RUNPOD_ENDPOINT_ID": "of a load-balancing endpoint"}, "no_prompts"),
        ({"METADATA": "no_prompts"}, "no_prompts"),
        ({"METADATA": "none"}, "none"),
        ({"PNG_METADATA": "true", "RUNPOD_WEBHOOK_GET_JOB": "https://example.com"}, "all"),
        ({"PNG_METADATA": "False"}, "none"),
        ({"PNG_METADATA": "0"}, "none"),
        ({"PNG_METADATA": "false", "METADATA": "no_prompts"}, "no_prompts"),
        ({"PNG_METADATA": "true", "METADATA": "none"}, "none"),
        ({"PNG_METADATA": "false", "METADATA": ""}, "none"),
    ],
    ids=str,
)
def test_the_level_is_that_of_the_setting_its_old_name_or_the_place(
    variables: dict[str, str], level: MetadataLevel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert load_settings().metadata_level == level


@pytest.mark.parametrize("output_format", FORMATS)
def test_a_lora_is_named_by_a_path_to_the_same_file_without_secrets(
    output_format: OutputFormat,
) -> None:
    address = "https://civitai.com/api/download/models/7?type=Model&token=hunter2"
    header = SafetensorsHeader({}, {}, {}, {}, 0)
    name = "https://civitai.com/api/download/models/7?type=Model"
    file = AdapterFile(Path("/cache/it"), "ab" * 32, name, header)
    about = dataclasses.replace(ABOUT, adapters={"loras[0].path": file}, few_step="LCM")
    text = told(made(output_format, about, loras=[{"path": address}]))
    assert json.loads(text["request"])["loras"] == [{"path": name, "scale": 1.0}]
    assert json.loads(text["adapters"]) == {name: "ab" * 32}
    assert "Lora hashes" in text["parameters"]
    assert "abababab" in text["parameters"]
    assert text["few_step"] == "LCM"
    assert "hunter2" not in str(text)
