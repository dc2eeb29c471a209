# SPDX-License-Identifier: Apache-2.0
"""What a training needs of each process, and what travels: the numbers of docs/scaling.md, by arithmetic.

Equation  : P parameters, all trained, 4 bytes each, W processes. AdamW keeps two moments.
            copies    16 P held (parameters, gradients, two moments); 2 (W - 1) / W 4 P sent a step (all-reduce)
            sharded   16 P / W held, and at work 4 (3 unit + 2 rest): a unit, the next one that is fetched meanwhile,
                      a gradient, and the rest with its own; sent (W - 1) / W 4 (3 units + 2 rest): gathered for the
                      forward, for the backward (units alone: the rest stays), gradients scattered
            experts   16 (rest + experts / W) held; sent 2 (W - 1) / W 4 rest, and 4 ways a layer for the rows:
                      rows x chosen x width x 4 bytes (W - 1) / W each, when choices are spread evenly
            Activations come on top, and are the same under all three for the same rows of a process.
"""

from dataclasses import dataclass

BYTES = 4
HELD = 4
"""Parameter, gradient and two moments."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Parameters of a model by how they are handled."""

    unit: int
    """Of the largest unit of sharding: a block with all its experts."""
    units: int
    """Of all units together."""
    rest: int
    """Of no unit: embeddings, heads."""
    experts: int
    """Among those of the units, of routed experts."""
    layers: int
    """With routed experts."""
    width: int
    chosen: int

    @property
    def total(self) -> int:
        return self.units + self.rest


@dataclass(frozen=True, kw_only=True)
class Need:
    """Of each process, in bytes; `sent` in one step."""

    held: float
    at_work: float
    """Beside what is held, while a unit is computed."""
    sent: float


def linear(size_in: int, size_out: int, bias: bool = True) -> int:
    return size_in * size_out + (size_out if bias else 0)


def transformer_block(width: int, hidden: int) -> int:
    """Of a ViT: four projections, two layers, two norms, all with biases."""
    return 4 * linear(width, width) + linear(width, hidden) + linear(hidden, width) + 4 * width


def vit_mae(
    *, width: int = 768, depth: int = 12, decoder: int = 512, decoder_depth: int = 8, patch: int = 16,
    channels: int = 3, tokens: int = 197, experts: int = 8, expert_layers: int = 2,
) -> Shape:  # fmt: skip
    """A masked autoencoder with cluster-conditional experts in some feed-forward networks.

    Positions are fixed, and counted; the clusters' centroids are no parameters.
    """
    pixels = patch * patch * channels
    block, ffn = transformer_block(width, 4 * width), linear(width, 4 * width) + linear(4 * width, width)
    mixture = block + (experts - 1) * ffn + experts * width if expert_layers else block
    decoders = decoder_depth * transformer_block(decoder, 4 * decoder)
    encoder_rest = linear(pixels, width) + width + tokens * width + 2 * width  # patches, class token, positions, norm
    decoder_rest = linear(width, decoder) + decoder + tokens * decoder + 2 * decoder + linear(decoder, pixels)
    return Shape(
        unit=mixture,
        units=(depth - expert_layers) * block + expert_layers * mixture + decoders,
        rest=encoder_rest + decoder_rest,
        experts=expert_layers * experts * ffn,
        layers=expert_layers,
        width=width,
        chosen=1,
    )


def language_mixture(
    *, width: int = 2048, depth: int = 28, dense_layers: int = 1, dense_hidden: int = 10944, experts: int = 64,
    shared: int = 2, expert_hidden: int = 1408, chosen: int = 6, vocabulary: int = 102_400,
) -> Shape:  # fmt: skip
    """Gated experts beside shared ones, plain attention, the first layers dense, tables of input and output apart."""
    attention = 4 * linear(width, width, bias=False) + 2 * width  # and the two norms of a block
    one = 3 * width * expert_hidden
    mixture = attention + (experts + shared) * one + experts * width
    dense = attention + 3 * width * dense_hidden
    layers = depth - dense_layers
    return Shape(
        unit=max(mixture, dense),
        units=layers * mixture + dense_layers * dense,
        rest=2 * vocabulary * width + width,
        experts=layers * experts * one,
        layers=layers,
        width=width,
        chosen=chosen,
    )


def copies(shape: Shape, world: int) -> Need:
    """Data parallelism: every process has the whole model."""
    return Need(held=HELD * BYTES * shape.total, at_work=0, sent=2 * away(world) * BYTES * shape.total)


def sharded(shape: Shape, world: int) -> Need:
    """`sharding: full`."""
    return Need(
        held=HELD * BYTES * shape.total / world,
        at_work=BYTES * (3 * shape.unit + 2 * shape.rest),
        sent=away(world) * BYTES * (3 * shape.units + 2 * shape.rest),
    )


def expert_parallel(shape: Shape, world: int, rows: int) -> Need:
    """Experts spread over processes, all else in each of them; `rows` are those of a process in a step."""
    common = shape.total - shape.experts
    ways = 4 * shape.layers * rows * shape.chosen * shape.width * BYTES * away(world)
    return Need(
        held=HELD * BYTES * (common + shape.experts / world), at_work=0, sent=2 * away(world) * BYTES * common + ways
    )


def away(world: int) -> float:
    """The share of something evenly spread that lies with others."""
    return (world - 1) / world


def features_bytes(images: int, width: int) -> int:
    """What the first process holds while it fits clusters; each of the others sends its share once."""
    return images * width * BYTES


def main() -> None:
    moce, mixture = vit_mae(), language_mixture()
    told = (
        ("ViT-B/16 autoencoder, 8 experts in 2 blocks, 256 clusters", moce, 50 * 64),
        ("a mixture of 16 B", mixture, 16_384),
    )
    for name, shape, rows in told:
        print(f"{name}: {shape.total:,} parameters, {shape.experts:,} in routed experts; largest unit {shape.unit:,}")
        print(f"  {'':<34}{'held GB':>9}{'at work GB':>12}{'sent GB a step':>16}")
        plans = {"1 process": copies(shape, 1)}
        for world in (8, 64):
            plans[f"{world} processes, copies"] = copies(shape, world)
            plans[f"{world} processes, sharded"] = sharded(shape, world)
            plans[f"{world} processes, expert parallel"] = expert_parallel(shape, world, rows)
        for kind, need in plans.items():
            print(f"  {kind:<34}{need.held / 1e9:>9.2f}{need.at_work / 1e9:>12.2f}{need.sent / 1e9:>16.2f}")
        print(f"  expert parallel: {rows:,} rows a process\n")
    images, width = 1_281_167, 768
    print(f"features of {images:,} images at width {width}: {features_bytes(images, width) / 1e9:.2f} GB in the first")


if __name__ == "__main__":
    main()
