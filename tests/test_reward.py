"""The reward: accepted and refused forms of a conversation written out by hand, all six values, the odd corners."""

import itertools
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

import reward
from tools import TOOLS, find_actions, parse_calls

IMG = "<search><img></search>"
ANSWER = "<reason>I know it.</reason><answer>Paris</answer>"
IMAGE = f"<reason>I must look.</reason>{IMG}"
TEXT = "<reason>I must read.</reason><text_search>capital of France</text_search>"
SUB_MATCH = reward.MATCHES["sub_em"]
KINDS = {"answer": ANSWER, "image_search": IMAGE, "text_search": TEXT, "broken": "Paris"}


# --- matching -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The  Eiffel\n Tower.", "eiffel tower"),
        ("U.S.A.", "usa"),
        ("ivory-coast", "ivorycoast"),  # punctuation is removed, not turned into a space
        ("THE", ""),  # lower-casing comes before the articles
        ("t.h.e", ""),  # punctuation comes before the articles
        ("the-cat", "thecat"),
        ("a cat and an ant", "cat and ant"),  # words only, not letters
        ("x a  y", "x y"),  # articles come before squeezing
        ("`~!@#$%^&*()_+-={}|[]\\:\";'<>?,./", ""),
        ("snake_case", "snakecase"),
        ("l’été — ¿qué?", "l’été — ¿qué"),  # ASCII punctuation only
        ("A\u00a0B\tC", "b c"),
        ("", ""),
    ],
)
def test_normalize_answer(text, expected):
    assert reward.normalize_answer(text) == expected
    assert reward.normalize_answer(expected) == expected


def test_normalize_answer_against_a_loop():
    """The same four steps without regular expressions."""

    def slow(text):
        kept = "".join(c for c in text.lower() if not (33 <= ord(c) <= 126 and not c.isalnum()))
        return " ".join(word for word in kept.split() if word not in ("a", "an", "the"))

    rng = random.Random(0)
    for _ in range(500):
        text = "".join(rng.choice("aAnNtThHeE bc.,-_'!\n\t 09") for _ in range(rng.randrange(30)))
        assert reward.normalize_answer(text) == slow(text), text


@pytest.mark.parametrize(
    "turn, expected",
    [
        ("<answer>Paris</answer>", "Paris"),
        ("<answer>\n  two\nlines \n</answer>", "two\nlines"),
        ("<answer>one</answer> no, <answer>two</answer>", "two"),  # the last, and not from the first to the last
        ("<reason>maybe <answer>one</answer></reason><answer>two</answer>", "two"),
        ("<answer>one</answer> and then more text", "one"),
        ("<answer>one <answer>two</answer>", "two"),  # the innermost complete pair
        ("<reason>put it in <answer> tags</reason><answer>Paris</answer>", "Paris"),
        ("<answer>one</answer> <answer>never closed", "one"),
        ("<answer></answer>", ""),
        ("<Answer>Paris</Answer>", None),
        ("</answer>Paris<answer>", None),
        ("Paris", None),
        ("", None),
    ],
)
def test_extract_answer(turn, expected):
    assert reward.extract_answer(turn) == expected


MENTIONED = "<reason>put it in <answer> tags</reason><answer>Paris</answer>"


def test_the_reward_reads_the_answer_that_ended_the_conversation():
    """A tag that reasoning mentions confuses neither the rollout nor the reward; it only breaks the format."""
    assert reward.extract_answer(MENTIONED) == "Paris" and not parse_calls(MENTIONED)
    assert reward.score([MENTIONED], ["Paris"]) == reward.Score(0.9, True, False, 0, "Paris")
    pieces = ["<answer>", "</answer>", "<text_search>", "</text_search>", IMG, "Paris", " ", "<reason>", "</reason>"]
    rng, seen = random.Random(0), set()
    for _ in range(3000):
        turn = "".join(rng.choices(pieces, k=rng.randrange(9)))
        ends_in_answer = isinstance(next(reversed(find_actions(turn)), None), str)
        if ends_in_answer or not parse_calls(turn):
            assert ends_in_answer == (reward.extract_answer(turn) is not None), turn
        seen.add((ends_in_answer, not parse_calls(turn)))
    assert seen == {(True, True), (False, True), (False, False)}


