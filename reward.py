"""The reward of one conversation, as MMSearch-R1 (arXiv 2506.20670) defines it, in plain Python.

    reward = (1 - w) · s + w · format          w = format_weight = 0.1

`format` is 1 if every turn keeps the protocol, else 0. `s` is 1 for a right answer, 1 - 0.1 for a right one that used a
search, 0 for a wrong one. So a conversation earns one of six values:

    well-formed     right 1.0    right after a search 0.91    wrong 0.1
    else            right 0.9    right after a search 0.81    wrong 0

A conversation is the list of what the model said, one string a turn, without what the tools returned. To train on
another reward, write another function that returns a `Score`.
"""

import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

IMAGE_SEARCH = "<search><img></search>"  # one tag: a part of it, such as "<img>" alone, is plain text
# The tags of each kind of turn, in the order in which the turn must hold them.
TURN_TAGS = {
    "answer": ("<reason>", "</reason>", "<answer>", "</answer>"),
    "image": ("<reason>", "</reason>", IMAGE_SEARCH),
    "text": ("<reason>", "</reason>", "<text_search>", "</text_search>"),
}
ALL_TAGS = set().union(*TURN_TAGS.values())
CONVERSATIONS = {("answer",), ("image", "answer"), ("text", "answer"), ("image", "text", "answer")}
STRIP_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Score:
    """What a conversation earned, and why. `answer` is None where the last turn holds no `<answer>…</answer>`."""

    reward: float
    correct: bool
    format_ok: bool
    searches: int
    answer: str | None


def normalize_answer(text: str) -> str:
    """Lower-case, drop ASCII punctuation, drop the words a/an/the, squeeze white space: "The  U.S.A." -> "usa"."""
    text = text.lower().translate(STRIP_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def extract_answer(turn: str) -> str | None:
    """The text of the last `<answer>…</answer>` in a turn (it may span lines), stripped; None if there is none."""
    found = re.findall(r"<answer>(.*?)</answer>", turn, re.DOTALL)
    return found[-1].strip() if found else None


def exact_match(prediction: str | None, answers: Iterable[str]) -> bool:
    """True if the prediction equals an accepted answer, both normalised. None matches nothing."""
    return prediction is not None and normalize_answer(prediction) in _normalize_all(answers)


def sub_match(prediction: str | None, answers: Iterable[str]) -> bool:
    """True if the prediction contains an accepted answer, both normalised. By characters: "york" contains "or"."""
    return prediction is not None and any(answer in normalize_answer(prediction) for answer in _normalize_all(answers))


def _normalize_all(answers: Iterable[str]) -> set[str]:
    if isinstance(answers, str):  # each letter would be an answer
        raise TypeError(f"answers must be a list of strings, not the string {answers!r}")
    return {normalize_answer(answer) for answer in answers} - {""}  # "The" or "…?" must not match an empty prediction


MATCHES = {"em": exact_match, "sub_em": sub_match}


def turn_kind(turn: str) -> str | None:
    """The kind (a key of `TURN_TAGS`) of a well-formed turn, else None. White space around it aside, such a turn begins
    and ends with a tag, holds each tag of its kind once and in order, and no tag of another kind."""
    turn = turn.strip()
    for kind, tags in TURN_TAGS.items():
        once_each = all(turn.count(tag) == (tag in tags) for tag in ALL_TAGS)
        if once_each and re.fullmatch(".*".join(map(re.escape, tags)), turn, re.DOTALL):
            return kind
    return None


def format_ok(responses: Sequence[str], any_order: bool = False) -> bool:
    """True if all turns are well-formed and make one of the accepted `CONVERSATIONS`, of three turns at most; with
    any_order, if they are any number of searches and then an answer."""
    kinds = tuple(turn_kind(turn) for turn in responses)
    if any_order:
        return kinds[-1:] == ("answer",) and set(kinds[:-1]) <= {"image", "text"}
    return kinds in CONVERSATIONS


def count_searches(responses: Sequence[str]) -> int:
    """How many turns ask for a search, well-formed or not. The last turn counts only if it is the only one."""
    asking = responses if len(responses) == 1 else responses[:-1]
    return sum(IMAGE_SEARCH in turn or ("<text_search>" in turn and "</text_search>" in turn) for turn in asking)


def ramped_penalty(penalty: float, step: int, ramp_steps: int) -> float:
    """The search penalty at a step, counted from 0: from -penalty, a bonus for searching, at step 0 in a straight line
    to +penalty at step ramp_steps and after. ramp_steps = 0: no ramp."""
    return penalty * (2 * min(step / ramp_steps, 1.0) - 1) if ramp_steps else penalty


def score(
    responses: Sequence[str],
    answers: Iterable[str],
    *,
    search_penalty: float = 0.1,
    format_weight: float = 0.1,
    match: str = "em",
    per_search_penalty: bool = False,
    any_order: bool = False,
) -> Score:
    """Score a conversation: what the model said, one string a turn (none at all earns 0), against the accepted answers.

    search_penalty: a right answer that searched is multiplied by 1 - search_penalty, or by that once for each search
    with per_search_penalty. match: "em" (equal) or "sub_em" (contained). any_order: see `format_ok`.
    Raises ValueError for another match, TypeError if either list is a bare string.
    """
    if match not in MATCHES:
        raise ValueError(f"match must be one of {sorted(MATCHES)}, not {match!r}")
    if isinstance(responses, str):  # each letter would be a turn
        raise TypeError(f"responses must be a list of strings, not the string {responses!r}")
    answer = extract_answer(responses[-1]) if responses else None
    correct = MATCHES[match](answer, answers)
    well_formed, searches = format_ok(responses, any_order), count_searches(responses)
    s = correct * (1 - search_penalty) ** (searches if per_search_penalty else min(searches, 1))
    return Score((1 - format_weight) * s + format_weight * well_formed, correct, well_formed, searches, answer)
