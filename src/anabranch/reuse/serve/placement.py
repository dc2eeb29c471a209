# SPDX-License-Identifier: Apache-2.0
"""Least-loaded expert parallelism, planned: which device runs which tokens of which expert, and what that would cost.

Paper     : LLEP (arXiv 2601.17111) and its released code.
Equation  : if max_d native_d < threshold * total / P: every expert stays with its owner; else
            cap = max(floor(factor * total / P), ceil(total / P)),  load_d = assigned_d + pending_d;
            experts by falling tokens: the owner takes min(tokens, cap - load_owner), the rest goes in chunks of
            min(rest, cap - load_d) to the least loaded device, which gets the expert's matrices with its first chunk
Shapes    : N experts, P devices, n_e tokens of expert e (token-expert pairs); chunk [start, stop) of 0 .. n_e.
Differs   : cap is never below an equal share, which the released code's double rounding down can be. Where no device
            has room for min_chunk, the released code hands all the rest to one device, however much it is; here
            min_chunk at a time goes to the device least loaded by then, so that max_d load_d <= cap + min_chunk - 1.
            Costs are modelled: the slowest device, and the busiest port for the matrices. Traffic of tokens is left
            out, though it grows with a device's load: the native plan looks better here than it is.
Check     : hand-worked plans; every token is placed once; an even load moves nothing; the bound on the load
            (tests/reuse/serve/test_placement.py).
Exempt    : inf (an infinite bandwidth moves in no time); samples, experts (chunks are dealt by the numbers of experts)
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from anabranch.errors import UsageError


class Chunk(NamedTuple):
    """Tokens [start, stop) of an expert, in the order of the batch."""

    expert: int
    device: int
    start: int
    stop: int


@dataclass(frozen=True)
class Plan:
    chunks: tuple[Chunk, ...]
    """By expert, then by start: each expert's tokens without a gap."""
    owner: tuple[int, ...]
    """The device whose parameters an expert's matrices are."""
    num_devices: int
    cap: int

    @property
    def load(self) -> list[int]:
        """Tokens of every device."""
        placed = Counter[int]()
        for chunk in self.chunks:
            placed[chunk.device] += chunk.stop - chunk.start
        return [placed[device] for device in range(self.num_devices)]

    @property
    def transfers(self) -> list[tuple[int, int]]:
        """(expert, device) for all matrices that travel, each once, however many chunks."""
        return sorted({(c.expert, c.device) for c in self.chunks if c.device != self.owner[c.expert]})


@dataclass(frozen=True, kw_only=True)
class Devices:
    """What a plan's modelled cost is made of; measure it or state where it is from."""

    token_seconds: float
    """One token through one expert."""
    expert_bytes: float
    token_bytes: float
    """What one token holds while it is computed."""
    bandwidth: float


class Cost(NamedTuple):
    compute_seconds: float
    transfer_seconds: float
    moved_bytes: float
    peak_bytes: float

    @property
    def seconds(self) -> float:
        """Nothing overlaps."""
        return self.compute_seconds + self.transfer_seconds


