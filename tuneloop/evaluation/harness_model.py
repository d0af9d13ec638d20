"""The model of lm-evaluation-harness on a rollout engine: what is measured is what the engine samples from."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs

from tuneloop.progress import Progress
from tuneloop.rollout.engine import RolloutEngine, SampleStream
from tuneloop.settings import SamplingSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GREEDY = SamplingSettings(temperature=0.0)
HARNESS_ROUND = 2**31 + 1  # of the sample stream; beside EVALUATION_ROUND, and no update reaches it
DEFAULT_NEW_TOKENS = 256  # lm-eval's own, for tasks that name no limit
FIRST_PIECE = 32  # tokens; pieces double, so at most about twice what a stop string leaves is generated

Pair = tuple[list[int], list[int]]


class EngineLM(TemplateLM):
    """Scores and completes text by the weights that the engine holds.

    Args:
        max_length: prompts are cut at the left so that prompt and continuation have at most so many tokens.
        batch_tokens: tokens of one forward pass when texts are scored.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        max_length: int,
        batch_tokens: int,
        seed: int,
        label: str,
    ):
        super().__init__()
        self.engine, self.label = engine, label
        self.tokenizer = tokenizer  # type: ignore[assignment]  # lm-eval reads it, and declares it as None
        self._tokenizer: Any = tokenizer  # transformers types what its methods return by every option they have
        self.max_length, self.batch_tokens, self.seed = max_length, batch_tokens, seed

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self._tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        bos = self._tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """Part of the key under which lm-eval may cache prompts."""
        return self._tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The messages as one text."""
        return self._tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; a begin token that the text has already is not put before it again."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self._tokenizer.decode(self.prefix_token_id))
        return self._tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """See `LM.loglikelihood`; progress is shown by ours."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [self._cut(context, continuation) for _, context, continuation in requests]
        totals = self._totals(pairs)
        greedy = self._greedy(pairs)
        return list(zip(totals, greedy, strict=True))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-prob (nats) of each whole text, every token once, in windows as long as the model sees."""
        pairs: list[Pair] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(utils.make_disjoint_window, windows):
                pairs.append((context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, total in zip(owners, self._totals(pairs), strict=True):
            totals[number] += total
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Completions up to a task's stop strings, in doubling pieces: engines know end tokens only."""
        answers: dict[int, str] = {}
        with Progress(self.label, len(requests)) as progress:
            for kwargs, numbers in self._by_kwargs(requests).values():
                for number, text in self._generate(requests, numbers, kwargs):
                    answers[number] = text
                    progress.advance()
        return [answers[number] for number in range(len(requests))]

    @staticmethod
    def _by_kwargs(requests: Sequence[Instance]) -> dict[str, tuple[dict[str, Any], list[int]]]:
        together: dict[str, tuple[dict[str, Any], list[int]]] = {}
        for number, request in enumerate(requests):
            arguments: tuple[Any, ...] = request.args
            kwargs = arguments[1]
            together.setdefault(repr(sorted(kwargs.items())), (kwargs, []))[1].append(number)
        return together

    def _generate(self, requests: Sequence[Instance], numbers: list[int], given: dict[str, Any]):
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(given, DEFAULT_NEW_TOKENS))
        limit = min(kwargs["max_gen_toks"], self.max_length - 1)
        stops = [stop for stop in kwargs.get("until") or [] if stop]
        sampling = SamplingSettings(
            temperature=float(kwargs.get("temperature") or 0.0),
            top_p=float(kwargs.get("top_p") or 1.0),
            top_k=max(0, int(kwargs.get("top_k") or 0)),
        )
        prompts = {n: self.tok_encode(requests[n].args[0])[-(self.max_length - limit) :] for n in numbers}
        made: dict[int, list[int]] = {n: [] for n in numbers}
        waiting, piece, number_of_piece = list(numbers), FIRST_PIECE, 0
        while waiting:
            wanted = min(piece, limit - len(made[waiting[0]]))  # all that wait have equally many
            stream = SampleStream(self.seed, HARNESS_ROUND + number_of_piece, waiting)
            sampled = self.engine.generate(
                [prompts[n] + made[n] for n in waiting],
                samples=1,
                sampling=sampling,
                max_new_tokens=wanted,
                stream=stream,
            )
            still = []
            for n, (completion,) in zip(waiting, sampled, strict=True):
                made[n] += completion.token_ids
                text = self._tokenizer.decode(made[n], skip_special_tokens=True)
                if completion.finished or len(made[n]) >= limit or any(stop in text for stop in stops):
                    yield n, cut_at(text, stops)
                else:
                    still.append(n)
            waiting, piece, number_of_piece = still, 2 * piece, number_of_piece + 1

    def _cut(self, context: list[int], continuation: list[int]) -> Pair:
        """The last `max_length` tokens and one that is only predicted; at least one token stays context."""
        whole = (context + continuation)[-(self.max_length + 1) :]
        start = max(1, len(whole) - len(continuation))
        return whole[:start], whole[start:]

    def _totals(self, pairs: Sequence[Pair]) -> list[float]:
        """Summed log-probs (nats) of the continuations, in batches of texts about as long as each other."""
        order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
        totals = [0.0] * len(pairs)
        with Progress(self.label, len(pairs)) as progress:
            while order:
                count, tokens = 1, sum(map(len, pairs[order[0]]))
                while count < len(order) and tokens + sum(map(len, pairs[order[count]])) <= self.batch_tokens:
                    tokens += sum(map(len, pairs[order[count]]))
                    count += 1
                batch, order = order[:count], order[count:]
                for i, logprobs in zip(batch, self.engine.logprobs([pairs[i] for i in batch]), strict=True):
                    totals[i] = math.fsum(logprobs)
                progress.advance(count)
        return totals

    def _greedy(self, pairs: Sequence[Pair]) -> list[bool]:
        """Whether each continuation is what the model would say; one generation a context, whatever its choices."""
        lengths: dict[tuple[int, ...], int] = {}
        for context, continuation in pairs:
            key = tuple(context)
            lengths[key] = max(lengths.get(key, 0), len(continuation))
        said: dict[tuple[int, ...], list[int]] = {}
        for bucket in sorted({length.bit_length() for length in lengths.values()}):
            contexts = [context for context, length in lengths.items() if length.bit_length() == bucket]
            stream = SampleStream(self.seed, HARNESS_ROUND)
            longest = max(lengths[context] for context in contexts)
            sampled = self.engine.generate(
                [list(context) for context in contexts],
                samples=1,
                sampling=GREEDY,
                max_new_tokens=longest,
                stream=stream,
            )
            said |= {context: group[0].token_ids for context, group in zip(contexts, sampled, strict=True)}
        return [said[tuple(context)][: len(continuation)] == continuation for context, continuation in pairs]


def cut_at(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop string in it."""
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]
