"""Text, made harmless (cleaned strings, pages without their markup), and searched: the terms of a text, and the
sentences of a page that fit a query."""

import html
import re
import unicodedata
from collections import Counter

import regex

PAGE_SENTENCES = 20  # of a page that is visited

TAG = re.compile(r"<(/?)!?([a-zA-Z][a-zA-Z0-9]*)\b[^<>]{0,2000}>")
SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+|(?<=[。！？])|\n+")

ACCENTS = re.compile("[\u0300-\u036f\u0591-\u05bd\u05c1\u05c2\u064b-\u065f\u0670]+")  # and points of Hebrew and Arabic
SPACED = {n: " " for n in range(128) if not chr(n).isalnum()}
WORD = regex.compile(r"[\p{L}\p{N}\p{M}]+")
# Line_Break=SA: Thai, Lao, Khmer, Burmese ...; Korean has spaces, but its words carry endings
UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}\p{Line_Break=SA}ー"
RUN = regex.compile(rf"[{UNSPACED}][{UNSPACED}\p{{M}}]*")


def clean(text, limit: int) -> str:
    """Text of a page or title as one harmless string: no control characters, no halves of characters, white space
    squeezed (a line break stays one), at most `limit` characters. Anything but a string is ""."""
    if not isinstance(text, str):
        return ""
    text = text[: 4 * limit].encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    text = re.sub(r"(?:[^\S\n]|[\x00-\x09\x0b-\x1f\x7f-\x9f])+", " ", text)
    return re.sub(r" ?\n[ \n]*", "\n", text).strip()[:limit].rstrip()


def plain_text(page: str) -> str:
    """A page as text: HTML loses its tags, scripts and styles; Markdown keeps the words of its links, not images."""
    if re.search(r"<(?:!doctype|html|head|body|script|style|div|p|table|span|a)\b", page[:100_000], re.IGNORECASE):
        page = _without_tags(page)
    page = re.sub(r"!\[[^\[\]\n]{0,500}\]\([^()\n]{0,2000}\)", " ", page)
    return re.sub(r"\[([^\[\]\n]{1,500})\]\([^()\n]{0,2000}\)", r"\1", page)


def inline_text(text) -> str:
    """A title or snippet, whose tags and entities are taken away."""
    if not isinstance(text, str):
        return ""
    return html.unescape(re.sub(r"</?(?:b|i|em|strong|span|br|p|div|script|style|a)\b[^<>]{0,500}>", " ", text[:5000]))


def _without_tags(page):
    """HTML as text, in linear time whatever it holds (the standard library's parser takes minutes for some pages)."""
    parts, at = [], 0
    while (start := page.find("<!--", at)) >= 0 and (end := page.find("-->", start)) >= 0:
        parts.append(page[at:start])
        at = end + 3
    pieces, hidden, text = TAG.split("".join(parts) + page[at:]), "", []
    for before, close, name in zip(pieces[::3], [*pieces[1::3], ""], [*pieces[2::3], ""], strict=True):
        text.append("" if hidden else before)
        name = name.lower()
        if hidden:
            hidden = "" if close and name == hidden else hidden
        elif name in ("script", "style", "noscript", "template") and not close:
            hidden = name
        text.append("\n" if name in ("p", "br", "div", "li", "tr", "h1", "h2", "h3") else " ")
    return html.unescape("".join(text))


def sentences(text: str) -> list[str]:
    """The sentences of a text, each with its end mark; what is longer than 500 characters is cut into pieces."""
    found = (s.strip() for s in SENTENCE_END.split(text))
    return [s[at : at + 500] for s in found for at in range(0, len(s), 500)]


def terms(text: str, letters: bool = False) -> list[str]:
    """What a text is searched by, the same for queries and for what they find: words without case and accents, and of
    scripts without spaces each two letters in a row; letters: also each one, so that a query of one letter finds it."""

    def split(run):
        single = regex.findall(r"\X", run[0])
        pairs = [a + b for a, b in zip(single, single[1:], strict=False)]
        return f" {' '.join(single + pairs if letters else pairs or single)} "

    if text.isascii():
        return text.lower().translate(SPACED).split()  # the same, in a tenth of the time
    text = re.sub("[\uff00-\uffef]+", lambda wide: unicodedata.normalize("NFKC", wide[0]), text)
    text = ACCENTS.sub("", unicodedata.normalize("NFD", text.casefold()))
    text = RUN.sub(split, unicodedata.normalize("NFC", text))
    return WORD.findall(text.lower())


def passages(text: str, query: str, count: int) -> str:
    """The `count` sentences that fit the query best, in their order: each term of the query counts more the fewer
    sentences hold it. The first sentences, if none holds one."""
    found = [(s, set(terms(s, letters=True))) for s in sentences(text)]
    wanted = set(terms(query))
    holders = Counter(word for _, words in found for word in words & wanted)
    score = [sum(1 / holders[word] for word in words & wanted) for _, words in found]
    best = sorted(range(len(found)), key=lambda n: (-score[n], n))[:count]
    return " ".join(found[n][0] for n in sorted(n for n in best if score[n] or not any(score)))
