"""Recorded conversations as episodes to imitate, for `train.py --loss sft`."""

from collections import Counter
from dataclasses import dataclass, fields, replace

import torch.distributed as dist
from tqdm import tqdm

from analysis.results import questions_about, read_results
from chat import Chat, Episode
from config import Config, Options, need, option
from data import Call, Hit, Question, Result, Stop, picture_key
from engines import Reply
from policy import say
from reward import score_episode
from tools import limits, parse_calls, run_tool


@dataclass(frozen=True)
class ImitationOptions(Options):
    """The conversations that --loss sft imitates."""

    sft_min_reward: float = option(0.5, "leave out those that earn less", "from 0 to 1")
    sft_questions: tuple[str, ...] = option((), "files of their questions (none: those that they name)")


def load_conversations(
    cfg: Config, options: ImitationOptions, chat: Chat, search, toy_files: tuple[str, ...]
) -> list[Episode]:
    """The conversations in cfg.train_files that earn sft_min_reward or more, as episodes to imitate.

    A record names its question; the questions, with their pictures, are those in sft_questions, else in the files that
    the header of the results names, else in toy_files. Pictures that a tool returned come from `search`. Raises
    InputError if a record's question is missing, or is another one, or if nothing is left.
    """
    episodes, left_out = [], Counter()
    for path in cfg.train_files:
        header, records = read_results(path)
        made_with = header.get("config", {})
        mode = made_with.get("mode", "agent")
        need(mode == "agent", f"{path}: conversations of mode {mode}: only the agent's can be imitated")
        files = tuple(options.sft_questions or made_with.get("files") or toy_files)
        questions = questions_about(records, files)
        for r in tqdm(records, f"reading {path}", leave=False, disable=dist.get_rank() != 0):
            question = questions.get(r["question_id"])
            where = f"{path}: question {r['question_id']} is not in {', '.join(files)}"
            need(question, f"{where}, or has another picture: give the files of the questions as --sft_questions")
            try:
                episode = imitated(r, question, chat, search)
                least = options.sft_min_reward
                need(score_episode(episode, cfg).reward >= least, f"earned less than {least}")
                episodes.append(episode)
            except ValueError as error:
                left_out[str(error)] += 1
    why = "; ".join(f"{n} {reason}" for reason, n in sorted(left_out.items()))
    say(f"conversations left out: {why}" if why else "")
    need(episodes, f"no conversation to imitate in {', '.join(cfg.train_files)}" + (f" ({why})" if why else ""))
    return episodes


def imitated(r: dict, question: Question, chat: Chat, search) -> Episode:
    """The conversation of a record (`Episode.record`) as one to imitate: what the model said is tokenised from its
    text, and is all that is `sampled`.

    Records hold no pictures: calls that returned pictures are made again, and must return what they returned then;
    other results are the recorded ones. Raises InputError saying why a conversation cannot be imitated.
    """
    said = [turn["text"] for turn in r["turns"] if turn["role"] == "model"]
    dialect, recorded = chat.cfg.dialect, iter(r["calls"])
    calls = [parse_calls(text, dialect) for text in said]  # more than one of a turn only in the dialect json
    called = [call.tool for asked in calls for call in asked]
    sound = r["stop"] == Stop.ANSWERED.value and called == [call["tool"] for call in r["calls"]] and all(calls[:-1])
    need(sound, "ended without an answer, or speaks another dialect")
    allowed = all(called.count(tool) <= most for tool, most in limits(chat.cfg).items())
    need(allowed, "makes calls that tool_limits does not allow")
    episode = Episode.start(question, chat, r["sample"])
    for text, asked in zip(said, calls, strict=True):
        ids = [*chat.encode(text), chat.im_end]
        need(len(ids) <= episode.room(), "longer than max_tokens")
        episode.add_reply(Reply("", ids, [0.0] * len(ids), "stop", 0))
        for number, (_, made) in enumerate(zip(asked, recorded, strict=False), 1):
            call, result = _recorded_call(made, episode, search)
            need(episode.add_result(call, result, more=number < len(asked)), "longer than max_tokens")
    episode.stop = Stop.ANSWERED
    return episode


def _recorded_call(recorded, episode, search):
    """(call, result) as they were recorded, the pictures of the result found again."""
    name, box = recorded.get("picture", ""), recorded.get("box")
    picture = episode.picture(name)
    image = picture.data if picture and picture.data not in episode.question.images[:1] else None
    words = dict(query=recorded["query"], url=recorded.get("url", ""))
    call = Call(recorded["tool"], picture=name, box=tuple(box) if box else None, image=image, **words)
    known = [{f.name: hit[f.name] for f in fields(Hit) if f.name in hit} for hit in recorded["hits"]]
    hits = tuple(Hit(**hit) for hit in known)  # `image` is the key of the picture
    if not any(hit.image for hit in hits):
        return call, Result(recorded["status"], hits, recorded["error"], recorded["error_kind"])
    result = run_tool(call, episode.question, search)
    now = tuple(replace(hit, image=hit.image and picture_key(hit.image)) for hit in result.hits)
    need(now == hits, "its searches with a picture find something else now")
    return call, result
