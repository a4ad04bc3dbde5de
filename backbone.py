"""What differs between model families, Qwen2.5-VL and Qwen3-VL, and attention over packed sequences.

The rest of the code reaches a model's inside only through these functions.

Axes: T tokens of a packed batch, P image patches, C vision tokens, H hidden size, D head dimension, F features of a
vision token: H, and in a Qwen3-VL as many again for each decoder layer that adds some (deepstack).
"""

import copy
import importlib.util
from collections import defaultdict
from functools import cache
from inspect import signature
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from chat import Chat, Picture
from config import InputError, need
from data import first_line, refusing

# model_type -> name, class in transformers, sizes that only its vision tower has
FAMILIES = {
    "qwen2_5_vl": ("Qwen2.5-VL", "Qwen2_5_VLForConditionalGeneration", "window_size tokens_per_second"),
    "qwen3_vl": ("Qwen3-VL", "Qwen3VLForConditionalGeneration", "num_position_embeddings"),
}


def model_class(config):
    import transformers

    return getattr(transformers, FAMILIES[config.model_type][1])


def read_model(folder: str | Path, *, empty: bool = False):
    """transformers' model in fp32 on the CPU; empty: see `empty_model`."""
    check_versions()
    config = read_config(folder)
    if empty:
        return empty_model(config)
    try:
        model, report = model_class(config).from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    except Exception as error:  # of transformers, safetensors, huggingface_hub ...: each has its own classes
        shapes = "mismatched_sizes" in str(error)
        what = "the weights' shapes are not those of its config.json" if shapes else first_line(error)
        raise InputError(f"{folder}: cannot load the model ({what})") from None
    missing = sorted(report["missing_keys"])  # transformers fills them with random numbers
    need(not missing, f"{folder}: {len(missing)} weights are missing, among them {missing[:1]}")
    tied = [name for name, _ in model.named_parameters()] == parameter_names(config)  # from_pretrained may untie it
    how = 'set "tie_word_embeddings" to false in its config.json, or remove lm_head.weight'
    need(tied, f"{folder}: the config ties the head to the embeddings, and its weights differ: {how}")
    return model


def read_config(folder: str | Path):
    """transformers' configuration of a model of one of the FAMILIES. Raises InputError if it is none."""
    from transformers import AutoConfig

    with refusing(f"{folder}: cannot load the model", Exception):  # as above
        config = AutoConfig.from_pretrained(folder)
    kind = config.model_type
    need(kind in FAMILIES, f"{folder}: unsupported architecture {kind!r}, expected one of {', '.join(FAMILIES)}")
    family, _, own_sizes = FAMILIES[kind]
    text, vision = config.text_config, config.vision_config
    what = f"{folder}: its config.json does not describe a {family}"
    # transformers takes any, and fails much later
    for part, names in ((text, TEXT_SIZES), (vision, f"{VISION_SIZES} {own_sizes}")):
        theta = (part.rope_parameters or {}).get("rope_theta")
        need(isinstance(theta, int | float) and theta > 0, f"{what}: rope_theta is {theta!r}")
        need(isinstance(part.dtype, torch.dtype | None), f"{what}: dtype is {part.dtype!r}")
        for name in names.split():
            value, limit = getattr(part, name, None), 10**3 if name in ("num_hidden_layers", "depth") else 10**6
            need(isinstance(value, int) and 0 < value < limit, f"{what}: {name} is {value!r}")
    need(vision.out_hidden_size == text.hidden_size, f"{what}: out_hidden_size is not hidden_size")
    layers = getattr(vision, "deepstack_visual_indexes", ())
    sound = len({*layers}) == len(layers) <= text.num_hidden_layers and {*layers} <= {*range(vision.depth)}
    need(sound, f"{what}: deepstack_visual_indexes is {layers!r}")
    head, sections = head_size(text), text.rope_parameters.get("mrope_section")
    whole = isinstance(sections, list) and all(isinstance(n, int) and n > 0 for n in sections)
    need(whole and 2 * sum(sections) == head, f"{what}: mrope_section is {sections!r}, a head has {head} dimensions")
    return config


