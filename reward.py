"""The reward of one conversation, as MMSearch-R1 (arXiv 2506.20670) defines it, in plain Python.

    reward = (1 - w) · s + w · format          w = format_weight = 0.1

`format` is 1 if every turn keeps the protocol, else 0. `s` is 1 for a right answer, 1 - 0.1 for a right one that used a
search, 0 for a wrong one. So a conversation earns one of six values:

    well-formed     right 1.0    right after a search 0.91    wrong 0.1
    else            right 0.9    right after a search 0.81    wrong 0

A conversation is the list of what the model said, one string a turn, without what the tools returned. Which tools there
are, and what they look like in a turn, is read off `tools.TOOLS`. To train on another reward, write another function
that returns a `Score` (`score_episode` is the one place that calls it).
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise

from chat import Episode
from config import Config
from data import Stop, normalize_answer
from tools import ANSWER, ANSWER_TAGS, CALL_TAGS, TOOLS, find_actions, parse_calls

REASON_TAGS = ("<reason>", "</reason>")


@dataclass(frozen=True)
class Score:
    """What a conversation earned, and why. `answer` is None where the last turn holds no `<answer>…</answer>`, `reward`
    and `correct` are where a judge was to decide and its verdict is missing."""

    reward: float | None
    correct: bool | None
    format_ok: bool
    searches: int
    answer: str | None


# ------------------------------------------------------------------------------------------------------- matching
def extract_answer(turn: str) -> str | None:
    """The text of the last `<answer>…</answer>` in a turn (it may span lines), stripped; None if there is none."""
    answers = [action for action in find_actions(turn) if isinstance(action, str)]
    return answers[-1].strip() if answers else None


def exact_match(prediction: str | None, answers: Sequence[str]) -> bool:
    """True if the prediction equals an accepted answer, both normalised as the paper does. None matches nothing."""
    accepted = {normalize_answer(answer) for answer in answers} - {""}  # "The" must not match nothing
    return prediction is not None and normalize_answer(prediction) in accepted


def unicode_match(prediction: str | None, answers: Sequence[str], anywhere: bool = False) -> bool:
    """True if the prediction equals an accepted answer (anywhere: or has its words somewhere), both as
    `normalize_unicode` writes them, or is a number in an accepted range."""
    if prediction is None:
        return False
    said, accepted = normalize_unicode(prediction), {normalize_unicode(answer) for answer in answers} - {""}
    contained = anywhere and any(f" {answer} " in f" {said} " for answer in accepted)
    return said in accepted or contained or in_range(prediction, answers)


# Scripts without spaces, in which each character is a word: Thai, Lao, Burmese, Khmer, kana, Chinese characters.
UNSPACED = "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
RAISED = re.compile(r"(?<=\d)(?=[\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u209f\u2150-\u218b])")  # 5² is not 52; m² is m2
THOUSANDS = re.compile(r"(?<=\d)(?<!\b0),(?=(?:\d\d,)*\d{3}(?!\d))")  # also of India: 1,00,000; 0,500 is not 0500
NEGATIVE = re.compile(r"\b[a-z]{1,2}-(?!\S*\w)")  # AB- and Cl- are not AB and Cl; a word's hyphen is nothing
NOTHING = "'\"`\u02b9\u02bb\u02bc\u02bd\u2032\u2033."  # with quotes and invisible characters: O’Brien is OBrien
WRITTEN_AS = str.maketrans("\u00b4\u066b\u066c", "'.,")  # an acute accent for a quote; Arabic points


def normalize_unicode(text: str) -> str:
    """A text without what is only a way of writing: forms of a character (NFKC), case, punctuation, white space, and
    articles but for the last word (vitamin A). Numbers stay numbers: 3.5, -5, and 1000 for 1,000. C++ and C# are not C,
    AB- is not AB, B♭ not B. A text of nothing but punctuation stays as it is."""
    text = RAISED.sub(" ", text.translate(WRITTEN_AS))
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    text = "".join("-" if unicodedata.category(c) == "Pd" or c == "\u2212" else c for c in THOUSANDS.sub("", text))
    written, negative = "", {found.end() - 1 for found in NEGATIVE.finditer(text)}
    for place, (before, char, after) in enumerate(zip(f" {text}", text, f"{text[1:]} ", strict=False)):
        kind = unicodedata.category(char)
        point = char == "." and after.isdecimal() and not before.isalpha()
        minus = char == "-" and (after.isdecimal() or after == ".") and not before.isalnum()
        minus = minus or place in negative
        if point or minus or (char in "+#♭♮" and (before.isalnum() or before == "+")):  # C++ and C#
            written += char
        elif kind == "Sm" and char not in "+~|\u2044":  # <5 and √2 are not 5 and 2
            written += f" {char} "
        elif char in NOTHING or kind in ("Pi", "Pf", "Cf"):
            written += " " if before.isdecimal() and after.isdecimal() else ""
        elif kind[0] in "LMN":
            char = str(unicodedata.decimal(char, char))
            written += f" {char} " if re.match(UNSPACED, char) else char
        else:
            written += " "
    words = written.split()
    words = [word for word in words[:-1] if word not in ("a", "an", "the")] + words[-1:]
    return " ".join(words) or " ".join(text.split())


NUMBER = r"(?:(?<!\d)[-+])?\.?\d+(?:,\d{3})*\.?\d*(?:[eE][-+]?\d+)?"
RANGE = re.compile(rf"between ({NUMBER}) and ({NUMBER})")


def in_range(prediction: str, answers: Sequence[str]) -> bool:
    """True if an answer is "between X and Y", and the prediction's first number lies there, or its first two are a
    range that lies there or shares at least half with it (intersection over union). InfoSeek's own metric counts so
    (github edchengg/infoseek_eval), but for a prediction without numbers, which is 0 there and wrong here."""
    text = re.sub("[\u2010-\u2015\u2212]", "-", unicodedata.normalize("NFKC", prediction))
    numbers = [float(number.replace(",", "")) for number in re.findall(NUMBER, text)[:2]]
    if not numbers:
        return False
    first, last = numbers[0], max(numbers[0], numbers[-1])
    for found in filter(None, map(RANGE.fullmatch, answers)):
        low, high = (float(number.replace(",", "")) for number in found.groups())
        shared = max(0.0, min(last, high) - max(first, low))
        union = (last - first + 1e-12) + (high - low + 1e-12) - shared
        if (low <= first and last <= high) or shared / union >= 0.5 - 1e-12:
            return True
    return False


MATCHES = {"em": exact_match, "em_unicode": unicode_match, "sub_em": partial(unicode_match, anywhere=True)}


# --------------------------------------------------------------------------------------------------------- format
def turn_kinds(turn: str, dialect: str = "tags") -> list[str]:
    """What a well-formed turn does: ["answer"], or the tools it calls, in the dialect json several; else []. White
    space around it aside, such a turn begins with its reasoning, ends in what it does, and holds no other tag. A whole
    tag such as "<search><img></search>" is one: a part of it is plain text. In json, calls have to be understood."""
    turn, calls = turn.strip(), parse_calls(turn, dialect)
    tags, calling = ANSWER_TAGS, [tool.tags for tool in TOOLS.values()]
    if dialect == "json":
        calling = [CALL_TAGS]
        if any(call.problem or call.tool not in TOOLS for call in calls):
            return []
    if calls:
        tags = CALL_TAGS if dialect == "json" else TOOLS[calls[0].tool].tags
    wanted = dict.fromkeys(REASON_TAGS, 1) | dict.fromkeys(tags, max(1, len(calls)))
    all_tags = {*REASON_TAGS, *ANSWER_TAGS}.union(*calling)
    counted = all(len(re.findall(tag, turn)) == wanted.get(tag, 0) for tag in all_tags)
    ordered = re.fullmatch(f"<reason>((?!{tags[0]}).)*</reason>.*{'.*'.join(tags)}", turn, re.DOTALL)
    if not counted or not ordered:
        return []
    return [call.tool for call in calls] or [ANSWER]


def format_ok(responses: Sequence[str], any_order: bool = False, dialect: str = "tags") -> bool:
    """True if all turns are well-formed, the last is an answer and the others call tools: each tool once at most, and
    only after those that the table allows (`Tool.after`); with any_order, in any number and order."""
    kinds = [turn_kinds(turn, dialect) for turn in responses]
    called = list(chain.from_iterable(kinds[:-1]))
    if not all(kinds) or kinds[-1:] != [[ANSWER]] or not TOOLS.keys() >= {*called}:
        return False
    in_turn = all(previous in TOOLS[kind].after for previous, kind in pairwise([None, *called]))
    return any_order or (in_turn and len(set(called)) == len(called))


def count_searches(responses: Sequence[str], dialect: str = "tags") -> int:
    """How many turns call a tool that costs the penalty, well-formed or not: they hold all of its tags (json: how many
    calls of such tools there are). The last turn counts only if it is the only one."""
    asking = responses if len(responses) == 1 else responses[:-1]
    penalized = {name: tool.tags for name, tool in TOOLS.items() if tool.penalized}
    if dialect == "json":
        return sum(call.tool in penalized for turn in asking for call in parse_calls(turn, dialect))
    return sum(any(all(re.search(tag, turn) for tag in tags) for tags in penalized.values()) for turn in asking)


# ---------------------------------------------------------------------------------------------------------- score
def ramped_penalty(penalty: float, step: int, ramp_steps: int) -> float:
    """The search penalty at a step, counted from 0: from -penalty, a bonus for searching, at step 0 rising linearly
    to +penalty at step ramp_steps and after. ramp_steps = 0: no ramp."""
    return penalty * (2 * min(step / ramp_steps, 1.0) - 1) if ramp_steps else penalty


def economy(searches: int, penalty: float, per_search: bool) -> float:
    """What a right answer's score is multiplied by: 1 - penalty if it searched, or that once for each search."""
    return (1 - penalty) ** (searches if per_search else min(searches, 1))


