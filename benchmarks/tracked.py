"""The memory plan beside torch's own tracker, without a GPU: the trainer's real code on tensors that hold nothing.

    python benchmarks/tracked.py                                # the table of benchmarks/RESULTS.md, minutes
    python benchmarks/tracked.py --cases qwen3-vl-4b --ranks 1 --options '{"lora_rank": 16}'

`track` makes the policy by `load_policy` (FSDP2 over a process group that is not there), packs conversations, and runs
`update`, with gradients of an earlier batch and the optimiser's state there, under FakeTensorMode and torch's
`FSDPMemTracker`. Its peak and its bytes of weights, gradients and optimiser state stand beside `analysis.plan`'s.

In a CPU build of torch, tensors without data cannot be on a GPU. So they are the CPU's, and where the trainer takes
another way on a GPU, it is led that way: varlen attention, the chunk of the head, its fp32 logits from bf16 factors,
the fused AdamW. What is decided by values (is the loss finite? how many ids are banned?) is answered for it.

Not seen: what is not a tensor (the CUDA context, NCCL's buffers, cuBLAS's and the kernels' own workspaces, fragments),
copies to and from the CPU (offload), and vLLM.
"""

import argparse
import copy
import json
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MethodType, SimpleNamespace
from unittest.mock import patch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from trainer import conversations, save_chat  # noqa: E402

import backbone  # noqa: E402
import policy  # noqa: E402
from analysis import plan  # noqa: E402
from chat import Chat  # noqa: E402
from config import Config  # noqa: E402

GIB, aten = plan.GIB, torch.ops.aten
PARTS = {"weights": "Sharded Param", "gradients": "Sharded Grad", "optimiser": "OptState"}  # the tracker's names
VISION = {  # from the models' config.json
    "qwen2_5_vl": dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16)
    | dict(fullatt_block_indexes=[7, 15, 23, 31], window_size=112),
    "qwen3_vl": dict(depth=24, hidden_size=1024, intermediate_size=4096, num_heads=16, num_position_embeddings=2304)
    | dict(deepstack_visual_indexes=[5, 11, 17]),
}
LARGE = dict(depth=27, hidden_size=1152, intermediate_size=4304, deepstack_visual_indexes=[8, 16, 24])
SMALL = dict(depth=3, hidden_size=128, intermediate_size=384, num_heads=4)
SIZES = {  # family; hidden, intermediate, layers, heads, key heads; vocabulary; tied; of the vision tower
    "qwen2.5-vl-3b": ("qwen2_5_vl", (2048, 11008, 36, 16, 2), 151_936, True, {}),
    "qwen2.5-vl-7b": ("qwen2_5_vl", (3584, 18944, 28, 28, 4), 152_064, False, {}),
    "qwen3-vl-2b": ("qwen3_vl", (2048, 6144, 28, 16, 8), 151_936, True, {}),
    "qwen3-vl-4b": ("qwen3_vl", (2560, 9728, 36, 32, 8), 151_936, True, {}),
    "qwen3-vl-8b": ("qwen3_vl", (4096, 12288, 36, 32, 8), 151_936, False, LARGE),
    "small": ("qwen2_5_vl", (256, 1024, 4, 4, 2), 2048, True, SMALL | dict(fullatt_block_indexes=[1])),
    "small-qwen3": ("qwen3_vl", (256, 1024, 4, 4, 2), 2048, False, SMALL | dict(deepstack_visual_indexes=[0, 1])),
}