def test_exact_match():
    assert reward.exact_match("the paris!", ["Lyon", "Paris"])
    assert not reward.exact_match("in Paris", ["Paris"])
    assert not reward.exact_match("Par", ["Paris"])
    assert not reward.exact_match(None, ["None", ""])
    assert not reward.exact_match("Paris", [])
    for empty in ("", "The", "...", " a "):
        assert not reward.exact_match(empty, ["", "an", "?!"])  # nothing matches nothing


@pytest.mark.parametrize(
    "texts, others",
    [
        ("O’Brien, O'Brien, O´Brien, OʼBrien, Ｏ＇Ｂｒｉｅｎ, “O`Brien”", "Brien"),
        ("Austria–Hungary, Austria-Hungary, Austria — Hungary, the Austria‐Hungary", "AustriaHungary"),
        ("Côte d’Ivoire, Co\u0302te d'Ivoire, «côte d‘ivoire»!, C\u200bôte d'Ivoire", "Cote d'Ivoire"),
        ("STRASSE, Straße, strasse.", "Strase"),
        ("東京タワー, 東京 タワー。, 「東京・タワー」, 東京ﾀﾜｰ", "東京"),
        ("हिन्दी, हिन्दी।", "हन्दी, हिन्दू"),
        ("1998, １９９８, ١٩٩٨, १९९८", "98, 1989"),
        ("3.5, ３.５, ٣٫٥, 3.5.", "35, 3 5, 3:5, .35, -3.5"),
        ("-5, −5, (–5), -5 %, ‑5", "5, 5-"),
        ("1000000, 1,000,000, 10,00,000", "1, 1000"),
        ("1939-1945, 1939–1945, 1939/1945", "19391945, 1939"),
        ("10², 10^2", "102"),
        ("2½, 2 1/2", "21/2, 212, 2"),
        ("km², km2", "km"),
        ("C++, c++", "C, C#"),
        ("C#", "C, C♯"),
        ("A+", "A, A-"),
        ("AB-, AB−, ab-.", "AB, AB+, A-"),
        ("O-, (O⁻)", "O, A-"),
        ("Cl⁻, cl-", "Cl"),
        ("AB-positive, AB positive, AB - positive", "AB-"),
        ("Paris-, Paris", "Par"),
        ("B♭, b♭.", "B, B♮, B♯"),
        ("0,500", "0500, 500, 0.5"),
        ("<5", "5, >5"),
        ("√2", "2"),
        ("5'10\"", "510"),
        ("U.S.A., USA, the USA", "US A"),
        ("Lord of the Rings, The Lord of Rings", "Lord"),
        ("Vitamin A, vitamin a.", "Vitamin, Vitamin an"),
        ("The, the", "A, An"),
        ("🇪🇸, 🇪🇸 ", "🇫🇷"),
        ("?, ？", "!, …"),
    ],
)
def test_unicode_match_tells_ways_of_writing_from_other_answers(texts, others):
    split = re.compile(r",(?:\s|$)").split
    for text, answer in itertools.product(split(texts), repeat=2):
        assert reward.unicode_match(text, ["none of these", answer]), (text, answer)
        assert SUB_MATCH(text, [answer]), (text, answer)
    for text, other in itertools.product(split(texts), split(others)):
        assert not reward.unicode_match(text, [other]) and not reward.unicode_match(other, [text]), (text, other)


def test_unicode_match_of_nothing():
    for text in (None, "", " "):
        assert not reward.unicode_match(text, ["", " ", "None"]) and not SUB_MATCH(text, ["", "None"])
    rng = random.Random(0)
    for _ in range(2000):  # what is normal stays as it is; nothing raises
        text = "".join(
            chr(rng.choice([rng.randrange(0x300), rng.randrange(0x3100), rng.randrange(0x110000)])) for _ in "123456"
        )
        once = reward.normalize_unicode(text)
        assert reward.normalize_unicode(once).replace(" ", "") == once.replace(" ", ""), ascii(text)


