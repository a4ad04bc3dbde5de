"""Serper.dev as a search engine of live search: Google Lens for a picture, Google for words.

This file is all that knows Serper, which publishes no reference. Formats, statuses and prices as others describe them:
github.com/api-evangelist/serper (openapi/, errors/, rate-limits/), read from Serper's own playground and pricing page.
"""

from collections.abc import Callable

from search.engine import SearchEngine
from search.web import Job

CREDIT, LENS_CREDITS = 0.001, 3  # at the smallest package; of a search by picture, while one by words takes one


class Serper(SearchEngine):
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

    def look_for_picture(self, url: str, job: Job) -> list[dict]:
        return self.ask("image_search", f"{self.url}/lens", job, {"url": url, "hl": self.language})

    def look_for_words(self, query: str, job: Job) -> list[dict]:
        return self.ask("text_search", f"{self.url}/search", job, {"q": query, "hl": self.language})

    def listed(self, answer: dict, field: str, bill: Callable):
        bill()
        return answer.get(field)