def contiguous(num_experts: int, num_devices: int) -> list[int]:
    """The usual owners: experts in their order, as evenly as they go."""
    return [expert * num_devices // num_experts for expert in range(num_experts)]


def balanced(tokens_per_expert: Sequence[int], num_devices: int) -> list[int]:
    """Owners by the load that was seen: the busiest expert first, each to the least loaded device that has room.

    No device owns more than its share of the experts, rounded up: memory is spread as evenly as work allows.
    """
    most = -(-len(tokens_per_expert) // num_devices)
    load, owned, owner = [0] * num_devices, [0] * num_devices, [0] * len(tokens_per_expert)
    for expert in sorted(range(len(owner)), key=lambda e: (-tokens_per_expert[e], e)):
        device = min((d for d in range(num_devices) if owned[d] < most), key=lambda d: (load[d], owned[d], d))
        owner[expert] = device
        load[device] += tokens_per_expert[expert]
        owned[device] += 1
    return owner


def native(tokens_per_expert: Sequence[int], owner: Sequence[int], num_devices: int) -> Plan:
    """Expert parallelism as it is: every expert where it lies."""
    check(tokens_per_expert, owner, num_devices)
    chunks = tuple(Chunk(e, owner[e], 0, n) for e, n in enumerate(tokens_per_expert) if n)
    return Plan(chunks, tuple(owner), num_devices, sum(tokens_per_expert))


def least_loaded(
    tokens_per_expert: Sequence[int], owner: Sequence[int], num_devices: int, *, factor: float = 1.1,
    threshold: float = 1.3, min_chunk: int = 1024,
) -> Plan:  # fmt: skip
    """The paper's plan; the same on every device that knows the counts.

    factor      load that a device may have, in equal shares: 1 or more
    threshold   below this ratio of the highest native load to the mean nothing is moved
    min_chunk   fewer tokens than this travel only if they are all that is left, or if no device has more room
    """
    check(tokens_per_expert, owner, num_devices)
    if factor < 1 or min_chunk < 1:
        raise UsageError(
            "no plan can keep to this", expected="a factor and a min_chunk of at least 1",
            received=f"factor {factor}, min_chunk {min_chunk}",
        )  # fmt: skip
    total, plain = sum(tokens_per_expert), native(tokens_per_expert, owner, num_devices)
    if max(plain.load) * num_devices < threshold * total or not total:
        return plain
    cap = max(int(factor * total / num_devices), -(-total // num_devices))
    load, chunks = plain.load, []
    for expert in sorted(range(len(owner)), key=lambda e: -tokens_per_expert[e]):
        left, home = tokens_per_expert[expert], owner[expert]
        load[home] -= left
        start = 0
        while start < left:
            device, size = home, min(left, cap - load[home])
            if start or size <= 0:
                device, size = next_chunk(load, left - start, cap, min_chunk)
            chunks.append(Chunk(expert, device, start, start + size))
            load[device] += size
            start += size
    return Plan(tuple(merged(chunks)), tuple(owner), num_devices, cap)


def next_chunk(load: Sequence[int], left: int, cap: int, min_chunk: int) -> tuple[int, int]:
    """The least loaded device and what it takes; it has the most room, so no other can take a larger chunk."""
    device = min(range(len(load)), key=lambda d: load[d])
    return device, min(left, max(cap - load[device], min_chunk))


def merged(chunks: Sequence[Chunk]) -> list[Chunk]:
    """Neighbours on one device as one chunk, which forced small ones can be."""
    found: list[Chunk] = []
    for chunk in sorted(chunks, key=lambda c: (c.expert, c.start)):
        if found and found[-1].expert == chunk.expert and found[-1].device == chunk.device:
            found[-1] = found[-1]._replace(stop=chunk.stop)
        else:
            found.append(chunk)
    return found


def cost(plan: Plan, devices: Devices) -> Cost:
    """By the model in the card."""
    arrived = Counter(device for _, device in plan.transfers)
    sent = Counter(plan.owner[expert] for expert, _ in plan.transfers)
    ports = [max(arrived[d], sent[d]) for d in range(plan.num_devices)]
    owned = Counter(plan.owner)
    held = [
        (owned[d] + arrived[d]) * devices.expert_bytes + load * devices.token_bytes
        for d, load in enumerate(plan.load)
    ]  # fmt: skip
    return Cost(
        max(plan.load) * devices.token_seconds, max(ports) * devices.expert_bytes / devices.bandwidth,
        len(plan.transfers) * devices.expert_bytes, max(held),
    )  # fmt: skip


def check(tokens_per_expert: Sequence[int], owner: Sequence[int], num_devices: int) -> None:
    if num_devices < 1 or len(owner) != len(tokens_per_expert) or not all(0 <= d < num_devices for d in owner):
        raise UsageError(
            "these experts have no home", expected=f"{len(tokens_per_expert)} owners of 0 to {num_devices - 1}",
            received=list(owner),
        )  # fmt: skip
    if any(n < 0 for n in tokens_per_expert):
        raise UsageError("an expert has fewer than no tokens", expected="0 or more", received=min(tokens_per_expert))
