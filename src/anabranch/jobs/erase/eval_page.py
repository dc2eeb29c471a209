# SPDX-License-Identifier: Apache-2.0
"""The page of `anabranch erase eval`: the verdict, the same seeds under every arm, all rates, and what is not known."""

from pathlib import Path
from typing import Any

from anabranch.jobs.erase.eval_sections import (
    ATTACKS,
    control_section,
    detectors,
    diagnostics,
    not_measured,
    per_cent,
    policy_section,
    quality_section,
    rates,
    strip_rows,
    under_attack,
)
from anabranch.jobs.erase.study import After, Before
from anabranch.report.figures import strips
from anabranch.report.page import Page, Section, write
from anabranch.report.text import MISSING, estimate


def write_eval_page(out: Path, result: dict[str, Any], before: Before, after: After | None) -> Path:
    sections = [
        side_by_side(result, before, after),
        rates(result),
        *under_attack(result),
        *control_section(result, after),
        diagnostics(result, before, after),
        *policy_section(result),
        *quality_section(result),
        not_measured(result),
        detectors(result),
    ]
    page = Page(
        title=f"Is “{result['concept']}” gone?",
        lead=lead(result),
        facts=facts(result),
        sections=sections,
    )
    return write(page, out / "report.html")


def lead(result: dict[str, Any]) -> list[str]:
    start = per_cent(result["arms"]["before"]["icr"])
    warnings = [f"Mind: {warning}." for warning in result["warnings"]]
    if result["verdict"] is None:
        return [f"Drawn unasked in {start} of the pictures; no eraser was given.", *warnings]
    found, end = result["verdict"], per_cent(result["arms"]["erased"]["icr"])
    change = result["arms"]["erased"]["minus_before"]
    said = {
        "nothing erased": "Nothing was shown to be erased.",
        "suppressed": "Suppressed: plain prompts draw it less often; more than that was not shown.",
        "robust": "Robust: it stays away under the attacks that were tried on prompts and weights.",
        "removed": "Removed: no attack brings it back, and it is relearnt no faster than by a model that never saw it.",
    }[found["level"]]
    if found["void"]:
        said = f"Void: {found['reasons'][0]}. A control failed, so the rest of this page proves nothing."
    less = estimate(*(100 * change[end] for end in ("difference", "low", "high")))
    return [
        said,
        f"Drawn unasked in {start} of the pictures before and in {end} after, from the same prompts and seeds: "
        f"{less} points.",
        *warnings,
    ]


def facts(result: dict[str, Any]) -> list[tuple[str, object]]:
    rows = [
        ("model", result["model"]),
        ("adapter", result["adapter"] or MISSING),
        ("negative prompt", result["policy"] or MISSING),
        ("pictures", f"{result['samples']:,} an arm from {result['prompts']:,} prompts, seed {result['seed']}"),
        ("sampling", f"guidance {result['guidance']:g}, {result['steps']} steps"),
        ("detector", result["detectors"][0]["name"]),
    ]
    return rows if len(result["detectors"]) < 2 else [*rows, ("second detector", result["detectors"][1]["name"])]


def side_by_side(result: dict[str, Any], before: Before, after: After | None) -> Section:
    """The first seeds, unselected."""
    rows = [("before", before.arms["before"])]
    if "word" in before.arms:
        rows.append(("its word as negative prompt", before.arms["word"]))
    text = ["The first seeds of the run, not a choice of them. A frame: the detector found the concept there."]
    if after is not None:
        rows.append(("erased", after.arms["erased"]))
        plain = {k: arm for k, arm in after.attacked.arms.items() if not k.startswith("partial")}  # same start
        worst = sorted(plain.items(), key=lambda item: -item[1].seen.rate.rate)[:3]
        rows += [(ATTACKS.get(name, name), arm) for name, arm in worst]
        if worst:
            text.append(
                "Below the erased pictures: the three attacks on the same seeds that brought it back most often."
            )
    figure = strips(strip_rows(rows), "The same seeds")
    return Section("What it draws", text=text, figures=[figure])
