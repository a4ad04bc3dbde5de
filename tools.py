"""The tools that a model may call: one table.

Everything that depends on which tools there are is read off `TOOLS`: how a turn asks for a tool, how often it may be
called, what may come before it in a well-formed conversation, whether it costs the search penalty, the pictures it may
add, the prompt file that introduces its result (`after_NAME.txt`), and the columns of metrics, tables and labels. A new
tool is an entry here, the function that answers it, and a prompt file (docs/extending.md walks through one).

A turn of the model ends in one action: a call of a tool, or an answer.

    <search><img></search>                 image_search: look for the question's first picture
    <text_search>query</text_search>       text_search: look for words
    <answer>the answer</answer>            no call: the conversation is over
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

from config import Config, need
from data import Call, Question, Result

ANSWER = "answer"
ANSWER_TAGS = ("<answer>", "</answer>")


@dataclass(frozen=True)
class Tool:
    """A tool. Its name, the key in `TOOLS`, also names its prompt file, its columns and its options."""

    tags: tuple[str, ...]  # an opening and a closing tag around what it is asked, or one whole tag
    answer: Callable[[Call, Question, object], Result]  # (call, question, search); runs on a thread, never raises
    limit: int  # calls in a conversation, unless --tool_limits says otherwise
    results: int  # results of a call shown to the model, at most, unless --tool_results says otherwise
    pictures: int  # pictures that each result may add to the conversation
    after: tuple[str | None, ...]  # tools it may follow in a well-formed conversation; None: it may come first
    needs: str  # the field of `Call` without which it cannot be answered: "picture", "query" or "url"
    key: str  # names it in the keys of recorded results
    penalized: bool = True  # a right answer that called it pays the search penalty
    read: Callable[[str], dict] = lambda content: {"query": content.strip()}  # what is between the tags -> Call fields


def ask_search(call: Call, question: Question, search) -> Result:
    """Answered by the search that the configuration names (`search.open_search`)."""
    return search.search(call, question)


TOOLS = {
    "image_search": Tool(
        tags=("<search><img></search>",), answer=ask_search, limit=1, results=5, pictures=1, after=(None,),
        needs="picture", key="image",
    ),
    "text_search": Tool(
        tags=("<text_search>", "</text_search>"), answer=ask_search, limit=2, results=5, pictures=0,
        after=(None, "image_search"), needs="query", key="text",
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ what a turn says


def find_actions(text: str) -> list[tuple[str, str]]:
    """(tool or "answer", what is between its tags) of each complete action in a turn, in the order in which they end.
    An action runs from the last opening tag to the first closing tag after it, over lines too.
    """
    found = []
    for name, tags in ({name: tool.tags for name, tool in TOOLS.items()} | {ANSWER: ANSWER_TAGS}).items():
        for match in re.finditer(_pattern(tags), text, re.DOTALL):
            found.append((match.end(), name, match[1]))
    return [(name, content) for _, name, content in sorted(found)]


def _pattern(tags):
    opening, *closing = map(re.escape, tags)
    return f"{opening}((?:(?!{opening}).)*?){closing[0]}" if closing else f"{opening}()"


def parse_call(text: str) -> Call | None:
    """The call that a turn of the model ends in; None if its last complete action is an answer, or if there is none.

    >>> parse_call("<reason>Whose flag?</reason> <text_search> flag of Nauru </text_search>")
    Call(tool='text_search', query='flag of Nauru', picture='', box=None, url='')
    """
    name, content = next(reversed(find_actions(text)), (ANSWER, ""))
    return None if name == ANSWER else Call(name, **TOOLS[name].read(content))


def has_answer(text: str) -> bool:
    """True if the last complete action of a turn is an answer."""
    return [name for name, _ in find_actions(text)][-1:] == [ANSWER]


# ---------------------------------------------------------------------------------------------- limits and calls


def limits(cfg: Config) -> dict[str, int]:
    """Tool -> how often it may be called in a conversation. Raises InputError."""
    return _numbers("limit", "tool_limits", cfg)


def results(cfg: Config) -> dict[str, int]:
    """Tool -> how many results of a call are shown to the model, at most. Raises InputError."""
    return _numbers("results", "tool_results", cfg)


def _numbers(field, option, cfg):
    """Tool -> its own number, in this field, or the one that the option names."""
    numbers = {name: getattr(tool, field) for name, tool in TOOLS.items()}
    for pair in getattr(cfg, option):
        name, _, number = pair.partition("=")
        need(name in TOOLS, f"{option}: {pair!r} is not TOOL=NUMBER with a tool of {', '.join(TOOLS)}")
        numbers[name] = int(number)
    return numbers


def allowed_calls(cfg: Config) -> int:
    """How many calls a conversation can make: by the tools' limits, and a turn is left for the answer."""
    return min(sum(limits(cfg).values()), cfg.max_turns - 1)


def most_pictures(cfg: Config) -> int:
    """How many pictures tools can add to a conversation."""
    shown = results(cfg)
    return sum(limit * shown[name] * TOOLS[name].pictures for name, limit in limits(cfg).items())


def title(name: str) -> str:
    """A tool's name in a message."""
    return name.replace("_", " ")


def picture_of(call: Call, question: Question) -> bytes | None:
    """The encoded picture that a call is about: the one it names, else the question's first; None if there is none."""
    return next(iter(question.images), None) if call.image is None else call.image


def problem_with(call: Call, question: Question) -> str:
    """Why nobody can answer this call, or "": its tool is unknown, or what the tool needs is missing."""
    if call.tool not in TOOLS:
        return f"there is no tool {call.tool!r}"
    if TOOLS[call.tool].needs == "picture" and picture_of(call, question) is None:
        return "the question has no image"
    if TOOLS[call.tool].needs == "query" and not call.query.strip():
        return "the query is empty"
    if TOOLS[call.tool].needs == "url" and not call.url.strip():
        return "the address of the page is missing"
    return ""


def run_tool(call: Call, question: Question, search) -> Result:
    """The answer to a call; one that nobody can answer is an error that says why."""
    if problem := problem_with(call, question):
        return Result("error", error=problem, error_kind="bad_call")
    return TOOLS[call.tool].answer(call, question, search)
