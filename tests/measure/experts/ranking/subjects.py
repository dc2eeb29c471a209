# SPDX-License-Identifier: Apache-2.0
"""How the rankings are exercised: on drawn statistics, or on those that they collect from a small mixture."""

import torch

from anabranch.measure.experts.ranking import (
    dsmoe,
    easy_ep,
    esft_gate,
    esft_token,
    frequency,
    ftri,
    gate_mass,
    random,
    reap,
    rice,
    router_lens,
    seuf,
    steermoe,
    super_experts,
    tcess,
)
from anabranch.testing import Subject
from tests.measure.experts import drawn


def ranking(method, *others: str) -> Subject:
    def reordered_output(result, order):
        return result[:, order]

    return Subject(
        inputs=lambda g: {"stats": drawn.stats(g), "target": "one", "others": others},
        call=method.rank,
        samples=drawn.of(drawn.FOLDS, drawn.stats_of_folds, "stats"),
        experts=drawn.of(drawn.EXPERTS, drawn.stats_of_experts, "stats", output=reordered_output),
    )


def collected(collect, rank, bf16=2e-2, fp16=5e-3) -> Subject:
    """Of a model and its texts; a model of lower precision sends some tokens elsewhere."""
    return Subject(
        inputs=lambda g: {"model": drawn.model(g), "batches": [drawn.batch(g)]},
        call=lambda model, batches: rank(collect(model, batches)),
        pad=lambda given: {**given, "batches": drawn.padded_batch(given["batches"])},
        samples=drawn.of(drawn.DOCUMENTS, drawn.batch_of_documents, "batches"),
        experts=drawn.of(8, drawn.model_of_experts, "model", output=lambda result, order: result[:, order]),
        half={torch.bfloat16: bf16, torch.float16: fp16},
    )


def subject_dsmoe() -> Subject:
    return collected(dsmoe.collect, dsmoe.rank)


def subject_easy_ep() -> Subject:
    return ranking(easy_ep)


def subject_esft_gate() -> Subject:
    return ranking(esft_gate)


def subject_esft_token() -> Subject:
    return ranking(esft_token)


def subject_frequency() -> Subject:
    return ranking(frequency)


def subject_ftri() -> Subject:
    return ranking(ftri, "other")


def subject_gate_mass() -> Subject:
    return ranking(gate_mass)


def subject_random() -> Subject:
    return ranking(random)


def subject_reap() -> Subject:
    return ranking(reap)


def subject_rice() -> Subject:
    return ranking(rice, "other")


def subject_router_lens() -> Subject:
    return collected(
        lambda model, batches: router_lens.collect(model, batches, ("one", "other"), epochs=1, num_folds=2).stats,
        lambda stats: router_lens.rank(stats, "one"),
        bf16=0.15,
        fp16=0.05,
    )


def subject_seuf() -> Subject:
    return collected(
        lambda model, batches: seuf.collect(model, batches, ("one", "other"), num_folds=2),
        lambda stats: seuf.rank(stats, "one"),
    )


def subject_steermoe() -> Subject:
    return ranking(steermoe, "other", "third")


def subject_super_experts() -> Subject:
    return ranking(super_experts)


def subject_tcess() -> Subject:
    return collected(
        lambda model, batches: tcess.collect(model, batches, ("one", "other"), highest=2, num_folds=2),
        lambda stats: tcess.rank(stats, "one"),
        bf16=0.1,
        fp16=0.02,
    )
