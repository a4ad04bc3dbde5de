"""The toy world's tokenizer and its random model: a Qwen2.5-VL or a Qwen3-VL in all but size."""

import json
from itertools import chain
from pathlib import Path

import torch

from toy.world import COLORS, CROP_WORDINGS, FACTS, NUMBERS, PATTERNS, SEEING, SEEKING, SHAPES, SYLLABLES, WORDINGS

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
TAGS = ("reason", "answer", "search", "text_search", "information")
JSON_TEMPLATE = (  # with the names of the tools, and their results
    "{% if tools %}<|im_start|>system\n<tools>{% for tool in tools %} {{ tool.function.name }}{% endfor %}</tools>"
    "<|im_end|>\n{% endif %}{% for message in messages %}{% if message['role'] == 'tool' %}"
    "{% if messages[loop.index0 - 1]['role'] != 'tool' %}<|im_start|>user\n{% endif %}"
    "<tool_response>\n{{ message['content'] }}\n</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1]['role'] != 'tool' %}<|im_end|>\n{% endif %}"
    "{% else %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
JSON_TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<tools>", "</tools>")
JSON_TAGS += ("image_search", "text_search", '{"name": "', '", "arguments": {', '"query": "', '"}}', "}}")
CROP_TAGS = ("<crop>", "</crop>", "<img_2>", " 0", " 500", " 1000")
OTHER_WORDS = "user assistant system unknown say find think or answer the search failed found nothing"


def save_tokenizer(path: Path, crop: bool = False, json_calls: bool = False) -> None:
    """A byte-level BPE with Qwen's special tokens: a token for each syllable and for each word of the world; everything
    else falls to pieces, but nothing is unknown. crop, json_calls: with the tags, words and numbers of these worlds."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    trained = Tokenizer(models.BPE())  # each text is a word of ASCII: Qwen's normalisation and splits change nothing
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    sentences = " ".join([SEEING, *chain.from_iterable(WORDINGS.values())])
    if crop:
        sentences = " ".join(["crop", *NUMBERS, sentences, SEEKING, *CROP_WORDINGS["name"]]).format("", "")
    words = {*SHAPES, *COLORS, *PATTERNS, *FACTS, *sentences.replace("?", "").split()}
    words = [*sorted(words), *OTHER_WORDS.split()]
    corpus = ([f" {s}" for s in SYLLABLES] + SYLLABLES) * 50  # often, so that no word's pieces cut through a name
    corpus += [f" {w}" for w in words] + words
    specials = [f"<|{name}|>" for name in SPECIAL]
    options = dict(initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False)
    trained.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=1000, special_tokens=specials, **options))
    model = json.loads(trained.to_str())["model"]
    tokenizer = Qwen2Tokenizer(vocab=model["vocab"], merges=[tuple(m) for m in model["merges"]])
    tokenizer.add_special_tokens({"additional_special_tokens": specials})
    tags = [f"<{slash}{tag}>" for tag in TAGS for slash in ("", "/")] + ["<img>"]
    tags += (CROP_TAGS if crop else ()) + (JSON_TAGS if json_calls else ())
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    tokenizer.chat_template = JSON_TEMPLATE if json_calls else CHAT_TEMPLATE
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.save_pretrained(path)


def save_random_model(
    path: Path, seed: int, crop=False, json_calls=False, backbone: str = "qwen2_5_vl", beliefs: bool = True
) -> None:
    """Tokenizer, image processor and a random model of a family: a Qwen2.5-VL of about 0.7 million parameters (crop, or
    no beliefs: 1.2 million), or a Qwen3-VL of one million. Like the real ones of its family, the latter has heads wider
    than hidden size / heads, two layers of its vision tower that speak to the decoder's first (deepstack), and
    interpolated positions."""
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    save_tokenizer(path, crop, json_calls)
    tokenizer = transformers.Qwen2Tokenizer.from_pretrained(path)
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in SPECIAL}
    rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 6, 6])
    layers, width = (4, 384) if crop or not beliefs else (2, 256)  # two layers are too few there: RESULTS.md
    text = dict(
        vocab_size=-(-len(tokenizer) // 64) * 64, hidden_size=128, intermediate_size=width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=32768, initializer_range=0.05,
        rope_parameters=rope, bos_token_id=None, eos_token_id=ids["im_end"], pad_token_id=ids["endoftext"],
    )  # fmt: skip
    vision = dict(hidden_size=64, intermediate_size=128, num_heads=4, out_hidden_size=128, initializer_range=0.05)
    if backbone == "qwen2_5_vl":
        kind, pixels = "Qwen2_5_VL", dict(min_pixels=28 * 28, max_pixels=28 * 28 * 1280)
        vision |= dict(depth=2, window_size=112, fullatt_block_indexes=[1])
    else:
        kind, pixels = "Qwen3VL", dict(min_pixels=28 * 28, max_pixels=32 * 32 * 1280, patch_size=16)
        pixels |= dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)
        vision |= dict(depth=3, deepstack_visual_indexes=[0, 1], num_position_embeddings=16)
        text |= dict(head_dim=64, rope_parameters=rope | dict(mrope_section=[12, 10, 10], mrope_interleaved=True))
    special = {f"{name}_token_id": ids[f"{name}_pad"] for name in ("image", "video")}
    special |= {f"{name}_token_id": ids[name] for name in ("vision_start", "vision_end")}
    parts = dict(text_config=text, vision_config=vision, tie_word_embeddings=True, **special)
    config = getattr(transformers, f"{kind}Config")(**parts)
    torch.manual_seed(seed)
    getattr(transformers, f"{kind}ForConditionalGeneration")(config).save_pretrained(path)
    Qwen2VLImageProcessorPil(**pixels).save_pretrained(path)
