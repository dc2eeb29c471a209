import math

import pytest
import torch

from anabranch.errors import UsageError
from anabranch.models.diffusion.attention import Attention, recorded, token_maps, token_places
from anabranch.models.diffusion.family import denoiser, family
from anabranch.models.diffusion.prompts import encode_prompts
from anabranch.suppress.guidance import Negative, first_noise, sample
from anabranch.suppress.lora import add_lora
from tests.diffusion_pipelines import FAMILIES, tiny

PROMPTS = ["a dress mark", "a photo of bag mark"]


def latents_of(pipe):
    return first_noise(pipe, [3, 11])


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_recorded_changes_nothing_and_nothing_is_left_behind(name):
    pipe = tiny(name)
    positive, negative = encode_prompts(pipe, PROMPTS), encode_prompts(pipe, ["", ""])
    rule = Negative(positive=positive, negative=negative, scale=3.0)
    before = list(denoiser(pipe).attn_processors.values())
    plain = sample(pipe, rule, latents_of(pipe), 3)
    places = token_places(pipe, PROMPTS, [["mark"], ["mark"]])
    with recorded(pipe, places) as attention:
        assert torch.equal(sample(pipe, rule, latents_of(pipe), 3), plain)
    after = list(denoiser(pipe).attn_processors.values())
    assert all(old is new for old, new in zip(before, after, strict=True))
    with pytest.raises(RuntimeError), recorded(pipe, places):
        raise RuntimeError
    assert all(old is new for old, new in zip(before, denoiser(pipe).attn_processors.values(), strict=True))
    # of the two branches the prompt's was recorded
    swapped = Negative(positive=negative, negative=positive, scale=3.0)
    with recorded(pipe, places) as other:
        sample(pipe, swapped, latents_of(pipe), 3)
    assert not torch.allclose(attention.maps(), other.maps())


@pytest.mark.parametrize("name", FAMILIES)
def test_all_tokens_together_get_everything_in_a_unet_and_less_where_pictures_attend_to_themselves(name):
    pipe = tiny(name)
    conditioning = encode_prompts(pipe, PROMPTS)
    every = torch.ones(2, pipe.tokenizer.model_max_length, dtype=torch.bool)
    with torch.no_grad(), recorded(pipe, every) as attention:
        family(pipe).predict(pipe, latents_of(pipe), torch.tensor(500), conditioning)
    maps = attention.maps()
    assert maps.min() > 0
    if name == "stable_diffusion_3":
        assert maps.max() < 1
        assert maps.shape == (2, 7, 7)
    else:
        assert torch.allclose(maps, torch.ones_like(maps), atol=1e-5)
        assert maps.shape == (2, 4, 4)


def by_hand(query, key):
    """softmax of one query against all keys, number by number."""
    logits = [sum(q * k for q, k in zip(query, row, strict=True)) / math.sqrt(len(query)) for row in key]
    total = sum(math.exp(logit) for logit in logits)
    return [math.exp(logit) / total for logit in logits]


@pytest.mark.parametrize(("name", "lora"), [("stable_diffusion", False), ("stable_diffusion", True)])
def test_one_layer_by_hand(name, lora):
    pipe = tiny(name)
    if lora:
        for parameter in add_lora(pipe, 2, 0).values():
            parameter.data.add_(0.1)
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    seen = {}
    handle = layer.register_forward_hook(
        lambda m, args, kwargs, out: seen.update(x=args[0], **kwargs), with_kwargs=True
    )
    places = token_places(pipe, PROMPTS, [["mark"], ["mark", "bag"]])
    with torch.no_grad(), recorded(pipe, places) as attention:
        family(pipe).predict(pipe, latents_of(pipe), torch.tensor(500), encode_prompts(pipe, PROMPTS))
        handle.remove()
        queries, keys = layer.to_q(seen["x"]), layer.to_k(seen["encoder_hidden_states"])
    width = queries.shape[-1] // layer.heads
    for row in range(2):
        for place in (0, 7, 15):
            found = 0.0
            for head in range(layer.heads):
                part = slice(head * width, (head + 1) * width)
                shares = by_hand(queries[row, place, part].tolist(), keys[row, :, part].tolist())
                found += sum(share for share, wanted in zip(shares, places[row], strict=True) if wanted)
            expected = attention.sums[4][row].flatten()[place].item() / attention.counts[4]
            assert found / layer.heads == pytest.approx(expected, abs=1e-5)


def test_joint_attention_by_hand_with_norms_and_the_pictures_own_keys():
    pipe = tiny("stable_diffusion_3")
    layer = pipe.transformer.transformer_blocks[0].attn
    seen = {}
    handle = layer.register_forward_hook(lambda m, args, kwargs, out: seen.update(kwargs), with_kwargs=True)
    places = token_places(pipe, PROMPTS, [["mark"], ["mark"]])
    totals = []
    with torch.no_grad(), recorded(pipe, places) as attention:
        add = attention.add
        attention.add = lambda shares: (totals.append(shares), add(shares))
        family(pipe).predict(pipe, latents_of(pipe), torch.tensor(500.0), encode_prompts(pipe, PROMPTS))
        handle.remove()
        picture, text = seen["hidden_states"], seen["encoder_hidden_states"]
        heads = (layer.heads, -1)
        queries = layer.norm_q(layer.to_q(picture).unflatten(-1, heads))
        own = layer.norm_k(layer.to_k(picture).unflatten(-1, heads))
        keys = torch.cat([own, layer.norm_added_k(layer.add_k_proj(text).unflatten(-1, heads))], 1)
    offset = picture.shape[1]
    for row, place in ((0, 0), (1, 30)):
        found = 0.0
        for head in range(layer.heads):
            shares = by_hand(queries[row, place, head].tolist(), keys[row, :, head].tolist())
            found += sum(shares[offset + i] for i in places[row].nonzero()[:, 0].tolist())
        assert found / layer.heads == pytest.approx(totals[0][row, place].item(), abs=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_maps_do_not_depend_on_the_batches_and_add_up_over_words(name):
    pipe = tiny(name)
    both = token_maps(pipe, PROMPTS, [["dress", "mark"], ["bag", "mark"]], latents_of(pipe), steps=2)
    alone = token_maps(pipe, PROMPTS, [["dress", "mark"], ["bag", "mark"]], latents_of(pipe), steps=2, batch_size=1)
    first = token_maps(pipe, PROMPTS, [["dress"], ["bag"]], latents_of(pipe), steps=2)
    second = token_maps(pipe, PROMPTS, [["mark"], ["mark"]], latents_of(pipe), steps=2)
    assert torch.allclose(both, alone, atol=1e-5)
    assert torch.allclose(both, first + second, atol=1e-5)


def test_middle_layers_are_averaged_where_there_are_any():
    attention = Attention(torch.ones(1, 1, dtype=torch.bool), side=8)
    attention.add(torch.full((1, 64), 0.9))
    assert attention.maps().shape == (1, 8, 8)
    attention.add(torch.full((1, 4), 0.2))
    attention.add(torch.full((1, 16), 0.4))
    attention.add(torch.full((1, 16), 0.6))
    assert torch.allclose(attention.maps(), torch.full((1, 4, 4), 0.4))


def test_a_word_that_is_not_there_is_refused():
    pipe = tiny("stable_diffusion")
    assert token_places(pipe, PROMPTS, [["mark"], ["photo of"]]).sum(1).tolist() == [1, 2]
    with pytest.raises(UsageError, match="'ring' is not in the prompt 'a dress mark'"):
        token_places(pipe, PROMPTS, [["ring"], ["mark"]])
