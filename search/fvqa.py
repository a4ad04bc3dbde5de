"""FVQA's image-search cache, which its authors publish as a pickle, read into a cache of ours.

A pickle is a program; this one is read by a reader that knows plain containers, strings and pictures, and refuses
everything else before it runs.
"""

import collections
import pickle
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from config import InputError, need
from data import Hit, Result
from search.cache import SearchCache, batches, canonical
from search.calls import Failure
from search.embedding import WEB_IMAGE_BYTES, WEB_PIXELS, thumbnail, web_thumbnail
from search.text import clean
from search.web import IMAGE_TYPES, Client, Job, Limit, is_web_url


def fetching_client(**options) -> Client:
    """Fetches the pictures of an import."""
    return Client("picture", Limit(16), ours=False, max_bytes=WEB_IMAGE_BYTES, types=IMAGE_TYPES, **options)


def import_fvqa(
    path: str | Path, cache: SearchCache, client: Client | None = None
) -> tuple[int, list[tuple[str, str]]]:
    """Add FVQA's image-search cache, a pickle {data_id: {"tool_returned_web_title_list": [title],
    "tool_returned_images_urls": [URL or PIL image]}}; returns the number of entries and (data_id, URL) of the pictures
    that are missing: all that are given as URLs without a client, those that cannot be fetched with one.

    Hits without a picture keep their title. In a replay an entry answers image searches about questions with its
    data_id where nothing is kept under the picture itself. Raises InputError.
    """
    try:
        with open(path, "rb") as file:
            entries = _Unpickler(file).load()
    except OSError as error:
        raise InputError(f"{path}: cannot read it ({error.strerror})") from None
    except Exception as error:  # on broken files pickle raises about anything
        raise InputError(f"{path}: not a pickle of plain data ({str(error) or type(error).__name__})") from None
    need(isinstance(entries, dict), f"{path}: expected a dictionary by data_id")
    missing, now = [], time.time()

    def rows(pool):
        for id, entry in tqdm(entries.items(), desc="import", unit=" entries", leave=False, disable=None):
            titles, pictures = _fvqa_entry(path, id, entry)
            urls = [p for p in pictures if isinstance(p, str)]
            fetched = dict(zip(urls, pool.map(partial(_fetch_picture, client), urls), strict=True))
            missing.extend((str(id), url) for url in urls if fetched[url] is None)
            hits = tuple(
                Hit(clean(title, 300), image=fetched[p] if isinstance(p, str) else p)
                for title, p in zip(titles, pictures, strict=False)
            )
            yield canonical({"data_id": str(id)}), now, Result("ok" if hits else "no_results", hits)

    with ThreadPoolExecutor(16) as pool:
        for part in batches(rows(pool), 64):  # what was fetched is kept, should the rest be interrupted
            cache.put_all(part)
    return len(entries), missing


def _fvqa_entry(path, id, entry):
    """(titles, pictures as JPEG bytes or URLs) of an entry, one of each for each hit."""
    if not isinstance(entry, dict) or not isinstance(id, str | int):
        raise InputError(f"{path}, entry {str(id)[:40]}: expected a dictionary under a data_id")
    titles, pictures = entry.get("tool_returned_web_title_list"), entry.get("tool_returned_images_urls")
    if not isinstance(titles, list | tuple) or not isinstance(pictures, list | tuple):
        raise InputError(f"{path}, entry {str(id)[:40]}: expected two lists, of titles and of pictures or URLs")
    try:
        return titles, [p.jpeg() if isinstance(p, _PickledImage) else str(p)[:2000] for p in pictures]
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}, entry {str(id)[:40]}: a picture that cannot be read ({error})") from None


def _fetch_picture(client, url):
    """A thumbnail, or None if there is no client or no picture."""
    try:
        return web_thumbnail(client.fetch(url, Job(60.0))) if client and is_web_url(url) else None
    except (Failure, InputError):
        return None


class _PickledImage:
    """Stands in for PIL images of a pickle: takes their state, and makes a picture only of what is sound."""

    def __setstate__(self, state):
        self.state = state

    def jpeg(self) -> bytes:
        _, mode, size, palette, data = self.state[:5]  # as Pillow writes it
        width, height = size
        if not 0 < width * height <= WEB_PIXELS or max(size) > 200 * min(size):
            raise ValueError(f"{width} x {height} pixels")
        image = Image.frombytes(mode, (width, height), data)
        if mode in ("P", "PA") and palette:
            image.putpalette(palette)
        return thumbnail(image.convert("RGB"))


class _Ignored(str):
    """Stands in for what pictures carry along: notes in a PNG, fractions in EXIF."""

    def __setstate__(self, state):
        pass


def _reconstruct(cls, base, state):
    """What `copyreg._reconstructor` does, for pictures and their notes alone (protocols 0 and 1)."""
    if (cls, base) not in ((_PickledImage, object), (_Ignored, str)):
        raise pickle.UnpicklingError("only pictures may be reconstructed")
    return cls() if base is object else cls(state)


class _Unpickler(pickle.Unpickler):
    """Knows plain containers, strings, numbers, bytes and PIL images; anything else is refused before it runs."""

    allowed: dict[tuple[str, str], Callable | type] = {
        ("builtins", "object"): object,
        ("builtins", "unicode"): str,
        ("builtins", "str"): str,
        ("builtins", "set"): set,
        ("builtins", "frozenset"): frozenset,
        ("builtins", "bytearray"): bytearray,
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("copyreg", "_reconstructor"): _reconstruct,
        ("_codecs", "encode"): lambda text, encoding="latin1": text.encode("latin1"),  # bytes, in protocol 2
        ("PIL.PngImagePlugin", "iTXt"): _Ignored,
    }

    def find_class(self, module, name):
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        if module.split(".")[0] == "PIL" and (name == "Image" or name.endswith("ImageFile")):
            return _PickledImage
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which is not allowed")
        return self.allowed[module, name]
