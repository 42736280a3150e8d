import pytest
from vlm.tiny import tiny_model

from visproj.errors import InputError
from visproj.vlm.preparing import DialogueEncoder
from visproj.vlm.samples import Columns, Sample, image_paths, read_sample

PROMPT = "What is it?"


def read(row, columns=None):
    return read_sample(row, (columns or Columns()).found_in(list(row), "it"), PROMPT)


def turns(*texts, names=("human", "gpt"), keys=("from", "value")):
    """Texts in turn, the question first."""
    return [dict(zip(keys, (names[n % 2], text), strict=True)) for n, text in enumerate(texts)]


CHAT = {"names": ("user", "assistant"), "keys": ("role", "content")}
PARTS = [{"type": "image"}, {"type": "text", "text": "What?"}]
IMAGE = {"image": "a.png"}
READ = {
    "a caption": ({**IMAGE, "caption": " a cat\n"}, [PROMPT], [["a cat"]]),
    "captions": ({**IMAGE, "captions": ["a", "b"]}, [PROMPT], [["a", "b"]]),
    "five captions, two alike": ({**IMAGE, "captions": list("abcab")}, [PROMPT], [["a", "b", "c"]]),
    "capital letters": ({"Image": "a.png", "Caption": "a"}, [PROMPT], [["a"]]),
    "an image with its text": ({"jpg": b"1", "txt": "a"}, [PROMPT], [["a"]]),
    "a question": ({"question": "Who?", "answer": "I"}, ["Who?"], [["I"]]),
    "VQA": ({**IMAGE, "question": "Who?", "answers": ["I", "I", "we"]}, ["Who?"], [["I", "we"]]),
    "no answer": ({"question": "Who?", "answer": None}, ["Who?"], []),
    "LLaVA": (
        {**IMAGE, "id": 3, "conversations": turns("What?\n<image>", " a cat")},
        ["What?\n<image>"],
        [["a cat"]],
    ),
    "LLaVA's text alone": ({"conversations": turns("What?", "That.")}, ["What?"], [["That."]]),
    "several turns": (
        {"conversations": turns("a", "b", "c", "d")},
        ["a", "c"],
        [["b"], ["d"]],
    ),
    "a last question": ({"conversations": turns("a", "b", "c")}, ["a", "c"], [["b"]]),
    "messages": ({"messages": turns("a", "b", **CHAT)}, ["a"], [["b"]]),
    "parts": ({"messages": turns(PARTS, "a", **CHAT)}, ["<image>\nWhat?"], [["a"]]),
    "a system's text": (
        {"conversations": [{"from": "system", "value": "Be brief."}, *turns("a", "b")]},
        ["Be brief.\na"],
        [["b"]],
    ),
    "both namings, one of them empty": (
        {
            "messages": [
                {"from": None, "value": None, "role": "user", "content": "a"},
                {"from": "gpt", "value": "b", "role": None, "content": None},
            ]
        },
        ["a"],
        [["b"]],
    ),
    "columns in place of rows": (
        {"conversations": {"from": ["human", "gpt"], "value": ["a", "b"]}},
        ["a"],
        [["b"]],
    ),
    "a conversation that this row lacks": (
        {**IMAGE, "conversations": None, "caption": "a"},
        [PROMPT],
        [["a"]],
    ),
}


@pytest.mark.parametrize(("row", "questions", "answers"), READ.values(), ids=READ)
def test_rows_in_one_form(row, questions, answers):
    sample = read(row)
    assert sample == Sample(questions, answers)
    assert sample.is_complete == (len(questions) == len(answers))


FAULTS = {
    "a blank caption": (
        {**IMAGE, "caption": " \t"},
        r"its caption is ' \\t', expected a text that is not blank",
    ),
    "an empty caption": ({**IMAGE, "caption": ""}, "its caption is ''"),
    "a blank one of several": ({**IMAGE, "captions": ["x", ""]}, "its caption is ''"),
    "a number": ({**IMAGE, "captions": ["x", 1]}, "its caption is 1, expected a text"),
    "no captions": ({**IMAGE, "captions": []}, "its list of captions is empty"),
    "null": ({**IMAGE, "captions": None}, "it has no captions"),
    "a placeholder": ({**IMAGE, "caption": "an <image>"}, "its caption 'an <image>' has <image>"),
    "half a pair": ({**IMAGE, "caption": "\ud83d"}, r"'\\ud83d' has an unpaired surrogate"),
    "a caption of nothing": ({"caption": "a"}, "it has a caption and no image"),
    "a caption of no images": ({"images": [], "caption": "a"}, "it has a caption and no image"),
    "a blank question": ({"question": "", "answer": "a"}, "its question is ''"),
    "a blank answer": ({"question": "a", "answer": " "}, "its answer is ' '"),
    "answers in objects": ({"question": "a", "answers": [{"answer": "b"}]}, "expected a text"),
    "a blank turn": ({"conversations": turns("a", " ")}, "its turn 2 is ' '"),
    "a turn without text": ({"conversations": [{"from": "human"}]}, "turn 1 .* has no text"),
    "an image in an answer": ({"conversations": turns("a", "<image>")}, "its turn 2 '<image>' has"),
    "an answer first": (
        {"conversations": turns("a", "b")[::-1]},
        "turn 1 of the conversation is from 'gpt', expected human or user",
    ),
    "two questions": (
        {"conversations": turns("a", "b", names=("human", "human"))},
        "turn 2 of the conversation is from 'human', expected gpt or assistant",
    ),
    "a stranger": ({"conversations": turns("a", names=("bing", ""))}, "is from 'bing', expected"),
    "a turn of text": ({"conversations": ["a"]}, "turn 1 of the conversation is 'a', not an obj"),
    "a text": ({"conversations": "a"}, "its conversation is 'a', not a list"),
    "no turns": ({"conversations": []}, "the conversation has no questions"),
    "a film": (
        {"messages": turns([{"type": "video"}], **CHAT)},
        "turn 1 of the conversation has a part of type 'video'",
    ),
}


