import pytest
import torch

from anabranch.models.diffusion.prompts import encode_prompts, tokenize
from anabranch.models.diffusion.tokens import attach, detach, tables
from anabranch.suppress.attacks.inversion import WORD, Config, asking, inverted
from anabranch.suppress.geom_erasing.adapter import hashes
from tests.diffusion_pipelines import FAMILIES, tiny
from tests.suppress.baselines.trained import latents_of

CAPTIONS = ["a dress", "a bag", "a coat", "a photo of dress", "a photo of bag", "coat"]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_word_is_learnt_and_everything_is_back_afterwards(name):
    pipe = tiny(name)
    before, plain = hashes(pipe), encode_prompts(pipe, ["a dress"]).embeds
    with inverted(pipe, latents_of(pipe), CAPTIONS, Config(steps=12, batch_size=6), "mark") as losses:
        assert sum(losses[-4:]) < sum(losses[:4])
        assert asking(pipe, "a dress") == f"a dress {WORD}"
        changed = [key for key, value in hashes(pipe).items() if before.get(key.replace(".table.", ".")) != value]
        assert changed
        assert all("embedding" in key and key.endswith(("delta", "start")) for key in changed)
        assert torch.equal(encode_prompts(pipe, ["a dress"]).embeds, plain)
    assert hashes(pipe) == before
    assert WORD not in pipe.tokenizer.get_vocab()


def test_a_word_is_learnt_on_top_of_an_adapters_words():
    pipe = tiny("stable_diffusion")
    width = tables(pipe)["text_encoder"].shape[1]
    rows = torch.randn(2, width, generator=torch.Generator().manual_seed(0))
    attached = attach(pipe, ["<mark>", "<l_0_0>"], {"text_encoder": rows})
    before, said = hashes(pipe), encode_prompts(pipe, ["a dress <mark> <l_0_0>"]).embeds
    with inverted(pipe, latents_of(pipe), CAPTIONS, Config(steps=2, batch_size=2)):
        assert torch.equal(encode_prompts(pipe, ["a dress <mark> <l_0_0>"]).embeds, said)
        ids = tokenize(pipe, [f"a dress {WORD} <mark>"])[0]
        embedded = pipe.text_encoder.get_input_embeddings()(ids)[0]
        assert torch.equal(embedded[4], rows[0])
        assert not torch.equal(embedded[3], embedded[4])
    assert hashes(pipe) == before
    assert torch.equal(encode_prompts(pipe, ["a dress <mark> <l_0_0>"]).embeds, said)
    detach(pipe, attached)


def test_an_error_on_the_way_takes_the_word_out_again():
    pipe = tiny("stable_diffusion")
    before = hashes(pipe)
    with pytest.raises(ValueError, match="captions: expected one for each of 6 pictures, received 1"):
        inverted(pipe, latents_of(pipe), ["a dress"], Config()).__enter__()
    with pytest.raises(RuntimeError), inverted(pipe, latents_of(pipe), CAPTIONS, Config(steps=1)):
        raise RuntimeError
    assert hashes(pipe) == before
