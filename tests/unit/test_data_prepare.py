"""The whole stream on real files: every row accounted for, and nothing left behind on an error."""

import json
import random

import pytest
from transformers import PreTrainedTokenizerFast

from tuneloop.data.card import DataCard, length_statistics
from tuneloop.data.chat import render_completion, render_prompt
from tuneloop.data.columns import ColumnParser
from tuneloop.data.prepare import NearDuplicateRule, PrepareSettings, prepare
from tuneloop.data.reader import read_examples
from tuneloop.data.record import Row
from tuneloop.data.schema import SPLITS
from tuneloop.data.sources import JsonlSource
from tuneloop.errors import UserError
from tuneloop.models.tiny import CHAT_TEMPLATE, byte_tokenizer

FILES = {"train.parquet", "validation.parquet", "test.parquet", "quarantine.jsonl", "data_card.json"}


@pytest.fixture(scope="module")
def tokenizer():
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(), eos_token="<|im_end|>", chat_template=CHAT_TEMPLATE
    )


def settings(**changes) -> PrepareSettings:
    defaults = {
        "test_share": 0.1,
        "validation_share": 0.05,
        "max_prompt_tokens": 200,
        "max_completion_tokens": 50,
        "quarantine_share": 0.0,
        "batch_rows": 64,
    }
    return PrepareSettings(**{**defaults, **changes})


def row(prompt: object, answer: object = "1") -> str:
    return json.dumps({"prompt": prompt, "answer": answer})


def good_rows(count: int) -> list[str]:
    return [row(f"What is {number} + {number}?", str(2 * number)) for number in range(count)]


def run(tokenizer, folder, lines, name="out", **changes):
    """Prepare one JSON Lines file; returns the card (as JSON) and the rows of the splits."""
    path, output = folder / f"{name}.jsonl", folder / name
    path.write_text("".join(f"{line}\n" for line in lines))
    output.mkdir()
    try:
        prepare([JsonlSource(str(path), ColumnParser())], tokenizer, settings(**changes), output)
    except BaseException:
        assert not list(output.iterdir())
        raise
    assert {file.name for file in output.iterdir()} == FILES
    card = json.loads((output / "data_card.json").read_text())
    splits = {split: _read(output / f"{split}.parquet") for split in SPLITS}
    rows = card["rows"]
    assert rows["read"] == rows["kept"] + rows["quarantined"] + sum(rows["dropped"].values())
    assert card["splits"] == {split: len(examples) for split, examples in splits.items()}
    assert sum(source["kept"] for source in card["sources"]) == rows["kept"]
    return card, splits


def _read(path):
    try:
        return read_examples(path)
    except UserError:
        return []


def refusal(tokenizer, folder, lines, **changes) -> str:
    with pytest.raises(UserError) as caught:
        run(tokenizer, folder, lines, **changes)
    return str(caught.value)


def test_every_row_is_accounted_for_by_its_reason(tokenizer, tmp_path):
    lines = good_rows(300)
    lines += [row("What is  1 + 1?"), row("What is 2 + 2?", "other answer")]  # equal to kept prompts
    lines += [row("x" * 300), row("a" * 190, "1"), row("long answer", "y" * 50)]
    lines += ['{"prompt": ', row("no answer", None), row(" "), row("broken \ud800"), row("fine", "\udfff")]
    card, splits = run(tokenizer, tmp_path, lines, quarantine_share=0.5)
    assert card["rows"] == {
        "read": 310,
        "kept": 300,
        "quarantined": 5,
        "dropped": {
            "exact_duplicate": 2,
            "near_duplicate": 0,
            "contaminated": 0,
            "prompt_too_long": 2,
            "completion_too_long": 1,
        },
    }
    quarantine = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert [entry["line"] for entry in quarantine] == [306, 307, 308, 309, 310]
    for entry, reason in zip(quarantine, ["malformed", "missing", "empty", "surrogate", "surrogate"], strict=True):
        assert reason in entry["reason"]
        assert entry["source"] == f"jsonl:{tmp_path / 'out.jsonl'}"
    assert quarantine[0]["text"].strip() == '{"prompt":'
    kept = [example for examples in splits.values() for example in examples]
    assert sorted(example.answer for example in kept) == sorted(str(2 * number) for number in range(300))
    for example in kept[:20]:
        assert example.prompt_tokens == len(render_prompt(tokenizer, example.messages))
        assert example.completion_tokens == len(render_completion(tokenizer, example.completion))


