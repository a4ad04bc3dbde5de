"""What every search does with a call before it answers: refuse what nobody can answer, and say so in a typed result.

A search looks the method that answers a call up by the tool's name. A call of a tool that it does not answer, or one
that lacks what its tool needs (a picture, words), gives a result with status "error" and error_kind "bad_call".
"""

import sqlite3
from collections.abc import Callable

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


def method_for(call: Call, question: Question, methods: dict[str, Callable]) -> Callable:
    """The one of `methods` (by the tool's name) that answers a call. Raises Failure (bad_call)."""
    problem = problem_with(call, question)
    if not problem and call.tool not in methods:
        problem = f"this search has no answer to {title(call.tool)}"
    if problem:
        raise Failure("bad_call", problem)
    return methods[call.tool]


def query_of(call: Call) -> str:
    """The words that a call asks for, made harmless. Raises Failure (bad_call) if none are left."""
    query = clean(call.query, MAX_QUERY)
    if not query:
        raise Failure("bad_call", "the query is empty")
    return query


def failed(error: Failure | InputError | sqlite3.DatabaseError) -> Result:
    """The result of a call that failed; an InputError is about its picture, one of SQLite about the file searched."""
    if isinstance(error, Failure):
        return Result("error", error=str(error), error_kind=error.kind)
    kind = "bad_call" if isinstance(error, InputError) else "index"
    return Result("error", error=f"{type(error).__name__}: {error}", error_kind=kind)
