"""What is made of runs and results afterwards. `python -m analysis --help` lists the commands."""

import base64

from data import decode_image, encode_image


def picture_url(data: bytes, side: int, form: str, quality: int) -> str:
    """A picture as a data URL: encoded anew ("jpeg" or "webp"), and no side longer than `side`. Raises InputError."""
    small = encode_image(decode_image(data), form, quality, side)
    return f"data:image/{form};base64,{base64.b64encode(small).decode()}"
