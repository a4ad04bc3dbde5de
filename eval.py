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
from chat import Chat, drop_overlong
from config import Config, Options, as_dict, lock, marked, need, option, parse, run_main
from data import Question, decode_image, file_id, load_questions, path_of, refusing, thinned
from engines import make_engine
from policy import all_gather, init_distributed, is_deterministic, say
from reward import extract_answer
from rollout import Rollout, evaluate
from search import check_questions, estimate, open_search
from tools import offered, title


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
    need(cfg.reward == "match", "reward=judge is for train.py: `python -m analysis judge` judges what eval.py writes")
    both = {"image_search", "text_search"} <= set(offered(cfg))
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
        fits = drop_overlong(questions, chat, options.mode)
        need(fits, f"the question has more than max_prompt_tokens={cfg.max_prompt_tokens} tokens")
        ask(load_rollout(folder, chat, cfg, questions, world, options.mode, device), questions[0], options)
    else:
        evaluate_files(folder, chat, cfg, options, world, device)


def load_rollout(folder: str, chat: Chat, cfg: Config, questions, world: toy.Toy, mode: str, device) -> Rollout:
    """An engine with the weights of a Hugging Face folder, and the search, for conversations about these questions."""
    search = None
    if mode != "direct":
        check_questions(questions, cfg)
        search = open_search(cfg, cfg.search_index or world.index)
    engine = make_engine(folder, chat, cfg, device, questions)
    if cfg.engine == "torch":  # vLLM has read the folder itself
        engine.load_weights(read_model(folder).named_parameters(), version=0)
    return Rollout(engine, search, chat, cfg, is_deterministic(cfg, device))


# ------------------------------------------------------------------------------------------------------ one question
def asked_question(options: EvalOptions) -> Question:
    if not options.image:
        return Question(id="asked", text=options.question)
    with refusing(f"{options.image}: cannot read it"):
        data = Path(options.image).read_bytes()
        decode_image(data)
    return Question(id="asked", text=options.question, images=(data,))


def ask(rollout: Rollout, question: Question, options: EvalOptions) -> None:
    """Roll out one conversation; rank 0 prints it turn by turn, with what the tools returned."""
    episodes = rollout.run([question], temperature=options.eval_temperature, mode=options.mode)
    if dist.get_rank() != 0:
        return  # a rank that follows another's engine has none
    (episode,) = episodes
    print(f"question  {question.text}")
    for number, response in enumerate(["", *episode.responses]):  # the pipeline searches before the model's first turn
        if number:
            print(f"\nturn {number}    {response.strip()}")
        for turn, (call, result) in zip(episode.call_turns, episode.calls, strict=True):
            if turn == number:
                print_call(call, result)
    answer = extract_answer(episode.responses[-1]) if episode.responses else None
    print(f"\nanswer    {answer}   (stop: {episode.stop.value})")


def print_call(call, result) -> None:
    picture = f" of {call.picture}" if call.picture else ""
    query = f" for {call.query!r}" if call.query else ""
    error = f": {result.error}" if result.error else ""
    print(f"  {title(call.tool)}{picture}{query}: {result.status}{error}")
    for hit in result.hits:
        url = f" <{hit.url}>" if hit.url else ""
        print(f"    - {hit.title}{url}" + (f": {hit.text}" if hit.text else ""))


# ---------------------------------------------------------------------------------------------------- question files
def load_prompts(files: tuple[str, ...], what: str, chat: Chat, cfg: Config, mode: str = "agent") -> list[Question]:
    """The questions of files whose prompts are not too long. Raises InputError if none is left."""
    loaded = load_questions(files, skip_bad_rows=cfg.skip_bad_rows, progress=dist.get_rank() == 0, match=cfg.match)
    questions = drop_overlong(loaded, chat, mode)
    dropped = len(loaded) - len(questions)
    say(f"dropped {dropped} {what} questions over max_prompt_tokens={cfg.max_prompt_tokens}" if dropped else "")
    need(questions, f"no {what} question is left of {len(loaded)} in {', '.join(files)}")
    return questions


def evaluate_files(folder: str, chat: Chat, cfg: Config, options: EvalOptions, world: toy.Toy, device) -> None:
    """Evaluate on question files; write the conversations and print the table."""
    from analysis.figures import summarize, table
    from analysis.results import ResultFile

    files = options.files or (str(world.val),)
    rank, samples, mode = dist.get_rank(), options.samples, options.mode
    questions = thinned(load_prompts(files, "evaluation", chat, cfg, mode), cfg.val_limit)
    if mode != "direct":
        say(estimate(len(questions) * samples, cfg))
    temperature = options.eval_temperature or (cfg.temperature if samples > 1 else 0.0)
    name = "eval.jsonl" if mode == "agent" else f"eval-{mode}.jsonl"
    out = Path(options.out or (Path(folder) / name if Path(folder).is_dir() else name))
    distinct = ".jsonl" in out.name or out.parent.resolve() != Path(folder).resolve()
    need(distinct, f"{out}: in the model's folder, a name with .jsonl tells it from the model's files")
    header = header_of(folder, chat, cfg, options, files, temperature, world)
    file = ResultFile(out, header, rank, marked("neutral", Config, EvalOptions, toy.Recipe))
    held = lock(out) if rank == 0 else None  # two evaluations must not write one file
    if cfg.overwrite and rank == 0:
        file.clear()
    dist.barrier()
    done = dict(all_gather(list(file.done().items())))  # other nodes may see other files
    rollout = load_rollout(folder, chat, cfg, questions, world, mode, device)
    how = dict(temperature=temperature, samples=samples, mode=mode, done=done, keep=file.add)
    records = evaluate(rollout, questions, **how, progress="evaluating")
    file.close()
    if rank == 0:
        file.finish(records)
        held.close()
        print(table(summarize(records, cfg)))
        again = f", {len(done)} of them from before" if done else ""
        print(f"{len(records)} conversations in {out}{again}")


def header_of(folder, chat: Chat, cfg: Config, options: EvalOptions, files, temperature: float, world: toy.Toy) -> dict:
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


if __name__ == "__main__":
    run_main(main)
