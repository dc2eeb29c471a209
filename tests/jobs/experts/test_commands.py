# SPDX-License-Identifier: Apache-2.0
"""`anabranch experts` as a person types it, on a tiny mixture of bytes: profile, rank, steer, tune, prune, merge."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import anabranch
from anabranch import cli
from anabranch.errors import Stopped, UsageError
from anabranch.jobs.experts import profile as profile_job
from anabranch.jobs.experts import tune as tune_job
from anabranch.jobs.experts.profile import experts_profile
from anabranch.jobs.experts.rank import overlap
from anabranch.jobs.experts.settings import ProfileSettings
from anabranch.jobs.experts.text_mixture import byte_tokenizer, save_mixture, untrained_mixture
from anabranch.jobs.experts.texts import losses_of, read_windows
from anabranch.measure.experts.statistics import ExpertStats
from anabranch.models.language.folder import open_language_model
from anabranch.models.mixtures.adapter import ExpertAdapter, merge
from anabranch.train.signals import StopFlag
from tests.many import run_many

TOGETHER = Path(__file__).parents[1] / "together_worker.py"
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
         "moe_intermediate_size": 16, "intermediate_size": 16}  # fmt: skip
STOCK = """
import sys
sys.modules["anabranch"] = None  # an import of it fails
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, text = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
ids = tokenizer(text, return_tensors="pt")["input_ids"]
with torch.no_grad():
    out = model.generate(ids, max_new_tokens=4, do_sample=False)
    print(model.config.num_experts, float(model(ids).logits.double().square().sum()), out.shape[1] - ids.shape[1])
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("experts")
    save_mixture(untrained_mixture(0, **SMALL), root / "model", torch.float32)
    (root / "ab.txt").write_text("".join(f"aab{i} ab ba. " for i in range(300)))
    rows = [{"text": "".join(f"<{i * j}> " for i in range(60))} for j in range(1, 20)]
    (root / "digits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("profile", *reading(root), "--out", root / "stats.safetensors", "--outputs") == 0
    return root


def run(*arguments):
    return cli.main(["experts", *map(str, arguments)])


def reading(root):
    return ("--model", root / "model", "--data", f"ab={root / 'ab.txt'}", f"digits={root / 'digits.jsonl'}",
            "--length", "32", "--limit", "40", "--batch-size", "8")  # fmt: skip


def asked(root):
    return "--model", root / "model", "--data", f"ab={root / 'ab.txt'}", f"digits={root / 'digits.jsonl'}", "--set", \
        "length=32", "--set", "limit=40"  # fmt: skip


def in_stock(folder, text="aab 12"):
    """(experts, sum of squared logits, new tokens) in a process where anabranch can't be imported."""
    done = subprocess.run([sys.executable, "-c", STOCK, str(folder), text], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    experts, squares, new = done.stdout.split()
    return int(experts), float(squares), int(new)


@torch.no_grad()
def squares(model, text="aab 12"):
    ids = byte_tokenizer()(text, return_tensors="pt")["input_ids"]
    return float(model(ids).logits.double().square().sum())


# profile


def test_a_profile_counts_every_token_once_and_says_what_it_holds(world):
    stats = ExpertStats.load(world / "stats.safetensors")
    assert stats.labels == ("ab", "digits")
    _, tokenizer = open_language_model(world / "model")
    texts = read_windows([f"ab={world / 'ab.txt'}"], tokenizer, length=32, limit=40)
    assert stats.num_tokens("ab") == float(texts[0].attention_mask.sum())
    assert float(stats.of("count", "ab").sum()) == 2 * 2 * stats.num_tokens("ab")  # two experts in each of two layers
    told = json.loads((world / "stats.safetensors.json").read_text())
    assert told["labels"] == ["ab", "digits"]
    assert {"count", "norm", "turn", "tcess"} <= set(told["statistics"])


def test_a_profile_of_two_processes_is_that_of_one(world, tmp_path):
    """Counts and highest values to the last bit, sums in double precision up to their order."""
    out = tmp_path / "both.safetensors"
    codes, said = run_many(2, TOGETHER, "command", "experts", "profile", *reading(world), "--out", out, "--outputs")
    assert codes == [0, 0], said
    both, alone = ExpertStats.load(out), ExpertStats.load(world / "stats.safetensors")
    assert both.header() == alone.header()
    assert both.sums.keys() == alone.sums.keys()
    for name in ("tokens", "documents", "pairs"):
        assert torch.equal(getattr(both, name), getattr(alone, name))
    for name, expected in alone.sums.items():
        if name in ("count", "peak"):
            assert torch.equal(both[name], expected)
        torch.testing.assert_close(both[name], expected, rtol=1e-11, atol=1e-12)
    assert {path.name for path in tmp_path.iterdir()} == {"both.safetensors", "both.safetensors.json"}


def test_a_stopped_profile_goes_on_to_the_same_numbers(world, tmp_path, monkeypatch):
    monkeypatch.setattr(profile_job, "PART_EVERY", 2)
    text = (world / "ab.txt").read_text()
    (tmp_path / "ab.txt").write_text(text)
    given = {
        "model": world / "model",
        "data": (f"ab={tmp_path / 'ab.txt'}",),
        "length": 16,
        "limit": 40,
        "batch_size": 4,
    }
    whole = experts_profile(ProfileSettings(out=tmp_path / "whole.safetensors", **given))
    seen = []

    class Stopping(StopFlag):
        @property
        def is_set(self):
            seen.append(1)
            self.received = 15 if len(seen) == 6 else None
            return len(seen) == 6

    with monkeypatch.context() as patch:
        patch.setattr(profile_job, "StopFlag", Stopping)
        with pytest.raises(Stopped, match="after 5 of 10 batches"):
            experts_profile(ProfileSettings(out=tmp_path / "part.safetensors", **given))
    with pytest.raises(UsageError, match="was stopped before its end"):
        experts_profile(ProfileSettings(out=tmp_path / "part.safetensors", **given))
    (tmp_path / "ab.txt").write_text(text.replace("aab", "abb"))
    with pytest.raises(UsageError, match="the same texts"):
        experts_profile(ProfileSettings(out=tmp_path / "part.safetensors", resume=True, **given))
    (tmp_path / "ab.txt").write_text(text)
    with pytest.raises(UsageError, match="the same length"):
        experts_profile(ProfileSettings(out=tmp_path / "part.safetensors", resume=True, **(given | {"length": 32})))
    resumed = experts_profile(ProfileSettings(out=tmp_path / "part.safetensors", resume=True, **given))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole.sums)
    assert not list(tmp_path.glob("*.part*"))


BAD_DATA = [
    ((), "no texts are given"),
    (("ab",), "names no text"),
    (("=x.txt",), "names no text"),
    (("a=nowhere.txt",), "cannot be read"),
    (("a=domain:lwa",), "did you mean law"),
    (("a=latin.txt",), "is no UTF-8"),
    (("a=empty.txt",), "holds no text"),
    (("a=short.txt",), "too little text"),
    (("a=bad.jsonl",), "bad.jsonl:2 is not JSON"),
    (("a=none.jsonl",), "none.jsonl:1 has no text"),
    (("a=one.txt", "a=two.txt"), "is there twice"),
    (("a=one.txt", "b=same.txt"), "are the same text"),
]


@pytest.mark.parametrize(("data", "says"), BAD_DATA, ids=[str(i) for i in range(len(BAD_DATA))])
def test_texts_that_can_not_be_read_say_why_and_leave_nothing(world, tmp_path, data, says, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in {
        "latin.txt": "größer".encode("latin-1"), "empty.txt": b" \n", "short.txt": b"abc", "one.txt": b"one " * 500,
        "two.txt": b"two " * 500, "same.txt": b"one " * 500, "bad.jsonl": b'{"text": "a"}\n{', "none.jsonl": b"{}",
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UsageError) as error:
        experts_profile(ProfileSettings(model=world / "model", data=data, out=tmp_path / "out.safetensors"))
    assert says in str(error.value)
    assert sorted(tmp_path.iterdir()) == before


def test_a_model_without_experts_and_a_taken_name_are_refused(world, tmp_path, capsys):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=258, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    save_mixture(LlamaForCausalLM(config), tmp_path / "dense")
    assert run("profile", "--model", tmp_path / "dense", "--data", "law=domain:law", "--out", tmp_path / "x") == 2
    assert "is no mixture of experts" in capsys.readouterr().err
    assert run("profile", *reading(world), "--out", world / "stats.safetensors") == 2
    assert "is there already" in capsys.readouterr().err


def test_losses_of_windows_are_those_of_each_by_itself(world):
    model, tokenizer = open_language_model(world / "model")
    (windows,) = read_windows([f"d={world / 'digits.jsonl'}"], tokenizer, length=50, limit=40)
    assert (windows.attention_mask.sum(1) < 50).any(), "some should be padded"
    together = losses_of(model, windows, batch_size=4)
    for i in range(len(together)):
        ids = windows.input_ids[i][windows.attention_mask[i].bool()][None]
        logits = model(ids).logits[0, :-1].double()
        alone = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
        assert float(together[i]) == pytest.approx(float(alone), abs=1e-5)


def test_routers_can_be_tuned_before_they_are_read(world, tmp_path, capsys):
    assert run("profile", *reading(world), "--collect", "router_lens", "--set", "epochs=1", "--out",
               tmp_path / "lens.safetensors") == 0  # fmt: skip
    assert run("rank", "--stats", tmp_path / "lens.safetensors", "--target", "ab", "--by", "router_lens") == 0
    assert "router_lens" in capsys.readouterr().out
    assert run("profile", *reading(world), "--collect", "dsmoe", "--outputs", "--out", tmp_path / "x") == 2


# rank


def test_rankings_stand_beside_their_intervals_and_the_random_one(world, tmp_path, capsys):
    assert run("rank", "--stats", world / "stats.safetensors", "--target", "digits", "--num", "3",
               "--out", tmp_path / "rank.json", "--set", "resamplings=30") == 0  # fmt: skip
    said = capsys.readouterr().out
    told = json.loads((tmp_path / "rank.json").read_text())
    assert {"frequency", "easy_ep", "reap", "tcess", "seuf", "random", "super_experts"} <= set(told["rankings"])
    for name, found in told["rankings"].items():
        scores = torch.tensor(found["scores"], dtype=torch.float64)
        assert name in said
        best = [float(scores[layer, expert]) for layer, expert in found["top"]]
        assert best == scores.flatten().topk(3).values.tolist()
        for (layer, expert), (low, high), kept in zip(found["top"], found["intervals"], found["kept"], strict=True):
            assert low <= high
            assert 0 <= kept <= 1
            if name == "frequency":  # a mean over tokens lies within its own resamplings
                assert low - 1e-9 <= scores[layer, expert] <= high + 1e-9
    assert told["overlap"]["esft_token"]["frequency"] == 1  # the same order within every layer, and equal sums
    assert overlap([(0, 1), (0, 2)], [(0, 2), (1, 2)]) == pytest.approx(1 / 3)
    assert len(anabranch.results(tmp_path / "rank.json").tables["scores"].rows) == 3 * len(told["rankings"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--target", "digit"), "did you mean digits"),
        ((), "no label is asked for"),
        (("--target", "ab", "--against", "ab"), "against itself"),
        (("--target", "ab", "--by", "frequncy"), "did you mean frequency"),
        (("--target", "ab", "--by", "dsmoe"), "do not hold what dsmoe needs"),
        (("--target", "ab", "--num", "99"), "num cannot be used"),
    ],
)
def test_what_can_not_be_ranked_is_said(world, arguments, says, capsys):
    assert run("rank", "--stats", world / "stats.safetensors", *arguments) == 2
    assert says in capsys.readouterr().err


# steer and generate


def test_a_recipe_steers_and_where_it_can_be_a_checkpoint_it_is_one(world, tmp_path, capsys):
    assert run("steer", "--stats", world / "stats.safetensors", "--by", "manual", "--experts", "0.1", "1.5", "--kind",
               "scale", "--amount", "6", "--out", tmp_path / "steer.json") == 0  # fmt: skip
    given = ("--model", world / "model", "--steer", tmp_path / "steer.json")
    assert run("generate", *given, "--prompt", "aab", "--max-new-tokens", "9", "--out", tmp_path / "rows.jsonl") == 0
    (row,) = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert row["prompt"] == "aab"
    assert {"plain", "steered"} <= row.keys()
    assert run("generate", *given, "--export", tmp_path / "baked") == 0
    assert "2 tensors changed: model.layers.0.mlp.experts.down_proj, model.layers.1" in capsys.readouterr().out
    experts, found, new = in_stock(tmp_path / "baked")
    assert (experts, new) == (8, 4)
    model, _ = open_language_model(world / "model")
    for layer, expert in ((0, 1), (1, 5)):
        model.model.layers[layer].mlp.experts.down_proj.data[expert] *= 6
    assert found == pytest.approx(squares(model), rel=1e-5)


@pytest.mark.parametrize("by", ["ftri", "rice", "dsmoe", "steermoe"])
def test_every_method_makes_a_recipe_that_runs(world, tmp_path, by, capsys):
    stats, target = world / "stats.safetensors", "digits"
    if by == "dsmoe":  # goes by gradients, which a profile of passes does not have
        stats, target = tmp_path / "salient.safetensors", "domain tokens"
        assert run("profile", *reading(world), "--collect", "dsmoe", "--out", stats) == 0
    assert run("steer", "--stats", stats, "--target", target, "--by", by, "--out", tmp_path / "steer.json") == 0
    assert run("generate", "--model", world / "model", "--steer", tmp_path / "steer.json", "--prompt", "1") == 0
    assert "steered" in capsys.readouterr().out
    code = run("generate", "--model", world / "model", "--steer", tmp_path / "steer.json", "--export", tmp_path / "x")
    assert code == (0 if by == "rice" else 2)
    assert (tmp_path / "x").exists() == (by == "rice")


def test_contrast_decodes_against_a_weaker_routing_and_without_strength_is_the_model(world, tmp_path, capsys):
    given = ("--model", world / "model", "--prompt", "aab", "--max-new-tokens", "12", "--contrast", "2")
    assert run("generate", *given, "--set", "beta=0", "--out", tmp_path / "weak.jsonl") == 0
    (row,) = [json.loads(line) for line in (tmp_path / "weak.jsonl").read_text().splitlines()]
    assert row["steered"] == row["plain"]
    assert run("generate", *given, "--set", "alpha=7") == 2
    assert "alpha" in capsys.readouterr().err
    assert run("steer", "--stats", world / "stats.safetensors", "--target", "ab", "--out", tmp_path / "s.json") == 0
    assert run("generate", *given, "--steer", tmp_path / "s.json") == 2
    assert "goes with a model as it is" in capsys.readouterr().err


@pytest.mark.parametrize("rule", ["naee", "modes"])
def test_skipping_goes_by_the_texts_and_says_how_much_it_passed_over(world, tmp_path, rule, capsys):
    given = ("--model", world / "model", "--prompt", "aab", "--max-new-tokens", "12")
    texts = ("--data", f"ab={world / 'ab.txt'}")
    assert run("generate", *given, *texts, "--skip", rule, "--out", tmp_path / "out.jsonl") == 0
    share = float(capsys.readouterr().out.split("%")[0])
    assert 10 < share < 60  # about half of the second slots, or at least a quarter of all
    assert run("generate", *given, *texts, "--skip", "modes", "--set", "skip_share=0.01") == 0
    assert float(capsys.readouterr().out.split("%")[0]) < share
    for wrong, says in (
        (("--skip", rule), "--skip and --data go together"),
        (("--skip", "nae", *texts), "did you mean naee"),
        (("--skip", rule, *texts, "--contrast", "2"), "goes with a model as it is"),
        (("--skip", rule, *texts, "--set", "skip_share=1"), "skip_share"),
    ):
        assert run("generate", *given, *wrong) == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--by", "manual"), "no expert is named"),
        (("--by", "manual", "--experts", "2.0"), "there is no expert 2.0"),
        (("--by", "manual", "--experts", "0.8"), "there is no expert 0.8"),
        (("--by", "manual", "--experts", "0.1", "--kind", "scale"), "needs an amount"),
        (("--by", "ftri", "--target", "ab", "--amount", "2"), "--amount would change nothing"),
        (("--by", "rice", "--target", "ab", "--turn", "on"), "--turn would change nothing"),
        (("--by", "rice", "--target", "ab", "--experts", "0.1"), "--experts would change nothing"),
        (("--by", "rise", "--target", "ab"), "did you mean rice"),
        (("--by", "ftri", "--target", "ab", "--num", "99"), "so many experts can't be chosen"),
    ],
)
def test_steering_that_would_do_nothing_is_refused(world, tmp_path, arguments, says, capsys):
    assert run("steer", "--stats", world / "stats.safetensors", *arguments, "--out", tmp_path / "steer.json") == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "steer.json").exists()


