# SPDX-License-Identifier: Apache-2.0
"""Inject the faults and attacks, count what they did, write the table into docs/trust.md and its sums into README.md.

    python scripts/trust.py               # what runs in a quarter of an hour on two cores
    python scripts/trust.py full          # everything but the night's
    python scripts/trust.py night
    python scripts/trust.py full --rows R4 R6   # some rows, printed and written nowhere

Every number comes from the run that writes it: tests say what they injected (the fixture `counted`), pytest writes it
down, this file adds up. Exit code 3 if a fault did harm, a test failed, or a control was missing or did not see the
harm.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
FRONT, PAGE = ROOT / "README.md", ROOT / "docs" / "trust.md"
BEGIN, END = "<!-- trust:begin -->", "<!-- trust:end -->"
TIERS = {
    "quick": "row and not night and (not slow or row(cheap=True))",
    "full": "row and not night",
    "night": "row",
}
CONTRACT = {"gradcheck": "N1", "nan": "N6", "inf": "N6", "dtype": "N7", "rng": "N9"}
"""Which row counts a check of the contract that every method is held to."""
ROWS = {
    "R1": "death before, after and amid every file-system call of saving, pruning, publishing, starting",
    "R2": "SIGKILL at random moments while saving; R3 is its control",
    "R4": "resumed runs that equal the uninterrupted one bit for bit, from every step; R5 is its control",
    "R6": "SIGTERM while training, evaluating, profiling, writing chains, drawing answers: resumed to the same result",
    "R7": "full disks and cut-off writes",
    "R8": "flipped bits in each file of a checkpoint",
    "R9": "missing, empty, cut files; places that cannot be written; second writers",
    "R10": "checkpoints that earlier versions wrote",
    "R11": "a process killed or frozen in mid-step or mid-save of a run of two or four",
    "R12": "runs resumed with another number of processes",
    "N1": "derivatives of loss terms and routing weights against finite differences",
    "N2": "closed forms of routing losses",
    "N4": "drawn routers: padding, permuted experts, parts of a batch, noise",
    "N5": "drawn sequences of take, drop, merge, permute, grow, change of storage on expert banks",
    "N6": "NaN and infinities in inputs and parameters of methods",
    "N7": "bf16 and fp16 against fp32",
    "N8": "losses of small recipes that were written down, step by step",
    "N9": "calls that leave the global generators alone",
    "N10": "routers traced as one graph by torch.compile, and by torch.export",
    "S1": "pickles that run code, given to everything that opens a file",
    "S2": "hostile file names",
    "S3": "altered weight files",
    "S4": "altered images",
    "S5": "files that grow when opened",
    "S6": "altered configurations, lists, lines and manifests",
    "S7": "names of methods, models, detectors that are not ours",
    "S8": "hostile words on a report page, in a browser",
    "S9": "sockets, processes and writes while the package is imported",
    "S10": "planted secrets looked for in what runs write",
    "U1": "targets that match nothing",
    "U3": "wrong inputs answered with what, expected, received, try",
    "U4": "answers without importing torch",
    "U5": "public names of `__all__` that are there",
    "U8": "tests in drawn orders",
}
KINDS = {
    "R": "**crash and resume**: kills, signals, full disks, flipped bits, lost processes",
    "N": "**numbers**: derivatives, closed forms, NaN, half precision, permutations, golden losses",
    "S": "**attacks**: pickles, hostile names, altered weights and images, bombs, secrets",
    "U": "**what a user is told**: targets that match nothing, wrong inputs",
}


@dataclass
class Row:
    """What the tests of one row said together."""

    faults: int = 0
    bad: int = 0
    tests: int = 0
    failed: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    controls: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tiers: set[str] = field(default_factory=set)
    blind: bool = False
    """A control saw no harm, or not all of it where all has to be seen."""

    @property
    def broken(self) -> bool:
        return bool(self.bad or self.failed or self.blind)

    @property
    def unproved(self) -> bool:
        """It ran without a control, and no test was skipped that could be the control."""
        return bool(self.tests and not self.controls and not self.skipped)


def run_tests(tier: str, results: Path, only: list[str]) -> int:
    """pytest tells of its failures itself, as it goes; its exit code."""
    quiet = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "-m", TIERS[tier], f"--junitxml={results}"]
    if only:
        contract = ["contract"] if set(only) & set(CONTRACT.values()) else []
        command += ["--rows", ",".join([*only, *contract])]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **quiet}, check=False).returncode


def read_results(results: Path) -> dict[str, Row]:
    """By row; where everything was run, samples of it are left out."""
    cases = defaultdict(list)
    for case in ElementTree.parse(results).iter("testcase"):
        said = [(one.get("name"), one.get("value")) for one in case.iter("property")]
        row = dict(said).get("row")
        if row == "contract":
            for name in of_contract(said) if done(case) else broken_contract(case):
                cases[name].append((case, said))
        elif row:
            cases[row].append((case, said))
    rows = {}
    for name, all_of_row in cases.items():
        whole = [(case, said) for case, said in all_of_row if dict(said)["sample"] != "True" and done(case)]
        samples = [(case, said) for case, said in all_of_row if dict(said)["sample"] == "True"]
        rest = [(case, said) for case, said in all_of_row if dict(said)["sample"] != "True" and not done(case)]
        rows[name] = Row()
        for case, said in whole + rest + ([] if whole else samples):
            add(rows[name], case, said)
        for _, said in samples if whole and not rows[name].controls else []:
            rows[name].controls += [words for key, words in said if key == "control"]
    return rows


def of_contract(said: list[tuple[str, str]]) -> list[str]:
    return [CONTRACT[check] for check in dict(said).get("passed", "").split() if check in CONTRACT]


def broken_contract(case: ElementTree.Element) -> list[str]:
    """The rows of the checks that its message names; one that never got so far breaks all of them."""
    text = "".join(part.get("message", "") for kind in ("failure", "error") for part in case.findall(kind))
    named = {CONTRACT[check] for check in CONTRACT if f"\n{check}: " in text}
    return sorted(named or ([] if "breaks its contract" in text else set(CONTRACT.values())))


def done(case: ElementTree.Element) -> bool:
    return all(case.find(kind) is None for kind in ("skipped", "failure", "error"))


def add(row: Row, case: ElementTree.Element, said: list[tuple[str, str]]) -> None:
    values = dict(said)
    name = f"{case.get('classname')}::{case.get('name')}"
    if (skipped := case.find("skipped")) is not None:
        row.skipped.append(skipped.get("message", ""))
        return
    row.tests += 1
    row.tiers.add(values["tier"])
    row.faults += int(values.get("faults", 1))
    row.bad += int(values.get("bad", 0))
    row.controls += [words for key, words in said if key == "control" and words not in row.controls]
    least = float(values.get("control_least", 1))
    row.blind |= any(float(number) < least for key, number in said if key == "control_seen")
    row.notes += [words for key, words in said if key == "note" and words not in row.notes]
    if not done(case):
        row.failed.append(name)
        row.bad += values.get("bad", "0") == "0"


def table(rows: dict[str, Row], tier: str, when: str, only: list[str]) -> str:
    lines = ["| | what | faults and checks | harm | control | tier |", "| --- | --- | ---: | ---: | --- | --- |"]
    for name, what in ROWS.items():
        row = rows.get(name)
        if only and name not in only:
            continue
        if row is None or not row.tests:
            why = row.skipped[0].removeprefix("Skipped: ") if row and row.skipped else f"not in the tier {tier}"
            lines.append(f"| {name} | {what} | | | *not run: {plain(why)}* | |")
            continue
        harm = f"**{row.bad}**" if row.bad else "0"
        words = [*row.controls, *row.notes, *([f"{len(row.skipped)} not run: {row.skipped[0]}"] if row.skipped else [])]
        tiers = ", ".join(sorted(row.tiers))
        lines.append(f"| {name} | {what} | {row.faults:,} | {harm} | {plain('; '.join(words)) or '*none*'} | {tiers} |")
    return "\n".join([measured(rows, tier, when), "", *lines])


def sums(rows: dict[str, Row], tier: str, when: str) -> str:
    """The front page's: a line a kind."""
    lines = ["| | faults and checks | harm | rows with a control that sees the harm |", "| --- | ---: | ---: | ---: |"]
    for kind, what in KINDS.items():
        ran = [row for name, row in rows.items() if name[0] == kind and row.tests]
        faults, bad = sum(row.faults for row in ran), sum(row.bad for row in ran)
        seen = sum(bool(row.controls) and not row.blind for row in ran)
        lines.append(f"| {what} | {faults:,} | {f'**{bad}**' if bad else 0} | {seen} of {len(ran)} |")
    return "\n".join([measured(rows, tier, when), "", *lines])


