# SPDX-License-Identifier: Apache-2.0
"""MoTE: a language model reasons in steps, each with a LoRA expert of its own and one that all steps share.

Paper     : Liu et al., "Mixture of insighTful Experts (MoTE): The Synergy of Thought Chains and Expert Mixtures in
            Self-Alignment" (ACL 2025, arXiv 2405.00557).
Equation  : y_t = W0 x_t + alpha s B_e A_e x_t + (1 - alpha) s B_u A_u x_t,   e the step of token t, u the shared expert
            L = - mean over the tokens of all steps of log p(token | what is before it)
Shapes    : B rows of T tokens; step ids (B, T). 4 r (I + O) parameters a linear layer, 2 r (I + O) of them at work.
Differs   : what the paper leaves open is a setting: LoRA alpha 2 r, dropout .05, the question's expert drawn once a
            row in training and the first step's afterwards, steps skipped by rows (skip.py).
Check     : what is true whatever was learnt (tests/specialize/mote, tests/mixture/test_lora.py). On a generated world,
            five seeds: step ids beat drawn ones by +42 points [+31, +53] at 700 steps; against one LoRA of equal total
            parameters no difference is shown, at 700 steps nor at 2,000 (recipes/mote).
"""

import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from anabranch.errors import UsageError
from anabranch.mixture.context import Context, route
from anabranch.mixture.lora import Plan, route_lora
from anabranch.mixture.losses import over_ranks
from anabranch.mixture.token_rows import light_token_rows
from anabranch.models.hub.pretrained import Pretrained
from anabranch.specialize.mote.collate import IGNORED
from anabranch.specialize.mote.steps import Policy, Steps, StepTokens, add_step_tokens, for_experts

Assign = Literal["step", "one", "random", "token"]
SHARED = "shared"


@dataclass(frozen=True, kw_only=True)
class Config:
    steps: Steps = field(default_factory=Steps)
    r: int = 16
    alpha: float = 0.5
    """Weight of the step's expert beside the shared one."""
    lora_alpha: float | None = None
    """Scale of LoRA times r; 2 r when left out."""
    dropout: float = 0.05
    shared: bool = True
    targets: tuple[str, ...] | str = "all-linear"
    question: Policy = "first"
    """Who reads the question outside of training."""
    train_tokens: bool = True
    """Learn the rows of the steps' tokens in the embedding, and in the head where it is another table."""
    assign: Assign = "step"
    """Whose expert acts on a token: its step's; or, for comparison, one for all (a plain LoRA), one drawn for every
    token, one by the token's own id."""

    @property
    def experts(self) -> tuple[str, ...]:
        if self.assign == "one":
            return ("lora",)
        return self.steps.names if self.assign == "step" else tuple(f"expert_{i}" for i in range(len(self.steps)))

    @property
    def adapters(self) -> tuple[str, ...]:
        return (*self.experts, SHARED) if self.shared else self.experts

    @property
    def carrier(self) -> str:
        """The adapter that has the rows of the steps' tokens beside its LoRA."""
        return self.adapters[-1]

    def plan(self) -> Plan:
        return Plan(experts=self.experts, universal=SHARED if self.shared else None, alpha=self.alpha)


class MoTE(nn.Module, Pretrained):
    """A causal language model with step experts. `step_ids` (B, T) go beside `input_ids`."""

    MARK = "mote.json"

    def __init__(self, model: nn.Module, tokenizer: Any, config: Config, tokens: StepTokens):
        super().__init__()
        self.model, self.tokenizer, self.settings, self.tokens = model, tokenizer, config, tokens
        self.facts: dict[str, Any] = {}
        """What the maker wrote into the manifest besides."""
        route_lora(model, config.plan())
        light_token_rows(model)

    @property
    def config(self) -> Any:
        """Of the language model, as Trainer asks for it."""
        return self.model.config

    def activation_checkpointing_enable(self, *args: Any, **options: Any) -> None:
        """Blocks are computed again in the backward pass; what transformers' Trainer calls, by its new name."""
        self.model.get_base_model().activation_checkpointing_enable(*args, **options)

    def gradient_checkpointing_enable(self, *args: Any, **options: Any) -> None:
        """The same by its old name."""
        self.model.get_base_model().gradient_checkpointing_enable(*args, **options)

    def forward(self, input_ids: Tensor, step_ids: Tensor, *, labels: Tensor | None = None, **options: Any) -> Any:
        """What the language model returns; tokens of no step are read by `settings.question`."""
        if packed := [name for name in ("cu_seq_lens_q", "seq_idx") if options.get(name) is not None]:
            raise UsageError(
                "several texts are packed into a row", expected="one chain a row, padded", received=packed[0],
                hint="packing=False, padding_free=False",
            )  # fmt: skip
        if labels is not None:
            options["labels"] = labels
        if step_ids.shape != input_ids.shape:
            raise UsageError(
                "step ids do not fit the tokens", expected=tuple(input_ids.shape), received=tuple(step_ids.shape)
            )
        with route(self.model, Context(ids=self.context_ids(input_ids, step_ids))):
            return self.model(input_ids=input_ids, **options)

    def context_ids(self, input_ids: Tensor, step_ids: Tensor) -> dict[str, Tensor]:
        """What the layers' experts are chosen by, for whole rows."""
        return {"step": self.expert_ids(input_ids, step_ids)}

    def expert_ids(self, input_ids: Tensor, step_ids: Tensor) -> Tensor:
        """(B, T): the expert of each token."""
        num, assign = len(self.settings.experts), self.settings.assign
        if assign == "step":
            return for_experts(step_ids, self.settings.question, num)
        if assign == "token":
            return (input_ids * 2654435761 >> 7) % num  # Knuth's multiplicative hash: neighbours are parted
        return torch.zeros_like(input_ids) if assign == "one" else torch.randint_like(input_ids, num)

    def write_files(self, folder: Path) -> None:
        from anabranch.specialize.mote.folder import save

        save(self, folder, facts=self.facts)

    @classmethod
    def leaves(cls, folder: Path) -> frozenset[str]:
        from anabranch.specialize.mote.folder import files_of

        return files_of(folder)

    @classmethod
    def read_files(cls, folder: Path, *, base: nn.Module, **options: Any) -> "MoTE":
        """
        base       the language model that the experts were trained on
        options    strict, trainable: see `folder.load`
        """
        from anabranch.specialize.mote.folder import load

        return load(base, folder, **options)

    def card(self) -> str:
        from anabranch.specialize.mote.card import mixture_card

        return mixture_card(self, self.facts)

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


