# SPDX-License-Identifier: Apache-2.0
"""How what is taken along for a task is exercised."""

import torch
from torch import nn

from anabranch.mixture import mixtures
from anabranch.models import vit_mae
from anabranch.reuse import customize, extract, nearest
from anabranch.specialize import moce
from anabranch.testing import Reordering, Subject, along


def subject_customize() -> Subject:
    def call(labels, routes, distances, p95):
        choice = customize.choose(labels, routes, "path")
        return customize.facts(choice, distances, p95) | {"histogram": choice.histogram}

    return Subject(
        inputs=lambda g: {
            "labels": torch.randint(4, (30,), generator=g), "routes": torch.tensor([[0, 1, 1, 0], [0, 0, 1, 1]]),
            "distances": torch.rand(30, generator=g), "p95": 0.8,
        },
        call=call,
        samples=along(30, {"labels": 0, "distances": 0}),
    )  # fmt: skip


def subject_nearest() -> Subject:
    def call(features, others, labels):
        right, other = nearest.leave_one_out(features, labels), nearest.leave_one_out(others, labels)
        return {"right": right, "margin": nearest.margin(right, other, 3)}

    return Subject(
        inputs=lambda g: {
            "features": torch.randn(30, 4, generator=g) + 2 * torch.eye(4)[torch.arange(30) % 3],
            "others": torch.randn(30, 4, generator=g), "labels": torch.arange(30) % 3,
        },
        call=call,
        samples=along(30, {"features": 0, "others": 0, "labels": 0}, {"right": 0}),
    )  # fmt: skip


def subject_extract() -> Subject:
    config = moce.Config(num_experts=2, init_noise=0.1)

    def routed(g, groups=(0, 1, 1)):
        model = vit_mae.build("tiny", image_size=28, channels=1, seed=int(torch.randint(1000, (), generator=g)))
        centroids = nn.functional.normalize(torch.randn(3, 5, generator=g), dim=1)
        return moce.insert(model, centroids, torch.tensor(groups), config, g).eval()

    def permuted(given, order):
        for layer in mixtures(given["model"]).values():
            layer.router, layer.bank = layer.router.take(order), layer.bank.permute(order)
        return given

    return Subject(
        inputs=lambda g: {"model": routed(g), "cluster": 1},
        call=extract.extract,
        experts=Reordering(size=2, inputs=permuted, output=lambda result, order: result),
    )
