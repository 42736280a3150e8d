"""``visproj answer``: what is written for each row, in batches, and after a stop."""

import csv
import io
import json

import pytest
from vlm.tiny import (
    PROMPT,
    TinyEncoder,
    tiny_language_model,
    tiny_model,
    tiny_photograph,
    tiny_projector,
    tiny_tokenizer,
)
from vlm.training_models import write_captions

from visproj.errors import InputError
from visproj.vlm import answering, trained
from visproj.vlm.answering import FIELDS, AnswerOptions, run_answer
from visproj.vlm.samples import Columns

LONGEST = 8


@pytest.fixture(autouse=True)
def models(monkeypatch):
    monkeypatch.setattr(trained, "load_encoder", lambda name: TinyEncoder())
    models = "tiny-llama", tiny_language_model(), tiny_tokenizer()
    monkeypatch.setattr(trained, "load_language_model", lambda name: models)


@pytest.fixture
def work(tmp_path):
    """A projector, three photographs and questions about them."""
    tiny_projector().save_pretrained(tmp_path / "projector")
    for number in range(3):
        tiny_photograph(number).save(tmp_path / f"{number}.png")
    return tmp_path


ROWS = [
    {"id": "a", "image": "0.png", "question": "what is red?", "answer": "a dog"},
    {"id": 7, "image": ["1.png", "2.png"], "question": "first <image>, second <image>: a cat?"},
    {"image": "0.png"},
    {"question": "what is a dog?", "answers": ["red", "a cat"]},
    {
        "image": "2.png",
        "conversations": [
            {"from": "human", "value": "<image>\nwhat is it?"},
            {"from": "gpt", "value": "a red cat"},
            {"from": "human", "value": "and the dog?"},
            {"from": "gpt", "value": "at a dog"},
        ],
    },
]


