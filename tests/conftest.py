# SPDX-License-Identifier: Apache-2.0
"""One thread a process: tests run side by side."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def pytest_addoption(parser):
    parser.addoption("--rows", default="", help="only the tests of these rows of the table of trust: R4,R6")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """What `make trust` reads from the results: the row of its table that a test belongs to."""
    for item in items:
        if item.get_closest_marker("night"):
            item.add_marker("slow")  # whoever leaves out the slow ones leaves out these
        if row := item.get_closest_marker("row"):
            item.user_properties += [("row", row.args[0]), ("sample", row.kwargs.get("sample", False))]
            tier = next((name for name in ("night", "slow") if item.get_closest_marker(name)), "fast")
            item.user_properties.append(("tier", "full" if tier == "slow" else tier))
    if wanted := set(filter(None, config.getoption("rows").split(","))):
        left_out = [item for item in items if dict(item.user_properties).get("row") not in wanted]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


@pytest.fixture
def counted(request):
    """Say at the end of a test how many faults it injected and how many of them did harm, which must be none.

    control=(number, words)  how often the same faults do harm where the protection is missing: it has to be seen
    least                    how often at least: all of them, unless only a share can do harm
    note                     words for the table, such as a time that was measured
    """

    def count(faults, bad=0, *, control=None, least=1, note=None):
        said = [("faults", faults), ("bad", bad)]
        if control is not None:
            said += [("control", f"{control[0]} {control[1]}"), ("control_seen", control[0]), ("control_least", least)]
        if note is not None:
            said.append(("note", note))
        request.node.user_properties += said
        assert bad == 0, f"{bad} of {faults} faults did harm"
        assert control is None or control[0] >= least, f"the test cannot see the harm: {control[0]} {control[1]}"

    return count