def test_a_recipe_of_another_model_is_refused_unless_told(world, tmp_path, capsys):
    save_mixture(untrained_mixture(1, **SMALL), tmp_path / "other", torch.float32)
    assert run("steer", "--stats", world / "stats.safetensors", "--target", "ab", "--out", tmp_path / "s.json") == 0
    given = ("--model", tmp_path / "other", "--steer", tmp_path / "s.json", "--prompt", "a", "--max-new-tokens", "2")
    assert run("generate", *given) == 2
    assert "was made on another model" in capsys.readouterr().err
    assert run("generate", *given, "--set", "strict=false") == 0
    assert run("prune", "--model", tmp_path / "other", "--stats", world / "stats.safetensors", "--data",
               f"ab={world / 'ab.txt'}", "--target", "ab", "--out", tmp_path / "p") == 2  # fmt: skip
    assert "was made on another model" in capsys.readouterr().err


# prune, merge, tune


@pytest.mark.parametrize("by", ["easy_ep", "reap", "naee", "random"])
def test_a_pruned_checkpoint_is_smaller_and_opened_by_transformers_alone(world, tmp_path, by, capsys):
    assert run("prune", *asked(world), "--stats", world / "stats.safetensors", "--target", "ab", "--by", by, "--keep",
               "3", "--out", tmp_path / "pruned") == 0  # fmt: skip
    told = json.loads((tmp_path / "pruned" / "experts.json").read_text())
    assert {len(kept) for kept in told["kept"].values()} == {3}
    assert set(told["losses"]) == {by, "random, mean of 3"}
    experts, found, new = in_stock(tmp_path / "pruned")
    assert (experts, new) == (3, 4)
    model, _ = open_language_model(tmp_path / "pruned")
    assert found == pytest.approx(squares(model), rel=1e-5)
    assert "transformers opens it alone" in capsys.readouterr().out


