# SPDX-License-Identifier: Apache-2.0
"""Sub-nets of a super-net against plain networks of their size: what holding them all together costs.

One convolution, forward and backward: a path of a split layer joins its blocks to a plain weight, computes, and hands
the gradient back to the blocks. Beside it the plain convolution of the same size (the limit), and the two ways that one
writes first: a full weight of which slices are taken, and a full weight that is masked.
One step: sub-nets learning by SimSiam, one or two of them in a step, with and without distillation, against the plain
model, as many images each.
Extraction: one of 256 sub-nets taken out, against the features of 2,000 images that it is taken out for.
Float32, two threads, batches as given; ratios to the reference of the same round, median over rounds.
"""

from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anabranch.data import patchwork
from anabranch.jobs.transfer.embed import embed
from anabranch.models import resnet
from anabranch.specialize import simsiam
from anabranch.specialize.sdr.channels import Active, Layout, Source, SplitConv2d, Statistics
from anabranch.specialize.sdr.objective import Config as LearningConfig
from anabranch.specialize.sdr.objective import SubnetLearning, grown
from anabranch.specialize.sdr.supernet import Config, grow, supernet
from benchmarks._timing import compare

THREADS = 2
BATCH = 64
CASES = {
    # name: channels of the super-net, of which a path sees a share, groups, pixels a side, bar
    "64 channels, a path sees half, 28 x 28": (64, 3, 28, 1.05),
    "256 channels, a path sees a quarter, 7 x 7": (256, 7, 7, 1.25),
}
BARS = {"one of 16 sub-nets a step": 1.15, "two of 16 sub-nets a step": 1.15}
EXTRACTION_BAR = {"extraction": 0.5}
"""Forward passes dominate."""


def split_conv(layout: Layout) -> tuple[SplitConv2d, nn.Conv2d]:
    plain = nn.Conv2d(layout.channels, layout.channels, 3, padding=1, bias=False)
    paths = tuple((g,) for g in range(layout.groups))
    source = Source(lambda name, path: plain.weight, lambda name, path: plain.weight, no_statistics, paths)
    return SplitConv2d(plain, "conv", layout, layout, source, Active(path=(1,), row=0)), plain


def no_statistics(name: str, layout: Layout) -> Statistics:
    raise AssertionError("a convolution has none")


def convolution(width: int, groups: int, side: int) -> dict[str, object]:
    """Half of a path's channels are common: width = common + groups * common."""
    common = width // (groups + 1)
    layout = Layout(2 * common, common, groups, 0)
    split, plain = split_conv(layout)
    full = nn.Parameter(torch.randn(width, width, 3, 3) / width)
    mine = torch.cat([torch.arange(common), torch.arange(2 * common, 3 * common)])
    mask = torch.zeros(width, width, 1, 1)
    mask[mine[:, None], mine] = 1
    x = torch.randn(BATCH, 2 * common, side, side, requires_grad=True)
    x_full = torch.randn(BATCH, width, side, side, requires_grad=True)

    def run(output: Tensor, *leaves: Tensor) -> None:
        output.sum().backward()
        for leaf in leaves:
            leaf.grad = None

    return {
        "plain": lambda: run(plain(x), x, plain.weight),
        "sub-net": lambda: run(split(x), x, *split.parameters()),
        "full weight, indexed": lambda: run(F.conv2d(x, full[mine][:, mine], padding=1), x, full),
        "full weight, masked": lambda: run(F.conv2d(x_full, full * mask, padding=1), x_full, full),
    }


def step(preset: str) -> dict[str, object]:
    """One training step without the optimiser: forward and backward of 64 images in two views."""
    model = resnet.build(preset, image_size=28, channels=1, seed=0).train()
    plain = simsiam.objective(model, seed=0).train()
    views = {f"view{i}": torch.randint(0, 256, (BATCH, 1, 28, 28)).to(torch.uint8) for i in (1, 2)}
    batch = views | {"row": torch.arange(BATCH), "step": torch.zeros(BATCH, dtype=torch.int64)}

    def of_paths(*rows: int) -> dict[str, Tensor]:
        turns = torch.tensor(rows)
        return batch | {"path": turns.repeat_interleave(BATCH // len(rows)), "turns": turns.expand(BATCH, -1)}

    def learning(kd_coef: float) -> SubnetLearning:
        net = supernet(model, Config(groups=4))
        before = SubnetLearning(net, plain.projector, plain.predictor, LearningConfig(kd_coef=kd_coef), 1)
        return grown(before, [(0, 0, *digits) for digits in product(range(4), repeat=2)], 2, 100).train()

    def run(objective: nn.Module, given: dict[str, Tensor]) -> None:
        objective(given)["loss"].backward()
        objective.zero_grad(set_to_none=True)

    without, with_teacher, one, two = learning(0.0), learning(1.0), of_paths(5), of_paths(5, 10)
    return {
        "plain": lambda: run(plain, batch),
        "one of 16 sub-nets a step": lambda: run(without, one),
        "two of 16 sub-nets a step": lambda: run(without, two),
        "one of 16 sub-nets a step, distilled": lambda: run(with_teacher, one),
        "two of 16 sub-nets a step, distilled": lambda: run(with_teacher, two),
    }


def extraction() -> dict[str, object]:
    """A sub-net of the tiny ResNet with all four stages split into four groups."""
    net = supernet(resnet.build("tiny", image_size=28, channels=1, seed=0), Config(groups=4))
    net = grow(net, list(product(range(4), repeat=4)), 4)
    images = patchwork.load("garments").take(torch.arange(2000))
    model = net.extract(0)
    return {"features": lambda: embed(model, images), "extraction": lambda: net.extract(100)}


def show(title: str, cases: dict[str, object], bars: dict[str, float]) -> None:
    print(f"\n{title}")
    for name, found in compare(cases, next(iter(cases)), rounds=9).items():  # type: ignore[arg-type]
        bar = f"bar <= {bars[name]:.2f}: {'met' if found.median <= bars[name] else 'MISSED'}" if name in bars else ""
        print(f"  {name:<40} {found.median:.2f} x {1000 * found.seconds:9.1f} ms  {bar}")


def main() -> None:
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    print(f"sub-nets: {BATCH} images, float32, {THREADS} threads, forward and backward")
    for name, (width, groups, side, bar) in CASES.items():
        show(name, convolution(width, groups, side), {"sub-net": bar})
    for preset in ("tiny", "small"):
        show(f"one step of the {preset} ResNet, 28 x 28", step(preset), BARS)
    show("256 sub-nets: taking one out, against its features of 2,000 images", extraction(), EXTRACTION_BAR)


if __name__ == "__main__":
    main()
