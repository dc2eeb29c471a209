# SPDX-License-Identifier: Apache-2.0
"""`anabranch align export`: one plain LoRA a step, for engines that take an adapter a request.

OUT/STEP      a stock PEFT folder of twice the rank, the rows of the steps' tokens in it
OUT/*         the tokenizer, and a README with the call
"""

from pathlib import Path
from typing import Any

import torch

from anabranch.errors import CheckFailed, UsageError
from anabranch.jobs.align.settings import ExportSettings
from anabranch.jobs.progress import say
from anabranch.models.language.folder import open_language_model
from anabranch.specialize.mote.card import fused_card
from anabranch.specialize.mote.export import fuse
from anabranch.specialize.mote.folder import load
from anabranch.specialize.mote.mote import MoTE
from anabranch.train.publish import publish_folder, refuse_other_results

CLOSE = 1e-3
"""Largest difference of logits, over their spread, that rounding explains."""


def align_export(settings: ExportSettings) -> dict[str, float]:
    """Write settings.out; returns, by step, how far the fused adapter's logits are from the mixture's."""
    refuse_other_results(settings.out, "README.md")
    base, _ = open_language_model(settings.model)
    mote = load(base, settings.experts, strict=settings.strict)
    if mote.settings.assign != "step":
        raise UsageError(
            f"{settings.experts} has no experts of steps", expected="a mixture with assign=step",
            received=f"assign={mote.settings.assign}", hint="one LoRA is a stock adapter already: its folder `lora`",
        )  # fmt: skip
    errors: dict[str, float] = {}

    def write(folder: Path) -> None:
        for step in mote.settings.steps.names:
            fuse(mote, step, folder / step)
        mote.tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(fused_card(mote.settings.steps.answer, str(settings.model)), encoding="utf-8")
        errors.update({step: difference(settings, mote, step, folder / step) for step in mote.settings.steps.names})
        if wrong := {step: error for step, error in errors.items() if not error < CLOSE}:
            raise CheckFailed(
                "a fused adapter is not its step", expected=f"logits within {CLOSE} of their spread", received=wrong
            )

    publish_folder(write, settings.out)
    for step, error in errors.items():
        say(f"{step:<12} logits within {error:.1e} of the mixture's")
    say(f"\nadapters {settings.out}")
    return errors


@torch.no_grad()
def difference(settings: ExportSettings, mote: MoTE, step: str, folder: Path) -> float:
    """Largest difference of logits between stock PEFT with the fused adapter and the mixture wholly in that step."""
    from peft import PeftModel

    plain, _ = open_language_model(settings.model)
    plain.resize_token_embeddings(len(mote.tokenizer), mean_resizing=False)
    stock = PeftModel.from_pretrained(plain, folder, local_files_only=True).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(len(mote.tokenizer), (2, 32), generator=generator).to(next(mote.parameters()).device)
    steps = torch.full_like(ids, mote.settings.steps.index(step))
    ours: Any = mote(ids, steps).logits.float()
    return float((ours - stock(input_ids=ids).logits.float()).abs().max() / ours.std())
