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


class Watch:
    """Told of every module that is looked for, whoever looks for it and whether or not it is there."""

    def __init__(self):
        self.seen = []

    def find_spec(self, name, path=None, target=None):
        self.seen.append(name)


@pytest.fixture
def watch():
    finder = Watch()
    sys.meta_path.insert(0, finder)
    yield finder
    sys.meta_path.remove(finder)


def refuses(look_up, name):
    try:
        look_up(name)
    except UsageError:
        return True
    return False


@pytest.mark.row("S7")
def test_names_outside_the_registry_are_refused_before_an_import(trap, watch, counted, monkeypatch):
    wrong, known = [], registry.cards()
    monkeypatch.setattr(registry, "cards", lambda: known)  # read from the files once, not for every name
    for look_up in LOOK_UPS:
        refuses(look_up, "nothing-of-that-name")  # what of our own is imported where it is needed
        for name in NAMES:
            watch.seen.clear()
            if not refuses(look_up, name):
                wrong.append(f"{look_up.__name__}({name[:40]!r}) found something")
            wrong += [f"{look_up.__name__}({name[:40]!r}) looked for {watch.seen}"] if watch.seen else []
    assert wrong == []
    assert "trap" not in sys.modules
    found = 0
    for name in IMPORTABLE:
        watch.seen.clear()
        found += pydoc.locate(name) is not None or bool(watch.seen)
    assert "trap" in sys.modules  # the control imports it
    words = f"of {len(IMPORTABLE)} are found by a look-up of paths"
    counted(len(NAMES) * len(LOOK_UPS), len(wrong), control=(found, words), least=len(IMPORTABLE))
