# SPDX-License-Identifier: Apache-2.0
"""Train, generate, chat and export as a person types them, on tiny models of two families."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from anabranch import cli
from anabranch.errors import Stopped, UsageError
from anabranch.jobs.align import train as job
from anabranch.jobs.align.questions import read_questions
from anabranch.jobs.align.settings import TrainSettings
from anabranch.specialize.mote.folder import load
from anabranch.train.signals import StopFlag
from tests.many import run_many
from tests.specialize.mote.tiny import base, tokenizer

TOGETHER = Path(__file__).parents[1] / "together_worker.py"

CHAINS = [
    {"question": "w1 w2", "chain": {"analysis": "w3 w4", "guidance": "w5", "answer": "w6 w7"}},
    {"question": "w8", "chain": {"answer": "w9 w10"}},
    {"question": [{"role": "user", "content": "w11"}, {"role": "assistant", "content": "w12"},
                  {"role": "user", "content": "w13"}], "chain": {"analysis": "w14", "answer": "w15"}},
]  # fmt: skip
FAST = ["--set", "steps=4", "--learning-rate", "0.01", "--batch-size", "4", "--r", "2"]


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


def model_folder(path, family="llama"):
    base(family).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def chains_file(path):
    path.write_text("".join(json.dumps(row) + "\n" for row in CHAINS * 4))
    return path


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def world(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(f"align-{request.param}")
    model_folder(root / "model", request.param)
    chains_file(root / "chains.jsonl")
    assert run("align", "train", "--model", root / "model", "--chains", root / "chains.jsonl", "--out", root / "mote",
               *FAST) == 0  # fmt: skip
    return root


def test_two_processes_hand_over_one_mixture_that_is_that_of_one(tmp_path):
    """The whole command: what is written is written once, and not by each of them."""
    model_folder(tmp_path / "model", "llama")
    chains_file(tmp_path / "chains.jsonl")
    given = ["align", "train", "--model", tmp_path / "model", "--chains", tmp_path / "chains.jsonl", *FAST,
             "--set", "dropout=0", "--set", "warmup_steps=2"]  # fmt: skip
    assert run(*given, "--out", tmp_path / "alone") == 0
    codes, said = run_many(2, TOGETHER, "command", *given, "--out", tmp_path / "both")
    assert codes == [0, 0], said
    assert said.count("experts  ") == 1
    alone, both = (
        {path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*") if "training" not in path.parts}
        for name in ("alone", "both")
    )
    assert alone == both
    for file in sorted(path for path in alone if path.suffix == ".safetensors"):
        expected, found = load_file(tmp_path / "alone" / file), load_file(tmp_path / "both" / file)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=2e-5, rtol=0)


def test_training_leaves_stock_adapters_a_manifest_and_a_card(world):
    manifest = json.loads((world / "mote" / "mote.json").read_text())
    assert manifest["shapes"] == {"analysis+guidance+answer": 4, "answer": 4, "analysis+answer": 4}
    assert min(manifest["norms"].values()) > 0
    for name in ("analysis", "guidance", "answer", "shared"):
        tensors = load_file(world / "mote" / name / "adapter_model.safetensors")
        assert any(float(tensor.abs().sum()) > 0 for key, tensor in tensors.items() if "lora_B" in key)
        assert any("tokens_delta" in key for key in tensors) == (name == "shared")
    assert "generate(mote" in (world / "mote" / "README.md").read_text()


def test_a_file_of_questions_is_answered_in_every_mode(world, tmp_path, capsys):
    (tmp_path / "questions.txt").write_text("w1 w2\nw8\nw20 w21 w22\n")
    small = ["--set", "budget={analysis: 4, guidance: 4, answer: 5}", "--batch-size", "2"]
    common = ["--model", world / "model", "--experts", world / "mote", "--questions", tmp_path / "questions.txt"]
    for mode in ("adaptive", "direct", "short", "full", "guidance,answer"):
        assert run("align", "generate", *common, "--out", tmp_path / "a.jsonl", "--mode", mode, *small) == 0
        rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
        assert [row["id"] for row in rows] == [1, 2, 3]
        assert all(list(row["chain"])[-1] == "answer" and row["answer"] == row["chain"]["answer"] for row in rows)
        if mode == "full":
            assert all(list(row["chain"]) == ["analysis", "guidance", "answer"] for row in rows)
    assert "tokens a question" in capsys.readouterr().out
    assert run("align", "generate", *common[:2], *common[4:], "--out", tmp_path / "b.jsonl", *small) == 0
    assert all(
        list(json.loads(line)["chain"]) == ["answer"] for line in (tmp_path / "b.jsonl").read_text().splitlines()
    )


def test_chat_answers_and_shows_the_chain_only_when_asked(world, capsys, monkeypatch):
    common = ["align", "chat", "--model", world / "model", "--experts", world / "mote", "--mode", "full", "--set",
              "budget={analysis: 3, guidance: 3, answer: 3}"]  # fmt: skip
    assert run(*common, "--prompt", "w1 w2") == 0
    short = capsys.readouterr().out
    assert run(*common, "--prompt", "w1 w2", "--show", "chain") == 0
    long = capsys.readouterr().out
    assert "analysis" in long
    assert "analysis" not in short
    assert short.strip() in long
    typed = iter(["w1", "w2", ""])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(typed))
    assert run(*common) == 0
    assert len(capsys.readouterr().out.strip().splitlines()) == 2


STOCK = """
import sys
class Wall:
    def find_spec(self, name, *rest):
        if name.split(".")[0] == "anabranch":
            raise ImportError("anabranch is walled off")
