"""What a validation of the toy world costs beside a step of training, and whether its two passes should be one.

    python benchmarks/validation.py [options of train.py]     # CPU seconds, so that busy machines may be compared

Before and after a run, validation is greedy and then at the training temperature, with the same weights. "apart" is
that; "together" has both conversations about each question in one rollout, which computes their prompt once.
"""

import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import rollout  # noqa: E402
import toy  # noqa: E402
import train  # noqa: E402
from analysis.imitation import ImitationOptions  # noqa: E402
from analysis.judge import JudgeOptions  # noqa: E402
from config import Config, parse  # noqa: E402

REPEATS, TEMPERATURES = 3, (0.0, 1.0)
converse = rollout.converse


def both(question, chat, cfg, *, sample, temperature, **how):
    """A conversation of the pass that its sample number stands for."""
    return converse(question, chat, cfg, sample=0, temperature=TEMPERATURES[sample], **how)


def main():
    arguments = ["--run_dir=runs/validation-cost", "--overwrite", *sys.argv[1:]]
    run = train.Run(*parse(arguments, Config, toy.Recipe, JudgeOptions, ImitationOptions))

    def seconds(work) -> float:
        """CPU seconds, from an empty cache on."""
        run.engine.load_weights(run.weights(), version=0)
        started = time.process_time()
        work()
        return time.process_time() - started

    def together():
        rollout.converse = both
        run.rollout.run(run.val, samples=2)
        rollout.converse = converse

    passes = [partial(rollout.evaluate, run.rollout, run.val, temperature=t) for t in TEMPERATURES]
    run.first = -1  # no look at the first step's conversations
    seconds(lambda: run.step(0))  # what is done once
    for _ in range(REPEATS):
        step, greedy = seconds(lambda: run.step(0)), seconds(passes[0])
        apart, joint = seconds(lambda: [part() for part in passes]), seconds(together)
        print(
            f"step {step:.2f}  greedy {greedy:.2f}  apart {apart:.2f}  together {joint:.2f}  {joint / apart:.2f} of it"
        )


if __name__ == "__main__":
    main()
