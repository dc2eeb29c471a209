# SPDX-License-Identifier: Apache-2.0
"""How what is measured of models and images is exercised."""

import numpy as np
import torch

from anabranch.measure import (
    concept_ratio,
    conflict,
    controllability,
    erasure,
    frechet,
    intervals,
    judge,
    localisation,
    probes,
    rank,
    relatedness,
    self_bleu,
    semantics,
    transfer,
)
from anabranch.testing import Reordering, Subject, along


def hits(g, count=30, rate=0.5):
    return (torch.rand(count, generator=g) < rate).long().numpy()


def rows(g, *shape):
    return torch.randn(*shape, generator=g).numpy()


def numpy_generator(g):
    return np.random.default_rng(int(torch.randint(2**31, (), generator=g)))


def subject_concept_ratio() -> Subject:
    def call(first, second, flagged, categories, generator, level):
        return {
            "ratio": concept_ratio.ratio(first, level),
            "difference": concept_ratio.paired_difference(first, second, level),
            "worst": concept_ratio.inappropriateness(flagged, categories, generator, 10, 3),
        }

    return Subject(
        inputs=lambda g: {
            "first": hits(g).astype(np.float32), "second": hits(g).astype(np.float32), "level": 0.9,
            "flagged": hits(g, 12).reshape(4, 3), "categories": [["a"], ["a", "b"], [], ["b"]],
            "generator": numpy_generator(g),
        },
        call=call,
        samples=along(30, {"first": 0, "second": 0}),
    )  # fmt: skip


