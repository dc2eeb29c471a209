# SPDX-License-Identifier: Apache-2.0
"""From questions to fused adapters as a person types it, on tiny models of two families."""

import json

import pytest

from tests.jobs.align.test_chain import PROMPTS
from tests.jobs.align.test_commands import run
from tests.specialize.mote.tiny import base, tokenizer


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_chain_train_chat_generate_eval_export(family, tmp_path, capsys):
    model = base(family)
    model.generation_config.eos_token_id = 38
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.json").write_text(json.dumps(PROMPTS))
    asked = [{"question": f"w{i} w{i + 1}", "kind": "harmful" if i % 2 else "benign"} for i in range(24)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    budget = ["--set", "budget={analysis: 3, guidance: 3, answer: 4}"]
    # the middle of what this model says of its answers: some pass at once, some never
    assert run("align", "chain", "--model", tmp_path / "model", "--questions", tmp_path / "questions.jsonl", "--out",
               tmp_path / "chains.jsonl", "--prompts-file", tmp_path / "prompts.json", "--threshold", "0.5",
               *budget) == 0  # fmt: skip
    report = json.loads((tmp_path / "chain_report.json").read_text())["all"]
    assert len([shape for shape, count in report["shapes"].items() if count]) >= 2
    experts = tmp_path / "mote"
    assert run("align", "train", "--model", tmp_path / "model", "--chains", tmp_path / "chains.jsonl", "--out", experts,
               "--r", "2", "--set", "steps=12", "--learning-rate", "0.01", "--batch-size", "8") == 0  # fmt: skip
    told = ["--model", tmp_path / "model", "--experts", experts, *budget]
    capsys.readouterr()
    assert run("align", "chat", *told, "--mode", "full", "--show", "chain", "--prompt", "w1 w2") == 0
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines() if line.strip()] == ["analysis", "guidance", "answer"]
    assert run("align", "generate", *told, "--questions", tmp_path / "questions.jsonl", "--out",
               tmp_path / "answers.jsonl") == 0  # fmt: skip
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 24
    code = run("align", "eval", *told, "--questions", tmp_path / "questions.jsonl", "--chains",
               tmp_path / "chains.jsonl", "--out", tmp_path / "eval")  # fmt: skip
    assert code == 3  # words without a meaning refuse nothing, and it is said
    assert (tmp_path / "eval" / "report.html").is_file()
    assert run("align", "export", "--model", tmp_path / "model", "--experts", experts, "--out", tmp_path / "fused") == 0
    assert {path.name for path in (tmp_path / "fused").iterdir() if path.is_dir()} == {"analysis", "guidance", "answer"}
