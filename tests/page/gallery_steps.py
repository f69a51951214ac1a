"""What the tests of the gallery share: pictures, and the gallery as people see it."""

import base64
import io
from dataclasses import dataclass
from typing import Any

from PIL import Image
from playwright.sync_api import Locator, Page, expect

from local_endpoint import LocalEndpoint

PROMPT = "a red circle on a blue background"
# Small, of few steps, without the refiner: a tenth of a second each.
CHEAP = {"width": 64, "height": 64, "num_inference_steps": 2, "refiner_inference_steps": 0}


@dataclass(frozen=True)
class Drawn:
    """A job that the worker drew, as the page's jobs hand it to the gallery."""

    input: dict[str, Any]
    output: dict[str, Any]
    job_id: str

    @property
    def files(self) -> list[bytes]:
        return [file_of(uri) for uri in self.output["images"]]


def draw(endpoint: LocalEndpoint, **fields: Any) -> Drawn:
    job_input = {"prompt": PROMPT, **CHEAP, **fields}
    job_id = endpoint.run(job_input)
    answer = endpoint.wait(job_id)
    assert answer["status"] == "COMPLETED", answer
    return Drawn(job_input, answer["output"], str(answer["id"]))


def file_of(data_uri: str) -> bytes:
    return base64.b64decode(data_uri.partition(",")[2])


def data_uri(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def png_of(size: tuple[int, int], colour: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def add(page: Page, drawn: Drawn, *, job_id: str | None = None) -> None:
    """As the page's jobs do it when a job has ended."""
    page.evaluate(
        """async ([input, output, jobId]) => {
            const { addPictures } = await import("/gallery.js");
            const { parseJson, writeJson } = await import("/json.js");
            await addPictures({ input, output, jobId, seconds: 1 });
        }""",
        [drawn.input, drawn.output, job_id or drawn.job_id],
    )


def gallery(page: Page) -> Locator:
    return page.get_by_role("region", name="Gallery", exact=True)


def tiles(page: Page) -> Locator:
    return gallery(page).get_by_role("list").get_by_role("listitem")


def open_picture(page: Page, number: int = 0) -> Locator:
    """The dialog of a picture, the newest first."""
    tiles(page).nth(number).get_by_role("button").click()
    dialog = page.get_by_role("dialog")
    expect(dialog).to_be_visible()
    return dialog


def parameter(dialog: Locator, name: str) -> Locator:
    """The cell of a parameter in the dialog of a picture."""
    rows = dialog.get_by_role("row")
    return rows.filter(has=dialog.page.get_by_role("rowheader", name=name, exact=True)).get_by_role(
        "cell"
    )


def close(page: Page) -> None:
    # A key that is pressed before the dialog is there closes nothing.
    expect(page.get_by_role("dialog")).not_to_have_count(0)
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
