"""The tools that a model may call: one table.

Everything that depends on which tools there are is read off `TOOLS`: how a turn asks for a tool, how often it may be
called, what may come before it in a well-formed conversation, whether it costs the search penalty, the pictures it may
add, the prompt file that introduces its result (`after_NAME.txt`), and the columns of metrics, tables and labels. A new
tool is an entry here, the function that answers it, and a prompt file (docs/extending.md walks through one).

A turn of the model ends in one action: a call of a tool, or an answer. In the dialect `tags`, the paper's:

    <search><img></search>                          image_search: look for the question's first picture
    <search><img_2></search>                        ... or for another one of the conversation
    <text_search>query</text_search>                text_search: look for words
    <crop>img_1 100 0 500 500</crop>                crop: enlarge a part of a picture
    <visit>https://nauru.example its flag</visit>   visit: read a page that a search has found, for what it says of that
    <answer>the answer</answer>                     no call: the conversation is over

In the dialect `json`, Qwen's own, a turn ends in one or several calls, or in an answer:

    <tool_call>
    {"name": "crop", "arguments": {"picture": "img_1", "box": [100, 0, 500, 500]}}
    </tool_call>
"""

import json
import math
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from config import Config, need
from data import MAX_ASPECT, Call, Hit, Question, Result, decode_image, encode_image

ANSWER = "answer"
ANSWER_TAGS = ("<answer>", "</answer>")
CALL_TAGS = ("<tool_call>", "</tool_call>")  # of the dialect json

# What tools take: fields of `Call`, as JSON schemas.
FIELDS = {
    "picture": {
        "type": "string",
        "description": "a picture of this conversation: img_1, img_2, ... in order of appearance; without it, img_1",
    },
    "box": {
        "type": "array",
        "items": {"type": "number"},
        "description": "left, top, right, bottom in thousandths of the picture's width and height",
    },
    "query": {"type": "string", "description": "what to look for, in words"},
    "url": {"type": "string", "description": "the link of a result in this conversation"},
}


@dataclass(frozen=True)
class Tool:
    """A tool. Its name, the key in `TOOLS`, also names its prompt file, its columns and its options."""

    tags: tuple[str, ...]  # regular expressions of an opening and a closing tag around what it is asked, or of one tag
    answer: Callable[[Call, Question, object], Result]  # (call, question, search); runs on a thread, never raises
    limit: int  # calls in a conversation, unless --tool_limits says otherwise
    results: int  # results of a call shown to the model, at most, unless --tool_results says otherwise
    pictures: int  # pictures that each result may add to the conversation
    after: tuple[str | None, ...]  # tools it may follow in a well-formed conversation; None: it may come first
    takes: tuple[str, ...]  # names of FIELDS
    key: str  # names it in the keys of recorded results
    does: str  # for the model, in the dialect json
    optional: tuple[str, ...] = ("picture",)  # of what it takes; a picture is the question's first by default
    penalized: bool = True  # a right answer that called it pays the search penalty
    read: Callable[[str], dict] = lambda content: {"query": content}  # what is in the tags -> fields of Call


def ask_search(call: Call, question: Question, search) -> Result:
    """Answered by the search that the configuration names (`search.open_search`)."""
    return search.search(call, question)


def crop(call: Call, question: Question, search) -> Result:
    """The part of a picture inside call.box, at the size of a question's picture. What is outside of it is ignored."""
    image = decode_image(picture_of(call, question))
    left, top, right, bottom = (min(max(edge, 0.0), 1000.0) / 1000 for edge in call.box)
    pixels = (
        math.floor(left * image.width), math.floor(top * image.height),
        math.ceil(right * image.width), math.ceil(bottom * image.height),
    )  # fmt: skip
    width, height = pixels[2] - pixels[0], pixels[3] - pixels[1]
    if left >= right or top >= bottom or max(width, height) > MAX_ASPECT * min(width, height):
        return refused("the box is empty or too narrow: left must be below right, top below bottom, inside 0 to 1000")
    return Result("ok", (Hit("", image=encode_image(image.crop(pixels), "PNG"), full_size=True),))


def read_crop(content: str) -> dict:
    """Reads `img_2 100 0 500 500`; without a name it is the question's first picture."""
    name, box = re.fullmatch(r"(img_\d+)?(.*)", content, re.DOTALL).groups()
    return {"picture": name or "", "box": box.split()}


def read_visit(content: str) -> dict:
    """Reads `https://a.example/page what to find there`."""
    url, _, goal = content.strip().partition(" ")
    return {"url": url, "query": goal}


