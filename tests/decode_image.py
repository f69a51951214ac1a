"""What users run on a saved result, after step 5 of Runpod's SDXL tutorial."""

import base64
import io
import json
from pathlib import Path

from PIL import Image

data = json.loads(Path("output.json").read_text())
base64_url = data.get("output", {}).get("image_url")
_, encoded_data = base64_url.split(",", 1)
Image.open(io.BytesIO(base64.b64decode(encoded_data))).save("generated_image.png")
