# SPDX-License-Identifier: Apache-2.0
"""How super-nets and their learning are exercised."""

from itertools import product

import torch

from anabranch.models import resnet
from anabranch.models.bridge import transformers
from anabranch.specialize import simsiam
from anabranch.specialize.sdr import objective, supernet
from anabranch.specialize.sdr.channels import SplitBatchNorm
from anabranch.specialize.sdr.heads import of_row
from anabranch.testing import Reordering, Subject, along

PATHS = [(0, 0, *digits) for digits in product(range(2), repeat=2)]
ROWS, IMAGES = (1, 2), 3
"""Paths that have their turn, and images of each."""


def backbone(g):
    config = transformers().ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[4, 8, 12, 16], depths=[1, 1, 1, 1], layer_type="basic"
    )
    config.image_size = 28
    return resnet.fresh(config, int(torch.randint(1000, (), generator=g)))


def grown(g):
    net = supernet.supernet(backbone(g), supernet.Config(groups=2))
    return supernet.grow(net, PATHS, 2)


def same_storage(module, tensors):
    """Names of the module's tensors in whose storage these lie."""
    held = {value.untyped_storage().data_ptr() for value in tensors}
    named = [*module.named_parameters(), *module.named_buffers()]
    return [name for name, value in named if value.untyped_storage().data_ptr() in held]


def subject_supernet() -> Subject:
    def call(net, pixels, row):
        features = net.activate(row)(pixels)
        return {"loss": features.square().mean(), "features": features}

    def touches(given, output):
        return [f"net.{name}" for name in given["net"].parameters_of(1)]

    return Subject(
        inputs=lambda g: {"net": grown(g).eval(), "pixels": torch.randn(6, 1, 28, 28, generator=g), "row": 1},
        call=call,
        touches=touches,
        samples=along(6, {"pixels": 0}, {"features": 0}),
        off=lambda given: (
            supernet.supernet(plain := backbone(torch.Generator()), supernet.Config(groups=2)).eval()(given["pixels"]),
            resnet.features(plain.eval(), given["pixels"]),
        ),
    )


def subject_objective() -> Subject:
    config = objective.Config(ssl="byol", target_momentum=0.5)

    def make(g):
        heads = simsiam.projector(16, 6, 6), simsiam.predictor(6, 4, 6)
        with torch.no_grad():
            for head in heads:
                for value in head.parameters():
                    value.copy_(0.5 * torch.randn(value.shape, generator=g))
        start = objective.SubnetLearning(supernet.supernet(backbone(g), supernet.Config(groups=2)), *heads, config, 1)
        made = objective.grown(start, PATHS, 2, 20)
        with torch.no_grad():  # as after some steps: the target is behind
            for value in made.parameters():
                value += 0.1 * torch.randn(value.shape, generator=g)
        return made.train()

    def batch(g):
        pixels = [torch.randint(0, 256, (2 * IMAGES, 1, 28, 28), generator=g).to(torch.uint8) for _ in range(2)]
        path = torch.tensor(ROWS).repeat_interleave(IMAGES)
        turns = torch.tensor(ROWS).expand(2 * IMAGES, -1)
        return {
            "view1": pixels[0], "view2": pixels[1], "path": path, "turns": turns, "step": torch.full((len(path),), 3),
        }  # fmt: skip

    def terms(g):
        values = [torch.randn(5, 4, generator=g).double() for _ in range(4)]
        return {
            name: (lambda *predictions, loss=loss: loss(predictions, values[2:]), tuple(values[:2]))
            for name, loss in (("simsiam", objective.simsiam_loss), ("byol", objective.byol_loss))
        }

    def touches(given, output):
        """Of both paths, what they compute with and their statistics; and what follows it in the target."""
        own = given["objective"]
        tensors = []
        for row in ROWS:
            for net, projector in ((own.net, own.projector), own.target):
                parameters = dict(net.named_parameters())
                tensors += [parameters[name] for name in net.parameters_of(row)]
                tensors += of_row(projector, row).parameters()
                parts = net, of_row(projector, row)
                norms = [module for part in parts for module in part.modules() if isinstance(module, SplitBatchNorm)]
                tensors += [view for norm in norms for view in norm.statistics(row)]
            tensors += [*of_row(own.predictor, row).parameters(), *own.statistics(row)]
        return [f"objective.{name}" for name in same_storage(own, tensors)]

    return Subject(
        inputs=lambda g: {"objective": make(g), "batch": batch(g)},
        call=lambda objective, batch: objective(batch),
        changes=("objective",),
        touches=touches,
        terms=terms,
        samples=Reordering(
            size=IMAGES,
            inputs=lambda given, order: {
                **given,
                "batch": along(6, {"*view*": 0}).inputs(given["batch"], [*order, *(IMAGES + i for i in order)]),
            },
            output=lambda result, order: result,
        ),
        tolerance=1e-4,
        scale=1.0,
        half={torch.bfloat16: 0.2, torch.float16: 0.05},
    )