TEXT_SIZES = "num_hidden_layers num_attention_heads num_key_value_heads hidden_size intermediate_size vocab_size"
VISION_SIZES = (
    "depth num_heads patch_size spatial_merge_size temporal_patch_size in_channels hidden_size intermediate_size "
    "out_hidden_size"
)


def head_size(text) -> int:
    """D of the decoder, by its configuration."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def check_chat(config, chat: Chat) -> None:
    """Raises InputError if tokenizer or image processor are not this model's."""
    vision, vocabulary, tokens = config.vision_config, config.text_config.vocab_size, len(chat.tokenizer)
    need(tokens <= vocabulary, f"the tokenizer has {tokens} tokens, the model only {vocabulary}")
    sizes = [vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size]
    need(sizes == chat.sizes, f"{chat.folder}: the image processor's sizes are {chat.sizes}, the model's {sizes}")


def empty_model(config):
    """A model whose weights are yet to come: memory is reserved and not filled."""
    from transformers.initialization import no_init_weights

    with no_init_weights():
        model = model_class(config)(config)
    model.tie_weights()  # a tied head is left untied there
    return model


def parameter_names(config) -> list[str]:
    """The names of a model's parameters; a shared one (tied embeddings) once."""
    with torch.device("meta"):
        return [name for name, _ in empty_model(config).named_parameters()]


def check_versions() -> None:
    import transformers
    from packaging.version import Version

    version = Version(transformers.__version__)
    sound = not Version("5.3.0") <= version <= Version("5.5.3")
    need(sound, f"transformers {version} gives still images wrong M-RoPE positions; install 5.6 or later")


def embed_patches(embed, pixels: Tensor) -> Tensor:
    """[P, patch] to [P, H] by a matrix product, which this convolution is: its kernel is the whole patch. It takes a
    third of the time on a CPU; on a GPU, cuDNN can take seconds in bf16, and plans anew for each number of patches."""
    weight = embed.proj.weight
    return F.linear(pixels.flatten(1).to(weight.dtype), weight.flatten(1), embed.proj.bias)


def blocks(model) -> list:
    """The blocks that FSDP gathers one by one; the rest (embedding, head, merger) belongs to the root."""
    return [*model.model.visual.blocks, *model.model.language_model.layers]


def linear_layers(model, vision: bool) -> dict[str, torch.nn.Linear]:
    """The decoder's linear layers by name (attention and MLP; the head is none of them); vision: also those of the
    vision tower and its merger."""
    within = ("model.language_model.", "model.visual.")[: 1 + vision]
    layers = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return {name: layer for name, layer in layers.items() if name.startswith(within)}


def plain_config(model):
    """The model's configuration as transformers knows it, for building another one of its kind."""
    config = copy.deepcopy(model.config)
    config._attn_implementation = "sdpa"
    config.use_cache = True
    return config


def rope_positions(tokens: list[int], pictures: list[Picture], chat: Chat, model) -> Tensor:
    """long [3, T]: M-RoPE over a whole conversation, tool images included, by the model's own get_rope_index."""
    ids = torch.tensor([tokens])
    is_image = (ids == chat.image_pad).int()
    sizes = [[1, *p.grid] for p in pictures]

    def make():
        grids = torch.tensor(sizes) if sizes else None
        return model.model.get_rope_index(ids, mm_token_type_ids=is_image, image_grid_thw=grids)[0][:, 0]

    # They depend on the layout alone, which the conversations of a question share (and those of a tiny world).
    return chat.layouts.get((is_image.numpy().tobytes(), str(sizes)), make)


ATTENTION = "packed_flash"  # the vision tower hands over cumulative lengths only if the name contains "flash"


