# SPDX-License-Identifier: Apache-2.0
"""What every router, bank and mixture layer has to hold, checked on an instance of yours.

    def test_contract():
        check_router(lambda: Router(MyScore(...)))

Each function raises AssertionError with the sentence that does not hold. Call it with several seeds.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from anabranch.errors import UsageError
from anabranch.mixture.context import Context, route
from anabranch.mixture.experts import Bank, ModuleBank
from anabranch.mixture.layer import Mixture, routings
from anabranch.mixture.losses import balance_loss, entropy, importance_loss, router_z_loss
from anabranch.mixture.routing import GateNoise, Router, Routing

BATCH, LENGTH = 6, 5


def check_router(make_router: Callable[[], Router], *, hidden_size: int = 8, seed: int = 0) -> None:
    """`hidden_size`: width of the tokens the router scores, if it scores tokens."""
    generator = torch.Generator().manual_seed(seed)
    router = make_router()
    x_BND = torch.randn(BATCH, LENGTH, hidden_size, generator=generator)
    context = context_for(router, generator, seed)
    check_record(decide(router, x_BND, context))
    check_independence(router, x_BND, context)
    check_noise(router, x_BND, context)
    check_adjustments(router, x_BND, context)
    check_padding(router, x_BND, context)
    check_permuted_router(router, x_BND, context, generator)


def check_bank(make_bank: Callable[[], Bank], rows: Tensor, *, seed: int = 0) -> None:
    """`rows`: at least 4 inputs the experts take, first dimension rows."""
    bank, generator = make_bank(), torch.Generator().manual_seed(seed)
    experts, sizes = list(range(bank.num_experts)), split(len(rows), bank.num_experts)
    with torch.no_grad():
        parts = [bank.run(e, part) for e, part in zip(experts, torch.split(rows, sizes), strict=True) if len(part)]
        used = [e for e, size in zip(experts, sizes, strict=True) if size]
        together = bank.run_sorted(rows, used, [size for size in sizes if size])
        assert torch.allclose(together, torch.cat(parts), atol=1e-5), "sorted groups differ from one expert at a time"
        order = torch.randperm(bank.num_experts, generator=generator).tolist()
        for new, old in enumerate(order):
            assert torch.equal(bank.permute(order).run(new, rows), bank.run(old, rows)), "permuting changes an expert"
            merged = bank.merge(torch.eye(bank.num_experts)[order])
            assert torch.equal(merged.run(new, rows), bank.run(old, rows)), "a one-hot merge is not that expert"
        check_growth(bank, rows, seed)
    check_untouched_experts(bank, rows)


def check_mixture(make_mixture: Callable[[], Mixture], hidden_states: Tensor, *, seed: int = 0) -> None:
    """`hidden_states` (B, N, D) for the layer."""
    layer, generator = make_mixture().eval(), torch.Generator().manual_seed(seed)
    ids = context_for(layer.router, generator, seed, len(hidden_states)).ids
    order = torch.randperm(len(hidden_states), generator=generator)
    y = forward(layer, hidden_states, ids)
    assert torch.allclose(y, slow_mixture(layer, hidden_states, ids), atol=1e-5), "differs from a loop over the rows"
    shuffled = forward(layer, hidden_states[order], {key: values[order] for key, values in ids.items()})
    assert torch.allclose(shuffled, y[order], atol=1e-5), "a sample's output depends on its place in the batch"
    assert torch.equal(forward(copy.deepcopy(layer), hidden_states, ids), y), "a copy computes something else"
    experts = torch.randperm(layer.bank.num_experts, generator=generator).tolist()
    permuted = Mixture(layer.router.take(experts), layer.bank.permute(experts), universal=layer.universal).eval()
    assert torch.allclose(forward(permuted, hidden_states, ids), y, atol=1e-5), "permuted experts give another output"
    if layer.router.per == "sample":
        check_context_errors(layer, hidden_states, ids)


def context_for(router: Router, generator: torch.Generator, seed: int, batch: int = BATCH) -> Context:
    ids = {}
    if router.per == "sample":
        ids[str(router.score.key)] = torch.randint(len(router.score()), (batch,), generator=generator)
    return Context(ids=ids, generator=torch.Generator().manual_seed(seed))


def decide(router: Router, x_BND: Tensor, context: Context, *, training: bool = False) -> Routing:
    """The router's decision inside a layer, with a generator that starts afresh."""
    seed = None if context.generator is None else context.generator.initial_seed()
    fresh = Context(
        ids=context.ids,
        training=training,
        generator=None if seed is None else torch.Generator().manual_seed(seed),
        rows=context.rows,
        batch=context.batch,
        mask=context.mask,
    )
    layer = Mixture(router, ModuleBank(torch.nn.Identity() for _ in range(router.num_experts)))
    with torch.no_grad(), route(layer, fresh):
        layer(x_BND)
        return routings(layer)[""]


