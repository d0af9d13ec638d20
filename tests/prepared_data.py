"""A few rows as data_prep leaves them, without running it."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tuneloop.data.schema import SCHEMA, SPLITS


def write_prepared(folder: Path, rows: int = 8) -> Path:
    """Every split with the same rows: a number is asked for, its last digit is the answer."""
    folder.mkdir(parents=True)
    made = [
        {
            "id": f"{n:032x}",
            "messages": [{"role": "user", "content": f"{n}?"}],
            "answer": str(n % 10),
            "completion": str(n % 10),
            "reward_kind": "",
            "source": "jsonl:numbers",
            "metadata": "{}",
            "prompt_tokens": 20,
            "completion_tokens": 2,
        }
        for n in range(rows)
    ]
    for split in SPLITS:
        pq.write_table(pa.Table.from_pylist(made, SCHEMA), folder / f"{split}.parquet")
    return folder