def test_protected_experts_stay_whatever_their_score(world, tmp_path):
    assert run("prune", *asked(world), "--stats", world / "stats.safetensors", "--target", "ab", "--by", "frequency",
               "--keep", "2", "--protect", "0.0", "0.7", "--out", tmp_path / "pruned") == 0  # fmt: skip
    told = json.loads((tmp_path / "pruned" / "experts.json").read_text())
    assert next(iter(told["kept"].values())) == [0, 7]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--target", "ab", "--by", "esay_ep"), "did you mean easy_ep"),
        (("--keep", "3"), "whose experts shall stay"),
        (("--target", "ab", "--keep", "1"), "can't keep so many experts"),
        (("--target", "ab", "--keep", "8"), "nothing would be pruned"),
        (("--target", "nobody"), "know no 'nobody'"),
        (("--target", "nobody", "--by", "naee"), "a target has no text"),
        (("--target", "ab", "--protect", "9.9"), "there is no expert 9.9"),
        (("--target", "ab", "--set", "controls=-1"), "controls cannot be fewer than none"),
    ],
)
def test_what_can_not_be_pruned_is_said_and_nothing_is_written(world, tmp_path, arguments, says, capsys):
    given = (*asked(world), "--stats", world / "stats.safetensors", *arguments, "--out", tmp_path / "pruned")
    assert run("prune", *given) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "pruned").exists()


