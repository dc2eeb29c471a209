# SPDX-License-Identifier: Apache-2.0
"""The command line with sub-nets that learn in double precision: what differs then is no rounding.

In single precision sums in another order differ in the last bit, and norms over few images and rectifiers at zero make
1e-3 of it within a few steps.
"""

import sys

import torch

from anabranch import cli
from anabranch.jobs.transfer import pretrain_sdr
from anabranch.specialize.sdr import objective


def in_double(replace):
    """`replace(module, name, value)` is setattr, or that of a monkeypatch."""
    views_in, unsplit = objective.views_in, pretrain_sdr.unsplit
    replace(objective, "views_in", lambda batch, training: [view.double() for view in views_in(batch, training)])
    replace(objective, "negative_cosine", lambda p, z: -torch.cosine_similarity(p, z.detach(), dim=1).mean())
    replace(pretrain_sdr, "unsplit", lambda *arguments: unsplit(*arguments).double())


if __name__ == "__main__":
    in_double(setattr)
    sys.exit(cli.main(sys.argv[1:]))
