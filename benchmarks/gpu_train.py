"""Training speed and memory on one GPU: randomly initialised Qwen2.5-VL of 3B and 7B size, bf16, packed conversations.

    python benchmarks/gpu_train.py result.json                              # an H200: at most 9 minutes
    python benchmarks/gpu_train.py result.json --device cpu --cases tiny    # that it runs, a minute

A case is a size and options; each runs in a process of its own. A step is everything from 16 conversations of 500 to
4,000 tokens to new weights (AdamW; of 7b-offload on the CPU). Prints a table, writes JSON:

    tokens/s   of the conversations, median of the steps after the first (least - most)
    MFU        floating point operations of forward and backward, recomputation not counted, over the rate of a bf16
               matrix product on the same device
    peak       GiB, and what the memory plan (`python -m analysis plan`) says of the same packed batch

Then, for 3B, the largest packed batch that fits, in steps of 4,096 tokens and a quarter, beside what the plan promises
(for batches half of which are new images) and what it says of the batch that was run. 7B is trained without its vision
tower: with it, weights, gradients and AdamW's state alone take 124 GiB. A case for which the machine's memory or the
time is too short is left out or stopped, with a message.
"""

import argparse
import json
import multiprocessing
import platform
import re
import statistics
import sys
import tempfile
import time
from bisect import bisect
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

import torch  # noqa: E402
import transformers  # noqa: E402
from trainer import conversations, save_chat  # noqa: E402

from analysis import plan  # noqa: E402
from analysis.plan import GIB, SPARE, measure, needs  # noqa: E402
from backbone import empty_model  # noqa: E402
from chat import Chat  # noqa: E402
from config import Config  # noqa: E402
from policy import adamw, compute_dtype, init_distributed, pack, prepare, shard  # noqa: E402
from train import update_policy  # noqa: E402

VOCABULARY = 151_936
TEXT = {  # from the configurations of Qwen2.5-VL
    "tiny": dict(hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4),
    "3b": dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16),
    "7b": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28),
}
KEYS = {"tiny": 4, "3b": 2, "7b": 4}
RECOMPUTED = dict(gradient_checkpointing=True)
CASES = {  # size, tokens of a packed batch, options
    "3b-varlen": ("3b", 8192, dict(attention="varlen")),
    "3b-segments": ("3b", 8192, dict(attention="segments")),
    "3b-recomputed": ("3b", 8192, RECOMPUTED),
    "7b": ("7b", 8192, dict(RECOMPUTED, freeze_vision=True)),
    "7b-offload": ("7b", 32_768, dict(RECOMPUTED, freeze_vision=True, offload="all")),
    "3b-flash": ("3b", 8192, dict(attention="flash")),  # where flash-attn is installed: not by default
    "tiny": ("tiny", 8192, {}),
}
LARGEST = "3b-varlen"  # the case whose packed batch is made larger
STEP = 4096  # tokens
CASE_SECONDS, ALL_SECONDS = 150, 8.5 * 60
STARTED = time.perf_counter()
OUT_OF_MEMORY = "out of GPU memory"


def configuration(size: str):
    from transformers import Qwen2_5_VLConfig

    text, small = TEXT[size], size == "tiny"
    rope = dict(rope_type="default", rope_theta=1e6, mrope_section=[4, 6, 6] if small else [16, 24, 24])
    eyes = dict(depth=2, hidden_size=64, intermediate_size=128, num_heads=4, fullatt_block_indexes=[1])
    if not small:
        eyes = dict(
            depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, fullatt_block_indexes=[7, 15, 23, 31]
        )
    return Qwen2_5_VLConfig(
        text_config=dict(text, num_key_value_heads=KEYS[size], vocab_size=VOCABULARY, rope_parameters=rope),
        vision_config=dict(eyes, window_size=112, out_hidden_size=text["hidden_size"]),
        tie_word_embeddings=size != "7b",
    )


def random_policy(config, chat, cfg, device):
    """Made on the device, without a file."""
    for name in ("image", "video"):
        setattr(config, f"{name}_token_id", chat.tokenizer.convert_tokens_to_ids(f"<|{name}_pad|>"))
    with torch.device(device):
        model = empty_model(config)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter.data, std=0.02)
        else:
            parameter.data.fill_(name.endswith("weight"))  # of a norm
    model.model.visual.requires_grad_(not cfg.freeze_vision)
    prepare(model, chat, cfg)
    model.banned_ids = model.banned_ids.to(device).zero_()
    if cfg.gradient_checkpointing:
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
    shard(model, cfg, device, offload=cfg.offload == "all")
    return model.train()


