import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import CheckFailed
from anabranch.models.diffusion.family import denoiser
from anabranch.models.diffusion.prompts import encode_prompts
from anabranch.suppress.baselines.uce import Config, closed_form, edit, last_tokens, put, text_weights
from tests.diffusion_pipelines import FAMILIES, tiny
from tests.suppress.baselines.trained import digests


def stacked_least_squares(weight, edits, guides, preserved, config):
    """argmin of the objective itself, a row an equation, by numpy."""
    W, c, g, p = (tensor.double().numpy() for tensor in (weight, edits, guides, preserved))
    scales = np.sqrt([config.edit_scale, config.preserve_scale, config.lam])
    left = np.concatenate([scales[0] * c, scales[1] * p, scales[2] * np.eye(W.shape[1])])
    right = np.concatenate([scales[0] * g @ W.T, scales[1] * p @ W.T, scales[2] * W.T])
    return torch.from_numpy(np.linalg.lstsq(left, right, rcond=None)[0].T)


@settings(max_examples=200, deadline=None)
@given(
    D=st.integers(1, 8), O=st.integers(1, 5), E=st.integers(0, 3), P=st.integers(0, 4),
    lam=st.floats(0.01, 2), scale=st.floats(0.1, 3), seed=st.integers(0, 2**31 - 1),
)  # fmt: skip
def test_the_closed_form_solves_the_stacked_least_squares(D, O, E, P, lam, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    weight, edits, guides, preserved = (
        torch.randn(rows, D, dtype=torch.float64, generator=generator) for rows in (O, E, E, P)
    )
    config = Config(lam=lam, edit_scale=scale, preserve_scale=1 / scale)
    ours = closed_form(weight, edits, guides, preserved, config)
    assert torch.allclose(ours, stacked_least_squares(weight, edits, guides, preserved, config), atol=1e-9)
    if E == 0:
        assert torch.equal(ours, weight)


def test_as_lam_falls_words_reach_their_guides_and_the_preserved_stay():
    weight, c, g, p = (torch.randn(rows, 16, generator=torch.Generator().manual_seed(rows)) for rows in (5, 2, 2, 3))
    g = g + 1
    errors = []
    for lam in (0.5, 1e-3, 1e-8):
        W = closed_form(weight, c, g, p, Config(lam=lam))
        errors.append([(c @ W.T - g @ weight.T).abs().max().item(), (p @ W.T - p @ weight.T).abs().max().item()])
    assert errors[-1] == pytest.approx([0, 0], abs=1e-5)  # float32 rows of length four
    assert errors[0][0] > errors[1][0] > 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_an_edited_model_takes_the_word_for_its_guide_and_is_put_back(name):
    pipe = tiny(name)
    before = digests(pipe)
    words = {text: last_tokens(pipe, [text]) for text in ("mark", "dress", "a bag")}
    first = {key: weight.clone() for key, weight in text_weights(pipe).items()}
    done = edit(pipe, Config(lam=1e-6), ["mark"], ["dress"], ["a bag"])
    assert set(done.touched.changed) == set(first)
    for key, weight in text_weights(pipe).items():
        assert torch.allclose(words["mark"] @ weight.T, words["dress"] @ first[key].T, atol=1e-3)
        assert torch.allclose(words["a bag"] @ weight.T, words["a bag"] @ first[key].T, atol=1e-3)
    part = next(key for key, part in pipe.components.items() if part is denoiser(pipe))
    changed = {key for key, value in digests(pipe).items() if value != before[key]}
    assert changed == {f"{part}.{key}" for key in first}
    put(pipe, done.before)
    assert digests(pipe) == before


def test_what_is_edited_reads_the_text_alone():
    assert all(".attn2.to_" in name for name in text_weights(tiny("stable_diffusion_xl")))
    assert len(text_weights(tiny("stable_diffusion"))) == 8
    assert list(text_weights(tiny("stable_diffusion_3"))) == ["context_embedder.weight"]


def test_the_last_token_is_the_last_word_and_of_nothing_the_first_position():
    pipe = tiny("stable_diffusion")
    embeds = encode_prompts(pipe, ["a photo of dress", ""]).embeds
    assert torch.equal(last_tokens(pipe, ["a photo of dress", ""]), torch.stack([embeds[0, 4], embeds[1, 0]]))
    long = " ".join(["bag"] * 40)
    assert torch.equal(last_tokens(pipe, [long])[0], encode_prompts(pipe, [long]).embeds[0, -2])


def test_no_edit_changes_nothing_and_an_empty_one_is_found_out():
    pipe = tiny("stable_diffusion_3")
    before = digests(pipe)
    assert edit(pipe, Config(), [], [], ["a bag"]).touched.changed == ()
    assert digests(pipe) == before
    with pytest.raises(CheckFailed, match="was to change"):
        edit(pipe, Config(), ["mark"], ["mark"])
    with pytest.raises(ValueError, match=r"guides: expected one a word \(1\), received 0"):
        edit(pipe, Config(), ["mark"], [])
    with pytest.raises(ValueError, match="lam, edit_scale, preserve_scale"):
        Config(lam=0)
