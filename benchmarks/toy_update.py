"""The toy run's update with and without what conversations of a question share, in turn: CPU seconds, one thread.

python benchmarks/toy_update.py     # builds the toy world, if there is none yet
"""

import statistics
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import torch  # noqa: E402
from trainer import apart  # noqa: E402

import backbone  # noqa: E402
import policy  # noqa: E402
import reward  # noqa: E402
import tools  # noqa: E402
import toy  # noqa: E402
from chat import Chat  # noqa: E402
from config import Config, parse  # noqa: E402
from data import load_questions  # noqa: E402
from engines import TorchEngine  # noqa: E402
from grpo import group_advantages  # noqa: E402
from rollout import run  # noqa: E402
from search.index import OfflineSearch, SearchDB  # noqa: E402
from train import Sample, update_policy  # noqa: E402


def main(repeats: int = 3) -> None:
    cfg, recipe = parse(["--threads=1", *sys.argv[1:]], Config, toy.Recipe)
    device, place = policy.init_distributed(cfg), toy.ensure(recipe, cfg)
    chat, questions = Chat(place.model, cfg), load_questions([place.train])[: cfg.prompts_per_step]
    model = policy.load_policy(place.model, chat, cfg, device)
    engine = TorchEngine(backbone.plain_config(model), chat, cfg, device)
    engine.load_weights(policy.full_weights(model), version=0)
    search = OfflineSearch(SearchDB(place.index), tools.results(cfg))
    numbers = {q.id: number for number, q in enumerate(questions)}
    episodes = run(questions, engine, search, chat, cfg, samples=cfg.samples_per_prompt)
    samples = sorted((Sample(e, numbers[e.question.id]) for e in episodes), key=lambda s: (s.number, s.episode.sample))
    rewards = [reward.score_episode(s.episode, cfg).reward for s in samples]
    for sample, advantage in zip(samples, group_advantages(rewards, [s.number for s in samples]).tolist(), strict=True):
        sample.advantage = advantage
    optimizer, seconds = torch.optim.SGD(model.parameters(), lr=0.0), {"shared": [], "unshared": []}
    for _ in range(1 + repeats):
        for name, rows in zip(seconds, (policy.rows, apart), strict=True):
            policy.rows, shared = rows, policy.rows
            batches = policy.pack([s.episode for s in samples], chat, model, cfg.max_tokens_per_batch)
            started = time.process_time()
            figures = update_policy(model, None, optimizer, samples, len(questions), chat, cfg, device)
            seconds[name].append(time.process_time() - started)
            policy.rows = shared
            tokens, keys = (sum(map(len, (getattr(b, part) for b in batches))) for part in ("ids", "keys"))
            loss, norm, last = figures["loss"], figures["grad_norm"], seconds[name][-1]
            print(f"{name}: {last:.2f} s, {tokens} tokens, {keys} keys, loss {loss:.7f}, gradient norm {norm:.7f}")
    ratios = [plain / shared for shared, plain in list(zip(*seconds.values(), strict=True))[1:]]
    print(f"unshared / shared: {statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})")


if __name__ == "__main__":
    main()