def score(
    responses: Sequence[str],
    answers: Sequence[str],
    *,
    search_penalty: float = 0.1,
    format_weight: float = 0.1,
    match: str = "em",
    per_search_penalty: bool = False,
    any_order: bool = False,
    dialect: str = "tags",
    correct: bool | None = None,
) -> Score:
    """Score a conversation: what the model said, one string a turn (none at all earns 0), against the accepted answers.

    search_penalty: a right answer that searched is multiplied by 1 - search_penalty, or by that once for each search
    with per_search_penalty. match: a key of MATCHES. any_order: see `format_ok`. dialect: of the calls. correct: a
    judge's verdict, instead of the match.
    """
    answer = extract_answer(responses[-1]) if responses else None
    correct = MATCHES[match](answer, answers) if correct is None else correct
    well_formed, searches = format_ok(responses, any_order, dialect), count_searches(responses, dialect)
    s = correct * economy(searches, search_penalty, per_search_penalty)
    return Score((1 - format_weight) * s + format_weight * well_formed, correct, well_formed, searches, answer)


def score_episode(episode: Episode, cfg: Config, penalty: float | None = None, correct: bool | None = None) -> Score:
    """The reward of a conversation (module `reward`) under the configuration; penalty: instead of search_penalty;
    correct: instead of the match."""
    how = {n: getattr(cfg, n) for n in ("format_weight", "match", "per_search_penalty", "any_order", "dialect")}
    penalty = cfg.search_penalty if penalty is None else penalty
    return score(episode.responses, episode.question.answers, search_penalty=penalty, correct=correct, **how)


def record(episode: Episode, score: Score) -> dict:
    """A conversation and what it earned, as a JSON line. reward is None for an aborted one: it says nothing."""
    earned = dict(vars(score), reward=None if episode.stop == Stop.ABORTED else score.reward)
    return episode.record() | earned
