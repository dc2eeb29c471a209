# SPDX-License-Identifier: Apache-2.0
"""Our eraser inside the benchmark eval-unlearn: its protocol, and the benchmark itself where it is installed."""

import importlib
import json
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import torch

import anabranch
from anabranch.errors import UsageError
from anabranch.jobs.erase.technique import GeomErasing
from anabranch.models.diffusion.family import open_pipeline
from anabranch.suppress.geom_erasing.adapter import apply
from tests.jobs.erase.world import baked

PROMPTS = ["a dress", "a bag", "a dress"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return baked(tmp_path_factory.mktemp("technique"))


def config(root, **more):
    return {"model": str(root / "model"), "adapter": str(root / "adapter"), "steps": 2, **more}


def pixels(images):
    return np.stack([np.asarray(image) for image in images])


def stock(root, adapter, prompts, seed):
    """What diffusers draws with the adapter's negative prompt, one picture a call."""
    pipe = open_pipeline(root / "model")
    arguments = apply(pipe, root / adapter).arguments() if adapter == "adapter" else {}
    if adapter == "baked":
        pipe.load_lora_weights(root / adapter)
    return [
        pipe(prompt, num_inference_steps=2, generator=torch.Generator().manual_seed(seed + i), **arguments).images[0]
        for i, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize("adapter", ["adapter", "baked"])
def test_it_draws_what_stock_diffusers_draws_with_the_adapter(made, adapter):
    technique = GeomErasing(**config(made, adapter=str(made / adapter)))
    images = technique.generate(prompts=PROMPTS, seed=7)
    assert (pixels(images) == pixels(stock(made, adapter, PROMPTS, 7))).all()
    assert (pixels(technique.generate(PROMPTS[1:], seed=8)) == pixels(images)[1:]).all(), "i is drawn from seed + i"
    assert (pixels(images)[0] != pixels(images)[2]).any()
    assert not (pixels(technique.generate(PROMPTS)) == pixels(technique.generate(PROMPTS))).all()
    longer = technique.generate(PROMPTS, seed=7, num_inference_steps=3, guidance_scale=2.0)
    assert (pixels(longer) != pixels(images)).any()


def test_what_it_is_told_and_can_not_do_is_said(made):
    with pytest.raises(UsageError, match=r"no setting 'polcy'(.|\n)*did you mean policy"):
        GeomErasing(**config(made), polcy="all")
    with pytest.raises(UsageError, match="needs adapter"):
        GeomErasing(model="anything")
    with pytest.raises(UsageError, match=r"erases another concept(.|\n)*nudity(.|\n)*mark"):
        GeomErasing(**config(made, erase_concept="nudity"))
    technique = GeomErasing(**config(made, erase_concept="Mark"))
    assert technique.generate(["a bag"], seed=0)
    with pytest.raises(UsageError, match="policy would change nothing here"):
        technique.generate(["a bag"], seed=0, policy="all")


def entries():
    project = Path(anabranch.__file__).parents[2] / "pyproject.toml"
    return tomllib.loads(project.read_text(encoding="utf-8"))["project"]["entry-points"]


def test_both_names_of_the_benchmark_find_it():
    for group in ("eval_unlearn.techniques", "eval_learn.techniques"):
        (name, value), = entries()[group].items()  # fmt: skip
        assert EntryPoint(name, value, group).load() is GeomErasing


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("package", ["eval_unlearn", "eval_learn"])
def test_the_benchmark_runs_it(made, tmp_path, monkeypatch, package):
    pytest.importorskip(package)
    info = tmp_path / "site" / "ours-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ours\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "".join(f"[{group}]\n{name} = {value}\n" for group, found in entries().items() for name, value in found.items())
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    registry, types, runners = (
        importlib.import_module(f"{package}.{part}") for part in ("registry", "types", "runners")
    )
    seen = []

    class Darkness:
        """A measure on prompts that are written here: nothing is downloaded."""

        def load_dataset(self):
            return [types.Dataset(PROMPTS[:2], {"source": "here"}), types.Dataset(PROMPTS[2:], {"source": "here"})]

        def update(self, images, prompts, metadata):
            seen.extend(zip(prompts, images, strict=True))

        def compute(self):
            return types.MetricResult("darkness", float(np.mean([np.asarray(image).mean() for _, image in seen])))

    registry.register_metric("darkness")(Darkness)
    settings = {"technique_config": config(made, erase_concept="mark"), "output_dir": str(tmp_path / "out"), "seed": 7}
    runner = runners.SingleBenchmarkRunner("geom_erasing", "darkness", **settings)
    report = runner.run()
    expected = [*stock(made, "adapter", PROMPTS[:2], 7), *stock(made, "adapter", PROMPTS[2:], 7)]
    assert (pixels([image for _, image in seen]) == pixels(expected)).all()
    assert report["metric_result"]["value"] == pytest.approx(pixels(expected).mean(), rel=1e-6)
    assert report["erase_concept"] == "mark"
    assert json.dumps(report)
