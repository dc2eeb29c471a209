# SPDX-License-Identifier: Apache-2.0
"""How what is measured of experts is exercised."""

import torch

from anabranch.measure.experts import (
    domain_specialisation,
    local_consistency,
    shadow,
    signatures,
)
from anabranch.testing import Subject
from tests.measure.experts import drawn


def subject_domain_specialisation() -> Subject:
    def call(stats, generator):
        return {
            "specialisation": domain_specialisation.specialisation(stats),
            "entropy": domain_specialisation.load_entropy(stats),
            "divergence": domain_specialisation.divergence(stats),
            "overlap": domain_specialisation.overlap(stats, 2),
            "together": domain_specialisation.co_activation(stats, "one"),
            "information": domain_specialisation.information(stats, num_permutations=20, generator=generator),
        }

    def reordered(result, order):
        specialisation, together = result["specialisation"][:, order], result["together"][:, order][..., order]
        return {**result, "specialisation": specialisation, "together": together}

    return Subject(
        inputs=lambda g: {"stats": drawn.stats(g), "generator": g},
        call=call,
        samples=drawn.of(
            drawn.FOLDS,
            drawn.stats_of_folds,
            "stats",
            compared=lambda result: result | {"information": result["information"].corrected},
        ),
        experts=drawn.of(drawn.EXPERTS, drawn.stats_of_experts, "stats", output=reordered),
    )


def subject_local_consistency() -> Subject:
    def call(trace, generator, cache_factor):
        whole = local_consistency.srp(trace, 4, num_resamples=20, generator=generator)
        cached = local_consistency.sch(trace, 4, cache_factor, num_resamples=20, generator=generator)
        return {"srp": vars(whole), "sch": vars(cached)}

    def reordered(result, order):
        return {**result, "srp": {**result["srp"], "by_expert": result["srp"]["by_expert"][:, order]}}

    return Subject(
        inputs=lambda g: {"trace": drawn.trace(g), "generator": g, "cache_factor": 1.5},
        call=call,
        samples=drawn.of(
            5,
            drawn.trace_of_documents,
            "trace",
            compared=lambda result: [{**one, "low": 0.0, "high": 0.0} for one in result.values()],
        ),
        experts=drawn.of(drawn.EXPERTS, drawn.trace_of_experts, "trace", output=reordered),
    )


def subject_shadow() -> Subject:
    config = shadow.Config(hidden_size=16, num_layers=1, num_experts=4, length=12, num_steps=2, num_folds=2)

    def texts(g, count=6):
        return ["".join(map(chr, row)) for row in torch.randint(97, 123, (count, 16), generator=g).tolist()]

    return Subject(
        inputs=lambda g: {
            "suspect": texts(g), "teacher": texts(g), "unrelated": [texts(g), texts(g)],
            "probes": {"one": texts(g, 4), "other": texts(g, 4)}, "config": config,
        },
        call=shadow.compare,
    )  # fmt: skip


def subject_signatures() -> Subject:
    return Subject(
        inputs=lambda g: {
            "suspect": drawn.stats(g), "teacher": drawn.stats(g), "unrelated": [drawn.stats(g), drawn.stats(g)],
        },
        call=signatures.verdict,
        samples=drawn.of(drawn.FOLDS, drawn.stats_of_folds, "suspect"),
        experts=drawn.of(drawn.EXPERTS, drawn.stats_of_experts, "suspect"),
    )  # fmt: skip
