"""The memory plan: its counts against a real model, and that it adds up."""

import importlib
import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, both_families, question, replace

import backbone
import checkpoint
import config
import policy
from analysis import plan
from analysis.__main__ import main
from analysis.plan import PlanOptions
from backbone import head_size, read_config
from chat import Episode
from config import InputError
from engines import Reply
from toy import Recipe
from toy.model import save_random_model


@pytest.fixture(scope="module")
def sizes(folder):
    return plan.measure(read_config(folder), torch.float32)


@both_families
def test_counts_are_those_of_the_model(sizes, model):
    count = sum(p.numel() for p in model.parameters())  # the tied head once
    assert sizes.total == count and sizes.root + sizes.layers * layer_size(model) + block_sizes(model) == count
    assert sizes.vision == sum(p.numel() for p in model.model.visual.parameters())


def layer_size(model):
    return sum(p.numel() for p in model.model.language_model.layers[0].parameters())


def block_sizes(model):
    return sum(p.numel() for p in model.model.visual.blocks.parameters())


@both_families
@pytest.mark.parametrize("rank", [0, 256])
def test_what_autograd_keeps_is_what_it_keeps_of_a_real_batch(sizes, folder, chat, cfg, device, rank, monkeypatch):
    """The whole model over conversations about one picture; apart from layers and blocks there is little."""
    model = policy.load_policy(folder, chat, replace(cfg, lora_rank=rank), device)
    episodes = []
    for number, length in enumerate((30, 70, 90)):
        episode = Episode.start(replace(question(), id=str(number)), chat)
        episode.add_reply(Reply("", [*range(300, 300 + length), chat.im_end], [0.0] * (length + 1), "stop", 0))
        episodes.append(episode)
    (batch,) = policy.pack(episodes, chat, model, 1000)
    kept = plan.kept_by(lambda: backbone.packed_hidden(model, batch), model)
    monkeypatch.setattr(plan, "IMAGE_SHARE", len(batch.pixels) / 4 / len(batch.ids))
    expected, _ = sizes.kept(replace(cfg, lora_rank=rank, samples_per_prompt=2), 4)
    expected -= sizes.layers * sizes.layer_shared  # of the second sample: here, nothing is shared
    assert kept == pytest.approx(expected * len(batch.ids), rel=0.15)


@both_families
def test_shared_keys_and_values_are_kept_for_each_conversation(sizes, model):
    text = model.config.text_config
    shared = 2 * 4 * text.num_key_value_heads * head_size(text)
    assert shared <= sizes.layer_shared <= shared + 16  # and their places
    two, eight = (sizes.kept(config.Config(samples_per_prompt=n), 4)[0] for n in (2, 8))
    assert eight - two == 6 * sizes.layers * sizes.layer_shared


def test_the_parts_follow_the_settings(sizes):
    cfg = config.Config(kl_coef=0.1, dtype="bf16")
    one, _ = plan.needs(sizes, cfg, 1, cache=1000)
    four, _ = plan.needs(sizes, cfg, 4, cache=1000)
    for part in ("weights", "gradients", "optimiser", "reference"):
        assert four[part][0] == one[part][0] / 4 > 0
    assert one["optimiser"][0] == 8 * sizes.total and four["engine's weights"] == (2 * sizes.total,) * 2
    hybrid, _ = plan.needs(sizes, replace(cfg, shard_size=2), 4, cache=1000)
    assert hybrid["optimiser"][0] == one["optimiser"][0] / 2
    offloaded, cpu = plan.needs(sizes, replace(cfg, offload="all"), 4, cache=1000)
    assert offloaded["optimiser"] == offloaded["reference"] == (0, 0) and cpu["optimiser"] == four["optimiser"][0]
    assert cpu["reference"] == four["reference"][0]
    offloaded, cpu = plan.needs(sizes, replace(cfg, offload="reference"), 4, cache=1000)
    assert offloaded["optimiser"] == four["optimiser"] and cpu["optimiser"] == 0
    assert offloaded["reference"] == (0, 0) and cpu["reference"] == four["reference"][0]
    frozen, _ = plan.needs(sizes, replace(cfg, freeze_vision=True), 1, cache=1000)
    assert frozen["optimiser"][0] == 8 * (sizes.total - sizes.vision) < one["optimiser"][0]
    again, _ = plan.needs(sizes, replace(cfg, gradient_checkpointing=True), 1, cache=1000)
    assert again["activations"][0] < one["activations"][0] / 2
    vllm, _ = plan.needs(sizes, replace(cfg, engine="vllm"), 1, cache=1000)
    assert vllm["engine's weights"] == (0.0, 2 * sizes.total)  # asleep during the update