@pytest.mark.parametrize(
    "prediction, answer, right",
    [
        ("It is the city of Paris, France.", "the Paris", True),
        ("a town in Egypt", "PT", False),  # whole words
        ("Par", "Paris", False),  # the answer in the prediction, not the other way round
        ("New York City", "york city", True),
        ("a Yorkshire terrier", "York", False),
        ("It took 3.5 hours", "5", False),
        ("It took 3.5 hours", "3.5", True),
        ("−5 °C", "5", False),
        ("written in C++", "C", False),
        ("答案是东京。", "东京", True),  # without spaces each character is a word
        ("建于2008年", "2008", True),
        ("อยู่ที่กรุงเทพ", "กรุงเทพ", True),
        ("Paris", "...", False),
        (None, "None", False),
    ],
)
def test_sub_match(prediction, answer, right):
    assert SUB_MATCH(prediction, ["Lyon", answer]) is right


def metric_numerical_range(prediction, low, high):
    """What infoseek_eval.py (github edchengg/infoseek_eval) does with a prediction of one or two numbers."""
    first, last = prediction[0], prediction[-1]
    if len(prediction) == 1 or first > last:
        return low <= first <= high
    overlap = max(0.0, min(last, high) - max(first, low))
    sizes = (last - first) + 1e-12 + (high - low) + 1e-12
    return (low <= first <= high and low <= last <= high) or overlap / (sizes - overlap) >= 0.5 - 1e-12


def test_ranges_count_as_infoseek_s_metric_counts_them():
    rng = random.Random(0)
    for _ in range(3000):
        low, high = sorted(rng.randrange(-8, 9) / 2 for _ in "12")
        said = [rng.randrange(-8, 9) / 2 for _ in range(rng.choice([1, 2]))]
        text = rng.choice(["{}", "about {} km", "from {}."]).format(" to ".join(map(str, said)))
        answers = ["none", f"between {low} and {high}"]
        expected = metric_numerical_range(said, low, high)
        assert reward.unicode_match(text, answers) == SUB_MATCH(text, answers) == expected, (text, answers)
        assert not reward.exact_match(text, answers)


@pytest.mark.parametrize(
    "prediction, right",
    [
        ("900", True), ("1,100 m", True), ("1.0e3", True), ("９５０", True), ("−950", False), ("890", False),
        ("900-1100", True), ("900–1100", True), ("800 to 1,000 m", False), ("850 to 1,050 m", True),
        ("1000, or 7", True),
        ("many", False), ("", False), ("1e999", False), ("between 900 and 1100", True),
    ],
)  # fmt: skip
def test_numbers_in_a_range(prediction, right):
    assert reward.unicode_match(prediction, ["between 900 and 1.1e3"]) is right
    assert reward.unicode_match(prediction, ["between 900 and 1,100"]) is right


