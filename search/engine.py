"""What the search engines of live search share: limits, counting, and matches that are harmless text."""

from typing import ClassVar

from config import Config
from search.calls import Failure
from search.text import clean, inline_text
from search.web import Client, Job, Limit, is_web_url, key_of

IN_FLIGHT, PER_SECOND = 16, 10.0  # requests at once; begun a second, over all ranks
MAX_TITLE = 300  # characters


class SearchEngine:
    """Asks for matches: lists of {title, link, thumbnail (of pictures)}. What one engine is like stands in a subclass,
    with the attributes below and the methods

        check(job)                   for how many searches the account lasts at least (None: unknown)
        look_for_picture(url, job)   matches: what looks like the picture at a public URL
        look_for_words(query, job)   matches: pages about the query
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
        self.url, self.language = cfg.search_engine.partition("=")[2] or self.address, cfg.search_language
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
