"""The model and the processes: loading and sharding (FSDP2), adapters, packing, log-probs, the optimiser step.

Parallelism is applied from outside: the model is transformers' own, its blocks are wrapped by `fully_shard`, and one
extra root method (`packed_logprobs`) is registered with FSDP. A single fp32 process has nothing to shard and uses the
same methods on the plain model.

Episodes are packed whole, one behind the other, into batches without padding; what conversations of a question begin
with in common stands once, and the keys of a segment say where its whole conversation is. Two episodes of a question,
of 4 and 3 tokens, `x` trained on, `i` an image placeholder:

    row            0  1  2  3 | 4
    token          u  i  x  x | y                the second one is u i y
    cu_seqlens     0          4  5               a segment's queries are the last of its keys, ...
    keys           0  1  2  3 | 0  1  4          ... and each of them attends to those up to itself
    cu_keys        0          4        7
    predict           1  2      1                hidden states whose next token is trained on
    target            x  x      y
    sequence          0  0      1

Axes: T tokens of a packed batch, K keys (the tokens of its conversations, one by one), S of these trained on,
N episodes, H hidden size, V vocabulary, P image patches, C vision tokens (merged patches), D head dimension.
"""

import math
import os
import sys
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from itertools import accumulate
from pathlib import Path
from types import MethodType

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import backbone
from chat import Chat, Episode
from config import Config, need
from grpo import token_weights

# Logits that exist at one time, in each of two forms: 110 or 882 tokens of a vocabulary of 152,064. On a GPU the
# gradient of the head is summed in bf16, and each part costs it a rounding.
HEAD_LOGITS = {"cpu": 2**24, "cuda": 2**27}
RANK_WAITS = timedelta(hours=3)  # for the slowest rank, in a rollout or a validation


