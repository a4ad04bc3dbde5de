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
    argv = sys.argv[1:] if argv is None else argv
    command, *rest = argv or ["--help"]
    if command in ("-h", "--help"):
        return print(__doc__.strip())
    need(command in COMMANDS, f"unknown command {command!r}: choose one of {', '.join(COMMANDS)}")
    COMMANDS[command](rest)


def _report(argv):
    path = render(*_read("report RUN ...", argv, ReportOptions))
    print(f"{path} ({path.stat().st_size / 2**20:.1f} MiB)")


def _curves(argv):
    print(plot(*_read("curves RUN ...", argv, CurvesOptions)))


def _plan(argv):
    from analysis.plan import PlanOptions, plan  # the one that needs torch

    options, cfg = parse(argv, PlanOptions, Config)
    print(plan(cfg, options))


def _compare(argv):
    (a, b), options = _read("compare A B", argv, CompareOptions)
    try:
        print(comparison(a, b, options.judge), flush=True)
    except BrokenPipeError:  # compare A B | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _judge(argv):
    (path,), options = _read("judge RESULTS", argv, JudgesOptions)
    with lock(path):
        header, records = read_results(path)
        records, missing = judge(records, questions_of(path, header, records), options, progress=True)
        write_jsonl(path, [{"header": header}, *records])
    print(judges_table(records, missing))


def _label(argv):
    (path,), options = _read("label RESULTS", argv, LabelOptions)
    write_labels(path, options)


def _prompts(argv):
    write_prompts(*_read("prompts PICKLE ...", argv, PromptsOptions))


COMMANDS = dict(
    report=_report, curves=_curves, plan=_plan, compare=_compare, judge=_judge, label=_label, prompts=_prompts
)


def _read(usage, argv, kind):
    """(the words before the first option, the options) of a command with this usage."""
    count = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    words, options = argv[:count], parse(argv[count:], kind)  # --help ends the program here
    command, *needed = usage.removesuffix(" ...").split()
    fits = len(words) >= len(needed) if usage.endswith("...") else len(words) == len(needed)
    need(fits, f"{command}: expected python -m analysis {usage}, then options")
    return words, options


if __name__ == "__main__":
    run_main(main)