def same(left: Routing, right: Routing, atol: float = 0.0) -> bool:
    """`atol`: matrix products of other shapes round otherwise."""
    close = all(torch.allclose(a, b, rtol=0, atol=atol) for a, b in zip(left[:4], right[:4], strict=True))
    return close and torch.equal(left.selected_experts, right.selected_experts)


def check_record(routing: Routing) -> None:
    logits, scores, selected, weights = routing[:4]
    assert logits.dtype == scores.dtype == weights.dtype == torch.float32, "routing is not computed in fp32"
    assert scores.shape == logits.shape, "as many scores as logits"
    assert selected.shape == weights.shape, "as many weights as selected experts"
    assert ((selected >= 0) & (selected < logits.shape[1])).all(), "an expert that does not exist is selected"
    assert (routing.choices().sum(1) == selected.shape[1]).all(), "a row selects an expert twice"
    assert scores.isfinite().all(), "scores are not finite"
    assert weights.isfinite().all(), "weights are not finite"


def check_independence(router: Router, x_BND: Tensor, context: Context) -> None:
    whole = decide(router, x_BND, context)
    assert same(whole, decide(router, x_BND, context)), "eval is not deterministic"
    half, per = BATCH // 2, len(whole.scores) // BATCH
    part = decide(router, x_BND[:half], Context(ids={key: ids[:half] for key, ids in context.ids.items()}))
    assert same(part, whole.rows(torch.arange(half * per)), 1e-5), "a sample's routing depends on the rest of the batch"


def check_noise(router: Router, x_BND: Tensor, context: Context) -> None:
    before = torch.get_rng_state()
    noisy = decide(router, x_BND, context, training=True)
    assert torch.equal(before, torch.get_rng_state()), "the global generator was used"
    assert same(noisy, decide(router, x_BND, context, training=True)), "one generator state gives two routings"
    half, per = BATCH // 2, len(noisy.scores) // BATCH
    for rows in (torch.arange(half), torch.arange(half, BATCH)):
        ids = {key: values[rows] for key, values in context.ids.items()}
        share = Context(ids=ids, generator=context.generator, rows=rows, batch=BATCH)
        index = (rows[:, None] * per + torch.arange(per)).flatten()
        agrees = same(decide(router, x_BND[rows], share, training=True), noisy.rows(index), 1e-5)
        assert agrees, "a process with half of the batch draws other noise"
    quiet = copy.deepcopy(router)
    for stage in quiet.adjust:
        if isinstance(stage, GateNoise):
            stage.std = 0.0
    plain = decide(router, x_BND, context)
    assert same(decide(quiet, x_BND, context, training=True), plain), "noise of strength 0 is not the plain router"


def check_adjustments(router: Router, x_BND: Tensor, context: Context) -> None:
    if not any(stage.reweighs for stage in router.adjust):
        routing = decide(router, x_BND, context)
        plain = router.weigh(routing.router_logits / router.temperature, routing.selected_experts)
        assert torch.equal(plain, routing.routing_weights), "an adjustment changes weights without declaring `reweighs`"


def check_padding(router: Router, x_BND: Tensor, context: Context) -> None:
    if router.per == "sample":
        return
    padded_BND = torch.cat([x_BND, torch.full_like(x_BND[:, :2], 7.0)], dim=1)
    mask = torch.arange(LENGTH + 2).expand(BATCH, -1) < LENGTH
    plain, padded = decide(router, x_BND, context), decide(router, padded_BND, Context(mask=mask))
    assert same(plain, padded.rows(mask.flatten().nonzero()[:, 0]), 1e-5), "padding changes the routing of a real token"
    for loss in (importance_loss, balance_loss, lambda r: balance_loss(r, "sequence"), router_z_loss, entropy):
        assert torch.allclose(loss(plain), loss(padded), atol=1e-5), "padding changes a loss"


