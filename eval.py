"""Judge a model on question files, or ask it one question, with the same rollout that trains it.

    python eval.py --model runs/toy/final                                       # the toy world's validation questions
    python eval.py --model DIR --files a.parquet b.parquet                      # a table by data_source
    torchrun --nproc_per_node 8 eval.py --preset qwen2.5-vl-7b --search_index web.sqlite --model DIR --files a.parquet
    python eval.py --model DIR --image photo.jpg --question "what is it called?"
    python eval.py --model DIR --mode direct --files a.parquet                  # no tools; or pipeline: always search
    python eval.py --model DIR --samples 8                                      # pass@k, spread

Greedy unless --eval_temperature or --samples says otherwise. A model that train.py exported brings the options that it
was trained with (prompts, pixel ranges, limits). Every conversation is written to --out as a line of JSON; an
interrupted evaluation is resumed. `python -m analysis` compares, judges and labels such files.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

import toy
from backbone import read_model
from chat import Chat, Episode, drop_overlong
from config import Config, InputError, Options, as_dict, lock, marked, need, option, parse, run_main
from data import Question, decode_image, file_id, load_questions, path_of, thinned
from engines import Engine, engine_limits, make_engine
from policy import all_gather, init_distributed, is_deterministic
from reward import extract_answer
from rollout import Rollout, evaluate
from search import check_questions, estimate, open_search
from tools import TOOLS, limits, title


@dataclass(frozen=True)
class EvalOptions(Options):
    """The options of an evaluation."""

    files: tuple[str, ...] = option((), "questions, PATH or BENCHMARK=PATH (none: the toy world's for validation)")
    out: str = option("", "file of the conversations (default: eval.jsonl in the model's folder)", marks="neutral")
    mode: str = option("agent", "tools on demand, no tools, or always search", ("agent", "direct", "pipeline"))
    samples: int = option(1, "conversations about each question", "above 0")
    eval_temperature: float = option(0.0, "temperature (0: greedy; with several samples: temperature)", "at least 0")
    image: str = option("", "ask about this picture")
    question: str = option("", "the question to ask")

    def __post_init__(self):
        super().__post_init__()
        need(self.question or not self.image, "image needs a question to go with it")
        need(not (self.files and self.question), "give either files to evaluate on or a question to ask, not both")


def main() -> None:
    cfg, options, recipe = parse(sys.argv[1:], Config, EvalOptions, toy.Recipe, as_trained=True)
    allowed = limits(cfg)
    both = allowed["image_search"] and allowed["text_search"]
    need(options.mode != "pipeline" or both, "mode=pipeline makes both searches: tool_limits must allow them")
    device = init_distributed(cfg)
    uses_index = options.mode != "direct" and toy.answers_searches(cfg)
    world = toy.locate(recipe)
    if cfg.model == "toy" or uses_index or not (options.files or options.question):
        toy.ensure(recipe, cfg)
    folder = str(world.model) if cfg.model == "toy" else cfg.model
    chat = Chat(folder, cfg)
    if options.question:
        for name, given in (("samples", options.samples > 1), ("out", options.out), ("overwrite", cfg.overwrite)):
            need(not given, f"{name} is for question files: a question that is asked is answered once, on the screen")
        questions = [asked_question(options)]
        if drop_overlong(questions, chat, options.mode)[1]:
            raise InputError(f"the question has more than max_prompt_tokens={cfg.max_prompt_tokens} tokens")
        ask(load_rollout(folder, chat, cfg, questions, world, options.mode, device), questions[0], options)
    else:
        evaluate_files(folder, chat, cfg, options, world, device)


def load_rollout(folder: str, chat: Chat, cfg: Config, questions, world: toy.Toy, mode: str, device) -> Rollout:
    """An engine with the weights of a Hugging Face folder, and the search, for conversations about these questions."""
    search = None
    if mode != "direct":
        check_questions(questions, cfg)
        search = open_search(cfg, cfg.search_index or world.index)
    return Rollout(load_engine(folder, chat, cfg, questions, device), search, chat, cfg, is_deterministic(cfg, device))


def load_engine(folder: str, chat: Chat, cfg: Config, questions: list[Question], device) -> Engine:
    limits = engine_limits(folder, cfg, device, questions)
    if dist.get_rank() == 0 and cfg.engine != "torch":
        print(f"engine {cfg.engine}: {limits}", file=sys.stderr)
    engine = make_engine(folder, chat, cfg, device, limits)
    if cfg.engine == "torch":  # vLLM has read the folder itself
        engine.load_weights(read_model(folder).named_parameters(), version=0)
    return engine


# ------------------------------------------------------------------------------------------------------ one question


def asked_question(options: EvalOptions) -> Question:
    if not options.image:
        return Question(id="asked", text=options.question)
    try:
        data = Path(options.image).read_bytes()
    except OSError as error:
        raise InputError(f"{options.image}: cannot read this picture ({error.strerror})") from None
    try:
        decode_image(data)
    except InputError as error:
        raise InputError(f"{options.image}: {error}") from None
    return Question(id="asked", text=options.question, images=(data,))


def ask(rollout: Rollout, question: Question, options: EvalOptions) -> Episode:
    """Roll out one conversation and print it turn by turn, with what the tools returned."""
    episode = rollout.run([question], temperature=options.eval_temperature, mode=options.mode)[0]
    calls = list(episode.calls)
    print(f"question  {question.text}")
    if options.mode == "pipeline" and calls:  # it searches before the model says anything
        print_call(*calls.pop(0))
    for number, response in enumerate(episode.responses, 1):
        print(f"\nturn {number}    {response.strip()}")
        if calls:
            print_call(*calls.pop(0))
    answer = extract_answer(episode.responses[-1]) if episode.responses else None
    print(f"\nanswer    {answer}   (stop: {episode.stop.value})")
    return episode


def print_call(call, result) -> None:
    asked = title(call.tool)
    if call.picture:
        asked += f" of {call.picture}"
    if call.query:
        asked += f" for {call.query!r}"
    print(f"  {asked}: {result.status}" + (f": {result.error}" if result.error else ""))
    for hit in result.hits:
        line = f"    - {hit.title}"
        if hit.url:
            line += f" <{hit.url}>"
        print(f"{line}: {hit.text}" if hit.text else line)


# ---------------------------------------------------------------------------------------------------- question files


def evaluate_files(folder: str, chat: Chat, cfg: Config, options: EvalOptions, world: toy.Toy, device) -> None:
    """Evaluate on question files; write the conversations and print the table."""
    from analysis.figures import summarize
    from analysis.results import ResultFile

    files = options.files or (str(world.val),)
    loaded = load_questions(files, skip_bad_rows=cfg.skip_bad_rows, progress=dist.get_rank() == 0)
    questions, dropped = drop_overlong(loaded, chat, options.mode)
    questions = thinned(questions, cfg.val_limit)
    if not questions:
        raise InputError("there is no question to evaluate on" + (f" ({dropped} over-long ones)" if dropped else ""))
    rank, samples = dist.get_rank(), options.samples
    if options.mode != "direct" and rank == 0:
        print(estimate(len(questions) * samples, cfg), file=sys.stderr)
    temperature = options.eval_temperature or (cfg.temperature if samples > 1 else 0.0)
    name = "eval.jsonl" if options.mode == "agent" else f"eval-{options.mode}.jsonl"
    out = Path(options.out or (Path(folder) / name if Path(folder).is_dir() else name))
    header = header_of(folder, chat, cfg, options, files, temperature, world)
    file = ResultFile(out, header, rank, marked("neutral", Config, EvalOptions, toy.Recipe))
    held = lock(out) if rank == 0 else None  # two evaluations must not write one file
    if cfg.overwrite and rank == 0:
        file.clear()
    dist.barrier()
    found = all_gather(list(file.done().items()))  # other nodes may see other files
    done = dict(found)
    rollout = load_rollout(folder, chat, cfg, questions, world, options.mode, device)
    records = evaluate(
        rollout, questions, temperature=temperature, samples=samples, mode=options.mode, done=done, keep=file.add,
        progress="evaluating",
    )  # fmt: skip
    file.close()
    if rank == 0:
        file.finish(records)
        held.close()
        print(table(summarize(records, cfg)))
        again = f", {len(done)} of them from before" if done else ""
        left_out = f"; {dropped} over-long questions dropped" if dropped else ""
        print(f"{len(records)} conversations in {out}{again}{left_out}")


def header_of(
    folder: str, chat: Chat, cfg: Config, options: EvalOptions, files, temperature: float, world: toy.Toy
) -> dict:
    """What a result file says about its origin: options, and ids of model, questions, prompts, search and code."""
    from analysis.results import code_version

    neutral = marked("neutral", Config, EvalOptions)
    settings = {name: value for name, value in as_dict(cfg, options).items() if name not in neutral}
    index = {"offline": cfg.search_index or str(world.index), "replay": cfg.search_cache}.get(cfg.search, "")
    return {
        "config": {**settings, "files": list(files), "eval_temperature": temperature},
        "model_id": file_id(folder) if Path(folder).is_dir() else folder,
        "question_ids": [file_id(path_of(f)) for f in files],
        "prompts_id": chat.prompts_id(options.mode),
        "search_id": file_id(index) if Path(index).is_file() and options.mode != "direct" else None,
        "code": code_version(),
    }


def table(summary: dict[str, dict]) -> str:
    """The summary as text, one line for each data source. calls: share of those allowed; then shares of conversations
    that called each tool, and several of them; cost: of a question's searches; cached: share of recorded answers."""
    width = max(len(source) for source in summary)
    names = [*TOOLS, "combined", "format"]
    lines = [
        f"{'':{width}}     n  accuracy (95 %)      calls  {'  '.join(map(title, names))}  turns  failed   cost  cached"
        "  stops"
    ]
    for source, f in summary.items():
        interval = f"{f['accuracy']:.3f} ({f['accuracy_low']:.3f}-{f['accuracy_high']:.3f})"
        shares = "  ".join(f"{f[name]:{len(name)}.3f}" for name in names)
        stops = ", ".join(f"{stop} {n}" for stop, n in f["stops"].items())
        lines.append(
            f"{source:{width}} {f['n']:5d}  {interval}  {f['search_ratio']:5.3f}  {shares}  {f['turns']:5.2f}"
            f"  {f['tool_failures']:6d}  {f['cost']:5.3f}   {f['cached']:5.3f}  {stops}"
        )
    for source, f in summary.items():
        if "pass" in f:
            passed = "  ".join(f"{k}: {share:.3f}" for k, share in f["pass"].items())
            lines.append(f"{source:{width}}  pass@k  {passed}   spread of accuracy {f['spread']:.3f}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
