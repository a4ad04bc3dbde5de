"""Judge a model, or ask it one question, with the same rollout that trains it.

    python eval.py --model runs/toy/final                                       # the toy world's validation questions
    python eval.py --model DIR --files a.parquet b.parquet                      # a table by data_source
    torchrun --nproc_per_node 8 eval.py --preset qwen2.5-vl-7b --search_index web.sqlite --model DIR --files a.parquet
    python eval.py --model DIR --image photo.jpg --question "what is it called?"

Greedy unless --eval_temperature says otherwise. Every conversation is written to --out as a line of JSON.
"""

import dataclasses
import json
import math
import os
import sys
from collections import Counter, defaultdict
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

import reward
import tools
import toy
from config import Config, InputError, parse, run_main
from data import Codec, Episode, Question, Stop, Usage, decode_image, drop_overlong, load_questions
from policy import init_distributed, is_deterministic, read_model
from rollout import TorchEngine, run


def score_episode(episode: Episode, cfg: Config, penalty: float | None = None) -> reward.Score:
    """The reward of a conversation (module `reward`) under the configuration; penalty: instead of search_penalty."""
    return reward.score(
        episode.responses,
        list(episode.question.answers),
        search_penalty=cfg.search_penalty if penalty is None else penalty,
        format_weight=cfg.format_weight,
        match=cfg.match,
        per_search_penalty=cfg.per_search_penalty,
        any_order=cfg.any_order,
    )


def record(episode: Episode, score: reward.Score) -> dict:
    """A conversation and what it earned, as a JSON line. reward is None for an aborted one: it says nothing."""
    aborted = episode.stop == Stop.ABORTED
    return {
        **episode.record(),
        "reward": None if aborted else score.reward,
        "correct": score.correct,
        "format_ok": score.format_ok,
        "searches": score.searches,
        "answer": score.answer,
    }