def check_permuted_router(router: Router, x_BND: Tensor, context: Context, generator: torch.Generator) -> None:
    order = torch.randperm(router.num_experts, generator=generator)
    plain = decide(router, x_BND, context)
    permuted = decide(router.take(order.tolist()), x_BND, context)
    assert torch.allclose(plain.router_logits[:, order], permuted.router_logits, atol=1e-6), "logits move with experts"
    renamed = order[permuted.selected_experts]
    assert torch.equal(renamed, plain.selected_experts), "permuted experts are chosen differently"
    assert torch.allclose(permuted.routing_weights, plain.routing_weights, atol=1e-6), "permuting changes weights"


def check_growth(bank: Bank, rows: Tensor, seed: int) -> None:
    before = torch.get_rng_state()
    first, second = (bank.grow([0], noise=1e-2, generator=torch.Generator().manual_seed(seed)) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state()), "the global generator was used"
    for expert in range(bank.num_experts):
        assert torch.equal(first.run(expert, rows), bank.run(expert, rows)), "growing changes an old expert"
    grown = first.run(bank.num_experts, rows)
    assert torch.equal(grown, second.run(bank.num_experts, rows)), "growing is not reproducible"
    assert not torch.equal(grown, bank.run(0, rows)), "the grown expert is an exact copy in spite of noise"


def check_untouched_experts(bank: Bank, rows: Tensor) -> None:
    """A step with weight decay leaves experts alone that are frozen or received no row."""
    if not isinstance(bank, ModuleBank) or bank.num_experts < 3:
        return
    bank.freeze([1])
    before = [copy.deepcopy(bank.tensors(expert)) for expert in range(bank.num_experts)]
    optimizer = torch.optim.AdamW(bank.parameters(), lr=0.1, weight_decay=0.5)
    bank.run_sorted(rows, [0, 1], [len(rows) // 2, len(rows) - len(rows) // 2]).square().sum().backward()
    optimizer.step()
    for expert, tensors in enumerate(before):
        moved = not all(torch.equal(bank.tensors(expert)[name], tensor) for name, tensor in tensors.items())
        assert moved == (expert == 0), f"expert {expert}: {'changed' if moved else 'did not learn'}"


def check_context_errors(layer: Mixture, hidden_states: Tensor, ids: dict[str, Tensor]) -> None:
    short = {key: values[:-1] for key, values in ids.items()}
    for attempt in (lambda: layer(hidden_states), lambda: forward(layer, hidden_states, short)):
        try:
            attempt()
        except UsageError:
            continue
        raise AssertionError("a forward without ids for its samples went through")


def forward(layer: Mixture, hidden_states: Tensor, ids: dict[str, Tensor]) -> Tensor:
    with torch.no_grad(), route(layer, Context(ids=ids)):
        return layer(hidden_states)


def slow_mixture(layer: Mixture, hidden_states: Tensor, ids: dict[str, Tensor]) -> Tensor:
    """sum_k w_k E_{i_k}(x), row by row."""
    forward(layer, hidden_states, ids)
    routing = routings(layer)[""]
    rows = hidden_states if routing.per == "sample" else hidden_states.flatten(0, 1)
    outputs = []
    for row, selected, weights in zip(rows, routing.selected_experts, routing.routing_weights, strict=True):
        with torch.no_grad():
            parts = [w * layer.bank.run(int(e), row[None])[0] for e, w in zip(selected, weights, strict=True)]
            rest = 0 if layer.universal is None else (1 - weights.sum()) * layer.universal(row[None])[0]
        outputs.append(sum(parts) + rest)
    stacked = torch.stack(outputs)
    return stacked if routing.per == "sample" else stacked.view(*hidden_states.shape[:-1], -1)


def split(total: int, parts: int) -> list[int]:
    """Uneven group sizes that sum to `total`; later groups may be empty."""
    sizes = [max(total // 2, 1)]
    while len(sizes) < parts - 1:
        sizes.append((total - sum(sizes)) // 2)
    return [*sizes, total - sum(sizes)][:parts] if parts > 1 else [total]
