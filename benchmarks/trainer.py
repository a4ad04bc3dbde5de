"""How fast a trainer's step is, and what memory it takes, here and in TRL's GRPOTrainer: the same model, the same
conversations, the same loss, on the CPU in fp32.

    pip install trl==1.16.0
    python benchmarks/trainer.py result.json            # 16 conversations of 500 to 4,000 tokens, 4 images, two models
    python benchmarks/trainer.py result.json --sweep    # and other numbers, lengths and images, one at a time
    python benchmarks/trainer.py result.json --quick    # one or two minutes
    python benchmarks/trainer.py result.json --unshared --prompt 1000 --images 1 --conversations 8 \
        --lengths 2000 --batch-tokens 16384             # not beside TRL: what conversations share, once or in each

Prints a table, writes JSON. A step is everything from conversations (token lists, pixels of the images) to gradients:
log-probs, entropies, loss, backward; without sampling, image preprocessing and AdamW. Conversations are synthetic: a
question with an image, reply, result of an image search (thumbnails and text), reply, result of a text search, reply.
Only replies are trained on. The conversations of a question share its image and the thumbnails that its search returns.

    ours       train.update_policy: packing, log-probs of sampled tokens only, each image of a packed batch encoded once
    TRL        GRPOTrainer.training_step over the micro-batches of a step, with loss_type "dapo" and beta 0. Only
               its _generate_and_score_completions is replaced, by one that pads the given conversations as TRL does;
               shuffling, splitting, forward, loss and backward are TRL's own
    head as    the same with the choice of tokens that TRL makes where it has Triton: those of completions, results of
    on a GPU   tools among them. Without Triton it computes logits at every position, prompt and padding too

TRL's micro-batch is the one of --micro-batches that takes the least CPU time; the first step of each is printed as
"tried". Every side is a process of its own. Its first step is the check (loss and gradients against ours) and the
measure of memory, the largest resident set during the step less that before it; the later steps, in turn, are timed.
Tokens are those of the conversations, without padding; a second of CPU time is less disturbed by other processes.
"""

import argparse
import gc
import importlib.metadata as metadata
import io
import json
import math
import multiprocessing
import os
import platform
import random
import resource
import signal
import statistics
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

os.environ["TOKENIZERS_PARALLELISM"] = "false"
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import transformers  # noqa: E402
from PIL import Image  # noqa: E402

import policy  # noqa: E402
from chat import Chat, Episode  # noqa: E402
from config import Config  # noqa: E402
from data import Question  # noqa: E402
from grpo import group_advantages  # noqa: E402
from policy import init_distributed, prepare  # noqa: E402
from toy import model as toy_model  # noqa: E402
from train import Sample, update_policy  # noqa: E402

VOCABULARY = 151_936  # Qwen2.5-VL's; embeddings are tied; see --vocabulary
SIZES = {  # tiny: the toy world's model
    "tiny": dict(hidden=128, layers=4, vision=64, depth=2),
    "larger": dict(hidden=256, layers=10, vision=128, depth=4),
}
REPLY = (24, 72)  # tokens of a reply, at most a quarter of what is left
TOLERANCE = 1e-3


# ------------------------------------------------------------------------------------------ model, conversations


def save_chat(folder: Path) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    toy_model.save_tokenizer(folder)
    Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 1280).save_pretrained(folder)


def settings(case) -> Config:
    return Config(
        device="cpu", deterministic=False, threads=case.threads,
        max_tokens=min(8192, case.batch_tokens), max_tokens_per_batch=case.batch_tokens,
        min_pixels=case.pixels**2, max_pixels=case.pixels**2,
        thumb_min_pixels=(case.pixels // 3) ** 2, thumb_max_pixels=(case.pixels // 3) ** 2,
        max_grad_norm=1e9,  # no clipping: gradients are compared
        entropy_coef=0,  # TRL's loss has none
    )  # fmt: skip


def random_model(size: str, chat: Chat, checkpointing: bool):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    s = SimpleNamespace(**SIZES[size])

    def id_of(name):
        return chat.tokenizer.convert_tokens_to_ids(f"<|{name}|>")

    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=VOCABULARY, hidden_size=s.hidden, intermediate_size=3 * s.hidden, num_hidden_layers=s.layers,
            num_attention_heads=s.hidden // 32, num_key_value_heads=s.hidden // 32, max_position_embeddings=32768,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 6, 6]),
            initializer_range=0.05, bos_token_id=None, eos_token_id=id_of("im_end"), pad_token_id=id_of("endoftext"),
        ),
        vision_config=dict(
            depth=s.depth, hidden_size=s.vision, intermediate_size=2 * s.vision, num_heads=4, window_size=112,
            out_hidden_size=s.hidden, fullatt_block_indexes=[s.depth - 1], initializer_range=0.05,
        ),
        tie_word_embeddings=True, image_token_id=id_of("image_pad"), video_token_id=id_of("video_pad"),
        vision_start_token_id=id_of("vision_start"), vision_end_token_id=id_of("vision_end"),
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    if checkpointing:
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
    return model.train()


