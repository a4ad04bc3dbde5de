"""What is made of runs and results afterwards. `python -m analysis --help` lists the commands."""

import base64
import io

from data import decode_image


def picture_url(data: bytes, side: int, form: str, quality: int) -> str:
    """A picture as a data URL: encoded anew ("jpeg" or "webp"), and no side longer than `side`. Raises InputError."""
    image, file = decode_image(data), io.BytesIO()
    image.thumbnail((side, side))
    image.save(file, form, quality=quality)
    return f"data:image/{form};base64,{base64.b64encode(file.getvalue()).decode()}"
