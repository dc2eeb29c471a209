import json
import subprocess
import sys

import pytest
import torch

from anabranch.errors import UsageError
from anabranch.models.diffusion.family import open_pipeline, save_pipeline
from anabranch.models.diffusion.prompts import encode_prompts
from anabranch.suppress.geom_erasing.adapter import apply, fingerprint, hashes, remove, save_adapter
from anabranch.suppress.geom_erasing.adapter_folder import read_adapter
from anabranch.suppress.geom_erasing.bins import Grid
from anabranch.suppress.geom_erasing.erase import Config, prepare
from anabranch.suppress.geom_erasing.words import Vocabulary
from anabranch.suppress.guidance import Negative, first_noise, pictures
from tests.diffusion_pipelines import CALL, FAMILIES, tiny

WORDS = Vocabulary(name="<mark>", grid=Grid(3, 3))
SEEDS = [3, 11]
BOXES = [[(0, 0, 6, 6)], None, [(10, 10, 16, 16)], [(0, 0, 6, 6)]]


def trained_adapter(tmp_path, name, trained="lora", publish_tokens=True):
    """An adapter whose weights were moved at random, in the place of training."""
    save_pipeline(tiny(name), tmp_path / "model")
    pipe = open_pipeline(tmp_path / "model")
    base = fingerprint(pipe)
    latents = torch.zeros(4, 4, 8, 8)
    config = Config(trained=trained, r=2)
    prepared = prepare(pipe, WORDS, config, latents, ["a dress"] * 4, BOXES, size=16, word="mark")
    with torch.no_grad():
        for parameter in prepared.parameters.values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    facts = {"trained": trained, "base": base, "policy": "prior", "concept": "mark"}
    found = [bins for bins in prepared.bins if bins]
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_adapter(pipe, folder, WORDS, prepared.attached, found, facts, publish_tokens=publish_tokens)
    return folder, pipe


def made(pipe, negative):
    positive = encode_prompts(pipe, ["a dress", "a bag"])
    return pictures(pipe, Negative(positive=positive, negative=negative, scale=3.0), first_noise(pipe, SEEDS), 3)


@pytest.mark.parametrize("trained", ["lora", "denoiser", "tokens"])
@pytest.mark.parametrize("name", FAMILIES)
def test_saved_and_applied_it_makes_the_trained_pipelines_pictures_and_removed_it_leaves_no_trace(
    name, trained, tmp_path
):
    folder, trained_pipe = trained_adapter(tmp_path, name, trained)
    expected = made(trained_pipe, encode_prompts(trained_pipe, [WORDS.suffix([(0, 0), (1, 0)])] * 2))
    pipe = open_pipeline(tmp_path / "model")
    before, pictures_before = hashes(pipe), made(pipe, encode_prompts(pipe, ["", ""]))
    applied = apply(pipe, folder)
    ours = made(pipe, applied.negative("detected", 2, detected=[[(0, 0), (1, 0)]] * 2))
    assert torch.equal(ours, expected)
    assert not torch.equal(ours, pictures_before)
    remove(pipe)
    assert hashes(pipe) == before
    assert torch.equal(made(pipe, encode_prompts(pipe, ["", ""])), pictures_before)
    with pytest.raises(UsageError, match="holds no adapter"):
        remove(pipe)


@pytest.mark.parametrize(
    ("trained", "torn"), [("lora", "pytorch_lora_weights.safetensors"), ("denoiser", "denoiser/config.json")]
)
def test_what_is_torn_is_refused_and_the_pipeline_stays_as_it_was(trained, torn, tmp_path):
    folder, _ = trained_adapter(tmp_path, "stable_diffusion_3", trained)
    (folder / torn).write_bytes(b"torn")
    pipe = open_pipeline(tmp_path / "model")
    before = hashes(pipe)
    with pytest.raises(UsageError, match="is damaged"):
        apply(pipe, folder)
    assert hashes(pipe) == before
    (folder / "geom_config.json").write_text('{"format": 1', encoding="utf-8")
    with pytest.raises(UsageError, match="is damaged"):
        read_adapter(folder)


@pytest.mark.parametrize("strength", [0, -1, float("nan"), float("inf")])
def test_a_strength_that_would_do_nothing_is_refused(strength, tmp_path):
    folder, _ = trained_adapter(tmp_path, "stable_diffusion")
    with pytest.raises(UsageError, match="would do nothing"):
        apply(open_pipeline(tmp_path / "model"), folder, strength=strength)


