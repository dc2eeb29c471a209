# SPDX-License-Identifier: Apache-2.0
"""How what makes experts different is exercised."""

import copy

import torch
from torch import nn

from anabranch.mixture import mixtures
from anabranch.models import resnet, vit_mae
from anabranch.models.bridge import transformers
from anabranch.models.mixtures.layers import mixture_layers
from anabranch.specialize import byol, ceft, esft, mae, moce, simsiam, token_moe, upcycling
from anabranch.testing import Reordering, Subject, along
from tests.measure.experts import drawn

IMAGES = 4


def learnt(given, output):
    """All that gradients reach; what is frozen has to stay as it is."""
    return [f"objective.{name}" for name, value in given["objective"].named_parameters() if value.requires_grad]


def masked_batch(g):
    return {
        "pixels": torch.randint(0, 256, (IMAGES, 1, 28, 28), generator=g).to(torch.uint8),
        "noise": torch.rand(IMAGES, 16, generator=g), "cluster": torch.tensor([0, 1, 2, 0]),
        "row": torch.arange(IMAGES), "step": torch.full((IMAGES,), 3),
    }  # fmt: skip


def objective(make, batch, **more) -> Subject:
    """`make(g)` is a module that takes the batch, in training mode."""
    return Subject(
        inputs=lambda g: {"objective": make(g).train(), "batch": batch(g)},
        call=lambda objective, batch: objective(batch),
        **{"touches": learnt, **more},
    )


def autoencoder(g):
    made = vit_mae.build("tiny", image_size=28, channels=1, seed=int(torch.randint(1000, (), generator=g)))
    made.set_attn_implementation("eager")  # the fused attention of a CPU makes zeros of a query that is NaN
    return made