@pytest.mark.parametrize("by", ["mc_smoe", "sub_moe"])
def test_a_merged_checkpoint_keeps_its_configuration_and_says_who_shares(world, tmp_path, by):
    assert run("merge", *asked(world), "--target", "ab", "--by", by, "--keep", "5", "--out", tmp_path / "merged") == 0
    told = json.loads((tmp_path / "merged" / "experts.json").read_text())
    assert (told["distinct"], told["of"]) == (10, 16)
    assert set(told["losses"]) == {by, "random groups, mean of 3"}
    assert in_stock(tmp_path / "merged")[0] == 8
    model, _ = open_language_model(tmp_path / "merged")
    for name, groups in told["groups"].items():
        down = model.get_submodule(name).experts.down_proj
        for group in groups:
            assert all(torch.equal(down[group[0]], down[e]) for e in group)
    assert run("merge", *asked(world), "--keep", "8", "--out", tmp_path / "nothing") == 2


@pytest.mark.parametrize("how", [("--p", "0.3"), ("--num", "2", "--by", "random")])
def test_only_the_chosen_experts_learn_and_the_whole_checkpoint_opens_alone(world, tmp_path, how, capsys):
    assert run("tune", *asked(world), "--stats", world / "stats.safetensors", "--target", "ab", *how, "--steps", "8",
               "--learning-rate", "1e-3",
               "--out", tmp_path / "tuned", "--merged", tmp_path / "whole") == 0  # fmt: skip
    told = json.loads((tmp_path / "tuned" / "experts.json").read_text())
    assert told["losses"][told["by"]]["ab"]["change"] < 0
    num = sum(map(len, told["experts"].values()))
    assert told["slices"]["changed"] == 2 * num, "gate and up in one tensor, and down"
    assert len(told["touched"]) == 2 * len(told["experts"])
    base, _ = open_language_model(world / "model")
    tuned, _ = open_language_model(tmp_path / "whole")
    before, after = base.state_dict(), tuned.state_dict()
    for name, value in after.items():
        layer, _, part = name.partition(".experts.")
        if not part:
            assert torch.equal(value, before[name])
            continue
        chosen = told["experts"].get(layer, [])
        changed = [e for e in range(8) if not torch.equal(value[e], before[name][e])]
        assert changed == sorted(chosen)
    assert in_stock(tmp_path / "whole")[1] == pytest.approx(squares(tuned), rel=1e-5)
    assert "experts in 2 layers learnt" in capsys.readouterr().out


