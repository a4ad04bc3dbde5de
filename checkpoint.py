"""What a run leaves on the disk, and how it stops: run directory, checkpoints, exports, logs, signals.

    RUN/config.json         the options                    RUN/checkpoints/step-N   to resume from
    RUN/metrics.jsonl       a line a step, a validation    RUN/best, RUN/final      exports: Hugging Face folders
    RUN/rollouts/*.jsonl    the conversations

State is written under a temporary name and renamed: what is there is whole. On resume everything later than the
checkpoint is cut back, because it will happen again.
"""

import hashlib
import importlib
import json
import os
import re
import resource
import secrets
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.utils._pytree import tree_leaves

import config
from backbone import plain_config
from chat import Chat
from config import Config, InputError, Options, lock, need, replacing
from data import Question, file_id, first_line, path_of, picture_key, prompt_path, refusing, to_json
from policy import LORA_ALPHA, NonFinite, adapted_layers, all_gather, full_weights, say, whole
from tools import limits, results


# ------------------------------------------------------------------------------------------ checkpoints and exports
def save_state(path: Path, model, optimizer, state: dict) -> None:
    """Write a checkpoint folder: sharded fp32 master weights and optimiser state (torch.distributed.checkpoint), and
    `state`, a JSON dict. Of a model with adapters, only theirs. Raises InputError if the disk does not take it."""
    path, temporary = Path(path), Path(f"{path}.tmp")
    tensors = tensors_of(model, optimizer)
    size = sum(t.numel() * t.element_size() for t in tree_leaves(tensors) if isinstance(t, torch.Tensor))
    if dist.get_rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        free = shutil.disk_usage(temporary).free
        need(size < free, f"{path}: a checkpoint takes {size:,} bytes, and {free:,} are free on that disk")
    dist.barrier()
    try:
        dcp.save(tensors, checkpoint_id=temporary)
    except dcp.api.CheckpointException as error:
        first = next(iter(error.failures.values()))[0]  # of the ranks on which it failed
        raise InputError(f"{path}: cannot write {size:,} bytes ({first_line(first)})") from None
    state = {**state, "model": fingerprint(model), "lora_rank": rank_of(model), "files": digests(temporary)}
    if dist.get_rank() == 0:
        (temporary / "state.json").write_text(json.dumps({**state, "seal": digest_of(state)}))
        for file in temporary.iterdir():  # the rename must not reach the disk before the content
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        put_in_place(temporary, path)
    dist.barrier()


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of a checkpoint's files, but for state.json, by name. Each is read by one of the ranks; all must call."""
    found = []
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.name != "state.json")
    for file in files[dist.get_rank() :: dist.get_world_size()]:
        with open(file, "rb") as content:
            found.append((file.name, hashlib.file_digest(content, "sha256").hexdigest()))
    return dict(all_gather(found))


