"""Pictures and texts as vectors: a handmade embedding of the pixels, or an encoder of transformers.

The handmade one needs no download and is good at finding the same thing pictured again; it is blind to meaning. Here
are also the thumbnails that an index and a cache keep.
"""

import atexit
import json
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from config import need
from data import decode_image, encode_image, refusing

THUMBNAIL_SIDE = 336  # pixels, at most
LOSSLESS_SIDE = 112  # pixels: thumbnails up to here are PNG, larger ones JPEG
WEB_FORMATS = ("JPEG", "PNG", "GIF", "WEBP")  # of thumbnails that are fetched; Pillow's other readers are less tried
WEB_PIXELS = 20_000_000  # of a fetched thumbnail; more is a decompression bomb
WEB_IMAGE_BYTES = 8_000_000
MAX_TOKENS = 512  # of a text that are encoded, where the tokenizer takes as many
PROBE = "What is the name of this lake?"  # its vector tells one encoder from another


def embed_image(image: Image.Image) -> np.ndarray:
    """What a picture looks like: float32 [D = 204] of length 1, so that a dot product of two is their cosine.

    Two coarse grids over the part of the picture that stands out (which makes it indifferent to where the thing is and
    how large): 6 x 6 mean colours, and 4 x 4 strengths of texture, across and down.
    """
    pixels = _grid(image, 24, _salient_box(image))
    change = np.zeros((24, 24, 6), np.float32)  # between cells two apart; squares of it do not tell where a stripe lies
    change[:, 2:, :3] = pixels[:, 2:] - pixels[:, :-2]
    change[2:, :, 3:] = pixels[2:] - pixels[:-2]
    parts = (_pool(pixels, 6) - 0.5, 2 * np.sqrt(_pool(change**2, 4)))
    vector = np.concatenate([part.ravel() / np.sqrt(np.float32(part.size)) for part in parts])
    return vector / max(np.linalg.norm(vector), np.float32(1e-6))


def _grid(image, cells, box=None):
    """float32 [cells, cells, 3]: mean colours, 0 to 1, of a box (left, top, right, bottom; pixels and fractions)."""
    return np.asarray(image.resize((cells, cells), Image.Resampling.BOX, box=box), np.float32) / 255


def _pool(grid, cells):
    """[H, H, C] to [cells, cells, C]: means of square blocks."""
    return grid.reshape(cells, len(grid) // cells, cells, len(grid) // cells, -1).mean((1, 3))


def _salient_box(image):
    """The box around what differs from the border's colour: its centre of mass, 2.2 standard deviations each way."""
    cells = 28  # coarse enough to average noise away
    colours = _grid(image, cells)
    border = np.concatenate([colours[0], colours[-1], colours[:, 0], colours[:, -1]])
    weight = ((colours - np.median(border, axis=0)) ** 2).sum(-1) + 1e-6  # of a flat picture, all is salient
    weight /= weight.sum()
    at = (np.arange(cells) + 0.5) / cells
    across, down = weight.sum(0), weight.sum(1)
    x, y = across @ at, down @ at
    reach = 2.2 * max(np.sqrt((across @ (at - x) ** 2 + down @ (at - y) ** 2) / 2), 1 / cells)
    box = np.clip([x - reach, y - reach, x + reach, y + reach], 0, 1)
    return tuple(box * [*image.size, *image.size])


def web_thumbnail(data: bytes) -> bytes:
    """A fetched picture as the JPEG that is shown and kept. Raises InputError if it is none, or too large."""
    return thumbnail(decode_image(data, WEB_FORMATS, WEB_PIXELS))


def thumbnail(image: Image.Image, format: str = "JPEG") -> bytes:
    return encode_image(image, format, side=THUMBNAIL_SIDE)


def one_at_a_time(encode: Callable) -> Callable:
    """encode, which uses torch, for one thread at a time (a tokenizer that pads is not for two), and for none any more
    when the process ends: a daemon thread that is in torch, if only to free a tensor, would abort it then."""
    import torch

    lock = threading.Lock()
    atexit.register(lock.acquire)

    def alone(what):
        with lock, torch.inference_mode():
            return np.array(encode(what))  # a copy, without a tensor behind it

    return alone


def load_encoder(name: str, building: bool = False) -> Callable[[Image.Image], np.ndarray]:
    """A vision encoder of transformers, by hub name or folder: a function from a picture to float32 [D] of length 1.

    It runs on the CPU, so that searching takes no memory of a training GPU; building an index may use one.
    """
    from transformers import AutoImageProcessor

    with refusing(f"image_embedding {name!r}: cannot load it", Exception):  # transformers raises about anything
        processor, model, device = _pretrained(AutoImageProcessor, name, building)
    see = getattr(model, "get_image_features", model)  # the first of models that also read text

    def encode(image):
        out = see(pixel_values=processor(images=image, return_tensors="pt")["pixel_values"].to(device))
        pooled = getattr(out, "pooler_output", None)
        vector = (out.last_hidden_state.mean(1) if pooled is None else pooled).flatten().float().cpu().numpy()
        return vector / max(np.linalg.norm(vector), np.float32(1e-6))

    return one_at_a_time(encode)


def load_text_encoder(name: str, building: bool = False) -> tuple[Callable[[list[str]], np.ndarray], np.ndarray]:
    """A sentence encoder of transformers, by hub name or folder: a function from N texts to float32 [N, D], each of
    length 1, and what it makes of PROBE. A vector is the mean over the tokens, or the first token's where the model's
    sentence-transformers configuration says so. It runs where `load_encoder` does."""
    import torch
    from transformers import AutoTokenizer

    @one_at_a_time
    def encode(texts):
        how = {"padding": True, "padding_side": "right", "truncation": True, "max_length": limit}
        inputs = tokenizer(texts, **how, return_tensors="pt").to(device)
        states = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None]
        vectors = states[:, 0] if first else (states * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(vectors, dim=1).cpu().numpy()

    with refusing(f"text_embedding {name!r}: cannot load it", Exception):
        tokenizer, model, device = _pretrained(AutoTokenizer, name, building)
        first = _pooling(name) == "cls_token"
        limit = getattr(model.config, "max_position_embeddings", MAX_TOKENS)
        limit = min(limit, tokenizer.model_max_length, MAX_TOKENS)
        return encode, encode([PROBE])[0]


def _pretrained(kind, name, building):
    """(processor or tokenizer, model, device)"""
    import torch
    from transformers import AutoModel

    device = "cuda" if building and torch.cuda.is_available() else "cpu"
    model = AutoModel.from_pretrained(name, dtype=torch.float32).to(device).eval()
    return kind.from_pretrained(name), model, device


def _pooling(name):
    """mean_tokens or cls_token, as the model's sentence-transformers configuration says; "" if there is none."""
    from transformers.utils import cached_file

    path = cached_file(name, "1_Pooling/config.json", _raise_exceptions_for_missing_entries=False)
    said = json.loads(Path(path).read_text()) if path else {}
    modes = [key.removeprefix("pooling_mode_") for key, on in said.items() if on is True and "pooling_mode" in key]
    need(modes in ([], ["mean_tokens"], ["cls_token"]), f"pooling by {modes}, not by mean_tokens or cls_token")
    return "".join(modes)
