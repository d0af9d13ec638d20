"""Every kind of source, read from real files, a real S3 endpoint and the real generator."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import reasoning_gym

from tests.s3_server import BUCKET, s3_server  # noqa: F401
from tuneloop.data.columns import ColumnParser
from tuneloop.data.gsm8k import Gsm8kParser
from tuneloop.data.record import BadRow
from tuneloop.data.sources import HuggingFaceSource, JsonlSource, ParquetSource, ReasoningGymSource
from tuneloop.errors import TryAgain, UserError

ROWS = [{"prompt": f"{number} + 1 =", "answer": str(number + 1)} for number in range(3_000)]


def lines(rows) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def parquet(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def values(source) -> list:
    return [record.value for record in source.records()]


def refusal(make, error=UserError) -> str:
    with pytest.raises(error) as caught:
        values(make())
    return str(caught.value)


def test_jsonl_by_path_file_uri_gzip_and_limit(tmp_path):
    path = tmp_path / "rows of mine.jsonl"
    path.write_bytes(lines(ROWS))
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(lines(ROWS)))
    for uri in (str(path), path.as_uri(), str(packed)):
        source = JsonlSource(uri, ColumnParser())
        assert values(source) == ROWS
        assert source.consumed == len(lines(ROWS)) // 1_000
        assert source.name == f"jsonl:{uri}"
    assert values(JsonlSource(str(path), ColumnParser(), limit=7)) == ROWS[:7]


def test_jsonl_names_the_line_and_the_reason_of_every_bad_one(tmp_path):
    path = tmp_path / "rows.jsonl"
    deep = b"[" * 100_000
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n{"a": \n"text"\n[1]\nnull\n\xff\xfe\n   \n' + deep + b'\n{"b": 2}')
    records = list(JsonlSource(str(path), ColumnParser()).records())
    assert [record.line for record in records] == [1, 3, 4, 5, 6, 7, 9, 10]
    assert [record.value for record in records if record.value] == [{"a": 1}, {"b": 2}]
    reasons = [record.problem for record in records]
    for reason, start in zip(reasons[1:5], ["malformed JSON", "a str,", "a list,", "a NoneType,"], strict=True):
        assert reason.startswith(start)
    assert reasons[5] == "not UTF-8 text"
    assert "malformed JSON" in reasons[6]
    assert records[1].text == '{"a": \n'


def test_jsonl_refuses_what_is_not_text(tmp_path):
    def of(content: bytes, name: str = "x.jsonl") -> str:
        path = tmp_path / name
        path.write_bytes(content)
        return refusal(lambda: JsonlSource(str(path), ColumnParser()))

    assert "empty" in of(b"")
    assert "empty" in of(b"\n\n  \n")
    assert "binary" in of(b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR")
    assert 'kind = "parquet"' in of(parquet(tmp_path / "p", ROWS).read_bytes())
    assert "ends in .gz" in of(gzip.compress(lines(ROWS)))
    assert "damaged gzip" in of(gzip.compress(lines(ROWS))[:-200], "x.jsonl.gz")
    assert "no such file" in refusal(lambda: JsonlSource(str(tmp_path / "none"), ColumnParser()))
    assert "a folder" in refusal(lambda: JsonlSource(str(tmp_path), ColumnParser()))


def test_parquet_reads_the_columns_that_are_needed(tmp_path):
    rows = [{**row, "nested": {"text": f"n{index}"}, "big": "x" * 50} for index, row in enumerate(ROWS)]
    path = parquet(tmp_path / "rows.parquet", rows)
    assert values(ParquetSource(str(path), ColumnParser(), limit=2_000)) == ROWS[:2_000]
    source = ParquetSource(str(path), ColumnParser(prompt="nested.text"))
    assert [source.parser(value).contents[0] for value in values(source)] == [f"n{index}" for index in range(3_000)]
    assert (source.total, source.consumed) == (3_000, 3_000)


def test_parquet_refusals(tmp_path):
    path = parquet(tmp_path / "rows.parquet", ROWS)
    text = refusal(lambda: ParquetSource(str(path), ColumnParser(prompt="question")))
    assert 'no column \'question\', only "prompt", "answer"; set prompt_column' in text
    empty = tmp_path / "empty.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS).slice(0, 0), empty)
    assert "no rows" in refusal(lambda: ParquetSource(str(empty), ColumnParser()))
    (tmp_path / "text").write_text("hello")
    assert "cannot be read as parquet" in refusal(lambda: ParquetSource(str(tmp_path / "text"), ColumnParser()))
    assert "no such file" in refusal(lambda: ParquetSource(str(tmp_path / "none"), ColumnParser()))


def test_s3_streams_the_same_rows(tmp_path, s3_server):  # noqa: F811
    client = s3_server.client()
    client.put_object(Bucket=BUCKET, Key="data/rows.jsonl", Body=lines(ROWS))
    client.put_object(Bucket=BUCKET, Key="data/rows.jsonl.gz", Body=gzip.compress(lines(ROWS)))
    client.put_object(Bucket=BUCKET, Key="rows.parquet", Body=parquet(tmp_path / "p", ROWS).read_bytes())
    for uri in ("data/rows.jsonl", "data/rows.jsonl.gz"):
        assert values(JsonlSource(f"s3://{BUCKET}/{uri}", ColumnParser())) == ROWS
    assert values(ParquetSource(f"s3://{BUCKET}/rows.parquet", ColumnParser())) == ROWS
    for kind in (JsonlSource, ParquetSource):
        assert "none" in refusal(lambda kind=kind: kind(f"s3://{BUCKET}/none", ColumnParser()))
    s3_server.refuse["GET", 503, "SlowDown"] = 99
    assert refusal(lambda: JsonlSource(f"s3://{BUCKET}/data/rows.jsonl", ColumnParser()), TryAgain)


def test_huggingface_folders(tmp_path):
    import datasets

    datasets.disable_progress_bars()
    files = tmp_path / "files"
    files.mkdir()
    (files / "train.jsonl").write_bytes(lines(ROWS[:20]))
    saved = datasets.Dataset.from_list(ROWS[:20])
    saved.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "dict")
    for folder in ("files", "saved", "dict"):
        assert values(HuggingFaceSource(str(tmp_path / folder), ColumnParser())) == ROWS[:20]
        assert values(HuggingFaceSource(str(tmp_path / folder), ColumnParser(), limit=3)) == ROWS[:3]
    for folder in ("files", "dict"):
        assert "test" in refusal(lambda f=folder: HuggingFaceSource(str(tmp_path / f), ColumnParser(), split="test"))
    (tmp_path / "bare").mkdir()
    assert "no data files" in refusal(lambda: HuggingFaceSource(str(tmp_path / "bare"), ColumnParser()))
    assert "no such local folder" in refusal(lambda: HuggingFaceSource(str(tmp_path / "none"), ColumnParser()))


def test_reasoning_gym_rows_carry_what_the_scorer_needs():
    source = ReasoningGymSource("chain_sum", 20, seed=5, options={"max_terms": 2}, system_prompt="Add.")
    again = ReasoningGymSource("chain_sum", 20, seed=5, options={"max_terms": 2}, system_prompt="Add.")
    assert values(source) == values(again)
    assert values(source) != values(ReasoningGymSource("chain_sum", 20, seed=6, options={"max_terms": 2}))
    score = reasoning_gym.get_score_answer_fn("chain_sum")
    for record in source.records():
        row = source.parser(record.value)
        assert (row.roles, row.reward_kind) == (("system", "user"), "reasoning_gym")
        assert score(row.answer, json.loads(row.metadata)) == 1.0
        assert score("no idea", json.loads(row.metadata)) < 1.0


def test_reasoning_gym_names_the_nearest():
    assert "did you mean 'chain_sum'?" in refusal(lambda: ReasoningGymSource("chain_sums", 5))
    assert "known: " in refusal(lambda: ReasoningGymSource("zzz", 5))
    wrong = {"min_term": 3}
    assert "did you mean 'min_terms'?" in refusal(lambda: ReasoningGymSource("chain_sum", 5, options=wrong))
    for options in ({"min_terms": 5, "max_terms": 2}, {"min_terms": "x"}):
        assert "refuses its options" in refusal(lambda o=options: ReasoningGymSource("chain_sum", 5, options=o))


def test_gsm8k_rows():
    parse = Gsm8kParser()
    worked = "He has 48/2 = <<48/2=24>>24.\nSo $<<24*50=1200>>1,200 in all.\n#### $1,200"
    row = parse({"question": "How much?", "answer": worked})
    assert row.answer == "1200"
    assert row.completion == "He has 48/2 = 24.\nSo $1,200 in all.\n#### 1200"
    for number, answer in (("-5", "-5"), ("0.5", "0.5"), (" 12. ", "12"), ("1,000,000", "1000000"), ("25%", "25")):
        assert parse({"question": "?a", "answer": f"x #### {number}"}).answer == answer
    for answer in (None, "", 7, "no mark", "x ####", "x #### about five"):
        with pytest.raises(BadRow):
            parse({"question": "How much?", "answer": answer})
    with pytest.raises(BadRow, match="prompt is empty"):
        parse({"question": " ", "answer": worked})


def test_columns_make_rows():
    parse = ColumnParser("task.text", "task.result", "worked", "Q: {prompt}\nA:", "Be brief.", ["exact"])
    value = {"task": {"text": "1 + 1", "result": 2}, "worked": "it is 2", "reward_kind": "exact", "metadata": {"n": 1}}
    row = parse(value)
    assert (row.roles, row.contents) == (("system", "user"), ("Be brief.", "Q: 1 + 1\nA:"))
    assert (row.answer, row.completion, row.reward_kind, row.metadata) == ("2", "it is 2", "exact", '{"n": 1}')
    own = [{"role": "system", "content": "Own."}, {"role": "user", "content": "1 + 1", "name": None}]
    row = parse({**value, "task": {"text": own, "result": 2.5}})
    assert (row.contents, row.answer) == (("Own.", "Q: 1 + 1\nA:"), "2.5")


BAD_PROMPTS = [
    (None, "missing"),
    ("", "empty"),
    (" \n", "empty"),
    (7, "a int"),
    ([], "empty"),
    (["x"], "a message is a str"),
    ([{"role": "robot", "content": "x"}], "role 'robot'"),
    ([{"role": "user", "content": ""}], "no text"),
    ([{"role": "user", "content": None}], "no text"),
    ([{"role": "user", "content": "x", "tool_calls": [1]}], "tool_calls"),
    ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}], "ends with an assistant"),
]


@pytest.mark.parametrize(("prompt", "reason"), BAD_PROMPTS)
def test_a_bad_prompt_says_why(prompt, reason):
    with pytest.raises(BadRow, match=reason):
        ColumnParser()({"prompt": prompt, "answer": "1"})


@pytest.mark.parametrize(("answer", "reason"), [(None, "missing"), ("", "empty"), (True, "a bool"), ([1], "a list")])
def test_a_bad_answer_says_why(answer, reason):
    with pytest.raises(BadRow, match=f"the answer is {reason}"):
        ColumnParser()({"prompt": "x", "answer": answer})


def test_an_unknown_reward_kind_is_a_bad_row():
    with pytest.raises(BadRow, match="reward_kind is 'exakt', but the task's rewards are exact"):
        ColumnParser(reward_kinds=["exact"])({"prompt": "x", "answer": "1", "reward_kind": "exakt"})
