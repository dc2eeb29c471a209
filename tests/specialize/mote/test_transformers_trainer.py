# SPDX-License-Identifier: Apache-2.0
"""The Trainer of transformers, as it comes, trains step experts: the model's own loss, rows of chains, our collator."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from anabranch.specialize.mote.collate import IGNORED, StepSpanCollator, chain_row
from anabranch.specialize.mote.mote import ChainLoss
from anabranch.specialize.mote.skip import Skip
from tests.specialize.mote.tiny import tiny

CHAINS = [
    ("w20 w21", {"analysis": "w1 w2 w3", "guidance": "w4 w5", "answer": "w6 w7 w8"}),
    ("w22 w23 w24", {"analysis": "w9", "guidance": "w10 w11 w12", "answer": "w13 w14"}),
    ("w25", {"answer": "w15 w16"}),
    ("w26 w27 w28 w29", {"analysis": "w17 w18", "answer": "w19 w30 w31 w32"}),
]
STEPS = 6
SKIPS = pytest.mark.parametrize("skip", [None, Skip(mode="transitive")], ids=["all read", "skipping"])
NEWER = hasattr(TrainingArguments, "activation_checkpointing")  # transformers gave its switch another name


class Seen:
    """What the Trainer handed to the mixture, call by call, and how often its first block ran."""

    def __init__(self, mote):
        self.batches, self.blocks_run = [], 0
        mote.register_forward_hook(self.keep, with_kwargs=True)
        mote.model.get_base_model().model.layers[0].self_attn.register_forward_hook(self.count)

    def keep(self, module, arguments, batch, output):
        self.batches.append({name: value for name, value in batch.items() if name != "num_items_in_batch"})

    def count(self, module, arguments, output):
        self.blocks_run += 1


def fresh():
    return tiny(dropout=0.0)


def trainer_of(mote, folder, *, skip=None, question="random", num_rows=4, **arguments):
    rows = [chain_row(mote.tokenizer, mote.tokens, asked, chain) for asked, chain in CHAINS[:num_rows]]
    settings = {"per_device_train_batch_size": 2, "max_steps": STEPS, "learning_rate": 2e-2, "logging_steps": 1}
    quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    options = {**quiet, **settings, "remove_unused_columns": False, **arguments}
    return Trainer(
        model=mote,
        args=TrainingArguments(output_dir=str(folder), **options),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=StepSpanCollator(mote.tokens, mote.tokenizer.pad_token_id, skip=skip, question=question),
    )


def losses_of(trainer):
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def rows_of_tokens(mote):
    """What embedding and head make of every token of the vocabulary."""
    hidden = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        embedded = mote.model.get_input_embeddings()(torch.arange(len(mote.tokenizer))[None])[0]
        scores = mote.model.get_output_embeddings()(hidden).T
    return embedded.clone(), scores.clone()


@SKIPS
def test_adapters_and_rows_of_step_tokens_are_all_that_changes(skip, tmp_path):
    mote = fresh()
    before = {name: tensor.numpy().tobytes() for name, tensor in mote.state_dict().items()}
    tables = rows_of_tokens(mote)
    losses_of(trainer_of(mote, tmp_path, skip=skip))
    after = {name: tensor.numpy().tobytes() for name, tensor in mote.state_dict().items()}
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {name for name in before if "lora_" in name or "tokens_delta" in name}
    assert changed == {f"model.{name}" for name in mote.trained()}
    for old, new in zip(tables, rows_of_tokens(mote), strict=True):
        assert (old != new).any(-1).nonzero().flatten().tolist() == sorted(mote.tokens.ids)


@SKIPS
def test_the_first_loss_is_that_of_our_own_objective_on_the_same_batch(skip, tmp_path):
    mote = fresh()
    seen = Seen(mote)
    losses = losses_of(trainer_of(mote, tmp_path, skip=skip))
    assert len(losses) == len(seen.batches) == STEPS
    ours = ChainLoss(fresh())
    assert losses[0] == pytest.approx(ours(seen.batches[0])["loss"].item(), abs=1e-5)
    shuffled = {**seen.batches[0], "step_ids": (seen.batches[0]["step_ids"] + 1) % 3}
    assert losses[0] != pytest.approx(ours(shuffled)["loss"].item(), abs=1e-3)


def test_masks_of_skipped_steps_reach_the_model(tmp_path):
    mote = fresh()
    seen = Seen(mote)
    losses = losses_of(trainer_of(mote, tmp_path, skip=Skip(mode="transitive"), question="first"))
    everything = losses_of(trainer_of(fresh(), tmp_path, question="first"))
    hidden = []
    for batch in seen.batches:
        mask, length = batch["attention_mask"], batch["input_ids"].shape[1]
        assert (mask.shape, mask.dtype) == ((2, 1, length, length), torch.bool)
        inside = batch["labels"] != IGNORED
        unread = ~mask[:, 0] & torch.ones(length, length, dtype=torch.bool).tril()
        hidden.append(bool((unread & inside[:, :, None] & inside[:, None, :]).any()))
    assert any(hidden)
    assert max(abs(a - b) for a, b in zip(losses, everything, strict=True)) > 1e-3


@SKIPS
def test_a_few_rows_are_learnt(skip, tmp_path):
    losses = losses_of(trainer_of(fresh(), tmp_path, skip=skip, num_rows=2, max_steps=2 * STEPS))
    assert losses[-1] < 0.8 * losses[0]


@SKIPS
@pytest.mark.parametrize("switch", ["model", "arguments"])
def test_checkpointing_changes_no_loss(switch, skip, tmp_path):
    plain, mote = fresh(), fresh()
    counts = [Seen(plain), Seen(mote)]
    expected = losses_of(trainer_of(plain, tmp_path, skip=skip))
    how = {"use_reentrant": False}
    if switch == "model":
        language_model = mote.model.get_base_model()
        newer = getattr(language_model, "activation_checkpointing_enable", None)
        (newer or language_model.gradient_checkpointing_enable)(how)
        arguments = {}
    else:
        name = "activation_checkpointing" if NEWER else "gradient_checkpointing"
        arguments = {name: True, f"{name}_kwargs": how}
    received = losses_of(trainer_of(mote, tmp_path, skip=skip, **arguments))
    assert received == pytest.approx(expected, abs=1e-5)
    assert [seen.blocks_run for seen in counts] == [STEPS, 2 * STEPS]


def test_two_halves_of_a_batch_count_as_the_whole(tmp_path):
    whole, halves = fresh(), fresh()
    expected = losses_of(trainer_of(whole, tmp_path, question="first", per_device_train_batch_size=4))
    received = losses_of(trainer_of(halves, tmp_path, question="first", gradient_accumulation_steps=2))
    assert received == pytest.approx(expected, abs=1e-5)


def test_evaluation_tells_the_loss(tmp_path):
    mote = fresh()
    trainer = trainer_of(mote, tmp_path, question="first", per_device_eval_batch_size=4)
    with torch.no_grad():
        expected = ChainLoss(mote)(trainer.data_collator(trainer.eval_dataset))["loss"].item()
    assert trainer.evaluate().get("eval_loss") == pytest.approx(expected, abs=1e-5)
