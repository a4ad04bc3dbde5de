"""The report: the page of a run, opened in a real browser, with text that wants to break out of it."""

import base64
import io
import json
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import picture
from PIL import Image
from test_results import conversation

import config
import toy
from analysis import report
from analysis.__main__ import main
from analysis.figures import summarize
from analysis.judge import JudgeOptions
from analysis.report import ReportOptions
from chat import Chat
from config import InputError
from data import load_questions, picture_key, read_jsonl, write_jsonl
from reward import record, score_episode
from rollout import run
from search import index as search_index
from search.index import OfflineSearch
from toy.lessons import ScriptedEngine

ATTACK = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'><!--"
RTL = "\u202eمن أسسها؟"
MEGABYTE = "a word, " * 2**17
REPLIES = {
    "image": "<reason>r</reason><search><img></search>",
    "text": f"<reason>{ATTACK}</reason><text_search>river {ATTACK}</text_search>",
    "right": "<reason>r</reason><answer>Bako</answer>",
    "wrong": f"<reason>r</reason><answer>{ATTACK}</answer>",
    "neither": "hm",
}
PLANS = ["right", "wrong", "image right", "image text right", "text wrong", "neither"]
CROP = {  # a call of a tool that neither the table of tools nor the template knows
    "tool": "crop_<b>", "query": "", "picture": "img_2", "box": [0, 250.5, 500, 1000], "status": "ok", "error": "",
    "error_kind": "", "usage": {},
    "hits": [{"title": f"a part {ATTACK}", "url": "", "text": "", "image": "0" * 32, "full_size": True}],
}  # fmt: skip


def page_data(path):
    """What is embedded in a page."""
    return json.loads(re.search(r'type="application/json">(.*?)</script>', path.read_text(), re.DOTALL)[1])


@pytest.fixture(scope="module")
def hostile(folder, tmp_path_factory):
    """A run directory as train.py leaves it: two groups of six conversations from the real rollout with a real index,
    two steps and two validations; questions, replies and results attack the page. One conversation of the first
    group also called a tool that is not in the table."""
    place = tmp_path_factory.mktemp("hostile")
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{RTL} what is it? {ATTACK}"}],
            "images": [{"bytes": picture(i)}],
            "reward_model": {"ground_truth": "Bako"},
            "data_source": ("<b>known</b>", "unknown")[i],
        }
        for i in range(2)
    ]
    pq.write_table(pa.Table.from_pylist(rows), place / "train.parquet")
    docs = [
        {"title": f"river {i} {ATTACK}", "text": f"{RTL} {ATTACK}", "url": "javascript:hacked = 1"} for i in range(2)
    ]
    thumbs = [{"image": picture(i), "title": f"{RTL} {ATTACK}", "url": "https://example.org/<b>"} for i in (7, 8)]
    search_index.build(place / "index", docs, thumbs)
    cfg = config.Config(
        threads=1, prompts="prompts", max_tokens=6000, max_prompt_tokens=2000, max_tokens_per_turn=1000,
        search_index=str(place / "index"), train_files=(str(place / "train.parquet"),),
        val_files=(str(place / "train.parquet"),), run_dir=str(place / "run"),
    )  # fmt: skip
    chat, search = Chat(folder, cfg), OfflineSearch(search_index.SearchDB(cfg.search_index))
    records = []
    for asked in load_questions(cfg.train_files):
        for sample, plan in enumerate(PLANS):
            replies = iter(plan.split())
            engine = ScriptedEngine(chat, lambda *_, replies=replies: REPLIES[next(replies)])
            (episode,) = run([asked], engine, search, chat, cfg)
            assert len(episode.turns) == len(plan.split())
            episode.sample = sample
            records.append(record(episode, score_episode(episode, cfg)))
    records[2]["calls"].append(CROP)
    (place / "run" / "rollouts").mkdir(parents=True)
    config.save(place / "run" / "config.json", cfg, toy.Recipe(), JudgeOptions())
    trained = [{**r, "advantage": r["sample"] - 2.5, "logp_gap": 0.0012} for r in records]
    log = []
    for step in (0, 1):
        write_jsonl(place / "run" / "rollouts" / f"step-{step:06d}.jsonl", [{**r, "step": step} for r in trained])
        validation = [{"mode": mode, **r} for mode in ("greedy", "sampled") for r in (records[0], records[6 + step])]
        write_jsonl(place / "run" / "rollouts" / f"eval-{step:06d}.jsonl", validation)
        summary = {mode: summarize([r for r in validation if r["mode"] == mode], cfg) for mode in ("greedy", "sampled")}
        log += [{"step": step, "phase": "eval", **summary}]
        log += [{"step": step, "phase": "train", "reward": 0.5 + step, "loss": float("nan"), "accuracy": 0.25}]
    write_jsonl(place / "run" / "metrics.jsonl", log)
    return place / "run"


