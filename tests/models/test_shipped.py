# SPDX-License-Identifier: Apache-2.0
import pytest

from anabranch.errors import UsageError
from anabranch.models.diffusion.family import open_pipeline
from anabranch.models.language.folder import open_language_model
from anabranch.models.shipped import folder_of


def test_a_shipped_model_opens_by_its_name_and_another_path_is_left_alone(tmp_path):
    assert folder_of(tmp_path) == tmp_path
    assert folder_of("shipped/mixture").name == "mixture"  # a folder of the user's
    model, tokenizer = open_language_model("shipped:mixture")
    assert model.config.num_experts == 8
    assert tokenizer("ab")["input_ids"] == [97, 98]
    assert type(open_pipeline("shipped:garments")).__name__ == "StableDiffusion3Pipeline"


def test_a_misspelt_name_gets_a_suggestion():
    with pytest.raises(UsageError, match="did you mean mixture"):
        open_language_model("shipped:mixtur")
    with pytest.raises(UsageError, match="did you mean garments"):
        open_pipeline("shipped:garment")
