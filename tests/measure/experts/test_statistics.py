# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from safetensors.torch import save_file

from anabranch.errors import AnabranchError, UsageError
from anabranch.measure.experts.statistics import MAXIMA, OUTPUTS, RESIDUAL, ROUTING, Collector, ExpertStats
from anabranch.models.mixtures.bank import ExpertBank
from anabranch.models.mixtures.families import tiny
from anabranch.models.mixtures.layers import mixture_layers
from anabranch.models.mixtures.routing import changed, off_empty, watched

D, F, N = 3, 2, 8
LENGTHS = (7, 4, 6, 1, 5)
FOLDS = torch.tensor([0, 1, 1, 0, 1])


def documents(seed=0):
    """Five documents, padded on the right: ids, labels of tokens (-1: of none), mask."""
    generator = torch.Generator().manual_seed(seed)
    ids_BS = torch.randint(3, 97, (5, 7), generator=generator)
    mask_BS = (torch.arange(7) < torch.tensor(LENGTHS)[:, None]).long()
    labels_BS = torch.randint(-1, D, (5, 7), generator=generator)
    return ids_BS, labels_BS, mask_BS


def collect(model, batches, **options):
    collector = Collector(model, mixture_layers(model), ["a", "b", "c"], num_folds=F, **options)
    for ids_BS, labels_BS, mask_BS, folds_B in batches:
        with collector.collecting(labels_BS, folds_B, mask_BS), torch.no_grad():
            model(ids_BS, attention_mask=mask_BS)
    return collector.stats


def whole(seed=0):
    return [(*documents(seed), FOLDS)]


def slow(model, layers, ids_BS, labels_BS, mask_BS, folds_B):
    """Every sum by loops over documents, tokens and slots, from the definition."""
    names = (*ROUTING, *OUTPUTS, *RESIDUAL, *MAXIMA)
    L = len(layers)
    sums = {name: torch.zeros(D, F, L, N).double() for name in names}
    tokens, seen_documents = torch.zeros(D, F).double(), torch.zeros(D, F).double()
    pairs = torch.zeros(D, L, N, N).double()
    for b, length in enumerate(LENGTHS):
        taken, ids = {}, ids_BS[b : b + 1, :length]  # alone and without padding
        with watched(layers, lambda one, taken=taken: taken.__setitem__(one.layer.name, one), residual=True,
                     model=model), torch.no_grad():  # fmt: skip
            model(ids)
        f = int(folds_B[b])
        for d in range(D):
            seen_documents[d, f] += float((labels_BS[b, :length] == d).any())
        for t in range(length):
            d = int(labels_BS[b, t])
            if d < 0:
                continue
            tokens[d, f] += 1
            for i, layer in enumerate(layers):
                one, bank = taken[layer.name], ExpertBank(layer)
                z = one.triple.router_logits[t].double()
                sums["logit"][d, f, i] += z
                sums["logit_square"][d, f, i] += z**2
                sums["probability"][d, f, i] += z.exp() / z.exp().sum()
                chosen = one.triple.selected_experts[t].tolist()
                weights = one.triple.routing_weights[t].double().tolist()
                h, o = one.residual[t].double(), one.routed[t].double()
                turn = 1 - float(h @ (h + o)) / float(h.norm() * (h + o).norm())
                for e, g in zip(chosen, weights, strict=True):
                    out = bank.run(e, one.hidden_states[t : t + 1])[0]
                    norm, share = math.sqrt(sum(float(v) ** 2 for v in out)), g / sum(weights)
                    values = {
                        "count": 1, "weight": g, "weight_square": g * g, "share": share, "document_rate": 1 / length,
                        "norm": norm, "weighted_norm": g * norm, "share_norm": share * norm,
                        "turn": g * norm * max(turn, 0),
                    }  # fmt: skip
                    for name, value in values.items():
                        sums[name][d, f, i, e] += value
                    peak = max(abs(float(v)) for v in out)
                    sums["peak"][d, f, i, e] = max(sums["peak"][d, f, i, e], peak)
                    for other in chosen:
                        pairs[d, i, e, other] += 1
    return sums, tokens, seen_documents, pairs


@pytest.mark.parametrize("family", ["OLMoE", "DeepSeek-V3"])
def test_every_sum_is_its_slow_loop(family):
    model = tiny(family)
    layers, batch = mixture_layers(model), whole()
    stats = collect(model, batch, residual=True)
    sums, tokens, seen_documents, pairs = slow(model, layers, *batch[0])
    assert set(stats.sums) == set(sums)
    for name, expected in sums.items():
        assert torch.allclose(stats[name], expected, rtol=1e-4, atol=1e-5), name
    assert torch.equal(stats["count"], sums["count"])
    assert torch.equal(stats.tokens, tokens)
    assert torch.equal(stats.documents, seen_documents)
    assert torch.equal(stats.pairs, pairs)


