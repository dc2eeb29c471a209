# SPDX-License-Identifier: Apache-2.0
"""What `anabranch align chain` can be told: the flags, then every further setting.

Light on purpose: the command line reads these without importing torch.
"""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class ChainFlags:
    model: Path = Path("model")
    """A folder that transformers wrote, tokenizer included; it writes the chains and judges its answers."""
    questions: Path = Path("questions.jsonl")
    """Rows with a question (text or messages) and perhaps a kind, or a text file with a question a line."""
    out: Path = Path("chains.jsonl")
    """The file to write; chain_report.json goes beside it, and OUT.run keeps what a stopped build goes on from."""
    prompts_file: Path | None = None
    """A JSON file with prompts of your own."""
    retries: int = 2
    """Further tries of the last answer before a question is dropped."""
    temperature: float = 0.7
    threshold: float = 0.5
    """An answer passes where the model says yes, harmless, with at least this probability."""
    batch_size: int = 16
    seed: int = 0
    resume: bool = False
    """Go on with a build that was stopped."""


@dataclass(frozen=True, kw_only=True)
class ChainSettings(ChainFlags):
    top_p: float = 0.95
    budget: dict[str, int] = field(default_factory=dict)
    """Tokens a step may have, such as {analysis: 64}; 128 for a note and 256 for an answer when left out."""
