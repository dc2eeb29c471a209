# SPDX-License-Identifier: Apache-2.0
"""Who may import whom, what a card must say, and what the project may weigh."""

import ast
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import anabranch
from anabranch import registry

ROOT = Path(anabranch.__file__).parent
SMALL = {"errors", "plugins", "swap"}
VERBS = set(registry.VERBS)
MAY_IMPORT = {
    "mixture": SMALL,
    "models": SMALL | {"mixture"},
    "data": SMALL,
    "train": SMALL | {"mixture"},
    "report": SMALL,
    "measure": SMALL | {"mixture", "models", "data", "train"},
    **{verb: SMALL | {"mixture", "models", "data", "train", "measure"} for verb in VERBS - {"measure"}},
    "testing": SMALL | {"mixture", "models", "registry"},
}
FOREIGN = {"mixture": {"torch"}}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_arrows_between_rooms(room):
    allowed = MAY_IMPORT[room] | {room, ""}
    for path in (ROOT / room).rglob("*.py"):
        ours = {name.split(".")[1] for name in imports(path) if name.startswith("anabranch.")}
        rooms = {name for name in ours if (ROOT / name).is_dir() or (ROOT / f"{name}.py").exists()}
        assert rooms <= allowed, f"{path} imports {rooms - allowed}"


def test_no_job_stands_on_another():
    """What two of them need lies beside their rooms."""
    rooms = [folder.name for folder in (ROOT / "jobs").iterdir() if (folder / "__init__.py").is_file()]
    assert len(rooms) >= 4
    for room in rooms:
        for path in (ROOT / "jobs" / room).rglob("*.py"):
            others = {f"anabranch.jobs.{name}" for name in rooms} - {f"anabranch.jobs.{room}"}
            assert not others & {".".join(name.split(".")[:3]) for name in imports(path)}, path


@pytest.mark.parametrize("folder", ["src", "tests", "recipes", "benchmarks", "scripts", "docs"])
def test_every_name_that_is_imported_exists(folder):
    """Inside of functions too, where a missing one shows only when a user runs the command."""
    wrong, seen = [], 0
    for path in (ROOT.parent.parent / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "anabranch":
                module, seen = importlib.import_module(node.module), seen + len(node.names)
                wrong += [
                    f"{path.name}: {node.module}.{alias.name}" for alias in node.names if missing(module, alias.name)
                ]
    assert seen
    assert not wrong


def missing(module: ModuleType, name: str) -> bool:
    return not hasattr(module, name) and importlib.util.find_spec(f"{module.__name__}.{name}") is None


@pytest.mark.parametrize("room", sorted(FOREIGN))
def test_the_layer_stands_on_torch_alone(room):
    standard = set(sys.stdlib_module_names)
    for path in (ROOT / room).rglob("*.py"):
        outside = {name.split(".")[0] for name in imports(path)} - standard - {"anabranch"}
        assert outside <= FOREIGN[room], f"{path} imports {outside - FOREIGN[room]}"


def test_every_card_is_whole():
    cards = registry.cards()
    assert "specialize/moce" in cards
    for key, card in cards.items():
        assert set(card.fields) - {"Exempt"} == {"Paper", "Equation", "Shapes", "Differs", "Check"}, key
        assert all(card.exempt.values()), f"{key}: an exemption without a reason"
        assert len(card.purpose) <= 120, key
        named = [word.strip("().,;") for word in card.fields["Check"].split() if word.strip("(").startswith("tests/")]
        assert named, f"{key}: Check names no test"
        assert all((ROOT.parent.parent / name).exists() for name in named), f"{key}: {named}"


def test_no_pickle_comes_in_or_goes_out():
    for path in ROOT.rglob("*.py"):
        names = imports(path)
        assert not names & {"pickle", "joblib", "dill"}, path
        text = path.read_text(encoding="utf-8")
        assert "torch.load(" not in text, path
        assert "torch.save(" not in text, path


def test_the_picture_of_the_rooms_is_what_they_import():
    script = ROOT.parent.parent / "scripts" / "architecture.py"
    found = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert found.returncode == 0, f"{found.stdout}run python scripts/architecture.py"


def test_files_of_the_package_stay_small():
    size = sum(path.stat().st_size for path in ROOT.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert size <= 16_000_000  # 2.8 of it a small diffusion model, 6.8 a small mixture of experts, 1.0 its six texts


@pytest.mark.row("S9")
def test_importing_the_package_starts_nothing(counted):
    script = """
import sys
events = []
def watch(event, args):
    writes = event == "open" and isinstance(args[1], str) and "w" in args[1]
    if writes or event.startswith(("socket.", "subprocess.", "os.system")):
        events.append((event, args))
sys.addaudithook(watch)
import anabranch
assert not events, events
assert "torch" not in sys.modules
import socket, subprocess
socket.socket().close()
subprocess.run([sys.executable, "-c", ""], check=True)
open("/dev/null", "w").close()
print(len({event for event, args in events}))
"""
    done = subprocess.run([sys.executable, "-B", "-c", script], check=True, capture_output=True, text=True)
    counted(3, control=(int(done.stdout), "kinds of events are seen where they are caused on purpose"), least=3)