def evaluate(
    questions: list[Question], engine, search, codec: Codec, cfg: Config, *, temperature: float, step: int = 0,
    progress: str = "", ordered: bool = True, guard=lambda hold: hold(),
) -> list[dict]:  # fmt: skip
    """One conversation about each question, the questions spread over the ranks; all records, on every rank, in order.

    guard: called with the rollout as a function, so that a caller can interrupt it before ranks have to meet again."""
    cfg = dataclasses.replace(cfg, rollout_deadline=0.0)  # an evaluation is about all questions, the slow ones too
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = questions[rank::world]
    with tqdm(total=len(mine), desc=progress, disable=not progress or rank > 0, leave=False) as bar:
        hold = lambda: run(  # noqa: E731
            mine, engine, search, codec, cfg, step=step, temperature=temperature, ordered=ordered,
            progress=lambda _: bar.update(),
        )  # fmt: skip
        episodes = guard(hold)
    parts = [None] * world
    dist.all_gather_object(parts, [record(e, score_episode(e, cfg)) for e in episodes])
    return [parts[i % world][i // world] for i in range(len(questions))]


def summarize(records: list[dict], cfg: Config) -> dict[str, dict]:
    """Figures by data_source, and over all under "all". Aborted conversations are counted and left out of the
    shares."""
    by_source = defaultdict(list)
    for r in records:
        by_source[r["data_source"]].append(r)
    parts = {source: by_source[source] for source in sorted(by_source)}
    return {name: _figures(part, cfg) for name, part in {**parts, "all": records}.items()}


def _figures(records, cfg):
    done = [r for r in records if r["stop"] != Stop.ABORTED.value]
    n = max(len(done), 1)
    kinds = [Counter(call["kind"] for call in r["calls"]) for r in done]
    allowed = min(cfg.max_image_searches + cfg.max_text_searches, cfg.max_turns - 1)
    right = sum(r["correct"] for r in done)
    low, high = wilson(right, len(done))
    usage = [call.get("usage", {}) for r in records for call in r["calls"]]
    used = {f.name: sum(u.get(f.name, 0) for u in usage) for f in dataclasses.fields(Usage)}
    return {
        "n": len(done),
        "accuracy": right / n,
        "accuracy_low": low,
        "accuracy_high": high,
        "reward": sum(r["reward"] for r in done) / n,
        "search_ratio": sum(k.total() for k in kinds) / (n * max(allowed, 1)),
        "image": sum(k["image"] > 0 for k in kinds) / n,
        "text": sum(k["text"] > 0 for k in kinds) / n,
        "both": sum(len(k) == 2 for k in kinds) / n,
        "format": sum(r["format_ok"] for r in done) / n,
        "turns": sum(sum(t["role"] == "model" for t in r["turns"]) for r in done) / n,
        "tool_failures": sum(call["status"] == "error" for r in records for call in r["calls"]),
        "errors": dict(sorted(Counter(e for r in records for c in r["calls"] if (e := c.get("error_kind"))).items())),
        "cost": used["cost"] / max(len(records), 1),
        "cached": used["cached"] / max(len(usage), 1),
        "usage": used,
        "stops": dict(sorted(Counter(r["stop"] for r in records).items())),
    }


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson interval of a share: 95 % by default; (0, 1) without data."""
    if n == 0:
        return 0.0, 1.0
    share, shrink = right / n, 1 + z * z / n
    middle = (share + z * z / (2 * n)) / shrink
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / shrink
    return max(0.0, middle - half), min(1.0, middle + half)


def table(summary: dict[str, dict]) -> str:
    """The summary as text, one line for each data source. cost: of the searches, for a question; cached: the share of
    searches that were answered from what was kept."""
    width = max(len(source) for source in summary)
    shares = "search  image   text   both  format  turns  failed   cost  cached"
    lines = [f"{'':{width}}     n  accuracy (95 %)      {shares}  stops"]
    for source, f in summary.items():
        interval = f"{f['accuracy']:.3f} ({f['accuracy_low']:.3f}-{f['accuracy_high']:.3f})"
        shares = "  ".join(f"{f[key]:5.3f}" for key in ("search_ratio", "image", "text", "both"))
        stops = ", ".join(f"{stop} {n}" for stop, n in f["stops"].items())
        lines.append(
            f"{source:{width}} {f['n']:5d}  {interval}  {shares}   {f['format']:5.3f}  {f['turns']:5.2f}"
            f"  {f['tool_failures']:6d}  {f['cost']:5.3f}   {f['cached']:5.3f}  {stops}"
        )
    return "\n".join(lines)


def ask(question: Question, engine, search, codec: Codec, cfg: Config) -> Episode:
    """Hold one conversation and print it turn by turn, what the searches found included."""
    episode = run([question], engine, search, codec, cfg, temperature=cfg.eval_temperature)[0]
    calls = iter(episode.calls)
    print(f"question  {question.text}")
    for number, response in enumerate(episode.responses, 1):
        print(f"\nturn {number}    {response.strip()}")
        if call := next(calls, None):
            call, result = call
            asked = f"text search for {call.query!r}" if call.kind == "text" else "image search"
            print(f"  {asked}: {result.status}{': ' if result.error else ''}{result.error}")
            for hit in result.hits:
                print(f"    - {hit.title}{f' <{hit.url}>' if hit.url else ''}{f': {hit.text}' if hit.text else ''}")
    print(f"\nanswer    {reward.extract_answer(episode.responses[-1])}   (stop: {episode.stop.value})")
    return episode


def open_search(cfg: Config):
    """The search of the configuration; an offline one in an index of the user's, or the toy world's."""
    return tools.open_search(cfg, cfg.search_index or toy.locate(cfg).index)


def load_engine(folder, codec: Codec, cfg: Config, device) -> TorchEngine:
    """An engine with the weights of a Hugging Face folder."""
    model = read_model(folder)
    engine = TorchEngine(model.config, codec, cfg, device)
    engine.load_weights(model.named_parameters(), version=0)
    return engine


def write_jsonl(path: Path, records: list[dict]) -> None:
    """Write records as JSON lines, under a temporary name first."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "w") as file:
            for r in records:
                file.write(json.dumps(r) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: cannot write ({error.strerror})") from None


def main() -> None:
    cfg = parse(sys.argv[1:])
    device = init_distributed(cfg)
    if cfg.model == "toy" or (cfg.searches_index and not cfg.search_index) or not (cfg.files or cfg.question):
        toy.ensure(cfg)
    folder = toy.locate(cfg).model if cfg.model == "toy" else cfg.model
    codec = Codec(folder, cfg)
    if cfg.question:
        image = (_read_image(cfg.image),) if cfg.image else ()
        question = Question(id="asked", text=cfg.question, images=image)
        if drop_overlong([question], codec)[1]:
            raise InputError(f"the question has more than max_prompt_tokens={cfg.max_prompt_tokens} tokens")
        tools.check_questions([question], cfg)
        ask(question, load_engine(folder, codec, cfg, device), open_search(cfg), codec, cfg)
        return
    questions, dropped = drop_overlong(
        load_questions(cfg.files or [str(toy.locate(cfg).val)], skip_bad_rows=cfg.skip_bad_rows), codec
    )
    questions = questions[: cfg.val_limit or None]
    out = Path(cfg.out or (Path(folder) / "eval.jsonl" if Path(folder).is_dir() else "eval.jsonl"))
    if not questions:
        raise InputError(
            "there is no question to evaluate on" + (f" ({dropped} over-long ones dropped)" if dropped else "")
        )
    tools.check_questions(questions, cfg)
    if dist.get_rank() == 0 and (line := tools.estimate(len(questions), cfg)):
        print(line, file=sys.stderr)
    records = evaluate(
        questions, load_engine(folder, codec, cfg, device), open_search(cfg), codec, cfg,
        temperature=cfg.eval_temperature, progress="evaluating", ordered=is_deterministic(cfg, device),
    )  # fmt: skip
    if dist.get_rank() == 0:
        write_jsonl(out, records)
        print(table(summarize(records, cfg)))
        print(
            f"{len(records)} conversations in {out}" + (f"; {dropped} over-long questions dropped" if dropped else "")
        )


def _read_image(path):
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot read this picture ({error.strerror})") from None
    try:
        decode_image(data)
    except InputError as error:
        raise InputError(f"{path}: {str(error).removeprefix('field images: ')}") from None
    return data


if __name__ == "__main__":
    run_main(main)