# ----------------------------------------------------------------------------------------------------- processes
def init_distributed(cfg: Config) -> torch.device:
    """Join the process group that torchrun describes (or one of a single process); returns this rank's device."""
    use_cuda = torch.cuda.is_available() if cfg.device == "auto" else cfg.device == "cuda"
    need(not use_cuda or torch.cuda.is_available(), "device=cuda: this machine has no CUDA device that torch can use")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans 0.1 to 1 s for each shape, and every batch has its own
    if not use_cuda or cfg.offload == "all":  # the optimiser then runs on the CPU, too
        torch.set_num_threads(cfg.threads or max(1, (os.cpu_count() or 1) // local_world()))
        if use_cuda:
            os.environ["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # unless it is set, vLLM goes back to one
    if is_deterministic(cfg, device):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # costs a tenth of the time
    if not dist.is_initialized():
        where = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
        backend = "cuda:nccl,cpu:gloo" if use_cuda else "gloo"
        dist.init_process_group(backend, timeout=RANK_WAITS, **where)
    for name in ("shard_size", "tensor_parallel"):
        size, ranks = getattr(cfg, name) or 1, dist.get_world_size()
        need(ranks % size == 0, f"{name}={size} does not divide the {ranks} ranks")
    return device


def is_deterministic(cfg: Config, device: torch.device) -> bool:
    """Whether a run with these options is repeated to the bit: what clock, web, vLLM or a judge decide never is."""
    if cfg.deterministic is not None:
        return cfg.deterministic
    repeatable = cfg.engine == "torch" and cfg.search in ("offline", "replay") and cfg.reward == "match"
    return device.type == "cpu" and repeatable and not cfg.rollout_deadline and not cfg.carry_over


def compute_dtype(cfg: Config, device: torch.device) -> torch.dtype:
    bf16 = device.type == "cuda" if cfg.dtype == "auto" else cfg.dtype == "bf16"
    return torch.bfloat16 if bf16 else torch.float32


def all_sum(values: dict[str, float], device) -> dict[str, float]:
    """Sum each value over the ranks (float64)."""
    flat = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(flat)
    return dict(zip(values, flat.tolist(), strict=True))


def all_gather(items: list) -> list:
    """The lists of all ranks, joined in the order of the ranks."""
    parts = [items] * dist.get_world_size()
    if len(parts) > 1:
        dist.all_gather_object(parts, items)  # pickling a step's records is slow
    return [item for part in parts for item in part]


def all_to_all(outbox: list[list]) -> list[list]:
    """outbox[r]: picklable objects for rank r. Returns what each rank had for this one. All ranks must call it."""
    inbox = []
    for source in range(dist.get_world_size()):
        box = [None]
        dist.scatter_object_list(box, outbox, source)
        inbox += box
    return inbox


def say(text: str) -> None:
    """Print a line on stderr, once for all ranks; nothing if it is empty."""
    if text and dist.get_rank() == 0:
        print(text, file=sys.stderr)


# ----------------------------------------------------------------------------------------------------- the model
def load_policy(folder: str | Path, chat: Chat, cfg: Config, device, *, trainable=True, offload=False, like=None):
    """A model from a Hugging Face folder or hub id, sharded over the ranks, master weights in fp32; with lora_rank,
    adapters in fp32 on weights in the type that is computed in.

    Rank 0 reads the weights and the others receive their shards from it, so that a node needs one copy of them in
    memory. offload: parameters, gradients and optimiser state live in CPU memory (FSDP2's CPU offload). like: a model
    loaded from this folder, whose shards are copied instead. Raises InputError for a folder that holds no such model.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    reads = dist.get_rank() == 0 and like is None
    model = backbone.read_model(folder, empty=not reads)
    model.requires_grad_(trainable)
    if cfg.freeze_vision:
        model.model.visual.requires_grad_(False)
    if cfg.lora_rank and trainable:
        add_adapters(model, cfg, compute_dtype(cfg, device))
    weights = model.state_dict() if reads else {}
    prepare(model, chat, cfg)
    if trainable and cfg.gradient_checkpointing:
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
    shard(model, cfg, device, offload)
    if like is not None:
        with torch.no_grad():
            for mine, theirs in zip(model.parameters(), like.parameters(), strict=True):
                mine.copy_(theirs)
    elif dist.get_world_size() > 1:
        set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    return model.train(trainable)


def prepare(model, chat: Chat, cfg: Config) -> None:
    """Give a plain model what this code needs: packed attention, the root method, the ids it may not say."""
    from transformers import AttentionInterface

    available = cfg.attention != "flash" or backbone.has_flash_attn()
    need(available, "attention=flash: flash-attn is not installed; 'auto' takes the best kernel there is")
    AttentionInterface.register(backbone.ATTENTION, partial(backbone.packed_attention, kind=cfg.attention))
    model.config._attn_implementation = backbone.ATTENTION
    model.config.use_cache, vocabulary = False, model.config.text_config.vocab_size
    backbone.check_chat(model.config, chat)
    model.banned_ids = torch.zeros(vocabulary, dtype=torch.bool)
    model.banned_ids[chat.banned_ids(vocabulary)] = True
    model.packed_logprobs = MethodType(packed_logprobs, model)
    embed = model.model.visual.patch_embed
    embed.forward = MethodType(backbone.embed_patches, embed)


def shard(model, cfg: Config, device, offload: bool = False) -> None:
    """FSDP2 from outside: each of `backbone.blocks` is a unit, the rest (embedding, head, merger) the root's."""
    from torch.distributed import fsdp

    world, size = dist.get_world_size(), cfg.shard_size or dist.get_world_size()
    shape, names = ((size,), ("shard",)) if size == world else ((world // size, size), ("replicate", "shard"))
    options = dict(mesh=dist.init_device_mesh(device.type, shape, mesh_dim_names=names))
    if compute_dtype(cfg, device) == torch.bfloat16:  # inputs are bf16 where they have to be; RoPE's cosines are not
        options["mp_policy"] = fsdp.MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    if offload and device.type == "cuda":
        options["offload_policy"] = fsdp.CPUOffloadPolicy(room_to_pin(model, local_world() / size))
    if world == 1 and len(options) == 1:
        model.to(device)  # one process in fp32: nothing to shard, cast or offload
        return
    for block in (*backbone.blocks(model), model):
        fsdp.fully_shard(block, **options)
    fsdp.register_fsdp_forward_method(model, "packed_logprobs")


def local_world() -> int:
    """How many of torchrun's ranks run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def room_to_pin(model, copies: float) -> bool:
    """Whether this machine's memory holds `copies` of the weights, and of gradients and AdamW's state where there are
    any, if weights and gradients are pinned: faster to copy, but torch takes powers of two, up to twice the memory."""
    needed = sum(p.numel() * (2 * p.itemsize + (2 * 4 + 8) * p.requires_grad) for p in model.parameters())
    return copies * needed < 0.9 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def full_weights(model, dtype: torch.dtype | None = None):
    """Yield (name, full tensor) one parameter at a time; a shared one (tied embeddings) once; adapters merged into
    theirs. All ranks must iterate. dtype: of the tensors (default: the parameters'); shards are converted before they
    are sent."""
    layers = adapted_layers(model)
    for name, parameter in model.named_parameters():
        path, _, kind = name.rpartition(".")
        if kind == "weight" and path in layers:
            yield name, layers[path].merged().to(dtype or parameter.dtype)
        elif kind not in ("lora_A", "lora_B"):
            yield name, whole(parameter.to(dtype or parameter.dtype))


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded, without gradient; offloaded shards are gathered on the GPU."""
    tensor = tensor.detach()
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.to(tensor.device_mesh.device_type).full_tensor()
    return tensor


# ------------------------------------------------------------------------------------------------------ adapters
# y = W x + b + LORA_ALPHA / rank * B A x, where W and b stay as they are (LoRA, arXiv 2106.09685). All linear layers,
# alpha = 32, A uniform within 1 / sqrt(inputs) (Kaiming's with a = sqrt(5)) and B zero, both with one learning rate,
# about 10 times that of full fine-tuning whatever the rank: "LoRA Without Regret" (Schulman et al., 2025).
LORA_ALPHA = 32


class AdaptedLinear(torch.nn.Linear):
    """A linear layer with parameters lora_A [rank, in] and lora_B [out, rank]; `add_adapters` makes it of a plain one.
    They are kept in fp32, and take part in the type that is computed in."""

    adapting = True

    @property
    def scaling(self) -> float:
        return LORA_ALPHA / len(self.lora_A)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if not self.adapting:
            return y
        return torch.add(y, F.linear(F.linear(x, self.lora_A), self.lora_B), alpha=self.scaling)

    def merged(self) -> Tensor:
        """The weight [out, in], in fp32, of a plain layer that does the same. All ranks must call it."""
        weight, a, b = whole(self.weight), whole(self.lora_A), whole(self.lora_B)
        return torch.addmm(weight.float(), b, a, alpha=self.scaling)


def add_adapters(model, cfg: Config, dtype: torch.dtype) -> None:
    """Freeze a plain model, in `dtype`, and put adapters on the decoder's linear layers and, unless freeze_vision, on
    the vision tower's and merger's. They are drawn from the seed, whatever the number of ranks, and change nothing
    yet."""
    for parameter in model.requires_grad_(False).parameters():
        parameter.data = parameter.data.to(dtype)
    draws = torch.Generator().manual_seed(cfg.seed)
    for layer in backbone.linear_layers(model, vision=not cfg.freeze_vision).values():
        bound = layer.in_features**-0.5
        layer.__class__ = AdaptedLinear  # in its place: the names of the weights stay
        a = torch.empty(cfg.lora_rank, layer.in_features).uniform_(-bound, bound, generator=draws)
        layer.lora_A = torch.nn.Parameter(a)
        layer.lora_B = torch.nn.Parameter(torch.zeros(layer.out_features, cfg.lora_rank))


def adapted_layers(model) -> dict[str, AdaptedLinear]:
    """By name; none of a model without adapters."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}


@contextmanager
def without_adapters(model):
    """Inside, the model is what its adapters were put on; one that has none is as always."""
    layers = adapted_layers(model).values()
    try:
        for layer in layers:
            layer.adapting = False
        yield model
    finally:
        for layer in layers:
            layer.adapting = True


# ------------------------------------------------------------------------------------------------------- packing
@dataclass
class PackedBatch:
    """Episodes one behind the other (see the top of the file) and what the loss needs; on the CPU until `to`."""

    episodes: list[Episode]
    ids: Tensor  # long [T]
    positions: Tensor  # long [3, T]: M-RoPE (time, height, width), from 0 in each episode
    cu_seqlens: Tensor  # int32 [N + 1], or fewer: an episode that is the beginning of another needs no segment
    keys: Tensor  # long [K]: see the top of the file; 0, 1, 2 ... where nothing is shared
    cu_keys: Tensor  # int32, as cu_seqlens
    longest: tuple[int, int]  # segment, by its queries and by its keys
    pixels: Tensor  # float32 [P, patch]: each distinct image of the batch once
    grids: Tensor  # long [images, 3]
    vision_rows: Tensor  # long [C]: row of the vision tower's output that fills ...
    vision_positions: Tensor  # long [C]: ... this token
    predict: Tensor  # long [S]
    target: Tensor  # long [S]
    sequence: Tensor  # long [S]: which of `episodes`
    sampler_logp: Tensor  # float32 [S]
    version: Tensor  # long [S]: of the weights that drew it
    advantage: Tensor  # float32 [S]
    old_logp: Tensor | None = None  # float32 [S]: before the first update, where there are several
    ref_logp: Tensor | None = None  # float32 [S]: of the reference model, where there is one
    extra_count: float = 0.0  # what episodes that need not be run add to the loss's denominator

    def to(self, device) -> "PackedBatch":
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in tensors.items()})


def pack(episodes: list[Episode], chat: Chat, model, max_tokens: int, advantages=None) -> list[PackedBatch]:
    """Whole episodes in batches of at most max_tokens, in order, so that a question's samples meet: what they share
    (prompt, image) counts once. A batch is as long as what is in it: next-fit wastes nothing. advantages: one for each
    episode (default: 0). Raises ValueError for an episode that is longer."""
    batches, seen = [], {}
    for episode, advantage in zip(episodes, advantages or [0.0] * len(episodes), strict=True):
        if len(episode.tokens) > max_tokens:
            raise ValueError(f"an episode of {len(episode.tokens)} tokens does not fit a batch of {max_tokens}")
        found = rows(episode, seen)
        if not batches or len(seen) > max_tokens:
            batches.append([])
            seen = {}
            found = rows(episode, seen)
        batches[-1].append((episode, advantage, found))
    return [pack_batch(*zip(*batch, strict=True), chat, model) for batch in batches]


def rows(episode: Episode, seen: dict) -> list[int]:
    """The row of each of an episode's tokens in a packed batch: one that has its token and comes behind the same row,
    or else a new one. seen: (row before, token or picture) -> row, of the batch so far; new ones are added."""
    pictures = (picture.key for picture in episode.images for _ in range(picture.tokens))
    row, found = episode.question.id, []  # only a question's conversations share
    for token in episode.tokens:
        what = next(pictures, None) if token == episode.chat.image_pad else token
        row = seen.setdefault((row, what), len(seen))
        found.append(row)
    return found


def pack_batch(episodes: list[Episode], advantages: list[float], places: list[list[int]], chat: Chat, model):
    """A PackedBatch. places: each episode's `rows`. Without episodes it still runs the whole model, with zero loss:
    FSDP's collectives need all ranks."""
    first_row, pictures, vision_rows = {}, [], []
    count = 0  # rows of the vision tower's output
    for episode in episodes:
        start = len(vision_rows)
        for picture in episode.images:
            if picture.key not in first_row:
                first_row[picture.key] = count
                count += picture.tokens
                pictures.append(picture)
            vision_rows += range(first_row[picture.key], first_row[picture.key] + picture.tokens)
        placeholders, filled = episode.tokens.count(chat.image_pad), len(vision_rows) - start
        if placeholders != filled:
            raise ValueError(f"{episode.name}: {placeholders} placeholders, {filled} vision tokens")
    patch, merge, frames = chat.sizes  # the vision tower always runs: without pictures, on one of one vision token
    pixels = chat.pixels(pictures) if pictures else torch.zeros(merge**2, 3 * frames * patch**2)
    known, segments = 0, []
    for found in places:
        if found[-1] >= known:  # an episode's new rows are its last ones
            segments.append((found[-1] + 1 - known, found))
            known = found[-1] + 1
    counts, keys = zip(*segments or [(1, [0])], strict=True)
    # of all tokens, one episode behind the other; the new ones make the batch
    positions = [backbone.rope_positions(e.tokens, e.images, chat, model) for e in episodes]
    lengths = [len(e.tokens) for e in episodes] or [1]
    ids = torch.tensor([id for e in episodes for id in e.tokens] or [chat.im_end])
    row_of = torch.tensor([row for found in places for row in found] or [0])
    new = row_of.cummax(0).values.diff(prepend=torch.tensor([-1])) > 0
    trained = torch.tensor([t for e in episodes for t in e.trained]).nonzero()[:, 0]
    logprobs = torch.tensor([logp for e in episodes for logp in e.logprobs])
    sequence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[trained]
    return PackedBatch(
        episodes=episodes,
        ids=ids[new],
        positions=torch.cat(positions or [torch.zeros(3, 1, dtype=torch.long)], 1)[:, new],
        cu_seqlens=torch.tensor([0, *accumulate(counts)], dtype=torch.int32),
        keys=torch.tensor([row for found in keys for row in found]),
        cu_keys=torch.tensor([0, *accumulate(map(len, keys))], dtype=torch.int32),
        longest=(max(counts), max(map(len, keys))),
        pixels=pixels,
        grids=torch.tensor([[1, *picture.grid] for picture in pictures] or [[1, merge, merge]]),
        vision_rows=torch.tensor(vision_rows, dtype=torch.long)[new[ids == chat.image_pad]],
        vision_positions=(ids[new] == chat.image_pad).nonzero()[:, 0],
        predict=row_of[trained - 1],
        target=ids[trained],
        sequence=sequence,
        sampler_logp=logprobs[trained],
        version=torch.tensor([version for e in episodes for version in e.versions])[trained],
        advantage=torch.tensor(advantages, dtype=torch.float32)[sequence],
    )


def equal_counts(batches: list[PackedBatch], chat: Chat, model) -> list[PackedBatch]:
    """Fill up with empty batches, so that all ranks run equally many, and at least one."""
    most = max(1, *all_gather([len(batches)]))
    return batches + [pack_batch([], [], [], chat, model) for _ in range(most - len(batches))]


# ----------------------------------------------------------------------------------------------------- log-probs
def packed_logprobs(model, batch: PackedBatch, temperature: float, entropy_grad=False) -> tuple[Tensor, ...]:
    """(log-prob [S] of each sampled token, entropy [S] of the distribution it was drawn from, a zero to add to the
    loss), float32. Call it on the sharded model as `model.packed_logprobs(batch, ...)`, the batch on its device.

    Logits are divided by the sampling temperature and banned ids masked, as the sampler does. The zero ties in the head
    and, through the hidden states, all the rest, so that every rank's backward runs every collective.
    """
    hidden = backbone.packed_hidden(model, batch).index_select(0, batch.predict)  # [S, H]
    banned = model.banned_ids.to(hidden.device)
    logp, entropy = HeadLogProbs.apply(hidden, model.lm_head.weight, batch.target, banned, temperature, entropy_grad)
    return logp, entropy, logp.sum() * 0.0


class HeadLogProbs(torch.autograd.Function):
    """(log-prob [S] of the target, entropy [S]) from hidden states [S, H] and the head's weight [V, H], float32.

    A part of the logits exists at a time, forward and backward: autograd's way keeps six forms of them, and with a
    vocabulary of 150,000 goes over them, not over the weights, most of the time.
    """

    @staticmethod
    def forward(ctx, hidden, weight, target, banned, temperature, entropy_grad):
        banned = banned.nonzero()[:, 0]  # a few: a mask would be one more pass over the logits
        logp, entropy = (torch.empty(len(target), device=hidden.device) for _ in range(2))
        for part in chunks(len(target), weight):
            all_logp, p = distributions(hidden[part], weight, banned, temperature)
            logp[part] = all_logp.gather(-1, target[part, None])[:, 0]
            entropy[part] = -torch.einsum("sv,sv->s", p, all_logp.index_fill_(1, banned, 0.0))  # 0 * -inf would be NaN
            del all_logp, p  # before the next ones are made
        ctx.save_for_backward(hidden, weight, target, banned, entropy)
        ctx.temperature, ctx.entropy_grad = temperature, entropy_grad
        if not entropy_grad:
            ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx, grad_logp, grad_entropy):
        """z: tempered logits. d logp / dz_j = [j is the target] - p_j, d entropy / dz_j = -p_j (logp_j + entropy)"""
        hidden, weight, target, banned, entropy = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for part in chunks(len(target), weight):
            all_logp, p = distributions(hidden[part], weight, banned, ctx.temperature)
            g = grad_logp[part, None]
            if ctx.entropy_grad:
                all_logp.index_fill_(1, banned, 0.0).add_(entropy[part, None])
                g = all_logp.mul_(grad_entropy[part, None]).add_(g)
            p *= g
            del all_logp, g
            p[torch.arange(len(p), device=p.device), target[part]] -= grad_logp[part]
            grad = p.div_(-ctx.temperature).to(hidden.dtype)
            grad_hidden[part] = grad @ weight
            if grad_weight is not None:
                grad_weight.addmm_(grad.T, hidden[part])
            del p, grad
        return grad_hidden, grad_weight, None, None, None, None


def chunks(tokens: int, weight: Tensor) -> list[slice]:
    """Slices of `tokens` tokens with at most HEAD_LOGITS logits each, by the head's weight [V, H]."""
    size = max(1, HEAD_LOGITS[weight.device.type] // len(weight))
    return [slice(start, start + size) for start in range(0, tokens, size)]


def distributions(hidden: Tensor, weight: Tensor, banned: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(log-probs, probabilities) [s, V] of all tokens, float32; -inf and 0 for the banned ids [B]."""
    logits = head_logits(hidden, weight).div_(temperature).index_fill_(1, banned, -torch.inf)
    logp = logits.log_softmax(-1)
    return logp, torch.exp(logp, out=logits)


def head_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Logits [s, V] in float32, of half-precision factors too: rounded to bf16, those from 16 to 32 are off by up to
    0.06, in sampler and trainer each in its own way. Not differentiable on a GPU."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)  # sums in fp32, without an fp32 copy of the weight
    return F.linear(hidden.float(), weight.float())


@torch.no_grad()
def logprobs(model, batches: list[PackedBatch], temperature: float, device) -> list[Tensor]:
    """Log-probs [S] of each batch, on the CPU, without gradients; all ranks must bring equally many batches."""
    logps = [model.packed_logprobs(batch.to(device), temperature)[0].cpu() for batch in batches]
    if hasattr(model, "reshard"):  # FSDP does that in backward; until then, parameters() would be bf16 copies
        model.reshard()
    return logps


# ----------------------------------------------------------------------------------------------- optimiser steps
def adamw(model, cfg: Config, device) -> torch.optim.AdamW:
    """The optimiser of what is trained. Where the policy is on a GPU it is the fused one: the others hold square roots
    as large as the weights for a moment, and are slow on weights in CPU memory."""
    return torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], cfg.lr, betas=(0.9, cfg.adam_beta2),
        weight_decay=cfg.weight_decay, fused=device.type == "cuda" or None,
    )  # fmt: skip


# of the authors' schedule: the step at which the learning rate has fallen half-way, and its floor
SIGMOID_MIDPOINT, MIN_LR_FACTOR = 45, 0.05


def learning_rate(step: int, cfg: Config) -> float:
    """The rate at a step, counted from 0."""
    low, rest = MIN_LR_FACTOR, 1 - MIN_LR_FACTOR
    factor = {
        "constant": 1.0,
        "cosine": low + rest * 0.5 * (1 + math.cos(math.pi * min(1.0, step / max(cfg.steps, 1)))),
        "sigmoid": low + rest / (1 + math.exp(min(50.0, (step - SIGMOID_MIDPOINT) / (0.1 * SIGMOID_MIDPOINT)))),
    }[cfg.schedule]
    return cfg.lr * factor * min(1.0, (step + 1) / max(cfg.warmup_steps, 1))


class NonFinite(RuntimeError):
    """A loss, a gradient or logits that are not finite; nothing was changed by the step."""


def imitation_loss(loss_norm: str, batch: PackedBatch, logp: Tensor, entropy: Tensor):
    """The batch_loss of `update` for episodes to imitate: the negative log-likelihood of their sampled tokens."""
    weights, count = token_weights(batch.sequence, loss_norm)
    return -(logp * weights).sum(), count, {"tokens": torch.tensor(float(len(logp))), "nll": -logp.sum()}


def update(model, optimizer, batches: list[PackedBatch], batch_loss: Callable, cfg, device, entropy_grad=False) -> dict:
    """One optimiser step over the batches of all ranks.

    batch_loss(batch, logp [S], entropy [S]) -> (loss, a sum; count, what this batch adds to the denominator; stats, a
    dict of sums). Sums are back-propagated and gradients scaled once by the one denominator, all batches of all ranks,
    so that they depend neither on packing nor on the number of ranks. Every rank brings equally many batches
    (`equal_counts`); where nothing counts (all conversations were aborted), the weights stay as they are.
    Returns the global sums: loss, count, the stats; and grad_norm. Raises NonFinite, with the weights as they were.
    """
    optimizer.zero_grad(set_to_none=True)
    sums: dict[str, float] = defaultdict(float)
    packed = [episode.name for batch in batches for episode in batch.episodes]
    bad: list[str] = []
    for batch in batches:
        batch = batch.to(device)
        logp, entropy, zero = model.packed_logprobs(batch, cfg.temperature, entropy_grad)
        loss, count, stats = batch_loss(batch, logp, entropy)
        (loss + zero).backward()
        if not torch.isfinite(loss):
            bad += [episode.name for episode in batch.episodes]
        for name, value in {"loss": loss, "count": count, **stats}.items():
            sums[name] += float(value.detach() if isinstance(value, Tensor) else value)
    sums = all_sum(sums, device)
    parameters = [p for p in model.parameters() if p.grad is not None]
    scale = dist.get_world_size() / max(sums["count"], 1.0)  # FSDP averages over ranks: undo it
    torch._foreach_mul_([p.grad for p in parameters], scale)
    norm = float(whole(torch.nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm)))
    if any(all_gather([bool(bad) or not math.isfinite(norm)])):
        optimizer.zero_grad(set_to_none=True)
        names = all_gather(bad) or all_gather(packed)  # of the episodes that may be the cause
        shown = ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")
        raise NonFinite(f"loss {sums['loss']}, gradient norm {norm} ({shown})")
    if sums["count"]:
        optimizer.step()
    return {**sums, "grad_norm": norm}
