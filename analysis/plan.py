"""How much memory a run will need, before anything is loaded: `python train.py --plan --gpus 8`.

Counted, not measured: parameters of a model on the meta device, and the bytes that autograd keeps of one decoder layer
and one vision block when the trainer's own code runs through them there. Left out: the CUDA context, NCCL's buffers and
fragmentation, for which SPARE is kept free.
"""

import math
import tempfile
from dataclasses import dataclass

import torch
from torch import Tensor

from backbone import empty_model, has_flash_attn, read_config, repeat_heads, varlen_groups_heads
from config import Config
from engines import engine_limits
from policy import HEAD_LOGITS, compute_dtype
from toy.model import save_random_model

SPARE = 0.08  # of a GPU's memory


IMAGE_SHARE = 0.5  # of a row's tokens that are cells of images not shown before in the row; four patches each


FUSED = "planned_flash"  # the vision tower hands over cumulative lengths only if the name contains "flash"


GIB = 2**30


@dataclass(frozen=True)
class Sizes:
    """Of a model: parameters, and bytes that autograd keeps."""

    vision: int
    largest: int  # of the units that FSDP gathers one by one
    root: int  # gathered all the time: embedding, head, norms, merger
    total: int
    layers: int
    layer_input: int  # bytes a token
    layer_kept: int  # bytes a token: everything that backward needs of one decoder layer
    blocks: int
    block_input: int  # bytes a patch
    block_kept: int  # bytes a patch
    head: int  # bytes in backward: a chunk of sampled tokens' log-probs, probabilities, gradient; the weight's gradient


