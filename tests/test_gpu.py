"""What only a GPU can show. `bash benchmarks/gpu.sh` runs these; elsewhere they are skipped."""

import importlib.util
import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SHORT_RUN, SHORT_WORLD, question, replace
from test_policy import broken_folder, save_sharp_model
from test_vllm import launch

import backbone
import policy
from chat import Chat
from engines import TorchEngine
from rollout import run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
needs_vllm = pytest.mark.skipif(not importlib.util.find_spec("vllm"), reason="needs vllm: requirements-gpu.txt")


class NoSearch:
    def search(self, call, question):
        raise AssertionError("a random model asks for nothing")


@pytest.mark.parametrize("case", ["apart", "shared", "not causal"])
@pytest.mark.parametrize("kind", ["varlen", "flash"])
def test_fast_attention_is_segment_attention(kind, case):
    """shared: two segments begin with 83 and 90 tokens of the first. Gradients, too."""
    if kind == "flash":
        pytest.importorskip("flash_attn_2_cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    qkv = [torch.randn(1, heads, 300, 64, device="cuda", generator=generator).bfloat16() for heads in (8, 2, 2)]
    bounds = key_bounds = torch.tensor([0, 100, 117, 300], dtype=torch.int32, device="cuda")
    rows = None
    if case == "shared":
        rows = torch.tensor([*range(100), *range(83), *range(100, 117), *range(90), *range(117, 300)], device="cuda")
        key_bounds = torch.tensor([0, 100, 200, 473], dtype=torch.int32, device="cuda")
    options = dict(
        scaling=0.125, is_causal=case != "not causal", cu_seq_lens_q=bounds, cu_seq_lens_k=key_bounds, max_length_q=183,
        max_length_k=183 if rows is None else 273, key_rows=rows,
    )  # fmt: skip
    found, weights = [], torch.randn(1, 300, 8, 64, device="cuda", generator=generator)
    for how, dtype in ((kind, torch.bfloat16), ("segments", torch.float32)):
        leaves = [x.to(dtype).requires_grad_() for x in qkv]
        out, _ = backbone.packed_attention(None, *leaves, kind=how, **options)
        (out * weights).sum().backward()
        found.append([out, *(x.grad for x in leaves)])
    for fast, slow in zip(*found, strict=True):
        assert (fast.float() - slow).abs().max() < 0.03 * slow.abs().max().clamp(min=1)


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 4}, {"lora_rank": 4, "offload": "all"}], ids=str)
def test_sampler_and_trainer_agree_in_bf16(folder, cfg, changes):
    cfg = replace(cfg, device="cuda", dtype="bf16", **changes)
    device = policy.init_distributed(cfg)
    chat = Chat(folder, cfg)
    trainer = policy.load_policy(folder, chat, cfg, device, offload=cfg.offload == "all")
    for name, parameter in trainer.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.constant_(parameter, 0.01)
    engine = TorchEngine(backbone.plain_config(trainer), chat, cfg, device)
    engine.load_weights(policy.full_weights(trainer), version=0)
    episodes = run([question(i) for i in range(4)], engine, NoSearch(), chat, cfg, samples=2)
    batches = policy.pack(episodes, chat, trainer, cfg.max_tokens_per_batch)
    for batch, logp in zip(batches, policy.logprobs(trainer, batches, 1.0, device), strict=True):
        assert (logp - batch.sampler_logp).abs().mean() < 0.05


def test_logits_of_bf16_factors_are_summed_in_fp32():
    hidden, weight = (3 * torch.randn(n, 512, device="cuda").bfloat16() for n in (7, 1000))
    expected = (hidden.double() @ weight.double().T).float()
    torch.testing.assert_close(policy.head_logits(hidden, weight), expected, atol=1e-2, rtol=1e-5)


@pytest.fixture(scope="module")
def seen(folder, tmp_path_factory):
    """What test_vllm.py's process saw, in bf16, with compiled kernels, CUDA graphs and vLLM's runner for GPUs."""
    out = tmp_path_factory.mktemp("vllm")
    return launch("alone", save_sharp_model(folder, out / "model"), out)


@needs_vllm
def test_vllm_and_trainer_agree_before_and_after_sleep(seen):
    """From the exported folder; from weights loaded while the engine slept; with other eyes."""
    gaps = {name: seen[f"{name} gap"] for name in ("export", "learned", "new eyes")}
    assert max(gaps.values()) < 0.5 < 1 < min(seen["stale gap"], seen["stale eyes gap"]), gaps
    assert seen["versions"] == [7] and max(seen["turns"]) == 3 and max(seen["images"]) > 4
    assert "no weights came for ['model." in seen["missing"] and "model.nothing is unknown" in seen["unknown"]


@needs_vllm
def test_vllm_gives_its_memory_back_while_it_sleeps(seen):
    before, asleep, awake = seen["MiB free"]
    assert asleep > max(before, awake) + 5


@needs_vllm
def test_vllm_on_a_gpu_keeps_seeds_and_bans_ids(seen):
    """Its batches differ in the last bits, which now and then turn a token; other seeds would turn them all."""
    assert sum(seen["same again"]) >= 4 and seen["tokens"] > 1000 and seen["banned"] == 0
    assert (seen["reports"], seen["head"]) == (False, "float32")


@needs_vllm
def test_vllm_hands_over_what_an_aborted_request_has(seen):
    """Outputs come a step late."""
    ((name, tokens, reason),) = seen["aborted"]
    assert (name, reason, seen["left"]) == ("a", "abort", ["b"]) and 1 <= tokens <= 4


@needs_vllm
def test_vllm_takes_a_tied_folder_with_a_head_of_its_own(folder, tmp_path):
    broken_folder(shutil.copytree(folder, tmp_path / "doubled"), "the head again")
    seen = launch("tied", tmp_path / "doubled", tmp_path)
    assert max(seen["before"], seen["after"]) < 0.5 < seen["stale"]


@pytest.mark.parametrize(
    "more",
    [[], ["--kl_coef=0.001", "--offload=all"], pytest.param(["--engine=vllm", "--kl_coef=0.001"], marks=needs_vllm)],
)
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
