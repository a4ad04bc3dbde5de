"""The prompts that MMSearch-R1's authors publish with their code, three pickles of a text each, as a prompt folder.

    python -m analysis prompts multimodal-search-r1/mmsearch_r1/prompts/*.pkl --out published
    python eval.py --preset qwen2.5-vl-7b --model lmms-lab/MMSearch-R1-7B --prompts published --files fvqa_test.parquet

What their rollout writes around the texts is in `PROMPTS`; docs/evaluation.md names what still differs.
"""

from dataclasses import dataclass
from pathlib import Path

from config import Options, need, option
from data import prompt_path, read_prompt, refusing
from search.fvqa import read_plain

RESULTS = "Searched results: <information>{results}</information>\nOriginal user's question: {question}\n"
PROMPTS = {  # part of a pickle's name -> (prompt file, what goes before its text and after it, its <image>s)
    "round_1_user_prompt": ("question", "", "{question}", 1),
    "after_image_search_prompt": ("after_image_search", RESULTS, "", 0),
    "after_text_search_prompt": ("after_text_search", RESULTS, "", 0),
}
LARGEST = 2**16  # bytes of a pickle; theirs have 2,000


@dataclass(frozen=True)
class PromptsOptions(Options):
    """Published prompts."""

    out: str = option("", "the folder of prompt files, a new one")


def write_prompts(pickles: list[str], options: PromptsOptions) -> None:
    """Write the prompt folder of the authors' pickles, told apart by their names. Raises InputError, OSError."""
    need(options.out, "prompts needs --out DIR")
    need(len(pickles) == len(PROMPTS), f"prompts: expected {len(PROMPTS)} pickles, got {len(pickles)}")
    out, texts = Path(options.out), {"search_failed": read_prompt(prompt_path("prompts/search_failed.txt")).encode()}
    for part, (name, before, after, images) in PROMPTS.items():
        path = next((path for path in pickles if part in Path(path).name), "")
        need(path, f"prompts: no pickle has {part} in its name")
        need(Path(path).stat().st_size <= LARGEST, f"{path}: larger than {LARGEST:,} bytes, which no prompt is")
        text = read_plain(path)
        need(isinstance(text, str), f"{path}: expected a text, not a {type(text).__name__}")
        need(text.count("<image>") == images, f"{path}: expected <image> {'once' if images else 'nowhere'} in its text")
        need("{question}" not in text and "{results}" not in text, f"{path}: it has a placeholder of ours in its text")
        with refusing(f"{path}: not UTF-8"):  # a pickle can hold half a character
            texts[name] = (before + text + after).encode()
    need(not out.exists(), f"{out} exists: give the name of a new folder")
    out.mkdir(parents=True)
    for name, text in texts.items():
        (out / f"{name}.txt").write_bytes(text)
    print(f"{out}: {', '.join(f'{name}.txt' for name in sorted(texts))}")
