"""What it would save to train on the prompt that the rollouts of a question share once, instead of once per rollout.

    OMP_NUM_THREADS=1 python benchmarks/shared_prefix.py [--quick] [--out shared_prefix.json]

A shared batch holds a question's prompt once and, behind it, what followed in each conversation. Two conversations with
a prompt of 3 tokens, `x` sampled:

    plain          u  u  u  x  x | u  u  u  x          shared         u  u  u | x  x | x
    positions      0  1  2  3  4   0  1  2  3          positions      0  1  2   3  4   3
    predict              2  3            7             predict              2   3             and 2 once more
                                                       parents        -1        0      0

A segment attends to its parent, all of it, and causally to itself; the gradients of all branches meet in the prompt.
The rest of the trainer (`policy.packed_logprobs`) stays as it is. First the script checks that log-probs and gradients
of the two kinds of batch agree within 1e-5, on a model with sharp attention and grouped heads, and stops if they do
not. Then it times forward and backward, each in a process of its own, plain and shared in turn. Seconds are CPU time on
one thread (what a clock shows on an idle machine); memory is the peak above what the loaded model needs (Linux only).
The ideal is the quotient of the numbers of tokens; attention inside the prompt is saved, too, attention to it is not.

What it would cost in policy.py and backbone.py: 44 lines for `share`, 43 for the attention and its mask, some 10 for a
field of PackedBatch, its way through `packed_hidden` and `packed_attention`, and the concatenated keys of the CUDA
kernels: just under 100, before tests and an option. It was to enter the product only if it wins and costs less than
that; RESULTS.md says why it did not.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import cache, partial
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).parent.parent))
import backbone
import policy
from chat import Chat, Episode
from config import Config
from data import Question
from toy import model as toy_model

SHARED = "shared_prefix"  # the name of the attention function
BLOCK = 512  # queries for which SDPA gets a mask at one time
PROMPT, SIDE = 1000, 392  # tokens of the prompt; pixels of the picture's side: 196 of these tokens
MODELS = {"tiny": (128, 4), "ten times": (448, 4)}  # hidden size, layers: 0.9 and 10 million parameters in the layers
CASES = [(8, n) for n in (200, 500, 1000, 2000, 4000)] + [(g, 500) for g in (2, 4, 16)]
QUICK = [(8, 200), (8, 1000), (2, 500)]
TOLERANCE = 1e-5


# ----------------------------------------------------------------------------------------------------- packing


def share(batch: policy.PackedBatch) -> tuple[policy.PackedBatch, list[int]]:
    """(the batch with each prompt once; for each segment the one that it continues, or -1).

    A prompt is what comes before the first sampled token. Prompts are the same if their tokens and vision tokens are.
    """
    features = torch.full_like(batch.ids, -1)
    features[batch.vision_positions] = batch.vision_rows
    seen: dict[bytes, tuple[int, int]] = {}  # a prompt -> its segment, its first token in the shared batch
    lengths, parents = [], []
    new, kept = torch.empty_like(batch.ids), torch.zeros_like(batch.ids, dtype=torch.bool)

    def add(start, end, parent):
        new[start:end] = torch.arange(end - start) + sum(lengths)
        kept[start:end] = True
        lengths.append(end - start)
        parents.append(parent)

    for number, (start, end) in enumerate(pairwise(batch.cu_seqlens.tolist())):
        first = batch.predict[batch.sequence == number][:1]
        split = int(first) + 1 if len(first) else end
        prompt = torch.stack([batch.ids[start:split], features[start:split]]).numpy().tobytes()
        if prompt not in seen:
            seen[prompt] = len(lengths), sum(lengths)
            add(start, split, -1)
        segment, place = seen[prompt]
        new[start:split] = torch.arange(split - start) + place
        if split < end:
            add(split, end, segment)
    stays = kept[batch.vision_positions]
    shared = replace(
        batch,
        ids=batch.ids[kept],
        positions=batch.positions[:, kept],
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        longest=max(lengths),
        vision_rows=batch.vision_rows[stays],
        vision_positions=new[batch.vision_positions[stays]],
        predict=new[batch.predict],
    )
    return shared, parents


# --------------------------------------------------------------------------------------------------- attention


def shared_attention(module, query, key, value, attention_mask=None, *, parents, scaling, cu_seq_lens_q, **_):
    """As backbone.packed_attention, in a batch of `share`: query [1, heads, T, D] to ([1, T, heads, D], None)."""
    key, value = (backbone.repeat_heads(x, query.shape[1]) for x in (key, value))
    lengths = cu_seq_lens_q.diff().tolist()
    queries = query.split(lengths, 2)
    keys, values = (segment_keys(x, lengths, parents) for x in (key, value))
    outs = []
    for q, k, v in zip(queries, keys, values, strict=True):
        if q.shape[2] == k.shape[2]:
            outs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling))
        else:
            outs += lower_right(q, k, v, scaling)
    return torch.cat(outs, 2).transpose(1, 2), None


def segment_keys(x: Tensor, lengths: list[int], parents: list[int]) -> list[Tensor]:
    """The keys (or values) of each segment: its parent's in front of its own."""
    own = x.split(lengths, 2)
    found = []
    for x, parent in zip(own, parents, strict=True):
        found.append(x if parent < 0 else torch.cat([own[parent], x], 2))
    return found


