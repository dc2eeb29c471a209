# SPDX-License-Identifier: Apache-2.0
"""Plant mistakes in the layer, one at a time, and count how many its tests find.

    python scripts/mutants.py                      # 100 drawn mistakes in anabranch.mixture
    python scripts/mutants.py --number 0           # all of them, which takes a night
    python scripts/mutants.py --room train --only checkpoint.py --seed 3

A mistake is a comparison, operator, number, condition, or statement that is another one or gone. It is made in a copy
of the package, whose tests then run until the first that fails: those of the file itself before the others. Mistakes
that change nothing a test could see are counted as any other that nobody found.
"""

import argparse
import ast
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent
SECONDS = 400
"""After which a mistake is found by the clock: something waits, or goes round for ever."""
OUTPUT = "output.txt"
OTHER = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add,
    ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
FOUND, MISSED, LATE = "found", "missed", "found by the clock"


class Mistake(NamedTuple):
    file: Path
    """In the room's folder."""
    node: int
    """Its number in the walk over the file's tree."""
    variant: int


def variants(node: ast.AST) -> Iterator[Callable[[], None]]:
    """Ways to spoil this node in place."""
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            yield lambda i=i, op=op: node.ops.__setitem__(i, OTHER[type(op)]())
    elif isinstance(node, (ast.BinOp, ast.AugAssign, ast.BoolOp)) and type(node.op) in OTHER:
        yield lambda: setattr(node, "op", OTHER[type(node.op)]())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield lambda: setattr(node, "op", ast.UAdd())
    elif is_not(node):
        yield lambda: become(node, node.operand)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        changed = not node.value if isinstance(node.value, bool) else node.value + 1
        yield lambda: setattr(node, "value", changed)
    if isinstance(node, (ast.If, ast.IfExp)) and not is_not(node.test):  # else that of the test itself
        yield lambda: setattr(node, "test", ast.UnaryOp(ast.Not(), node.test))
    for body in (getattr(node, name, None) for name in ("body", "orelse", "finalbody")):
        for i, statement in enumerate(body if isinstance(body, list) else ()):
            if can_go(statement):
                yield lambda body=body, i=i: body.__setitem__(i, ast.Pass())


def is_not(node: ast.AST) -> bool:
    return isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not)


def become(node: ast.AST, other: ast.AST) -> None:
    """In place: a node does not know its parent."""
    node.__class__, node.__dict__ = other.__class__, other.__dict__


def can_go(statement: ast.stmt) -> bool:
    """Calls, raises and writes into something; a name that is never given would be noticed by anything."""
    if isinstance(statement, ast.Assign):
        return not isinstance(statement.targets[0], (ast.Name, ast.Tuple))
    if isinstance(statement, ast.Expr):
        return not isinstance(statement.value, ast.Constant)
    return isinstance(statement, (ast.AugAssign, ast.Raise))


def passed_over(tree: ast.AST) -> set[ast.AST]:
    """What is no code that runs: annotations, and what only type checkers read."""
    found: set[ast.AST] = set()
    for node in ast.walk(tree):
        parts = [getattr(node, name, None) for name in ("annotation", "returns")]
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            parts.append(node)
        found |= {inner for part in parts if part for inner in ast.walk(part)}
    return found


def mistakes(room: Path, only: list[str]) -> list[Mistake]:
    found = []
    for file in sorted(room.glob("*.py")):
        if only and file.name not in only:
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        quiet = passed_over(tree)
        for number, node in enumerate(ast.walk(tree)):
            count = 0 if node in quiet else len(list(variants(node)))
            found += [Mistake(file.relative_to(room), number, variant) for variant in range(count)]
    return found


def spoilt(text: str, mistake: Mistake) -> tuple[str, str]:
    """The file with the mistake, and the line that differs: number, before, after."""
    tree = ast.parse(text)
    before = ast.unparse(tree).splitlines()
    node = list(ast.walk(tree))[mistake.node]
    list(variants(node))[mistake.variant]()
    ast.fix_missing_locations(tree)
    after = ast.unparse(tree).splitlines()
    odd = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(after) - 1)
    place = getattr(node, "lineno", 1)
    return "\n".join(after) + "\n", f"{place}: {before[odd].strip()}  ->  {after[odd].strip()}"


