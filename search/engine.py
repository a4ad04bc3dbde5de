"""The search engines of live search, and what they share: limits, counting, and matches that are harmless text."""

from collections.abc import Callable
from typing import ClassVar
from urllib.parse import urlencode

from config import Config
from search.calls import Failure
from search.text import clean, inline_text
from search.web import Client, Job, Limit, is_web_url, key_of

IN_FLIGHT, PER_SECOND = 16, 10.0  # requests at once; begun a second, over all ranks
MAX_TITLE = 300  # characters
CREDIT, LENS_CREDITS = 0.001, 3  # of Serper's smallest package; of a search by picture (by words: one)


class SearchEngine:
    """Asks for matches: lists of {title, link, thumbnail (of pictures)}. What one engine is like stands in a subclass,
    with the attributes below and the methods

        check(job)                   for how many searches the account lasts at least (None: unknown)
        look_for(tool, what, job)    matches: of the picture at a public URL, or pages about the query
        listed(answer, field, bill)  what an answer lists, [] if it says that there is nothing; bill() counts a search

    which raise Failure, `check` if the key is refused.
    """

    site: ClassVar[str]  # where keys come from
    address: ClassVar[str]  # unless search_engine has another
    key: ClassVar[str]  # in the environment
    key_digits: ClassVar[int]  # hexadecimal ones, of which its keys consist
    key_as: ClassVar[tuple]  # as in Client
    quota: ClassVar[str]  # as in Client
    names: ClassVar[dict[str, str]]  # tool -> engine, in the keys of recorded results
    prices: ClassVar[dict[str, float]]  # tool -> of a search
    fields: ClassVar[dict[str, str]]  # tool -> where an answer lists matches
    thumbnails: ClassVar[tuple[str, ...]]  # entries of a match that may have its thumbnail, the best first

    def __init__(self, cfg: Config, ranks: int = 1):
        address = cfg.search_engine.partition("=")[2] or self.address
        self.url, self.language = address.rstrip("/"), cfg.search_language
        limit, how = Limit(IN_FLIGHT, PER_SECOND / ranks), {"key_as": self.key_as, "quota": self.quota}
        self.client = Client(type(self).__name__, limit, key=key_of(self.key), **how)

    def ask(self, tool: str, url: str, job: Job, payload: dict | None = None, again: str = "") -> list[dict]:
        """The matches that an answer lists. Without the list, which happens now and then, it says nothing about what
        there is: it is asked for again. payload, again: as in Client.fetch. Raises Failure."""
        field = self.fields[tool]

        def matches(answer):
            found = self.listed(answer, field, lambda: job.add(searches=1, cost=self.prices[tool]))
            if found is None:
                raise Failure("server", f"an answer without {field}")
            rows = found if isinstance(found, list) else [found]
            sound = [match for match in (self._sound(row, tool) for row in rows) if match]
            if rows and not sound:
                raise Failure("bad_response", "no result in the documented form")
            return sound

        return self.client.fetch_json(url, job, payload, matches, again)

    def _sound(self, row, tool):
        """The needed entries of a row, made harmless; None if it lacks one."""
        if not isinstance(row, dict) or not isinstance(row.get("title"), str):
            return None
        urls = {"link": ("link",)} | ({"thumbnail": self.thumbnails} if tool == "image_search" else {})
        found = {name: next(filter(is_web_url, map(row.get, entries)), None) for name, entries in urls.items()}
        return {"title": clean(inline_text(row["title"]), MAX_TITLE), **found} if all(found.values()) else None


class SerpApi(SearchEngine):
    """Google Lens for a picture, Google for words. Formats as documented: serpapi.com/google-lens-api, /search-api,
    /search-errors, /account-api."""

    site, address = "serpapi.com", "https://serpapi.com"
    key, key_digits, key_as = "SERPAPI_API_KEY", 64, ()
    quota = "run out of searches"
    names = {"image_search": "google_lens", "text_search": "google"}
    prices = {"image_search": 0.01, "text_search": 0.01}
    fields = {"image_search": "visual_matches", "text_search": "organic_results"}
    thumbnails = ("thumbnail",)

    def check(self, job: Job) -> int | None:
        left = self.client.fetch_json(self._url("account.json", {}), job).get("total_searches_left")
        return left if isinstance(left, int) else None

    def look_for(self, tool: str, what: str, job: Job) -> list[dict]:
        asked = {"image_search": {"type": "visual_matches", "url": what}, "text_search": {"q": what}}[tool]
        url = self._url("search.json", {"engine": self.names[tool], **asked, "hl": self.language})
        return self.ask(tool, url, job, again="&no_cache=true")  # past SerpApi's own cache

    def _url(self, path, asked):
        return f"{self.url}/{path}?{urlencode({**asked, 'api_key': self.client.key})}"

    def listed(self, answer: dict, field: str, bill: Callable):
        meta, error = answer.get("search_metadata"), answer.get("error")
        status = meta.get("status") if isinstance(meta, dict) else None
        if status == "Success":
            bill()  # each attempt
            if isinstance(error, str) and "returned any results" in error:
                return []  # documented as the way to say so
        if error is not None or status in ("Error", "Processing", "Queued"):
            raise Failure("server", "the search failed", note=clean(error, 200))
        if status != "Success":
            raise Failure("bad_response", "not in the documented form")
        return answer.get(field)


class Serper(SearchEngine):
    """Serper.dev: Google Lens for a picture, Google for words. It publishes no reference; formats, statuses and prices
    as others describe them: github.com/api-evangelist/serper (openapi/, errors/, rate-limits/), read from Serper's own
    playground and pricing page."""

    site, address = "serper.dev", "https://google.serper.dev"
    key, key_digits, key_as = "SERPER_API_KEY", 40, ("X-API-KEY", "{}")
    quota = "not enough credits"
    names = {"image_search": "serper_lens", "text_search": "serper"}
    prices = {"image_search": LENS_CREDITS * CREDIT, "text_search": CREDIT}
    fields = {"image_search": "organic", "text_search": "organic"}
    thumbnails = ("thumbnailUrl", "imageUrl")

    def check(self, job: Job) -> int | None:
        left = self.client.fetch_json(f"{self.url}/account", job).get("balance")
        return left // LENS_CREDITS if isinstance(left, int) else None

    def look_for(self, tool: str, what: str, job: Job) -> list[dict]:
        path, field = {"image_search": ("lens", "url"), "text_search": ("search", "q")}[tool]
        return self.ask(tool, f"{self.url}/{path}", job, {field: what, "hl": self.language})

    def listed(self, answer: dict, field: str, bill: Callable):
        bill()
        return answer.get(field)


ENGINES = {"serpapi": SerpApi, "serper": Serper}  # those of config.SEARCH_ENGINES