STOCK = """
import sys
class Wall:
    def find_spec(self, name, *rest):
        if name.split(".")[0] == "anabranch":
            raise ImportError("anabranch is walled off")
sys.meta_path.insert(0, Wall())
import json, torch, diffusers
from safetensors.torch import load_file, save_file
model, adapter, out, name, more = sys.argv[1:6]
absent = {"text_encoder_3": None} if name == "stable_diffusion_3" else {}
pipe = diffusers.DiffusionPipeline.from_pretrained(model, **absent)
pipe.load_lora_weights(adapter)
ready = load_file(adapter + "/negative.safetensors")
given = {"negative_prompt_embeds": ready["prior"].repeat(2, 1, 1)}
if "prior.pooled" in ready:
    given["negative_pooled_prompt_embeds"] = ready["prior.pooled"].repeat(2, 1)
if name == "stable_diffusion_xl":  # the stock pipeline takes no strings beside negative embeddings here
    embeds, _, pooled, _ = pipe.encode_prompt(["a dress", "a bag"], do_classifier_free_guidance=False)
    given |= {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
elif name == "stable_diffusion_3":
    embeds, _, pooled, _ = pipe.encode_prompt(
        ["a dress", "a bag"], None, None, do_classifier_free_guidance=False, max_sequence_length=1)
    given |= {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
else:
    given["prompt"] = ["a dress", "a bag"]
generators = [torch.Generator().manual_seed(seed) for seed in (3, 11)]
images = pipe(guidance_scale=3.0, num_inference_steps=3, generator=generators, output_type="np", **given,
              **json.loads(more)).images
save_file({"images": (torch.from_numpy(images) * 255).round().to(torch.uint8).contiguous()}, out)
assert "anabranch" not in sys.modules
"""


@pytest.mark.parametrize("name", FAMILIES)
def test_stock_diffusers_alone_makes_the_same_pictures_bit_for_bit(name, tmp_path):
    from safetensors.torch import load_file

    folder, _ = trained_adapter(tmp_path, name)
    pipe = open_pipeline(tmp_path / "model")
    applied = apply(pipe, folder)
    ours = made(pipe, applied.negative("prior", 2))
    out, more = tmp_path / "stock.safetensors", json.dumps(CALL.get(name, {}))
    command = [sys.executable, "-c", STOCK, str(tmp_path / "model"), str(folder), str(out), name, more]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.equal(load_file(out)["images"].permute(0, 3, 1, 2), ours)


def test_the_users_own_negative_stands_after_ours_within_the_budget(tmp_path):
    folder, _ = trained_adapter(tmp_path, "stable_diffusion")
    pipe = open_pipeline(tmp_path / "model")
    applied = apply(pipe, folder)
    ours = applied.negative("name", 1, own="top left")
    assert torch.equal(ours.embeds, encode_prompts(pipe, ["<mark> top left"]).embeds)
    with pytest.raises(UsageError, match="the negative prompt is too long"):
        applied.negative("prior", 1, own="top left " * 9)
    with pytest.raises(ValueError, match="both `negative_prompt`"):
        pipe("a dress", negative_prompt="bag", guidance_scale=3.0, num_inference_steps=1, **applied.arguments("name"))


def test_another_base_or_kind_of_model_is_refused(tmp_path):
    folder, _ = trained_adapter(tmp_path, "stable_diffusion")
    with pytest.raises(UsageError, match="another base model"):
        apply(tiny("stable_diffusion", seed=1), folder)
    with pytest.raises(UsageError, match="another kind of model"):
        apply(tiny("stable_diffusion_xl"), folder)
    with pytest.raises(UsageError, match="not an adapter"):
        read_adapter(tmp_path / "model")
    pipe = open_pipeline(tmp_path / "model")
    apply(pipe, folder)
    with pytest.raises(UsageError, match="holds an adapter already"):
        apply(pipe, folder)


def test_without_published_words_the_ready_negatives_are_all_there_is(tmp_path):
    folder, trained_pipe = trained_adapter(tmp_path, "stable_diffusion", publish_tokens=False)
    assert not (folder / "geom_tokens.safetensors").exists()
    pipe = open_pipeline(tmp_path / "model")
    applied = apply(pipe, folder)
    assert "<mark>" not in pipe.tokenizer.get_vocab()
    expected = encode_prompts(trained_pipe, [WORDS.suffix([(0, 0), (1, 0), (0, 1), (1, 1)])])
    assert applied.negative("name", 2).embeds.shape[0] == 2
    assert torch.allclose(applied.negative("name").embeds, encode_prompts(trained_pipe, ["<mark>"]).embeds)
    assert expected.embeds.shape == applied.negative("prior").embeds.shape
    with pytest.raises(UsageError, match="came without its words"):
        applied.negative("sampled")
