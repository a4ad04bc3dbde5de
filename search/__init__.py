"""What answers the search tools: a local index, the web, recorded results, or a service that several machines share.

`open_search` gives the search that the configuration asks for; whatever it is, `search.search(call, question)` returns
a `Result` and may be called from any number of threads. `python -m search` builds indexes and looks after recordings.
"""

from pathlib import Path

from config import Config, need
from data import Question
from search.cache import CachedSearch, SearchCache
from search.index import OfflineSearch, SearchDB
from search.live import WebSearch, engine_of
from search.service import RemoteSearch
from search.web import is_web_url
from tools import allowed_calls, limits, offered, results

ASKS_WEB = ("live", "record")  # of --search: this process itself asks the web


def open_search(cfg: Config, index: str | Path = ""):
    """The search that the configuration asks for; index: the offline one's file. Raises InputError."""
    if cfg.search == "offline":
        return OfflineSearch(SearchDB(index), results(cfg))
    asked = RemoteSearch(cfg) if "://" in cfg.search else WebSearch(cfg) if cfg.search in ASKS_WEB else None
    if asked:
        asked.check()
    if cfg.search in ("record", "replay"):
        return CachedSearch(SearchCache(cfg.search_cache, write=asked is not None), asked, cfg)
    return asked


def web_part(search) -> WebSearch | None:
    """The part of a search that asks the web, if there is one in this process. A run keeps its `spent`, the searches
    that count against this rank's share of search_budget, and sets it when it resumes."""
    web = getattr(search, "inner", search)
    return web if isinstance(web, WebSearch) else None


def check_questions(questions: list[Question], cfg: Config) -> None:
    """Raise InputError if image search would be live and could not be shown a question's image."""
    if cfg.search not in ASKS_WEB or cfg.image_host or "image_search" not in offered(cfg):
        return
    hidden = sum(bool(q.images) and not is_web_url(q.image_url) for q in questions)
    need(
        not hidden,
        f"the images of {hidden} of {len(questions)} questions have no URL, and a live image search needs one: give "
        "--image_host, the URL of a folder that `python -m search images` wrote, or a command "
        "(or --tool_limits image_search=0)",
    )


def estimate(conversations: int, cfg: Config) -> str:
    """What the searches of so many conversations may come to, at most, as a line; "" if none is live."""
    if cfg.search not in ASKS_WEB:
        return ""
    engine, budget = engine_of(cfg), cfg.search_budget
    billed = sum(limits(cfg)[name] for name in engine.names)  # not what only reads a page
    most = conversations * min(allowed_calls(cfg), billed)
    limit = f"search_budget={budget:,} ends them earlier" if budget else "no budget"
    limit = "within search_budget" if budget >= most else limit
    price = max(engine.prices.values())
    cost = f"{most * price:,.2f} at {price} each"
    return f"live search: at most {most:,} searches in {conversations:,} conversations, {cost}; {limit}"
