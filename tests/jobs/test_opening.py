# SPDX-License-Identifier: Apache-2.0
"""Steered, tuned and aligned models as other programs take them, and what harnesses make of them."""

import gc
import json

import pytest
import torch

import anabranch
from anabranch import cli
from anabranch.data import text_mixture
from anabranch.errors import UsageError
from anabranch.jobs.opening import open_model
from anabranch.models.language.folder import open_language_model
from anabranch.models.mixtures.adapter import difference, fused_of
from anabranch.models.mixtures.fingerprint import fingerprint
from anabranch.models.mixtures.layers import open_layers
from anabranch.reuse.steer.recipe import Recipe, Step
from anabranch.specialize.mote.collate import question_ids
from anabranch.specialize.mote.folder import load
from anabranch.specialize.mote.generate import generate
from tests.jobs.align.test_commands import FAST, chains_file, model_folder

MIXTURE = next(iter(text_mixture.__path__))
TEXTS = (("def main(", "self):"), ("Hear the word of", " the LORD"), ("we get", " the proof"))


@pytest.fixture(scope="module")
def plain():
    return open_language_model(MIXTURE)


@pytest.fixture(scope="module")
def recipe(plain):
    layer = open_layers(plain[0])[0].name
    step = Step(kind="refill", experts=((layer, 0), (layer, 1)))
    return Recipe(steps=(step,), model=fingerprint(plain[0]))


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    root = tmp_path_factory.mktemp("aligned")
    model_folder(root / "model")
    command = ["align", "train", "--model", root / "model", "--chains", chains_file(root / "chains.jsonl")]
    assert cli.main([str(word) for word in [*command, "--out", root / "mote", *FAST]]) == 0
    return root


def logits(model, tokenizer, text):
    with torch.no_grad():
        return model(tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids).logits


def test_a_steered_model_is_a_stock_model_that_goes_another_way(plain, recipe, tmp_path):
    recipe.save(tmp_path / "steer.json")
    model, tokenizer = anabranch.open_model(MIXTURE, steer=tmp_path / "steer.json")
    assert type(model) is type(plain[0])
    with recipe.applied(open_layers(plain[0])):
        expected = logits(*plain, TEXTS[0][0])
    assert torch.equal(logits(model, tokenizer, TEXTS[0][0]), expected)
    assert not torch.equal(expected, logits(*plain, TEXTS[0][0]))
    layer = open_layers(plain[0])[1].name
    other = Recipe(steps=(Step(kind="empty", experts=((layer, 2),)),))
    both, _ = open_model(MIXTURE, steer=(tmp_path / "steer.json", other))
    with recipe.applied(open_layers(plain[0])), other.applied(open_layers(plain[0])):
        assert torch.equal(logits(both, tokenizer, TEXTS[0][0]), logits(*plain, TEXTS[0][0]))


def test_a_tuned_model_has_the_tuned_experts(plain, tmp_path):
    tuned, _ = open_language_model(MIXTURE)
    with torch.no_grad():
        next(iter(fused_of(open_layers(tuned)[0]).values()))[3] *= 1.5
    difference(plain[0], tuned).save_pretrained(tmp_path / "tuned")
    model, tokenizer = open_model(MIXTURE, tuned=tmp_path / "tuned")
    assert torch.equal(logits(model, tokenizer, "law"), logits(tuned, tokenizer, "law"))


def test_an_aligned_model_answers_as_align_generate_does(aligned):
    base, _ = open_language_model(aligned / "model")
    mote = load(base, aligned / "mote")
    prompts = [question_ids(mote.tokenizer, text) for text in ("w1 w2", "w8 w3")]
    limits = {"analysis": 6, "guidance": 6}
    expected = [chain.answer for chain in generate(mote, prompts, mode="full", budget=limits | {"answer": 8})]
    model, tokenizer = open_model(aligned / "model", experts=aligned / "mote", mode="full", budget=limits)
    ids = torch.tensor(prompts)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    said = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    assert said == expected
    assert any(said)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"steer": "nowhere.json"}, "neither a folder here"),
        ({"experts": "nowhere", "steer": Recipe(steps=(Step(kind="empty", experts=(("a", 0),)),))}, "model as it is"),
        ({"mode": "full"}, "walks no steps"),
        ({"steer": Recipe(steps=(Step(kind="empty", experts=(("a", 0),)),), model="x")}, "made on another model"),
        ({"steer": Recipe(steps=(Step(kind="empty", experts=(("a", 0),)),))}, "no mixture layer a"),
        (
            {"steer": tuple(Recipe(steps=(Step(kind="empty", experts=(("a", 0),)),), model=m) for m in "xy")},
            "different",
        ),
    ],
)
def test_what_does_not_go_together_is_said(given, says):
    with pytest.raises(UsageError, match=says):
        open_model(MIXTURE, **given)


