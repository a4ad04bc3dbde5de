"""Training speed and memory on one GPU: randomly initialised Qwen2.5-VL of 3B and 7B size, bf16, packed conversations.

    python benchmarks/gpu_train.py result.json                              # an H200: about 8 minutes
    python benchmarks/gpu_train.py result.json --device cpu --cases tiny    # that it runs, a minute

A case is a size, an attention backend and whether layers are recomputed; each runs in a process of its own. A step is
everything from conversations to new weights (AdamW; of 7B on the CPU). Prints a table, writes JSON:

    tokens/s   of the conversations, median of the steps after the first
    MFU        floating point operations of forward and backward, recomputation not counted, over the rate of a bf16
               matrix product on the same device
    peak       GiB, and what `plan.py` says of the same row

Then, for the first case, rows are doubled until memory runs out: the largest that ran, and what --plan promises.
"""

import argparse
import json
import multiprocessing
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "benchmarks"))

import torch  # noqa: E402
from trainer import conversations, save_codec  # noqa: E402

from config import Config  # noqa: E402
from data import Codec  # noqa: E402
from plan import GIB, activations, measure, needs  # noqa: E402
from policy import compute_dtype, empty_model, init_distributed, prepare, shard  # noqa: E402
from train import train_step  # noqa: E402

VOCABULARY = 151_936
TEXT = {  # from the configurations of Qwen2.5-VL
    "tiny": dict(hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4),
    "3b": dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16),
    "7b": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28),
}
KEYS = {"tiny": 4, "3b": 2, "7b": 4}
CASES = {  # size, attention, checkpointing, AdamW's state and the masters on the CPU
    "3b": ("3b", "auto", False, False), "3b-recomputed": ("3b", "auto", True, False),
    "3b-varlen": ("3b", "varlen", False, False), "3b-segments": ("3b", "segments", False, False),
    "7b-offload": ("7b", "auto", True, True), "tiny": ("tiny", "auto", False, False),
}  # fmt: skip


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


def random_policy(size, codec, cfg, device):
    """Made on the device, without a file."""
    config = configuration(size)
    for name in ("image", "video"):
        setattr(config, f"{name}_token_id", codec.tokenizer.convert_tokens_to_ids(f"<|{name}_pad|>"))
    with torch.device(device):
        model = empty_model(config)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter.data, std=0.02)
    prepare(model, codec, cfg)
    model.banned_ids = model.banned_ids.to(device).zero_()
    if cfg.gradient_checkpointing:
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
    shard(model, cfg, device, cfg.offload_optimizer)
    return model.train()


def operations(model_config, episodes) -> float:
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
    return 3 * (forward + 2 * sizes.vision * patches + windows)


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


def settings(name: str, args, row: int) -> Config:
    size, attention, again, offload = CASES[name]
    return Config(
        device=args.device, deterministic=False, threads=0, max_tokens=8192, max_tokens_per_batch=row,
        attention=attention, gradient_checkpointing=again, offload_optimizer=offload, entropy_coef=0,
        min_pixels=448**2, max_pixels=448**2, thumb_min_pixels=140**2, thumb_max_pixels=140**2,
    )  # fmt: skip


def run_case(name: str, args, row: int, count: int, pipe) -> None:
    """In a process of its own; sends the figures, or {"error": ...}."""
    try:
        pipe.send(figures(name, args, row, count))
    except torch.OutOfMemoryError:
        pipe.send({"error": "out of memory"})


def figures(name, args, row, count):
    cfg = settings(name, args, row)
    device = init_distributed(cfg)
    with tempfile.TemporaryDirectory() as folder:
        save_codec(Path(folder))
        codec = Codec(folder, cfg)
    case = SimpleNamespace(
        seed=0, conversations=count, group=min(8, count), images=4, pixels=448, length=(500, 4000)
    )  # fmt: skip
    episodes, advantages = conversations(case, codec)
    size = CASES[name][0]
    model = random_policy(size, codec, cfg, device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-6)
    seconds = []
    for _ in range(args.steps + 1):
        wait(device)
        started = time.perf_counter()
        train_step(model, None, optimizer, episodes, advantages, [0] * len(episodes), codec, cfg, device)
        wait(device)
        seconds.append(time.perf_counter() - started)
    tokens, spent = sum(len(e.tokens) for e in episodes), statistics.median(seconds[1:])
    peak = torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else 0.0
    rate = matmul_rate(device, compute_dtype(cfg, device))
    planned = replace(cfg, max_tokens_per_batch=max(cfg.max_tokens, min(row, tokens)))
    gpu, _ = needs(measure(configuration(size), compute_dtype(cfg, device)), planned, 1, cache=0)
    engine = gpu["engine's weights"][0]  # there is none here
    achieved = operations(configuration(size), episodes) / spent
    return {
        "tokens": tokens, "row": row, "tokens/s": tokens / spent, "MFU": achieved / rate,
        "peak GiB": peak, "planned GiB": (sum(update for update, _ in gpu.values()) - engine) / GIB,
        "matmul TFLOP/s": rate / 1e12, "seconds": seconds,
    }  # fmt: skip


def alone(*args) -> dict:
    context = multiprocessing.get_context("spawn")
    mine, its = context.Pipe()
    process = context.Process(target=run_case, args=(*args, its))
    process.start()
    its.close()
    try:
        return mine.recv()
    except EOFError:
        return {"error": "ended early"}
    finally:
        process.join()


def largest_row(name, args) -> dict:
    """Rows doubled until one does not fit, beside what the plan says of this GPU."""
    row, fits = 16_384, 0
    while row <= 2**20:
        result = alone(name, argparse.Namespace(**{**vars(args), "steps": 1}), row, row // 1500)
        print(f"a row of {row}: {result.get('error') or 'fits'}", file=sys.stderr)
        if "error" in result:
            break
        row, fits = 2 * row, row
    cfg = settings(name, args, 16_384)
    sizes = measure(configuration(CASES[name][0]), torch.bfloat16)
    gpu, _ = needs(sizes, cfg, 1, cache=0)
    rest = sum(update for part, (update, _) in gpu.items() if part not in ("activations", "engine's weights"))
    memory = torch.cuda.get_device_properties(0).total_memory
    return {"fits": fits, "does not": row, "planned": int((0.92 * memory - rest) / activations(sizes, cfg))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--cases", default="3b,3b-recomputed,3b-varlen,3b-segments,7b-offload")
    parser.add_argument("--conversations", type=int, default=16)
    parser.add_argument("--row", type=int, default=16_384)
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    machine = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    results = {"machine": f"{machine}, torch {torch.__version__}", "cases": {}}
    print(results["machine"])
    for name in args.cases.split(","):
        results["cases"][name] = result = alone(name, args, args.row, args.conversations)
        shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in result.items() if k != "seconds"}
        print(f"{name:16}", "  ".join(f"{k} {v}" for k, v in shown.items()), flush=True)
    if args.device == "cuda":
        results["largest row"] = largest_row(args.cases.split(",")[0], args)
        print(results["largest row"])
    args.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
