# SPDX-License-Identifier: Apache-2.0
"""The README of a folder of step experts, and of one of fused steps."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from anabranch.models.hub.card import base_name, front_matter
from anabranch.specialize.mote.mote import Config, MoTE

TAGS = ("lora", "mixture-of-experts", "mote", "self-alignment")


def mixture_card(mote: MoTE, facts: Mapping[str, Any]) -> str:
    config, base = mote.settings, facts.get("model")
    head = front_matter(
        library_name="peft", tags=TAGS, base=base, relation="adapter" if base else None,
        pipeline_tag="text-generation" if base else None,
    )  # fmt: skip
    return f"""{head}# Step experts for {base_name(Path(base)) if base else "a language model"}

{made_of(config)}
{learnt(facts)}`mote.json` has everything else.

```python
from transformers import AutoModelForCausalLM
from anabranch.specialize.mote.collate import question_ids
from anabranch.specialize.mote.generate import generate
from anabranch.specialize.mote.mote import MoTE

mote = MoTE.from_pretrained("path/to/this/folder", base=AutoModelForCausalLM.from_pretrained("path/to/the/base"))
chain = generate(mote, [question_ids(mote.tokenizer, "...")], mode="adaptive")[0]
print(chain.answer)
```

{at_work(config)}
{touched(facts)}
What the answers are worth is not in here: `anabranch align eval` says harmless, helpful, over-refusal and jailbreaks
together, beside the base model and another adapter.

The steps before the answer are the model's notes on the question. They may quote what it asks for: do not show them to
end users, and do not log them where others read.
"""


def learnt(facts: Mapping[str, Any]) -> str:
    if "rows" not in facts:
        return ""
    shapes = ", ".join(f"{count} of {shape}" for shape, count in facts.get("shapes", {}).items())
    told = f" ({shapes})" if shapes else ""
    return f"{facts['rows']} chains{told}, {facts['trained_steps']} steps of training, seed {facts.get('seed', '?')}. "


def touched(facts: Mapping[str, Any]) -> str:
    """What changed and what did not."""
    if "base_tensors" not in facts:
        return ""
    norms = ", ".join(f"{name} {value:g}" for name, value in facts["norms"].items())
    return (
        f"\nAfter training {facts['base_tensors']} of the base model's own tensors are as before, bit for bit: all\n"
        f"that were looked at. Length of what each expert adds: {norms}.\n"
    )


def made_of(config: Config) -> str:
    steps = ", ".join(config.steps.names)
    made = "Made by `anabranch align train`"
    if config.assign == "one":
        return f"{made} for comparison: one LoRA of rank {config.r} for all of the steps {steps}."
    shared = ", and one that all of them share" if config.shared else ""
    if config.assign == "step":
        paper = "(MoTE, arXiv 2405.00557)"
        return f"{made} {paper}: one LoRA of rank {config.r} for each of the steps\n{steps}{shared}."
    by = "chance" if config.assign == "random" else "its id"
    number = len(config.experts)
    return f"{made} for comparison: {number} LoRA experts of rank {config.r}{shared},\nchosen for each token by {by}."


def at_work(config: Config) -> str:
    if config.assign == "one":
        return "The folder `lora` is an ordinary PEFT adapter."
    told = "Every folder in here is an ordinary PEFT adapter. Alone it is one expert without the others"
    if config.shared:
        own, rest = f"{config.alpha:g}", f"{1 - config.alpha:g}"
        told += f"; what acts on a token is\n{own} of its own expert and {rest} of the shared one"
    export = " `anabranch align export` writes\nthat as one plain LoRA a step."
    return f"{told}.{export if config.assign == 'step' else ''}"


def fused_card(step: str, base: str) -> str:
    """Of a folder with one plain LoRA a step."""
    head = front_matter(library_name="peft", tags=TAGS, base=base, relation="adapter", pipeline_tag="text-generation")
    return head + FUSED.format(step=step)


FUSED = """# One step as a plain LoRA

Exact for tokens of its own step. An engine that takes one adapter a request reads the earlier steps of a chain again
through the present step's adapter, which the mixture does not: a chain that is served so is an approximation.

```python
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
model = AutoModelForCausalLM.from_pretrained("path/to/the/base")
model.resize_token_embeddings(len(tokenizer), mean_resizing=False)  # the rows of the steps' tokens are in the adapter
model = PeftModel.from_pretrained(model, "path/to/this/folder/{step}")
```
"""
