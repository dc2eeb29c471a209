import pytest
import torch

from anabranch.errors import UsageError
from anabranch.models.diffusion.prompts import encode_prompts, tokenize
from anabranch.models.diffusion.tokens import attach, detach, tables
from anabranch.suppress.geom_erasing.bins import Grid
from anabranch.suppress.geom_erasing.erase import start_rows
from anabranch.suppress.geom_erasing.words import Vocabulary, amended, check_room, fitted, place_codes, room
from tests.diffusion_pipelines import FAMILIES, tiny

WORDS = Vocabulary(name="<mark>", grid=Grid(3, 3))


def with_words(name, max_length=16):
    pipe = tiny(name, max_length=max_length)
    return pipe, attach(pipe, WORDS.words(), start_rows(pipe, WORDS, "mark"))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_new_word_is_one_token_and_old_prompts_mean_what_they_meant(name):
    pipe = tiny(name)
    before = encode_prompts(pipe, ["a photo of dress", ""])
    ids_before = tokenize(pipe, ["a photo of dress"])
    attached = attach(pipe, WORDS.words(), start_rows(pipe, WORDS, "mark"))
    old = {*ids_before[0][0].tolist(), pipe.tokenizer.pad_token_id}
    for ids in tokenize(pipe, [WORDS.suffix(WORDS.grid.bins())]):
        assert len([i for i in ids[0].tolist() if i not in old]) == len(WORDS.words())
    after = encode_prompts(pipe, ["a photo of dress", ""])
    assert torch.equal(before.embeds, after.embeds)
    assert before.pooled is None or torch.equal(before.pooled, after.pooled)
    detach(pipe, attached)
    assert all(torch.equal(a, b) for a, b in zip(ids_before, tokenize(pipe, ["a photo of dress"]), strict=True))
    assert "<mark>" not in pipe.tokenizer.get_vocab()


def test_the_pooled_text_is_read_at_its_end_and_not_at_the_newest_word():
    """Checkpoints whose configuration says eos_token_id = 2 look for the highest id, which a new word has."""
    pipe, _ = with_words("stable_diffusion_xl")
    encoder, tokenizer = pipe.text_encoder_2, pipe.tokenizer_2
    ids = tokenizer(["a dress <mark> <l_0_0>"], padding="max_length", max_length=16, return_tensors="pt").input_ids
    states = encoder.text_model(ids).last_hidden_state
    end = ids[0].tolist().index(tokenizer.eos_token_id)
    assert torch.allclose(encoder(ids)[0][0], encoder.text_projection(states[0, end]), atol=1e-6)


def test_known_words_and_rows_of_another_width_are_refused():
    pipe = tiny("stable_diffusion")
    rows = start_rows(pipe, WORDS)
    with pytest.raises(UsageError, match="'dress</w>' is already in the vocabulary"):
        attach(pipe, ["dress</w>"], rows)
    narrow = {name: table[:, :-1] for name, table in rows.items()}
    with pytest.raises(UsageError, match=r"do not fit text_encoder\n.*10 rows of width 16"):
        attach(pipe, WORDS.words(), narrow)


def test_place_codes_differ_and_new_words_are_as_long_as_old_ones():
    code = place_codes(Grid(8, 8), 48)
    assert torch.allclose(code.norm(dim=1), torch.ones(64))
    assert torch.pdist(code).min() > 0.05
    pipe = tiny("stable_diffusion")
    table = tables(pipe)["text_encoder"]
    rows = start_rows(pipe, WORDS, "mark")["text_encoder"]
    assert torch.allclose(rows[1:].norm(dim=1), table.norm(dim=1).mean().expand(9), rtol=1e-4)
    mark = pipe.tokenizer.convert_tokens_to_ids("mark</w>")
    assert torch.equal(rows[0], table[mark])


def test_a_clean_image_keeps_its_caption_and_a_long_one_gives_way_to_the_bins():
    pipe, _ = with_words("stable_diffusion")
    assert amended(pipe, WORDS, "a dress", None) == "a dress"
    assert amended(pipe, WORDS, "a dress", []) == "a dress <mark>"
    assert amended(pipe, WORDS, "a dress", [(1, 0)]) == "a dress <mark> <l_1_0>"
    long = "a photo of dress " * 9
    prompt = amended(pipe, WORDS, long, WORDS.grid.bins())
    assert prompt.startswith("a photo of dress <mark>")
    assert prompt.endswith("<l_2_2>")
    untruncated = pipe.tokenizer(prompt).input_ids
    assert len(untruncated) == pipe.tokenizer.model_max_length
    assert amended(pipe, WORDS, "", [(1, 0)]) == "<mark> <l_1_0>"


def test_what_has_no_room_is_refused_with_both_numbers():
    pipe, _ = with_words("stable_diffusion")
    assert room(pipe) == 14
    check_room(pipe, "<mark>", 13, "the grid")
    with pytest.raises(UsageError, match=r"at most 14 tokens\n.*15: 14 places"):
        check_room(pipe, "<mark>", 14, "the grid")


def test_too_many_bins_are_thinned_and_stay_in_the_region():
    grid = Grid(8, 8)
    assert fitted([(1, 1), (2, 1)], 4) == [(1, 1), (2, 1)]
    thinned = fitted(grid.bins(), 20)
    assert len(thinned) == 16
    assert {m % 2 for m, _ in thinned} == {0}
    assert set(fitted(grid.bins(), 5)) <= set(grid.bins())
    assert len(fitted([(1, 1), (3, 1), (5, 1)], 2)) == 2
