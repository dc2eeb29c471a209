# SPDX-License-Identifier: Apache-2.0
"""What `anabranch pretrain --method moce` or `sdr` learned, apart from the folder of its run: to be kept and shared.

whole = RunModel.from_pretrained("runs/moce")  # whole.model is routed, whole.base plain, whole.clusters chooses
whole.push_to_hub("owner/name")  # `anabranch customize --run FOLDER` takes what is fetched again
"""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anabranch.allocate.clusters.record import Clustering
from anabranch.errors import UsageError
from anabranch.models.hub.card import front_matter
from anabranch.models.hub.pretrained import Pretrained

CARD = """\
{head}# Experts for clusters of images ({method})

{what} for {clusters} clusters, learned from {images:,} images without labels. Where a task's images fall says which
dense model serves it:

```bash
anabranch customize --run path/to/this/folder --task path/to/the/images --out model
```

gives an ordinary transformers checkpoint.

| | |
| --- | --- |
| steps | {steps} |
| images | {images:,}, {unreadable} unreadable ones left out |
| tensors | {named} named to be trained, {changed} changed, {untouched} of the named as before |

Whether experts gain over the plain model trained on as long was not measured by the training: `base` is that model's
start, and `anabranch measure` compares. `summary.json` holds what else is known. Which training image fell into which
cluster is not in here.
"""


@dataclass(frozen=True, kw_only=True, eq=False)
class RunModel(Pretrained):
    MARK = "summary.json"

    folder: Path
    base: nn.Module
    clusters: Clustering
    model: nn.Module
    """Routed by cluster: a masked autoencoder with experts, or a super-net."""
    summary: dict[str, Any]

    def save_pretrained(self, folder: str | Path, *, card: str | None = None) -> Path:
        if Path(folder).resolve() == self.folder.resolve():
            raise UsageError(f"{folder} is the run itself", expected="another folder", hint="another name")
        return super().save_pretrained(folder, card=card)

    def write_files(self, folder: Path) -> None:
        """base/, clusters/ without the labels of single images, model/, summary.json."""
        for name in ("base", "model"):
            shutil.copytree(self.folder / name, folder / name)
        replace(self.clusters, labels=torch.zeros(0, dtype=torch.int64)).save(folder / "clusters")
        (folder / self.MARK).write_text(json.dumps(self.summary, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read_files(cls, folder: Path) -> "RunModel":
        from anabranch.jobs.transfer.customize import read_summary
        from anabranch.jobs.transfer.pretrain_experts import load_experts
        from anabranch.jobs.transfer.pretrain_sdr import load_subnets
        from anabranch.models.bridge import open_model

        summary = read_summary(folder)
        if summary["method"] not in ("moce", "sdr"):
            raise UsageError(
                f"{folder} holds no experts of clusters", expected="a run of --method moce or sdr",
                received=summary["method"], hint="its folder model is a stock transformers checkpoint",
            )  # fmt: skip
        base, clusters = open_model(folder / "base"), Clustering.load(folder / "clusters")
        model = load_experts(folder, base, clusters) if summary["method"] == "moce" else load_subnets(folder)[0]
        return cls(folder=folder, base=base, clusters=clusters, model=model, summary=summary)

    def card(self) -> str:
        summary = self.summary
        method = summary["method"]
        what = "Experts of a masked autoencoder (MoCE, arXiv 2402.05382)"
        if method == "sdr":
            what = f"{len(summary['paths'])} sub-nets of one ResNet (SDR, arXiv 2205.13267)"
        head = front_matter(
            library_name="anabranch", tags=["mixture-of-experts", method, "self-supervised"],
            pipeline_tag="image-feature-extraction",
        )  # fmt: skip
        return CARD.format(
            head=head, method=method, what=what, clusters=len(self.clusters), images=summary["images"],
            steps=summary["steps"], unreadable=summary["quarantine"], named=summary.get("named", "?"),
            changed=summary.get("changed", "?"), untouched=len(summary.get("untouched", [])),
        )  # fmt: skip
