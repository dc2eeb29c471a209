# SPDX-License-Identifier: Apache-2.0
"""The README of an adapter: how to use it with stock diffusers alone, and with this package."""

from typing import Any

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
image = pipe("...", guidance_scale=7.5, **applied.arguments(own="blurry")).images[0]
remove(pipe)  # bit for bit the pipeline from before
```
"""
SAFETY = """\
Erasing makes accidental output rarer; it is no security barrier. The learned words are also a handle that *produces*
the concept (`{name} <l_0_0>` in a positive prompt), and attacks recover most erased concepts: `anabranch erase eval`
measures them. Removing other people's marks from pictures is a different act and no purpose of this.
"""
CALLS = {
    "stable_diffusion": (
        'image = pipe("...", guidance_scale=7.5, negative_prompt_embeds=negative["{policy}"]).images[0]'
    ),
    "stable_diffusion_xl": (
        'embeds, _, pooled, _ = pipe.encode_prompt("...", do_classifier_free_guidance=False)\n'
        "image = pipe(prompt_embeds=embeds, pooled_prompt_embeds=pooled, guidance_scale=7.5,\n"
        '             negative_prompt_embeds=negative["{policy}"],\n'
        '             negative_pooled_prompt_embeds=negative["{policy}.pooled"]).images[0]'
    ),
    "stable_diffusion_3": (
        'embeds, _, pooled, _ = pipe.encode_prompt("...", None, None, do_classifier_free_guidance=False{length})\n'
        "image = pipe(prompt_embeds=embeds, pooled_prompt_embeds=pooled, guidance_scale=7.5,\n"
        '             negative_prompt_embeds=negative["{policy}"],\n'
        '             negative_pooled_prompt_embeds=negative["{policy}.pooled"]).images[0]'
    ),
}
WEIGHTS = {
    "lora": 'pipe.load_lora_weights("{folder}")\n',
    "denoiser": 'pipe.{network} = type(pipe.{network}).from_pretrained("{folder}/denoiser")\n',
    "tokens": "",
}


def adapter_card(pipe: Any, facts: dict[str, Any], folder: str = "path/to/this/folder") -> str:
    kind = facts["family"]
    missing = kind == "stable_diffusion_3" and pipe.text_encoder_3 is None
    policy = facts["policy"] if facts["policy"] in ("name", "prior", "all") else "name"
    length = ""
    if missing:
        from anabranch.models.diffusion.stable_diffusion_3 import t5_length

        length = f", max_sequence_length={t5_length(pipe)}"
    network = "unet" if kind != "stable_diffusion_3" else "transformer"
    filled = {"folder": folder, "model": facts["model"], "policy": policy, "length": length, "network": network}
    stock = STOCK.format(
        **filled | {
            "absent": ", text_encoder_3=None" if missing else "",
            "weights": WEIGHTS[facts["trained"]].format(**filled),
            "call": CALLS[kind].format(**filled),
        }
    )  # fmt: skip
    rows = [
        ("base model", f"`{facts['model']}`, fingerprint `{facts['base']}`"),
        ("mode, trained", f"{facts['mode']} removal, {facts['trained']}"),
        ("images", f"{facts['images']:,}, {facts['with_concept']:,} with the concept by {facts['detector']}"),
        ("grid, alpha, steps", f"{facts['grid'][0]} x {facts['grid'][1]}, {facts['alpha']:g}, {facts['steps']}"),
        ("default policy", facts["policy"]),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    warnings = "".join(f"\n> {warning}\n" for warning in facts["warnings"])
    return (
        f"# Less {facts['concept']}\n\n"
        f"An adapter for a diffusion model that draws {facts['concept']} unasked (Geom-Erasing, arXiv 2310.05873).\n\n"
        f"| | |\n| --- | --- |\n{table}\n{warnings}\n"
        f"With diffusers alone:\n\n{stock}\nWith anabranch, all policies and an exact undo:\n\n"
        f"{OURS.format(**filled)}\n{SAFETY.format(name=facts['name'])}"
    )
