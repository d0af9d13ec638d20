"""Rendering prompts and completions with a real tokenizer."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tuneloop.data.chat import (
    end_of_turn_id,
    prompt_text,
    render_completion,
    render_completions,
    render_prompt,
    render_prompts,
    require_chat_template,
)
from tuneloop.data.prompt_template import PromptTemplate
from tuneloop.data.tokens import TokenCounter, load_tokenizer
from tuneloop.errors import UserError
from tuneloop.models.tiny import CHAT_TEMPLATE, byte_tokenizer

USER = {"role": "user", "content": "2 + 2 ="}


def tokenizer(template: str | None = CHAT_TEMPLATE, eos: str | None = "<|im_end|>") -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), eos_token=eos, chat_template=template)


def test_a_prompt_ends_where_the_assistant_begins_and_a_completion_with_the_end_token():
    made = tokenizer()
    prompt = made.decode(render_prompt(made, [{"role": "system", "content": "Add."}, USER]))
    assert prompt == (
        "<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n2 + 2 =<|im_end|>\n<|im_start|>assistant\n"
    )
    assert made.convert_ids_to_tokens(render_completion(made, "4 ")) == ["4", "Ġ", "<|im_end|>"]


def test_batches_equal_single_calls():
    made = tokenizer()
    prompts = [[USER], [{"role": "user", "content": "é"}]]
    assert render_prompts(made, prompts) == [render_prompt(made, messages) for messages in prompts]
    assert render_completions(made, ["1", ""]) == [render_completion(made, "1"), [made.eos_token_id]]
    assert render_prompts(made, []) == []


def test_the_end_token_is_the_one_that_the_template_writes():
    # A base model whose EOS ends documents, with a template that closes turns with another token.
    assert end_of_turn_id(tokenizer(eos="<|endoftext|>")) == byte_tokenizer().token_to_id("<|im_end|>")
    plain = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    assert end_of_turn_id(tokenizer(plain, "<|endoftext|>")) == byte_tokenizer().token_to_id("<|endoftext|>")


def test_tokenizers_that_cannot_hold_a_conversation_are_refused(tmp_path):
    with pytest.raises(UserError, match="no chat template"):
        require_chat_template(tokenizer(template=None))
    with pytest.raises(UserError, match="no eos_token"):
        require_chat_template(tokenizer(eos=None))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


def test_a_conversation_that_the_template_refuses_is_the_users_mistake():
    picky = tokenizer("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}x")
    with pytest.raises(UserError, match=r"roles \[system, user\]: no system"):
        prompt_text(picky, [{"role": "system", "content": "x"}, USER])


TEMPLATES = {
    "plain": CHAT_TEMPLATE,
    "trims": CHAT_TEMPLATE.replace("message['content']", "(message['content'] | trim)"),
    "cuts reasoning": CHAT_TEMPLATE.replace("message['content']", "message['content'].split('</think>')[-1]"),
    "adds a system message": "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nHi<|im_end|>\n{% endif %}"
    + CHAT_TEMPLATE,
    "repeats the question": CHAT_TEMPLATE + "{{ messages[-1]['content'] }}",
    "counts letters": CHAT_TEMPLATE + "{{ messages[-1]['content'] | length }}",
}
MESSAGES = st.lists(
    st.tuples(
        st.sampled_from(["user", "assistant", "system", "tool"]),
        st.sampled_from(["", " x ", "a</think>b", "<|im_end|>", "{{ 1 }}", "tuneloop0slot", "line\n"])
        | st.text(max_size=9),
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("name", TEMPLATES)
def test_fast_rendering_equals_the_template(name):
    made = tokenizer(TEMPLATES[name])
    template = PromptTemplate(made)

    @settings(max_examples=60, deadline=None)
    @given(MESSAGES)
    def check(messages):
        roles, contents = zip(*messages, strict=True)
        expected = prompt_text(made, [{"role": role, "content": text} for role, text in messages])
        assert template.render(roles, contents) == expected

    check()
    for number in range(200):  # more of one shape than are verified by the template itself
        text = f"What is {number} + {number}?"
        expected = prompt_text(made, [{"role": "system", "content": " s "}, {"role": "user", "content": text}])
        assert template.render(("system", "user"), (" s ", text)) == expected
    for text in ("  padded\n", "<think>so</think>4", "tuneloop1slot"):
        expected = prompt_text(made, [{"role": "system", "content": " s "}, {"role": "user", "content": text}])
        assert template.render(("system", "user"), (" s ", text)) == expected


def test_fast_rendering_skips_the_template():
    made = tokenizer()
    template = PromptTemplate(made)
    for number in range(100):
        template.render(("user",), (f"question {number}",))
    made.chat_template = "changed"
    assert "question" in template.render(("user",), ("question",))


def test_counts_equal_the_tokens_of_the_rendered_text():
    made = tokenizer()
    texts = [f"{'é' * (number % 7)} {number} <|im_end|>" for number in range(2_500)]  # several chunks
    with TokenCounter(made) as counter:
        counts = counter.submit(texts).result()
    assert counts.tolist() == [len(ids) for ids in made(texts, add_special_tokens=False)["input_ids"]]


def test_the_tokenizer_loads_without_torch(tmp_path):
    tokenizer().save_pretrained(tmp_path)
    code = (
        "import sys; from pathlib import Path; from tuneloop.data.tokens import load_tokenizer; "
        "import tuneloop.data.prepare; "
        f"assert load_tokenizer(Path({str(tmp_path)!r})).chat_template; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
