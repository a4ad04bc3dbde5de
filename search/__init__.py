"""search/__init__.py"""

from pathlib import Path

from config import Config, InputError
from data import Question
from search.cache import CachedSearch, SearchCache
from search.index import OfflineSearch, SearchDB
from search.live import WebSearch
from search.service import RemoteSearch
from search.web import is_web_url


def open_search(cfg: Config, index: str | Path = ""):
    """The search that the configuration asks for; index: the offline one's file. Raises InputError if a file or a key
    is missing or wrong, or nobody answers."""
    if cfg.search_url:
        search = RemoteSearch(cfg)
        search.check()
        return search
    if cfg.search == "offline":
        return OfflineSearch(SearchDB(index), image_results=cfg.image_results, text_results=cfg.text_results)
    web = WebSearch(cfg) if cfg.searches_web else None
    if web:
        web.check()
    if cfg.search == "live":
        return web
    return CachedSearch(SearchCache(cfg.search_cache, write=web is not None), web, cfg)


def check_questions(questions: list[Question], cfg: Config) -> None:
    """Raise InputError if image search would be live and could not be shown a question's image."""
    if not cfg.searches_web or not cfg.max_image_searches or cfg.image_base_url or cfg.image_upload:
        return
    hidden = sum(bool(q.images) and not is_web_url(q.image_url) for q in questions)
    if hidden:
        raise InputError(
            f"the images of {hidden} of {len(questions)} questions have no URL, and a live image search needs one: "
            "serve what `python tools.py images` writes and give its --image_base_url, or an --image_upload command "
            "(or --max_image_searches 0)"
        )


def estimate(conversations: int, cfg: Config) -> str:
    """What the searches of so many conversations may come to, at most, as a line; "" if none is live."""
    if not cfg.searches_web:
        return ""
    most = conversations * min(cfg.max_image_searches + cfg.max_text_searches, cfg.max_turns - 1)
    limit = f"search_budget={cfg.search_budget:,} ends them earlier" if 0 < cfg.search_budget < most else "no budget"
    limit = "within search_budget" if cfg.search_budget >= most else limit
    cost = f"{most * cfg.price_search:,.2f} at price_search={cfg.price_search}"
    return f"live search: at most {most:,} searches in {conversations:,} conversations, {cost}; {limit}"