# what harnesses make of it; each test runs where its harness is installed


def scored(model, tokenizer, before, after):
    """log p(after | before), one forward."""
    first, whole = (tokenizer(text, add_special_tokens=False).input_ids for text in (before, before + after))
    with torch.no_grad():
        log_p = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(float(log_p[place - 1, whole[place]]) for place in range(len(first), len(whole)))


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_scores_and_continues_with_a_steered_model(plain, recipe):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    steered, tokenizer = open_model(MIXTURE, steer=recipe)
    asked = HFLM(pretrained=steered, tokenizer=tokenizer, batch_size=2, add_bos_token=False)
    found = asked.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(TEXTS)])
    assert [score for score, _ in found] == pytest.approx([scored(steered, tokenizer, *p) for p in TEXTS], abs=1e-4)
    assert [score for score, _ in found] != pytest.approx([scored(*plain, *pair) for pair in TEXTS], abs=1e-2)
    how = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
    (said,) = asked.generate_until([Instance("generate_until", {}, ("def f(", how), 0)])
    ids = tokenizer("def f(", return_tensors="pt", add_special_tokens=False).input_ids
    out = steered.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert said == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).split("\n")[0]


@pytest.mark.filterwarnings("ignore")
def test_lm_eval_hears_the_answers_of_an_aligned_model(aligned):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    limits = {"analysis": 6, "guidance": 6}
    model, tokenizer = open_model(aligned / "model", experts=aligned / "mote", mode="full", budget=limits)
    questions = ("w1 w2", "w8", "w11 w12 w13")
    asked = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, add_bos_token=False)
    how = {"until": ["<eos>"], "max_gen_toks": 8, "do_sample": False}
    said = asked.generate_until(
        [Instance("generate_until", {}, (f"<bos> {text}", how), i) for i, text in enumerate(questions)]
    )
    base, _ = open_language_model(aligned / "model")
    mote = load(base, aligned / "mote")
    prompts = [question_ids(tokenizer, text) for text in questions]
    chains = generate(mote, prompts, mode="full", budget=limits | {"answer": 8})
    assert [text.strip() for text in said] == [chain.answer for chain in chains]
    assert any(said)
    pair = ("<bos> w1 w2 <|response|>", " w6")
    (found,) = asked.loglikelihood([Instance("loglikelihood", {}, pair, 0)])
    assert found[0] == pytest.approx(scored(model, tokenizer, *pair), abs=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_inspect_asks_a_steered_and_an_aligned_model(plain, recipe, aligned, tmp_path, monkeypatch):
    pytest.importorskip("inspect_ai")
    monkeypatch.setenv("INSPECT_LOG_DIR", str(tmp_path))
    from inspect_ai import Task, eval
    from inspect_ai.dataset import Sample
    from inspect_ai.model import GenerateConfig, get_model
    from inspect_ai.scorer import includes

    model, tokenizer = open_model(aligned / "model", experts=aligned / "mote", mode="direct")
    for folder, opened in ((MIXTURE, open_model(MIXTURE, steer=recipe)), (aligned / "model", (model, tokenizer))):
        asked = get_model("hf/ours", model_path=str(folder), device="cpu", do_sample=False, memoize=False,
                          config=GenerateConfig(max_tokens=8))  # fmt: skip
        asked.api.model, asked.api.tokenizer = opened
        asked.api.tokenizer.padding_side = "left"
        task = Task(dataset=[Sample(input="w1 w2", target="w")], scorer=includes())
        (log,) = eval(task, model=asked, display="none", log_dir=str(tmp_path / "logs"))
        assert log.status == "success", json.dumps(str(log.error))
        said = log.samples[0].output.completion
        ids = opened[1](asked.api.hf_chat(log.samples[0].messages[:1], []), return_tensors="pt").input_ids
        out = opened[0].generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        assert said == opened[1].decode(out[0, ids.shape[1] :], skip_special_tokens=True) != ""
    gc.collect()  # streams that it leaves open complain here, where it is not heard, and not when everything ends