def measured(rows: dict[str, Row], tier: str, when: str) -> str:
    return f"Measured {when} by `make trust{'' if tier == 'quick' else f' TIER={tier}'}`: {summary(rows)}"


def summary(rows: dict[str, Row]) -> str:
    ran = [row for row in rows.values() if row.tests]
    faults, bad = sum(row.faults for row in ran), sum(row.bad for row in ran)
    return f"{faults:,} faults and checks in {len(ran)} of {len(ROWS)} rows, {bad} of them did harm."


def plain(words: str) -> str:
    return " ".join(words.replace("|", "\\|").split())


def write_into(page: Path, block: str) -> bool:
    """Between the markers; False where they are missing."""
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        print(f"trust: {page.relative_to(ROOT)} has no {BEGIN} … {END}, so the table is not in it", file=sys.stderr)
        return False
    page.write_text(f"{before}{begin}\n{block}\n{end}{after}", encoding="utf-8")
    return True


def asked(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="trust", description="faults and attacks, counted")
    parser.add_argument("tier", nargs="?", default="quick", choices=[*TIERS])
    parser.add_argument("--rows", nargs="+", default=[], choices=[*ROWS], metavar="ROW", help="only these, not written")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    flags = asked(arguments)
    tier = flags.tier
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        code = run_tests(tier, results, flags.rows)
        if not results.is_file():
            print("trust: pytest wrote no results", file=sys.stderr)
            return 1
        rows = {name: row for name, row in read_results(results).items() if not flags.rows or name in flags.rows}
    unknown = sorted(rows.keys() - ROWS.keys())
    when = f"{datetime.now(UTC):%Y-%m-%d}"
    block = table(rows, tier, when, flags.rows)
    print(block)
    failed = any(row.failed for row in rows.values())
    if flags.rows:
        written = []
    elif code == 0 or failed:  # else it is not known what the table leaves out
        written = [write_into(FRONT, sums(rows, tier, when)), write_into(PAGE, block)]
    else:  # a worker that died, a file that could not be read: they count in no row
        print(f"trust: pytest ended with {code}, and no row says why; nothing was written", file=sys.stderr)
        written = [False]
    for name in sorted({name for row in rows.values() for name in row.failed}):
        print(f"trust: failed: {name}", file=sys.stderr)
    if unknown or not rows:
        print(f"trust: rows without words: {', '.join(unknown) or 'all'}", file=sys.stderr)
    unproved = [] if flags.rows else sorted(name for name, row in rows.items() if row.unproved)
    if unproved:
        print(f"trust: rows without a control: {', '.join(unproved)}", file=sys.stderr)
    broken = code != 0 or unproved or any(row.broken for row in rows.values())
    return 3 if broken or unknown or not rows else 0 if all(written) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