def digest_of(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def put_in_place(temporary: Path, path: Path) -> None:
    """Rename a finished folder; one that is there already goes first."""
    old = put_away(path)
    os.replace(temporary, path)
    shutil.rmtree(old, ignore_errors=True)


def put_away(folder: Path) -> Path:
    """Rename a folder, if it is there, to a name that is deleted when it is met; returns that. Deleting it takes longer
    than a kill, and half of it would look like a whole one."""
    old = Path(f"{folder}.old.tmp")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    return old


def read_state(path: Path) -> dict:
    """The JSON part of a checkpoint. Raises InputError if it is not what was saved."""
    what = "not a checkpoint as it was saved: state.json is missing or damaged; --resume takes an older one's path"
    with refusing(f"{path}: {what}", KeyError, TypeError, AttributeError):
        state = json.loads((Path(path) / "state.json").read_text())
        need(state.pop("seal") == digest_of(state), "another seal")
        return state


def load_state(path: Path, model, optimizer) -> dict:
    """Load a checkpoint into model and optimiser, on any number of ranks; returns the JSON part. Raises InputError if
    it is incomplete, damaged or of another model."""
    state = read_state(path)
    then, now = state.get("lora_rank", 0), rank_of(model)
    need(then == now, f"{path}: a checkpoint made with --lora_rank {then}, this is {now} (0: without adapters)")
    same = state["model"] == fingerprint(model)
    need(same, f"{path}: a checkpoint of another model (its parameters have other names or shapes)")
    damaged = dict(state["files"].items() - digests(Path(path)).items())
    what = f"not a whole checkpoint ({', '.join(sorted(damaged))}: missing or damaged)"
    need(not damaged, f"{path}: {what}; --resume takes an older one's path")
    tensors = tensors_of(model, optimizer)
    dcp.load(tensors, checkpoint_id=path)
    parts = dict(model_state_dict=tensors["model"], optim_state_dict=tensors["optimizer"])
    set_state_dict(model, optimizer, **parts, options=what_is_kept(model))
    torch.set_rng_state(tensors["rng"])
    return state


def tensors_of(model, optimizer) -> dict:
    weights, moments = get_state_dict(model, optimizer, options=what_is_kept(model))
    return {"model": weights, "optimizer": moments, "rng": torch.get_rng_state()}


def what_is_kept(model) -> StateDictOptions:
    """Everything, or adapters alone."""
    return StateDictOptions(ignore_frozen_params=bool(rank_of(model)), strict=not rank_of(model))


def rank_of(model) -> int:
    """The rank of the model's adapters, 0 if it has none."""
    return next((len(layer.lora_A) for layer in adapted_layers(model).values()), 0)


def fingerprint(model) -> str:
    return digest_of([(name, list(p.shape)) for name, p in model.named_parameters()])


def export_hf(path: Path, model, chat: Chat, dtype: torch.dtype | None = None) -> None:
    """Write a Hugging Face folder (hub key names, config, tokenizer, processor) with the options and prompt files that
    belong to the model, eval.py's defaults. Adapters are merged, and in its folder adapters/ alone. dtype: of the
    weights in the file (default: as trained). All ranks must call it; rank 0 writes, and holds one full copy of the
    weights in CPU memory meanwhile."""
    path, temporary, rank = Path(path), Path(f"{path}.tmp"), dist.get_rank()
    weights = {name: value.to("cpu", copy=True) for name, value in full_weights(model, dtype) if rank == 0}
    adapters = {name: whole(p).cpu() for name, p in model.named_parameters() if name.endswith(("lora_A", "lora_B"))}
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        with torch.device("meta"):
            shell = type(model)(plain_config(model)).to(dtype or torch.float32)
        try:
            shell.save_pretrained(temporary, state_dict=weights)
            model.generation_config.to_json_file(temporary / "generation_config.json")  # its end tokens, not defaults
            chat.tokenizer.save_pretrained(temporary)
            chat.processor.save_pretrained(temporary)
            save_trained_as(temporary, chat)
            if adapters:
                save_adapters(temporary / "adapters", model, adapters, chat)
            for results in path.glob("*.jsonl*"):  # of evaluations, which eval.py writes there
                shutil.copy2(results, temporary)
            put_in_place(temporary, path)
        except Exception as error:  # safetensors and tokenizers have their own classes
            shutil.rmtree(temporary, ignore_errors=True)
            raise InputError(f"{path}: cannot write the model ({first_line(error)})") from None
    dist.barrier()


def save_adapters(folder: Path, model, adapters: dict[str, torch.Tensor], chat: Chat) -> None:
    """As `peft` reads them: PeftModel.from_pretrained(the model that training began with, folder)."""
    options = dict(peft_type="LORA", r=rank_of(model), lora_alpha=LORA_ALPHA, target_modules=[*adapted_layers(model)])
    options |= dict(base_model_name_or_path=str(chat.folder), inference_mode=True)
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(options, indent=1) + "\n")
    named = {f"base_model.model.{name}.weight": value.contiguous() for name, value in adapters.items()}
    save_file(named, folder / "adapter_model.safetensors", {"format": "pt"})