# --- format ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "turn, kind",
    [
        (ANSWER, "answer"),
        (IMAGE, "image_search"),
        (TEXT, "text_search"),
        # white space, text between the parts, several lines, nothing inside
        (f"\n\t {ANSWER} \n", "answer"),
        ("<reason>one\ntwo\n</reason>\nSo:\n<answer>\nParis\n</answer>", "answer"),
        (f"<reason>one\ntwo</reason>\nSo:\n{IMG}\n", "image_search"),
        ("<reason>one\ntwo</reason>\nSo:\n<text_search>a\nb</text_search>", "text_search"),
        ("<reason></reason><answer></answer>", "answer"),
        ("<reason></reason><text_search></text_search>", "text_search"),
        # a piece of the image-search tag is plain text
        ("<reason>a <search> or <img> or </search></reason><answer>Paris</answer>", "answer"),
        ("<reason><search> <img></search></reason><answer>Paris</answer>", "answer"),
        (f"<reason>an <img> here</reason>{IMG}", "image_search"),
        ("<reason>no </search></reason><text_search><img></text_search>", "text_search"),
        # text before or after
        (f"Well. {ANSWER}", None),
        (f"{ANSWER}.", None),
        (f"{ANSWER}<|im_end|>", None),
        (f"{IMAGE} please", None),
        (f"{TEXT}\nplease", None),
        (f"Well.\n{TEXT}", None),
        # a part missing, or out of order
        ("", None),
        ("Paris", None),
        ("<answer>Paris</answer>", None),
        (IMG, None),
        ("<reason>I know it.</reason>", None),
        ("<reason>I know it.<answer>Paris</answer>", None),
        ("I know it.</reason><answer>Paris</answer>", None),
        ("<reason>I know it.</reason><answer>Paris", None),
        ("<reason>I must read.</reason><text_search>capital", None),
        ("<reason>I must look.</reason><search><img>", None),
        ("<reason>I must look.</reason><search> <img></search>", None),
        ("<answer>Paris</answer><reason>I know it.</reason>", None),
        ("</reason>I know it.<reason><answer>Paris</answer>", None),
        ("<reason>I know <answer>Paris</answer></reason>", None),
        ("<reason>it <answer>is</reason>Paris</answer>", None),
        ("<Reason>I know it.</Reason><answer>Paris</answer>", None),
        # a tag twice
        ("<reason>a</reason><reason>b</reason><answer>Paris</answer>", None),
        ("<reason>a<reason>b</reason><answer>Paris</answer>", None),
        ("<reason>a</reason>b</reason><answer>Paris</answer>", None),
        ("<reason>the <answer> tag</reason><answer>Paris</answer>", None),
        ("<reason>a</reason><answer>Lyon</answer><answer>Paris</answer>", None),
        ("<reason>a</reason><answer><answer>Paris</answer></answer>", None),
        ("<reason>a</reason><answer>Paris</answer></answer>", None),
        (f"<reason>a</reason>{IMG}{IMG}", None),
        (f"<reason>first {IMG}</reason>{IMG}", None),
        ("<reason>a</reason><text_search>b</text_search><text_search>c</text_search>", None),
        ("<reason>a</reason><text_search>b<text_search>c</text_search>", None),
        ("<reason>a</reason><text_search>b</text_search>c</text_search>", None),
        # a tag of another kind, wherever it stands
        (f"<reason>not {IMG}</reason><answer>Paris</answer>", None),
        ("<reason>not <text_search></reason><answer>Paris</answer>", None),
        ("<reason>not </text_search></reason><answer>Paris</answer>", None),
        (f"<reason>not <answer></reason>{IMG}", None),
        (f"<reason>not </answer></reason>{IMG}", None),
        (f"<reason>not <text_search></reason>{IMG}", None),
        (f"<reason>not </text_search></reason>{IMG}", None),
        (f"<reason>not {IMG}</reason><text_search>b</text_search>", None),
        ("<reason>not <answer></reason><text_search>b</text_search>", None),
        ("<reason>not </answer></reason><text_search>b</text_search>", None),
        (f"<reason>a</reason><text_search>b</text_search>{IMG}", None),
        (f"<reason>a</reason>{IMG}<answer>Paris</answer>", None),
    ],
)
def test_turn_kind(turn, kind):
    assert reward.turn_kinds(turn) == ([kind] if kind else [])


ACCEPTED = {
    ("answer",),
    ("image_search", "answer"),
    ("text_search", "answer"),
    ("image_search", "text_search", "answer"),
}


def test_format_of_every_conversation_of_up_to_four_turns():
    for length in range(5):
        for kinds in itertools.product(KINDS, repeat=length):
            conversation = [KINDS[kind] for kind in kinds]
            assert reward.format_ok(conversation) == (kinds in ACCEPTED), kinds
            searches_then_answer = length > 0 and kinds[-1] == "answer" and all(kind in TOOLS for kind in kinds[:-1])
            assert reward.format_ok(conversation, any_order=True) == searches_then_answer, kinds