class ChainLoss(nn.Module):
    """Objective of the training loop: a batch of `StepSpanCollator` -> {"loss": ()}, the mean over labelled tokens.

    step_mean    every step counts the same, however long it is.
    """

    def __init__(self, mote: MoTE, *, step_mean: bool = False):
        super().__init__()
        self.held = (mote,)  # the state of this objective, hence every checkpoint, is what is trained alone
        self.step_mean = step_mean
        for name, parameter in mote.trained().items():
            self.register_parameter(name.replace(".", "/"), parameter)

    def computing(self) -> list[nn.Module]:
        """In whose forward pass the parameters are used: what sharded training shards, frozen weights with it."""
        return list(self.held)

    def _apply(self, fn: Any, recurse: bool = True) -> "ChainLoss":
        self.held[0]._apply(fn)  # the parameters here are the mixture's own
        return self

    def train(self, mode: bool = True) -> "ChainLoss":
        self.held[0].train(mode)
        self.training = mode
        return self

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        labels = batch["labels"][:, 1:]
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        logits = self.held[0](**inputs).logits[:, :-1]
        wide = logits.transpose(1, 2).to(torch.promote_types(logits.dtype, torch.float32))
        loss_BT = nn.functional.cross_entropy(wide, labels, ignore_index=IGNORED, reduction="none")
        told = labels != IGNORED
        if not self.step_mean:
            return {"loss": loss_BT.sum() / self.fair_share(told.sum()).clamp(min=1e-9)}
        steps = batch["step_ids"][:, 1:]
        parts = [loss_BT[told & (steps == number)] for number in range(len(self.held[0].settings.steps))]
        counts = self.fair_share(torch.tensor([len(part) for part in parts], device=labels.device))
        means = torch.stack([part.sum() for part in parts]) / counts.clamp(min=1e-9)
        return {"loss": means.sum() / (counts > 0).sum().clamp(min=1)}

    def fair_share(self, counts: Tensor) -> Tensor:
        """Tokens over all processes, divided by these: the mean of their losses is then that of all tokens."""
        counts = counts.float()
        if not (self.training and torch.distributed.is_available() and torch.distributed.is_initialized()):
            return counts
        return over_ranks(counts, "global") / torch.distributed.get_world_size()


def build(base: nn.Module, tokenizer: Any, config: Config, *, seed: int = 0) -> MoTE:
    """Fresh experts (B = 0) on a causal language model, which takes the steps' tokens in where it has none.

    Raises:
        UsageError: peft is missing, or the tokenizer knows some of the tokens and others not.
    """
    peft = need_peft()
    if getattr(base, "peft_config", None) is not None:
        raise UsageError("the model has adapters already", expected="a plain model", received=type(base).__name__)
    tokens = add_step_tokens(base, tokenizer, config.steps)
    adapters = config.adapters
    with torch.random.fork_rng(devices=[]), quiet():
        torch.default_generator.manual_seed(seed)
        try:
            model = peft.get_peft_model(base, lora_config(base, config, config.carrier, tokens), config.carrier)
        except ValueError as error:
            raise UsageError(
                "no layer is called so", expected="names of linear layers, or all-linear", received=config.targets
            ) from error
        for name in adapters[:-1]:
            model.add_adapter(name, lora_config(base, config, name, tokens))
        model.base_model.set_adapter(list(adapters))
    return MoTE(model, tokenizer, config, tokens)


def lora_config(base: nn.Module, config: Config, name: str, tokens: StepTokens) -> Any:
    from transformers.pytorch_utils import Conv1D

    peft = need_peft()
    rows = None
    if config.train_tokens and name == config.carrier:
        tables = {"embedding": base.get_input_embeddings()}
        if not base.config.get_text_config().tie_word_embeddings:
            tables["head"] = base.get_output_embeddings()
        named = {id(module): path.rpartition(".")[2] for path, module in base.named_modules()}
        rows = {named[id(table)]: list(tokens.ids) for table in tables.values()}
    targets = config.targets if isinstance(config.targets, str) else list(config.targets)
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=config.r,
        lora_alpha=2 * config.r if config.lora_alpha is None else config.lora_alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in base.modules()),
        trainable_token_indices=rows,
    )


def need_peft() -> Any:
    try:
        import peft
    except ImportError:
        raise UsageError("peft is not installed", hint="pip install 'anabranch[align]'") from None
    return peft


@contextmanager
def quiet() -> Any:
    """What the libraries say about each other's plans is not for our users."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", UserWarning)
        yield
