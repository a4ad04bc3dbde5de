"""Adapters (LoRA): nothing at first, then all that is trained; the base is the reference; checkpoints and exports."""

import importlib.util

import pytest
import torch
from conftest import both_families, question, replace
from safetensors.torch import load_file
from test_policy import (
    ADVANTAGES,
    Plain,
    assert_same,
    everything,
    one_line,
    reinforce,
    same_bits,
    save_sharp_model,
    some_episodes,
    wide_range,
)  # fmt: skip

import backbone
import checkpoint
import policy
import train
from chat import Chat
from config import InputError
from engines import TorchEngine
from rollout import run


@pytest.fixture(scope="module")
def sharp(folder, tmp_path_factory):
    return save_sharp_model(folder, tmp_path_factory.mktemp("sharp") / "model")


WHERE = pytest.mark.parametrize("freeze_vision", [False, True], ids=["all layers", "decoder"])


@pytest.fixture
def wide(cfg):
    return replace(wide_range(cfg), lora_rank=3, lr=0.02)


@pytest.fixture
def chat(sharp, wide):
    return Chat(sharp, wide)


@pytest.fixture
def episodes(chat):
    return some_episodes(chat)


def logps(model, episodes, chat, device):
    return torch.cat(policy.logprobs(model, policy.pack(episodes, chat, model, 1000), 1.0, device))


def learn(model, episodes, chat, cfg, device, steps=3):
    """Updates; returns the optimiser."""
    optimizer = policy.adamw(model, cfg, device)
    for _ in range(steps):
        batches = policy.pack(episodes, chat, model, 1000, ADVANTAGES)
        policy.update(model, optimizer, batches, reinforce("tokens"), cfg, device)
    return optimizer


def base_of(model):
    """Copies of the weights that the adapters were put on."""
    return {n: policy.whole(p).clone() for n, p in model.named_parameters() if "lora" not in n}


@WHERE
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_only_adapters_are_trained_and_the_base_is_there_all_the_time(
    sharp, chat, episodes, wide, device, dtype, freeze_vision
):
    cfg = replace(wide, dtype=dtype, freeze_vision=freeze_vision, gradient_checkpointing=freeze_vision)
    plain = policy.load_policy(sharp, chat, replace(cfg, lora_rank=0), device)
    model = policy.load_policy(sharp, chat, cfg, device)
    layers, kept = policy.adapted_layers(model), policy.compute_dtype(cfg, device)
    kinds = {name.rpartition(".")[2] for name in layers}
    assert {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"} <= kinds
    assert ("model.visual.merger.mlp.0" in layers) == any("visual" in name for name in layers) != freeze_vision
    before, first = base_of(model), logps(plain, episodes, chat, device)
    assert torch.equal(logps(model, episodes, chat, device), first)  # to the bit
    optimizer = learn(model, episodes, chat, cfg, device)
    trained = dict(n for n in model.named_parameters() if n[1].requires_grad)
    assert len(trained) == 2 * len(layers) == len(optimizer.state)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert all(policy.whole(p).abs().max() > 1e-3 for p in trained.values())  # B, too, has left zero
    after = base_of(model)
    assert {v.dtype for v in after.values()} == {kept} and all(torch.equal(v, after[n]) for n, v in before.items())
    assert (logps(model, episodes, chat, device) - first).abs().max() > 0.01
    with policy.without_adapters(model):
        assert torch.equal(logps(model, episodes, chat, device), first)
    assert (logps(model, episodes, chat, device) - first).abs().max() > 0.01


@WHERE
def test_adapters_are_what_the_paper_says(sharp, chat, wide, device, freeze_vision):
    """Every layer: W x + b + 32 / rank * B A x, in fp64; A drawn from the seed within 1 / sqrt(inputs)."""
    cfg = replace(wide, freeze_vision=freeze_vision)
    model, again = (policy.load_policy(sharp, chat, cfg, device) for _ in range(2))
    other = policy.load_policy(sharp, chat, replace(cfg, seed=1), device)
    for name, layer in policy.adapted_layers(model).items():
        a = layer.lora_A.detach()
        bound = layer.in_features**-0.5
        assert not layer.lora_B.any() and bound >= a.abs().max() > 0.8 * bound
        assert torch.equal(a, again.get_submodule(name).lora_A) and a.ne(other.get_submodule(name).lora_A).any()
        torch.nn.init.normal_(layer.lora_B)
        x = torch.randn(5, layer.in_features)
        w, b = layer.weight.double(), 0 if layer.bias is None else layer.bias.double()
        expected = x.double() @ (w + 32 / 3 * layer.lora_B.double() @ layer.lora_A.double()).T + b
        torch.testing.assert_close(layer(x).double(), expected, atol=1e-4, rtol=1e-5)


@both_families
@WHERE
def test_merged_weights_say_what_the_adapters_say(sharp, chat, episodes, wide, device, tmp_path, freeze_vision):
    """In the engine, in a trainer without adapters, and in transformers, which reads the export."""
    cfg = replace(wide, freeze_vision=freeze_vision)
    model = policy.load_policy(sharp, chat, cfg, device)
    learn(model, episodes, chat, cfg, device)
    expected = logps(model, episodes, chat, device)
    merged = dict(policy.full_weights(model))
    assert [*merged] == backbone.parameter_names(backbone.read_config(sharp))
    plain = policy.load_policy(sharp, chat, replace(cfg, lora_rank=0), device)
    assert (logps(plain, episodes, chat, device) - expected).abs().max() > 0.01
    plain.load_state_dict(merged)
    torch.testing.assert_close(logps(plain, episodes, chat, device), expected, atol=1e-5, rtol=1e-5)

    checkpoint.export_hf(tmp_path / "final", model, chat)
    alone = load_file(tmp_path / "final" / "adapters" / "adapter_model.safetensors")
    assert len(alone) == 2 * len(policy.adapted_layers(model)) and not any("lora" in name for name in merged)
    first = model.model.language_model.layers[0].self_attn.q_proj.lora_A
    assert torch.equal(alone["base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"], first)
    exported = Plain(tmp_path / "final", cfg)
    with torch.no_grad():
        separate = torch.cat([exported.sampled_logp(e) for e in episodes])
    torch.testing.assert_close(separate, expected, atol=1e-5, rtol=1e-5)

    engine = TorchEngine(backbone.read_config(sharp), chat, cfg, device)
    engine.load_weights(policy.full_weights(model), version=1)
    said = run([question(i) for i in range(3)], engine, None, chat, cfg, samples=2)  # noise, without calls
    sampled = torch.tensor([logp for e in said for logp, s in zip(e.logprobs, e.sampled, strict=True) if s])
    torch.testing.assert_close(logps(model, said, chat, device), sampled, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="needs peft")
@WHERE
def test_peft_reads_the_adapters(sharp, chat, episodes, wide, device, tmp_path, freeze_vision):
    from peft import PeftModel

    cfg = replace(wide, freeze_vision=freeze_vision)
    model = policy.load_policy(sharp, chat, cfg, device)
    learn(model, episodes, chat, cfg, device)
    checkpoint.export_hf(tmp_path / "final", model, chat)
    plain = Plain(sharp, cfg)
    plain.model = PeftModel.from_pretrained(plain.model, tmp_path / "final" / "adapters")
    plain.model.config = plain.model.get_base_model().config
    with torch.no_grad():
        separate = torch.cat([plain.sampled_logp(e) for e in episodes])
    torch.testing.assert_close(separate, logps(model, episodes, chat, device), atol=1e-5, rtol=1e-5)


def test_the_kl_to_the_base_is_that_to_a_reference_model(sharp, chat, episodes, wide, device):
    cfg = replace(wide, kl_coef=0.1, max_grad_norm=1e9)
    reference = policy.load_policy(sharp, chat, replace(cfg, lora_rank=0), device, trainable=False)
    results = []
    for separate in (True, False):
        model = policy.load_policy(sharp, chat, cfg, device)
        optimizer = learn(model, episodes, chat, cfg, device)
        samples = [train.Sample(e, i, advantage=ADVANTAGES[i]) for i, e in enumerate(episodes)]
        models = model, reference if separate else model, optimizer
        metrics = train.update_policy(*models, samples, len(samples), chat, cfg, device)
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((metrics, grads))
    (expected, grads), (metrics, same_grads) = results
    assert metrics["kl"] == pytest.approx(expected["kl"], rel=1e-6) and metrics["kl"] > 1e-4
    assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-6)
    assert_same(same_grads, grads, 1e-6)