def lower_right(query, key, value, scaling) -> list[Tensor]:
    """Causal attention of the last L of K tokens, in blocks of queries: on a CPU, SDPA computes what a mask hides, and
    its own causal mask is aligned to the upper left."""
    length, total = query.shape[2], key.shape[2]
    outs = []
    for start in range(0, length, BLOCK):
        q = query[:, :, start : start + BLOCK]
        seen = total - length + start + q.shape[2]
        mask = lower_right_mask(-(-seen // 4096) * 4096)[-q.shape[2] :, -seen:]
        outs.append(F.scaled_dot_product_attention(q, key[:, :, :seen], value[:, :, :seen], mask, scale=scaling))
    return outs


@cache
def lower_right_mask(keys: int) -> Tensor:
    """[BLOCK, keys], to add to the scores; every smaller mask is a corner of it. SDPA would turn a boolean mask into
    numbers, and keep them for backward, at each call."""
    return torch.full((BLOCK, keys), -torch.inf).triu(keys - BLOCK + 1)


# ------------------------------------------------------------------------------------- models and conversations


def save_model(folder: Path, hidden: int, layers: int, sharp: bool = False) -> None:
    """A random model; sharp: with grouped heads and weights that are far from the uniform attention of a new one."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    toy_model.save_random_model(folder, seed=0)
    config = backbone.read_config(folder)
    text, heads = config.text_config, hidden // 32
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = hidden, 3 * hidden, layers
    text.num_attention_heads, text.num_key_value_heads = heads, heads // 2 if sharp else heads
    text.layer_types = ["full_attention"] * layers
    config.vision_config.out_hidden_size = hidden
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters() if sharp else ():
            parameter.copy_(2.5 * parameter if parameter.ndim > 1 else parameter + 0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)


def load(folder: Path):
    cfg = replace(Config(threads=1), min_pixels=28 * 28, max_pixels=SIDE * SIDE)
    device = policy.init_distributed(replace(cfg, device="cpu"))
    chat = Chat(folder, cfg)
    return policy.load_policy(folder, chat, cfg, device), chat


def picture(seed: int, side: int) -> bytes:
    """Noise, encoded."""
    noise = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


def conversation(chat, question: Question, prompt: int, response: int, seed: int, tool_image: bool = False) -> Episode:
    """The picture of the question, if it has one, in a prompt of random words that only the question decides; then a
    tenth of the response is said, eight tenths are results, a tenth is said."""
    images = [chat.picture(data) for data in question.images]
    start = []
    for image in images:
        start += [chat.vision_start, *[chat.image_pad] * image.tokens, chat.vision_end]
    said = max(1, response // 10)
    thumbnail = [chat.picture(picture(seed, 28), thumbnail=True)] if tool_image else []
    results = [chat.image_pad] * sum(image.tokens for image in thumbnail)
    tokens = start + words(prompt - len(start), int(question.id)) + words(said, seed)
    tokens += results + words(response - 2 * said - len(results), seed + 1) + words(said, seed + 2)
    sampled = [False] * prompt + [True] * said + [False] * (response - 2 * said) + [True] * said
    return Episode(question, chat, seed, tokens, sampled, [0.0] * len(tokens), images + thumbnail)


def words(count: int, seed: int) -> list[int]:
    return torch.randint(300, 500, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def group(chat, number: int, samples: int, prompt: int, response: int, side: int = SIDE) -> list[Episode]:
    """The rollouts of a question; their responses are `response` tokens long on average, from 0.8 to 1.2 times that."""
    question = Question(str(number), "", (picture(number, side),) if side else ())
    factors = torch.linspace(0.8, 1.2, samples).tolist() if samples > 1 else [1.0]
    episodes = []
    for sample, factor in enumerate(factors):
        seed = 1000 * number + 10 * sample
        episodes.append(conversation(chat, question, prompt, round(response * factor), seed))
    return episodes


# ------------------------------------------------------------------------------------------------------- a step


def step(model, batch: policy.PackedBatch, shared: bool) -> Tensor:
    """Forward and backward: log-probs [S]; gradients stay in the model."""
    parents = None
    if shared:
        batch, parents = share(batch)
    use_attention(model, parents)
    logp, _, zero = model.packed_logprobs(batch, 1.0)
    (-(logp * torch.linspace(0.5, 1.5, len(logp))).sum() + zero).backward()
    return logp.detach()


def use_attention(model, parents: list[int] | None) -> None:
    """The decoder's; the vision tower keeps its own."""
    from transformers import AttentionInterface

    AttentionInterface.register(SHARED, partial(shared_attention, parents=parents))
    text = model.config.text_config
    text._attn_implementation_internal = backbone.ATTENTION if parents is None else SHARED


def check(folder: Path) -> dict[str, float]:
    """The largest gaps between plain and shared, relative to the largest number of each tensor."""
    save_model(folder, 128, 4, sharp=True)
    model, chat = load(folder)
    episodes = group(chat, 1, 4, 300, 200, 112) + group(chat, 2, 3, 40, 700, 0) + group(chat, 3, 1, 50, 30, 56)
    first = episodes[0]  # more with its prompt: a tool's picture; the length of another; two that say nothing
    episodes.append(conversation(chat, first.question, 300, 100, seed=7, tool_image=True))
    episodes.append(conversation(chat, first.question, 300, 100, seed=8))
    silent = (first.tokens[:300], [False] * 300, [0.0] * 300, first.images)
    episodes += [Episode(first.question, chat, 90, *silent), Episode(first.question, chat, 91, *silent)]
    batch = pack_all(episodes, chat, model)
    assert len(batch.ids) - len(share(batch)[0].ids) == 7 * 300 + 2 * 40
    found = []
    for shared in (False, True):
        model.zero_grad()
        logp = step(model, batch, shared)
        found.append({"logp": logp} | {name: p.grad.clone() for name, p in model.named_parameters()})
    plain, other = found
    gaps = {name: float((other[name] - x).abs().max() / x.abs().max()) for name, x in plain.items()}
    return {"log-probs": gaps.pop("logp"), "gradients": max(gaps.values())}


def pack_all(episodes: list[Episode], chat, model) -> policy.PackedBatch:
    return policy.pack_batch(episodes, [0.0] * len(episodes), chat, model)


def measure(folder: str, samples: int, response: int, shared: bool) -> dict:
    """A step of one question, after a small one to warm up."""
    model, chat = load(Path(folder))
    before = memory_mb("VmRSS")
    for shape in ((2, 300, 50), (samples, PROMPT, response)):
        batch = pack_all(group(chat, 1, *shape), chat, model)
        model.zero_grad()
        clock, cpu = time.perf_counter(), time.process_time()
        logp = step(model, batch, shared)
        cpu, clock = time.process_time() - cpu, time.perf_counter() - clock
    tokens, peak = len(share(batch)[0].ids if shared else batch.ids), memory_mb("VmHWM")
    found = {"seconds": cpu, "clock": clock, "mb": peak - before, "process_mb": peak, "tokens": tokens}
    return {**found, "logp": float(logp.double().mean())}


def memory_mb(name: str) -> float:
    """Memory of this process alone: getrusage's peak starts with that of the process that started it."""
    return int(re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


# ----------------------------------------------------------------------------------------------------- the table


def compare(name: str, folder: Path, samples: int, response: int, repeats: int) -> dict:
    """Plain and shared in turn, each in a process of its own."""
    runs = {"plain": [], "shared": []}
    for _ in range(repeats):
        for kind, found in runs.items():
            job = json.dumps([str(folder), samples, response, kind == "shared"])
            done = subprocess.run([sys.executable, __file__, "--job", job], stdout=subprocess.PIPE, check=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    plain, shared = runs["plain"], runs["shared"]
    gap = max(abs(a["logp"] / b["logp"] - 1) for a, b in zip(plain, shared, strict=True))
    if gap > TOLERANCE:
        sys.exit(f"{name}, {samples} x {response}: mean log-probs differ by {gap:.1e}")
    quotients = [a["seconds"] / b["seconds"] for a, b in zip(plain, shared, strict=True)]
    return {
        "model": name, "samples": samples, "response": response, "ideal": plain[0]["tokens"] / shared[0]["tokens"],
        "speed_up": statistics.median(quotients), "speed_ups": quotients,
        "memory": median(plain, "mb") / median(shared, "mb"), **runs,
    }  # fmt: skip


def median(runs: list[dict], key: str) -> float:
    return statistics.median(run[key] for run in runs)


COLUMNS = "{:9} {:>3} {:>8}  {:>6} {:>6}  {:>20} {:>20}  {:>9} {:>11} {:>5}  {:>6} {:>6}"
HEADER = COLUMNS.format(
    "model", "G", "response", "tokens", "shared", "seconds, plain", "shared", "speed-up", "", "ideal", "MB", "shared"
)


def line(case: dict) -> str:
    def spread(values):
        return f"({min(values):.2f}-{max(values):.2f})"

    def seconds(runs):
        return f"{median(runs, 'seconds'):.2f} {spread([run['seconds'] for run in runs])}"

    plain, shared = case["plain"], case["shared"]
    return COLUMNS.format(
        case["model"], case["samples"], case["response"], plain[0]["tokens"], shared[0]["tokens"],
        seconds(plain), seconds(shared), f"{case['speed_up']:.2f}", spread(case["speed_ups"]), f"{case['ideal']:.2f}",
        round(median(plain, "mb")), round(median(shared, "mb")),
    )  # fmt: skip


def machine() -> str:
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    cpu = cpu[1] if cpu else platform.machine()
    return f"{cpu}, {os.cpu_count()} cores, one thread used; torch {torch.__version__}"


def main(quick: bool, out: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        gaps = check(Path(folder) / "sharp")
        print("largest relative gap:", ", ".join(f"{name} {gap:.1e}" for name, gap in gaps.items()), flush=True)
        if not max(gaps.values()) < TOLERANCE:
            sys.exit(f"shared batches are not exact to {TOLERANCE}")
        print(machine(), HEADER, sep="\n", flush=True)
        cases = []
        for name, shape in list(MODELS.items())[: 1 if quick else None]:
            save_model(Path(folder) / name, *shape)
            for samples, response in QUICK if quick else CASES:
                cases.append(compare(name, Path(folder) / name, samples, response, repeats=1 if quick else 3))
                print(line(cases[-1]), flush=True)
                Path(out).write_text(json.dumps({"machine": machine(), "gaps": gaps, "cases": cases}, indent=1))


if __name__ == "__main__":
    disable_progress_bar()
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="three cases of the tiny model, once: about a minute")
    parser.add_argument("--out", default="shared_prefix.json")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        print(json.dumps(measure(*json.loads(arguments.job))))
    else:
        main(arguments.quick, arguments.out)
