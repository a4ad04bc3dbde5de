"""Search, as the model asks for it and as it is answered.

The protocol: a turn of the model ends in one action,

    <search><img></search>                 search with the question's first image
    <text_search>query</text_search>       search with words
    <answer>the answer</answer>            no search: the conversation is over

`parse_call` reads the action; an object with `search(call, question) -> Result` answers it. To search somewhere else,
write another class with that method: it must be safe to call from many threads, and return the failures one has to
expect (no network, a broken picture) as `Result("error", error=...)`: an error must never look like an empty result.
"""

import re
import sqlite3

from config import InputError
from data import Call, Hit, Question, Result
from searchdb import SearchDB

# An action runs from an opening tag, the last if there are several, to the first closing tag after it, over lines too.
ACTIONS = {
    "image": re.compile(r"<search><img>()</search>"),
    "text": re.compile(r"<text_search>((?:(?!<text_search>).)*?)</text_search>", re.DOTALL),
    "answer": re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL),
}


def parse_call(text: str) -> Call | None:
    """The search that a turn of the model asks for; None if its last complete action is an answer, or if there is none.

    >>> parse_call("<reason>Whose flag?</reason> <text_search> flag of Nauru </text_search>")
    Call(kind='text', query='flag of Nauru')
    """
    kind, content = _last_action(text)
    return Call(kind, content.strip()) if kind in ("image", "text") else None


def has_answer(text: str) -> bool:
    """True if the last complete action of a turn is an answer."""
    return _last_action(text)[0] == "answer"


def _last_action(text: str) -> tuple[str | None, str]:
    """(kind, what is between its tags) of the complete action that ends last; (None, "") if there is none."""
    found = [(match.end(), kind, match[1]) for kind, action in ACTIONS.items() for match in action.finditer(text)]
    return max(found)[1:] if found else (None, "")


class OfflineSearch:
    """Searches in a local index. `search` may be called from any number of threads."""

    def __init__(self, db: SearchDB, *, image_results: int = 5, text_results: int = 5):
        """image_results, text_results: hits of a search, at most."""
        self.db = db
        self.image_results = image_results
        self.text_results = text_results

    def search(self, call: Call, question: Question) -> Result:
        """The answer to a call. What one has to expect to fail (the file, the picture) gives status "error"."""
        try:
            hits = self._hits(call, question)
        except sqlite3.ProgrammingError:  # ours, not the file's
            raise
        except (InputError, sqlite3.DatabaseError) as error:
            return Result("error", error=f"{type(error).__name__}: {error}")
        return Result("ok", hits=tuple(hits)) if hits else Result("no_results")

    def _hits(self, call: Call, question: Question) -> list[Hit]:
        if call.kind == "image":
            if not question.images:
                raise InputError("the question has no image")
            return self.db.image(question.images[0], self.image_results)
        if call.kind == "text":
            if not call.query.strip():
                raise InputError("the query is empty")
            return self.db.text(call.query, self.text_results)
        raise ValueError(f"no search of kind {call.kind!r}")