def save_trained_as(folder: Path, chat: Chat) -> None:
    """Write the options that belong to the model, and copies of its prompt files."""
    shutil.copytree(prompt_path(chat.cfg.prompts), folder / "prompts", dirs_exist_ok=True)
    of_model = config.marked("model", Config)
    options = {name: value for name, value in config.as_dict(chat.cfg).items() if name in of_model}
    for name, numbers in (("tool_limits", limits(chat.cfg)), ("tool_results", results(chat.cfg))):
        options[name] = [f"{tool}={number}" for tool, number in numbers.items()]
    (folder / config.TRAINED_AS).write_text(json.dumps({**options, "prompts": "prompts"}, indent=1) + "\n")


def input_ids(inputs: dict[str, str | Path], questions: list[Question]) -> dict[str, str | None]:
    """Role -> id of the content (`data.file_id`) of the path that has it, as rank 0 sees it, None where nothing is (a
    hub id); and one id of the questions' pictures, which their files may name by path. All ranks must call it."""
    here = [(role, path) for role, path in inputs.items() if path and dist.get_rank() == 0]
    ids = all_gather([(role, file_id(path) if Path(path).exists() else None) for role, path in here])
    return dict(ids) | {"pictures": digest_of([picture_key(image) for q in questions for image in q.images])}