TOOLS = {
    "image_search": Tool(
        tags=(r"<search><img(?:_\d+)?></search>",), answer=ask_search, limit=1, results=5, pictures=1,
        after=(None, "crop"), takes=("picture",), key="image",
        does="Looks for a picture on the web; returns similar ones with the titles of their pages.",
        read=lambda tag: {"picture": "".join(re.findall(r"img_\d+", tag))},
    ),
    "text_search": Tool(
        tags=("<text_search>", "</text_search>"), answer=ask_search, limit=2, results=5, pictures=0,
        after=(None, "image_search", "crop"), takes=("query",), key="text",
        does="Looks for words on the web; returns summaries of pages.",
    ),
    "crop": Tool(
        tags=("<crop>", "</crop>"), answer=crop, limit=0, results=1, pictures=1, after=(None, "image_search"),
        takes=("picture", "box"), key="crop", read=read_crop,
        does="Cuts a part out of a picture and returns it enlarged, as the next picture of the conversation.",
    ),
    "visit": Tool(
        tags=("<visit>", "</visit>"), answer=ask_search, limit=0, results=1, pictures=0,
        after=("image_search", "text_search"), takes=("url", "query"), optional=("query",), key="page",
        penalized=False, read=read_visit,
        does="Reads a page that a search has found; returns what it says about the query, or else its beginning.",
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ what a turn says
def find_actions(text: str, dialect: str = "tags") -> list[Call | str]:
    """The complete actions in a turn, calls and answers (their text), in the order in which they end. An action runs
    from the last opening tag to the first closing tag after it, over lines too."""
    forms, found = {ANSWER: ANSWER_TAGS}, []
    forms |= {"": CALL_TAGS} if dialect == "json" else {name: tool.tags for name, tool in TOOLS.items()}
    for name, (opening, *closing) in forms.items():
        pattern = f"{opening}((?:(?!{opening}).)*?){closing[0]}" if closing else f"({opening})"
        for match in re.finditer(pattern, text, re.DOTALL):
            found.append((match.end(), name, match[1]))
    actions = []
    for _, name, content in sorted(found):
        if name in TOOLS:
            content = make_call(name, TOOLS[name].read(content.strip()))
        elif name != ANSWER:
            content = _json_call(content)
        actions.append(content)
    return actions


def _json_call(content):
    try:
        asked = json.loads(content)
    except (ValueError, RecursionError) as error:
        return Call("", problem=f"the call is not JSON: {error}"[:200])
    fields = asked if isinstance(asked, dict) else {}
    name, arguments = fields.get("name"), fields.get("arguments", {})
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return Call("", problem='a call is {"name": a tool, "arguments": {...}}')
    return make_call(name[:100], arguments)


def make_call(name: str, arguments: dict) -> Call:
    """A call from what a turn gives for the fields that the tool takes. What cannot be understood is its `problem`."""
    fields, takes = {}, TOOLS[name].takes if name in TOOLS else arguments
    for field, value in arguments.items():
        try:
            fields[field] = tuple(map(float, value)) if field == "box" else value
            sound = len(value) == 4 and all(map(math.isfinite, fields[field])) if field == "box" else type(value) is str
        except (TypeError, ValueError, OverflowError):
            sound = False
        if field not in takes:
            return Call(name, problem=f"{title(name)} takes {', '.join(takes) or 'nothing'}, not {field[:50]}")
        if not sound:
            return Call(name, problem=f"{field} is not {'four numbers' if field == 'box' else 'text'}")
    return Call(name, **fields) if name in TOOLS else Call(name)


def parse_calls(text: str, dialect: str = "tags") -> list[Call]:
    """The calls that a turn of the model ends in: one at most in the dialect `tags`, all that it makes in `json`. None
    if its last complete action is an answer, or if there is none.

    >>> parse_calls("<reason>Whose flag?</reason> <text_search> flag of Nauru </text_search>")
    [Call(tool='text_search', query='flag of Nauru', picture='', box=None, url='', problem='')]
    """
    actions = find_actions(text, dialect)
    if not actions or isinstance(actions[-1], str):
        return []
    return actions[-1:] if dialect == "tags" else [action for action in actions if isinstance(action, Call)]


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


def offered(cfg: Config) -> list[str]:
    """The tools that a conversation may call."""
    return [name for name, limit in limits(cfg).items() if limit]


def declarations(cfg: Config) -> list[dict]:
    """The offered tools as a chat template takes them (`tools=`), in the dialect json."""
    declared = []
    for name in offered(cfg):
        takes = TOOLS[name].takes
        properties = {"type": "object", "properties": {field: FIELDS[field] for field in takes}}
        properties["required"] = [field for field in takes if field not in TOOLS[name].optional]
        function = {"name": name, "description": TOOLS[name].does, "parameters": properties}
        declared.append({"type": "function", "function": function})
    return declared


def allowed_calls(cfg: Config) -> int:
    """How many calls a conversation can make: by the tools' limits, and a turn is left for the answer."""
    turns, calls = cfg.max_turns - 1, sum(limits(cfg).values())
    return min(calls, calls * turns if cfg.dialect == "json" else turns)


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
    """Why nobody can answer this call, or "": it makes no sense, its tool is unknown, or what that needs is missing."""
    if call.problem or call.tool not in TOOLS:
        return call.problem or f"there is no tool {call.tool!r}"
    if "picture" in TOOLS[call.tool].takes and picture_of(call, question) is None:
        return "the question has no image"
    for field in TOOLS[call.tool].takes:
        given = str(getattr(call, field) or "").strip()
        if not given and field not in TOOLS[call.tool].optional:
            return f"the {field} is empty"
    return ""


def refused(problem: str, kind: str = "bad_call") -> Result:
    """The result of a call that the model made wrongly, which is told why."""
    return Result("error", error=problem, error_kind=kind)


def run_tool(call: Call, question: Question, search) -> Result:
    """The answer to a call; one that nobody can answer is an error that says why."""
    if problem := problem_with(call, question):
        return refused(problem, "malformed" if call.problem else "bad_call")
    return TOOLS[call.tool].answer(call, question, search)


def spawn(function: Callable, *arguments) -> Future:
    """The future of function(*arguments), on a daemon thread of its own: one that hangs takes no place in a pool, and
    does not keep the process from ending."""
    future = Future()

    def work():
        try:
            future.set_result(function(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future