def write(work, rows=ROWS):
    (work / "questions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return work / "questions.jsonl"


def options(work, name="answers.jsonl", **changes):
    chosen = {"batch": 3, "max_new_tokens": LONGEST, "prompt": PROMPT}
    data = str(work / "questions.jsonl")
    return AnswerOptions(work / "projector", data, work / name, **{**chosen, **changes})


def read(work, name="answers.jsonl"):
    return [json.loads(line) for line in (work / name).read_text().splitlines()]


def alone(images, questions, answers=()):
    """The answer of a model that is asked nothing else, its tokens put together by hand."""
    model = tiny_model().eval()
    before = model._prompts.question_ids(questions, list(answers), len(images))
    ids = [
        token
        for row, answer in zip(before, answers, strict=False)
        for token in row + model.answer_ids(answer)
    ]
    ids += before[-1]
    features = model.features([tiny_photograph(number) for number in images])
    chosen = {"max_new_tokens": LONGEST, "do_sample": False}
    return model.generate_after(features, [ids], [len(images)], **chosen)[0].strip()


def test_every_row_is_answered_as_if_it_were_alone(work):
    write(work)
    report = run_answer(options(work))
    assert report == (5, 5, 0)
    rows = read(work)
    assert [list(row) for row in rows] == [list(FIELDS)] * 5
    assert [row["index"] for row in rows] == list(range(5))
    assert [row["id"] for row in rows] == ["a", 7, None, None, None]
    assert [row["question"] for row in rows] == [
        "what is red?",
        "first <image>, second <image>: a cat?",
        PROMPT,
        "what is a dog?",
        "and the dog?",
    ]
    assert [row["reference"] for row in rows] == [
        ["a dog"],
        None,
        None,
        ["red", "a cat"],
        ["at a dog"],
    ]
    assert [row["answer"] for row in rows] == [
        alone([0], ["what is red?"]),
        alone([1, 2], ["first <image>, second <image>: a cat?"]),
        alone([0], [PROMPT]),
        alone([], ["what is a dog?"]),
        alone([2], ["<image>\nwhat is it?", "and the dog?"], ["a red cat"]),
    ]
    assert len({row["answer"] for row in rows}) > 2


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_the_batch_changes_nothing(work, batch):
    write(work)
    run_answer(options(work))
    run_answer(options(work, "other.jsonl", batch=batch))
    assert read(work, "other.jsonl") == read(work)


def test_csv(work):
    write(work)
    run_answer(options(work))
    run_answer(options(work, "answers.csv"))
    with (work / "answers.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    for row, want in zip(rows, read(work), strict=True):
        assert row["answer"] == want["answer"]
        assert row["question"] == want["question"]
        assert (json.loads(row["reference"]) if row["reference"] else None) == want["reference"]


def as_csv(row):
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerow(row)
    return text.getvalue().encode()


@pytest.mark.parametrize("name", ["answers.jsonl", "answers.csv"])
@pytest.mark.parametrize("kept", [0, 1, 3, 5])
@pytest.mark.parametrize("cut", [False, True])
def test_a_run_that_was_stopped_goes_on(work, name, kept, cut):
    write(work)
    run_answer(options(work, name))
    whole = (work / name).read_bytes()
    rows, rest = whole.splitlines(keepends=True), b'{"index": 4, "ques'
    if name.endswith(".csv"):  # a text may have line ends, also where it is cut
        table = csv.reader(io.StringIO(whole.decode(), newline=""))
        rows, rest = [as_csv(row) for row in table], b'4,,"two\nlines'
        rows[:2] = [rows[0] + rows[1]]
    (work / name).write_bytes(b"".join(rows[:kept]) + (rest if cut else b""))
    report = run_answer(options(work, name))
    assert (work / name).read_bytes() == whole
    assert report == (5, 5 - kept, 0)


def test_stopped_between_batches(work, monkeypatch):
    write(work)
    run_answer(options(work, "whole.jsonl", batch=2))
    answered, calls = answering._answered, []

    def stopping(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return answered(*arguments)

    with monkeypatch.context() as patches:
        patches.setattr(answering, "_answered", stopping)
        with pytest.raises(KeyboardInterrupt):
            run_answer(options(work, batch=2))
    assert len(read(work)) == 2
    run_answer(options(work, batch=2))
    assert read(work) == read(work, "whole.jsonl")


def test_rows_without_an_answer_say_why(work):
    (work / "2.png").write_bytes(b"not an image")
    lines = [
        json.dumps({"image": "missing.png", "question": "what?"}),
        "{",
        json.dumps({"image": "2.png", "question": "what?"}),
        json.dumps({"image": "0.png", "question": "<image> <image>"}),
        json.dumps({"question": "c" * 1200}),
        json.dumps({"name": "x"}),
        json.dumps(ROWS[0]),
    ]
    (work / "questions.jsonl").write_text("\n".join(lines))
    report = run_answer(options(work))
    assert report == (7, 7, 6)
    rows = read(work)
    reasons = [
        "no such image",
        "not JSON",
        "as an image",
        "2 <image> placeholders in the text of 1 images",
        "do not fit",
        "the row has no column with texts: it has name",
    ]
    for row, reason in zip(rows, reasons, strict=False):
        assert row["answer"] is None
        assert reason in row["error"]
    assert rows[6]["error"] is None
    assert rows[6]["answer"] == alone([0], ["what is red?"])


def test_the_file_of_other_data(work):
    write(work)
    run_answer(options(work))
    write(work, ROWS[:2])
    with pytest.raises(InputError, match="has more answers than"):
        run_answer(options(work))
    write(work, [*ROWS[:4], ROWS[0], ROWS[1]])
    with pytest.raises(InputError, match=r"answers other questions than .* asks"):
        run_answer(options(work))


@pytest.mark.parametrize("content", ["text\n", '{"index": 0}\n', "[1]\n", '{"index": 3}\n'])
def test_a_file_that_holds_something_else(work, content):
    write(work)
    (work / "answers.jsonl").write_text(content)
    with pytest.raises(InputError, match="does not hold answers"):
        run_answer(options(work))
    assert (work / "answers.jsonl").read_text() == content


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "answers.txt"}, r"must be a \.jsonl or \.csv file, got answers\.txt"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
    ],
)
def test_options_are_checked(work, changes, message):
    with pytest.raises(InputError, match=message):
        options(work, **changes)


def test_no_rows(work):
    write(work, [])
    with pytest.raises(InputError, match="has no rows"):
        run_answer(options(work))


def test_columns_of_other_names_and_captions(work):
    write(work, [{"picture": "0.png", "ask": "what is red?"}])
    run_answer(options(work, columns=Columns(image="picture", question="ask")))
    assert read(work)[0]["answer"] == alone([0], ["what is red?"])
    data = write_captions(work / "captions", 2)
    run_answer(options(work, "captions.jsonl", prompt=None))
    run = AnswerOptions(work / "projector", str(data), work / "captioned.jsonl", max_new_tokens=2)
    run_answer(run)
    rows = read(work, "captioned.jsonl")
    assert [row["question"] for row in rows] == [PROMPT] * 2
    assert rows[0]["reference"] == ["a cat", "a red cat"]
