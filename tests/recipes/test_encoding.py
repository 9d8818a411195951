"""Rows become tokens and labels: which tokens are learned, one by one."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from hf_lora.recipes.data import Data, Files
from hf_lora.recipes.encoding import IGNORED, Encoder, RowFault
from tests.tiny_base import CHATML, tiny_tokenizer

# The same turns with the assistant's words marked, as templates made for training do it.
MARKED = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|stop|>{% endgeneration %}{% else %}"
    "{{ m.content }}<|stop|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
# No special tokens at all: a turn ends where the next begins.
BARE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
# Earlier answers are shortened, as templates of reasoning models do.
SHORTENED = (
    "{% for m in messages %}<|start|>{{ m.role }}\n"
    "{{ m.content if loop.last else m.content[:3] }}<|stop|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
CHAT = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "What is a rank? "},
    {"role": "assistant", "content": "A number.\nA small one."},
    {"role": "user", "content": "assistant"},
    {"role": "assistant", "content": "Yes: alpha ä"},
]


def data(form: str, **fields: Any) -> Data:
    return Data(form=form, train=Files(()), **fields)  # type: ignore[arg-type]


def pieces(tokenizer: PreTrainedTokenizerFast, *texts: tuple[str, bool]) -> tuple[list, list]:
    """Token ids and labels of a text given in pieces that end between tokens."""
    ids, labels = [], []
    for text, learned in texts:
        part = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids += part
        labels += part if learned else [IGNORED] * len(part)
    return ids, labels


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["plain", "marked"])
def test_a_chat_learns_the_assistants_turns_and_what_ends_them(template: str):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    expected = pieces(
        tokenizer,
        ("<|start|>system\nBe short.<|stop|>\n", False),
        ("<|start|>user\nWhat is a rank? <|stop|>\n", False),
        ("<|start|>assistant\n", False),
        ("A number.\nA small one.<|stop|>", True),
        ("\n<|start|>user\nassistant<|stop|>\n", False),
        ("<|start|>assistant\n", False),
        ("Yes: alpha ä<|stop|>", True),
    )
    encoded = Encoder(tokenizer, data("chat", loss="completions"))({"messages": CHAT})
    assert encoded.input_ids == expected[0]
    assert encoded.labels == expected[1]
    assert tokenizer.eos_token_id not in encoded.input_ids  # the template has its own mark


def test_a_chat_learns_everything_unless_asked():
    tokenizer = tiny_tokenizer()
    encoded = Encoder(tokenizer, data("chat"))({"messages": CHAT})
    assert encoded.labels == encoded.input_ids
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert tokenizer.decode(encoded.input_ids) == text.rstrip()


def test_a_template_without_marks_gets_the_end_of_text():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = BARE
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Good day"}]
    encoded = Encoder(tokenizer, data("chat", loss="completions"))({"messages": chat})
    assert tokenizer.decode(encoded.input_ids) == "user: Hi\nassistant: Good day<|end|>"
    learned = [token for token in encoded.labels if token != IGNORED]
    # the space and the word may be one token, which must be learned
    assert tokenizer.decode(learned).lstrip() == "Good day<|end|>"
    assert encoded.labels[-1] == tokenizer.eos_token_id
    first = next(i for i, label in enumerate(encoded.labels) if label != IGNORED)
    assert IGNORED not in encoded.labels[first:]


def test_a_chat_that_ends_with_the_user_is_not_ended():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = BARE
    encoded = Encoder(tokenizer, data("chat"))({"messages": CHAT[:2]})
    assert tokenizer.eos_token_id not in encoded.input_ids


def test_a_completion_is_learned_and_its_prompt_is_not(tokenizer: PreTrainedTokenizerFast):
    row = {"prompt": "Opposite of hot:", "completion": " cold"}
    ids, labels = pieces(tokenizer, (row["prompt"], False), (row["completion"], True))
    end = tokenizer.eos_token_id
    encoded = Encoder(tokenizer, data("completion", loss="completions"))(row)
    assert (encoded.input_ids, encoded.labels) == ([*ids, end], [*labels, end])
    everything = Encoder(tokenizer, data("completion"))(row)
    assert everything.labels == everything.input_ids == [*ids, end]


def test_a_tokenizer_that_ends_texts_does_not_end_the_prompt():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    end = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|start|> $A <|end|>",
        special_tokens=[
            ("<|start|>", tokenizer.convert_tokens_to_ids("<|start|>")),
            ("<|end|>", end),
        ],
    )
    encoded = Encoder(tokenizer, data("completion"))({"prompt": "a", "completion": "b"})
    assert tokenizer.decode(encoded.input_ids) == "<|start|>ab<|end|>"
    text = Encoder(tokenizer, data("text"))({"text": "a"})
    assert tokenizer.decode(text.input_ids) == "<|start|>a<|end|>"


def test_text_is_learned_with_its_end(tokenizer: PreTrainedTokenizerFast):
    encoded = Encoder(tokenizer, data("text", columns={"text": "body"}))({"body": "a rank"})
    assert tokenizer.decode(encoded.input_ids) == "a rank<|end|>"
    assert encoded.labels == encoded.input_ids


def test_columns_that_a_table_filled_with_nothing_are_not_there(
    tokenizer: PreTrainedTokenizerFast,
):
    filled = [{**message, "tool_calls": None} for message in CHAT]
    encode = Encoder(tokenizer, data("chat"))
    assert encode({"messages": filled}) == encode({"messages": CHAT})


@pytest.mark.parametrize(
    ("form", "row", "words"),
    [
        ("text", {"body": "x"}, "no column text; it has body"),
        ("text", {"text": None}, "no column text"),
        ("text", {"text": 3}, "the text is int, not text"),
        ("completion", {"prompt": "x"}, "no column completion"),
        ("completion", {"prompt": ["x"], "completion": "y"}, "the prompt is list"),
        ("chat", {"messages": "hi"}, "the messages are str, not a list"),
        ("chat", {"messages": []}, "not a list of some"),
        ("chat", {"messages": [{"content": "x"}]}, "message 1 has no role"),
        ("chat", {"messages": [{"role": "user"}]}, "message 1 has no content"),
        ("chat", {"messages": [CHAT[2]]}, "the assistant speaks first"),
    ],
)
def test_a_row_that_cannot_be_used(
    tokenizer: PreTrainedTokenizerFast, form: str, row: dict, words: str
):
    loss = "all" if form == "text" else "completions"
    with pytest.raises(RowFault, match=words):
        Encoder(tokenizer, data(form, loss=loss))(row)


def test_a_template_that_rewrites_earlier_turns_is_refused_only_for_completions():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = SHORTENED
    with pytest.raises(RowFault, match=r"depending on what follows.*generation"):
        Encoder(tokenizer, data("chat", loss="completions"))({"messages": CHAT})
    assert Encoder(tokenizer, data("chat"))({"messages": CHAT}).input_ids


def test_what_a_template_raises_is_told():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RowFault, match="refuses it: roles must alternate"):
        Encoder(tokenizer, data("chat"))({"messages": CHAT})