def configuration(name: str):
    """transformers' configuration of a model of this size, as far as memory depends on it."""
    import transformers

    family, numbers, words, tied, eyes = SIZES[name]
    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads".split()
    text = dict(zip(names, numbers, strict=True), vocab_size=words)
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    rope = dict(rope_type="default", rope_theta=1e6, mrope_section=[half // 4, half * 3 // 8, half * 3 // 8])
    if family == "qwen3_vl":
        text["head_dim"] = 128
        rope |= dict(mrope_section=[24, 20, 20], mrope_interleaved=True)
    vision = VISION[family] | eyes | dict(out_hidden_size=text["hidden_size"])
    kind = backbone.FAMILIES[family][1].replace("ForConditionalGeneration", "Config")
    text["rope_parameters"] = rope
    return getattr(transformers, kind)(text_config=text, vision_config=vision, tie_word_embeddings=tied)


class Answers(TorchDispatchMode):
    """Answers what would have to be read from a tensor: numbers are 1 (finite, true), no id is banned, and a mask marks
    `marked` places (deepstack's are the vision tokens)."""

    def __init__(self, marked: int):
        super().__init__()
        self.marked = marked

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten._local_scalar_dense.default:
            kind = args[0].dtype
            return True if kind == torch.bool else 1.0 if kind.is_floating_point else 1
        if func is aten._fused_adamw_.default:  # in place; here it would be made of copies
            return None
        if func is aten.nonzero.default:
            return args[0].new_empty(0, args[0].ndim, dtype=torch.long)
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default):
            places = []
            for index in args[1]:
                masks = index is not None and index.dtype == torch.bool
                found = [index.new_empty(self.marked, dtype=torch.long) for _ in index.shape] if masks else [index]
                places += found
            args = (args[0], places, *args[2:])
        return func(*args, **(kwargs or {}))


def as_on_a_gpu(config) -> ExitStack:
    """While it is open, the trainer does on fake CPU tensors what it does on a GPU's."""

    def logits(hidden, weight):
        return hidden.new_empty(len(hidden), len(weight), dtype=torch.float32)

    def mesh(*arguments, **options):  # its numbers are read
        with unset_fake_temporarily():
            return make_mesh(*arguments, **options)

    adamw, make_mesh = torch.optim.AdamW, dist.init_device_mesh
    stack = ExitStack()
    for place, attribute, value in (
        (backbone, "read_model", lambda folder, empty: backbone.empty_model(copy.deepcopy(config))),
        (backbone, "pick_attention", lambda kind, query: "varlen"),
        (policy, "HEAD_LOGITS", {"cpu": policy.HEAD_LOGITS["cuda"]}),
        (policy, "head_logits", logits),
        (policy, "all_sum", lambda values, device: {name: 1.0 for name in values}),
        (policy, "all_gather", lambda items: items),
        (dist, "init_device_mesh", mesh),
        (torch.distributed.tensor._sharding_prop, "detect_fake_mode", lambda: None),  # or its whole tensors would count
        (torch.optim, "AdamW", lambda *a, fused=None, **options: adamw(*a, fused=True, **options)),
        (torch.distributed.checkpoint.state_dict, "set_model_state_dict", lambda *a, **k: None),
    ):
        stack.enter_context(patch.object(place, attribute, value))
    return stack


def vision_indices(visual, grids: torch.Tensor) -> dict:
    """What the vision tower computes from the values of `grids`, as keywords that it takes instead."""
    from transformers import vision_utils as utils

    merge, config = visual.spatial_merge_size, visual.config
    cu_seqlens, max_seqlen = utils.get_vision_attention_seqlens(grids, config)
    given = {"position_ids": utils.get_vision_position_ids(grids, merge)}
    given |= {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
    if hasattr(visual, "window_size"):
        sizes = dict(spatial_merge_size=merge, window_size=visual.window_size, patch_size=visual.patch_size)
        index, windows = utils.get_vision_window_index(grids, **sizes)
        given |= {"window_index": index, "cu_window_seqlens": windows}
        given["max_window_seqlen"] = utils.get_max_seqlen(windows, config)
    if hasattr(visual, "pos_embed"):
        given["interp_indices"], given["interp_weights"] = utils.get_vision_interpolation_indices_and_weights(
            grids, num_grid_per_side=visual.num_grid_per_side, mode=visual.interpolation_mode,
            align_corners=visual.interpolation_align_corners, spatial_merge_size=merge,
        )  # fmt: skip
    return given


def track(config, cfg: Config, ranks: int, case) -> dict[str, int]:
    """Bytes on rank 0 of `ranks`: weights, gradients, optimiser and peak of an update in the middle of a step, when
    gradients of earlier batches and the optimiser's state are there, and `tokens` and `patches` of its packed batch.
    config: transformers', of the model; case: its conversations, see `trainer.conversations`."""
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    with tempfile.TemporaryDirectory() as folder:
        save_chat(Path(folder))
        pixels = dict(min_pixels=28 * 28, max_pixels=1280 * 32 * 32, patch_size=config.vision_config.patch_size)
        Qwen2VLImageProcessorPil(**pixels).save_pretrained(folder)
        chat = Chat(folder, cfg)
    for name in ("image", "video"):
        setattr(config, f"{name}_token_id", chat.tokenizer.convert_tokens_to_ids(f"<|{name}_pad|>"))
    with torch.device("meta"):
        empty = backbone.empty_model(copy.deepcopy(config))
    episodes = [sample.episode for sample in conversations(case, chat)]
    (batch,) = policy.pack(episodes, chat, empty, cfg.max_tokens_per_batch, [1.0] * len(episodes))
    policy.prepare(empty, chat, cfg)
    indices = vision_indices(empty.model.visual, batch.grids)
    device, mode = torch.device("cpu"), FakeTensorMode()
    with as_on_a_gpu(config), mode:
        model = policy.load_policy("", chat, cfg, device)
        optimizer = policy.adamw(model, cfg, device)
        visual = model.model.visual
        visual.forward = partial(visual.forward, **fake(indices, mode))
        model.forward = MethodType(policy.packed_logprobs, model)  # the tracker looks for the root's forward
        model.packed_logprobs = model.__call__
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.zero_grad = lambda **_: None  # they stand for the gradients of earlier batches
        tracker = FSDPMemTracker(model, optimizer)
        with tracker, Answers(len(batch.vision_positions)):
            optimizer.step()
            policy.update(model, optimizer, [replace(batch, **fake(vars(batch), mode))], loss, cfg, device)
    dist.destroy_process_group()
    now = {getattr(kind, "value", kind): size for kind, size in tracker.get_tracker_snapshot()[device].items()}
    peak = {getattr(kind, "value", kind): size for kind, size in tracker.get_tracker_snapshot("peak")[device].items()}
    print({kind: round(size / GIB, 2) for kind, size in peak.items() if size}, file=sys.stderr)
    sizes = {part: now[kind] for part, kind in PARTS.items()}
    return {**sizes, "peak": peak["Total"], "tokens": len(batch.ids), "patches": len(batch.pixels)}


def fake(values: dict, mode: FakeTensorMode) -> dict:
    return {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in values.items()}


def loss(batch, logp, entropy):
    return -(logp * batch.advantage).sum(), len(logp), {}


def planned(config, cfg: Config, ranks: int, tracked: dict[str, int]) -> dict[str, float]:
    """What the plan says of the same, with as many vision tokens as the packed batch has."""
    with patch.object(plan, "IMAGE_SHARE", tracked["patches"] / 4 / tracked["tokens"]):
        gpu, _ = plan.needs(plan.measure(config, torch.bfloat16), cfg, ranks, 0, tracked["tokens"])
    del gpu["engine's weights"]
    return {name: gpu[name][0] for name in PARTS} | {"peak": plan.in_all(gpu)[0]}


def settings(**changes) -> Config:
    """Of a packed batch of 8,192 tokens."""
    sizes = dict(min_pixels=448**2, max_pixels=448**2, thumb_min_pixels=224**2, thumb_max_pixels=224**2)
    options = dict(dtype="bf16", max_tokens=4096, gradient_checkpointing=True, entropy_coef=0.0)
    options |= dict(samples_per_prompt=2)
    return Config(**sizes | options | changes)


def conversations_of(tokens: int, length: int, pixels: int = 448) -> SimpleNamespace:
    count = tokens // length
    return SimpleNamespace(
        seed=0, images=4, pixels=pixels, prompt=0, conversations=count, group=2, length=(length, length)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=SIZES, default=["qwen2.5-vl-3b", "qwen2.5-vl-7b"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--options", type=json.loads, default={}, help="of the run, as JSON")
    args = parser.parse_args()
    print(f"{'GiB, tracked / planned':26}" + "".join(f"{part:>18}" for part in (*PARTS, "peak")))
    for name in args.cases:
        for ranks in args.ranks:
            started, cfg = time.perf_counter(), settings(**args.options)
            found = track(configuration(name), cfg, ranks, conversations_of(8192, 2048))
            said = planned(configuration(name), cfg, ranks, found)
            row = "".join(f"{found[part] / GIB:>9.2f} / {said[part] / GIB:6.2f}" for part in said)
            seconds = time.perf_counter() - started
            print(f"{name}, {ranks} rank{'s' * (ranks > 1):10}{row}   {said['peak'] / found['peak'] - 1:+.1%}", end="")
            print(f"   ({seconds:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