def run_tests(root: Path, tests: list[str]) -> str:
    """In a child of this process, which has loaded torch already, and nothing of the package."""
    shutil.rmtree(root / ".hypothesis", ignore_errors=True)
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        output = os.open(root / OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        import pytest

        options = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow and not night", "--hypothesis-seed=0"]
        options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of plug-ins that came with torch
        code = 1
        try:
            code = int(pytest.main([*options, *tests]))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    ends = time.monotonic() + SECONDS
    while time.monotonic() < ends:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return FOUND if os.waitstatus_to_exitcode(status) else MISSED
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return LATE


def in_order(folder: Path, file: Path) -> list[str]:
    """The test files, that of the mutated file first and those that start processes last."""

    def rank(path: Path) -> tuple[bool, bool, str]:
        return path.stem != f"test_{file.stem}", "run_many" in path.read_text(encoding="utf-8"), path.name

    return [str(path) for path in sorted(folder.glob("test_*.py"), key=rank)]


def copied(scratch: Path, room: str) -> Path:
    """The package and its tests, beside one another, so that one entry of the path leads to both."""
    shutil.copytree(ROOT / "src" / "anabranch", scratch / "anabranch")
    shutil.copytree(ROOT / "tests", scratch / "tests", ignore=shutil.ignore_patterns("golden", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", scratch)
    shutil.rmtree(scratch / "anabranch" / room / "__pycache__", ignore_errors=True)  # two versions in one second
    os.chdir(scratch)
    sys.path.insert(0, str(scratch))
    os.environ |= {"PYTHONPATH": str(scratch), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    sys.dont_write_bytecode = True
    return scratch / "anabranch" / room


def tell(results: dict[Mistake, tuple[str, str]]) -> None:
    missed = [(mistake, line) for mistake, (how, line) in results.items() if how == MISSED]
    for mistake, line in missed:
        print(f"  {mistake.file}:{line}")
    late = sum(how == LATE for how, _ in results.values())
    found = len(results) - len(missed)
    share = 100 * found / len(results)
    print(f"{found} of {len(results)} mistakes were found ({share:.1f} %), {late} of them by the clock")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--room", default="mixture")
    parser.add_argument("--only", nargs="*", default=[], help="files of the room")
    parser.add_argument("--number", type=int, default=100, help="drawn ones; 0 for all")
    parser.add_argument("--seed", type=int, default=0)
    options: Any = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        room = copied(Path(scratch), options.room)
        import peft  # noqa: F401  here, and not again in each child
        import torch  # noqa: F401

        known = mistakes(room, options.only)
        if not known:
            parser.error(f"nothing to spoil in {' '.join(options.only) or options.room}")
        drawn = random.Random(options.seed).sample(known, min(options.number or len(known), len(known)))
        print(f"{len(drawn)} of {len(known)} mistakes in {options.room}, seed {options.seed}", flush=True)
        tests = Path(scratch, "tests", options.room)
        if run_tests(Path(scratch), in_order(tests, Path("none"))) != MISSED:
            print((Path(scratch) / OUTPUT).read_text(encoding="utf-8"), "\nthe tests fail without any mistake")
            return 1
        results = {}
        for number, mistake in enumerate(drawn):
            file = room / mistake.file
            text = file.read_text(encoding="utf-8")
            wrong, line = spoilt(text, mistake)
            file.write_text(wrong, encoding="utf-8")
            how = run_tests(Path(scratch), in_order(tests, mistake.file))
            file.write_text(text, encoding="utf-8")
            results[mistake] = how, line
            print(f"{number + 1:4} {how:<18} {mistake.file}:{line}"[:160], flush=True)
        tell(results)
        os.chdir(ROOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
