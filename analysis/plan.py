"""How much memory and disk a run will need, before anything is loaded: `python -m analysis plan --gpus 8`.

Counted, not measured: the parameters of a model on the meta device, and the bytes that autograd keeps of one decoder
layer and one vision block when the trainer's own code runs through them there. An update is as large as the largest of
three moments: the backward pass of the head, of a layer, and the reduction of the root's gradients at its end.
`benchmarks/tracked.py` compares that with torch's memory tracker. UNCOUNTED is what SPARE is kept free for.
"""

import tempfile
from bisect import bisect
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from backbone import empty_model, has_flash_attn, linear_layers, read_config, repeat_heads, varlen_groups_heads
from config import PRESETS, Config, Options, from_dict, option
from engines import engine_limits
from policy import HEAD_LOGITS, compute_dtype
from toy import Recipe
from toy.model import save_random_model

SPARE = 0.08  # of a GPU's memory
UNCOUNTED = (
    "for what is not counted: the CUDA context (half a GiB a process), NCCL's buffers, vLLM's CUDA graphs and the "
    "activations of its profile run, workspaces of kernels, fragmentation"
)
CARDS = {"24 GB": 23.9, "48 GB": 44.9, "80 GB": 79.6, "141 GB": 140.4}  # GiB that an RTX 4090, L40S, H100, H200 has
BACKWARD = 0.6  # of what is kept of a layer: the gradients of these tensors that are there at one time in its backward
IMAGE_SHARE = 0.5  # of a packed batch's tokens that are vision tokens of images not yet seen in it; four patches each
FUSED = "planned_flash"  # the vision tower hands over cumulative lengths only if the name contains "flash"
GIB = 2**30


@dataclass(frozen=True)
class PlanOptions(Options):
    """Memory plan."""

    gpus: int = option(0, "GPUs of the run (0: those of this machine, at least one)", "at least 0")
    gpu_memory: float = option(80.0, "GiB of each GPU", "above 0")


@dataclass(frozen=True)
class Sizes:
    """Parameters of a model and of its parts, and bytes that autograd keeps."""

    vision: int
    largest: int  # of the units that FSDP gathers one by one
    root: int  # gathered all the time: embedding, head, norms, merger
    total: int
    layers: int
    layer_input: int  # bytes a token
    layer_kept: int  # bytes a token: everything that backward needs of one decoder layer
    layer_shared: int  # bytes a token: keys and values, kept once more for each conversation that shares the token
    adapted: tuple[int, int]  # number of linear layers in a decoder layer and in a vision block
    blocks: int
    block_input: int  # bytes a patch
    block_kept: int  # bytes a patch
    head: int  # bytes in backward: log-probs, probabilities and gradient of a chunk of tokens
    head_gradient: int  # bytes
    sides: tuple[int, int]  # inputs plus outputs of the layers with adapters: in the decoder, in the whole model

    def trained(self, cfg: Config) -> int:
        """Parameters with a gradient."""
        if cfg.lora_rank:
            return cfg.lora_rank * self.sides[not cfg.freeze_vision]
        return self.total - cfg.freeze_vision * self.vision

    def owned(self, cfg: Config, width: int) -> dict[str, float]:
        """Bytes of what all ranks together own. width: bytes of a number in the type that is computed in."""
        trained, adapters = self.trained(cfg), bool(cfg.lora_rank)
        weights = width * self.total + 4 * trained if adapters else 4 * self.total
        reference = 0 if adapters or not cfg.kl_coef else 4 * self.total
        return {"weights": weights, "gradients": 4 * trained, "optimiser": 8 * trained, "reference": reference}

    def kept(self, cfg: Config, width: int) -> tuple[float, float]:
        """Bytes a token of a packed batch, of which IMAGE_SHARE are vision tokens of new images: what autograd keeps
        from the forward pass, and what is added while the backward pass runs through a layer."""
        patches = 0 if cfg.freeze_vision else 4 * IMAGE_SHARE
        layer = self.layer_kept + width * cfg.lora_rank * self.adapted[0]
        layer += (cfg.samples_per_prompt - 1) * self.layer_shared  # at most: as if prompts were all there is
        block = patches * (self.block_kept + width * cfg.lora_rank * self.adapted[1])
        if cfg.gradient_checkpointing:  # the inputs of all layers, and everything of the one that is recomputed
            inputs = self.layers * self.layer_input + patches * self.blocks * self.block_input
            return inputs, (1 + BACKWARD) * max(layer, block)
        return self.layers * layer + self.blocks * block, BACKWARD * max(layer, block)

    def peak(self, cfg: Config, width: int, shards: int, tokens: int) -> dict[str, float]:
        """Bytes at the largest moment of an update, beside what is there all the time. tokens: of the packed batch.
        Gradients are reduced in fp32, unit by unit."""
        kept, at_once = self.kept(cfg, width)
        sharded, trains = shards > 1 or width < 4, not cfg.lora_rank
        root, unit = (width * sharded * size for size in (self.root, self.largest))
        units = 2 if shards > 1 else 1  # the next one is fetched
        head = trains * self.head_gradient
        reduced = trains * sharded * max(width + 4, 4 + 4 / shards) * self.root  # its weights are given back before
        moments = (
            (root, tokens * kept, self.head, head),  # backward of the head
            (root + units * unit, tokens * (kept + at_once), 0, head + 2 * trains * unit),  # of a layer
            (0, 0, 0, reduced),  # reduction of the root's gradients
        )
        parts = ("gathered weights", "activations", "logits", "gradients in work")
        return dict(zip(parts, max(moments, key=sum), strict=True))


