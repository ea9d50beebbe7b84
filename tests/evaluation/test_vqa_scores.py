from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtpvit.evaluation.answer_text import normalise
from dtpvit.evaluation.vqa_scores import (
    Choice,
    chosen_letter,
    exact_match,
    pope,
    says_yes,
    science_qa,
    vqa_accuracy,
)

# Worked out by hand from the table of the challenge's evaluation code
NORMALISED = [
    ("Yes.", "yes"),
    ("a dog", "dog"),
    ("THE Theatre", "theatre"),
    ("two", "2"),
    ("None", "0"),
    ("twenty", "twenty"),
    ("1,000", "1000"),
    ("3.5 m.", "3.5 m"),
    ("7.", "7"),
    ("red/blue", "red blue"),
    ("red / blue", "red blue"),
    ("(a) t-shirt", "t shirt"),  # no space touches the hyphen; one touches the bracket
    ("t-shirt -", "tshirt"),
    ("what?", "what"),
    ("dont", "don't"),
    ("couldntve", "couldntve"),  # only one apostrophe may be missing
    ("couldn'tve", "couldn't've"),
    ("twas", "'twas"),
    ("lets", "lets"),
    ("Mike's", "mike 's"),
    ("somebody'd", "somebodyd"),
    ("line\none", "line 1"),
    (" the ", ""),
]


@pytest.mark.parametrize(("answer", "expected"), NORMALISED)
def test_answers_are_normalised_as_by_the_challenge(answer, expected):
    assert normalise(answer) == expected


@given(st.text(alphabet="aA tThe05.,;-/?!()'\n", max_size=30))
def test_what_is_normalised_has_neither_articles_nor_capitals_nor_double_spaces(answer):
    found = normalise(answer)
    assert found == found.lower() == " ".join(found.split())
    assert not {"a", "an", "the"} & set(found.split())


# Exact match


def test_exact_match_forgives_form_and_strictness_does_not():
    said, right = ["The dog.", "two", "cat"], [["dog"], ["2", "3"], ["dog", "cat"]]
    assert exact_match(said, right) == {"accuracy": 1.0}
    assert exact_match(said, right, strict=True) == {"accuracy": pytest.approx(1 / 3)}
    assert exact_match([" cat\n"], [["cat"]], strict=True) == {"accuracy": 1.0}


def test_options_that_spell_an_article_are_told_apart():
    assert exact_match(["A", "the", "a", ""], [["A"], ["A"], ["A"], ["A"]]) == {"accuracy": 0.5}


# VQA accuracy


def leave_one_out(said: str, humans: list[str]) -> float:
    """The definition, subset by subset."""
    subsets = list(combinations(humans, len(humans) - 1))
    return sum(min(1.0, subset.count(said) / 3) for subset in subsets) / len(subsets)


@given(st.lists(st.sampled_from(["cat", "dog", "cow"]), min_size=4, max_size=12), st.sampled_from(["cat", "bat"]))
def test_vqa_accuracy_is_the_mean_over_all_subsets_without_one_human(humans, said):
    assert vqa_accuracy([said], [humans])["vqa accuracy"] == pytest.approx(leave_one_out(said, humans))


@pytest.mark.parametrize(("equal", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_with_ten_humans(equal, expected):
    humans = ["Nokia."] * equal + [f"other {i}" for i in range(10 - equal)]
    assert vqa_accuracy(["the nokia"], [humans]) == {"vqa accuracy": pytest.approx(expected)}


# POPE


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("Yes", True),
        ("No", False),
        ("no", False),
        ("No, there is none", False),
        ("There is not a dog", False),
        ("Yes. There is no cat, though", True),  # the first sentence alone counts
        ("NO", True),  # evaluate.py knows three spellings
        ("nothing", True),
        ("", True),
    ],
)
def test_yes_and_no_are_read_as_by_popes_own_script(answer, yes):
    assert says_yes(answer) is yes


def test_pope_of_a_table_counted_by_hand():
    # 3 hits, 1 false alarm, 2 right rejections, 2 misses
    said = ["yes"] * 3 + ["yes"] + ["no"] * 2 + ["no"] * 2
    right = [True] * 3 + [False] + [False] * 2 + [True] * 2
    found = pope(said, right)
    assert found == {
        "accuracy": pytest.approx(5 / 8),
        "precision": pytest.approx(3 / 4),
        "recall": pytest.approx(3 / 5),
        "F1": pytest.approx(2 * 3 / (2 * 3 + 1 + 2)),
        "yes ratio": pytest.approx(4 / 8),
    }


def test_pope_of_somebody_who_never_says_yes():
    assert pope(["no", "no"], [True, False]) == {"accuracy": 0.5, "precision": 0, "recall": 0, "F1": 0, "yes ratio": 0}


# ScienceQA


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        (" B\t", "B"),
        ("B. a magnet", "B"),
        ("B\nbecause", "B"),
        ("B.", None),  # no space behind the period
        ("b", None),
        ("(B)", None),
        ("So: The answer is B.", "B"),
        ("The answer is B", "B"),
        ("The answer is C or so. The answer is B.", "B"),
        ("The answer is b.", None),
        ("E", None),  # there are four
        ("F", None),
        ("AB", None),
        ("", None),
    ],
)
def test_letters_are_read_as_by_llavas_own_script(answer, letter):
    assert chosen_letter(answer, 4) == letter


def test_an_option_that_is_not_there_is_wrong():
    found = science_qa(["A", "C", "no idea"], [Choice("A", 2), Choice("C", 2), Choice("B", 2)])
    assert found == {"accuracy": pytest.approx(1 / 3), "unread": pytest.approx(2 / 3)}


@pytest.mark.parametrize("score", [exact_match, vqa_accuracy, pope, science_qa])
def test_a_reference_too_few_is_an_error(score):
    with pytest.raises(ValueError, match="zip"):
        score(["yes"], [])
