"""SerpApi, the search engine of live search: Google Lens for a picture, Google for words.

This file is all that knows SerpApi. Another engine is a class with the same attributes and methods in a file of its
own, an option for its address in config.py, and its name as `ENGINE` in live.py, where everything else looks it up.
Formats as documented: serpapi.com/google-lens-api, /search-api, /search-errors, /account-api.
"""

from urllib.parse import urlencode

from config import Config, need
from search.calls import Failure
from search.text import clean, inline_text
from search.web import Client, Job, Limit, is_web_url, key_of

IN_FLIGHT, PER_SECOND = 16, 10.0  # requests at once; begun a second, over all ranks
MAX_TITLE = 300  # characters


class SerpApi:
    """Asks for matches: lists of {title, link, thumbnail (of pictures)}, all of them harmless text."""

    names = {"image_search": "google_lens", "text_search": "google"}  # tool -> engine, in the keys of recorded results
    price = 0.01  # of a search
    key = "SERPAPI_API_KEY"  # in the environment

    def __init__(self, cfg: Config, ranks: int = 1):
        self.cfg = cfg
        key = {"key": key_of(self.key), "key_in_url": True}
        self.client = Client("SerpApi", Limit(IN_FLIGHT, PER_SECOND / ranks), quota="run out of searches", **key)

    def check(self, job: Job) -> int | None:
        """How many searches are left, if that is known. Raises InputError without a key, Failure if it is refused."""
        need(self.client.key, f"search={self.cfg.search} needs a key of serpapi.com in the environment, {self.key}")
        left = self.client.fetch_json(self._url("account.json", {}), job).get("total_searches_left")
        return left if isinstance(left, int) else None

    def look_for_picture(self, url: str, job: Job) -> list[dict]:
        """What looks like the picture at a public URL. Raises Failure."""
        asked = {"engine": "google_lens", "type": "visual_matches", "url": url}
        return self._search(asked, "visual_matches", ("title", "link", "thumbnail"), job)

    def look_for_words(self, query: str, job: Job) -> list[dict]:
        """Pages about the query. Raises Failure."""
        return self._search({"engine": "google", "q": query}, "organic_results", ("title", "link"), job)

    def _url(self, path, asked):
        return f"{self.cfg.serpapi_url}/{path}?{urlencode({**asked, 'api_key': self.client.key})}"

    def _search(self, asked, field, needed, job):
        """The matches that an answer lists under `field`. Without the field, which happens now and then, it says
        nothing about what there is: it is asked for again, past SerpApi's own cache."""

        def matches(answer):
            meta, error, found = answer.get("search_metadata"), answer.get("error"), answer.get(field)
            status = meta.get("status") if isinstance(meta, dict) else None
            if status == "Success":
                job.add(searches=1)  # each attempt is billed
                if isinstance(error, str) and "returned any results" in error:
                    return []  # documented as the way to say so
            if error is not None or status in ("Error", "Processing", "Queued"):
                raise Failure("server", "SerpApi failed", note=clean(error, 200))
            if status == "Success" and found is None:
                raise Failure("server", f"an answer without {field}")
            if status != "Success" or not isinstance(found, list):
                raise Failure("bad_response", "SerpApi: not in the documented form")
            sound = [match for match in (_sound(row, needed) for row in found) if match]
            if found and not sound:
                raise Failure("bad_response", "SerpApi: no result in the documented form")
            return sound

        url = self._url("search.json", {**asked, "hl": self.cfg.search_language})
        return self.client.fetch_json(url, job, read=matches, again="&no_cache=true")


def _sound(row, needed):
    """The needed entries of a row, made harmless; None if it lacks one."""
    texts = isinstance(row, dict) and all(isinstance(row.get(name), str) for name in needed)
    if not texts or not all(is_web_url(row[name]) for name in needed if name != "title"):
        return None
    return {name: clean(inline_text(row[name]), MAX_TITLE) if name == "title" else row[name] for name in needed}