def test_quarantined_text_is_cut(tokenizer, tmp_path):
    run(tokenizer, tmp_path, [*good_rows(9), row("x" * 900, None)], quarantine_share=0.1)
    entry = json.loads((tmp_path / "out" / "quarantine.jsonl").read_text())
    assert len(entry["text"]) == 500


def test_rows_keep_the_order_in_which_they_were_read(tokenizer, tmp_path):
    _, splits = run(tokenizer, tmp_path, good_rows(500))
    for examples in splits.values():
        numbers = [int(example.answer) for example in examples]
        assert numbers == sorted(numbers)


def test_batches_change_nothing(tokenizer, tmp_path):
    rng = random.Random(0)
    words = [f"w{number}" for number in range(50)]
    lines = [row(" ".join(rng.choice(words) for _ in range(3)), "1") for _ in range(3_000)]
    near = NearDuplicateRule(threshold=0.8, ngram=2, permutations=32)
    whole = run(tokenizer, tmp_path, lines, "a", near_duplicates=near, batch_rows=5_000)
    parts = run(tokenizer, tmp_path, lines, "b", near_duplicates=near, batch_rows=37)
    for card in (whole[0], parts[0]):
        card.pop("sources")
    assert whole[0] == parts[0]
    assert whole[0]["rows"]["dropped"]["exact_duplicate"] > 0
    assert [[e.id for e in s] for s in whole[1].values()] == [[e.id for e in s] for s in parts[1].values()]


def test_adding_data_moves_no_row(tokenizer, tmp_path):
    _, before = run(tokenizer, tmp_path, good_rows(400), "before")
    shuffled = good_rows(2_000)
    random.Random(1).shuffle(shuffled)
    _, after = run(tokenizer, tmp_path, shuffled, "after")
    for split in SPLITS:
        assert {example.id for example in before[split]} <= {example.id for example in after[split]}
    assert len(before["test"]) > 0


def test_no_evaluation_prompt_is_in_training_however_it_is_spelled(tokenizer, tmp_path):
    def strong(example):
        return "".join(char for char in example.messages[-1]["content"].casefold() if char.isalnum())

    lines = []
    for number in range(400):
        lines += [row(f"What is {number} + 1?"), row(f"WHAT is {number}+1"), row(f"what is: {number} + 1 …")]
    card, splits = run(tokenizer, tmp_path, lines)
    assert card["rows"]["kept"] == 1_200
    train = {strong(example) for example in splits["train"]}
    evaluation = {strong(example) for split in ("validation", "test") for example in splits[split]}
    assert len(train) + len(evaluation) == 400
    assert not train & evaluation
    kept_out = len(splits["validation"]) + len(splits["test"])
    assert card["contamination"] == {
        "training_rows": len(splits["train"]),
        "evaluation_rows": kept_out,
        "overlapping": 0,
    }


def test_near_duplicates_leave_one(tokenizer, tmp_path):
    words = [" ".join(f"w{number}x{place}" for place in range(20)) for number in range(100)]
    lines = [row(text) for text in words] + [row(f"{text} more") for text in words]
    card, _ = run(
        tokenizer,
        tmp_path,
        lines,
        max_prompt_tokens=400,
        near_duplicates=NearDuplicateRule(threshold=0.8, ngram=3, permutations=128),
    )
    assert card["rows"]["dropped"]["near_duplicate"] == 100  # 18 of 19 shingles in common


def test_the_fingerprint_follows_the_kept_rows(tokenizer, tmp_path):
    rows = good_rows(50)
    base, _ = run(tokenizer, tmp_path, rows, "base")
    again, _ = run(tokenizer, tmp_path, [*rows, rows[7]], "again")
    assert again["fingerprint"] == base["fingerprint"]
    for name, changed in {
        "answer": [*rows[:-1], row("What is 49 + 49?", "99")],
        "prompt": [*rows[:-1], row("What is 50 + 48?", "98")],
        "fewer": rows[:-1],
    }.items():
        assert run(tokenizer, tmp_path, changed, name)[0]["fingerprint"] != base["fingerprint"]
    moved, _ = run(tokenizer, tmp_path, rows, "moved", test_share=0.5)
    assert moved["fingerprint"] != base["fingerprint"]


@pytest.mark.parametrize("changed", [{"answer": "3"}, {"completion": "it is 3"}])
def test_the_fingerprint_sees_answer_and_completion_apart(changed):
    def fingerprint(**fields):
        card = DataCard()
        card.keep("train", "0" * 32, Row(("user",), ("1 + 1",), **{"answer": "2", "completion": "it is 2", **fields}))
        card.prompt_tokens[1] = card.completion_tokens[1] = 1
        return json.loads(card.as_json())["fingerprint"]

    assert fingerprint(**changed) != fingerprint()


