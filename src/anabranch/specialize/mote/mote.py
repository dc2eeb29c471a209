# SPDX-License-Identifier: Apache-2.0
"""MoTE: a language model reasons in steps, each with a LoRA expert of its own and one that all steps share.

Paper     : Liu et al., "Mixture of insighTful Experts (MoTE): The Synergy of Thought Chains and Expert Mixtures in
            Self-Alignment" (ACL 2025, arXiv 2405.00557).
Equation  : y_t = W0 x_t + alpha s B_e A_e x_t + (1 - alpha) s B_u A_u x_t,   e the step of token t, u the shared expert
            L = - mean over the tokens of all steps of log p(token | what is before it)
Shapes    : B rows of T tokens; step ids (B, T). 4 r (I + O) parameters a linear layer, 2 r (I + O) of them at work.
Differs   : what the paper leaves open is a setting: LoRA alpha 2 r, dropout .05, the question's expert drawn once a
            row in training and the first step's afterwards, steps skipped by rows (skip.py).
Check     : what is true whatever was learnt (tests/specialize/mote, tests/mixture/test_lora.py). That it is better than
            one LoRA is not shown yet: the first runs on a generated world are in docs/lab.md.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from anabranch.errors import UsageError
from anabranch.mixture.context import Context, route
from anabranch.mixture.lora import Plan, route_lora
from anabranch.mixture.token_rows import light_token_rows
from anabranch.specialize.mote.collate import IGNORED
from anabranch.specialize.mote.steps import Policy, Steps, StepTokens, add_step_tokens, for_experts

Assign = Literal["step", "one", "random", "token"]
SHARED = "shared"
MANIFEST, FORMAT = "mote.json", 1
PLAIN = ("r", "alpha", "lora_alpha", "dropout", "shared", "question", "train_tokens", "assign")
"""Settings that the manifest holds as they are."""


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


class MoTE(nn.Module):
    """A causal language model with step experts. `step_ids` (B, T) go beside `input_ids`."""

    def __init__(self, model: nn.Module, tokenizer: Any, config: Config, tokens: StepTokens):
        super().__init__()
        self.model, self.tokenizer, self.settings, self.tokens = model, tokenizer, config, tokens
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
        loss_BT = nn.functional.cross_entropy(
            logits.transpose(1, 2).float(), labels, ignore_index=IGNORED, reduction="none"
        )
        told = labels != IGNORED
        if not self.step_mean:
            return {"loss": loss_BT.sum() / told.sum().clamp(min=1)}
        steps = batch["step_ids"][:, 1:]
        parts = [loss_BT[told & (steps == number)] for number in range(len(self.held[0].settings.steps))]
        return {"loss": torch.stack([part.mean() for part in parts if len(part)]).mean()}


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


# on disk -------------------------------------------------------------------------------------------------------------


def save(mote: MoTE, folder: str | Path, *, facts: Mapping[str, Any] | None = None) -> None:
    """OUT/mote.json, the tokenizer, and a stock LoRA adapter an expert in OUT/NAME."""
    folder, config = Path(folder), mote.settings
    folder.mkdir(parents=True, exist_ok=True)
    for name in config.adapters:
        save_adapter(mote.model, name, folder / name)
    mote.tokenizer.save_pretrained(folder)
    manifest = {
        "format": FORMAT,
        "adapters": list(config.adapters),
        "steps": asdict(config.steps),
        "token_ids": list(mote.tokens.ids),
        "targets": config.targets if isinstance(config.targets, str) else list(config.targets),
        **{name: getattr(config, name) for name in PLAIN},
        "base": fingerprint(mote.model),
        "tokenizer": tokenizer_hash(mote.tokenizer),
        **(facts or {}),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def save_adapter(model: Any, name: str, folder: Path) -> None:
    """As PEFT would, which fails where another adapter has rows of tokens and this one has none."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, tensor in model.state_dict().items():
        mine = (("lora_A." in key or "lora_B." in key) and f".{name}." in key) or key.endswith(f"tokens_delta.{name}")
        if mine and tensor.data_ptr() not in seen:  # a tied head shows the embedding's rows a second time
            seen.add(tensor.data_ptr())
            plain = key.replace(f".{name}.weight", ".weight").removesuffix(f".{name}")
            tensors[plain] = tensor.detach().cpu().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.peft_config[name]
    inference, config.inference_mode = config.inference_mode, True
    try:
        config.save_pretrained(folder)
    finally:
        config.inference_mode = inference