# ------------------------------------------------------------------------------------------------------- the data


def test_the_page_is_one_file_and_holds_everything(hostile, tmp_path):
    path = report.render([hostile], ReportOptions(out=str(tmp_path / "page.html")))
    text, data = path.read_text(), page_data(path)
    assert text.count("<script") == text.count("</script>") == 2  # the data's and the page's own
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//|@import|url\(""", text.split("application/json")[0])
    assert len(data["conversations"]) == 2 * 12 + 2 * 4
    (note,) = data["notes"]  # of what the unknown tool returned
    assert "1 pictures of results are not in" in note
    assert [len(data["runs"][0][name]) for name in ("train", "evals")] == [2, 2]
    assert data["runs"][0]["train"][0]["loss"] is None  # NaN is no JSON
    assert data["runs"][0]["settings"]["max_tokens"] == 6000 and data["defaults"]["max_tokens"] == 250
    assert data["runs"][0]["settings"].keys() == data["defaults"].keys()
    index = search_index.SearchDB(hostile.parent / "index")
    thumbs = {picture_key(hit.image) for hit in index.image(picture(7), 2)}
    index.close()
    assert set(data["pictures"]) == thumbs | {picture_key(picture(i)) for i in (0, 1)}
    for c in data["conversations"]:
        assert c["pictures"] == [picture_key(picture(int(c["question_id"][-1])))]
        assert {hit["image"] for call in c["calls"] for hit in call["hits"]} <= thumbs | {None, "0" * 32}
        assert sum(c["parts"].values()) == pytest.approx(c["reward"])
    for url in data["pictures"].values():
        assert Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).format == "WEBP"


def test_a_reward_in_its_parts():
    def parts(reward, correct, form):
        return report.reward_parts({"reward": reward, "correct": correct, "format_ok": form}, 0.1)

    assert parts(0.81, True, False) == pytest.approx({"answer": 0.9, "searching": -0.09, "format": 0})
    assert parts(0.1, False, True) == pytest.approx({"answer": 0, "searching": 0, "format": 0.1})
    assert parts(1.09, True, True) == pytest.approx({"answer": 0.9, "searching": 0.09, "format": 0.1})  # a bonus
    assert parts(None, False, False) is None


