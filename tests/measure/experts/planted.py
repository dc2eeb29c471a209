# SPDX-License-Identifier: Apache-2.0
"""A tiny mixture in which one expert alone serves one domain, and its control, in which nothing tells it apart.

Shapes    : B documents, S tokens, D width.

Words of the two domains lie on the two sides of a direction u of the embedding that no router looks at, except that,
where it is planted, the row of one expert is u itself: it is chosen for every word of its domain and for no other, and
puts out more than the rest. In the control its row and its size are as drawn: any rank is as likely as any other.
"""

from dataclasses import dataclass
from typing import Any

import torch

from anabranch.measure.experts.ranking.batches import Batch
from anabranch.models.mixtures.bank import ExpertBank
from anabranch.models.mixtures.families import tiny
from anabranch.models.mixtures.layers import open_layers

OWN, OTHER = "own", "other"
LABELS = (OWN, OTHER)
WORDS = {OWN: range(10, 50), OTHER: range(50, 90)}
FOLDS = 2


@dataclass(frozen=True, eq=False)
class World:
    model: Any
    batches: tuple[Batch, ...]
    layer: int
    expert: int
    """The one that is planted; in the control, the one that would have been."""


def documents(generator, count: int = 12, length: int = 12, mixed: bool = False) -> Batch:
    """Half of the documents of each domain, some of them padded; or every word drawn from either domain."""
    labels_BS = torch.arange(count)[:, None].remainder(2).expand(count, length)
    if mixed:
        labels_BS = torch.randint(0, 2, (count, length), generator=generator)
    words_BS = torch.randint(0, 40, (count, length), generator=generator)
    lengths_B = torch.randint(length // 2, length + 1, (count,), generator=generator)
    mask_BS = (torch.arange(length) < lengths_B[:, None]).long()
    input_ids = (words_BS + 10 + 40 * labels_BS) * mask_BS
    return Batch(input_ids, mask_BS, labels_BS.contiguous(), torch.arange(count) // 2 % FOLDS)


@torch.no_grad()
def world(seed: int, planted: bool = True, family: str = "OLMoE", mixed: bool = False) -> World:
    generator = torch.Generator().manual_seed(seed)
    model = tiny(family, seed)
    layers = open_layers(model)
    layer = int(torch.randint(len(layers), (), generator=generator))
    expert = int(torch.randint(layers[layer].num_experts, (), generator=generator))
    embedding_VD = model.get_input_embeddings().weight
    u_D = torch.nn.functional.normalize(torch.randn(embedding_VD.shape[1], generator=generator), dim=0)
    embedding_VD -= (embedding_VD @ u_D)[:, None] * u_D
    for label, side in ((OWN, 4.0), (OTHER, -4.0)):
        embedding_VD[list(WORDS[label])] += side * u_D
    if mixed:
        embedding_VD[list(WORDS[OTHER])] *= 0.05  # common words say little: the loss hardly depends on what they are
    for each in layers:
        each.router.weight -= (each.router.weight @ u_D)[:, None] * u_D
    if planted:
        layers[layer].router.weight[expert] = 3 * u_D
        ExpertBank(layers[layer])[expert].down.mul_(8)
    return World(model, tuple(documents(generator, mixed=mixed) for _ in range(2)), layer, expert)


def place(scores_LN: torch.Tensor, world: World) -> float:
    """Share of all other experts of the model that are ranked above the one asked for: 0 is first; ties count half."""
    own = scores_LN[world.layer, world.expert]
    above = (scores_LN > own).sum() + 0.5 * ((scores_LN == own).sum() - 1)
    return float(above) / (scores_LN.numel() - 1)


KEYS, QUERY, COPIES = 6, 3, slice(10, 16)
"""Number of keys, the word that asks for the key, and the words that are keys."""


@torch.no_grad()
def copier(seed: int, planted: bool = True) -> World:
    """One layer that attends to all words alike; one expert alone turns the key that it finds there into the answer.

    Coordinates of the stream: 0-5 the key of the word itself, 6-11 of the context, 12-17 the answer, 18 is always 2,
    the rest what words look like besides, also mixed. The router is drawn near uniform and does not look at the keys.
    Experts that do not copy write a little noise into the answer; in the control these are all.
    """
    generator = torch.Generator().manual_seed(seed)
    model = tiny("Mixtral", seed, num_hidden_layers=1, num_local_experts=8, num_key_value_heads=4)
    (layer,) = open_layers(model)
    expert = int(torch.randint(layer.num_experts, (), generator=generator))
    own, context, answer, one = slice(0, 6), slice(6, 12), slice(12, 18), 18
    eye = torch.eye(KEYS)
    embedding_VD, head_VD = model.get_input_embeddings().weight, model.lm_head.weight
    embedding_VD[:, : one + 1] = 0
    embedding_VD[COPIES, own] = 4 * eye
    embedding_VD[:, one] = 2
    embedding_VD[QUERY, one + 1 :] = 0  # so that what the router sees at the question depends on the document
    head_VD[:, :] = 0
    head_VD[COPIES, answer] = 4 * eye
    attention = model.model.layers[0].self_attn
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
        projection.weight.zero_()
    attention.v_proj.weight[:KEYS, own] = eye
    attention.o_proj.weight[context, :KEYS] = 4 * eye
    attention.v_proj.weight[8:16, one + 1 :] = torch.randn(8, 13, generator=generator)
    attention.o_proj.weight[one + 1 :, 8:16] = torch.randn(13, 8, generator=generator)
    layer.router.weight.mul_(0.05)[:, :one] = 0
    bank = ExpertBank(layer)
    for e in range(len(bank)):
        bank[e].down[answer] *= 0.2
    if planted:
        copying = bank[expert]
        for matrix in (copying.gate, copying.up, copying.down):
            matrix.zero_()
        copying.gate[:KEYS, one] = 3
        copying.up[:KEYS, context] = eye
        copying.down[answer, :KEYS] = 4 * eye
    return World(model, (questions(generator),), 0, expert)


def questions(generator, count: int = 48, length: int = 6) -> Batch:
    """Filler words with a key among them, the question, and the key again as the answer."""
    input_ids = torch.randint(30, 90, (count, length), generator=generator)
    keys_B = torch.randint(KEYS, (count,), generator=generator) + COPIES.start
    input_ids[torch.arange(count), torch.randint(length - 2, (count,), generator=generator)] = keys_B
    input_ids[:, -2], input_ids[:, -1] = QUERY, keys_B
    answers = torch.zeros(count, length, dtype=torch.bool)
    answers[:, -1] = True
    labels = torch.zeros(count, length, dtype=torch.int64)
    return Batch(input_ids, torch.ones_like(labels), labels, torch.arange(count) % FOLDS, answers)