def conversations(case, chat: Chat) -> list[Sample]:
    """Conversations with random advantages, the same in every process. Lengths are log-uniform."""
    rng = random.Random(f"conversations {case.seed}")
    low, high = map(math.log, case.length)
    samples = []
    for number in range(case.conversations // case.group):
        question = Question(id=f"question {number}", text="", images=(noise(rng, case.pixels),))
        thumbnails = [noise(rng, case.pixels // 3) for _ in range(case.images - 1)]
        pictures = [chat.picture(question.images[0])]
        pictures += [chat.picture(data, thumbnail=True) for data in thumbnails]
        shown = placeholders(chat, pictures[:1])
        prompt = [*words(rng, chat, case.prompt - len(shown) if case.prompt else 40), *shown]
        for sample in range(case.group):
            length = round(math.exp(rng.uniform(low, high)))
            tokens, sampled = conversation(rng, chat, prompt, pictures[1:], length)
            episode = Episode(question, chat, sample, tokens, sampled, [0.0] * len(tokens), pictures)
            samples.append(Sample(episode, number))
        for picture in pictures:
            chat.pixels([picture])  # cached from here on
    rewards = [rng.random() for _ in samples]
    advantages = group_advantages(rewards, [s.number for s in samples]).tolist()
    for sample, advantage in zip(samples, advantages, strict=True):
        sample.advantage = advantage
    return samples


def conversation(rng, chat, prompt, thumbnails, length) -> tuple[list[int], list[bool]]:
    """(tokens, sampled) of a conversation of `length` tokens: what replies leave is split between the two results."""
    images = placeholders(chat, thumbnails)
    room = length - len(prompt) - len(images)
    if room < 8:
        sys.exit(f"{length} tokens are too few for question and images: {len(prompt) + len(images)}")
    replies = [min(rng.randint(*REPLY), room // 4) for _ in range(3)]
    left = room - sum(replies)
    results = [[*images, *words(rng, chat, left // 2)], words(rng, chat, left - left // 2), []]
    tokens, sampled = list(prompt), [False] * len(prompt)
    for size, result in zip(replies, results, strict=True):
        tokens += [*words(rng, chat, size), *result]
        sampled += [True] * size + [False] * len(result)
    return tokens, sampled


def words(rng, chat, count) -> list[int]:
    """Random text: ids that are no special tokens, from the whole vocabulary."""
    return [rng.randrange(len(chat.tokenizer), VOCABULARY) for _ in range(count)]


def placeholders(chat, pictures) -> list[int]:
    """The tokens of pictures, one placeholder per vision token."""
    ids = []
    for picture in pictures:
        ids += [chat.vision_start, *[chat.image_pad] * picture.tokens, chat.vision_end]
    return ids


def noise(rng, side) -> bytes:
    file = io.BytesIO()
    Image.frombytes("RGB", (side, side), rng.randbytes(3 * side * side)).save(file, "PNG")
    return file.getvalue()


# --------------------------------------------------------------------------------------------------- the two sides


def ours(case, folder):
    """(model, step); step() leaves gradients and returns the loss."""
    cfg = settings(case)
    device = init_distributed(cfg)
    chat = Chat(folder, cfg)
    model = random_model(case.model, chat, case.checkpointing)
    prepare(model, chat, cfg)
    model.banned_ids.zero_()  # TRL bans no ids; the work stays the same
    samples = conversations(case, chat)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # leaves the weights as they are
    questions = case.conversations // case.group

    def step():
        chat.layouts.clear()  # positions are part of the work, of TRL's forward too
        return update_policy(model, None, optimizer, samples, questions, chat, cfg, device)["loss"]

    return model, step


def unshared(case, folder):
    policy.rows = apart  # of this process
    return ours(case, folder)


def apart(episode, seen) -> list[int]:
    """policy.rows with a row for every token of every conversation."""
    first = len(seen)
    seen.update((first + number, None) for number in range(len(episode.tokens)))
    return list(range(first, len(seen)))


def theirs(case, folder, micro: int, like_gpu: bool):
    """The same with TRL, `micro` conversations a micro-batch; like_gpu: logits only at tokens of completions."""
    import trl.trainer.utils

    torch.set_num_threads(case.threads)
    if like_gpu:  # the caller's copy of the name: it picks the tokens, the kernel stays the one for CPUs
        trl.trainer.utils._use_triton = lambda device: True
    chat = Chat(folder, settings(case))
    model = random_model(case.model, chat, case.checkpointing)
    samples = conversations(case, chat)
    trainer = make_trainer(model, chat, case, micro, folder)
    pixels = chat.pixels([p for s in samples for p in s.episode.images])
    trainer._generate_and_score_completions = lambda _: padded(samples, pixels, chat)

    def step():
        trainer._step, trainer._buffered_inputs = 0, None
        return sum(float(trainer.training_step(model, {}, None)) for _ in range(len(samples) // micro))

    return model, step


def make_trainer(model, chat, case, micro, folder):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    accumulate = case.conversations // micro
    args = GRPOConfig(
        output_dir=str(folder / "trl"), use_cpu=True, bf16=False, report_to=[], per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulate, steps_per_generation=accumulate, num_generations=case.group,
        loss_type="dapo", beta=0.0, epsilon=0.2, temperature=1.0, gradient_checkpointing=case.checkpointing,
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": "?"}] * case.conversations)
    trainer = GRPOTrainer(model, lambda **_: 0.0, args, data, processing_class=chat.tokenizer)
    trainer.current_gradient_accumulation_steps = accumulate  # train() sets it
    return trainer


def padded(samples, pixels, chat) -> dict:
    """What GRPOTrainer._generate_and_score_completions returns for these conversations: prompts padded on the left,
    all that follows on the right, to the longest of the step; tool_mask is 0 where the model did not speak."""
    from trl.trainer.utils import pad

    episodes = [s.episode for s in samples]
    prompts, completions, tool_mask = [], [], []
    for episode in episodes:
        start = episode.sampled.index(True)
        prompts.append(torch.tensor(episode.tokens[:start]))
        completions.append(torch.tensor(episode.tokens[start:]))
        tool_mask.append(torch.tensor(episode.sampled[start:]).long())
    filler = chat.tokenizer.pad_token_id
    batch = {
        "prompt_ids": pad(prompts, filler, "left"),
        "prompt_mask": pad([torch.ones_like(ids) for ids in prompts], 0, "left"),
        "completion_ids": pad(completions, filler, "right"),
        "completion_mask": pad([torch.ones_like(ids) for ids in completions], 0, "right"),
        "tool_mask": pad(tool_mask, 1, "right"),
        "advantages": torch.tensor([s.advantage for s in samples]),
        "num_items_in_batch": torch.cat(tool_mask).sum(),
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, *p.grid] for e in episodes for p in e.images]),
        "num_images": [len(e.images) for e in episodes],
    }
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    return {**batch, "mm_token_type_ids": (ids == chat.image_pad).long()}


# ------------------------------------------------------------------------------------------------------ measuring


class Side:
    """A process that makes (model, step) and takes a step whenever it is told to. Forked, so that imports are shared
    and peaks of memory are not."""

    def __init__(self, name: str, make, reference: Path):
        context = multiprocessing.get_context("fork")
        self.name, self.runs = name, []
        self.pipe, far_end = context.Pipe()
        self.process = context.Process(target=serve, args=(far_end, make, reference), daemon=True)
        self.process.start()
        far_end.close()  # or the end of the process would not be noticed

    def step(self) -> dict:
        self.pipe.send("step")
        try:
            self.runs.append(self.pipe.recv())
        except EOFError:
            sys.exit(f"{self.name}: ended early; out of memory?")
        print(f"{self.name}: {self.runs[-1]}", file=sys.stderr, flush=True)
        return self.runs[-1]

    def close(self) -> None:
        self.pipe.send("stop")
        self.process.join()


def serve(pipe, make, reference: Path) -> None:
    """The first step's gradients are compared with those in `reference`, or written there."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    model, step = make()
    first = True
    while pipe.recv() == "step":
        model.zero_grad(set_to_none=True)
        gc.collect()
        before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        started = time.perf_counter(), time.process_time()
        result = {"loss": step()}
        result |= {"seconds": time.perf_counter() - started[0], "cpu_seconds": time.process_time() - started[1]}
        if first:  # later, the peak would be that of the comparison
            result["peak_mb"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 1e6
            result |= compare(model, reference)
        first = False
        pipe.send(result)


def compare(model, reference: Path) -> dict:
    """The norm of the gradients' difference over the norm of those in `reference`."""
    gradients = {name: p.grad for name, p in model.named_parameters()}
    if not reference.exists():
        torch.save(gradients, reference)
        return {}
    expected = torch.load(reference, mmap=True)
    difference = norm(gradients[name] - expected[name] for name in expected)
    return {"gradient_difference": difference / norm(expected.values())}


def norm(tensors) -> float:
    return math.sqrt(sum(float(x.double().square().sum()) for x in tensors))


def measure(case, folder: Path) -> dict:
    """Our side, and TRL's two with the fastest micro-batch each."""
    reference = folder / "gradients.pt"
    reference.unlink(missing_ok=True)
    figures = describe(case, folder)
    side = Side(f"ours, batches of {case.batch_tokens}", lambda: ours(case, folder), reference)
    loss, tried = side.step()["loss"], []
    if case.unshared:
        sides = [side, Side("ours, nothing shared", lambda: unshared(case, folder), reference)]
        first = sides[1].step()
        first["loss_difference"] = abs(first["loss"] - loss) / abs(loss)
    else:
        as_is, as_on_gpu = (fastest(case, folder, reference, loss, like_gpu) for like_gpu in (False, True))
        sides, tried = [side, as_is[0], as_on_gpu[0]], as_is[1] + as_on_gpu[1]
    for _ in range(case.repeats):
        for side in sides:
            side.step()
    for side in sides:
        side.close()
    return {**figures, "sides": [summary(side) for side in sides], "tried": tried}


def fastest(case, folder: Path, reference: Path, loss: float, like_gpu: bool) -> tuple[Side, list[dict]]:
    """TRL's side with the best of the micro-batches, and the first step of each. Exits if one is not the same step as
    ours, whose loss is given."""
    best, tried = None, []
    for micro in (m for m in case.micro_batches if case.conversations % m == 0):
        name = f"TRL{', head as on a GPU' if like_gpu else ''}, micro-batch {micro}"
        side = Side(name, lambda micro=micro: theirs(case, folder, micro, like_gpu), reference)
        first = side.step()
        first["loss_difference"] = abs(first["loss"] - loss) / abs(loss)
        if not max(first["loss_difference"], first["gradient_difference"]) < TOLERANCE:
            sys.exit(f"{name}: not the same step: {first}; our loss: {loss}")
        tried.append(summary(side))
        if best and best.runs[0]["cpu_seconds"] <= first["cpu_seconds"]:
            side.close()
        else:
            if best:
                best.close()
            best = side
    return best, tried


def summary(side: Side) -> dict:
    """The first step's figures, and the seconds of the timed ones (of the first, if there are no others)."""
    first, *timed = side.runs
    times = {name: [run[name] for run in timed or [first]] for name in ("seconds", "cpu_seconds")}
    return {**first, "name": side.name, **times}


def describe(case, folder) -> dict:
    """The case in figures."""
    chat = Chat(folder, settings(case))
    episodes = [s.episode for s in conversations(case, chat)]
    lengths, prompts = [len(e.tokens) for e in episodes], [e.sampled.index(True) for e in episodes]
    width = max(prompts) + max(n - p for n, p in zip(lengths, prompts, strict=True))
    with torch.device("meta"):
        model = random_model(case.model, chat, False)
    embeddings = model.get_input_embeddings().weight.numel()
    return {
        "case": {k: v for k, v in vars(case).items() if k != "repeats"},
        "parameters": sum(p.numel() for p in model.parameters()) - embeddings,
        "embeddings": embeddings,
        "tokens": sum(lengths),
        "sampled": sum(sum(e.sampled) for e in episodes),
        "padded": width * len(episodes),
        "images": sum(len(e.images) for e in episodes),
        "distinct_images": len({p.key for e in episodes for p in e.images}),
    }


def show(result: dict) -> None:
    case, tokens = SimpleNamespace(**result["case"]), result["tokens"]
    low, high = case.length
    print(
        f"\n{case.model}: {result['parameters'] / 1e6:.1f} M parameters and {result['embeddings'] / 1e6:.1f} M of "
        f"embeddings; {case.conversations} conversations of {low} to {high} tokens, {case.images} images each\n"
        f"{tokens} tokens ({result['sampled'] / tokens:.0%} sampled), {result['padded']} with padding; "
        f"{result['images']} images, {result['distinct_images']} distinct"
    )
    print(f"{'':38}{'tokens/s':>10}{'min':>8}{'max':>8}{'a CPU s':>9}{'peak MB':>9}{'loss':>8}{'gradient':>9}")
    for side in result["sides"]:
        rates, per_cpu = ([tokens / s for s in side[name]] for name in ("seconds", "cpu_seconds"))
        loss, gradient = (f"{side[k]:.0e}" if k in side else "" for k in ("loss_difference", "gradient_difference"))
        print(
            f"{side['name']:38}{statistics.median(rates):10.0f}{min(rates):8.0f}{max(rates):8.0f}"
            f"{statistics.median(per_cpu):9.0f}{side['peak_mb']:9.0f}{loss:>8}{gradient:>9}"
        )
    tried = (
        f"{side['name']}: {side['cpu_seconds'][0]:.1f} CPU s, {side['peak_mb']:.0f} MB" for side in result["tried"]
    )
    print("tried", *tried, sep="\n    ", flush=True)


def machine() -> dict:
    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": metadata.version("trl") if find_spec("trl") else "none",
    }


# ---------------------------------------------------------------------------------------------------- command line


def length(text: str) -> tuple[int, int]:
    """'500-4000', or '1000' for 1000 to 1000."""
    low, high = (text.split("-") * 2)[:2]
    return int(low), int(high)


def parse():
    p = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog="Of several values, see --sweep.")
    p.add_argument("out", help="the JSON file to write")
    p.add_argument("--models", nargs="+", choices=SIZES, default=list(SIZES))
    p.add_argument("--conversations", nargs="+", type=int, default=[16, 4, 8])
    p.add_argument(
        "--lengths", nargs="+", type=length, default=[(500, 4000), *((n, n) for n in (500, 1000, 2000, 4000))]
    )
    p.add_argument("--images", nargs="+", type=int, default=[4, 1, 2])
    p.add_argument("--sweep", action="store_true", help="not only the first of each, also each other with those")
    p.add_argument("--micro-batches", nargs="+", type=int, default=[1, 2, 4], help="TRL's; the best counts")
    p.add_argument("--batch-tokens", type=int, default=8192, help="tokens of our packed batches, at most")
    p.add_argument("--group", type=int, default=8, help="conversations of a question, at most")
    p.add_argument("--unshared", action="store_true", help="beside ours where conversations share nothing, not TRL")
    p.add_argument("--prompt", type=int, default=0, help="tokens of a prompt, image included [40 and the image's]")
    p.add_argument("--vocabulary", type=int, default=VOCABULARY, help="a small one leaves the head out of the picture")
    p.add_argument("--pixels", type=int, default=336, help="side of a question's image; a thumbnail's is a third")
    p.add_argument("--checkpointing", action="store_true", help="both sides recompute layers in backward")
    p.add_argument("--threads", type=int, default=1, help="of each side, [1] as train.py's")
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--quick", action="store_true", help="4 conversations of 150 to 300 tokens, the tiny model")
    args = p.parse_args()
    if args.quick:
        args.models, args.conversations, args.lengths, args.images = ["tiny"], [4], [(150, 300)], [4]
        args.micro_batches, args.pixels = [4], 168
    for count in args.conversations:
        if math.gcd(count, args.group) < 2 or all(count % micro for micro in args.micro_batches):
            p.error(f"{count} conversations: not in groups of two or more, or in none of the micro-batches")
    return args


KEPT = ("batch_tokens", "pixels", "prompt", "unshared", "checkpointing", "threads", "repeats", "seed")


def cases(args) -> list[SimpleNamespace]:
    common = {k: getattr(args, k) for k in KEPT}
    first = (args.conversations[0], args.lengths[0], args.images[0])
    chosen = [first]
    if args.sweep:
        chosen += [(n, *first[1:]) for n in args.conversations[1:]]
        chosen += [(first[0], n, first[2]) for n in args.lengths[1:]]
        chosen += [(*first[:2], n) for n in args.images[1:]]
    return [
        SimpleNamespace(
            model=model, conversations=count, length=span, images=images, group=math.gcd(args.group, count),
            micro_batches=args.micro_batches, **common,
        )
        for model in args.models
        for count, span, images in chosen
    ]  # fmt: skip


def main() -> None:
    global VOCABULARY
    args = parse()
    VOCABULARY = args.vocabulary
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # or the processes of the sides would stay
    torch.set_num_threads(1)  # in this process: a pool of threads would not survive the forks
    report = {"machine": machine(), "threads": args.threads, "repeats": args.repeats, "results": []}
    print(", ".join(f"{name} {value}" for name, value in report["machine"].items()) + f", threads {args.threads}")
    with tempfile.TemporaryDirectory() as folder:
        save_chat(Path(folder))
        for case in cases(args):
            report["results"].append(measure(case, Path(folder)))
            show(report["results"][-1])
            Path(args.out).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
