"""FVQA's image-search cache, which its authors publish as a pickle and others as JSON, read into a cache of ours.

A pickle is a program. Here it may put plain data together; what it would call is only written down (`_Made`), and only
if it is one of a few names. Time and memory grow with the file alone.
"""

import json
import mmap
import pickle
import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image
from tqdm import tqdm

from config import InputError, need
from data import Hit, Result, refusing
from search.cache import SearchCache, canonical
from search.calls import Failure
from search.embedding import WEB_IMAGE_BYTES, WEB_PIXELS, thumbnail, web_thumbnail
from search.text import clean
from search.web import IMAGE_TYPES, Client, Job, Limit, is_web_url

MAX_HITS = 50  # of an entry; FVQA has five


def fetching_client(**options) -> Client:
    """Fetches the pictures of an import."""
    return Client("picture", Limit(16), ours=False, max_bytes=WEB_IMAGE_BYTES, types=IMAGE_TYPES, **options)


def import_fvqa(path: str | Path, cache: SearchCache, client: Client | None = None) -> tuple[int, list]:
    """Add FVQA's image-search cache, {data_id: {titles, pictures}} (see `_fvqa_entry`); returns the number of entries
    and a list of (data_id, URL or path) of the pictures that are missing: URLs without a client or that cannot be
    fetched with it, paths that are no picture in the file's folder.

    Hits without a picture keep their title. In a replay an entry answers image searches about questions with its
    data_id where nothing is kept under the picture itself. Raises InputError.
    """
    entries = read_plain(path)
    need(isinstance(entries, dict), f"{path}: expected a dictionary by data_id")
    missing, now, found = [], time.time(), partial(_found_picture, client, Path(path).parent)

    def rows(pool):
        for id, entry in tqdm(entries.items(), desc="import", unit=" entries", leave=False, disable=None):
            # of what a file may hold, numpy and Pillow raise about anything
            with refusing(f"{path}, entry {clean(str(id), 40)}: unreadable", Exception):
                need(isinstance(entry, dict) and isinstance(id, str | int), "expected a dictionary under a data_id")
                titles, pictures = _fvqa_entry(entry)
                request = canonical({"data_id": str(id)})
                request.encode()  # JSON can spell half a character
            hits = []
            for title, picture, image in zip(titles, pictures, pool.map(found, pictures), strict=False):
                hits.append(Hit(clean(title, 300), image=image))
                if image is None:
                    missing.append((str(id), picture))
            yield request, now, Result("ok" if hits else "no_results", tuple(hits))

    with ThreadPoolExecutor(16) as pool:
        made = rows(pool)
        while part := list(islice(made, 64)):  # what was fetched is kept, should the rest be interrupted
            cache.put_all(part)
    return len(entries), missing


def read_plain(path: str | Path):
    """What a pickle of plain data holds, or a JSON file. Nothing in it is run. Raises InputError."""
    with open(path, "rb") as file, refusing(f"{path}: not a pickle of plain data, nor JSON", Exception):
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        is_json = data[:64].lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"{", b"["))
        return json.loads(data[:]) if is_json else _Reader(data, encoding="latin1").load()


def _fvqa_entry(entry):
    """(titles, pictures) of an entry. They are lists under these names; a picture is there as such or as a URL, or in
    the JSON form as a path. Pictures are returned as JPEG bytes, URLs and paths as text, anything else as ""."""
    titles = _array(entry.get("tool_returned_web_title_list", entry.get("tool_returned_web_title")))
    pictures = _array(entry.get("cached_images_path", entry.get("tool_returned_images_urls")))
    sound = all(isinstance(value, list | tuple | np.ndarray) for value in (titles, pictures))
    need(sound, "expected two lists, of titles and of pictures, URLs or paths")
    return titles, [_as_jpeg(picture) for picture in pictures[: min(len(titles), MAX_HITS)]]


def _as_jpeg(picture):
    if isinstance(picture, bytes):
        return web_thumbnail(picture)
    if not isinstance(picture, _Made):
        return clean(picture, 2000)
    if picture.jpeg is None:  # a hostile file may show one picture a million times
        picture.jpeg = thumbnail(_image(picture).convert("RGB"))
    return picture.jpeg


def _image(made):
    if made.name == "numpy.ndarray":
        array = _array(made)
        need(isinstance(array, np.ndarray) and array.dtype == np.uint8 and array.ndim > 1, "no array of a picture")
        return Image.fromarray(array)
    is_picture = made.name.startswith("PIL.") and made.name.endswith((".Image", "ImageFile"))
    need(is_picture, f"a picture that is a {made.name}")
    _, mode, size, palette, data = made.state[:5]  # as Pillow writes it
    width, height = size
    need(0 < width * height <= WEB_PIXELS and max(size) <= 200 * min(size), f"{width} x {height} pixels")
    image = Image.frombytes(mode, (width, height), _as_bytes(data))
    if mode in ("P", "PA") and palette:
        image.putpalette(palette)
    return image