def test_of_too_many_conversations_whole_groups_are_taken_evenly(tmp_path):
    for step in range(20):
        lines = [conversation(i // 4, True, i % 4) for i in range(40)]
        write_jsonl(tmp_path / f"step-{step:06d}.jsonl", lines)
    chosen, total = report.read_conversations(tmp_path, 100)
    assert total == 800 and 90 <= len(chosen) <= 100
    by_step = [[c for c in chosen if c["step"] == step] for step in range(20)]
    assert {len(part) for part in by_step} <= {4, 8}
    assert all([c["sample"] for c in part] == [0, 1, 2, 3] * (len(part) // 4) for part in by_step)
    assert len(report.read_conversations(tmp_path, 800)[0]) == 800


def test_pictures_have_a_limit(monkeypatch):
    pictures = report.Pictures()
    pictures.add(picture(0), 128)
    monkeypatch.setattr(report, "PICTURE_BYTES", len(pictures.urls[picture_key(picture(0))]) + 10)
    pictures.add(picture(0), 128)
    assert not pictures.left_out
    for _ in range(2):  # counted once, however often it is shown
        pictures.add(picture(1), 128)
    pictures.add(b"no picture", 128)
    assert len(pictures.left_out) == 1 and len(pictures.urls) == 1
    monkeypatch.setattr(report, "picture_url", None)
    pictures.add(picture(1), 128)  # nor made again


def test_missing_files_are_named_and_the_rest_is_shown(hostile, tmp_path):
    shutil.copytree(hostile, tmp_path / "run")
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    moved = {"train_files": ["gone.parquet"], "val_files": ["left.parquet"], "search_index": "gone.sqlite"}
    (tmp_path / "run" / "config.json").write_text(json.dumps(settings | moved))
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "phase"')  # is being written
    data = page_data(report.render([tmp_path / "run"], ReportOptions()))
    for note, missing in zip(data["notes"], ("gone.parquet", "left.parquet", "gone.sqlite"), strict=True):
        assert f"{missing}: no such" in note
    assert (len(data["conversations"]), len(data["runs"][0]["train"]), data["pictures"]) == (32, 2, {})


def test_a_picture_that_is_gone_or_another_is_not_shown(hostile, tmp_path):
    """Under the old names: a file whose first row has another picture, an index of other thumbnails."""
    run = shutil.copytree(hostile, tmp_path / "run")
    rows = pq.read_table(hostile.parent / "train.parquet").to_pylist()
    rows[0]["images"] = [{"bytes": picture(5)}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    search_index.build(tmp_path / "index", [], [{"image": picture(9), "title": f"{RTL} {ATTACK}", "url": ""}])
    settings = json.loads((run / "config.json").read_text())
    moved = {"train_files": [str(tmp_path / "train.parquet")], "search_index": str(tmp_path / "index")}
    (run / "config.json").write_text(json.dumps(settings | moved | {"val_files": moved["train_files"]}))
    data = page_data(report.render([run], ReportOptions()))
    assert set(data["pictures"]) == {picture_key(picture(1))}
    assert {c["pictures"][0] for c in data["conversations"]} == {picture_key(picture(i)) for i in (0, 1)}
    assert [note.split(", of ")[0] for note in data["notes"][:2]] == [
        f"run: pictures of 1 {what} questions are not shown, train.parquet:0 first"
        for what in ("training", "validation")
    ]
    assert "3 pictures of results are not in" in data["notes"][2]


LINE = '{"step": 0, "phase": "eval", "greedy": %s}\n'


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("config.json", "[]", "holds no run"), ("config.json", "null", "holds no run"),
        ("config.json", "[" * 10**5, "holds no run"), ("config.json", "\0", "holds no run"),
        ("metrics.jsonl", "null\n", "line 1: not as"), ("metrics.jsonl", "[" * 10**5 + "\n", "line 1 is not JSON"),
        ("metrics.jsonl", '{"phase": "train"}\n', "line 1: field step"), ("metrics.jsonl", LINE % "[]", "field greedy"),
        ("metrics.jsonl", LINE % '{"all": {"n": 1}, "b": null}', "line 1: field greedy.b"),
        ("rollouts/step-000000.jsonl", "3\n", "step-000000.jsonl, line 1: not as"),
        ("rollouts/eval-000001.jsonl", '{"question_id": 3}\n', "line 1: field question_id"),
        ("rollouts/step-1 (copy).jsonl", "3\n", None), ("rollouts/step-x.jsonl", "3\n", None),
        ("metrics.jsonl", '{"step": 0, "phase": "train", "x": 1e999, "y": {}, "z": "text"}\n', None),
        ("config.json", '{"run_dir": 1e400, "format_weight": "a"}', None),
        ("config.json", '{"run_dir": "", "lr": 1' + "0" * 400 + ', "search_index": "\\u0000"}', None),
        ("config.json", '{"run_dir": "", "train_files": ["\\u0000"], "search_index": "\\u0000"}', None),
    ],
)  # fmt: skip
def test_a_run_whose_files_are_of_another_form(hostile, tmp_path, file, content, said):
    """A line that names the file, or (said is None) a page."""
    run = shutil.copytree(hostile, tmp_path / "run")
    (run / file).write_text(content)
    if said is None:
        assert page_data(report.render([run], ReportOptions()))
        return
    with pytest.raises(InputError) as error:
        report.render([run], ReportOptions())
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("out", ["folder", "/dev/full", "x" * 300])
def test_a_page_that_cannot_be_written(hostile, tmp_path, out):
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="cannot write"):
        report.render([hostile], ReportOptions(out=str(tmp_path / out)))
    assert (tmp_path / "folder").is_dir() and list(tmp_path.iterdir()) == [tmp_path / "folder"]


def test_bad_runs(hostile, tmp_path):
    with pytest.raises(InputError, match="nowhere: holds no run"):
        report.render([tmp_path / "nowhere"], ReportOptions())
    (tmp_path / "config.json").write_text('{"run_dir": "x"}')
    with pytest.raises(InputError, match="has no metrics.jsonl"):
        report.render([tmp_path], ReportOptions())
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "phase": "train"}\nno json\n')
    with pytest.raises(InputError, match="metrics.jsonl: cannot read it .line 2 is not JSON"):
        report.render([tmp_path], ReportOptions())
    with pytest.raises(InputError, match="cannot write"):
        report.render([hostile], ReportOptions(out=str(tmp_path / "no" / "folder.html")))


def test_the_report_command(hostile, tmp_path, capsys):
    main(["report", str(hostile), "--out", str(tmp_path / "page.html"), "--limit=12"])
    data = page_data(tmp_path / "page.html")
    assert re.fullmatch(r".*page.html \([\d.]+ MiB\)\n", capsys.readouterr().out)
    assert 6 <= len(data["conversations"]) <= 12 and "of 32 conversations" in data["notes"][0]
    settings = json.loads((hostile / "config.json").read_text())
    shutil.copytree(hostile, tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(json.dumps(settings | {"max_turns": "many"}))
    main(["report", str(tmp_path / "run")])
    (note,) = page_data(tmp_path / "run" / "report.html")["notes"]
    assert "the settings are of another version (max_turns='many'" in note


# --------------------------------------------------------------------------------------------------- the browser


class Browser:
    """Headless Chromium, driven over WebDriver, which is plain HTTP (w3.org/TR/webdriver2)."""

    def __init__(self, driver, port, folder):
        self.process = subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL)
        self.url = f"http://127.0.0.1:{port}/session"
        flags = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
        flags += f"disable-component-update disable-sync disable-dev-shm-usage user-data-dir={folder}"
        options = {"goog:chromeOptions": {"args": [f"--{flag}" for flag in flags.split()]}}
        options["goog:loggingPrefs"] = {"browser": "ALL"}
        try:
            self._wait_until_up()
            self.url += "/" + self.call("", {"capabilities": {"alwaysMatch": options}})["sessionId"]
        except BaseException:
            self.process.kill()
            raise

    def _wait_until_up(self):
        for _ in range(300):
            try:
                return urllib.request.urlopen(self.url.removesuffix("session") + "status", timeout=10)
            except urllib.error.URLError:
                time.sleep(0.1)
        raise TimeoutError("chromedriver does not answer")

    def call(self, path, body=None, method=None):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{path}: {error.read().decode()[:1000]}") from None

    def run(self, script, *args):
        return self.call("/execute/sync", {"script": script, "args": list(args)})

    def press(self, *keys):
        presses = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.call("/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": presses}]})

    def click(self, selector):
        """The page may redraw what was found before it is clicked: then look again."""
        for attempt in range(10):
            (_, element), *_ = self.call("/element", {"using": "css selector", "value": selector}).items()
            try:
                return self.call(f"/element/{element}/click", {})
            except RuntimeError as error:
                if attempt == 9 or "stale element" not in str(error):
                    raise

    def until(self, script, wanted):
        """Wait for an expression of the page to have a value."""
        value = None
        for _ in range(200):
            if (value := self.run(f"return {script}")) == wanted:
                return
            time.sleep(0.05)
        raise AssertionError(f"{script}: {value!r}, not {wanted!r}")

    def screenshot(self, path):
        path.write_bytes(base64.b64decode(self.call("/screenshot")))
        return Image.open(path).convert("RGB")

    def close(self):
        try:
            self.call("", method="DELETE")
        finally:
            self.process.terminate()
            self.process.wait(30)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    driver = shutil.which("chromedriver")
    if not driver or not (shutil.which("chromium") or shutil.which("google-chrome")):
        pytest.skip("needs Chromium and its driver (Debian: apt-get install chromium chromium-driver)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    browser = Browser(driver, port, tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def large(hostile, tmp_path_factory):
    """The page of that run with 2,000 conversations, one of which holds a turn of a megabyte, beside a second run."""
    folder = tmp_path_factory.mktemp("large") / "RUN <b>"
    shutil.copytree(hostile, folder)
    records = [json.loads(line) for line in open(folder / "rollouts" / "step-000000.jsonl")]
    many = [{**r, "question_id": f"{r['question_id']}{i:03d}"} for i in range(164) for r in records]
    many[3]["turns"] = [*many[3]["turns"][:-1], {"role": "model", "text": MEGABYTE + ATTACK}]
    write_jsonl(folder / "rollouts" / "step-000000.jsonl", many)
    return report.render([folder, hostile], ReportOptions(out=str(folder.parent / "page.html"), limit=4000))


POSITION = "document.getElementById('position')?.textContent"
TOTAL = 164 * 12 + 12 + 2 * 4 + 32


@pytest.fixture
def page(browser, large):
    """The large run's page, just opened."""
    browser.call("/window/rect", {"width": 1400, "height": 1000})
    browser.call("/url", {"url": large.as_uri()})
    browser.until(POSITION, f"1 of {TOTAL:,}")
    return browser


def count(page, selector):
    return page.run("return document.querySelectorAll(arguments[0]).length", selector)


def choose(page, name, value):
    select = f"const select = document.getElementById('filter-{name}'); select.value = arguments[0];"
    page.run(select + "select.dispatchEvent(new Event('change'))", value)


def look_for(page, text):
    page.run("const box = document.getElementById('search'); box.value = arguments[0]; box.oninput()", text)


def test_the_page_is_drawn(page):
    """Settings, a chart for each metric with both runs in it, the validations, a list that holds only the rows in
    view."""
    assert count(page, "#settings tr") > 80 and count(page, "#curves svg") >= 3
    assert count(page, "#evaluation .figures") == 2 and count(page, "#curves svg[aria-label=reward] polyline") == 6
    assert 5 < count(page, ".row") < 40
    titles = page.run("return [...document.querySelectorAll('#curves b')].map(e => e.textContent)")
    assert titles[:5] == ["reward", "accuracy", "search_ratio", "image_search", "text_search"]
    columns = page.run("return [...document.querySelectorAll('.figures tr:first-child th')].map(e => e.textContent)")
    columns = columns[: len(columns) // 2]
    assert {"n", "accuracy (95 %)", "image search", "text search", "combined", "cost", "stops"} <= set(columns)
    rows = page.run(
        "return [...document.querySelectorAll('.figures tr')].map(r => [...r.cells].map(c => c.textContent))"
    )
    for row in (dict(zip(columns, row, strict=True)) for row in rows[1:3]):
        assert row["n"] == "1" and re.match(r"[01](\.000)?$", row["image search"]), row
    assert page.run("return [...document.images].every(image => image.src.startsWith('data:'))")


def test_keys_filters_and_search_narrow_the_list(page, large):
    page.press("j", "j", "\ue014")  # right arrow
    page.until(POSITION, f"4 of {TOTAL:,}")
    page.press("k", "\ue012")
    page.until(POSITION, f"2 of {TOTAL:,}")
    conversations = page_data(large)["conversations"]
    expected = [c for c in conversations if c["correct"] and {"image_search"} == {x["tool"] for x in c["calls"]}]
    choose(page, "outcome", "right")
    choose(page, "tools", "image search")
    page.until(POSITION, f"1 of {len(expected):,}")
    choose(page, "source", "unknown")
    choose(page, "stop", "answered")
    left = [c for c in expected if c["data_source"] == "unknown" and c["stop"] == "answered"]
    page.until(POSITION, f"1 of {len(left):,}")
    page.press("/", *left[5]["question_id"])
    same = [c for c in left if left[5]["question_id"] in c["question_id"]]
    assert 0 < len(same) < 20
    page.until(POSITION, f"1 of {len(same)}")
    page.press("x")
    page.until("document.getElementById('one').textContent", "No conversation.")


def test_names_of_every_object_are_names_like_others(browser, hostile, tmp_path):
    """A picture, tool, source and metric called as what every JavaScript object has."""
    run = shutil.copytree(hostile, tmp_path / "run")
    records = list(read_jsonl(run / "rollouts" / "step-000000.jsonl"))
    hits = [CROP["hits"][0] | {"image": name} for name in ("__proto__", "toString")]
    call = CROP | {"tool": "constructor", "hits": hits}
    records = [r | {"data_source": "__proto__", "pictures": ["__proto__"], "calls": [call]} for r in records]
    write_jsonl(run / "rollouts" / "step-000000.jsonl", records)
    log = list(read_jsonl(run / "metrics.jsonl"))
    log[1]["valueOf"] = 1
    log[2]["greedy"] |= {name: log[2]["greedy"]["all"] for name in ("__proto__", "constructor")}
    write_jsonl(run / "metrics.jsonl", log)
    browser.call("/url", {"url": report.render([run], ReportOptions()).as_uri()})
    browser.until(POSITION, "1 of 32")
    look_for(browser, "sample")
    look_for(browser, "")
    choose(browser, "source", "__proto__")
    browser.until(POSITION, "1 of 12")
    assert browser.run("return [...document.images].every(image => image.src.startsWith('data:'))")
    assert count(browser, "#one .hit .lost") == 2 and count(browser, "#one .pictures .lost") == 1
    assert "constructor" in browser.run("return document.querySelector('.figures').textContent")
    assert [entry for entry in browser.call("/se/log", {"type": "browser"}) if entry["level"] == "SEVERE"] == []


def test_a_tool_that_nobody_named_is_shown(page):
    look_for(page, "a part")
    page.until(
        POSITION, "1 of 167"
    )  # at step 0 of the large run 164 times, at its step 1, and in both steps of the other run
    (call,) = page.run(
        "return [...document.querySelectorAll('.call')].map(e => e.innerText).filter(t => t.includes('crop'))"
    )
    assert call.startswith("crop <b> (img_2, box 0, 250.5, 500, 1000) ok") and "a part </script>" in call
    assert page.run("return document.querySelector('.row.chosen').innerText.includes('crop <b> + image search')")


def test_a_long_conversation_beside_its_group(page):
    """A megabyte is cut, and whole on request; the group stands side by side, with its advantages."""
    look_for(page, "a word, a word")
    page.until(POSITION, "1 of 1")
    length = "Math.max(...[...document.querySelectorAll('.turn .said')].map(e => e.textContent.length))"
    assert page.run(f"return {length}") < 4000
    page.click(".turn button")
    page.until(length, len(MEGABYTE) + len(ATTACK))
    assert count(page, ".group section") == 6 and count(page, ".group section.chosen") == 1
    assert "advantage −2.50" in page.run("return document.querySelector('.group').textContent")


def test_what_attacks_is_text(page):
    """Nothing ran, nothing became an element, bad links are none."""
    look_for(page, "a word, a word")
    page.until(POSITION, "1 of 1")
    look_for(page, "")
    page.until(POSITION, f"8 of {TOTAL:,}")
    texts = page.run("return [...document.querySelectorAll('.hit')].map(e => e.textContent)")
    assert len(texts) >= 3 and all(ATTACK in text for text in texts)
    assert page.run("return window.hacked === undefined && document.scripts.length === 2")
    links = page.run("return [...document.querySelectorAll('.hit a')].map(a => a.href)")
    assert links and all(link.startswith("https://example.org/") for link in links)
    assert page.run("return getComputedStyle(document.querySelector('h3')).direction") == "rtl"
    assert [entry for entry in page.call("/se/log", {"type": "browser"}) if entry["level"] == "SEVERE"] == []


def test_dark_and_light_wide_and_narrow(page, tmp_path):
    """A picture is taken of each, nothing sticks out."""
    shots = []
    for width in (1400, 420):
        page.call("/window/rect", {"width": width, "height": 900})
        assert page.run("return document.documentElement.scrollWidth <= innerWidth")
        for _ in range(2):
            page.click("#theme")
            page.run("scrollTo(0, 0)")
            shots.append(page.screenshot(tmp_path / f"{width}-{len(shots)}.png").resize((1, 1)).getpixel((0, 0)))
    assert sum(abs(sum(a) - sum(b)) > 200 for a, b in ((shots[0], shots[1]), (shots[2], shots[3]))) == 2