def test_identities_of_the_sums():
    stats = collect(tiny("Qwen2-MoE"), whole(), outputs=True)
    tokens_DFL1 = stats.tokens[:, :, None, None].expand(-1, -1, 3, 1)
    for name, per_token in (("count", 2), ("share", 1), ("probability", 1)):
        assert torch.allclose(stats[name].sum(-1, keepdim=True), tokens_DFL1 * per_token), name
    assert (stats["weight"].sum(-1, keepdim=True) < tokens_DFL1.clamp(min=1e-9)).all()  # this family leaves a rest
    assert torch.equal(stats.pairs.diagonal(dim1=-2, dim2=-1), stats["count"].sum(1))
    assert torch.equal(stats.pairs.sum(-1), stats["count"].sum(1) * 2)
    assert (stats["peak"] <= stats["norm"] + 1e-6).all()


def split(batch):
    ids, labels, mask, folds = batch
    return [(ids[rows], labels[rows], mask[rows], folds[rows]) for rows in (slice(0, 2), slice(2, 3), slice(3, 5))]


def close(left, right):
    assert left.header() == right.header()
    assert set(left.sums) == set(right.sums)
    for name in left.sums:
        assert torch.allclose(left[name], right[name], rtol=1e-5, atol=1e-6), name
    assert torch.equal(left["count"], right["count"])
    for name in ("tokens", "documents", "pairs"):
        assert torch.equal(getattr(left, name), getattr(right, name)), name


def test_merged_shards_equal_one_pass():
    model = tiny("Mixtral")
    once = collect(model, whole(), outputs=True)
    close(collect(model, split(whole()[0]), outputs=True), once)
    shards = [collect(model, [part], outputs=True) for part in split(whole()[0])]
    empty = collect(model, [], outputs=True)
    close(empty.merge(shards[2]).merge(shards[0]).merge(shards[1]), once)


def test_merging_takes_over_no_memory_of_the_other():
    model = tiny("Mixtral")
    other = collect(model, whole())
    before = other["count"].clone()
    collect(model, []).merge(other).merge(other)
    assert torch.equal(other["count"], before)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    model, (ids, labels, mask) = tiny("Qwen3-MoE"), documents()
    once = collect(model, [(ids, labels, mask, FOLDS)], residual=True)
    wide = [torch.full((5, 11), value) for value in (50, 1, 0)]
    for b, length in enumerate(LENGTHS):
        own = slice(0, length) if side == "right" else slice(11 - length, 11)
        for target, value in zip(wide, (ids, labels, mask), strict=True):
            target[b, own] = value[b, :length]
    if side == "left":  # positions start at the first real token
        collector = Collector(model, mixture_layers(model), ["a", "b", "c"], num_folds=F, residual=True)
        positions = (wide[2].cumsum(1) - 1).clamp(min=0)
        with collector.collecting(wide[1], FOLDS, wide[2]), torch.no_grad():
            model(wide[0], attention_mask=wide[2], position_ids=positions)
        close(collector.stats, once)
    else:
        close(collect(model, [(*wide, FOLDS)], residual=True), once)


def test_a_token_of_no_label_is_counted_nowhere():
    ids, labels, mask = documents()
    stats = collect(tiny("Mixtral"), [(ids, torch.full_like(labels, -1), mask, FOLDS)])
    assert stats.tokens.sum() == stats.documents.sum() == stats.pairs.sum() == 0
    assert all(value.sum() == 0 for value in stats.sums.values())


def test_one_label_a_document_may_be_given_as_a_column():
    model, (ids, _, mask) = tiny("Mixtral"), documents()
    column = torch.tensor([0, 1, 2, 0, 1])[:, None]
    close(collect(model, [(ids, column, mask, FOLDS)]), collect(model, [(ids, column.expand(5, 7), mask, FOLDS)]))


def test_memory_does_not_grow_with_the_tokens():
    def size(stats):
        tensors = [*stats.sums.values(), stats.tokens, stats.documents, stats.pairs]
        return sum(value.untyped_storage().nbytes() for value in tensors)

    model = tiny("Mixtral")
    once, often = collect(model, whole(), outputs=True), collect(model, whole() * 6, outputs=True)
    assert size(once) == size(often)
    assert torch.equal(often["count"], once["count"] * 6)


