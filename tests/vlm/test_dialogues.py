"""Questions and answers of several turns as tokens: those of the chat template, and no others."""

import pytest
from vlm.tiny import END, TEMPLATE, tiny_language_model, tiny_tokenizer

from visproj.errors import InputError
from visproj.vlm.compose import IGNORE_INDEX
from visproj.vlm.prompts import PromptTokenizer

QUESTIONS = ["<image>\nwhat is it?", "and the dog?", "why"]
ANSWERS = [["a red cat"], ["at a dog"], ["og"]]
# Line ends after each turn; the words of a system before the first; an instruct form in one line.
TEMPLATES = {
    "tiny": TEMPLATE,
    "lines": "{% for t in messages %}<|{{ t.role }}|>\n{{ t.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "system": "<|user|>be a dog<|end|>" + TEMPLATE,
    "one line": "{% for t in messages %}{% if t.role == 'user' %}[red] {{ t.content }} [dog] "
    "{% else %}{{ t.content }} <|end|>{% endif %}{% endfor %}",
    "trimmed": TEMPLATE.replace("turn['content']", "turn['content'] | trim"),
}


def prompts(template):
    return PromptTokenizer(tiny_tokenizer(template), tiny_language_model())


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_tokens_are_those_of_the_template(name):
    tokenizer = prompts(TEMPLATES[name])
    dialogue = tokenizer.dialogue(QUESTIONS, ANSWERS)
    messages = []
    for question, (answer,) in zip(QUESTIONS, ANSWERS, strict=True):
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    text = tokenizer.tokenizer.apply_chat_template(messages, tokenize=False)
    # White space before the end of an answer, and after the last one, is the template's alone.
    want = text.rstrip().replace(f" {END}", END)
    assert tokenizer.tokenizer.decode(dialogue.ids).rstrip() == want


@pytest.mark.parametrize("template", [None, *TEMPLATES.values()])
def test_labels_are_the_answers_and_their_ends(template):
    tokenizer = prompts(template)
    dialogue = tokenizer.dialogue(QUESTIONS, ANSWERS)
    assert set(dialogue.branches) == {1}
    found, current = [], []
    for token, label in zip(dialogue.ids, dialogue.labels, strict=True):
        assert label in (token, IGNORE_INDEX)
        if label == IGNORE_INDEX and current:
            found.append(current)
            current = []
        elif label != IGNORE_INDEX:
            current.append(token)
    found.append(current)
    assert found == [tokenizer.answer_ids(answer) for (answer,) in ANSWERS]


@pytest.mark.parametrize("template", [None, *TEMPLATES.values()])
def test_one_turn_is_a_prompt_and_an_answer(template):
    tokenizer = prompts(template)
    dialogue = tokenizer.dialogue(["red dog"], [["a cat"]], images=2)
    assert dialogue.ids == tokenizer.prompt_ids("red dog", 2) + tokenizer.answer_ids("a cat")
    assert dialogue.ids.count(tokenizer.image_token_id) == 2


def test_alternatives_are_branches():
    tokenizer = prompts(TEMPLATE)
    texts = ["a cat", "a red cat", "dog"]
    dialogue = tokenizer.dialogue(QUESTIONS[:2], [ANSWERS[0], texts])
    shared = dialogue.branches.index(2)
    assert set(dialogue.branches[:shared]) == {1}
    rest = zip(dialogue.branches[shared:], dialogue.ids[shared:], strict=True)
    rows = {branch: [] for branch in (2, 3, 4)}
    for branch, token in rest:
        rows[branch].append(token)
    assert list(rows.values()) == [tokenizer.answer_ids(text) for text in texts]
    assert dialogue.labels[shared:] == dialogue.ids[shared:]


def test_without_a_template_the_beginning_comes_once():
    tokenizer = tiny_tokenizer(None)
    tokenizer.add_special_tokens({"bos_token": "<|user|>"})
    from tokenizers import processors

    named = [("<|user|>", tokenizer.convert_tokens_to_ids("<|user|>"))]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|user|> $A", special_tokens=named
    )
    dialogue = PromptTokenizer(tokenizer, tiny_language_model()).dialogue(QUESTIONS, ANSWERS)
    assert dialogue.ids[0] == tokenizer.bos_token_id
    assert dialogue.ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(dialogue.ids) == (
        f"<|user|><image>\nwhat is it?\na red cat{END}and the dog?\nat a dog{END}why\nog{END}"
    )


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[-1]['content'] }}<|assistant|>",  # forgets
        "{% for t in messages %}{% if t.role == 'user' %}{{ t.content }}:{% endif %}{% endfor %}",
    ],
)
def test_templates_that_change_earlier_turns(template):
    tokenizer = prompts(template)
    tokenizer.dialogue(QUESTIONS[:1], ANSWERS[:1])
    with pytest.raises(InputError, match="changes earlier turns when further ones follow"):
        tokenizer.dialogue(QUESTIONS, ANSWERS)


def test_the_digest_is_of_what_decides_tokens():
    digest = prompts(TEMPLATE).digest
    assert prompts(TEMPLATE).digest == digest
    assert prompts(None).digest != digest
    other = tiny_tokenizer(TEMPLATE)
    other.eos_token = "<|user|>"
    assert PromptTokenizer(other, tiny_language_model()).digest != digest