def operations(model_config, episodes, freeze_vision: bool) -> float:
    """Of forward and backward: two a parameter and token for forward, twice that for backward; attention over the
    causal half; the head where something is predicted; each picture's patches once."""
    text, eyes = model_config.text_config, model_config.vision_config
    sizes = measure(model_config, torch.bfloat16)
    layers = sizes.total - sizes.root - sizes.vision
    tokens, sampled = sum(len(e.tokens) for e in episodes), sum(sum(e.sampled) for e in episodes)
    attention = sum(2 * text.num_hidden_layers * text.hidden_size * len(e.tokens) ** 2 for e in episodes)
    patches = sum(4 * p.tokens for p in {p.key: p for e in episodes for p in e.images}.values())
    windows = 4 * eyes.depth * eyes.hidden_size * patches * (eyes.window_size // eyes.patch_size) ** 2
    forward = 2 * layers * tokens + attention + 2 * text.hidden_size * text.vocab_size * sampled
    return 3 * forward + (1 if freeze_vision else 3) * (2 * sizes.vision * patches + windows)


def matmul_rate(device, dtype) -> float:
    """Operations a second of a large matrix product."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(6):
        wait(device)
        started = time.perf_counter()
        for _ in range(4):
            a @ b
        wait(device)
        seconds.append((time.perf_counter() - started) / 4)
    return 2 * n**3 / min(seconds)


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def settings(name: str, device: str, batch_tokens: int = 0) -> Config:
    _, usual, changes = CASES[name]
    return Config(
        device=device, deterministic=False, threads=0, max_tokens=4096, max_tokens_per_batch=batch_tokens or usual,
        min_pixels=448**2, max_pixels=448**2, thumb_min_pixels=140**2, thumb_max_pixels=140**2, entropy_coef=0,
        **changes,
    )  # fmt: skip


def run_case(name: str, args, batch_tokens: int, pipe) -> None:
    """In a process of its own; sends the figures, or {"error": ...}."""
    try:
        pipe.send(figures(name, args, batch_tokens))
    except torch.OutOfMemoryError:
        pipe.send({"error": OUT_OF_MEMORY})


def figures(name: str, args, batch_tokens: int) -> dict:
    """batch_tokens: 0 for the usual conversations, or the length of one packed batch, filled by conversations of 2,048
    tokens."""
    cfg = settings(name, args.device, batch_tokens)
    device = init_distributed(cfg)
    with tempfile.TemporaryDirectory() as folder:
        save_chat(Path(folder))
        chat = Chat(folder, cfg)
    case = SimpleNamespace(seed=0, images=4, pixels=448)
    case.conversations, case.group, case.length = args.conversations, min(8, args.conversations), (500, 4000)
    if batch_tokens:
        case.conversations, case.group, case.length = batch_tokens // 2048, 2, (2048, 2048)
    samples = conversations(case, chat)
    episodes, questions = [s.episode for s in samples], case.conversations // case.group
    size = CASES[name][0]
    model = random_policy(configuration(size), chat, cfg, device)
    batches = pack(episodes, chat, model, cfg.max_tokens_per_batch)
    planned = planned_bytes(configuration(size), batches, cfg, device) / GIB
    optimizer = adamw(model, cfg, device)
    seconds = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # 7b-offload was made on the GPU
    for _ in range(2 if batch_tokens or cfg.offload == "all" else args.steps + 1):
        wait(device)
        started = time.perf_counter()
        update_policy(model, None, optimizer, samples, questions, chat, cfg, device)
        wait(device)
        seconds.append(time.perf_counter() - started)
    tokens, rate = sum(len(e.tokens) for e in episodes), matmul_rate(device, compute_dtype(cfg, device))
    rates = sorted(tokens / s for s in seconds[1:])
    achieved = operations(configuration(size), episodes, cfg.freeze_vision) / tokens * statistics.median(rates)
    peak = torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else 0.0
    return {
        "tokens": tokens,
        "batch tokens": cfg.max_tokens_per_batch,
        "tokens/s": statistics.median(rates),
        "least": rates[0],
        "most": rates[-1],
        "MFU": achieved / rate,
        "peak GiB": peak,
        "planned GiB": planned,
        "matmul TFLOP/s": rate / 1e12,
        "seconds": seconds,
    }


def planned_bytes(config, batches, cfg, device) -> float:
    """What the plan says of the largest of these packed batches, with as many vision tokens as it has."""
    sizes = measure(config, compute_dtype(cfg, device))
    peaks = []
    for batch in batches:
        with patch.object(plan, "IMAGE_SHARE", len(batch.pixels) / 4 / len(batch.ids)):
            peaks.append(in_update(sizes, cfg, len(batch.ids)))
    return max(peaks)


def in_update(sizes, cfg, tokens: int) -> float:
    """Bytes on the GPU during an update; there is no engine here."""
    return plan.in_all(needs(sizes, replace(cfg, engine="vllm"), 1, 0, tokens)[0])[0]


def alone(name: str, args, batch_tokens: int = 0) -> dict:
    """The figures of a case, or {"error": why there are none}."""
    left = min(CASE_SECONDS, STARTED + ALL_SECONDS - time.perf_counter())
    if left < 20:
        return {"error": f"left out: {ALL_SECONDS:.0f} seconds are over"}
    context = multiprocessing.get_context("spawn")
    mine, its = context.Pipe()
    process = context.Process(target=run_case, args=(name, args, batch_tokens, its))
    process.start()
    its.close()
    try:
        return mine.recv() if mine.poll(left) else {"error": f"not finished after {left:.0f} seconds"}
    except EOFError:
        return {"error": "the process ended early"}
    finally:
        process.kill()
        process.join()


def too_little_memory(name: str) -> str:
    """Why the machine's own memory is too small for an offloaded case, or ""."""
    cfg = settings(name, "cuda")
    _, cpu = needs(measure(configuration(CASES[name][0]), torch.bfloat16), cfg, 1, cache=0)
    free = int(re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    needed = sum(cpu.values()) + (8 * GIB if cfg.offload == "all" else 0)
    return f"needs {needed / GIB:.0f} GiB of the machine's memory, {free / GIB:.0f} are free" if needed > free else ""


def largest_batch(args) -> dict:
    """What the plan promises of this GPU is tried, then larger batches until one does not fit (or smaller ones until
    one does)."""
    cfg = settings(LARGEST, "cuda")
    sizes = measure(configuration(CASES[LARGEST][0]), torch.bfloat16)
    usable = (1 - SPARE) * torch.cuda.get_device_properties(0).total_memory
    promised = bisect(range(1, 2**24), usable, key=partial(in_update, sizes, cfg))
    size, tried = max(STEP, promised // STEP * STEP), {}
    while size and size not in tried and len(tried) < 5:
        result = tried[size] = alone(LARGEST, args, size)
        said = result.get("error") or "{peak GiB:.1f} GiB, planned {planned GiB:.1f}".format(**result)
        print(f"a packed batch of {size} tokens: {said}", flush=True)
        if result.get("error") not in (None, OUT_OF_MEMORY):  # no time
            break
        larger = size + max(STEP, size // 4 // STEP * STEP)
        size = size - STEP if "error" in result else larger
    fits = [size for size, result in tried.items() if "error" not in result]
    return {"promised by the plan": promised, "largest that ran": max(fits, default=0), "tried": tried}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--cases", default="3b-varlen,3b-segments,3b-recomputed,largest,7b,7b-offload")
    parser.add_argument("--conversations", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    machine = platform.processor() or platform.machine()
    if args.device == "cuda":
        machine = torch.cuda.get_device_name()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    results = {"machine": f"{machine}, {versions}", "cases": {}}
    print(results["machine"], flush=True)
    for name in args.cases.split(","):
        problem = too_little_memory(name) if args.device == "cuda" and name in CASES else ""
        if problem:
            result = {"error": problem}
        elif name == "largest":
            result = largest_batch(args)
        else:
            result = alone(name, args)
        results["cases"][name] = result
        shown = []
        for key, value in result.items():
            if key not in ("seconds", "tried"):
                shown.append(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}")
        print(f"{name:14}", "  ".join(shown), flush=True)
        args.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