def test_every_turn_is_stripped():
    assert reward.format_ok([f"\n{IMAGE}\n", f"  {TEXT}\n\n", f"\t{ANSWER}\n"])


# --- searches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "responses, searches",
    [
        ([], 0),
        ([ANSWER], 0),
        ([IMAGE], 1),  # of a one-turn conversation that turn ...
        ([TEXT], 1),
        ([f"{IMG}<answer>Paris</answer>"], 1),
        ([IMAGE, ANSWER], 1),
        ([IMAGE, TEXT, ANSWER], 2),
        ([TEXT, TEXT, TEXT, ANSWER], 3),
        ([IMAGE, TEXT, TEXT], 2),  # ... of a longer one all but the last
        ([ANSWER, IMAGE], 0),
        ([IMG, "<answer>Paris</answer>"], 1),  # well-formed or not
        ([f"{IMG} {IMG}", ANSWER], 1),  # turns, not tags
        ([f"{IMG}<text_search>b</text_search>", ANSWER], 1),
        (["</text_search><text_search>", ANSWER], 1),
        (["<text_search>capital", ANSWER], 0),
        (["capital</text_search>", ANSWER], 0),
        (["<search><img>", ANSWER], 0),
    ],
)
def test_count_searches(responses, searches):
    assert reward.count_searches(responses) == searches
    assert reward.score(responses, ["Paris"]).searches == searches


# --- the reward -----------------------------------------------------------------------------------------------------

BAD_ANSWER = "<answer>Paris</answer>"  # right, but without its reasoning


@pytest.mark.parametrize(
    "responses, answers, expected",
    [
        ([ANSWER], ["Paris"], 1.0),
        ([IMAGE, ANSWER], ["Paris"], 0.91),
        ([TEXT, ANSWER], ["Paris"], 0.91),
        ([IMAGE, TEXT, ANSWER], ["Paris"], 0.91),  # the penalty is taken once
        ([BAD_ANSWER], ["Paris"], 0.9),
        ([IMAGE, BAD_ANSWER], ["Paris"], 0.81),
        ([TEXT, TEXT, ANSWER], ["Paris"], 0.81),
        ([TEXT, IMAGE, ANSWER], ["Paris"], 0.81),
        ([f"{IMG}{BAD_ANSWER}"], ["Paris"], 0.81),
        ([ANSWER], ["Lyon"], 0.1),
        ([IMAGE, TEXT, ANSWER], ["Lyon"], 0.1),  # no penalty on a wrong answer
        ([ANSWER], [], 0.1),
        ([BAD_ANSWER], ["Lyon"], 0.0),
        ([IMAGE, TEXT, TEXT], ["Paris"], 0.0),
        ([ANSWER, IMAGE], ["Paris"], 0.0),  # only the last turn answers
        (["Paris"], ["Paris"], 0.0),
        ([""], [""], 0.0),
        ([], ["Paris"], 0.0),
    ],
)
def test_reward(responses, answers, expected):
    assert reward.score(responses, answers).reward == pytest.approx(expected, abs=1e-12)


def test_score_says_why():
    assert reward.score([IMAGE, ANSWER], ["Lyon", "paris"]) == reward.Score(
        reward=pytest.approx(0.91), correct=True, format_ok=True, searches=1, answer="Paris"
    )
    assert reward.score(["Paris"], ["Paris"]) == reward.Score(0.0, False, False, 0, None)
    assert reward.score([], ["Paris"]) == reward.Score(0.0, False, False, 0, None)
    assert reward.score(["<answer> </answer>"], ["Paris"]).answer == ""
    kept = reward.score([ANSWER], ["Paris"])
    assert [type(value) for value in vars(kept).values()] == [float, bool, bool, int, str]  # fit for JSON
    with pytest.raises(AttributeError):
        kept.reward = 2.0


def test_what_normalises_to_nothing_is_never_right_or_is_compared_as_it_stands():
    turn = "<reason>?</reason><answer>The</answer>"
    assert reward.score([turn], ["the", "", "a."]).correct is False
    for match in ("em_unicode", "sub_em"):
        assert reward.score([turn], ["the", ""], match=match).correct is True
        assert reward.score([turn], ["", "a."], match=match).correct is False