def load(base: nn.Module, folder: str | Path, *, strict: bool = True, trainable: bool = False) -> MoTE:
    """The folder's experts on their base model.

    Raises:
        UsageError: not a folder that `save` wrote, a newer format, experts that differ, or (strict) another base.
    """
    from transformers import AutoTokenizer

    peft, folder = need_peft(), Path(folder)
    manifest = read_manifest(folder)
    config = Config(
        steps=Steps(**{key: tuple(value) for key, value in manifest["steps"].items()}),
        targets=tuple(manifest["targets"]) if isinstance(manifest["targets"], list) else manifest["targets"],
        **{
            key: manifest[key]
            for key in ("r", "alpha", "lora_alpha", "dropout", "shared", "question", "train_tokens", "assign")
        },
    )
    if strict and manifest["base"] != fingerprint(base):
        raise UsageError(
            f"{folder} was made for another base model",
            expected=f"weights with the fingerprint {manifest['base']}",
            received=fingerprint(base),
            hint="the model that it was trained on; strict=False to try all the same",
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    tokens = add_step_tokens(base, tokenizer, config.steps)
    check_experts(folder, config)
    with quiet():
        options = {"is_trainable": trainable, "local_files_only": True}
        first, *others = config.adapters  # the rows of tokens come last: PEFT seeks them in every later adapter
        model = peft.PeftModel.from_pretrained(base, folder / first, adapter_name=first, **options)
        for name in others:
            model.load_adapter(folder / name, adapter_name=name, **options)
        model.base_model.set_adapter(list(config.adapters), inference_mode=not trainable)
    return MoTE(model, tokenizer, config, tokens).train(trainable)


def read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    if not file.is_file():
        received = "a folder without it" if folder.is_dir() else "no such folder"
        raise UsageError(f"{folder} holds no step experts", expected=f"a folder with {MANIFEST}", received=received)
    try:
        manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{file} cannot be read", expected="JSON", received=str(error)) from error
    if manifest.get("format") != FORMAT:
        raise UsageError(
            f"{file}: another format", expected=FORMAT, received=manifest.get("format"), hint="a newer anabranch"
        )
    return manifest


def check_experts(folder: Path, config: Config) -> None:
    """
    Raises:
        UsageError: an adapter is missing, or they differ in rank or in the layers that they are on.
    """
    found = {}
    for name in config.adapters:
        file = folder / name / "adapter_config.json"
        if not file.is_file():
            raise UsageError(f"{folder} has no expert {name!r}", expected=", ".join(config.adapters), received="none")
        said = json.loads(file.read_text(encoding="utf-8"))
        found[name] = (said["r"], tuple(sorted(said["target_modules"])))
    if len(set(found.values())) > 1:
        told = "; ".join(f"{name}: rank {r} on {', '.join(layers)}" for name, (r, layers) in found.items())
        raise UsageError(f"the experts of {folder} differ", expected="one rank, the same layers", received=told)


def fingerprint(model: nn.Module) -> str:
    """Of the base model's own weights: names, shapes and 64 values spread over each; of embeddings, the old rows."""
    digest = hashlib.sha256()
    for name, tensor in sorted(base_tensors(model).items()):
        flat = tensor.detach().flatten()
        few = flat[:: max(1, len(flat) // 64)][:64].float().cpu()
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + few.numpy().tobytes())
    return digest.hexdigest()[:32]


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Weights of the layers that adapters are put on and of the norms between them, by the base model's own names.

    Embedding and head are left out: they grow with the tokens of the steps.
    """
    found = {}
    for name, tensor in model.state_dict().items():
        if "lora_" in name or "token" in name or "embed" in name or name.endswith(("wte.weight", "head.weight")):
            continue
        found[name.removeprefix("base_model.model.").replace(".base_layer.", ".")] = tensor
    return found


def tokenizer_hash(tokenizer: Any) -> str:
    told = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(told.encode()).hexdigest()[:32]


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