def tuning(root, *more):
    return ("tune", *asked(root), "--stats", root / "stats.safetensors", "--target", "ab", "--steps", "7",
            "--learning-rate", "1e-3", "--set", "batch_size=8", "--set", "controls=1", *more)  # fmt: skip


def numbers_of(run):
    """The tuned values, and the lines of metrics without what the clock says."""
    lines = [json.loads(line) for line in (run / "training" / "metrics.jsonl").read_text().splitlines()]
    told = [{name: value for name, value in line.items() if "second" not in name and name != "time"} for line in lines]
    return (run / "experts.safetensors").read_bytes(), told, json.loads((run / "experts.json").read_text())["losses"]


def test_a_tuning_that_is_stopped_goes_on_to_the_same_bits(world, tmp_path, monkeypatch, capsys):
    assert run(*tuning(world, "--out", tmp_path / "whole")) == 0
    drawn, seen = tune_job.WindowBatches.batch, []

    def until_stopped(stream, step):
        seen.append(step)
        if len(seen) == 14:  # a look and seven steps of the control, a look and five steps
            signal.raise_signal(signal.SIGTERM)
        return drawn(stream, step)

    with monkeypatch.context() as patch:
        patch.setattr(tune_job.WindowBatches, "batch", until_stopped)
        assert run(*tuning(world, "--out", tmp_path / "part")) == 75
    assert not (tmp_path / "part" / "experts.json").exists()
    assert run(*tuning(world, "--out", tmp_path / "part")) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert run(*tuning(world, "--out", tmp_path / "part", "--p", "0.5", "--resume")) == 2
    assert run(*tuning(world, "--out", tmp_path / "part", "--resume")) == 0
    assert "resumed from step-000005" in capsys.readouterr().out
    assert numbers_of(tmp_path / "part") == numbers_of(tmp_path / "whole")
    assert set(numbers_of(tmp_path / "part")[2]) == {"esft_token", "random experts, mean of 1"}
    assert run(*tuning(world, "--out", tmp_path / "none", "--set", "save_every=0")) == 2
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["none", "full"])
def test_a_tuning_of_two_processes_is_that_of_one(world, tmp_path, sharding):
    assert run(*tuning(world, "--out", tmp_path / "alone")) == 0
    given = ("--out", tmp_path / "both", "--merged", tmp_path / "whole", "--set", f"sharding={sharding}")
    codes, said = run_many(2, TOGETHER, "command", "experts", *tuning(world, *given))
    assert codes == [0, 0], said
    assert said.count("slices of tensors changed") == 1
    alone, both = (ExpertAdapter.load(tmp_path / name) for name in ("alone", "both"))
    assert alone.experts == both.experts
    for name, value in alone.tensors.items():
        torch.testing.assert_close(both.tensors[name], value, atol=2e-5, rtol=0)
    (loss, *_), (expected, *_) = (
        [line["loss"] for line in numbers_of(tmp_path / name)[1]] for name in ("both", "alone")
    )
    assert loss == pytest.approx(expected, abs=1e-5)
    base, _ = open_language_model(world / "model")
    merge(base, both)
    assert in_stock(tmp_path / "whole")[1] == pytest.approx(squares(base), rel=1e-5)


