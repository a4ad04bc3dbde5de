"""SerpApi, the search engine of live search: Google Lens for a picture, Google for words.

This file is all that knows SerpApi. Another engine is a class with the same attributes and methods in a file of its
own, an option for its address in config.py, and its name as `ENGINE` in live.py, where everything else looks it up.
Formats as documented: serpapi.com/google-lens-api, /search-api, /search-errors, /account-api.
"""

import os
from urllib.parse import urlencode

from config import Config, InputError
from search.calls import Failure
from search.text import clean, inline_text
from search.web import Client, Job, Limit, is_web_url

IN_FLIGHT, PER_SECOND = 16, 10.0  # requests at once; begun a second, over all ranks
MAX_TITLE = 300  # characters


class SerpApi:
    """Asks for matches: lists of {title, link, thumbnail (of pictures)}, all of them harmless text."""

    names = {"image_search": "google_lens", "text_search": "google"}  # tool -> engine, in the keys of recorded results
    price = 0.01  # of a search
    key = "SERPAPI_API_KEY"  # in the environment

    def __init__(self, cfg: Config, ranks: int = 1):
        self.cfg, self.secret = cfg, os.environ.get(self.key, "").strip()
        self.client = Client("SerpApi", Limit(IN_FLIGHT, PER_SECOND / ranks), quota="run out of searches")

    def check(self, job: Job) -> int | None:
        """How many searches are left, if that is known. Raises InputError without a key, Failure if it is refused."""
        if not self.secret:
            raise InputError(f"search={self.cfg.search} needs a key of serpapi.com in the environment, {self.key}")
        left = self._ask("account.json", {}, job).get("total_searches_left")
        return left if isinstance(left, int) else None

    def look_for_picture(self, url: str, job: Job) -> list[dict]:
        """What looks like the picture at a public URL. Raises Failure."""
        asked = {"engine": "google_lens", "type": "visual_matches", "url": url}
        return self._search(asked, "visual_matches", ("title", "link", "thumbnail"), job)

    def look_for_words(self, query: str, job: Job) -> list[dict]:
        """Pages about the query. Raises Failure."""
        return self._search({"engine": "google", "q": query}, "organic_results", ("title", "link"), job)

    def _ask(self, path, asked, job):
        query = urlencode({**asked, "api_key": self.secret})
        return self.client.fetch_json(f"{self.cfg.serpapi_url}/{path}?{query}", job)

    def _search(self, asked, field, needed, job):
        """The matches that an answer lists under `field`."""
        answer = self._ask("search.json", {**asked, "hl": self.cfg.search_language}, job)
        meta, error, found = answer.get("search_metadata"), answer.get("error"), answer.get(field, [])
        status = meta.get("status") if isinstance(meta, dict) else None
        if status == "Success" and isinstance(error, str) and "returned any results" in error:
            error, found = None, []  # documented as the way to say so
        if error is not None or status == "Error":
            raise Failure("server", "SerpApi failed", note=clean(error, 200))
        if status != "Success" or not isinstance(found, list):
            raise Failure("bad_response", "SerpApi: not in the documented form")
        job.add(searches=1)
        matches = [match for match in (_sound(row, needed) for row in found) if match]
        if found and not matches:
            raise Failure("bad_response", "SerpApi: no result in the documented form")
        return matches


def _sound(row, needed):
    """The needed entries of a row, made harmless; None if it lacks one."""
    if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in needed):
        return None
    if not all(is_web_url(row[name]) for name in needed if name != "title"):
        return None
    return {name: clean(inline_text(row[name]), MAX_TITLE) if name == "title" else row[name] for name in needed}
