# SPDX-License-Identifier: Apache-2.0
import pytest


@pytest.fixture(scope="session")
def loaders(tmp_path_factory):
    """Everything that opens a file; each opens its own folder, or the tests would see refusals of something else."""
    from tests.trust.loaders import all_loaders  # half the package: only where it is used

    found = all_loaders(tmp_path_factory.mktemp("loaders"))
    for loader in found:
        loader.open(loader.folder)
    return {loader.name: loader for loader in found}