@pytest.mark.parametrize("changes", [{}, {"freeze_vision": True}, {"dtype": "bf16"}], ids=str)
def test_a_checkpoint_holds_adapters_and_goes_on_to_the_bit(sharp, chat, episodes, wide, device, tmp_path, changes):
    cfg, path, runs = replace(wide, **changes), tmp_path / "step-000001", []
    for resumed in (False, True):
        model = policy.load_policy(sharp, chat, cfg, device)
        optimizer = policy.adamw(model, cfg, device)
        if resumed:
            checkpoint.load_state(path, model, optimizer)
        else:
            optimizer = learn(model, episodes, chat, cfg, device)
            checkpoint.save_state(path, model, optimizer, {"step": 1})
        batches = policy.pack(episodes, chat, model, 1000, ADVANTAGES)
        policy.update(model, optimizer, batches, reinforce("tokens"), cfg, device)
        runs.append(everything(model, optimizer))
    assert same_bits(*runs)
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = sum(p.stat().st_size for p in path.glob("*.distcp"))
    names = torch.distributed.checkpoint.FileSystemReader(path).read_metadata().state_dict_metadata
    assert {n.rpartition(".")[2] for n in names if n.startswith("model.")} == {"lora_A", "lora_B"}
    assert 12 * adapters <= size < 12 * adapters + 2000 * len(names)  # names and headers show in so small a model


@pytest.mark.parametrize("saved, now", [(3, 2), (3, 0), (0, 3)])
def test_a_checkpoint_of_another_rank_is_refused(sharp, chat, wide, device, tmp_path, saved, now):
    path = tmp_path / "saved"
    models = [policy.load_policy(sharp, chat, replace(wide, lora_rank=rank), device) for rank in (saved, now)]
    optimizers = [policy.adamw(model, wide, device) for model in models]
    checkpoint.save_state(path, models[0], optimizers[0], {"step": 1})
    before = everything(models[1], optimizers[1])
    with pytest.raises(InputError, match=f"{path}.*--lora_rank {saved}, this is {now}") as error:
        checkpoint.load_state(path, models[1], optimizers[1])
    assert one_line(error) and same_bits(before, everything(models[1], optimizers[1]))


def test_a_checkpoint_of_adapters_elsewhere_is_refused(sharp, chat, wide, device, tmp_path):
    both = [policy.load_policy(sharp, chat, replace(wide, freeze_vision=on), device) for on in (True, False)]
    checkpoint.save_state(tmp_path / "saved", both[0], policy.adamw(both[0], wide, device), {"step": 1})
    with pytest.raises(InputError, match="other names") as error:
        checkpoint.load_state(tmp_path / "saved", both[1], policy.adamw(both[1], wide, device))
    assert one_line(error)