def test_match():
    turn = "<reason>?</reason><answer>the city of Paris</answer>"
    assert not reward.score([turn], ["Paris"]).correct
    assert reward.score([turn], ["Paris"], match="sub_em").reward == pytest.approx(1.0, abs=1e-12)


def test_per_search_penalty():
    def both(responses):
        return [reward.score(responses, ["Paris"], per_search_penalty=many).reward for many in (False, True)]

    assert both([ANSWER]) == pytest.approx([1.0, 1.0], abs=1e-12)
    assert both([IMAGE, ANSWER]) == pytest.approx([0.91, 0.91], abs=1e-12)
    assert both([IMAGE, TEXT, ANSWER]) == pytest.approx([0.91, 0.9 * 0.9 * 0.9 + 0.1], abs=1e-12)
    assert both([TEXT, TEXT, TEXT, ANSWER]) == pytest.approx([0.81, 0.9 * 0.9 * 0.9 * 0.9], abs=1e-12)


def test_the_options_reach_the_reward():
    searched = [TEXT, TEXT, ANSWER]
    assert reward.score(searched, ["Paris"], any_order=True).reward == pytest.approx(0.91, abs=1e-12)
    assert reward.score(searched, ["Paris"], search_penalty=0.0).reward == pytest.approx(0.9, abs=1e-12)
    assert reward.score(searched, ["Paris"], search_penalty=-0.1).reward == pytest.approx(0.99, abs=1e-12)
    assert reward.score(searched, ["Paris"], format_weight=0.0).reward == pytest.approx(0.9, abs=1e-12)
    assert reward.score([ANSWER], ["Lyon"], format_weight=0.25).reward == pytest.approx(0.25, abs=1e-12)
    assert reward.score([BAD_ANSWER], ["Paris"], format_weight=0.25).reward == pytest.approx(0.75, abs=1e-12)


def test_reward_against_the_formula():
    """Every conversation of up to four turns, with every option, against the sentence of the recipe written out."""
    for length, penalty, alpha, many in itertools.product(range(1, 5), (-0.1, 0.0, 0.3), (0.0, 0.1), (False, True)):
        for kinds in itertools.product(KINDS, repeat=length):
            s = 1.0 if kinds[-1] == "answer" else 0.0
            asking = kinds if length == 1 else kinds[:-1]
            searches = len([kind for kind in asking if kind in TOOLS])
            for _ in range(searches if many else min(searches, 1)):
                s *= 1 - penalty
            expected = (1 - alpha) * s + (alpha if kinds in ACCEPTED else 0.0)
            got = reward.score(
                [KINDS[kind] for kind in kinds],
                ["Paris"],
                search_penalty=penalty,
                format_weight=alpha,
                per_search_penalty=many,
            )
            assert got.reward == pytest.approx(expected, abs=1e-12), kinds


def test_ramped_penalty():
    assert [reward.ramped_penalty(0.1, step, 4) for step in (0, 1, 2, 3, 4, 5, 100)] == pytest.approx(
        [-0.1, -0.05, 0.0, 0.05, 0.1, 0.1, 0.1], abs=1e-12
    )
    assert [reward.ramped_penalty(0.1, step, 0) for step in (0, 1, 50)] == [0.1, 0.1, 0.1]  # off
    assert reward.ramped_penalty(0.1, 0, 1) == -0.1 and reward.ramped_penalty(0.1, 1, 1) == 0.1
    bonus = reward.ramped_penalty(0.1, 0, 10)
    assert reward.score([IMAGE, ANSWER], ["Paris"], search_penalty=bonus).reward == pytest.approx(1.09, abs=1e-12)


def test_importing_the_reward_needs_no_torch():
    subprocess.run(
        [sys.executable, "-c", "import reward; import sys; assert 'torch' not in sys.modules"],
        cwd=Path(reward.__file__).parent,
        check=True,
        timeout=60,
    )
