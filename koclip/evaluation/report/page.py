"""Pages in HTML that need no other file: a template of koclip/assets, its style, and pictures inside."""

import base64
import io
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

_QUALITY = 85  # of pictures, 0 to 100


def render(template: str, fields: dict[str, Any]) -> str:
    """Return a page of a template in koclip/assets. Every value is escaped; a missing one is an error."""
    loader = PackageLoader("koclip", "assets")
    jinja = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return jinja.get_template(template).render(fields)


def content(file: Path) -> str:
    """Return a picture as WebP in base64; a page with photos is then a tenth as large."""
    buffer = io.BytesIO()
    with Image.open(file) as image:
        image.convert("RGB").save(buffer, "WEBP", quality=_QUALITY)
    return base64.b64encode(buffer.getvalue()).decode()