@pytest.mark.parametrize("freeze_vision", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_adapters_are_planned_as_they_are(sizes, folder, chat, cfg, device, dtype, freeze_vision):
    """Against a model: weights in the type of computing, gradients and moments of adapters alone, no reference."""
    cfg = replace(cfg, freeze_vision=freeze_vision, lora_rank=4, kl_coef=0.1, dtype=dtype)
    model = policy.load_policy(folder, chat, cfg, device)
    parts, _ = plan.needs(sizes, cfg, 2, cache=1000)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 0 < trained < sizes.total and parts["gradients"][0] == 4 * trained / 2
    assert parts["weights"][0] == sum(p.numel() * p.itemsize for p in model.parameters()) / 2
    assert parts["optimiser"][0] == 8 * trained / 2 and parts["reference"] == (0, 0)
    assert parts["gradients in work"] == (0, 0)
    whole, _ = plan.needs(sizes, replace(cfg, lora_rank=0), 2, cache=1000)
    assert whole["gradients in work"][0] >= sizes.head_gradient
    _, cpu = plan.needs(sizes, replace(cfg, offload="all"), 2, cache=1000)
    assert cpu["weights"] == parts["weights"][0] and cpu["reference"] == 0


TRACK = """
import json, sys
sys.path.insert(0, "benchmarks")
import tracked
small = dict(min_pixels=224**2, max_pixels=224**2, max_tokens=512, max_tokens_per_batch=2048)
for name, ranks, changes in json.loads(sys.argv[1]):
    cfg = tracked.settings(**small | changes)
    found = tracked.track(tracked.configuration(name), cfg, ranks, tracked.conversations_of(2048, 512, 224))
    print(json.dumps([found, tracked.planned(tracked.configuration(name), cfg, ranks, found)]))
"""
TRACKED = [
    ("small", 1, {}), ("small", 8, {}), ("small-qwen3", 8, {}), ("small-qwen3", 1, {"lora_rank": 16}),
    ("small", 1, {"gradient_checkpointing": False}),
]  # fmt: skip


def test_an_update_takes_what_the_plan_says():
    """The trainer's code on tensors that hold nothing, under torch's own tracker (benchmarks/tracked.py, which also
    has 3B and 7B)."""
    command = [sys.executable, "-c", TRACK, json.dumps(TRACKED)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for case, line in zip(TRACKED, done.stdout.splitlines(), strict=True):
        found, planned = json.loads(line)
        for part in ("weights", "gradients", "optimiser"):
            assert planned[part] == pytest.approx(found[part], rel=0.02), (case, part)
        most = 1.2 if case[2].get("lora_rank") else 1.1  # frozen norms keep less, which shows in so small a model
        assert 0.95 < planned["peak"] / found["peak"] < most, (case, found)


@pytest.mark.parametrize("changes", [{}, {"freeze_vision": True}, {"lora_rank": 16}], ids=str)
def test_the_disk_holds_what_the_plan_says(sizes, folder, chat, cfg, device, tmp_path, changes):
    cfg = replace(cfg, **changes)
    model = policy.load_policy(folder, chat, cfg, device)
    checkpoint.save_state(tmp_path / "checkpoint", model, policy.adamw(model, cfg, device), {"step": 1})
    checkpoint.export_hf(tmp_path / "export", model, chat)
    for name, expected in zip(("checkpoint", "export"), plan.on_disk(sizes, replace(cfg, dtype="fp32")), strict=True):
        size = sum(p.stat().st_size for p in (tmp_path / name).rglob("*") if p.suffix in (".distcp", ".safetensors"))
        more = 1.5 if name == "checkpoint" and cfg.lora_rank else 1.1
        assert expected <= size < more * expected  # the model is so small that names and headers show


def test_before_torch_2_12_repeated_keys_and_values_are_kept(folder, monkeypatch):
    def kept(groups):
        monkeypatch.setattr(plan, "varlen_groups_heads", lambda: groups)
        config = read_config(folder)
        config.text_config.num_key_value_heads = 1
        return config.text_config, plan.measure(config, torch.bfloat16).layer_kept

    (text, repeated), (_, grouped) = kept(False), kept(True)
    assert repeated - grouped == 2 * 2 * (text.hidden_size - text.hidden_size // text.num_attention_heads)


def test_offloaded_memory_is_given_with_and_without_pinning(sizes, folder, monkeypatch):
    monkeypatch.setattr(plan, "GIB", 1)  # bytes: the model is too small for GiB of two digits
    cfg = config.Config(model=str(folder), offload="all", kl_coef=0.1)
    text = plan.plan(cfg, PlanOptions(gpus=1))
    least, most = map(float, re.search(r"of each process: ([\d.]+) GiB, up to ([\d.]+)", text).groups())
    assert least == 20 * sizes.total  # weights, gradients, reference; state of 8 bytes
    assert most == 32 * sizes.total  # all but the state twice


def test_the_largest_batch_just_fits(folder):
    cfg, options = config.Config(model=str(folder)), PlanOptions(gpus=2, gpu_memory=0.5)

    def plan_of(tokens):
        text = plan.plan(replace(cfg, max_tokens_per_batch=tokens), options)
        in_all = float(re.search(r"in all +([\d.]+)", text)[1])
        return text, in_all, int(re.search(r"max_tokens_per_batch ([\d,]+)", text)[1].replace(",", ""))

    _, _, most = plan_of(8192)
    usable = options.gpu_memory * (1 - plan.SPARE)
    assert plan_of(most)[1] <= usable + 0.005 < plan_of(int(most * 1.1))[1]
    assert plan_of(300)[2] == most and "too little for" in plan_of(2 * most)[0]


def test_the_plan_command(tmp_path, capsys):
    run_dir = tmp_path / "run"
    main(["plan", "--gpus=8", "--gpu_memory=0.001", f"--run_dir={run_dir}"])
    printed = capsys.readouterr().out
    assert "8 GPUs, of 0.001 GiB each" in printed and "none fits" in printed
    with pytest.raises(InputError, match="cannot load the model"):
        main(["plan", "--preset=qwen2.5-vl-3b", f"--model={tmp_path / 'nothing'}", f"--run_dir={run_dir}"])
    assert not run_dir.exists()


@pytest.mark.parametrize("preset", ["toy", "toy-crop", "toy-json", "toy-qwen3"])
def test_the_toy_model_that_is_planned_is_the_presets(preset, tmp_path):
    cfg, recipe = config.parse([f"--preset={preset}"], config.Config, Recipe)
    save_random_model(tmp_path, 0, recipe.toy_crop, recipe.toy_json, recipe.toy_backbone)
    planned = [plan.plan(c, PlanOptions(gpus=1, gpu_memory=0.25)) for c in (cfg, replace(cfg, model=str(tmp_path)))]
    ours, theirs = (text[text.index(":") : text.index("enough GPUs")] for text in planned)
    assert ours == theirs


@pytest.mark.parametrize(
    ("preset", "all_weights"),
    [("qwen2.5-vl-3b-24gb", ["8", "2", "1", "1"]), ("qwen3-vl-4b-24gb", ["-", "-", "2", "1"])],
)
def test_a_card_of_24_gb_is_enough_for_its_presets(preset, all_weights, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    name, folder = preset.removesuffix("-24gb"), tmp_path / config.PRESETS[preset]["model"].split("/")[1]
    importlib.import_module("tracked").configuration(name).save_pretrained(folder)
    main(["plan", f"--preset={preset}", f"--model={folder}", "--gpus=1", "--gpu_memory=23.9"])
    printed = capsys.readouterr().out
    rows = dict(re.findall(r"^(\S.*?)  +((?:[0-9-]+ +){3}[0-9-]+)$", printed, re.M))
    assert {"these settings", preset, name} == rows.keys() and rows[name].split() == all_weights
    assert rows["these settings"].split() == rows[preset].split() == ["1"] * 4
    in_all = [float(size) for size in re.search(r"in all +([\d.]+) +([\d.]+)", printed).groups()]
    assert max(in_all) < 0.85 * 23.9 and "CUDA context" in printed and "while the model is read" in printed
