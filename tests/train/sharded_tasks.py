# SPDX-License-Identifier: Apache-2.0
"""Every trainer of the loop, small: name to (objective, stream). Fresh ones at each call, the same in every process."""

import torch

from anabranch.data.images import Images, Store
from anabranch.data.streams import ShuffledIndices
from anabranch.models import resnet, vit_mae
from anabranch.specialize import byol, mae, moce, simsiam, token_moe

ROWS = 8
EXACT = ("tiny", "mae", "moce", "blocks", "token-moe", "align", "step-mean", "erase")
"""Equal to one process; the others normalise over the rows of a process: they are compared with copies of the model."""
BATCH_NORM = ("simsiam", "byol", "sdr")


def images():
    pixels = torch.randint(0, 256, (40, 1, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Images(name="noise", store=Store.of(pixels))


def vit():
    model = vit_mae.build("tiny", image_size=28, channels=1, seed=0)
    return model, ShuffledIndices(40, ROWS, 0)


def make(name):
    if name in ("tiny", "mae", "moce", "blocks", "token-moe"):
        return masked(name)
    if name in BATCH_NORM:
        return views(name)
    return erase() if name == "erase" else align(step_mean=name == "step-mean")


def masked(name):
    if name == "tiny":
        from tiny import TinyObjective, TinyStream

        return TinyObjective(dropout=0.0, batch_norm=False), TinyStream(ROWS)
    model, indices = vit()
    cluster = torch.arange(40) % 4
    stream = mae.stream(images(), model, indices, seed=0, cluster=cluster)
    if name == "mae":
        return mae.objective(model, seed=0), stream
    generator = torch.Generator().manual_seed(3)
    if name == "token-moe":
        config = moce.Config(num_experts=3, assignment="gate")
        model = token_moe.insert(model, config, generator)
        return token_moe.TokenRouted(model, config, seed=0, batch_size=ROWS), stream
    config = moce.Config(num_experts=4, assignment="gate", expert_scope="blocks" if name == "blocks" else "ffn")
    centroids = torch.nn.functional.normalize(torch.randn(4, 16, generator=generator), dim=1)
    model = moce.insert(model, centroids, torch.arange(4), config, generator)
    return moce.ClusterConditional(model, config, seed=0, batch_size=ROWS), stream


def views(name):
    if name == "sdr":
        return paths()
    model = resnet.build("tiny", image_size=28, channels=1, seed=0)
    learner = {"simsiam": simsiam, "byol": byol}[name]
    return learner.objective(model, seed=0), learner.stream(images(), model, ShuffledIndices(40, ROWS, 0), seed=0)


def paths():
    from anabranch.specialize.sdr.objective import Config, SubnetLearning, grown
    from anabranch.specialize.sdr.schedule import PathBatches, PathIndices, Rounds
    from anabranch.specialize.sdr.supernet import Config as NetConfig
    from anabranch.specialize.sdr.supernet import supernet

    model = resnet.build("tiny", image_size=28, channels=1, seed=0)
    plain = byol.objective(model, seed=0)
    net = supernet(model, NetConfig(groups=2))
    stages = len(model.config.depths)
    digits = [(0,) * (stages - 1) + (group,) for group in range(2)]
    start = SubnetLearning(net, plain.projector, plain.predictor, Config(ssl="byol", target_momentum=0.9), 1)
    learned = grown(start, digits, 1, 10)
    rounds = Rounds(2, 2, 0.2, seed=3)
    indices = PathIndices(rounds, [torch.arange(k, 40, 2) for k in range(2)], 40, batch_size=ROWS)
    return learned, PathBatches(simsiam.TwoViews(images(), indices, simsiam.Views(), seed=3), rounds)


def align(step_mean):
    """Rows of very different lengths: the mean over tokens of a process is not that of all."""
    from anabranch.specialize.mote.collate import ChainBatches, StepSpanCollator, chain_row
    from anabranch.specialize.mote.mote import ChainLoss
    from tests.specialize.mote.tiny import tiny

    mote = tiny("qwen", dropout=0.0)
    words = [f"w{i}" for i in range(36)]
    rows = [
        chain_row(
            mote.tokenizer, mote.tokens, " ".join(words[i : i + 2]),
            {"analysis": " ".join(words[: 1 + i]), "answer": words[i]} if i % 3 else {"answer": words[i]},
        )
        for i in range(20)
    ]  # fmt: skip
    collator = StepSpanCollator(mote.tokens, mote.tokenizer.pad_token_id, question=None)
    return ChainLoss(mote, step_mean=step_mean), ChainBatches(rows, collator, ROWS, seed=0)


def erase():
    from anabranch.suppress.captioned import CaptionedBatches
    from anabranch.suppress.denoising import Denoising
    from tests.suppress.geom_erasing.test_erase import prepared

    pipe, ready = prepared("stable_diffusion")
    data = ready.data.take(torch.arange(12) % 6)
    return Denoising(pipe, ready.parameters), CaptionedBatches(data, ROWS, seed=0)
