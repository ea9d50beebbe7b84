"""What lmms-eval asks, answered; none of this needs lmms-eval."""

import pytest
from colour_assistant import COLOURS, IS_RED, NAME, plain

from dtpvit.errors import UserError
from dtpvit.interop.assistant import Question, load_assistant
from dtpvit.lmms.requests import Request, answer_requests, question_of

OPTIONS = {"max_new_tokens": 8, "temperature": 0, "do_sample": False, "num_beams": 1, "until": ["\n\n"]}


@pytest.fixture(scope="module")
def assistant(colour_assistant):
    return load_assistant(colour_assistant)


def test_answers_come_in_the_order_of_the_requests_whatever_their_options_and_lengths(assistant):
    requests, right = [], []
    for number, colour in enumerate([*COLOURS] * 2):
        for text, answer in [(NAME, colour), (IS_RED, "yes" if colour == "red" else "no")]:
            options = OPTIONS | {"max_new_tokens": 8 + number % 2}
            requests.append(Request(text, options, lambda colour=colour: [plain(colour)]))
            right.append(answer)
    requests.append(Request(NAME, OPTIONS, lambda: None))
    counts = []
    assert answer_requests(assistant, requests, batch_size=4, progress=counts.append) == [*right, "no"]
    assert sum(counts) == len(requests) and max(counts) == 4


@pytest.mark.parametrize(
    ("until", "expected"), [("e", "gr"), (["n", "re"], "g"), (["", "x"], "green"), (None, "green"), ([], "green")]
)
def test_an_answer_ends_before_the_first_text_that_is_to_end_it(assistant, until, expected):
    request = Request(NAME, OPTIONS | {"until": until}, lambda: [plain("green")])
    assert answer_requests(assistant, [request]) == [expected]


def test_max_new_tokens_and_sampling_reach_the_model(assistant):
    def said(**options):
        return answer_requests(assistant, [Request(NAME, OPTIONS | options, lambda: [plain("green")])])[0]

    hot = [said(do_sample=True, temperature=100.0) for _ in range(4)]
    short = [said(do_sample=True, temperature=100.0, max_new_tokens=1) for _ in range(4)]
    assert len(set(hot)) > 1 and len("".join(short)) < len("".join(hot))
    assert said(do_sample=True, temperature=0) == said(num_beams=2) == "green"


@pytest.mark.parametrize(
    ("context", "count", "parts"),
    [
        ("what?", 1, (None, "\n", "what?")),
        ("<image>\nwhat?", 1, (None, "\nwhat?")),
        ("what is <image> and <image>?", 2, ("what is ", None, " and ", None, "?")),
        ("two <image>?", 2, (None, "\n", None, "\n", "two <image>?")),
        ("spells <image>", 0, ("spells <image>",)),
    ],
)
def test_images_stand_at_their_marks_where_there_are_as_many(context, count, parts):
    question = question_of(context, [plain("red").convert("L")] * count)
    assert question.turns[0].parts == parts and len(question.images) == count
    assert isinstance(question, Question) and all(image.mode == "RGB" for image in question.images)


def test_what_is_no_image_is_refused():
    with pytest.raises(UserError, match="hands over a str; dtpvit answers questions about images"):
        question_of("what?", ["video.mp4"])
