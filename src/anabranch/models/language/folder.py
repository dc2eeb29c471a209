# SPDX-License-Identifier: Apache-2.0
"""Causal language models from a folder that transformers wrote; nothing is downloaded."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from anabranch.errors import UsageError, near
from anabranch.models.shards import refuse_strange_shards
from anabranch.models.shipped import folder_of

ALONE = {"local_files_only": True, "trust_remote_code": False}
"""No network, and no code that lies in the folder: left out, transformers would ask the terminal about it."""
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError)
"""What loaders raise on a folder that is torn; UsageError is none of them."""


def open_language_model(folder: str | Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """(model, tokenizer) of a folder or a shipped name; the model frozen, evaluating, on the accelerator if there is
    one.

    Raises:
        UsageError: no such folder, no language model in it, a torn one, or no tokenizer.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = folder_of(folder)
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"{folder} is not a language model",
            expected="a folder with config.json, weights and tokenizer",
            received="no such folder" if not folder.is_dir() else "a folder without config.json",
            hint=near(folder, "model.save_pretrained(folder) writes one; nothing is downloaded here"),
        )
    refuse_strange_shards(folder)
    try:
        with hushed():
            tokenizer = AutoTokenizer.from_pretrained(folder, **ALONE)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True, **ALONE)
    except (*UNREADABLE, SafetensorError) as error:
        raise UsageError(
            f"the model {folder} cannot be opened",
            expected="a causal language model with its tokenizer, as save_pretrained wrote them",
            received=f"{type(error).__name__}: {str(error)[:300]}",
            hint="copy it again; nothing is downloaded here",
        ) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.eval().requires_grad_(False)
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    return model, tokenizer


@contextmanager
def hushed() -> Iterator[None]:
    """Neither progress bars nor notices of transformers; what matters here is raised."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
