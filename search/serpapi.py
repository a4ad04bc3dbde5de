"""SerpApi as a search engine of live search: Google Lens for a picture, Google for words.

This file is all that knows SerpApi. Formats as documented: serpapi.com/google-lens-api, /search-api, /search-errors,
/account-api.
"""

from collections.abc import Callable
from urllib.parse import urlencode

from search.calls import Failure
from search.engine import SearchEngine
from search.text import clean
from search.web import Job


class SerpApi(SearchEngine):
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

    def look_for_picture(self, url: str, job: Job) -> list[dict]:
        return self._search("image_search", {"type": "visual_matches", "url": url}, job)

    def look_for_words(self, query: str, job: Job) -> list[dict]:
        return self._search("text_search", {"q": query}, job)

    def _url(self, path, asked):
        return f"{self.url}/{path}?{urlencode({**asked, 'api_key': self.client.key})}"

    def _search(self, tool, asked, job):
        url = self._url("search.json", {"engine": self.names[tool], **asked, "hl": self.language})
        return self.ask(tool, url, job, again="&no_cache=true")  # past SerpApi's own cache

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