def packed_attention(
    module, query, key, value, attention_mask=None, *, kind="auto", scaling=None, is_causal=None, cu_seq_lens_q=None,
    cu_seq_lens_k=None, max_length_q=None, max_length_k=None, key_rows=None, **_,
):  # fmt: skip
    """Attention inside each segment of a packed row: query [1, heads, T, D] to ([1, T, heads, D], None).

    The queries of a segment are the last of its keys (the causal mask is aligned to the lower right). key_rows: long
    [K], the rows of `key` and `value` that are the segments' keys (default: all, in order).
    kind: "flash" (flash-attn), "varlen" (torch's own, CUDA), "segments" (SDPA for each length of segment), or "auto",
    the first of these that can run here. Without cu_seq_lens_q (the in-process engine) it is SDPA with attention_mask.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    kind = "dense" if cu_seq_lens_q is None else pick_attention(kind, query)
    grouped = kind == "varlen" and varlen_groups_heads()
    if kind != "flash" and not grouped:
        key, value = (repeat_heads(x, query.shape[1]) for x in (key, value))
    if kind == "dense":
        causal = causal and attention_mask is None
        out = F.scaled_dot_product_attention(query, key, value, attention_mask, is_causal=causal, scale=scaling)
        return out.transpose(1, 2), None
    if kind == "segments":
        segments = cu_seq_lens_q, cu_seq_lens_k, key_rows
        return segment_attention(query, key, value, *segments, causal, scaling).transpose(1, 2), None
    rows = [x[0].transpose(0, 1).contiguous() for x in (query, key, value)]  # [T, heads, D]
    if key_rows is not None:
        rows[1:] = (x.index_select(0, key_rows) for x in rows[1:])  # [K, key heads, D]
    bounds = (x.to(torch.int32) for x in (cu_seq_lens_q, cu_seq_lens_k))
    packed = (*rows, *bounds, int(max_length_q), int(max_length_k))
    if kind == "flash":
        from flash_attn import flash_attn_varlen_func

        out = flash_attn_varlen_func(*packed, softmax_scale=scaling, causal=causal)
    else:
        from torch.nn.attention.varlen import varlen_attn

        window, more = (-1, 0) if causal else (-1, -1), {"enable_gqa": True} if grouped else {}
        out = varlen_attn(*packed, scale=scaling, window_size=window, **more)
    return out[None], None


@cache
def varlen_groups_heads() -> bool:
    """Whether this torch's own kernel takes fewer key heads than query heads: from 2.12 on."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in signature(varlen_attn).parameters


@cache
def has_flash_attn() -> bool:
    """Whether its compiled part is there: other packages have a flash_attn folder, too (flash-attn-4)."""
    return importlib.util.find_spec("flash_attn_2_cuda") is not None


def pick_attention(kind: str, query: Tensor) -> str:
    """Which kernel can run: the fast ones need CUDA and a half-precision type."""
    if not query.is_cuda or query.dtype == torch.float32:
        return "segments"
    best = "flash" if has_flash_attn() else "varlen"
    return best if kind == "auto" else kind


