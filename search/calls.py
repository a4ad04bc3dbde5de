"""What every search does with a call before it answers: refuse what nobody can answer, and say so in a typed result.

The method of a search that answers calls of a tool is called `for_TOOL`. A call of a tool for which there is none, or
that lacks what its tool needs (a picture, words), gives a result with status "error", error_kind "bad_call".
"""

import sqlite3
import traceback
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from pathlib import Path

from config import InputError
from data import Call, Question, Result
from search.text import clean
from tools import problem_with, title

MAX_QUERY = 1000  # characters


class Failure(Exception):
    """A search that came to nothing. kind: one of data.ERROR_KINDS; reason: one of a few, for counting; note: what the
    other side said about it. None of it holds a URL or a key of ours. retry_after: seconds to wait before another try.
    """

    def __init__(self, kind: str, reason: str, note: str = "", retry_after: float = 0.0):
        self.said = f"{reason}: {note}" if note else reason
        super().__init__(self.said)
        self.kind, self.reason, self.retry_after = kind, reason, retry_after


def method_for(call: Call, question: Question, search) -> Callable:
    """The method of a search that answers a call. Raises Failure (bad_call)."""
    if problem := problem_with(call, question):
        raise Failure("bad_call", problem)
    if not hasattr(search, f"for_{call.tool}"):
        raise Failure("bad_call", f"this search has no answer to {title(call.tool)}")
    return getattr(search, f"for_{call.tool}")


def shared(pending: dict[Hashable, Future], key: Hashable, make: Callable) -> tuple[object, bool]:
    """make()'s value, or that of a call with this key that is under way on another thread, and whether it is ours."""
    mine = Future()
    first = pending.setdefault(key, mine)  # of dictionaries, one step for all threads
    if first is mine:
        try:
            mine.set_result(make())
        except BaseException as error:
            mine.set_exception(error)
        finally:
            del pending[key]
    return first.result(), first is mine


def query_of(call: Call) -> str:
    """The words that a call asks for, made harmless. Raises Failure (bad_call) if none are left."""
    query = clean(call.query, MAX_QUERY)
    if not query:
        raise Failure("bad_call", "the query is empty")
    return query


def failed(error: Exception) -> Result:
    """The result of a call that failed; an InputError is about its picture, one of SQLite about the file searched, any
    other a mistake in this code."""
    if isinstance(error, sqlite3.ProgrammingError):  # ours, not the file's
        raise error
    said, kind = str(error), error.kind if isinstance(error, Failure) else "bad_call"
    if isinstance(error, sqlite3.DatabaseError):
        said, kind = f"{type(error).__name__}: {error}", "index"
    elif not isinstance(error, Failure | InputError):
        place = traceback.extract_tb(error.__traceback__)[-1]
        said, kind = f"{type(error).__name__}: {Path(place.filename).name}, line {place.lineno}", "internal"
    return Result("error", error=said, error_kind=kind)
