"""Answers as the VQA challenge compares them: without case, punctuation and articles, numbers as digits."""

import re

__all__ = ["normalise"]

_ARTICLES = frozenset(("a", "an", "the"))
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)} | {"none": "0"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`!'
_PERIOD = re.compile(r"\.(?!\d)")
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't
    not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
    somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
    would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""


def _misspelt() -> dict[str, str]:
    """Each contraction by its spellings with one apostrophe left out, as in the challenge's table."""
    table = {"somebody'd": "somebodyd"}  # the table's own slip
    for word in _CONTRACTIONS.split():
        marks = [place for place, letter in enumerate(word) if letter == "'"]
        table |= {word[:place] + word[place + 1 :]: word for place in marks}
    return table


_MISSPELT = _misspelt()


def normalise(answer: str) -> str:
    """An answer as the evaluation server of VQAv2 and TextVQA (EvalAI's, in Facebook's MMF) sees it.

    Antol et al., "VQA: Visual Question Answering", ICCV 2015; LLaVA scores TextVQA by the same rules. In this order:
    lower case; commas and question marks go, ``'s`` becomes a word; any other punctuation mark becomes a space, or
    nothing where the answer has a space beside one such mark; periods go unless a digit follows; numbers to ten become
    digits, articles go, and contractions get their apostrophe.

    >>> normalise("The Two red-ish dogs.")
    '2 red ish dogs'
    """
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    words = (_DIGITS.get(word, word) for word in _without_punctuation(text).split())
    return " ".join(_MISSPELT.get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(text: str) -> str:
    found = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        found = found.replace(mark, "" if beside_space else " ")
    return _PERIOD.sub("", found)
