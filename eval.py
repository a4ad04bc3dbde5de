"""Judge a model, or ask it one question, with the same rollout that trains it.

    python eval.py --model runs/toy/final                                       # the toy world's validation questions
    python eval.py --model DIR --files a.parquet b.parquet                      # a table by data_source
    torchrun --nproc_per_node 8 eval.py --preset qwen2.5-vl-7b --search_index web.sqlite --model DIR --files a.parquet
    python eval.py --model DIR --image photo.jpg --question "what is it called?"
    python eval.py --model DIR --mode direct --files a.parquet                  # no tools; or pipeline: always search
    python eval.py --model DIR --samples 8 --judges em llm                      # pass@k, spread; second opinions
    python eval.py compare A.jsonl B.jsonl                                      # paired difference, gained and lost
    python eval.py --model DIR --label --files train.parquet --out labelled.parquet --balance 0.67

Greedy unless --eval_temperature or --samples says otherwise. Every conversation is written to --out as a line of JSON
(see results.py); an evaluation that was interrupted goes on from there. --label writes the questions that the model
gets right, each with the searches it needs, as veRL parquet.
"""

import argparse
import dataclasses
import os
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

import reward
import tools
import toy
from config import Config, InputError, parse, run_main
from data import (
    Codec,
    Episode,
    Question,
    Stop,
    Usage,
    decode_image,
    drop_overlong,
    load_questions,
    path_of,
    write_questions,
)
from judge import LLMJudge, agreement, judge
from policy import init_distributed, is_deterministic, read_model
from results import ResultFile, accuracy, by_question, code_version, comparison, file_id, key_of, several
from rollout import engine_limits, make_engine, run, share


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
    progress: str = "", ordered: bool = True, guard=lambda hold: hold(), samples: int = 1, mode: str = "agent",
    done: dict | None = None, keep: Callable[[dict], None] = lambda r: None,
) -> list[dict]:  # fmt: skip
    """`samples` conversations about each question, the questions spread over the ranks; all records, on every rank, in
    order.

    guard: called with the rollout as a function, so that a caller can interrupt it before ranks have to meet again.
    mode: see `rollout.run`. done: (question id, sample) -> records that need not be made again, the same on all ranks
    (a question goes again unless all of its samples are there). keep: called with each record as it is finished.
    """
    cfg = dataclasses.replace(cfg, rollout_deadline=0.0)  # an evaluation is about all questions, the slow ones too
    done = done or {}
    mine = share([q for q in questions if not all((q.id, sample) in done for sample in range(samples))], cfg)

    def finished(episode):
        bar.update()
        if episode.stop != Stop.ABORTED:
            keep(record(episode, score_episode(episode, cfg)))

    quiet = not progress or dist.get_rank() > 0
    with tqdm(total=len(mine) * samples, desc=progress, disable=quiet, leave=False) as bar:
        hold = lambda: run(  # noqa: E731
            mine, engine, search, codec, cfg, samples=samples, step=step, temperature=temperature, ordered=ordered,
            progress=finished, mode=mode,
        )  # fmt: skip
        episodes = guard(hold)
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, [record(e, score_episode(e, cfg)) for e in episodes])
    records = done | {key_of(r): r for part in parts for r in part}
    return [records[q.id, sample] for q in questions for sample in range(samples)]


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
    usage = [call.get("usage", {}) for r in records for call in r["calls"]]
    used = {f.name: sum(u.get(f.name, 0) for u in usage) for f in dataclasses.fields(Usage)}
    return {
        "n": len(done),
        **accuracy(by_question(records)),
        **several(records),
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
    for source, f in summary.items():
        if "pass" in f:
            passed = "  ".join(f"{k}: {share:.3f}" for k, share in f["pass"].items())
            lines.append(f"{source:{width}}  pass@k  {passed}   spread of accuracy {f['spread']:.3f}")
    return "\n".join(lines)


def judges_table(records: list[dict], missing: Counter) -> str:
    """What the judges say, by data source, and where they agree, as text."""
    sources = [*sorted({r["data_source"] for r in records}), "all"]
    width = max(map(len, sources))
    lines = [f"{'':{width}}  judge   judged  missing  accuracy (95 %)"]
    for source in sources:
        part = [r for r in records if source in ("all", r["data_source"])]
        for name in part[0]["judged"]:
            f, n = accuracy(by_question(part, name)), sum(r["judged"][name] is not None for r in part)
            interval = f"{f['accuracy']:.3f} ({f['accuracy_low']:.3f}-{f['accuracy_high']:.3f})"
            lines.append(f"{source:{width}}  {name:6}  {n:6d}  {len(part) - n:7d}  {interval}")
    for (a, b), (same, n) in agreement(records).items():
        lines.append(f"{a} and {b} agree on {same} of {n} ({same / max(n, 1):.3f})")
    if missing:
        lines.append("not judged: " + ", ".join(f"{why} {n}" for why, n in sorted(missing.items())))
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------- labels


NEEDS = ("search-free", "image", "text", "both")


def need_of(records: list[dict]) -> tuple[str | None, float]:
    """(the searches a question needs, the share of right ones) of the conversations about it: the least that a right
    one did, in the order of NEEDS; None if none was right."""
    right = [{call["kind"] for call in r["calls"]} for r in records if r["correct"]]
    needs = ["both" if len(kinds) == 2 else next(iter(kinds), "search-free") for kinds in right]
    return min(needs, key=NEEDS.index, default=None), len(right) / max(len(records), 1)


def balanced(labels: list[str], share: float, seed: int) -> list[int]:
    """Indices, in order, of a largest subset in which `share` need a search: surplus ones of either kind are left out
    at random."""
    free = [i for i, label in enumerate(labels) if label == "search-free"]
    needed = [i for i, label in enumerate(labels) if label != "search-free"]
    most = min(len(needed) / share if share else len(free), len(free) / (1 - share) if share < 1 else len(needed))
    rng = random.Random(f"{seed} balance")
    return sorted(
        rng.sample(needed, min(len(needed), round(most * share)))
        + rng.sample(free, min(len(free), round(most * (1 - share))))
    )


def write_labels(questions: list[Question], records: list[dict], cfg: Config) -> None:
    """Write the labelled questions to cfg.out, and with cfg.balance a subset of them beside it."""
    of_question = {q.id: [] for q in questions}
    for r in records:
        of_question[r["question_id"]].append(r)
    labelled = [(q, *need_of(of_question[q.id])) for q in questions]
    labelled = [(q, need, share) for q, need, share in labelled if need]
    counts = Counter(need for _, need, _ in labelled)
    print(f"{len(questions) - len(labelled)} of {len(questions)} questions never right, left out; the others need:")
    print("  " + ", ".join(f"{need} {counts[need]}" for need in NEEDS))
    chosen = {cfg.out: range(len(labelled))}
    if cfg.balance:
        chosen[f"{cfg.out.removesuffix('.parquet')}.balanced.parquet"] = balanced(
            [need for _, need, _ in labelled], cfg.balance, cfg.seed
        )
    for path, indices in chosen.items():
        part = [labelled[i] for i in indices]
        if not part:
            raise InputError(f"{path}: no question is left to write")
        columns = {"label": [need for _, need, _ in part], "pass_rate": [share for _, _, share in part]}
        write_questions(path, [q for q, _, _ in part], columns)
        print(f"{len(part)} questions in {path}")


# ------------------------------------------------------------------------------------------------ the command


def ask(question: Question, engine, search, codec: Codec, cfg: Config) -> Episode:
    """Hold one conversation and print it turn by turn, what the searches found included."""
    episode = run([question], engine, search, codec, cfg, temperature=cfg.eval_temperature, mode=cfg.mode)[0]
    calls = list(episode.calls)
    print(f"question  {question.text}")
    if cfg.mode == "pipeline":  # it searches before the model says anything
        _print_searches(calls[:1])
        del calls[:1]
    for number, response in enumerate(episode.responses, 1):
        print(f"\nturn {number}    {response.strip()}")
        _print_searches(calls[number - 1 : number])
    print(f"\nanswer    {reward.extract_answer((episode.responses or [''])[-1])}   (stop: {episode.stop.value})")
    return episode


def _print_searches(calls):
    for call, result in calls:
        asked = f"text search for {call.query!r}" if call.kind == "text" else "image search"
        print(f"  {asked}: {result.status}{': ' if result.error else ''}{result.error}")
        for hit in result.hits:
            print(f"    - {hit.title}{f' <{hit.url}>' if hit.url else ''}{f': {hit.text}' if hit.text else ''}")


def open_search(cfg: Config):
    """The search of the configuration; an offline one in an index of the user's, or the toy world's."""
    return tools.open_search(cfg, cfg.search_index or toy.locate(cfg).index)


def question_files(cfg: Config) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The files of training and of validation questions: the user's, or the toy world's."""
    world = toy.locate(cfg)
    train = cfg.train_files or (str(world.train),)
    return train, cfg.val_files or (() if cfg.train_files else (str(world.val),))


def load_engine(folder, codec: Codec, cfg: Config, device, questions: list[Question]):
    """An engine with the weights of a Hugging Face folder, for conversations about these questions."""
    limits = engine_limits(folder, cfg, device, questions)
    if dist.get_rank() == 0 and cfg.engine != "torch":
        print(f"engine {cfg.engine}: {limits}", file=sys.stderr)
    model = read_model(folder)
    engine = make_engine(folder, codec, cfg, device, limits)
    engine.load_weights(model.named_parameters(), version=0)
    return engine


# Settings that change nothing about a conversation: an interrupted evaluation may go on with others.
NEUTRAL = set(
    "out run_dir resume overwrite threads dist_timeout log concurrency tool_threads judges judge_url judge_model "
    "judge_cache judge_concurrency judge_timeout balance toy_dir search_url serve_address search_budget "
    "search_deadline connect_timeout read_timeout search_retries retry_pause max_failed_searches serpapi_in_flight "
    "serpapi_per_second reader_in_flight reader_per_second summarizer_in_flight summarizer_per_second image_base_url "
    "image_upload allow_hosts price_search price_reader price_summarizer".split()
)


def header_of(cfg: Config, folder, codec: Codec, files, samples: int, temperature: float) -> dict:
    """What a result file says about how it came about: settings, and ids of model, questions, prompts, search and
    code."""
    config = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in NEUTRAL or k.startswith("judge")}
    index = {"offline": cfg.search_index or str(toy.locate(cfg).index), "replay": cfg.search_cache}.get(cfg.search, "")
    return {
        "config": {**config, "files": list(files), "samples": samples, "eval_temperature": temperature},
        "model_id": file_id(folder) if Path(folder).is_dir() else str(folder),
        "question_ids": [file_id(path_of(f)) for f in files],
        "prompts_id": codec.prompts_id(cfg.mode),
        "search_id": file_id(index) if Path(index).is_file() and cfg.mode != "direct" else None,
        "code": code_version(),
    }


def compare_main(argv: list[str]) -> None:
    """python eval.py compare A B [--judge NAME]"""
    parser = argparse.ArgumentParser(prog="eval.py compare", description="What does B get right that A does not?")
    parser.add_argument("a", metavar="A", help="a result file of eval.py, or rollouts of train.py")
    parser.add_argument("b", metavar="B", help="another, on the same questions")
    parser.add_argument("--judge", default="", help="a judge in both files (default: the match that is rewarded)")
    args = parser.parse_args(argv)
    text = comparison(args.a, args.b, args.judge)
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader has seen enough: compare A B | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> None:
    if sys.argv[1:2] == ["compare"]:
        return compare_main(sys.argv[2:])
    cfg = parse(sys.argv[1:])
    device = init_distributed(cfg)
    searching = cfg.searches_index and cfg.mode != "direct"
    if cfg.model == "toy" or (searching and not cfg.search_index) or not (cfg.files or cfg.question):
        toy.ensure(cfg)
    folder = toy.locate(cfg).model if cfg.model == "toy" else cfg.model
    codec = Codec(folder, cfg)
    if not cfg.question:
        return evaluate_files(folder, codec, cfg, device)
    image = (_read_image(cfg.image),) if cfg.image else ()
    question = Question(id="asked", text=cfg.question, images=image)
    if drop_overlong([question], codec, cfg.mode)[1]:
        raise InputError(f"the question has more than max_prompt_tokens={cfg.max_prompt_tokens} tokens")
    if cfg.mode != "direct":
        tools.check_questions([question], cfg)
    search = open_search(cfg) if cfg.mode != "direct" else None
    ask(question, load_engine(folder, codec, cfg, device, [question]), search, codec, cfg)


def evaluate_files(folder, codec: Codec, cfg: Config, device) -> None:
    """Evaluate on cfg.files, or the toy world's validation questions; write and print the results."""
    samples = cfg.samples or (8 if cfg.label else 1)
    temperature = cfg.eval_temperature or (cfg.temperature if samples > 1 else 0.0)
    files = cfg.files or (str(toy.locate(cfg).val),)
    questions, dropped = drop_overlong(load_questions(files, skip_bad_rows=cfg.skip_bad_rows), codec, cfg.mode)
    questions = questions[: cfg.val_limit or None]
    if not questions:
        dropped = f" ({dropped} over-long ones dropped)" if dropped else ""
        raise InputError(f"there is no question to evaluate on{dropped}")
    if cfg.mode != "direct":
        tools.check_questions(questions, cfg)
        if dist.get_rank() == 0 and (line := tools.estimate(len(questions) * samples, cfg)):
            print(line, file=sys.stderr)
    out = _out(folder, cfg)
    file = ResultFile(out, header_of(cfg, folder, codec, files, samples, temperature), dist.get_rank(), NEUTRAL)
    if "llm" in cfg.judges and dist.get_rank() == 0:
        LLMJudge(cfg).close()  # if it cannot be asked, that is better known now
    if cfg.overwrite and dist.get_rank() == 0:
        file.clear()
    dist.barrier()
    here = [None] * dist.get_world_size()
    dist.all_gather_object(here, file.done())  # other nodes may see other files
    done = {key: r for part in here for key, r in part.items()}
    engine = load_engine(folder, codec, cfg, device, questions)
    search = open_search(cfg) if cfg.mode != "direct" else None
    records = evaluate(
        questions, engine, search, codec, cfg, temperature=temperature, progress="evaluating",
        ordered=is_deterministic(cfg, device), samples=samples, mode=cfg.mode, done=done, keep=file.add,
    )  # fmt: skip
    file.close()
    if dist.get_rank() == 0:
        records = [{k: v for k, v in r.items() if k != "judged"} for r in records]
        missing = Counter()
        if cfg.judges:
            records, missing = judge(records, {q.id: q for q in questions}, cfg, progress=True)
        file.finish(records)
        print(table(summarize(records, cfg)))
        if cfg.judges:
            print(judges_table(records, missing))
        again = f", {len(done)} of them from before" if done else ""
        print(
            f"{len(records)} conversations in {out}{again}"
            + (f"; {dropped} over-long questions dropped" if dropped else "")
        )
        if cfg.label:
            write_labels(questions, records, cfg)


def _out(folder, cfg):
    """Where the conversations go."""
    if cfg.label and not cfg.out.endswith(".parquet"):
        raise InputError(f"label needs --out NAME.parquet, not {cfg.out!r}")
    if cfg.balance and not cfg.label:
        raise InputError("balance goes with --label")
    name = "eval.jsonl" if cfg.mode == "agent" else f"eval-{cfg.mode}.jsonl"
    default = Path(folder) / name if Path(folder).is_dir() else Path(name)
    return Path(cfg.out.removesuffix(".parquet") + ".jsonl" if cfg.label else cfg.out or default)


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