sys.meta_path.insert(0, Wall())
import json, torch, warnings
warnings.simplefilter("ignore")
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
base, folder, out, ids = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
made = {}
for step in ("analysis", "guidance", "answer"):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(AutoTokenizer.from_pretrained(folder)), mean_resizing=False)
    made[step] = PeftModel.from_pretrained(model, f"{folder}/{step}").eval()(torch.tensor(ids)).logits.detach()
save_file(made, out)
assert "anabranch" not in sys.modules
"""


def test_stock_peft_alone_gives_our_logits_with_every_fused_step(world, tmp_path):
    fused = ["--model", world / "model", "--experts", world / "mote", "--out", tmp_path / "fused"]
    assert run("align", "export", *fused) == 0
    ids = torch.randint(46, (2, 9), generator=torch.Generator().manual_seed(0))
    command = [sys.executable, "-c", STOCK, world / "model", tmp_path / "fused", tmp_path / "made.safetensors",
               json.dumps(ids.tolist())]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    made = load_file(tmp_path / "made.safetensors")
    mote = load(base("gpt2" if "gpt2" in str(world) else "llama"), world / "mote")
    for number, step in enumerate(("analysis", "guidance", "answer")):
        ours = mote(ids, torch.full_like(ids, number)).logits
        torch.testing.assert_close(made[step], ours, atol=1e-5, rtol=1e-5)
    assert run("align", "export", *fused[:-1], world / "model") == 2  # another folder's files are not lost


def test_a_stopped_training_goes_on_to_the_same_experts(tmp_path, monkeypatch):
    model_folder(tmp_path / "model")
    settings = {"model": tmp_path / "model", "chains": chains_file(tmp_path / "chains.jsonl"), "steps": 6, "r": 2,
                "batch_size": 4, "learning_rate": 0.01, "save_every": 2}  # fmt: skip
    job.align_train(TrainSettings(out=tmp_path / "whole", **settings))
    seen = iter([False, False, False, True])
    with monkeypatch.context() as patch:
        patch.setattr(StopFlag, "is_set", property(lambda self: next(seen, True)))
        with pytest.raises(Stopped):
            job.align_train(TrainSettings(out=tmp_path / "parts", **settings))
    assert not (tmp_path / "parts" / "mote.json").exists()
    job.align_train(TrainSettings(out=tmp_path / "parts", resume=True, **settings))
    for name in ("analysis", "shared"):
        file = f"{name}/adapter_model.safetensors"
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "parts" / file).read_bytes()
    (tmp_path / "chains.jsonl").write_text(json.dumps(CHAINS[0]) + "\n")
    with pytest.raises(UsageError, match="not what this run began with"):
        job.align_train(TrainSettings(out=tmp_path / "parts", resume=True, **settings))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"chains": Path("nowhere.jsonl")}, "cannot be read"),
        ({"text": ""}, "holds no chains"),
        ({"text": "{"}, "1 is no chain"),
        ({"text": '{"question": "w1", "chain": {"analysis": "w2"}}'}, "has no answer"),
        ({"text": '{"question": "w1", "chain": {"anwser": "w2"}}'}, "there is no step"),
        ({"text": '{"question": "w1 <|response|>", "chain": {"answer": "w2"}}'}, "token of a step"),
        ({"max_length": 4}, "no chain fits"),
        ({"alpha": 1.5}, "alpha is a share"),
        ({"alpha": 0.0}, "training left the expert"),
        ({"epochs": 0.0, "steps": None}, "epochs are too few"),
        ({"skip_rate": 2.0}, "a rate is a chance"),
        ({"model": Path("nowhere")}, "is not a language model"),
        ({"targets": "no_such_layer"}, "no layer is called so"),
    ],
)
def test_what_cannot_be_trained_says_why(changes, says, tmp_path):
    from anabranch.errors import AnabranchError

    model_folder(tmp_path / "model")
    chains = chains_file(tmp_path / "chains.jsonl")
    changes = dict(changes)
    if "text" in changes:
        chains.write_text(changes.pop("text"))
    given = {"model": tmp_path / "model", "chains": chains, "out": tmp_path / "mote", "steps": 2, "r": 2,
             "batch_size": 4, "learning_rate": 0.01}  # fmt: skip
    with pytest.raises(AnabranchError, match=says):
        job.align_train(TrainSettings(**(given | changes)))
    assert not (tmp_path / "mote" / "mote.json").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "holds no questions"),
        (b"\xff\xfe\n", "questions.jsonl:1 is no text"),
        (b"{", "is not JSON"),
        (b'{"q": 1}', "has no question"),
        (b'{"question": "  "}', "asks nothing"),
        (b'{"question": [{"role": "assistant", "content": "w1"}]}', "asks nothing"),
        (b'{"question": [{"role": "usr", "content": "w1"}]}', "a turn is no turn"),
        (b'{"question": "w1", "kind": "harmfull"}', "did you mean harmful"),
    ],
)
def test_questions_that_are_none(content, says, tmp_path):
    (tmp_path / "questions.jsonl").write_bytes(content)
    with pytest.raises(UsageError, match=says):
        read_questions(tmp_path / "questions.jsonl")


def test_wrong_use_of_the_commands(world, tmp_path, capsys):
    (tmp_path / "q.txt").write_text("w1\n")
    model, experts = ["--model", world / "model"], ["--experts", world / "mote"]
    for arguments, says in (
        (["tran"], "did you mean train"),
        (["chat", *model, "--mode", "full", "--prompt", "w1"], "has no steps"),
        (["chat", *model, *experts, "--mode", "analysis", "--prompt", "w1"], "goes forward"),
        (["generate", *model, *experts, "--questions", tmp_path / "q.txt", "--batch-size", "0"], "needs a row"),
        (["generate", *model, "--experts", tmp_path, "--questions", tmp_path / "q.txt"], "holds no step experts"),
        (["generate", *model, *experts, "--questions", tmp_path / "q.txt", "--out", tmp_path], "cannot be written"),
    ):
        assert run("align", *arguments) == 2
        assert says in capsys.readouterr().err


def test_one_lora_says_what_it_is_and_is_not_exported_as_steps(world, tmp_path, capsys):
    told = ["--model", world / "model", "--chains", world / "chains.jsonl", "--out", tmp_path / "one"]
    assert run("align", "train", *told, "--set", "assign=one", *FAST) == 0
    card = (tmp_path / "one" / "README.md").read_text()
    assert "one LoRA of rank 2 for all of the steps" in card
    assert "of the shared one" not in card
    assert run("align", "export", "--model", world / "model", "--experts", tmp_path / "one", "--out",
               tmp_path / "fused") == 2  # fmt: skip
    assert "has no experts of steps" in capsys.readouterr().err
    assert not (tmp_path / "fused").exists()
