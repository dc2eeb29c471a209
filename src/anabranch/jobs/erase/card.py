# SPDX-License-Identifier: Apache-2.0
"""The README of an adapter: how to use it with stock diffusers alone, and with this package."""

from pathlib import Path
from typing import Any

from anabranch.models.diffusion.family import family
from anabranch.models.hub.card import base_name, front_matter
from anabranch.suppress.geom_erasing.adapter import READY

TAGS = ("lora", "geom-erasing", "concept-erasure", "text-to-image")
STOCK = """\
```python
import diffusers
from safetensors.torch import load_file

pipe = diffusers.DiffusionPipeline.from_pretrained("{model}"{absent})
{weights}negative = load_file("{folder}/negative.safetensors")
{call}
```
"""
OURS = """\
```python
from anabranch.models.diffusion.family import open_pipeline
from anabranch.suppress.geom_erasing.adapter import apply, remove

pipe = open_pipeline("{model}")
applied = apply(pipe, "{folder}", policy="{policy}")
negative = applied.arguments()  # own="blurry": what you do not want besides
{call}
remove(pipe)  # bit for bit the pipeline from before
```
"""
BAKED = """\
{head}# Less {concept}, without a negative prompt

A LoRA distilled from an adapter of Geom-Erasing (policy {policy}, eta {eta:g}, {steps} steps).

```python
import diffusers

pipe = diffusers.DiffusionPipeline.from_pretrained("{model}"{absent})
pipe.load_lora_weights("{folder}")
image = pipe("..."{length}).images[0]
```

{touched}How much rarer the concept is was not measured by the training: `anabranch erase eval` counts it with two
detectors and their own error rates, before and after attacks.

Erasing makes accidental output rarer; it is no security barrier. The words that stand for the concept are not in here.
"""
SAFETY = """\
How much rarer the concept is was not measured by the training: `anabranch erase eval` does that, and attacks it.

Erasing makes accidental output rarer; it is no security barrier. The learned words are also a handle that *produces*
the concept (`{name} <l_0_0>` in a positive prompt), and attacks recover most erased concepts. Removing other people's
marks from pictures is a different act and no purpose of this.
"""
CALLS = {
    "stable_diffusion": 'image = pipe("...", guidance_scale=7.5, {negative}).images[0]',
    "stable_diffusion_xl": (
        'embeds, _, pooled, _ = pipe.encode_prompt("...", do_classifier_free_guidance=False)\n'
        "image = pipe(prompt_embeds=embeds, pooled_prompt_embeds=pooled, guidance_scale=7.5,\n"
        "             {negative}).images[0]"
    ),
    "stable_diffusion_3": (
        'embeds, _, pooled, _ = pipe.encode_prompt("...", None, None, do_classifier_free_guidance=False{length})\n'
        "image = pipe(prompt_embeds=embeds, pooled_prompt_embeds=pooled, guidance_scale=7.5,\n"
        "             {negative}).images[0]"
    ),
}
READY_NEGATIVE = 'negative_prompt_embeds=negative["{policy}"]'
POOLED_NEGATIVE = ',\n             negative_pooled_prompt_embeds=negative["{policy}.pooled"]'
WEIGHTS = {
    "lora": 'pipe.load_lora_weights("{folder}")\n',
    "denoiser": 'pipe.{network} = type(pipe.{network}).from_pretrained("{folder}/denoiser")\n',
    "tokens": "",
}


def adapter_card(pipe: Any, facts: dict[str, Any], folder: str = "path/to/this/folder") -> str:
    kind = facts["family"]
    policy = facts["policy"] if facts["policy"] in READY else "name"
    filled = {"folder": folder, "policy": policy, "network": family(pipe).DENOISER, **opening(pipe, facts)}
    ready = READY_NEGATIVE if kind == "stable_diffusion" else READY_NEGATIVE + POOLED_NEGATIVE
    calls = [CALLS[kind].format(**filled, negative=given) for given in (ready.format(**filled), "**negative")]
    weights = WEIGHTS[facts["trained"]].format(**filled)
    stock = STOCK.format(**filled, weights=weights, call=calls[0])
    ours = OURS.format(**filled, call=calls[1])
    rows = [
        ("base model", f"{base_name(Path(facts['model']))}, fingerprint `{facts['base']}`"),
        ("mode, trained", f"{facts['mode']} removal, {facts['trained']}"),
        ("images", f"{facts['images']:,}, {facts['with_concept']:,} with the concept by {facts['detector']}"),
        ("grid, alpha, steps", f"{facts['grid'][0]} x {facts['grid'][1]}, {facts['alpha']:g}, {facts['steps']}"),
        ("default policy", facts["policy"]),
        *([("tensors", tensors(facts))] if "touched" in facts else []),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    warnings = "".join(f"\n> {warning}\n" for warning in facts["warnings"])
    head = front_matter(
        library_name="diffusers", tags=TAGS, base=facts["model"], relation="adapter", pipeline_tag="text-to-image"
    )
    return (
        f"{head}# Less {facts['concept']}\n\n"
        f"An adapter for a diffusion model that draws {facts['concept']} unasked (Geom-Erasing, arXiv 2310.05873).\n\n"
        f"| | |\n| --- | --- |\n{table}\n{warnings}\n"
        f"With diffusers alone:\n\n{stock}\nWith anabranch, all policies and an exact undo:\n\n"
        f"{ours}\n{SAFETY.format(name=facts['name'])}"
    )


def tensors(facts: dict[str, Any]) -> str:
    """What training touched, as it was found by hashes."""
    found = facts["touched"]
    return f"{found['new']} new, {found['changed']} of the model's changed, {found['as_before']} of them as before"


def baked_card(pipe: Any, facts: dict[str, Any], folder: str = "path/to/this/folder") -> str:
    named = {name: facts[name] for name in ("concept", "eta", "steps")}
    head = front_matter(
        library_name="diffusers", tags=TAGS, base=facts["model"], relation="adapter", pipeline_tag="text-to-image"
    )
    touched = f"Tensors: {tensors(facts)}.\n" if "touched" in facts else ""
    return BAKED.format(
        head=head, folder=folder, policy=facts["baked_policy"], touched=touched, **named, **opening(pipe, facts)
    )


def opening(pipe: Any, facts: dict[str, Any]) -> dict[str, str]:
    """What the stock pipeline has to be told when it is opened, and about the length of a prompt."""
    absent = "".join(f", {name}=None" for _, name in family(pipe).ENCODERS if getattr(pipe, name, None) is None)
    length = ""
    if facts["family"] == "stable_diffusion_3":
        from anabranch.models.diffusion.stable_diffusion_3 import T5_LENGTH, t5_length

        length = "" if t5_length(pipe) == T5_LENGTH else f", max_sequence_length={t5_length(pipe)}"
    name = base_name(Path(facts["model"]))  # a place on this machine is nobody else's
    return {"model": name if "/" in name else "path/to/the/base", "absent": absent, "length": length}