def segment_attention(query, key, value, cu_queries, cu_keys, key_rows, causal, scaling):
    """Segments of one shape form a batch for SDPA, so that short conversations do not cost a call each."""
    ends_of = defaultdict(list)  # (queries, keys) of a segment -> where both end
    for starts, ends in pairwise(zip(cu_queries.tolist(), cu_keys.tolist(), strict=True)):
        ends_of[ends[0] - starts[0], ends[1] - starts[1]].append(ends)
    back = None  # where all are alike, the row is a batch as it stands
    if len(ends_of) > 1 or key_rows is not None:
        queries, keys = [], []
        for (count, length), ends in ends_of.items():
            queries.append((torch.tensor([end for end, _ in ends])[:, None] + torch.arange(-count, 0)).flatten())
            keys.append((torch.tensor([end for _, end in ends])[:, None] + torch.arange(-length, 0)).flatten())
        queries, keys = (torch.cat(rows).to(query.device) for rows in (queries, keys))
        back, keys = torch.argsort(queries), keys if key_rows is None else key_rows[keys]
        query, key, value = (x.index_select(2, rows) for x, rows in ((query, queries), (key, keys), (value, keys)))
    outs, heads = [], query.shape[1]
    sizes = [[shape[i] * len(ends) for shape, ends in ends_of.items()] for i in (0, 1, 1)]
    # one split, not slices: the backward of each slice would fill and add a gradient as long as the row
    spans = zip(*(x[0].split(size, 1) for x, size in zip((query, key, value), sizes, strict=True)), strict=True)
    for ends, span in zip(ends_of.values(), spans, strict=True):
        q, k, v = (x.unflatten(1, (len(ends), -1)).transpose(0, 1) for x in span)  # [segments, heads, length, D]
        out = lower_right_attention(q, k, v, causal, scaling)
        outs.append(out.transpose(0, 1).reshape(1, heads, -1, out.shape[-1]))
    out = torch.cat(outs, 2)
    return out if back is None else out.index_select(2, back)


def lower_right_attention(query, key, value, causal, scaling, block=256):
    """SDPA, its queries the last of the keys; in blocks, because on a CPU it computes what a mask hides."""
    shared, outs = key.shape[2] - query.shape[2], []
    if not shared:
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scaling)
    for start in range(0, query.shape[2], block):
        q = query[:, :, start : start + block]
        seen = shared + start + q.shape[2]
        mask = torch.ones(q.shape[2], seen, dtype=torch.bool, device=q.device).tril(shared + start)
        outs.append(F.scaled_dot_product_attention(q, key[:, :, :seen], value[:, :, :seen], mask, scale=scaling))
    return torch.cat(outs, 2)


def repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Grouped-query attention: key or value heads [1, g, T, D] repeated to `heads`."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def packed_hidden(model, batch) -> Tensor:
    """Last hidden states [T, H] of a `policy.PackedBatch`: the vision tower runs once per distinct image, the decoder
    over the batch. A batch without images runs both too, and its hidden states depend on both."""
    features = see(model, batch.pixels, batch.grids).index_select(0, batch.vision_rows)
    return read(
        model, batch.ids[None], batch.positions[:, None], batch.vision_positions, features,
        attention_mask=None,  # segments are kept apart by cu_seq_lens, not by a mask
        use_cache=False, cu_seq_lens_q=batch.cu_seqlens, cu_seq_lens_k=batch.cu_keys,
        max_length_q=batch.longest[0], max_length_k=batch.longest[1],
        key_rows=batch.keys if len(batch.keys) > len(batch.ids) else None,
    )[0]  # fmt: skip


def see(model, pixels: Tensor, grids: Tensor) -> Tensor:
    """Features [C, F] of pictures' patches [P, patch]."""
    out = model.model.visual(pixels.to(model.model.visual.dtype), grid_thw=grids)
    return torch.cat([out.pooler_output, *getattr(out, "deepstack_features", ())], 1)


def read(model, ids: Tensor, positions: Tensor, places=None, features=None, **options) -> Tensor:
    """Last hidden states [B, N, H] of ids [B, N] at positions [3, B, N]. features: [C, F] of the vision tokens, which
    stand at `places` [C] of the flattened ids (default: there are none)."""
    decoder = model.model.language_model
    embeds = decoder.embed_tokens(ids)
    if features is not None:
        first, *deep = features.to(embeds.dtype).split(embeds.shape[-1], 1)
        embeds = embeds.flatten(0, 1).index_copy(0, places, first).view_as(embeds)
        if deep:
            seen = torch.zeros(ids.numel(), dtype=torch.bool, device=ids.device).index_fill(0, places, True)
            options |= dict(visual_pos_masks=seen.view_as(ids), deepstack_visual_embeds=deep)
    return decoder(inputs_embeds=embeds, position_ids=positions, **options).last_hidden_state