def subject_conflict() -> Subject:
    def call(model, batches):
        def loss(i):
            return lambda half: model(batches[2 * i + half]).square().mean()

        return conflict.gradient_conflict(model, [loss(i) for i in range(len(batches) // 2)])

    return Subject(
        inputs=lambda g: {
            "model": torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 2)),
            "batches": [torch.randn(5, 4, generator=g) for _ in range(6)],
        },
        call=call,
        samples=Reordering(
            size=3,
            inputs=lambda given, order: {
                **given, "batches": [given["batches"][2 * i + half] for i in order for half in (0, 1)],
            },
            output=lambda result, order: result[order][:, order],
        ),
    )  # fmt: skip


def subject_controllability() -> Subject:
    return Subject(
        inputs=lambda g: {
            "without_word": hits(g, 40, 0.3).astype(np.float32), "with_word": hits(g, 30, 0.6).astype(np.float32),
        },
        call=controllability.controllability,
        samples=along(30, {"with_word": 0}),
    )  # fmt: skip


def subject_erasure() -> Subject:
    def inputs(g):
        rates = {name: concept_ratio.ratio(hits(g, 40, 0.2)) for name in ("paraphrase", "compression/int4")}
        return {
            "before": hits(g, 40, 0.9).astype(np.float32), "after": hits(g, 40, 0.1).astype(np.float32),
            "no_op": hits(g, 40, 0.9).astype(np.float32), "attacks": rates, "floor": concept_ratio.wilson(1, 40),
            "relearning": erasure.Relearning(erased=[40.0, 50.0, None], never_saw=[41.0, 45.0, 60.0]),
            "curve": [(0.0, 0.1), (10.0, 0.3), (20.0, 0.7)], "rate": 0.9,
        }  # fmt: skip

    def call(before, after, no_op, attacks, floor, relearning, curve, rate):
        told = erasure.verdict(before, after, attacks=attacks, floor=floor, no_op=no_op, relearning=relearning)
        return {"verdict": told, "steps": erasure.steps_to_half(curve, rate), "slow": relearning.no_faster}

    return Subject(inputs=inputs, call=call, samples=along(40, {"before": 0, "after": 0, "no_op": 0}))


def subject_frechet() -> Subject:
    return Subject(
        inputs=lambda g: {
            "reference": rows(g, 24, 3), "generated": rows(g, 20, 3) + 1, "feature_space": "drawn",
            "generator": numpy_generator(g),
        },
        call=frechet.distances,
        samples=along(20, {"generated": 0}),
    )  # fmt: skip


def subject_intervals() -> Subject:
    return Subject(
        inputs=lambda g: {"values": rows(g, 6), "level": 0.9},
        call=lambda values, level: intervals.interval(values, level).as_dict(),
        samples=along(6, {"values": 0}),
    )


def subject_judge() -> Subject:
    def call(judged, truth, rate):
        known = judge.calibrate(judged, truth)
        return {"rate": judge.correct(rate, 50, *known), "agreement": judge.agreement(judged, truth)}

    def inputs(g):
        truth = hits(g, 90)
        wrong = hits(g, 90, 0.1)
        return {"judged": (truth ^ wrong).astype(np.float32), "truth": truth.astype(np.float32), "rate": 0.4}

    return Subject(inputs=inputs, call=call, samples=along(90, {"judged": 0, "truth": 0}))


def subject_localisation() -> Subject:
    def inputs(g):
        maps = np.abs(rows(g, 4, 3, 3))
        boxes = [[(1.0, 1.0, 4.0, 3.0)], [(0.0, 0.0, 2.0, 2.0), (3.0, 3.0, 6.0, 6.0)]] * 2
        return {"maps": maps, "boxes": boxes}

    return Subject(
        inputs=inputs,
        call=lambda maps, boxes: localisation.localisation(maps, localisation.boxes_as_masks(boxes, 6, 6)),
        samples=along(4, {"maps": 0, "boxes": 0}),
    )


def subject_probes() -> Subject:
    config = probes.ProbeConfig(num_labels=12, num_draws=2, num_neighbours=3)
    labels = np.arange(24) % 3
    return Subject(
        inputs=lambda g: {
            "features": rows(g, 24, 4) + 2 * np.eye(4, dtype=np.float32)[labels], "labels": labels,
            "is_test": np.arange(24) >= 16, "config": config, "seed": 0,
        },
        call=probes.probe,
    )  # fmt: skip


def subject_rank() -> Subject:
    return Subject(
        inputs=lambda g: {"features": torch.randn(12, 4, generator=g)},
        call=rank.directions,
        samples=along(12, {"features": 0}),
    )


def subject_relatedness() -> Subject:
    return Subject(
        inputs=lambda g: {
            "task_features": [rows(g, 9, 3), rows(g, 9, 3) + 3],
            "source_features": [rows(g, 20, 3) + 3, rows(g, 16, 3), rows(g, 16, 3) - 3], "num_centroids": 3,
        },
        call=relatedness.relatedness,
        samples=along(9, {"task_features.*": 0}),
    )  # fmt: skip


def subject_self_bleu() -> Subject:
    def texts(g):
        words = ["river", "branch", "runs", "and", "joins", "the", "water"]
        return [" ".join(words[i] for i in row) for row in torch.randint(7, (6, 9), generator=g).tolist()]

    return Subject(inputs=lambda g: {"texts": texts(g)}, call=self_bleu.self_bleu, samples=along(6, {"texts": 0}))


def subject_semantics() -> Subject:
    def call(selected_experts, clusters, labels, logits, patch_mean, patch_std):
        told = semantics.routing_semantics(selected_experts, clusters, labels)
        return {**told, "pixels": semantics.pixel_routing(logits, patch_mean, patch_std)}

    def inputs(g):
        ids = [torch.randint(3, shape, generator=g).numpy() for shape in ((8, 5), (8,), (8,))]
        ids[0][:, :3] = torch.randint(3, (8, 1), generator=g).numpy()  # three of five: no tie to be broken by number
        names = ("selected_experts", "clusters", "labels")
        more = {"logits": rows(g, 40, 3), "patch_mean": rows(g, 40), "patch_std": np.abs(rows(g, 40))}
        return dict(zip(names, ids, strict=True)) | more

    def renamed(given, order):
        places = np.argsort(order)
        return {**given, "selected_experts": places[given["selected_experts"]], "logits": given["logits"][:, order]}

    return Subject(
        inputs=inputs,
        call=call,
        samples=along(8, {"selected_experts": 0, "clusters": 0, "labels": 0}),
        experts=Reordering(size=3, inputs=renamed, output=lambda result, order: result),
    )


def subject_transfer() -> Subject:
    def inputs(g):
        drawn = {name: 50 + rows(g, 4, 3, 2) for name in ("accuracy", "choose", "report")}
        scores = transfer.TransferScores(
            sources=("a", "b"), tasks=("t", "u"), own=(0, 1), without=50 + rows(g, 4, 2, 2), **drawn
        )
        return {"scores": scores}

    return Subject(inputs=inputs, call=transfer.summarise, samples=along(4, {"scores.[acrw]*": 0}))