def test_the_card_describes_the_kept_rows(tokenizer, tmp_path):
    card, splits = run(tokenizer, tmp_path, [*good_rows(100), row("z" * 190)])
    lengths = sorted(example.prompt_tokens for examples in splits.values() for example in examples)
    assert card["lengths"]["prompt_tokens"] == {
        "min": lengths[0],
        "p50": lengths[49],
        "p95": lengths[94],
        "max": lengths[-1],
        "mean": round(sum(lengths) / 100, 3),
    }
    assert card["examples"][0] == {"messages": splits["train"][0].messages, "answer": splits["train"][0].answer}


def test_length_statistics_by_hand():
    from collections import Counter

    # 1 1 1 5 9: rank 2.5 is the third, rank 4.75 the fifth
    assert length_statistics(Counter([1, 1, 1, 5, 9])) == {"min": 1, "p50": 1, "p95": 9, "max": 9, "mean": 3.4}


def test_too_many_bad_rows_name_the_first(tokenizer, tmp_path):
    lines = [*good_rows(98), "{", row("x", None)]
    text = refusal(tokenizer, tmp_path, lines, quarantine_share=0.01)
    assert "line 99: malformed JSON" in text
    assert "2 of 100 rows are bad" in text
    run(tokenizer, tmp_path, lines, "allowed", quarantine_share=0.02)


def test_a_prompt_that_the_chat_template_refuses_is_a_bad_row(tmp_path):
    picky = PreTrainedTokenizerFast(
        tokenizer_object=byte_tokenizer(),
        eos_token="<|im_end|>",
        chat_template="{% if 'bad' in messages[0].content %}{{ raise_exception('no bad words') }}{% endif %}"
        + CHAT_TEMPLATE,
    )
    text = refusal(picky, tmp_path, [row(f"good {n}") for n in range(10)] + [row("bad "), row("<bad>")])
    assert "line 11: the chat template refuses" in text
    assert "no bad words" in text


def test_refusals_leave_nothing_behind(tokenizer, tmp_path):
    def of(name, lines, **changes):
        folder = tmp_path / name
        folder.mkdir()
        return refusal(tokenizer, folder, lines, **changes)

    assert "every prompt is longer than data_prep.max_prompt_tokens = 20; the shortest has 29 tokens" in of(
        "long", [row("x" * 50), row("x" * 10), row("x" * 90)], max_prompt_tokens=20
    )
    text = of("filtered", [row("x" * 500), row("y", "z" * 500)])
    assert "no row is left of 2 read: prompt_too_long 1, completion_too_long 1" in text
    assert "none is left to train on" in of("untrained", good_rows(1), test_share=0.9999)
    columns = of("columns", [json.dumps({"question": "x", "answer": "1"})] * 3)
    assert 'has no column \'prompt\', only "question", "answer"; set prompt_column' in columns
    assert "1 of 1 rows are bad" in of("bad", ["not json"])


def test_a_tokenizer_without_chat_template_is_refused(tmp_path):
    bare = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), eos_token="<|im_end|>")
    assert "no chat template" in refusal(bare, tmp_path, good_rows(5))


def test_an_interruption_leaves_nothing_behind(tokenizer, tmp_path):
    class Interrupted(JsonlSource):
        def records(self):
            for number, record in enumerate(super().records()):
                if number == 500:
                    raise KeyboardInterrupt
                yield record

    path, output = tmp_path / "rows.jsonl", tmp_path / "out"
    path.write_text("\n".join(good_rows(1_000)))
    output.mkdir()
    with pytest.raises(KeyboardInterrupt):
        prepare([Interrupted(str(path), ColumnParser())], tokenizer, settings(), output)
    assert not list(output.iterdir())


def test_equal_prompts_of_two_sources_stay_in_the_first(tokenizer, tmp_path):
    for name, count in (("one", 40), ("two", 100)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(good_rows(count)))
    (tmp_path / "out").mkdir()
    sources = [JsonlSource(str(tmp_path / f"{name}.jsonl"), ColumnParser()) for name in ("one", "two")]
    card = prepare(sources, tokenizer, settings(), tmp_path / "out")
    assert [(tally.read, tally.kept) for tally in card.sources] == [(40, 40), (100, 60)]
    assert card.dropped["exact_duplicate"] == 40
