"""The README.md of a merged model: what it was made from, and the numbers that speak for it."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class ModelCard:
    """What a reader of the merged model must know.

    Attributes:
        base_uri: the base model.
        adapter_digest: names what was merged into it.
        data: names the training data; empty when unknown.
        numbers: what was measured, name to value.
    """

    base_uri: str
    adapter_digest: str
    data: str = ""
    numbers: Mapping[str, float | int | str] = field(default_factory=dict)

    def write(self, folder: Path, base: Path) -> None:
        """Write `README.md` into `folder`; the licence is taken over from the base's own card."""
        (folder / "README.md").write_text(self.render(_licence(base)))

    def render(self, licence: str = "") -> str:
        """The card as Markdown with the front matter that model hubs read."""
        front = ["library_name: transformers", "pipeline_tag: text-generation", "tags: [tuneloop, lora, merged]"]
        front += [f"base_model: {_hub_name(self.base_uri)}"] if _hub_name(self.base_uri) else []
        front += [f"license: {licence}"] if licence else []
        rows = [("base model", f"`{self.base_uri}`"), ("adapter digest", f"`{self.adapter_digest}`")]
        rows += [("data", f"`{self.data}`")] if self.data else []
        rows += [(name, _show(value)) for name, value in self.numbers.items()]
        table = "\n".join(f"| {name} | {value} |" for name, value in rows)
        return (
            "---\n" + "\n".join(front) + "\n---\n"
            "# Merged model\n\n"
            "A LoRA adapter folded into its base model: every target weight W became W + scaling · B · A.\n\n"
            f"| | |\n|---|---|\n{table}\n"
        )


def _show(value: float | int | str) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if isinstance(value, float) else value


def _hub_name(uri: str) -> str:
    return uri.removeprefix("hf://").partition("@")[0] if uri.startswith("hf://") else ""


def _licence(base: Path) -> str:
    """`license:` of the base's card, else of its config; empty when neither names one."""
    card = base / "README.md"
    if card.is_file():
        front = card.read_text(errors="replace").partition("\n---")[0]
        found = re.search(r"^license:\s*(\S+)", front, re.MULTILINE)
        if found:
            return found[1]
    return str(json.loads((base / "config.json").read_text()).get("license", ""))
