# SPDX-License-Identifier: Apache-2.0
"""Names of methods, models, detectors and pipelines come from our lists: others are refused before an import."""

import pydoc
import sys

import pytest

from anabranch import registry
from anabranch.errors import UsageError
from anabranch.models.bridge import bridge
from anabranch.models.diffusion.family import family_named
from anabranch.suppress.detectors.open import open_detector

IMPORTABLE = [
    "os.system", "os", "subprocess.Popen", "logging.os.system", "builtins.eval", "importlib.import_module",
    "posixpath", "shutil.rmtree", "trap", "trap.run", "anabranch.errors", "anabranch.cli", "anabranch.registry",
    "torch.hub.load", "torch.load", "pickle.loads", "runpy.run_path", "code.interact", "ctypes", "webbrowser.open",
]  # fmt: skip
NAMES = [
    *IMPORTABLE,
    "", " ", ".", "..", "/", "../errors", "specialize/../errors", "specialize/moce/../../errors",
    "specialize/moce.py", "specialize/moce/", "/specialize/moce", "specialize//moce", "specialize.moce",
    "specialize\\moce",
    "specialize/MOCE",
    "specialize/moce\0", "specialize/moce\n", "specialize/moce:os.system", "specialize/*", "specialize/__init__",
    "specialize/mote/folder", "ѕpecialize/moce", "specialize/mocе", "specialize/ｍoce", "specialize/mo\u200bce",
    "anabranch/specialize/moce", "anabranch..specialize", "__import__('trap')", "trap; import trap", "file:///trap.py",
    "{trap}", "${HOME}", "!!python/name:trap", "jobs/measure", "train/loop", "bridge", "shards", "a" * 5000,
]  # fmt: skip
LOOK_UPS = (registry.get, bridge, family_named, open_detector)


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A module that anybody can import, and who does is seen."""
    (tmp_path / "trap.py").write_text("def run(): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("trap", None)


@pytest.mark.row("S7")
def test_names_outside_the_registry_are_refused_before_an_import(trap, counted, monkeypatch):
    wrong, known = [], registry.cards()
    monkeypatch.setattr(registry, "cards", lambda: known)  # read from the files once, not for every name
    for look_up in LOOK_UPS:
        for name in NAMES:
            before = set(sys.modules)
            try:
                look_up(name)
                wrong.append(f"{look_up.__name__}({name[:40]!r}) found something")
            except UsageError:
                pass
            new = {module for module in set(sys.modules) - before if module.split(".")[0] in ("trap", "ctypes")}
            wrong += [f"{look_up.__name__}({name[:40]!r}) imported {new}"] if new or "trap" in sys.modules else []
    assert wrong == []
    found = sum(pydoc.locate(name) is not None for name in IMPORTABLE)
    assert "trap" in sys.modules  # the control imports it
    counted(len(NAMES) * len(LOOK_UPS), len(wrong), control=(found, f"of {len(NAMES)} are found by a look-up of paths"))
