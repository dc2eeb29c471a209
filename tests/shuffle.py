# SPDX-License-Identifier: Apache-2.0
"""`pytest -p tests.shuffle --shuffle SEED`: modules in a drawn order, and the tests of each as well."""

import random

import pytest


def pytest_addoption(parser):
    parser.addoption("--shuffle", type=int, default=None, metavar="SEED", help="run the tests in a drawn order")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    seed = config.getoption("shuffle")
    if seed is None:
        return
    generator, modules = random.Random(seed), {}
    for item in items:
        modules.setdefault(item.path, []).append(item)
    order = list(modules)
    generator.shuffle(order)
    for tests in modules.values():
        generator.shuffle(tests)
    items[:] = [item for path in order for item in modules[path]]
