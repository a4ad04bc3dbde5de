"""What only a GPU can show. `bash benchmarks/gpu.sh` runs these; elsewhere they are skipped."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SHORT_RUN, SHORT_WORLD, question, replace

import backbone
import policy
from chat import Chat
from engines import TorchEngine
from rollout import run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


class NoSearch:
    def search(self, call, question):
        raise AssertionError("a random model asks for nothing")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["varlen", "flash"])
def test_fast_attention_is_segment_attention(kind, causal):
    if kind == "flash":
        pytest.importorskip("flash_attn")
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(1, heads, 300, 64, device="cuda", generator=generator).bfloat16() for heads in (8, 2, 2))
    bounds = torch.tensor([0, 100, 117, 300], dtype=torch.int32, device="cuda")
    options = dict(scaling=0.125, is_causal=causal, cu_seq_lens_q=bounds, max_length_q=183)
    fast, _ = backbone.packed_attention(None, q, k, v, kind=kind, **options)
    slow, _ = backbone.packed_attention(None, q.float(), k.float(), v.float(), kind="segments", **options)
    assert (fast.float() - slow).abs().max() < 0.03


def test_sampler_and_trainer_agree_in_bf16(folder, cfg):
    cfg = replace(cfg, device="cuda", dtype="bf16")
    device = policy.init_distributed(cfg)
    chat = Chat(folder, cfg)
    trainer = policy.load_policy(folder, chat, cfg, device)
    engine = TorchEngine(backbone.plain_config(trainer), chat, cfg, device)
    engine.load_weights(policy.full_weights(trainer), version=0)
    episodes = run([question(i) for i in range(4)], engine, NoSearch(), chat, cfg, samples=2)
    batches = policy.pack(episodes, chat, trainer, cfg.max_tokens_per_batch)
    for batch, logp in zip(batches, policy.logprobs(trainer, batches, 1.0, device), strict=True):
        assert (logp - batch.sampler_logp).abs().mean() < 0.05


@pytest.mark.parametrize("more", [[], ["--kl_coef=0.001", "--offload=all"]])
def test_a_run(tmp_path, more):
    """The toy's whole path in bf16: world, rollouts, updates, weights into the engine, checkpoint, evaluation."""
    places = [f"--toy_dir={tmp_path / 'toy'}", f"--run_dir={tmp_path / 'run'}"]
    settings = [*SHORT_WORLD, *SHORT_RUN, "--device=cuda", "--steps=2", *places, *more]
    done = subprocess.run([sys.executable, "train.py", *settings], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    gaps = [line["mismatch/mean"] for line in lines if "mismatch/mean" in line]
    assert len(gaps) == 2 and max(gaps) < 0.05
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()
