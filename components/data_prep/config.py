"""Settings of the data_prep step."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from tuneloop.config import StrictModel
from tuneloop.settings import PositiveInt, Share


class SourceSettings(StrictModel):
    """Where rows come from. Columns may be renamed; dotted names reach into nested objects."""

    kind: Literal["jsonl", "parquet", "huggingface", "reasoning_gym", "gsm8k"]
    uri: str = ""  # jsonl, parquet, gsm8k: a local path, file://… or s3://…; huggingface: a hub name or local folder
    split: str = "train"  # huggingface
    revision: str = ""  # huggingface
    task: str = ""  # reasoning_gym: the data set's name
    size: Annotated[int, Field(ge=0)] = 0  # reasoning_gym: rows to generate; others: first rows only, 0 for all
    seed: int = 0  # reasoning_gym
    options: dict[str, Any] = {}  # reasoning_gym: the data set's own parameters
    prompt_column: str = "prompt"  # a string, or a list of {role, content} messages
    answer_column: str = "answer"
    completion_column: str = ""  # what SFT imitates; empty: the answer
    template: str = "{prompt}"  # the user's message; {prompt} stands for the prompt column

    @model_validator(mode="after")
    def _has_what_the_kind_needs(self) -> "SourceSettings":
        if self.kind == "reasoning_gym":
            if not self.task or not self.size:
                raise ValueError("a reasoning_gym source needs `task` and `size`")
        elif not self.uri:
            raise ValueError(f"a {self.kind} source needs `uri`")
        if "{prompt}" not in self.template:
            raise ValueError("`template` must contain {prompt}")
        return self


class NearDuplicateSettings(StrictModel):
    """MinHash over word n-grams with banding (Broder, 1997): rows at least this similar count as one."""

    enabled: bool = True
    threshold: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9  # estimated Jaccard similarity
    ngram: PositiveInt = 5
    permutations: Annotated[int, Field(ge=8, le=512)] = 64


class DataPrepConfig(StrictModel):
    """Sources, filters and the split."""

    sources: Annotated[tuple[SourceSettings, ...], Field(min_length=1)]
    test_share: Share = 0.1  # held out for the evaluation and the gate
    validation_share: Share = 0.05  # held out for the curves during training
    max_prompt_tokens: Annotated[int, Field(ge=1)] = 512
    max_completion_tokens: Annotated[int, Field(ge=1)] = 512
    quarantine_share: Share = 0.01  # bad rows past this share of all rows fail the step
    near_duplicates: NearDuplicateSettings = NearDuplicateSettings()
    batch_rows: Annotated[int, Field(ge=1, le=1_000_000)] = 4096

    @model_validator(mode="after")
    def _something_is_left_to_train_on(self) -> "DataPrepConfig":
        if self.test_share + self.validation_share >= 1.0:
            raise ValueError("test_share + validation_share must stay under 1, or nothing is left to train on")
        return self
