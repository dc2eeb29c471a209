# SPDX-License-Identifier: Apache-2.0
"""Geom-Erasing against plain LoRA training, a policy against any negative prompt, a scan against its bare detector.

Training step: a U-Net pipeline of Stable Diffusion's layout (9 million weights, text of 77 tokens, latents 32 x 32,
batch 4). The peer is what diffusers' own LoRA script does in a step: text encoder without gradient, U-Net with LoRA
forward and backward, AdamW. Ours adds new words (the text encoder's backward), their weights of regions, and amended
captions. Peak memory: growth of the resident set over the same step, each in a process of its own.
Sampling: our loop with the words of the concept, against the stock pipeline with another negative prompt.
Scan: `anabranch erase scan` of 512-pixel pictures, against the detector alone on the same decoded pictures.
Float32, two threads; ratios to the reference of the same round, median over rounds.
"""

import contextlib
import io
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from anabranch.jobs.erase.sample import Sampling, draw
from anabranch.jobs.erase.scan import scan
from anabranch.jobs.erase.scan_settings import ScanSettings
from anabranch.models.diffusion.noising import noising
from anabranch.models.diffusion.prompts import tokenize
from anabranch.models.diffusion.small import clip_tokenizer
from anabranch.suppress.captioned import CaptionedBatches
from anabranch.suppress.denoising import Denoising
from anabranch.suppress.detectors import detect_checked, open_detector
from anabranch.suppress.geom_erasing.bins import Grid
from anabranch.suppress.geom_erasing.erase import Config, prepare
from anabranch.suppress.geom_erasing.words import Vocabulary
from anabranch.suppress.lora import add_lora
from benchmarks._timing import compare

THREADS, BATCH, SIDE = 2, 4, 32
BARS = {"Geom-Erasing step": 1.10, "peak memory of a step": 1.05, "sampling with a policy": 1.02, "scan": 1 / 0.9}
WORDS = Vocabulary(name="<mark>", grid=Grid(8, 8))


def pipeline() -> Any:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    tokenizer = clip_tokenizer(["a", "photo", "of", "dress", "mark"], 77)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        eos_token_id=tokenizer.eos_token_id, max_position_embeddings=77,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=SIDE, cross_attention_dim=128, block_out_channels=(64, 128), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), attention_head_dim=8,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(16, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    for network in (vae, pipe.text_encoder, unet):
        network.eval().requires_grad_(False)
    return pipe


def plain_step() -> Callable[[], None]:
    pipe = pipeline()
    parameters = list(add_lora(pipe, 8, 0).values())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    process = noising(pipe.scheduler)
    latents, ids = torch.randn(BATCH, 4, SIDE, SIDE), tokenize(pipe, ["a photo of dress"] * BATCH)[0]

    def step() -> None:
        noised = process.noise(latents, torch.randn_like(latents), torch.rand(BATCH))
        with torch.no_grad():
            embeds = pipe.text_encoder(ids)[0]
        output = pipe.unet(noised.latents, noised.timestep, embeds, return_dict=False)[0]
        torch.nn.functional.mse_loss(output, noised.target).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def our_step() -> Callable[[], None]:
    pipe = pipeline()
    boxes = [[(10 * i, 5, 10 * i + 16, 21)] if i % 2 else None for i in range(BATCH)]
    latents = torch.randn(BATCH, 4, SIDE, SIDE)
    ready = prepare(pipe, WORDS, Config(r=8), latents, ["a photo of dress"] * BATCH, boxes, size=64, word="mark")
    objective, stream = Denoising(pipe, ready.parameters), CaptionedBatches(ready.data, BATCH, seed=0)
    parameters = list(objective.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    number = iter(range(10**6))

    def step() -> None:
        objective(stream.batch(next(number)))["loss"].backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def peak_of(step: str) -> float:
    """Growth of the resident set over ten steps, MB, in a fresh process."""
    script = (
        "import benchmarks.erasing as b, torch\n"
        f"torch.set_num_threads({THREADS}); step = b.{step}(); before = b.resident(); "
        "[step() for _ in range(10)]; print('peak', b.resident() - before)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return float(done.stdout.split("peak")[-1])


def resident() -> float:
    """Peak of this process, MB; not getrusage, which a child inherits from its parent."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def sampling() -> dict[str, Callable[[], object]]:
    pipe = pipeline()
    prompts, seeds = ["a photo of dress"] * 2, [0, 1]
    how = Sampling(scale=5.0, steps=6, batch_size=2)

    def stock() -> object:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe(
            prompts, negative_prompt=["mark"] * 2, guidance_scale=5.0, num_inference_steps=6, generator=generators
        )

    return {
        "stock pipeline, a negative prompt": stock,
        "sampling with a policy": lambda: draw(pipe, prompts, ["mark mark"] * 2, seeds, how),
    }


def scanning(folder: Path) -> dict[str, float]:
    """Pictures a second of the scan and of the detector alone, in turns."""
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 255, (512, 512, 3), dtype=np.uint8) for _ in range(24)]
    for number, array in enumerate(arrays):
        Image.fromarray(array).resize((128, 128)).resize((512, 512)).save(folder / f"{number}.png")
    pixels = [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]
    detector = open_detector("qr")
    ratios = []
    for _ in range(7):
        started = time.perf_counter()
        for first in range(0, len(pixels), 8):
            detect_checked(detector, pixels[first : first + 8])
        bare = time.perf_counter() - started
        started = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            scan(ScanSettings(images=folder, detector="qr", out=folder.parent / "labels.jsonl"))
        ratios.append((time.perf_counter() - started) / bare)
    return {"scan": float(np.median(ratios))}


def main() -> None:
    torch.set_num_threads(THREADS)
    report(compare({"plain LoRA step": plain_step(), "Geom-Erasing step": our_step()}, "plain LoRA step", rounds=15))
    plain, ours = peak_of("plain_step"), peak_of("our_step")
    say("peak memory of a step", ours / plain, f"{ours:.0f} MB against {plain:.0f} MB")
    report(compare(sampling(), "stock pipeline, a negative prompt", rounds=9))
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where) / "pictures"
        folder.mkdir()
        for name, ratio in scanning(folder).items():
            say(name, ratio, "time of the scan by that of its detector (qr)")


def report(ratios: dict[str, Any]) -> None:
    for name, ratio in ratios.items():
        say(name, ratio.median, f"{1000 * ratio.seconds:.0f} ms")


def say(name: str, ratio: float, note: str) -> None:
    bar = f"   bar {BARS[name]:.2f} {'met' if ratio <= BARS[name] else 'missed'}" if name in BARS else ""
    print(f"  {name:<36} {ratio:5.2f}  ({note}){bar}")


if __name__ == "__main__":
    main()
