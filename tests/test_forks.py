"""docs/extending.md, performed: a tool and a reward are added to a copy of the repository as the page says."""

import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

TOOL = """
import dataclasses, json, sys
import torch, config, policy, toy
from analysis.figures import of_step, summarize, table
from analysis.labels import label_of
from analysis.report import ReportOptions, render
from chat import Chat
from data import Question, write_jsonl
from reward import record, score_episode
from rollout import run
from toy.lessons import ScriptedEngine
from toy.model import save_random_model
from toy.world import draw

cfg = config.Config(threads=1, run_dir=sys.argv[1])
device = policy.init_distributed(cfg)
save_random_model("model", seed=0)
chat = Chat("model", cfg)
image = draw(("ring", "red", "blue", "plain"), __import__("random").Random(0))
question = Question("q:0", "what is it called?", (image,), ("bako",))
turns = ["<reason> closer.</reason><zoom>", "<reason> bako.</reason><answer> bako</answer>"]
engine = ScriptedEngine(chat, lambda prompt, images, sampling: turns[len(images) - 1])
(episode,) = run([question], engine, None, chat, cfg)

assert [call.tool for call, _ in episode.calls] == ["zoom"] and episode.stop.value == "answered"
assert [picture.thumbnail for picture in episode.images] == [False, False]  # both at question size
score = score_episode(episode, cfg)
assert (score.reward, score.format_ok, score.searches) == (1.0, True, 0)  # well-formed, and free
metrics = of_step([record(episode, score)], cfg)
assert metrics["zoom"] == 1 and metrics["image_search"] == 0
assert label_of(record(episode, score)) == "zoom"
written = {**record(episode, score), "step": 0, "advantage": 0.5, "logp_gap": 0.0}
summary = summarize([written], cfg)
assert summary["all"]["zoom"] == 1 and "zoom" in table(summary)

(model,) = (policy.load_policy("model", chat, cfg, device),)
(batch,) = policy.pack([episode], chat, model, cfg.max_tokens_per_batch)
assert len(batch.grids) == 2 and len(batch.predict) == sum(episode.sampled)

run_dir = config.Path(cfg.run_dir)
(run_dir / "rollouts").mkdir(parents=True)
config.save(run_dir / "config.json", cfg, toy.Recipe())
write_jsonl(run_dir / "rollouts" / "step-000000.jsonl", [written])
write_jsonl(run_dir / "metrics.jsonl", [{"step": 0, "phase": "train", **metrics}])
assert '"zoom"' in render([run_dir], ReportOptions()).read_text()
"""

REWARD = """
import config
from types import SimpleNamespace
from reward import score_episode

def episode(answer):
    said = f"<reason>r</reason><answer>{answer}</answer>"
    return SimpleNamespace(responses=[said], question=SimpleNamespace(answers=("Eiffel Tower",)))

rewards = [score_episode(episode(a), config.Config()).reward for a in ("the Eiffel Tower", "the tower", "Rome")]
assert [round(r, 3) for r in rewards] == [1.0, 0.7, 0.1], rewards
"""


def block(title: str) -> str:
    """A block of code of the page, by what stands behind its language."""
    return re.search(rf"```\w+ {title}\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL)[1]


@pytest.fixture
def copy(tmp_path):
    """The repository's files that are not ignored."""
    kept = shutil.ignore_patterns(".git", "runs", "__pycache__", ".*_cache", "*.png", "tests", "benchmarks")
    return shutil.copytree(ROOT, tmp_path / "copy", ignore=kept)


def edit(path, before: str, after: str) -> None:
    text = path.read_text()
    assert text.count(before) == 1, (path, before)
    path.write_text(text.replace(before, after))


def perform(script: str, folder, *arguments) -> None:
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_tool_is_an_entry_a_function_and_a_prompt_file(copy, tmp_path):
    edit(copy / "tools.py", "TOOLS = {\n", f"{block('tool function')}\n\nTOOLS = {{\n{block('tool entry')}")
    (copy / "prompts" / "toy" / "after_zoom.txt").write_text(block("tool prompt"))
    perform(TOOL, copy, tmp_path / "run")


def test_a_reward_is_a_function_and_its_use(copy):
    path = copy / "reward.py"
    text = path.read_text()
    start = text.index("    return score(episode.responses")
    end = text.index("\n", start) + 1
    path.write_text(text[:start] + block("reward use") + text[end:])
    edit(path, "def score_episode(", f"{block('reward function')}\n\ndef score_episode(")
    perform(REWARD, copy)
