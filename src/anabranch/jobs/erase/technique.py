# SPDX-License-Identifier: Apache-2.0
"""An erased model as a technique of the eval-unlearn benchmark, which finds it by its entry point.

{"technique": {"name": "geom_erasing",
               "config": {"model": "stable-diffusion", "adapter": "adapter", "erase_concept": "qr code"}}}

What the benchmark asks of a technique: made with the keywords of its `config`; generate(prompts, seed) -> PIL images,
picture i drawn from the seed + i. It works for eval-learn, the benchmark's earlier name, as well.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from PIL import Image

from anabranch.errors import UsageError, did_you_mean
from anabranch.jobs.erase.sample import as_arrays, draw_with, sampling_of
from anabranch.models.diffusion.family import open_pipeline
from anabranch.suppress.detectors.open import open_detector
from anabranch.suppress.geom_erasing.adapter import apply


@dataclass(frozen=True, kw_only=True)
class TechniqueConfig:
    model: str
    """A diffusers pipeline folder."""
    adapter: str
    """What anabranch erase train or bake wrote."""
    erase_concept: str | None = None
    """Where given, it has to be what the adapter erases."""
    policy: str | None = None
    """Of the negative prompt; the adapter's own when left out."""
    detector: str = ""
    """Of policy detected."""
    strength: float = 1.0
    device: str | None = None
    guidance: float | None = None
    """None: the pipeline's own, as of steps."""
    steps: int | None = None
    batch_size: int = 4


ALSO_CALLED = {"guidance_scale": "guidance", "num_inference_steps": "steps"}
KNOWN = {field.name for field in fields(TechniqueConfig)}
SAMPLING = {"guidance", "steps", "batch_size"}
"""What every call may say for itself."""


class GeomErasing:
    """
    Raises:
        UsageError: an unknown keyword, another concept, or what `apply` refuses.
    """

    def __init__(self, **given: Any):
        self.config = config = config_of(given)
        pipe = open_pipeline(config.model)
        if config.device is not None:
            pipe.to(config.device)
        self.applied = apply(pipe, config.adapter, policy=config.policy, strength=config.strength)
        concept = str(self.applied.adapter.config["concept"])
        if config.erase_concept is not None and config.erase_concept.casefold() != concept.casefold():
            raise UsageError(
                f"{config.adapter} erases another concept", expected=config.erase_concept, received=concept
            )
        self.detector = open_detector(config.detector, concept=concept) if config.detector else None

    def generate(self, prompts: Sequence[str], seed: int | None = None, **given: Any) -> list[Image.Image]:
        asked = {ALSO_CALLED.get(name, name): value for name, value in given.items()}
        if strange := sorted(asked.keys() & KNOWN - SAMPLING):
            raise UsageError(
                f"{strange[0]} would change nothing here: it is said when geom_erasing is made",
                expected=", ".join(sorted(SAMPLING)), received=strange[0],
            )  # fmt: skip
        config = config_of(vars(self.config) | asked)
        first = secrets.randbits(31) if seed is None else seed
        seeds = [first + i for i in range(len(prompts))]
        how = sampling_of(self.applied.pipe, config)
        pixels = draw_with(self.applied, self.applied.policy, prompts, seeds, how, detector=self.detector)
        return [Image.fromarray(picture) for picture in as_arrays(pixels)]


def config_of(given: dict[str, Any]) -> TechniqueConfig:
    named = {ALSO_CALLED.get(name, name): value for name, value in given.items()}
    known = [field.name for field in fields(TechniqueConfig)]
    for name in named:
        if name not in known:
            raise UsageError(f"geom_erasing has no setting {name!r}", hint=did_you_mean(name, known))
    for name in ("model", "adapter"):
        if name not in named:
            raise UsageError(f"geom_erasing needs {name}", expected="a folder", received="none")
    return TechniqueConfig(**named)
