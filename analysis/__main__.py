"""python -m analysis COMMAND, to look at runs of train.py and at result files of eval.py.

    report RUN [RUN...] [--out FILE] [--limit N]               runs as one HTML page
    curves RUN [RUN...] [--out FILE]                           the curves of runs as a PNG
    plan [--gpus N] [--gpu_memory GIB] [options of train.py]   the memory that a run will need
    compare A B [--judge NAME]                                 two result files on the same questions
    judge RESULTS [--judges em sub_em llm] [--judge_url URL]   verdicts of several judges, kept in the result file
    label RESULTS --out FILE [--balance SHARE] [--seed N]      questions with the tools that they need, as parquet
    prompts PICKLE [PICKLE...] --out DIR                       the prompts of MMSearch-R1's authors as a prompt folder

`python -m analysis COMMAND --help` lists the options of one command.
"""

import os
import sys

from analysis.compare import CompareOptions, comparison
from analysis.curves import CurvesOptions, plot
from analysis.judge import JudgesOptions, judge, judges_table
from analysis.labels import LabelOptions, write_labels
from analysis.prompts import PromptsOptions, write_prompts
from analysis.report import ReportOptions, render
from analysis.results import questions_of, read_results
from config import Config, lock, need, parse, run_main
from data import write_jsonl


def main(argv: list[str] | None = None) -> None:
    """Run a command (argv: without the program's name). Raises InputError."""
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("-h", "--help"):
        return print(__doc__.strip())
    need(command in COMMANDS, f"unknown command {command!r}: choose one of {', '.join(COMMANDS)}")
    if command == "plan":
        from analysis.plan import PlanOptions, plan  # the one that needs torch

        options, cfg = parse(rest, PlanOptions, Config)
        return print(plan(cfg, options))
    usage, run, kind = COMMANDS[command]
    count = next((i for i, word in enumerate(rest) if word.startswith("-")), len(rest))
    words, options = rest[:count], parse(rest[count:], kind)  # --help ends the program here
    several, least = usage.endswith("..."), len(usage.removesuffix(" ...").split())
    fits = len(words) >= least if several else len(words) == least
    need(fits, f"{command}: expected python -m analysis {command} {usage}, then options")
    run(*([words] if several else words), options)


def _report(runs, options):
    path = render(runs, options)
    print(f"{path} ({path.stat().st_size / 2**20:.1f} MiB)")


def _compare(a, b, options):
    try:
        print(comparison(a, b, options.judge), flush=True)
    except BrokenPipeError:  # compare A B | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _judge(path, options):
    need(options.judges, "judge: give --judges")
    with lock(path):
        header, records = read_results(path)
        records, missing = judge(records, questions_of(path, header, records), options, progress=True)
        write_jsonl(path, [{"header": header}, *records])
    print(judges_table(records, missing))


COMMANDS = {  # what stands before the options, what is called with it and them, the options
    "report": ("RUN ...", _report, ReportOptions),
    "curves": ("RUN ...", lambda runs, options: print(plot(runs, options)), CurvesOptions),
    "plan": (),
    "compare": ("A B", _compare, CompareOptions),
    "judge": ("RESULTS", _judge, JudgesOptions),
    "label": ("RESULTS", write_labels, LabelOptions),
    "prompts": ("PICKLE ...", write_prompts, PromptsOptions),
}


if __name__ == "__main__":
    run_main(main)