def test_what_is_learnt_and_not_foreseen_better_is_a_failed_check_with_its_files(world, tmp_path, capsys):
    (tmp_path / "turn.txt").write_text("aab ab ba. " * 270 + "<QZ> {QX} [Z] " * 24)  # its end is another language
    given = ("--model", world / "model", "--data", f"turn={tmp_path / 'turn.txt'}", "--set", "length=32")
    assert run("tune", *given, "--stats", world / "stats.safetensors", "--target", "ab", "--steps", "20",
               "--learning-rate", "1e-2", "--out", tmp_path / "tuned") == 3  # fmt: skip
    assert "not shown to be better foreseen" in capsys.readouterr().err
    assert json.loads((tmp_path / "tuned" / "experts.json").read_text())["losses"]["esft_token"]["turn"]["change"] > 0


def test_the_table_of_families_can_be_asked_of_a_model_of_yours(world, capsys):
    assert run("families", "--model", world / "model") == 0
    said = capsys.readouterr().out
    assert "FAILED" not in said.splitlines()[1]
    assert "permute" in said


def test_controls_protect_the_same_experts_and_one_of_them_is_no_interval(world, tmp_path, monkeypatch):
    from anabranch.jobs.experts import prune as job

    seen = []
    drawn = job.random_keep
    monkeypatch.setattr(job, "random_keep", lambda *given: seen.append(drawn(*given)) or seen[-1])
    assert run("prune", *asked(world), "--stats", world / "stats.safetensors", "--target", "ab", "--by", "frequency",
               "--keep", "2", "--protect", "0.3", "--set", "controls=1", "--out", tmp_path / "pruned") == 0  # fmt: skip
    assert len(seen) == 1
    assert 3 in next(iter(seen[0].values()))
    told = json.loads((tmp_path / "pruned" / "experts.json").read_text(), parse_constant=pytest.fail)
    assert told["losses"]["random, mean of 1"]["ab"]["low"] is None