def measure(config, dtype: torch.dtype) -> Sizes:
    """Sizes of a model of this configuration (transformers' own) when it computes in `dtype`."""
    from transformers import AttentionInterface

    with torch.device("meta"):
        model = empty_model(config).to(dtype)
    AttentionInterface.register(FUSED, fused_attention)
    model.config._attn_implementation = FUSED
    text, vision = model.model.language_model, model.model.visual
    units = [_parameters(block) for block in [*vision.blocks, *text.layers]]
    hidden, words = text.config.hidden_size, text.config.vocab_size
    layer_kept, layer_shared, block_kept = _kept(model, dtype)
    chunk = min(max(1, HEAD_LOGITS["cuda"] // words), 1024)  # of a small vocabulary a batch does not fill the chunk
    return Sizes(
        vision=_parameters(vision),
        largest=max(units),
        root=_parameters(model) - sum(units),
        total=_parameters(model),
        layers=len(text.layers),
        layer_input=hidden * dtype.itemsize,
        layer_kept=layer_kept,
        layer_shared=layer_shared,
        adapted=tuple(
            sum(isinstance(m, torch.nn.Linear) for m in part[0].modules()) for part in (text.layers, vision.blocks)
        ),
        blocks=len(vision.blocks),
        block_input=vision.config.hidden_size * dtype.itemsize,
        block_kept=block_kept,
        head=chunk * words * (2 * 4 + dtype.itemsize),  # `HeadLogProbs.backward`
        head_gradient=words * hidden * dtype.itemsize,
        sides=tuple(sum(sum(m.weight.shape) for m in linear_layers(model, on).values()) for on in (False, True)),
    )


def _parameters(module):
    return sum(p.numel() for p in module.parameters())


def _kept(model, dtype, n=512):
    """Bytes that autograd keeps: of a decoder layer for a token, and for any more that share it; of a vision block."""
    text, vision, options = model.model.language_model, model.model.visual, dict(dtype=dtype, device="meta")
    bounds = torch.tensor([0, n], dtype=torch.int32)
    x = torch.empty(1, n, text.config.hidden_size, requires_grad=True, **options)
    rope = text.rotary_emb(x, torch.empty(3, 1, n, dtype=torch.long, device="meta"))
    packed = dict(cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, max_length_q=n, max_length_k=n)
    layer = partial(text.layers[0], x, attention_mask=None, position_embeddings=rope, **packed)
    size = vision.config.hidden_size
    rope = torch.empty(2, n, size // vision.config.num_heads, device="meta").unbind()
    patches = torch.empty(n, size, requires_grad=True, **options)
    block = partial(vision.blocks[0], patches, cu_seqlens=bounds, position_embeddings=rope)
    alone = kept_by(layer, model)
    twice = kept_by(partial(layer, key_rows=torch.empty(2 * n, dtype=torch.long, device="meta")), model)
    return alone // n, (twice - alone) // n, kept_by(block, model) // n


class _Fused(torch.autograd.Function):
    """Keeps what fused kernels keep: inputs, output, and the log-sum-exp of each query. It has no backward, because it
    is only counted."""

    @staticmethod
    def forward(ctx, query, key, value):
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, out.new_empty(query.shape[:3], dtype=torch.float32))
        return out


def fused_attention(module, query, key, value, attention_mask=None, key_rows=None, **_):
    """Stands in for the trainer's attention on the meta device, where SDPA would keep all attention weights."""
    if not has_flash_attn() and not varlen_groups_heads():
        key, value = (repeat_heads(x, query.shape[1]) for x in (key, value))
    if key_rows is not None:
        key, value = (x.index_select(2, key_rows) for x in (key, value))
    return _Fused.apply(query, key, value).transpose(1, 2), None


def kept_by(forward, model) -> int:
    """Bytes that autograd keeps for the backward of forward(), without the weights, each storage counted once."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept = {}

    def note(tensor: Tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # a reference, so that its address is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in kept.values())


def needs(
    sizes: Sizes, cfg: Config, gpus: int, cache: int, tokens: int = 0
) -> tuple[dict[str, tuple[float, float]], dict[str, float]]:
    """({part: bytes on each GPU (during the update, during the rollout)}, {part: bytes of each process on the CPU}).
    cache: bytes of the engine's keys and values. tokens: of a packed batch (0: max_tokens_per_batch)."""
    width, shards = compute_dtype(cfg, torch.device("cuda")).itemsize, cfg.shard_size or gpus
    owned = {name: size / shards for name, size in sizes.owned(cfg, width).items()}
    reference = owned.pop("reference")
    engine = width * sizes.total / cfg.tensor_parallel
    on_gpu, reference_on_gpu = cfg.offload != "all", cfg.offload == "none"
    peak = sizes.peak(cfg, width, shards, tokens or cfg.max_tokens_per_batch)
    gpu = {
        "weights": (on_gpu * owned["weights"],) * 2,
        "gradients": (on_gpu * owned["gradients"], 0.0),
        "optimiser": (on_gpu * owned["optimiser"],) * 2,
        "reference": (reference_on_gpu * reference,) * 2,
        **{part: (float(size), 0.0) for part, size in peak.items()},
        "engine's weights": (engine if cfg.engine == "torch" else 0.0, engine),  # vLLM sleeps during the update
        "keys and values": (0.0, float(cache)),
    }
    cpu = {name: (1 - on_gpu) * value for name, value in owned.items()}
    return gpu, {**cpu, "reference": (1 - reference_on_gpu) * reference}


def in_all(gpu: dict[str, tuple[float, float]]) -> tuple[float, float]:
    """Bytes on a GPU during the update and during the rollout."""
    return sum(update for update, _ in gpu.values()), sum(rollout for _, rollout in gpu.values())


def on_disk(sizes: Sizes, cfg: Config) -> tuple[int, int]:
    """Bytes of a checkpoint (fp32 weights, or adapters; AdamW's two moments) and of an exported model."""
    width, trained = compute_dtype(cfg, torch.device("cuda")).itemsize, sizes.trained(cfg)
    if cfg.lora_rank:
        return 12 * trained, width * sizes.total + 4 * trained
    return 4 * sizes.total + 8 * trained, width * sizes.total


def plan(cfg: Config, options: PlanOptions) -> str:
    """The plan as a table. Raises InputError for a model whose configuration cannot be read."""
    gpus = options.gpus or max(1, torch.cuda.device_count())
    name, device = cfg.model, torch.device("cuda")
    with tempfile.TemporaryDirectory() as folder:
        if name == "toy":
            name = folder
            recipe = from_dict(Recipe, PRESETS[cfg.preset])
            save_random_model(folder, cfg.seed, recipe.toy_crop, recipe.toy_json, recipe.toy_backbone)
        sizes = measure(read_config(name), compute_dtype(cfg, device))
        caches = {c: engine_limits(name, c, device, []).cache_bytes for c in (cfg, *same_model(cfg).values())}
    gpu, cpu = needs(sizes, cfg, gpus, caches[cfg])
    title = f"{cfg.model}: {sizes.total / 1e9:.2f} billion parameters; {gpus} GPUs, of {options.gpu_memory:g} GiB each"
    lines = [title, "", f"{'GiB on each GPU':22} {'update':>8} {'rollout':>8}"]
    for part, (during_update, during_rollout) in {**gpu, "in all": in_all(gpu)}.items():
        lines.append(f"{part:22} {during_update / GIB:8.2f} {during_rollout / GIB:8.2f}")
    lines.append(f"in the machine's memory: {4 * sizes.total / GIB:.2f} GiB while the model is read")
    if offloaded := sum(cpu.values()):
        pinned = 2 * offloaded - cpu["optimiser"]  # pinning takes up to twice the memory, see `policy.room_to_pin`
        amount = f"{offloaded / GIB:.2f} GiB, up to {pinned / GIB:.2f} if it has room to pin it"
        lines.append(f"and in the memory of each process: {amount}")
    checkpoint, export = (size / GIB for size in on_disk(sizes, cfg))
    kept = cfg.keep_last + 2  # the best, and the one that is being written
    disk = kept * checkpoint + 2 * export
    lines.append(f"on the disk: {disk:.2f} GiB, {kept} checkpoints of {checkpoint:.2f} and 2 exports of {export:.2f}")
    lines += ["", at_most(sizes, cfg, gpus, caches[cfg], options.gpu_memory * GIB), UNCOUNTED, ""]
    return "\n".join(lines + which_cards(sizes, cfg, caches))


def at_most(sizes: Sizes, cfg: Config, gpus: int, cache: int, memory: float) -> str:
    """The longest packed batch and the most conversations at once that fit a GPU of so many bytes."""
    usable, rollout = memory * (1 - SPARE), in_all(needs(sizes, cfg, gpus, cache)[0])[1]
    tokens = bisect(range(1, 2**24), usable, key=lambda n: in_all(needs(sizes, cfg, gpus, cache, n)[0])[0])
    conversations = int((usable - rollout + cache) // (cache / cfg.concurrency))
    batch = _limit("max_tokens_per_batch", tokens, cfg.max_tokens_per_batch, cfg.max_tokens)
    concurrency = _limit("concurrency", conversations, cfg.concurrency, 1)
    return f"at most, with {SPARE:.0%} kept free: {batch}, {concurrency}"


def _limit(name, value, wanted, least):
    if value < least:
        return f"{name}: none fits"
    short = f" (too little for the {wanted:,} of these settings)" if value < wanted else ""
    return f"{name} {value:,}{short}"


def same_model(cfg: Config) -> dict[str, Config]:
    """The presets of this model, which may also lie in a folder of its name."""
    made = {name: from_dict(Config, {**options, "preset": name}) for name, options in PRESETS.items()}
    return {name: preset for name, preset in made.items() if Path(preset.model).name == Path(cfg.model).name}


def which_cards(sizes: Sizes, cfg: Config, caches: dict[Config, int]) -> list[str]:
    """A table: how many of 1, 2, 4, 8 GPUs of each size are enough for these settings and for the model's presets."""

    def fits(settings, gpus, memory):
        whole = gpus % (settings.shard_size or 1) == gpus % settings.tensor_parallel == 0
        gpu, _ = needs(sizes, settings, gpus, caches[settings])
        return whole and max(in_all(gpu)) <= memory * GIB * (1 - SPARE)

    lines = [f"{'enough GPUs, of':28}" + "".join(f"{card:>8}" for card in CARDS)]
    for name, settings in {"these settings": cfg, **same_model(cfg)}.items():
        line = f"{name:28}"
        for memory in CARDS.values():
            enough = [gpus for gpus in (1, 2, 4, 8) if fits(settings, gpus, memory)]
            line += f"{enough[0] if enough else '-':>8}"
        lines.append(line)
    return lines
