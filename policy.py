"""The model and the processes: loading and sharding (FSDP2), packing, log-probs, the optimiser step, checkpoints.

Parallelism is applied from outside: the model is transformers' own Qwen2.5-VL, its blocks are wrapped by `fully_shard`,
and one extra root method (`packed_logprobs`) is registered with FSDP. A single fp32 process has nothing to shard and uses
the same methods on the plain model.

Episodes are packed whole, one behind the other, into rows without padding. Two episodes of 4 and 3 tokens, `x` sampled:

    token          u  i  x  x | u  i  x          i: the cell of an image
    cu_seqlens     0          4           7      attention stays inside a segment
    predict           1  2         5             hidden states whose next token was sampled
    target            x  x         x
    sequence          0  0         1

Axes: T tokens of a row, S sampled tokens of a row, N episodes, H hidden size, V vocabulary, P image patches, C image
cells (merged patches), D head dimension.
"""

import copy
import math
import os
import pickle
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import MethodType

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from backbone import (
    ATTENTION,
    blank_image,
    embed_patches,
    has_flash_attn,
    packed_hidden,
    read_model,
    register_attention,
    rope_positions,
)
from chat import Chat
from config import Config, InputError
from data import Episode
from grpo import token_weights

# Logits that exist at one time, in each of two forms: 110 or 882 tokens of a vocabulary of 152,064. On a GPU the
# gradient of the head is summed in bf16, and each part costs it a rounding.
HEAD_LOGITS = {"cpu": 2**24, "cuda": 2**27}


def init_distributed(cfg: Config) -> torch.device:
    """Join the process group that torchrun describes (or one of a single process) and return this rank's device."""
    use_cuda = torch.cuda.is_available() if cfg.device == "auto" else cfg.device == "cuda"
    if use_cuda and not torch.cuda.is_available():
        raise InputError("device=cuda: this machine has no CUDA device that torch can use")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)  # plans anew for each shape (0.1 to 1 s), and every row has its own
    else:
        torch.set_num_threads(cfg.threads or max(1, (os.cpu_count() or 1) // local_world()))
    if is_deterministic(cfg, device):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # only hides bugs, and costs a tenth of the time
    if not dist.is_initialized():
        where = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
        backend = "cuda:nccl,cpu:gloo" if use_cuda else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=cfg.dist_timeout), **where)
    if cfg.shard_size and dist.get_world_size() % cfg.shard_size:
        raise InputError(f"shard_size={cfg.shard_size} does not divide the {dist.get_world_size()} ranks")
    if dist.get_world_size() % cfg.tensor_parallel:
        raise InputError(f"tensor_parallel={cfg.tensor_parallel} does not divide the {dist.get_world_size()} ranks")
    return device


def is_deterministic(cfg: Config, device: torch.device) -> bool:
    if cfg.deterministic is None:  # neither the clock nor the web nor vLLM's batches are
        repeatable = cfg.engine == "torch" and cfg.search in ("offline", "replay") and not cfg.search_url
        return device.type == "cpu" and repeatable and not cfg.rollout_deadline
    return cfg.deterministic


def compute_dtype(cfg: Config, device: torch.device) -> torch.dtype:
    bf16 = device.type == "cuda" if cfg.dtype == "auto" else cfg.dtype == "bf16"
    return torch.bfloat16 if bf16 else torch.float32


def all_sum(values: dict[str, float], device) -> dict[str, float]:
    """Sum each value over the ranks (float64)."""
    flat = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(flat)
    return dict(zip(values, flat.tolist(), strict=True))


def all_to_all(outbox: list[list]) -> list[list]:
    """outbox[r]: picklable things for rank r. Returns what each rank had for this one. All ranks must call it."""
    parcels = [torch.frombuffer(bytearray(pickle.dumps(things)), dtype=torch.uint8) for things in outbox]
    sizes = [None] * dist.get_world_size()
    dist.all_gather_object(sizes, [len(parcel) for parcel in parcels])
    coming = [row[dist.get_rank()] for row in sizes]
    received = torch.empty(sum(coming), dtype=torch.uint8)
    dist.all_to_all_single(received, torch.cat(parcels), coming, [len(parcel) for parcel in parcels])
    return [pickle.loads(part.numpy().tobytes()) for part in received.split(coming)]


