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
import sys
from collections import Counter
from pathlib import Path

import torch.distributed as dist

import reward
import search as searching
import toy
from analysis.judge import LLMJudge, judge
from analysis.labels import judges_table, write_labels
from analysis.results import ResultFile, code_version, comparison, file_id
from backbone import read_model
from chat import Chat, drop_overlong
from config import Config, InputError, parse, run_main
from data import Episode, Question, decode_image, load_questions, path_of
from engines import engine_limits, make_engine
from policy import init_distributed, is_deterministic
from reward import summarize
from rollout import evaluate, run


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


def ask(question: Question, engine, search, chat: Chat, cfg: Config) -> Episode:
    """Hold one conversation and print it turn by turn, what the searches found included."""
    episode = run([question], engine, search, chat, cfg, temperature=cfg.eval_temperature, mode=cfg.mode)[0]
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
    return searching.open_search(cfg, cfg.search_index or toy.locate(cfg).index)


def load_engine(folder, chat: Chat, cfg: Config, device, questions: list[Question]):
    """An engine with the weights of a Hugging Face folder, for conversations about these questions."""
    limits = engine_limits(folder, cfg, device, questions)
    if dist.get_rank() == 0 and cfg.engine != "torch":
        print(f"engine {cfg.engine}: {limits}", file=sys.stderr)
    model = read_model(folder)
    engine = make_engine(folder, chat, cfg, device, limits)
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


def header_of(cfg: Config, folder, chat: Chat, files, samples: int, temperature: float) -> dict:
    """What a result file says about how it came about: settings, and ids of model, questions, prompts, search and
    code."""
    config = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in NEUTRAL or k.startswith("judge")}
    index = {"offline": cfg.search_index or str(toy.locate(cfg).index), "replay": cfg.search_cache}.get(cfg.search, "")
    return {
        "config": {**config, "files": list(files), "samples": samples, "eval_temperature": temperature},
        "model_id": file_id(folder) if Path(folder).is_dir() else str(folder),
        "question_ids": [file_id(path_of(f)) for f in files],
        "prompts_id": chat.prompts_id(cfg.mode),
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
    chat = Chat(folder, cfg)
    if not cfg.question:
        return evaluate_files(folder, chat, cfg, device)
    image = (_read_image(cfg.image),) if cfg.image else ()
    question = Question(id="asked", text=cfg.question, images=image)
    if drop_overlong([question], chat, cfg.mode)[1]:
        raise InputError(f"the question has more than max_prompt_tokens={cfg.max_prompt_tokens} tokens")
    if cfg.mode != "direct":
        searching.check_questions([question], cfg)
    search = open_search(cfg) if cfg.mode != "direct" else None
    ask(question, load_engine(folder, chat, cfg, device, [question]), search, chat, cfg)


def evaluate_files(folder, chat: Chat, cfg: Config, device) -> None:
    """Evaluate on cfg.files, or the toy world's validation questions; write and print the results."""
    samples = cfg.samples or (8 if cfg.label else 1)
    temperature = cfg.eval_temperature or (cfg.temperature if samples > 1 else 0.0)
    files = cfg.files or (str(toy.locate(cfg).val),)
    questions, dropped = drop_overlong(load_questions(files, skip_bad_rows=cfg.skip_bad_rows), chat, cfg.mode)
    questions = questions[: cfg.val_limit or None]
    if not questions:
        dropped = f" ({dropped} over-long ones dropped)" if dropped else ""
        raise InputError(f"there is no question to evaluate on{dropped}")
    if cfg.mode != "direct":
        searching.check_questions(questions, cfg)
        if dist.get_rank() == 0 and (line := searching.estimate(len(questions) * samples, cfg)):
            print(line, file=sys.stderr)
    out = _out(folder, cfg)
    file = ResultFile(out, header_of(cfg, folder, chat, files, samples, temperature), dist.get_rank(), NEUTRAL)
    if "llm" in cfg.judges and dist.get_rank() == 0:
        LLMJudge(cfg).close()  # if it cannot be asked, that is better known now
    if cfg.overwrite and dist.get_rank() == 0:
        file.clear()
    dist.barrier()
    here = [None] * dist.get_world_size()
    dist.all_gather_object(here, file.done())  # other nodes may see other files
    done = {key: r for part in here for key, r in part.items()}
    engine = load_engine(folder, chat, cfg, device, questions)
    search = open_search(cfg) if cfg.mode != "direct" else None
    records = evaluate(
        questions, engine, search, chat, cfg, temperature=temperature, progress="evaluating",
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