def test_random_pruning_tells_its_own_numbers_and_not_those_of_its_controls(world, tmp_path):
    given = (*asked(world), "--by", "random", "--keep", "2", "--seed", "3")
    for name, controls in (("with", 3), ("without", 0)):
        assert run("prune", *given, "--set", f"controls={controls}", "--out", tmp_path / name) == 0
    told = [json.loads((tmp_path / name / "experts.json").read_text())["losses"] for name in ("with", "without")]
    assert told[0]["random"] == told[1]["random"]


def test_what_a_method_is_computed_from_is_not_what_it_is_asked_on(world, tmp_path, monkeypatch):
    from anabranch.jobs.experts import merge as job

    seen = []
    kept = job.halves
    monkeypatch.setattr(job, "halves", lambda texts: seen.append(kept(texts)) or seen[-1])
    assert run("merge", *asked(world), "--keep", "5", "--out", tmp_path / "merged") == 0
    ((read, asked_),) = seen
    for one, other in zip(read, asked_, strict=True):
        assert one.label == other.label
        assert len(one.input_ids) + len(other.input_ids) <= 40
        assert abs(len(one.input_ids) - len(other.input_ids)) <= 1


def test_results_of_others_are_not_overwritten_and_missing_folders_are_made(world, tmp_path, capsys):
    stats = world / "stats.safetensors"
    before = stats.read_bytes()
    assert run("rank", "--stats", stats, "--target", "ab", "--out", stats) == 2
    assert "is there already" in capsys.readouterr().err
    assert stats.read_bytes() == before
    assert run("steer", "--stats", stats, "--target", "ab", "--out", tmp_path / "a" / "s.json") == 0
    assert run("generate", "--model", world / "model", "--prompt", "a", "--max-new-tokens", "1", "--out",
               tmp_path / "b" / "rows.jsonl") == 0  # fmt: skip
    assert (tmp_path / "b" / "rows.jsonl").exists()


def test_help_needs_no_torch():
    code = "import sys; from anabranch.cli import main; main(['experts']); main(['experts', 'help']); " \
           "assert 'torch' not in sys.modules"  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
