# SPDX-License-Identifier: Apache-2.0
import json
import string

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertTokenizer,
    CLIPTokenizer,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessorPil,
    GroundingDinoProcessor,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessorPil,
    Owlv2Processor,
    SwinConfig,
)

from anabranch.errors import UsageError
from anabranch.suppress.detectors.open import open_detector
from anabranch.suppress.detectors.protocol import detect_checked
from anabranch.suppress.detectors.zero_shot import prompt


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny OWLv2 with random weights and a tokenizer that spells."""
    root = tmp_path_factory.mktemp("owl")
    letters = list(string.ascii_lowercase)
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (root / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (root / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(root / "vocab.json"), str(root / "merges.txt"), model_max_length=16)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    config = Owlv2Config(
        text_config={**sizes, **ids, "vocab_size": len(words), "max_position_embeddings": 16},
        vision_config={**sizes, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    torch.manual_seed(3)
    model = Owlv2ForObjectDetection(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("box_head", "class_head")):  # boxes and scores that differ
                parameter.copy_(0.5 * torch.randn(parameter.shape))
        model.box_head.dense2.weight.mul_(0.2)
    model.save_pretrained(root)
    Owlv2Processor(Owlv2ImageProcessorPil(size={"height": 32, "width": 32}), tokenizer).save_pretrained(root)
    return root


def by_hand(folder, image, words):
    """(score, box) of each query: cx, cy, w, h are shares of the square that the image was padded to."""
    processor = Owlv2Processor.from_pretrained(folder)
    model = Owlv2ForObjectDetection.from_pretrained(folder).eval()
    with torch.inference_mode():
        out = model(**processor(text=[[words]], images=[image], return_tensors="pt"))
    side = max(image.shape[:2])
    for logit, (x, y, w, h) in zip(out.logits[0, :, 0].tolist(), out.pred_boxes[0].tolist(), strict=True):
        yield 1 / (1 + np.exp(-logit)), tuple(side * edge for edge in (x - w / 2, y - h / 2, x + w / 2, y + h / 2))


@pytest.mark.parametrize("shape", [(20, 40, 3), (60, 33, 3)])
def test_boxes_are_the_models_own_in_pixels_of_the_image(folder, shape):
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    detector = open_detector(f"zero-shot:{folder}", concept="logo")
    (found,) = detect_checked(detector, [image])
    assert found
    assert detector.threshold == 0.2
    height, width = shape[:2]
    cut = (
        (score, (max(a, 0), max(b, 0), min(c, width), min(d, height)))
        for score, (a, b, c, d) in by_hand(folder, image, "logo")
    )
    whole = [(score, box) for score, box in cut if box[0] < box[2] and box[1] < box[3]]
    for detection in found:
        nearest = min(whole, key=lambda pair: max(abs(p - q) for p, q in zip(pair[1], detection.box, strict=True)))
        assert detection.box == pytest.approx(nearest[1], abs=1e-3)
        assert detection.score == pytest.approx(nearest[0], abs=1e-5)
        assert detection.label == "logo"
    assert found[0].score == pytest.approx(max(score for score, _ in whole), abs=1e-5)


def test_grounding_dino_gets_a_sentence_and_its_boxes_are_shares_of_height_and_width(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "logo"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    swin = {"embed_dim": 8, "depths": [1] * 4, "num_heads": [1, 1, 2, 2], "window_size": 4, "image_size": 64}
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    heads = {f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("attention_heads", "layers")}
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(**swin, out_features=["stage2", "stage3", "stage4"]),
        text_config=BertConfig(**small, vocab_size=len(words)),
        d_model=32,
        num_queries=20,
        **heads,
    )
    torch.manual_seed(0)
    model = GroundingDinoForObjectDetection(config).eval()
    processor = GroundingDinoProcessor(
        GroundingDinoImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 96}),
        BertTokenizer(str(tmp_path / "vocab.txt")),
    )
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (40, 70, 3), np.uint8)
    with torch.inference_mode():
        out = model(**processor(text=["logo."], images=[image], return_tensors="pt"))
    best = out.logits[0].max(-1).values.argmax()
    x, y, w, h = out.pred_boxes[0, best].tolist()
    (found,) = detect_checked(open_detector(f"zero-shot:{tmp_path}", concept="Logo"), [image])
    assert found[0].score == pytest.approx(out.logits[0, best].max().sigmoid().item(), abs=1e-5)
    whole = (70 * (x - w / 2), 40 * (y - h / 2), 70 * (x + w / 2), 40 * (y + h / 2))
    assert found[0].box == pytest.approx(whole, abs=1e-3)


def test_another_prompt_gives_other_scores(folder):
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    a, b = (open_detector(f"zero-shot:{folder}", concept=words).detect([image]) for words in ("logo", "a cat"))
    assert [d.score for d in a[0]] != [d.score for d in b[0]]


def test_prompts_are_written_as_each_kind_was_trained():
    assert prompt("owlv2", "a Watermark") == [["a Watermark"]]
    assert prompt("grounding-dino", "a Watermark") == ["a watermark."]


def test_no_words_no_folder_and_the_wrong_kind_of_model(folder, tmp_path):
    with pytest.raises(UsageError, match="needs words to look for"):
        open_detector(f"zero-shot:{folder}", concept=" ")
    with pytest.raises(UsageError, match="never downloaded"):
        open_detector("zero-shot:google/owlv2-base-patch16", concept="logo")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "resnet"}))
    with pytest.raises(UsageError, match="not a zero-shot object detector"):
        open_detector(f"zero-shot:{tmp_path}", concept="logo")