def _found_picture(client, folder, picture):
    """The thumbnail of a picture, a URL or a path, or None. Paths were written elsewhere: one is sought in the folder,
    by as much of its end as there is."""
    if isinstance(picture, bytes):
        return picture
    with suppress(Failure, InputError, OSError):
        if is_web_url(picture):
            return web_thumbnail(client.fetch(picture, Job(60.0))) if client else None
        parts = [part for part in PurePosixPath(picture).parts if part.strip("/.")]
        for n in range(len(parts)):
            if (file := folder.joinpath(*parts[n:])).is_file():
                return web_thumbnail(file.read_bytes())
    return None


# ------------------------------------------------------------------------------------------------------- pickles
class _Made:
    """What a pickle names, or would call and give a state: a picture, a numpy array or data type, or what pictures
    carry along (fractions and notes of their metadata), which nobody looks at."""

    def __init__(self, name, args=(), state=None):
        self.name, self.args, self.state, self.jpeg = name, args, state, None

    def __setstate__(self, state):
        self.state = state

    def __call__(self, *args):
        last = self.name.rpartition(".")[2]
        if last in ("encode", "bytes", "bytearray"):  # the first writes bytes in protocols 0 to 2
            return _as_bytes(args[0]) if args else b""
        if last == "OrderedDict":
            return _Dict()
        if last == "_reconstructor":
            return _Made(args[0].name)
        if last == "_reconstruct":
            return _Made("numpy.ndarray")
        if last == "_frombuffer":
            data, dtype, shape, order = args[:4]
            return _Made("numpy.ndarray", state=(1, shape, dtype, order == "F", data))
        if last == "scalar":
            return _array(_Made("numpy.ndarray", state=(1, (), args[0], False, args[1]))).item()
        return _Made(self.name, args)


NAMES = re.compile(
    r"PIL\.\w+\.([A-Z]\w*|iTXt)|fractions\.Fraction|collections\.OrderedDict|copyreg\._reconstructor|_codecs\.encode|"
    r"builtins\.(object|str|unicode|bytes|bytearray)|numpy\.(dtype|ndarray|_?core\.multiarray\.(_reconstruct|scalar)|"
    r"_?core\.numeric\._frombuffer)"
)


class _Dict(dict):
    """A dictionary whose keys are such that their hashes are quick and do not collide."""

    __slots__ = ()  # no state but its items

    def __setitem__(self, key, value):
        long = isinstance(key, int) and abs(key) >= 2**63
        if long or not isinstance(key, str | int | float | bytes | _Made | None):
            raise pickle.UnpicklingError("a tuple or a long number as a key")
        super().__setitem__(key, value)


class _Reader(pickle._Unpickler):  # the one in Python: its steps can be replaced, and its memo is a dictionary
    """Names become `_Made`, and dictionaries `_Dict`; there are no sets."""

    def find_class(self, module, name):
        full = f"{ {'__builtin__': 'builtins', 'copy_reg': 'copyreg'}.get(module, module) }.{name}"
        if not NAMES.fullmatch(full):
            raise pickle.UnpicklingError(f"it holds {full}, which is not allowed")
        return _Made(full)

    def load_dict(self):
        items = self.pop_mark()
        self.append(_Dict())
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.stack[-1][key] = value

    dispatch = dict(pickle._Unpickler.dispatch)
    dispatch[pickle.NEWOBJ[0]] = pickle._Unpickler.load_reduce
    dispatch[pickle.DICT[0]], dispatch[pickle.EMPTY_DICT[0]] = load_dict, lambda self: self.append(_Dict())
    for code in (pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET):
        del dispatch[code[0]]


def _as_bytes(data):
    return data.encode("latin1") if isinstance(data, str) else bytes(memoryview(data))


def _array(value):
    """A numpy array of numbers or text, or a list of objects, if that is what was pickled; else the value itself."""
    if not isinstance(value, _Made) or value.name != "numpy.ndarray":
        return value
    _, shape, dtype, fortran, data = value.state
    if isinstance(data, list):
        return data
    code = f"{dtype.state[1]}{dtype.args[0]}"
    need(re.fullmatch(r"[<>|=][biufSU]\d{1,5}", code), f"an array of {code[:40]!r}")
    return np.frombuffer(_as_bytes(data), code).reshape(shape, order="F" if fortran else "C")