def measure(config, dtype: torch.dtype) -> Sizes:
    """Sizes of a Qwen2.5-VL of this configuration (transformers' own) when it computes in `dtype`."""
    from transformers import AttentionInterface

    with torch.device("meta"):
        model = empty_model(config).to(dtype)
    AttentionInterface.register(FUSED, fused_attention)
    for part in (model.config, model.config.text_config, model.config.vision_config):
        part._attn_implementation_internal = FUSED
    text, vision = model.model.language_model, model.model.visual
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    units = [count(block) for block in [*vision.blocks, *text.layers]]
    meta = lambda *shape, dtype=dtype: torch.empty(*shape, dtype=dtype, device="meta")  # noqa: E731

    tokens, hidden = 512, config.get_text_config().hidden_size
    bounds = torch.tensor([0, tokens], dtype=torch.int32)
    x = meta(1, tokens, hidden).requires_grad_()
    rope = text.rotary_emb(x, meta(3, 1, tokens, dtype=torch.long))
    packed = dict(cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=tokens, max_length_k=tokens)
    layer = kept_by(lambda: text.layers[0](x, attention_mask=None, position_embeddings=rope, **packed), model)

    eyes = config.vision_config
    width = eyes.hidden_size // eyes.num_heads
    pixels = meta(tokens, eyes.hidden_size).requires_grad_()
    rope = meta(tokens, width, dtype=torch.float32), meta(tokens, width, dtype=torch.float32)
    block = kept_by(lambda: vision.blocks[0](pixels, cu_seqlens=bounds, position_embeddings=rope), model)

    words = config.get_text_config().vocab_size
    chunk = min(max(1, HEAD_LOGITS["cuda"] // words), 1024)  # with few words, a row's sampled tokens are fewer
    head = chunk * words * (2 * 4 + dtype.itemsize) + words * hidden * dtype.itemsize  # `HeadLogProbs.backward`
    return Sizes(
        vision=count(vision), largest=max(units), root=count(model) - sum(units), total=count(model),
        layers=len(text.layers), layer_input=hidden * dtype.itemsize, layer_kept=layer // tokens,
        blocks=len(vision.blocks), block_input=eyes.hidden_size * dtype.itemsize, block_kept=block // tokens,
        head=head,
    )  # fmt: skip


class _Fused(torch.autograd.Function):
    """Keeps what fused kernels keep: inputs, output, and the log of each query's sum. There is no backward: it is
    counted, not computed."""

    @staticmethod
    def forward(ctx, query, key, value):
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, out.new_empty(query.shape[:3], dtype=torch.float32))
        return out


def fused_attention(module, query, key, value, attention_mask=None, **_):
    """Stands in for `policy.packed_attention` on the meta device, where SDPA would keep all attention weights."""
    if not has_flash_attn() and not varlen_groups_heads():
        key, value = (repeat_heads(x, query.shape[1]) for x in (key, value))
    return _Fused.apply(query, key, value).transpose(1, 2), None


def kept_by(forward, model) -> int:
    """Bytes that autograd keeps for the backward of forward(), weights apart, what shares memory counted once."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {}

    def note(tensor: Tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # held, so that its address is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


def activations(sizes: Sizes, cfg: Config, image_share: float = IMAGE_SHARE) -> float:
    """Bytes a token of a packed row of which `image_share` are cells of new images."""
    patches = 0 if cfg.freeze_vision else 4 * image_share
    if cfg.gradient_checkpointing:  # inputs of all, and what is computed again of one
        seen = sizes.blocks * sizes.block_input + sizes.block_kept
        return sizes.layers * sizes.layer_input + sizes.layer_kept + patches * seen
    return sizes.layers * sizes.layer_kept + patches * sizes.blocks * sizes.block_kept


def needs(sizes: Sizes, cfg: Config, gpus: int, cache: int) -> tuple[dict[str, tuple[float, float]], dict[str, float]]:
    """({part: bytes on each GPU (during the update, during the rollout)}, {part: bytes of each process on the CPU}).

    cache: bytes of the engine's keys and values.
    """
    width, parts = compute_dtype(cfg, torch.device("cuda")).itemsize, cfg.shard_size or gpus
    trained = sizes.total - (sizes.vision if cfg.freeze_vision else 0)
    masters = 4 * sizes.total / parts
    owned = {"fp32 weights": masters, "gradients": 4 * trained / parts, "optimiser": 8 * trained / parts}
    reference = masters if cfg.kl_coef else 0.0
    gathered = width * (sizes.root + 2 * sizes.largest) * (1 + bool(reference)) if parts > 1 or width < 4 else 0
    own = width * sizes.total / cfg.tensor_parallel
    here = 0 if cfg.offload_optimizer else 1
    gpu = {
        "fp32 weights": (here * owned["fp32 weights"],) * 2,
        "gradients": (here * owned["gradients"], 0.0),
        "optimiser": (here * owned["optimiser"],) * 2,
        "reference": (0.0 if cfg.offload_reference else reference,) * 2,
        "gathered weights": (gathered, 0.0),
        "activations": (activations(sizes, cfg) * cfg.max_tokens_per_batch, 0.0),
        "logits": (float(sizes.head), 0.0),
        "engine's weights": (own if cfg.engine == "torch" else 0.0, own),  # vLLM sleeps during the update
        "keys and values": (0.0, float(cache)),
    }
    cpu = {name: (1 - here) * value for name, value in owned.items()}
    return gpu, cpu | {"reference": reference if cfg.offload_reference else 0.0}


def plan(cfg: Config) -> str:
    """The table that --plan prints. Raises InputError for a model whose configuration cannot be read."""
    gpus = cfg.gpus or max(1, torch.cuda.device_count())
    memory = cfg.gpu_memory * GIB
    with tempfile.TemporaryDirectory() as folder:
        if cfg.model == "toy":
            save_random_model(folder, cfg.seed)
        name = folder if cfg.model == "toy" else cfg.model
        device = torch.device("cuda")
        sizes = measure(read_config(name), compute_dtype(cfg, device))
        cache = engine_limits(name, cfg, device, []).cache_bytes
    gpu, cpu = needs(sizes, cfg, gpus, cache)
    lines = [
        f"{cfg.model}: {sizes.total / 1e9:.2f} billion parameters; {gpus} GPUs, of {cfg.gpu_memory:g} GiB each",
        "",
    ]
    lines += [f"{'GiB on each GPU':20} {'update':>8} {'rollout':>8}"]
    lines += [f"{name:20} {update / GIB:8.2f} {rollout / GIB:8.2f}" for name, (update, rollout) in gpu.items()]
    totals = [sum(part[i] for part in gpu.values()) for i in (0, 1)]
    lines += [f"{'in all':20} {totals[0] / GIB:8.2f} {totals[1] / GIB:8.2f}"]
    if sum(cpu.values()):
        most = 2 * sum(cpu.values()) - cpu["optimiser"]  # see `policy.room_to_pin`
        lines += [f"and in the memory of each process: {sum(cpu.values()) / GIB:.2f} GiB, "
                  f"up to {most / GIB:.2f} where that is there to be pinned"]  # fmt: skip
    usable = memory * (1 - SPARE)
    a_token = activations(sizes, cfg)
    rows = (usable - totals[0] + a_token * cfg.max_tokens_per_batch) / a_token
    talks = (usable - totals[1] + cache) / (cache / cfg.concurrency)
    lines += ["", f"at most, with {SPARE:.0%} kept free: {_most('max_tokens_per_batch', rows, cfg)}, "
              f"{_most('concurrency', talks, cfg)}"]  # fmt: skip
    return "\n".join(lines)


def _most(name, value, cfg):
    wanted, least = getattr(cfg, name), cfg.max_tokens if name == "max_tokens_per_batch" else 1
    if value < least:
        return f"{name}: none fits"
    return f"{name} {math.floor(value):,}" + (f" (too little for the {wanted:,} of these settings)" * (value < wanted))