def all_max(value: float, device) -> float:
    flat = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(flat, dist.ReduceOp.MAX)
    return flat.item()


def load_policy(folder: str | Path, chat: Chat, cfg: Config, device, *, trainable: bool = True, offload: bool = False):
    """A Qwen2.5-VL from a Hugging Face folder or hub id, sharded over the ranks, masters in fp32.

    Rank 0 reads the weights and the others receive their shards from it, so that a node needs one copy of them in
    memory. offload: parameters, gradients and optimiser state live in CPU memory (FSDP2's CPU offload).
    Raises InputError for a folder that holds no such model.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    model = read_model(folder, empty=dist.get_rank() != 0)
    weights = model.state_dict() if dist.get_rank() == 0 else {}
    prepare(model, chat, cfg)
    model.requires_grad_(trainable)
    if cfg.freeze_vision:
        model.model.visual.requires_grad_(False)
    if trainable and cfg.gradient_checkpointing:
        model.gradient_checkpointing_enable(dict(use_reentrant=False))
    shard(model, cfg, device, offload)
    if dist.get_world_size() > 1:
        set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    return model.train(trainable)


def prepare(model, chat: Chat, cfg: Config) -> None:
    """Give a plain Qwen2.5-VL what this code needs: packed attention, the root method, the ids it may not say."""
    if cfg.attention == "flash" and not has_flash_attn():
        raise InputError("attention=flash: flash-attn is not installed; 'auto' takes the best kernel there is")
    register_attention(cfg.attention)
    for config in (model.config, model.config.text_config, model.config.vision_config):
        config._attn_implementation_internal = ATTENTION
    model.config.use_cache = False
    if len(chat) > model.config.text_config.vocab_size:
        raise InputError(f"the tokenizer has {len(chat)} tokens, the model only {model.config.text_config.vocab_size}")
    banned = torch.zeros(model.config.text_config.vocab_size, dtype=torch.bool)
    banned[chat.banned_ids(len(banned))] = True
    model.banned_ids = banned
    model.packed_logprobs = MethodType(packed_logprobs, model)
    model.model.visual.patch_embed.forward = MethodType(embed_patches, model.model.visual.patch_embed)


def shard(model, cfg: Config, device, offload: bool = False) -> None:
    """FSDP2 from outside: each decoder layer and vision block is a unit, the rest (embedding, head, merger) the
    root's."""
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    world, size = dist.get_world_size(), cfg.shard_size or dist.get_world_size()
    shape, names = ((size,), ("shard",)) if size == world else ((world // size, size), ("replicate", "shard"))
    mesh = dist.init_device_mesh(device.type, shape, mesh_dim_names=names)
    options = dict(mesh=mesh)
    if compute_dtype(cfg, device) == torch.bfloat16:  # inputs are bf16 where they have to be; RoPE's cosines are not
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    if offload and device.type == "cuda":
        options["offload_policy"] = CPUOffloadPolicy(room_to_pin(model, local_world() / size))
    if world == 1 and len(options) == 1:
        model.to(device)  # one process in fp32: nothing to shard, cast or offload
        return
    for block in [*model.model.visual.blocks, *model.model.language_model.layers]:
        fully_shard(block, **options)
    fully_shard(model, **options)
    register_fsdp_forward_method(model, "packed_logprobs")


def local_world() -> int:
    """How many of torchrun's ranks run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def room_to_pin(model, copies: float) -> bool:
    """Whether this machine's memory holds `copies` of the weights, and of gradients and AdamW's state where there are
    any, if weights and gradients are pinned: faster to copy, but torch takes powers of two, up to twice the memory."""
    needed = sum(p.numel() * (2 * 4 + (2 * 4 + 8) * p.requires_grad) for p in model.parameters())
    return copies * needed < 0.9 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def full_weights(model):
    """Yield (name, full tensor) one parameter at a time; a shared one (tied embeddings) once. All ranks must
    iterate."""
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        if hasattr(value, "full_tensor"):
            value = value.to(dist_device(value)).full_tensor()
        yield name, value


def dist_device(tensor):
    """Where a sharded tensor can be gathered: offloaded shards go to the GPU first."""
    return "cuda" if tensor.device_mesh.device_type == "cuda" else "cpu"


@dataclass
class PackedBatch:
    """Episodes packed one behind the other; see the top of the file. Tensors are on the CPU until `to`."""

    episodes: list[int]  # which episodes, as indices into the list that was packed
    ids: Tensor  # long [T]
    positions: Tensor  # long [3, T]: M-RoPE (time, height, width), from 0 in each episode
    cu_seqlens: Tensor  # int32 [N + 1]
    longest: int
    pixels: Tensor  # float32 [P, patch]: each distinct image of the row once
    grids: Tensor  # long [images, 3]
    cells: Tensor  # long [C]: row of the vision tower's output that fills ...
    vision_positions: Tensor  # long [C]: ... this token
    predict: Tensor  # long [S]
    target: Tensor  # long [S]
    sequence: Tensor  # long [S]: which of `episodes`
    sampler_logp: Tensor = field(default=None)  # float32 [S]

    def to(self, device) -> "PackedBatch":
        moved = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(moved, name, value.to(device, non_blocking=True))
        return moved


def pack(episodes: list[Episode], chat: Chat, model, max_tokens: int) -> list[PackedBatch]:
    """Whole episodes into rows of at most max_tokens, in order, so that a question's samples (and their image) meet.

    A row is as long as what is in it, so next-fit wastes nothing. Raises ValueError for an episode longer than a row.
    """
    rows, current, size = [], [], 0
    for index, episode in enumerate(episodes):
        if len(episode.tokens) > max_tokens:
            raise ValueError(f"an episode of {len(episode.tokens)} tokens does not fit a row of {max_tokens}")
        if current and size + len(episode.tokens) > max_tokens:
            rows.append(pack_batch(current, episodes, chat, model))
            current, size = [], 0
        current.append(index)
        size += len(episode.tokens)
    if current:
        rows.append(pack_batch(current, episodes, chat, model))
    return rows


def pack_batch(indices: list[int], episodes: list[Episode], chat: Chat, model) -> PackedBatch:
    ids, positions, bounds = [], [], [0]
    predict, target, sequence, sampler_logp = [], [], [], []
    first_cell, pixels, grids, cells, vision_positions, n_cells = {}, [], [], [], [], 0
    for number, index in enumerate(indices):
        episode, start = episodes[index], bounds[-1]
        for picture in episode.images:
            if picture.key not in first_cell:
                first_cell[picture.key] = n_cells
                n_cells += picture.tokens
                pixels.append(chat.pixels(picture))
                grids.append([1, *picture.grid])
            cells += range(first_cell[picture.key], first_cell[picture.key] + picture.tokens)
        for offset, token in enumerate(episode.tokens):
            if token == chat.image_pad:
                vision_positions.append(start + offset)
            if episode.sampled[offset]:
                predict.append(start + offset - 1)
                target.append(token)
                sequence.append(number)
                sampler_logp.append(episode.logprobs[offset])
        if len(vision_positions) != len(cells):
            raise ValueError(
                f"{episode.question_id}: {len(vision_positions)} placeholders for {len(cells)} image cells"
            )
        ids += episode.tokens
        positions.append(rope_positions(episode.tokens, episode.images, chat, model))
        bounds.append(len(ids))
    if not pixels:  # the vision tower always runs: FSDP's collectives need all ranks in it
        pixels, grids = blank_image(chat)
    return PackedBatch(
        episodes=list(indices),
        ids=torch.tensor(ids),
        positions=torch.cat(positions, 1),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        longest=max(b - a for a, b in zip(bounds, bounds[1:], strict=False)),
        pixels=torch.cat(pixels),
        grids=torch.tensor(grids),
        cells=torch.tensor(cells, dtype=torch.long),
        vision_positions=torch.tensor(vision_positions, dtype=torch.long),
        predict=torch.tensor(predict, dtype=torch.long),
        target=torch.tensor(target, dtype=torch.long),
        sequence=torch.tensor(sequence, dtype=torch.long),
        sampler_logp=torch.tensor(sampler_logp),
    )


def empty_batch(chat: Chat) -> PackedBatch:
    """A row without a sampled token: its loss is zero, yet it runs the whole model (FSDP's collectives need all
    ranks)."""
    none = torch.zeros(0, dtype=torch.long)
    pixels, grids = blank_image(chat)
    return PackedBatch(
        episodes=[],
        ids=torch.tensor([chat.im_end]),
        positions=torch.zeros(3, 1, dtype=torch.long),
        cu_seqlens=torch.tensor([0, 1], dtype=torch.int32),
        longest=1,
        pixels=pixels[0],
        grids=torch.tensor(grids),
        cells=none,
        vision_positions=none,
        predict=none,
        target=none,
        sequence=none,
        sampler_logp=torch.zeros(0),
    )


def packed_logprobs(
    model, row: PackedBatch, temperature: float, entropy_grad: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-prob [S] of each sampled token, entropy [S] of the distribution it was drawn from, a zero to add to the
    loss), float32. Call it on the sharded model as `model.packed_logprobs(row, ...)`, with the row on the model's device.

    Logits are divided by the sampling temperature and banned ids masked, as the sampler does. The zero ties in the head
    and, through the hidden states, all the rest, so that every rank's backward runs every collective.
    """
    hidden = packed_hidden(model, row).index_select(0, row.predict)  # [S, H]
    logp, entropy = HeadLogProbs.apply(
        hidden, model.lm_head.weight, row.target, model.banned_ids.to(hidden.device), temperature, entropy_grad
    )
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
        """With z the tempered logits: d logp / dz_j = [j is the target] - p_j, d entropy / dz_j = -p_j (logp_j +
        entropy)."""
        hidden, weight, target, banned, entropy = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for part in chunks(len(target), weight):
            all_logp, p = distributions(hidden[part], weight, banned, ctx.temperature)
            g = grad_logp[part, None]
            if ctx.entropy_grad:
                all_logp.index_fill_(1, banned, 0.0).add_(entropy[part, None])
                p *= all_logp.mul_(grad_entropy[part, None]).add_(g)
            else:
                p *= g
            del all_logp
            p[torch.arange(len(p), device=p.device), target[part]] -= g[:, 0]
            grad = p.div_(-ctx.temperature).to(hidden.dtype)
            grad_hidden[part] = grad @ weight
            grad_weight.addmm_(grad.T, hidden[part])
            del p, grad
        return grad_hidden, grad_weight, None, None, None, None


def chunks(tokens: int, weight: Tensor) -> list[slice]:
    """Slices of so many of `tokens` tokens that their logits, by the head's weight [V, H], are no more than
    HEAD_LOGITS."""
    size = max(1, HEAD_LOGITS[weight.device.type] // len(weight))
    return [slice(start, start + size) for start in range(0, tokens, size)]


def distributions(hidden: Tensor, weight: Tensor, banned: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(log-probs, probabilities) [s, V] of all tokens, float32; -inf and 0 for the banned ids [B]."""
    logits = F.linear(hidden, weight).float().div_(temperature).index_fill_(1, banned, -torch.inf)
    logp = logits.log_softmax(-1)
    return logp, torch.exp(logp, out=logits)


@torch.no_grad()
def logprobs(model, rows: list[PackedBatch], temperature: float, device) -> list[Tensor]:
    """Log-probs [S] of each row without gradients; all ranks must bring equally many rows (`equal_counts`)."""
    logps = [model.packed_logprobs(row.to(device), temperature)[0].cpu() for row in rows]
    if hasattr(model, "reshard"):  # FSDP does that in backward; till then, parameters() would be bf16 copies
        model.reshard()
    return logps


def adamw(model, cfg: Config, device) -> torch.optim.AdamW:
    """The optimiser of what is trained. Where the policy is on a GPU it is the fused one: the others hold square roots
    as large as the weights for a moment, and are slow on weights in CPU memory."""
    return torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], cfg.lr, betas=(cfg.adam_beta1, cfg.adam_beta2),
        weight_decay=cfg.weight_decay, fused=device.type == "cuda" or None,
    )  # fmt: skip


class NonFinite(RuntimeError):
    """A loss or gradient that is not finite; nothing was changed by the step. `episodes`: indices (into what this rank
    packed) of those in rows whose loss is not finite."""

    def __init__(self, message: str, episodes: list[int]):
        super().__init__(message + (f", episodes {', '.join(map(str, episodes))} of this rank" if episodes else ""))
        self.episodes = episodes


def equal_counts(rows: list[PackedBatch], chat: Chat, device) -> list[PackedBatch]:
    """Fill up with empty rows, so that all ranks run equally many, and at least one."""
    most = max(1, int(all_max(len(rows), device)))
    return rows + [empty_batch(chat)] * (most - len(rows))


def imitation_loss(loss_norm: str, number: int, row: PackedBatch, logp, entropy):
    """The batch_loss of `update` for conversations to imitate: the negative log-likelihood of what is sampled in them."""
    weights, count = token_weights(row.sequence, loss_norm)
    return -(logp * weights).sum(), count, {"tokens": torch.tensor(float(len(logp))), "nll": -logp.sum()}


def update(
    model, optimizer, rows: list[PackedBatch], batch_loss, cfg: Config, device, entropy_grad: bool = False
) -> dict[str, float]:
    """One optimiser step over the rows of all ranks.

    batch_loss(number of the row, row, logp [S], entropy [S]) -> (loss, a sum; count, what this row adds to the
    denominator; stats, a dict of sums). Sums are back-propagated and gradients scaled once by the one denominator, all
    rows of all ranks, so that they depend neither on packing nor on the number of ranks. Every rank brings equally many
    rows (`equal_counts`); where nothing counts (all conversations were aborted), the weights stay as they are.
    Returns the global sums: loss, count, the stats; and grad_norm. Raises NonFinite, with the weights as they were.
    """
    optimizer.zero_grad(set_to_none=True)
    sums: dict[str, float] = {}
    bad = []
    for number, row in enumerate(rows):
        row = row.to(device)
        logp, entropy, zero = model.packed_logprobs(row, cfg.temperature, entropy_grad)
        loss, count, stats = batch_loss(number, row, logp, entropy)
        (loss + zero).backward()
        if not torch.isfinite(loss):
            bad += row.episodes
        for name, value in {"loss": loss, "count": count, **stats}.items():
            sums[name] = sums.get(name, 0.0) + float(value.detach() if isinstance(value, Tensor) else value)
    sums = all_sum(sums, device)
    parameters = [p for p in model.parameters() if p.grad is not None]
    scale = dist.get_world_size() / max(sums["count"], 1.0)  # FSDP averages over ranks: undo it
    torch._foreach_mul_([p.grad for p in parameters], scale)
    norm = torch.nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if all_max(bool(bad) or not math.isfinite(norm), device):
        optimizer.zero_grad(set_to_none=True)
        raise NonFinite(f"loss {sums['loss']}, gradient norm {norm}", bad)
    if sums["count"]:
        optimizer.step()
    return {**sums, "grad_norm": norm}
