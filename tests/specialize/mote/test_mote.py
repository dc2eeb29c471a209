# SPDX-License-Identifier: Apache-2.0
"""What is true of step experts whatever was learnt: invariants 1-5, 7-11, 14, 16."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel

from anabranch.errors import UsageError
from anabranch.specialize.mote.collate import IGNORED, ChainBatches, StepSpanCollator, chain_row, fitting
from anabranch.specialize.mote.export import fuse
from anabranch.specialize.mote.folder import load, save
from anabranch.specialize.mote.mote import ChainLoss, Config, build
from anabranch.specialize.mote.skip import Skip
from anabranch.specialize.mote.steps import QUESTION, Steps, for_experts, ids_of_spans
from anabranch.train.loop import TrainConfig, train
from tests.specialize.mote.tiny import base, qwen, tiny, tokenizer

CHAINS = [
    {"analysis": "w1 w2 w3", "guidance": "w4 w5", "answer": "w6 w7 w8"},
    {"answer": "w9 w10"},
    {"analysis": "w11", "answer": "w12 w13 w14 w15"},
    {"guidance": "w16 w17 w18", "answer": "w19"},
]
QUESTIONS = ["w20 w21", "w22 w23 w24", "w25", "w26 w27 w28 w29"]


def rows_of(mote):
    return [chain_row(mote.tokenizer, mote.tokens, q, c) for q, c in zip(QUESTIONS, CHAINS, strict=True)]


def batch_of(mote, **options):
    collator = StepSpanCollator(mote.tokens, mote.tokenizer.pad_token_id, **{"question": None, **options})
    return collator(rows_of(mote))


def logits(mote, batch):
    given = {name: value for name, value in batch.items() if name != "labels"}
    return mote(**given).logits


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_01_before_training_it_is_the_base_model(family, alpha):
    mote = tiny(family, moved=False, alpha=alpha, dropout=0.5).train()
    batch = batch_of(mote)
    with mote.model.disable_adapter():
        plain = mote.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    ours = logits(mote, batch)
    assert torch.equal(ours[..., :40], plain[..., :40])
    torch.testing.assert_close(ours[..., 40:], plain[..., 40:])  # the rows of the steps' tokens: a product of their own


def test_02_alpha_at_its_ends():
    shared_alone, experts_alone = tiny(alpha=0.0), tiny(alpha=1.0)
    batch = batch_of(shared_alone)
    before = logits(experts_alone, batch)
    with torch.no_grad():
        for name, parameter in experts_alone.model.named_parameters():
            if "lora_" in name and ".shared." in name:
                parameter.mul_(5)
    assert torch.equal(logits(experts_alone, batch), before)
    shuffled = {**batch, "step_ids": torch.randint(0, 3, batch["step_ids"].shape)}
    torch.testing.assert_close(logits(shared_alone, batch), logits(shared_alone, shuffled))


def test_04_an_expert_changes_nothing_before_its_first_token():
    mote = tiny()
    batch = batch_of(mote)
    before = logits(mote, batch)
    with torch.no_grad():
        for name, parameter in mote.model.named_parameters():
            if ".guidance." in name:
                parameter.add_(0.5)
    after = logits(mote, batch)
    for row, ids in enumerate(batch["step_ids"]):
        first = (ids == 1).nonzero()
        first = int(first[0]) if len(first) else len(ids)
        assert torch.equal(after[row, :first], before[row, :first])
        assert first == len(ids) or not torch.allclose(after[row, first:], before[row, first:])


def test_05_experts_of_absent_steps_have_no_gradient():
    mote = tiny().train()
    batch = batch_of(mote)
    ChainLoss(mote)({name: value[[1, 2]] for name, value in batch.items()})["loss"].backward()
    size = dict.fromkeys(mote.settings.adapters, 0.0)
    for name, parameter in mote.model.named_parameters():
        for adapter in size:
            if "lora_" in name and f".{adapter}." in name and parameter.grad is not None:
                size[adapter] += float(parameter.grad.abs().sum())
    assert size["guidance"] == 0
    assert min(size["analysis"], size["answer"], size["shared"]) > 0


def test_07_a_row_is_the_same_alone():
    mote = tiny()
    batch = batch_of(mote)
    together = logits(mote, batch)
    for row, chain in enumerate(rows_of(mote)):
        alone = logits(mote, StepSpanCollator(mote.tokens, 37, question=None)([chain]))
        torch.testing.assert_close(together[row, : alone.shape[1]], alone[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_10_a_fused_export_is_the_mixture_on_rows_of_its_step(family, tmp_path):
    mote = tiny(family, alpha=0.3)
    batch = batch_of(mote)
    for number, step in enumerate(mote.settings.steps.names):
        fuse(mote, step, tmp_path / step)
        here = base(family)
        here.resize_token_embeddings(46)
        stock = PeftModel.from_pretrained(here, tmp_path / step).eval()
        ours = logits(mote, {**batch, "step_ids": torch.full_like(batch["step_ids"], number)})
        plain = stock(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
        said = json.loads((tmp_path / step / "adapter_config.json").read_text())
        assert (said["peft_type"], said["r"]) == ("LORA", 6)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen"])
def test_11_saved_and_loaded_it_is_the_same_and_every_folder_is_a_stock_adapter(family, shared, tmp_path):
    mote = tiny(family, shared=shared)
    batch = batch_of(mote)
    save(mote, tmp_path)
    fresh = qwen() if family == "qwen" else base(family)
    again = load(fresh, tmp_path)
    assert torch.equal(logits(again, batch), logits(mote, batch))
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert load(qwen() if family == "qwen" else base(family), tmp_path, trainable=True).trained().keys() == (
        mote.trained().keys()
    )
    for name in mote.settings.adapters:
        other = qwen() if family == "qwen" else base(family)
        other.resize_token_embeddings(46)
        stock = PeftModel.from_pretrained(other, tmp_path / name).eval()
        alone = tiny(family, shared=shared, alpha=0.0 if name == "shared" else 1.0)
        ids = torch.full_like(batch["step_ids"], mote.settings.adapters.index(name) if name != "shared" else 0)
        tokens = batch["input_ids"].clamp(max=39)  # the rows of the steps' tokens are with one adapter alone
        ours = alone(tokens, ids, attention_mask=batch["attention_mask"]).logits
        theirs = stock(input_ids=tokens, attention_mask=batch["attention_mask"]).logits
        torch.testing.assert_close(ours[..., :40], theirs[..., :40], atol=1e-5, rtol=1e-5)


def test_16_training_moves_adapters_and_rows_of_tokens_and_nothing_else():
    mote = tiny(moved=False)
    before = {name: tensor.clone() for name, tensor in mote.model.state_dict().items()}
    rows = rows_of(mote)
    collator = StepSpanCollator(mote.tokens, mote.tokenizer.pad_token_id, skip=Skip())
    config = TrainConfig(steps=12, batch_size=4, learning_rate=1e-2, warmup_steps=2, weight_decay=0.0)
    losses = train(ChainLoss(mote), ChainBatches(rows, collator, 4, seed=0), config).losses
    assert losses[-1] < losses[0]
    for name, tensor in mote.model.state_dict().items():
        same = torch.equal(tensor, before[name])
        assert same == (("lora_" not in name) and ("tokens_delta" not in name)), name


def test_the_loss_is_the_mean_over_labelled_tokens_and_steps_may_count_the_same():
    mote = tiny()
    batch = batch_of(mote)
    log_p = logits(mote, batch)[:, :-1].log_softmax(-1)
    by_step = {number: [] for number in range(3)}
    for b in range(4):
        for t in range(log_p.shape[1]):
            if batch["labels"][b, t + 1] != IGNORED:
                by_step[int(batch["step_ids"][b, t + 1])].append(-log_p[b, t, batch["labels"][b, t + 1]])
    everything = torch.stack([x for part in by_step.values() for x in part])
    torch.testing.assert_close(ChainLoss(mote)(batch)["loss"], everything.mean())
    means = torch.stack([torch.stack(part).mean() for part in by_step.values()])
    torch.testing.assert_close(ChainLoss(mote, step_mean=True)(batch)["loss"], means.mean())


def test_a_mixture_of_another_base_rank_or_format_is_refused(tmp_path):
    save(tiny(), tmp_path)
    other = base()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.add_(1)
    with pytest.raises(UsageError, match="another base model"):
        load(other, tmp_path)
    load(copy.deepcopy(other), tmp_path, strict=False)
    file = tmp_path / "guidance" / "adapter_config.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps(said | {"r": 7}))
    with pytest.raises(UsageError, match=r"experts of .* differ"):
        load(base(), tmp_path)
    manifest = json.loads((tmp_path / "mote.json").read_text())
    (tmp_path / "mote.json").write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(UsageError, match="another format"):
        load(base(), tmp_path)
    with pytest.raises(UsageError, match="holds no step experts"):
        load(base(), tmp_path / "nowhere")
    with pytest.raises(UsageError, match="has adapters already"):
        build(tiny().model, tokenizer(), Config())


def test_tokens_that_are_split_or_half_known_are_refused():
    half = tokenizer()
    half.add_tokens(["<|analysis|>"], special_tokens=True)
    with pytest.raises(UsageError, match="already in the vocabulary"):
        build(base(), half, Config())
    with pytest.raises(UsageError, match="step ids do not fit"):
        tiny()(torch.zeros(2, 5, dtype=torch.long), torch.zeros(2, 4, dtype=torch.long))


# rows ----------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_13_spans_and_step_ids_are_the_same_thing_under_padding(data):
    mote_tokenizer, steps = TOKENIZED
    chain = {name: " ".join(data.draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=5)))
             for name in steps.steps.names if name == "answer" or data.draw(st.booleans())}  # fmt: skip
    row = chain_row(mote_tokenizer, steps, "w1 w2", chain)
    ids = ids_of_spans(row.step_spans, len(row.input_ids), steps.steps)
    for name, start, stop in row.step_spans:
        number = steps.steps.index(name)
        assert (ids == number).nonzero().flatten().tolist() == list(range(start, stop))
        text = [i for i in row.input_ids[start + 1 : stop] if i not in (steps.ends[number], 38)]
        assert mote_tokenizer.decode(text) == chain[name]
    assert (ids == QUESTION).sum() == row.step_spans[0].start
    longer = chain_row(mote_tokenizer, steps, "w1", CHAINS[0])
    for side in ("left", "right"):
        batch = StepSpanCollator(steps, 37, side=side, question=None)([row, longer])
        valid = batch["attention_mask"][0].bool()
        assert batch["step_ids"][0, valid].tolist() == ids.tolist()
        assert (batch["labels"][0] != IGNORED).sum() == (ids >= 0).sum()


def test_a_chain_that_does_not_fit_is_left_out_and_counted():
    rows = rows_of(tiny())
    kept, dropped = fitting(rows, 10)
    assert dropped == sum(len(row.input_ids) > 10 for row in rows) > 0
    assert all(row.step_spans[-1].step == "answer" for row in kept)


@pytest.mark.parametrize(
    ("spans", "says"),
    [
        ([("analysis", 2, 5), ("answer", 4, 8)], "row 0: spans overlap"),
        ([("answer", 2, 9)], "leaves its row"),
        ([("answer", 2, 3)], "no tokens"),
        ([("guidance", 0, 3), ("analysis", 3, 6), ("answer", 6, 8)], "another order"),
        ([("analysis", 2, 5)], "no answer"),
        ([], "no answer"),
        ([("anwser", 2, 5)], "did you mean answer"),
    ],
)
def test_spans_that_cannot_be_right_are_told_with_their_row(spans, says):
    with pytest.raises(UsageError, match=says):
        StepSpanCollator(TOKENIZED[1], 37)([{"input_ids": list(range(8)), "step_spans": spans}])


def test_questions_that_would_be_read_as_steps_and_empty_ones_are_refused():
    words, steps = TOKENIZED
    for question, chain, says in (
        ("w1 <|response|>", CHAINS[1], "holds a token of a step"),
        ("  ", CHAINS[1], "nothing is asked"),
        ("w1", {"answer": "  "}, "has no text"),
        ("w1", {"analysis": "w2"}, "no answer"),
    ):
        with pytest.raises(UsageError, match=says):
            chain_row(words, steps, question, chain)


def test_15_the_reader_of_a_question_is_drawn_for_each_row_evenly_and_by_seed():
    ids = torch.full((6000, 3), QUESTION)
    ids[:, 2] = 1
    drawn = for_experts(ids, "random", 3, torch.Generator().manual_seed(0))
    assert torch.equal(drawn[:, 0], drawn[:, 1])
    assert torch.equal(drawn[:, 2], ids[:, 2])
    counts = torch.bincount(drawn[:, 0], minlength=3)
    assert float(((counts - 2000.0) ** 2 / 2000).sum()) < 13.8  # chi-square, 2 degrees, p = .001
    assert torch.equal(drawn, for_experts(ids, "random", 3, torch.Generator().manual_seed(0)))
    with pytest.raises(UsageError, match="needs a generator"):
        for_experts(ids, "random", 3)


def test_steps_have_names_and_tokens_that_differ():
    with pytest.raises(UsageError, match="have to differ"):
        Steps(names=("a", "a"), starts=("<a>", "<b>"), ends=("</a>", "</b>"))


WORDS = [f"w{i}" for i in range(30)]
TOKENIZED = (lambda mote: (mote.tokenizer, mote.tokens))(tiny(moved=False))


def test_packed_rows_are_refused_by_collator_and_model():
    mote = tiny(moved=False)
    row = {"input_ids": [1, 2, 42, 3, 45], "step_spans": [("answer", 2, 5)]}
    collate = StepSpanCollator(mote.tokens, 37)
    with pytest.raises(UsageError, match="row 1 is packed"):
        collate([row, {**row, "seq_lengths": [5]}])
    batch = collate([row])
    with pytest.raises(UsageError, match="packed into a row"):
        mote(**batch, cu_seq_lens_q=torch.tensor([0, 5]))