def test_folds_drawn_again_are_what_reading_them_again_gives():
    model, (ids, labels, mask) = tiny("OLMoE"), documents()
    stats = collect(model, [(ids, labels, mask, FOLDS)], outputs=True)
    second = FOLDS == 1
    twice = collect(model, [(ids[second], labels[second], mask[second], FOLDS[second])] * 2, outputs=True)
    again = stats.resampled([1, 1])
    for name in stats.sums:
        for label in "abc":
            assert torch.allclose(again.of(name, label), twice.of(name, label), rtol=1e-5), name
    assert again.num_tokens("b") == twice.num_tokens("b")
    assert torch.equal(again.documents.sum(1), twice.documents.sum(1))
    same = stats.resampled([1, 0])
    assert torch.equal(same.of("count", "a"), stats.of("count", "a"))
    assert torch.equal(same["count"][:, 0], stats["count"][:, 1])


def test_the_experts_are_counted_as_they_were_used():
    """With one of them off, its weight is gone from the sums and its choice is still there."""
    model, (ids, labels, mask) = tiny("Mixtral"), documents()
    off = torch.arange(8) == 2
    with changed(mixture_layers(model), lambda layer, triple: off_empty(triple, off)):
        stats = collect(model, [(ids, labels, mask, FOLDS)])
    assert stats["weight"][..., 2].sum() == 0
    assert stats["count"][..., 2].sum() > 0


# wrong uses


def test_a_label_or_fold_that_there_is_not():
    model, (ids, labels, mask) = tiny("Mixtral"), documents()
    with pytest.raises(UsageError, match="no such fold\n  expected: below 2\n  received: 2"):
        collect(model, [(ids, labels, mask, FOLDS + 1)])
    with pytest.raises(UsageError, match="no such label\n  expected: below 3\n  received: 3"):
        collect(model, [(ids, labels + 1, mask, FOLDS)])


def test_a_pass_that_never_ran_is_an_error():
    model = tiny("Mixtral")
    collector = Collector(model, mixture_layers(model), ["a"], num_folds=F)
    _, labels, mask = documents()
    watching = collector.collecting(labels.clamp(max=0), FOLDS, mask)
    with pytest.raises(AnabranchError, match="3 of 3 mixture layers never ran"), watching:
        pass
    assert collector.stats.tokens.sum() == 0


def empty(**changes):
    values = {"labels": ("a", "b"), "layers": ("x",), "num_experts": 4, "top_k": 2, "num_folds": 2, "model": "m"}
    return ExpertStats(**(values | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "n"}, "statistics of another model can't be merged\n  expected: m\n  received: n"),
        ({"labels": ("b", "a")}, "statistics of another labels can't be merged"),
        ({"layers": ("y",)}, "statistics of another layers"),
        ({"num_experts": 5}, "statistics of another num_experts"),
        ({"num_folds": 3}, "statistics of another num_folds"),
    ],
)
def test_statistics_of_something_else_are_not_merged(changes, message):
    with pytest.raises(UsageError, match=message):
        empty().merge(empty(**changes))


def test_sums_of_a_part_of_the_tokens_are_not_merged():
    """A norm of half of the tokens over the count of all would be half of what it is."""
    model = tiny("Mixtral")
    with pytest.raises(UsageError, match="collected other sums can't be merged"):
        collect(model, whole(), outputs=True).merge(collect(model, whole(1)))


def test_what_was_not_collected_is_named():
    stats = collect(tiny("Mixtral"), whole())
    with pytest.raises(UsageError, match=r"hold no 'norm'[\s\S]*profile again with --outputs"):
        stats["norm"]
    with pytest.raises(UsageError, match=r"hold no 'cuont'[\s\S]*did you mean count"):
        stats["cuont"]
    with pytest.raises(UsageError, match="know no 'd'"):
        stats.of("count", "d")


def test_saved_and_loaded_bit_by_bit(tmp_path):
    stats = collect(tiny("Mixtral"), whole(), outputs=True, fingerprint="f")
    stats.save(tmp_path / "stats.safetensors")
    again = ExpertStats.load(tmp_path / "stats.safetensors")
    assert again.header() == stats.header()
    assert set(again.sums) == set(stats.sums)
    assert all(torch.equal(again[name], value) for name, value in stats.sums.items())
    assert all(torch.equal(getattr(again, name), getattr(stats, name)) for name in ("tokens", "documents", "pairs"))
    assert [file.name for file in tmp_path.iterdir()] == ["stats.safetensors"]


@pytest.mark.parametrize("kept", [0, 5, 300, 0.5, 0.99])
def test_a_torn_file_is_refused(tmp_path, kept):
    file = tmp_path / "stats.safetensors"
    collect(tiny("Mixtral"), whole()).save(file)
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(UsageError, match=r"stats.safetensors cannot be read"):
        ExpertStats.load(file)


def test_files_of_another_kind_are_refused(tmp_path):
    with pytest.raises(UsageError, match="cannot be read"):
        ExpertStats.load(tmp_path / "missing.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(UsageError, match=r"holds no expert statistics[\s\S]*no such header"):
        ExpertStats.load(tmp_path / "weights.safetensors")