# --------------------------------------------------------------------------------------------------- run directory
class RunDir:
    """The directory of a run. Rank 0 writes."""

    def __init__(self, cfg: Config, *others: Options):
        """Look at what is there, change nothing. others: the options of the command beside Config. Raises InputError,
        on all ranks, if this run may not use the directory."""
        self.cfg, self.options, self.path = cfg, (cfg, *others), Path(cfg.run_dir)
        self.metrics, self.rollouts = self.path / "metrics.jsonl", self.path / "rollouts"
        self.checkpoints = self.path / "checkpoints"
        self.lock = lock(self.path) if dist.get_rank() == 0 else None  # until the process ends
        self.resume_from = Path(cfg.resume) if cfg.resume else None
        if cfg.resume == "auto":
            self.resume_from = next(reversed(self.saved()), None)
        state = read_state(self.resume_from) if self.resume_from else {}
        self.elsewhere = self.resume_from and self.resume_from.parent.resolve() != self.checkpoints.resolve()
        self.used = self.path.is_dir() and any(p.name != "config.json.tmp" for p in self.path.iterdir())
        if self.used:
            self._check_used()
        self.first_step = done = state.get("step", 0)
        need(done <= cfg.steps, f"{self.resume_from} was made after {done} steps, and steps={cfg.steps} is fewer")
        self.keep_bytes = 0 if self.elsewhere else state.get("metrics_bytes", 0)  # of metrics.jsonl
        self.spent = 0  # live searches made so far, also those of steps that a resume makes again; 0 on other ranks
        if dist.get_rank() == 0:  # other nodes may not see the files
            self._check_files()

    def _check_files(self):
        """Raise InputError if a file that a resumed run goes on writing is damaged; later would be too late."""
        way = f"--resume {self.resume_from} with a new --run_dir continues"
        lost = self.position() < self.keep_bytes
        need(not lost, f"{self.metrics} is shorter than when the checkpoint was made: lines are lost; {way}")
        kept = self.metrics.read_bytes()[: self.keep_bytes] if self.keep_bytes else b""
        for number, line in enumerate(kept.splitlines(keepends=True), 1):
            with refusing(f"line {number} of {self.metrics} is damaged; {way}", AttributeError):
                need(line.endswith(b"\n") and json.loads(line).keys() >= {"step", "phase"}, "not as it was written")
        note = self.path / "searches_spent"
        spent = note.read_bytes() if self.cfg.resume and note.is_file() else b"0"
        sound = re.fullmatch(rb"\s*\d{1,15}\s*", spent)
        need(sound, f"{note}: not a number; write there how many live searches the run has made")
        self.spent = int(spent)

    def _check_used(self):
        cfg, path, now = self.cfg, self.path, config.as_dict(*self.options)
        ways = "--resume auto to continue, --overwrite to start again, or --run_dir"
        need(cfg.resume or cfg.overwrite, f"{path} is not empty: give {ways}")
        what = f"{path} is not empty and holds no run of this program; give another --run_dir"
        with refusing(what, KeyError, TypeError):
            before = json.loads((path / "config.json").read_text())
            Path(before["run_dir"])  # a model folder has a config.json, too
        if cfg.resume == "auto" and not self.resume_from:
            self._check_begun(before)
        mixed = self.elsewhere and self.saved()
        need(not mixed, f"{path} is not empty and {self.resume_from} is another run's: give a new --run_dir")
        may_change = config.marked("resume", *map(type, self.options))
        for name in (name for name in now if cfg.resume and name in before and name not in may_change):
            was, is_ = before[name], now[name]
            need(was == is_, f"{path} was started with {name}={was!r}, this is {name}={is_!r}")
        names = ("model", "prompts", "search_index", "search_cache", "judge_cache", "toy_dir")
        inputs = [now.get(name) for name in names]
        files = (*cfg.train_files, *cfg.val_files, *now.get("sft_questions", ()))
        for read in filter(None, (*inputs, *map(path_of, files))):
            doomed = cfg.overwrite and Path(read).resolve().is_relative_to(path.resolve())
            need(not doomed, f"--overwrite would delete {read}, which this run reads: give another --run_dir")

    def _check_begun(self, before):
        """Raise InputError if a run without a checkpoint had one (by its steps), or began at another run's."""
        begun, what = before.get("resume", "auto"), f"{self.path} has no checkpoint"
        need(begun in ("", "auto"), f"{what}, and began at {begun}: --resume that, or --overwrite")
        steps = self.metrics.read_bytes().count(b'"phase": "train"') if self.metrics.exists() else 0
        lost = 0 < before.get("save_every", 0) < steps
        need(not lost, f"{what}, though {self.metrics} holds {steps} steps: --overwrite starts without them")

    def prepare(self) -> None:
        """Make the directory ready: all of it new, or cut back to the checkpoint. Rank 0's part; the others wait."""
        if self.used and self.cfg.resume and not self.resume_from:
            say(f"{self.path} has no checkpoint yet: the run starts again at step 0")
        if dist.get_rank() == 0:
            real = self.path.resolve()  # a link stays one
            if self.used and self.cfg.overwrite:
                shutil.rmtree(put_away(real), ignore_errors=True)
            real.mkdir(parents=True, exist_ok=True)
            config.save(self.path / "config.json", *self.options)  # first: a folder without it is no run
            self.rollouts.mkdir(exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
            self.metrics.touch()
            self.also_log = open_log(self.cfg, self.path, self.first_step)
            # What came after the checkpoint will happen again. Later checkpoints go first: they count on all the rest.
            late = [folder for folder in self.saved() if _step_of(folder) > self.first_step]
            for folder in [*map(put_away, late), *self.checkpoints.glob("*.tmp")]:
                shutil.rmtree(folder, ignore_errors=True)
            os.truncate(self.metrics, self.keep_bytes)
            for file in self.rollouts.iterdir():
                if file.is_file() and (_step_of(file) >= self.first_step or file.suffix == ".tmp"):
                    file.unlink()
        dist.barrier()

    def saved(self) -> list[Path]:
        """The checkpoints, oldest first. A damaged one is one, too: to resume from it is refused, not passed over."""
        return sorted((p for p in self.checkpoints.glob("step-*") if p.is_dir() and _step_of(p) >= 0), key=_step_of)

    def log(self, entry: dict) -> None:
        if dist.get_rank() == 0:
            with open(self.metrics, "a") as file:
                file.write(to_json(entry) + "\n")
            self.also_log(entry["step"], dict(flat({k: v for k, v in entry.items() if k not in ("step", "phase")})))

    def position(self) -> int:
        """Bytes of metrics.jsonl so far (rank 0's to know: other nodes may not see the file)."""
        return self.metrics.stat().st_size if dist.get_rank() == 0 and self.metrics.exists() else 0

    def count_searches(self, web) -> None:
        """Write down what the live searches of all ranks add up to: a resumed run counts on from there."""
        spent = all_gather([web.spent] if web else [])
        if spent and dist.get_rank() == 0:
            with replacing(self.path / "searches_spent") as temporary:
                temporary.write_text(f"{sum(spent)}\n")

    def save(self, step: int, policy, optimizer, state: dict) -> None:
        """A checkpoint after `step` steps, unless it is there; all but the last keep_last and the best are removed."""
        path = self.checkpoints / f"step-{step:06d}"
        if not path.is_dir():
            if dist.get_rank() == 0:
                with open(self.metrics) as file:  # its length in the state must not reach the disk before its lines
                    os.fsync(file.fileno())
            save_state(path, policy, optimizer, state)
        if dist.get_rank() == 0:
            best = self.checkpoints / f"step-{state['best']['step']:06d}"
            for old in self.saved()[: -self.cfg.keep_last]:
                if old != best:
                    shutil.rmtree(put_away(old), ignore_errors=True)
        dist.barrier()


def _step_of(path: Path) -> int:
    """The step in the name of a checkpoint or of a file of rollouts; -1 for anything else."""
    match = re.fullmatch(r"(?:step|eval)-(\d+)(?:\.jsonl)?", path.name)
    return int(match[1]) if match else -1


# ------------------------------------------------------------------------------------------------------------ logs
def check_log(cfg: Config) -> None:
    """Raise InputError if the package that cfg.log needs is missing."""
    with refusing(f"log={cfg.log}: its package is not installed: pip install {cfg.log}", ImportError):
        if cfg.log:
            importlib.import_module({"tensorboard": "torch.utils.tensorboard"}.get(cfg.log, cfg.log))


def open_log(cfg: Config, folder: Path, step: int) -> Callable[[int, dict[str, float]], None]:
    """A function (step, {name: number}) that logs to cfg.log as well, from `step` on. wandb takes its mode from
    WANDB_MODE (offline: nothing leaves the machine); a resumed run continues the same wandb run."""
    if cfg.log == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

        def log(step, figures):
            for name, value in figures.items():
                writer.add_scalar(name, value, step)
            writer.flush()

        return log
    if cfg.log == "wandb":
        import wandb

        name = folder / "wandb.id"
        if not name.exists():
            name.write_text(secrets.token_hex(4))
        same = dict(id=name.read_text(), resume="allow", name=folder.name, dir=folder)
        run = wandb.init(project="nanoMMSearch", config=config.as_dict(cfg), **same)
        return lambda step, figures: run.log(figures, step=step)
    return lambda step, figures: None


def flat(figures: dict, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Nested figures as pairs: {"greedy": {"all": {"n": 3}}} -> ("greedy/all/n", 3); only numbers are kept."""
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield prefix + name, value


def peak_memory_gb(device) -> float:
    """Of the GPU since the last call, or else of the process."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes there, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


# --------------------------------------------------------------------------------------------------------- signals
class Stopper:
    """SIGINT and SIGTERM: a rollout is left at once, anything else is finished; then all ranks agree to stop."""

    class Stopped(Exception):
        """All ranks leave."""

    class Interrupted(BaseException):  # no `except Exception` may swallow it
        """This rank's rollout is left."""

    def __init__(self, at_once: bool = True):
        """at_once: whether a rollout may be left in the middle; ranks that share an engine have to finish it."""
        self.at_once, self.asked, self.in_rollout = at_once, False, False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number, frame):
        if self.asked:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a third one kills
        self.asked = True
        if self.in_rollout:
            self.in_rollout = False  # once: what cleans up after it is not interrupted again
            raise self.Interrupted

    def rollout(self, run: Callable):
        """run() -> its value; raises Stopped on all ranks if any of them was asked to stop, and NonFinite likewise."""
        value, failed = None, False
        try:
            self.in_rollout = self.at_once
            # ranks that share an engine begin together, or not at all
            if not (self.asked if self.at_once else any(all_gather([self.asked]))):
                value = run()
        except self.Interrupted:
            pass
        except NonFinite:
            failed = True
        finally:
            self.in_rollout = False
        if any(all_gather([self.asked])):
            raise self.Stopped
        if any(all_gather([failed])):
            raise NonFinite("the policy's logits are not finite while sampling")
        return value