@pytest.mark.parametrize(("row", "message"), FAULTS.values(), ids=FAULTS)
def test_what_is_wrong_with_a_row(row, message):
    with pytest.raises(InputError, match=message):
        read(row)


def test_missing_columns_are_named_with_those_that_are_there():
    with pytest.raises(
        InputError, match=r"^x has no column with texts: it has id, img\. Name yours"
    ):
        Columns().found_in(["id", "img"], "x")
    with pytest.raises(InputError, match=r"^x has no column says: it has image, caption$"):
        Columns(caption="says").found_in(["image", "caption"], "x")
    with pytest.raises(InputError, match=r"^x has no column with texts: it has none"):
        Columns().found_in([], "x")


def test_a_chosen_kind_of_text_comes_before_the_usual_ones():
    row = {
        "image": "a.png",
        "photo": "b.png",
        "conversations": turns("a", "b"),
        "question": "c",
        "answer": "d",
        "says": "e",
    }
    assert read(row) == Sample(["a"], [["b"]])
    assert read(row, Columns(caption="says")) == Sample([PROMPT], [["e"]])
    assert read(row, Columns(question="question")) == Sample(["c"], [["d"]])
    assert read(row, Columns(answer="says")) == Sample(["c"], [["e"]])
    assert Columns(image="photo").found_in(list(row), "it").image == "photo"


@pytest.mark.parametrize(
    ("value", "paths"), [(None, []), ("a", ["a"]), (["a", "b"], ["a", "b"]), ([], [])]
)
def test_image_paths(value, paths):
    assert image_paths(value) == paths


@pytest.mark.parametrize("value", [3, " ", ["a", None], {"path": "a"}, True])
def test_what_is_no_path(value):
    with pytest.raises(InputError, match=r"its image is .*, not a path"):
        image_paths(value)


# The limit of the language model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def shortened(model, limit, *answers, images=1, questions=("a",)):
    sample = Sample(list(questions), [list(row) for row in answers])
    whole, _ = DialogueEncoder(model, None)(sample, images)
    return whole, *DialogueEncoder(model, limit)(sample, images)


def before(model, images=1):
    """Tokens before an answer, visual ones included."""
    ids = model.prompt_ids("a", images)
    return len(ids) + images * (model.tokens_per_image - 1)


def test_what_is_longer_is_cut_at_its_end(model):
    start = before(model)
    for room in (1, 3, 8):
        whole, found, cut = shortened(model, start + room, ["c" * 7])
        assert len(whole.ids) == len(found.ids) + 8 - room  # the end of text is the eighth
        assert cut == (room < 8)
        assert [row[: len(found.ids)] for row in whole] == list(found)
    with pytest.raises(InputError, match=f"leave no room for an answer in {start} tokens"):
        shortened(model, start, ["c"])


def test_each_alternative_is_cut_by_itself(model):
    whole, found, cut = shortened(model, before(model) + 3, ["cc", "d" * 9, "e" * 4])
    assert cut
    assert [found.branches.count(branch) for branch in (2, 3, 4)] == [3, 3, 3]
    assert [whole.branches.count(branch) for branch in (2, 3, 4)] == [3, 10, 5]
    _, found, cut = shortened(model, before(model) + 10, ["cc", "d" * 9, "e" * 4])
    assert not cut  # although all of them are longer together


def test_later_turns_are_cut_first(model):
    turns = [["cc"], ["dd"]]
    whole, found, cut = shortened(model, before(model) + 4, *turns, questions=("a", "b"))
    assert cut
    assert sum(label >= 0 for label in found.labels) == 3
    assert found.ids == whole.ids[: len(found.ids)]


@pytest.mark.parametrize("limit", [10, 17, 30, 33])
def test_images_that_do_not_fit(model, limit):
    with pytest.raises(InputError, match=f"images do not fit into {limit} tokens"):
        shortened(model, limit, ["c"], images=2)