class Whole(nn.Module):
    """What torch.func asks for: the loss as a forward pass."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values, noise):
        return vit_mae.masked_loss(self.model, pixel_values, noise).loss


def cosine_terms(g):
    values = [torch.randn(5, 4, generator=g) for _ in range(4)]
    fixed = [value.double() for value in values[2:]]
    return {"cross_view": (lambda *predictions: simsiam.cross_view([*predictions], fixed), tuple(values[:2]))}


def subject_mae() -> Subject:
    def terms(g):
        model, noise = autoencoder(g).double(), torch.rand(2, 16, generator=g)
        weights = {name: value for name, value in model.named_parameters() if value.requires_grad}

        def loss(pixel_values, *values):
            own = {f"model.{name}": value for name, value in zip(weights, values, strict=True)}
            return torch.func.functional_call(Whole(model), own, (pixel_values, noise))

        return {"masked_loss": (loss, (torch.randn(2, 1, 28, 28, generator=g), *weights.values()))}

    return objective(
        lambda g: mae.MaskedAutoencoding(autoencoder(g)), masked_batch, samples=along(IMAGES, {"batch.*": 0}),
        terms=terms,
    )  # fmt: skip


def view_batch(g):
    pixels = [torch.randint(0, 256, (IMAGES, 1, 28, 28), generator=g).to(torch.uint8) for _ in range(2)]
    return {"view1": pixels[0], "view2": pixels[1], "step": torch.full((IMAGES,), 2)}


def network(g):
    config = transformers().ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], layer_type="basic"
    )
    config.image_size = 28
    return resnet.fresh(config, int(torch.randint(1000, (), generator=g)))


def views(make, **more) -> Subject:
    def touches(given, output):
        running = [name for name, _ in given["objective"].named_buffers() if "running" in name or "tracked" in name]
        return [*learnt(given, output), *(f"objective.{name}" for name in running)]

    return objective(
        make, view_batch, changes=("objective",), terms=cosine_terms, samples=along(IMAGES, {"batch.*": 0}),
        **{"touches": touches, "tolerance": 1e-4, "scale": 1.0, **more},
    )  # fmt: skip


def subject_simsiam() -> Subject:
    config = simsiam.Config(projector_size=6, predictor_hidden_size=3)
    return views(lambda g: simsiam.objective(network(g), seed=1, config=config))


def subject_byol() -> Subject:
    config = byol.Config(projector_size=6, hidden_size=5, tau=0.9)

    def make(g):
        made = byol.objective(network(g), seed=1, config=config)
        with torch.no_grad():  # as after some steps: the target is behind
            for value in made.parameters():
                value += 0.1 * torch.randn(value.shape, generator=g)
        return made

    return views(make, touches=lambda given, output: ["objective.*"])


def gated(make, **more) -> Subject:
    """With a mixture inside. Noise is drawn by place, so there is none where experts change theirs."""

    def permuted(given, order):
        for layer in mixtures(given["objective"].model).values():
            layer.router, layer.bank = layer.router.take(order), layer.bank.permute(order)
        return given

    def terms(g):
        tokens = tuple(torch.randn(3, 5, 4, generator=g) for _ in range(2))
        return {"distillation": (moce.distillation, tokens)}

    return objective(
        make, masked_batch, samples=along(IMAGES, {"batch.*": 0}), terms=terms,
        experts=Reordering(size=2, inputs=permuted, output=lambda result, order: result), **more,
    )  # fmt: skip


def off(insert):
    """One expert that is not noised, alone: the autoencoder itself."""

    def strength_0(given):
        g = torch.Generator().manual_seed(3)
        plain = autoencoder(g).eval()
        routed = insert(copy.deepcopy(plain), g)
        batch = given["batch"]
        return routed(batch)["masked"], mae.MaskedAutoencoding(plain)(batch)["loss"]

    return strength_0


def subject_moce() -> Subject:
    config = moce.Config(num_experts=2, noise_std=0.0, entropy_coef=0.1, init_noise=0.1)
    single = moce.Config(num_experts=1, init_noise=0.0)

    def make(g, config=config, model=None, groups=(0, 1, 1)):
        centroids = nn.functional.normalize(torch.randn(3, 5, generator=g), dim=1)
        model = moce.insert(model or autoencoder(g), centroids, torch.tensor(groups), config, g)
        return moce.ClusterConditional(model, config, seed=1, batch_size=IMAGES)

    return gated(make, off=off(lambda model, g: make(g, single, model, (0, 0, 0)).eval()))


def subject_token_moe() -> Subject:
    config = moce.Config(num_experts=2, noise_std=0.0, init_noise=0.1)
    single = moce.Config(num_experts=1, init_noise=0.0)

    def make(g, config=config, model=None):
        model = token_moe.insert(model or autoencoder(g), config, g)
        return token_moe.TokenRouted(model, config, seed=1, batch_size=IMAGES)

    return gated(make, off=off(lambda model, g: make(g, single, model).eval()))


def subject_upcycling() -> Subject:
    def inputs(g):
        config = transformers().LlamaConfig(
            vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        torch.manual_seed(int(torch.randint(1000, (), generator=g)))
        dense = transformers().LlamaForCausalLM(config).eval()
        return {"dense": dense, "config": upcycling.Config(num_experts=4, noise=0.1), "generator": g}

    def strength_0(given):
        ids = torch.arange(3, 15).view(2, 6)
        mixture = upcycling.upcycle(given["dense"], upcycling.Config(num_experts=1, top_k=1), given["generator"])
        mixture.set_experts_implementation("eager")  # the grouped product adds up in another order
        with torch.no_grad():
            return mixture(ids).logits, given["dense"](ids).logits

    return Subject(inputs=inputs, call=upcycling.upcycle, off=strength_0)


def tuning(method, config) -> Subject:
    """Of the experts of a mixture, for two steps, at a rate that moves weights by more than rounding does."""

    def inputs(g):
        model = drawn.model(g)
        return {
            "model": model, "scores": torch.rand(2, 8, generator=g),
            "layers": [layer.name for layer in mixture_layers(model)],
            "batches": [drawn.batch(g)] * 2, "config": config,  # a NaN met by the second alone comes after a step
        }  # fmt: skip

    def reordered(given, order):
        return {**given, "model": drawn.model_of_experts(given["model"], order), "scores": given["scores"][:, order]}

    return Subject(
        inputs=inputs,
        call=lambda **given: method.train(**given).losses,
        changes=("model",),
        touches=lambda given, output: ["model.model.layers.*.mlp.experts.*"],
        pad=lambda given: {**given, "batches": drawn.padded_batch(given["batches"])},
        samples=drawn.of(drawn.DOCUMENTS, drawn.batch_of_documents, "batches"),
        experts=Reordering(size=8, inputs=reordered, output=lambda result, order: result),
    )


def subject_esft() -> Subject:
    return tuning(esft, esft.Config(steps=2, learning_rate=1e-2, p=0.3))


def subject_ceft() -> Subject:
    return tuning(ceft, ceft.Config(steps=2, learning_rate=1e-2, num_experts=2))
