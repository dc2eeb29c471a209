# SPDX-License-Identifier: Apache-2.0
"""The README of a folder of experts, and of one of fused steps."""

from collections.abc import Mapping
from typing import Any

from anabranch.specialize.mote.mote import MoTE


def mixture_card(mote: MoTE, facts: Mapping[str, Any]) -> str:
    config = mote.settings
    steps = ", ".join(config.steps.names)
    shared = ", and one that all of them share" if config.shared else ""
    return f"""# Step experts for {facts.get("model", "a language model")}

Made by `anabranch align train` (MoTE, arXiv 2405.00557): one LoRA of rank {config.r} for each of the steps
{steps}{shared}.
{facts["rows"]} chains, {facts["trained_steps"]} steps of training. `mote.json` has everything else.

```python
from transformers import AutoModelForCausalLM
from anabranch.specialize.mote.collate import question_ids
from anabranch.specialize.mote.generate import generate
from anabranch.specialize.mote.folder import load

mote = load(AutoModelForCausalLM.from_pretrained("path/to/the/base"), "path/to/this/folder")
chain = generate(mote, [question_ids(mote.tokenizer, "...")], mode="adaptive")[0]
print(chain.answer)
```

Every folder in here is an ordinary PEFT adapter. Alone it is one expert without the others; what acts on a token is
{config.alpha:g} of its step's expert and {1 - config.alpha:g} of the shared one. `anabranch align export` writes
that as one plain LoRA a step.

The steps before the answer are the model's notes on the question. They may quote what it asks for: do not show them to
end users, and do not log them where others read.
"""


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
