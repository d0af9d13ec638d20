"""Prepared rows on disk."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tuneloop.data.reader import iter_examples, read_examples
from tuneloop.data.schema import SCHEMA, Example
from tuneloop.errors import UserError

SYSTEM = {"role": "system", "content": "Be brief."}


def rows(count: int) -> list[dict]:
    return [
        {
            "id": f"{number:032x}",
            "messages": [SYSTEM, {"role": "user", "content": f"{number} + 1 ="}][1 - number % 2 :],
            "answer": str(number + 1),
            "completion": f"It is {number + 1}",
            "reward_kind": "exact",
            "source": "jsonl:x",
            "metadata": json.dumps({"n": number}) if number % 3 else "{}",
            "prompt_tokens": number,
            "completion_tokens": 2,
        }
        for number in range(count)
    ]


def write(path, content, schema=SCHEMA):
    pq.write_table(pa.Table.from_pylist(content, schema), path)
    return path


def test_rows_come_back_as_they_were_written(tmp_path):
    path = write(tmp_path / "train.parquet", rows(10_000))
    examples = read_examples(path)
    assert len(examples) == 10_000  # more than two batches of the reader
    for number in (0, 1, 4095, 4096, 9_999):
        row = rows(number + 1)[-1]
        assert examples[number] == Example(**{**row, "metadata": json.loads(row["metadata"])})


def test_a_limit_reads_the_first_rows_only(tmp_path):
    path = write(tmp_path / "train.parquet", rows(5_000))
    for limit in (0, 1, 4_096, 4_500, 9_999):
        assert [example.prompt_tokens for example in read_examples(path, limit)] == list(range(min(limit, 5_000)))
    assert next(iter_examples(path)).answer == "1"


def test_files_of_other_tools_with_looser_types_are_read(tmp_path):
    loose = pa.schema([pa.field(f.name, pa.large_string() if f.type == pa.string() else f.type) for f in SCHEMA])
    path = write(tmp_path / "train.parquet", rows(3), loose.append(pa.field("more", pa.int8())))
    assert [example.answer for example in read_examples(path)] == ["1", "2", "3"]


def test_every_refusal_is_one_clear_line(tmp_path):
    def refusal(path):
        with pytest.raises(UserError) as caught:
            read_examples(path)
        return str(caught.value)

    assert "no such file" in refusal(tmp_path / "none.parquet")
    assert "a folder" in refusal(tmp_path)
    (tmp_path / "text").write_text("hello")
    assert "cannot be read as parquet" in refusal(tmp_path / "text")
    assert "holds no rows" in refusal(write(tmp_path / "empty", []))
    lacking = pa.schema([field for field in SCHEMA if field.name != "answer"])
    assert "lacks the columns answer (it has id, messages" in refusal(write(tmp_path / "lacking", rows(2), lacking))
    index = SCHEMA.get_field_index("prompt_tokens")
    wrong = SCHEMA.set(index, pa.field("prompt_tokens", pa.string()))
    text = [{**row, "prompt_tokens": "1"} for row in rows(2)]
    assert "column 'prompt_tokens' is string, expected int32" in refusal(write(tmp_path / "wrong", text, wrong))
    nullable = pa.schema([pa.field(field.name, field.type) for field in SCHEMA])
    gap = [*rows(2), {**rows(1)[0], "answer": None}]
    assert "row 3 has no answer" in refusal(write(tmp_path / "gap", gap, nullable))
    no_prompt = [*rows(1), {**rows(1)[0], "messages": []}]
    assert "row 2 has an empty prompt" in refusal(write(tmp_path / "no_prompt", no_prompt))
    bad = [{**rows(1)[0], "metadata": "[1]"}]
    assert "row 1 has metadata that is not a JSON object" in refusal(write(tmp_path / "bad", bad))
    whole = (write(tmp_path / "cut", rows(100))).read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    assert "cannot be read as parquet" in refusal(tmp_path / "cut")
