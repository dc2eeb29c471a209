# SPDX-License-Identifier: Apache-2.0
"""SimSiam: learn features by predicting one view of an image from another, without negatives and without a copy.

Paper     : Chen & He 2021, "Exploring Simple Siamese Representation Learning" (arXiv 2011.10566).
Equation  : L = 1/2 D(p1, sg z2) + 1/2 D(p2, sg z1),  D(p, z) = -cos(p, z),  z = projector(f(x)),  p = predictor(z);
            with more views: mean of D(p_a, sg z_b) over all pairs of a view a and another, large view b.
            spread = sqrt(d) mean over dimensions of std over the batch of z / |z|:  1 healthy, 0 collapsed.
Shapes    : B images, C channels, S pixels a side, D features, d dimensions of z.
Differs   : two layers in the projector and 256 dimensions, not three and 2048, for small images. Small views that only
            predict are an addition, off by default. Of several processes each normalises by its own rows, so that their
            number changes what is learned. The rate does not fall with the batch (.05 B / 256): small networks trained
            for some thousand steps need more. AdamW in place of SGD shrinks the features of such networks to a few
            directions while the spread stays healthy; hence measure/rank beside it.
Check     : loss by slow loops, no gradient through z, resume bit for bit (tests/specialize/test_simsiam.py).
Exempt    : off (nothing is added that could be switched off)
"""

from dataclasses import dataclass, replace
from itertools import count, takewhile

import torch
from torch import Tensor, nn

from anabranch.data.images import Images
from anabranch.data.streams import derived_seed
from anabranch.data.views import NUM_LARGE, Views, make_views
from anabranch.models.resnet import check_images, feature_size, features, normalise
from anabranch.specialize.mae import Indices, step_generator
from anabranch.train.seeding import seeded

FAMILY = "resnet"
"""The bridge in models/ whose networks this trains."""
OPTIMIZER, LEARNING_RATE, WEIGHT_DECAY = "sgd", 0.1, 1e-4
"""Peak for the small presets at batches of 64."""


@dataclass(frozen=True, kw_only=True)
class Config:
    projector_size: int = 256
    """Dimensions of z, and hidden units of the projector."""
    predictor_hidden_size: int = 64
    """A quarter of z: a bottleneck, which the paper found to help."""

    def __post_init__(self) -> None:
        for name in ("projector_size", "predictor_hidden_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, received {getattr(self, name)}")


def negative_cosine(prediction_BD: Tensor, target_BD: Tensor) -> Tensor:
    """D(p, sg z) = - mean over images of cos(p, z); no gradient reaches z."""
    pair = [wide(prediction_BD), wide(target_BD.detach())]
    return -nn.functional.cosine_similarity(*pair, dim=1).mean()


def wide(values: Tensor) -> Tensor:
    """In fp32 at least; fp64 stays, for the gradient's sake."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def cross_view(predictions: list[Tensor], targets: list[Tensor]) -> Tensor:
    """mean of D(p_a, sg z_b) over all pairs of different views; `targets` are those of the first views."""
    pairs = [(p, z) for a, p in enumerate(predictions) for b, z in enumerate(targets) if a != b]
    return torch.stack([negative_cosine(p, z) for p, z in pairs]).mean()


@torch.no_grad()
def spread(z_BD: Tensor) -> Tensor:
    """sqrt(d) mean over dimensions of std(z / |z|); blind to dimensions that merely repeat each other."""
    unit_BD = nn.functional.normalize(wide(z_BD), dim=1)
    return unit_BD.std(0, correction=0).mean() * z_BD.shape[1] ** 0.5


def projector(in_size: int, hidden_size: int, out_size: int) -> nn.Sequential:
    """Linear, norm, ReLU, linear, norm: the last norm has nothing to learn."""
    return nn.Sequential(
        nn.Linear(in_size, hidden_size, bias=False),  # a norm right after takes a bias away again
        nn.BatchNorm1d(hidden_size),
        nn.ReLU(),
        nn.Linear(hidden_size, out_size, bias=False),
        nn.BatchNorm1d(out_size, affine=False),
    )


def predictor(in_size: int, hidden_size: int, out_size: int) -> nn.Sequential:
    """Linear, norm, ReLU, linear."""
    return nn.Sequential(
        nn.Linear(in_size, hidden_size, bias=False),
        nn.BatchNorm1d(hidden_size),
        nn.ReLU(),
        nn.Linear(hidden_size, out_size),
    )


def views_in(batch: dict[str, Tensor], training: bool) -> list[Tensor]:
    """view1, view2, ... of a batch, normalised; batch statistics need two images."""
    names = list(takewhile(batch.__contains__, (f"view{i}" for i in count(1))))
    if len(names) < NUM_LARGE:
        raise ValueError(f"batch: expected view1 and view2, received {', '.join(sorted(batch))}")
    if training and len(batch["view1"]) < 2:
        raise ValueError("batch: expected at least 2 images a process (batch statistics), received 1")
    return [normalise(batch[name]) for name in names]


class Siamese(nn.Module):
    """Objective: batch of `TwoViews` -> {"loss": (), "spread": ()}; trains `model` in place."""

    def __init__(self, model: nn.Module, config: Config, *, seed: int):
        super().__init__()
        self.model, self.config = model, config
        size = config.projector_size
        with seeded(derived_seed("siamese heads", seed), torch.device("cpu")):
            self.projector = projector(feature_size(model), size, size)
            self.predictor = predictor(size, config.predictor_hidden_size, size)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        views = views_in(batch, self.training)
        # one view at a time: each is normalised by statistics of its own, as in the paper
        projected = [self.projector(features(self.model, view)) for view in views]
        predictions, targets = [self.predictor(z) for z in projected], projected[:NUM_LARGE]
        return {"loss": cross_view(predictions, targets), "spread": spread(torch.cat(targets))}


class TwoViews:
    """The global batch of a step: view1, view2, ... (B, C, S, S) uint8, ids (B,) of what images belong to."""

    def __init__(
        self, images: Images, indices: Indices, views: Views, *, seed: int, ids: dict[str, Tensor] | None = None
    ):
        self.images, self.indices, self.views, self.seed, self.ids = images, indices, views, seed, ids or {}

    def batch(self, step: int) -> dict[str, Tensor]:
        chosen_B = self.indices.at(step)
        made_VB = make_views(self.images.store.read(chosen_B), step_generator(self.seed, step), self.views)
        return {
            **{f"view{i}": view for i, view in enumerate(made_VB, 1)},
            "row": torch.arange(len(chosen_B)),
            "step": torch.full((len(chosen_B),), step),
            **{name: values[chosen_B] for name, values in self.ids.items()},
        }


def objective(model: nn.Module, *, seed: int, config: Config | None = None) -> nn.Module:
    """What train/loop minimises; the new heads are a function of `seed` alone."""
    return Siamese(model, config or Config(), seed=seed)


def stream(
    images: Images,
    model: nn.Module,
    indices: Indices,
    *,
    seed: int,
    augment: bool = False,
    views: Views | None = None,
    **ids: Tensor,
) -> TwoViews:
    """The batches for this model, after checking that the images fit it; `augment` mirrors half of the views."""
    check_images(model, image_size=images.image_size, channels=images.channels, name=images.name)
    views = views or Views()
    return TwoViews(images, indices, replace(views, flip=0.5) if augment else views, seed=seed, ids=ids)
