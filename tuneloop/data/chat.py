"""Messages to tokens: the one place where prompts and completions are rendered.

A prompt is the chat template with its generation prompt; a completion is its text and one end-of-turn token. The two
are tokenised separately and concatenated, so that the boundary is the same when training, sampling and scoring.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from tuneloop.data.schema import Message
from tuneloop.errors import UserError

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerBase

_PROBE = "tuneloop-probe"


def require_chat_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Refuse a tokenizer that cannot render a conversation.

    Raises:
        UserError: no chat template, or no token that ends a turn.
    """
    name = tokenizer.name_or_path or "the tokenizer"
    if not tokenizer.chat_template:
        raise UserError(f"{name}: the tokenizer has no chat template; use an instruct model or add chat_template.jinja")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{name}: the tokenizer has no eos_token, so no completion could ever end; set one")


def end_of_turn_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The token that ends a completion: what the chat template writes behind an assistant message, else EOS.

    Base models often declare a document-level EOS while their template closes a turn with another token.
    """
    conversation = [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": _PROBE}]
    behind = str(tokenizer.apply_chat_template(conversation, tokenize=False)).rpartition(_PROBE)[2].lstrip()
    special = {token.content: index for index, token in _added_tokens(tokenizer).items() if token.special}
    closing = [text for text in special if behind.startswith(text)]
    return special[max(closing, key=len)] if closing else cast(int, tokenizer.eos_token_id)


def _added_tokens(tokenizer: "PreTrainedTokenizerBase") -> "dict[int, AddedToken]":
    return cast(Any, tokenizer).added_tokens_decoder  # declared on the concrete classes only


def prompt_text(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]) -> str:
    """The chat template's text of a prompt, generation prompt included.

    Raises:
        UserError: the template refuses these messages (a role it does not know, an order it does not allow).
    """
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False))
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(f"the chat template refuses a conversation of roles [{roles}]: {error}") from None


def render_prompt(tokenizer: "PreTrainedTokenizerBase", messages: Sequence[Message]) -> list[int]:
    """Token ids of a prompt: the chat template with its generation prompt.

    Raises:
        UserError: as in `prompt_text`.
    """
    return render_prompts(tokenizer, [messages])[0]


def render_prompts(tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[Sequence[Message]]) -> list[list[int]]:
    """`render_prompt` of many prompts; a fast tokenizer uses every core.

    Raises:
        UserError: as in `prompt_text`.
    """
    return _encode(tokenizer, [prompt_text(tokenizer, messages) for messages in prompts])


def render_completion(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Token ids of a completion, the end-of-turn token last."""
    return render_completions(tokenizer, [text])[0]


def render_completions(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    """`render_completion` of many texts; a fast tokenizer uses every core."""
    end = end_of_turn_id(tokenizer)
    return [[*ids, end] for ids in _encode(tokenizer, texts)]


def _encode(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)
    return cast(list[list[int]], encoded["input_ids"])
