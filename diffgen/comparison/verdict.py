"""What a comparison shows, in sentences."""

from __future__ import annotations

from typing import Any

from .ranks import BELOW, _by_setting, _judged
from .tables import name_of, numbered, shown


def verdict(found: dict[str, Any]) -> list[str]:
    """What the figures allow to be said, a sentence for each budget and setting; and what they do not."""
    sentences = []
    if found["reference"]["kind"] == "none":
        sentences.append("There is no reference, so nothing is ranked: compare the pictures and the seconds.")
    several = len(found["axes"]["prompts"]) > 1 or len(found["axes"]["guidance"]) > 1
    for (budget, prompt, guidance), rows in _by_setting(found["rows"]).items():
        where = f" ({prompt!r}, guidance {guidance:g})" if several else ""
        judged = _judged(rows)
        if not judged:
            continue
        best, n = judged[0], judged[0]["error"]["n"]
        at = f"At {numbered(budget, 'evaluation')}{where}"
        if n < 2:
            sentences.append(
                f"{at} {name_of(best)} came nearest to the reference ({best['error']['mean']:.3g}), but one seed ranks "
                "nothing: use several."
            )
            continue
        tied = [r for r in judged[1:] if r["rank"] == 1]
        if tied and len(tied) == len(judged) - 1:
            sentences.append(
                f"{at} {n} seeds tell none of the {len(judged)} schedulers apart: the mean of {name_of(best)} is the "
                f"least, {shown(best['error'])}, and the others' cannot be told from it."
            )
            continue
        text = f"{at} {name_of(best)} is nearest to the reference: {shown(best['error'])}"
        if tied:
            text += f"; not told apart from it: {', '.join(name_of(r) for r in tied[:4])}"
            text += f" and {len(tied) - 4} more" if len(tied) > 4 else ""
        sentences.append(text + ".")
    floor, near = found["reference"]["error"], [r for r in found["rows"] if r["error"] is not None]
    if floor and any(r["error"]["mean"] < BELOW * floor for r in near):
        sentences.append(
            f"Errors below {BELOW * floor:.2g} are not told apart: the reference itself is known to about {floor:.2g} "
            "only."
        )
    if own := sorted({f"{name_of(r)} at {r['budget']}" for r in found["rows"] if r["is_reference"]}):
        sentences.append(f"No rank for the reference itself: {', '.join(own)}.")
    if reasons := _unmeasured(found):
        sentences.append(f"The pictures of {len(reasons)} schedulers could not be measured: {reasons[0]}.")
    if stochastic := sorted({r["label"] for r in found["rows"] if r["stochastic"]}):
        verb = "draws" if len(stochastic) == 1 else "draw"
        sentences.append(
            f"{', '.join(stochastic)} {verb} noise on the way: no distance to a solution has a meaning, so there is no "
            "rank."
        )
    if failed := [c for c in found["cells"] if c["status"] == "failed"]:
        sentences.append(
            f"{len(failed)} of {len(found['cells'])} cells failed: {failed[0]['reason']}. Where one of a scheduler's "
            "seeds failed, it has no rank."
        )
    if missing := sum(c["status"] == "missing" for c in found["cells"]):
        sentences.append(
            f"{missing} of {len(found['cells'])} cells are not made yet; a scheduler without some of them has no rank."
        )
    if reason := found["reference"].get("reason"):
        sentences.append(f"A reference could not be made: {reason}.")
    if odd := [d for d in found["duplicates"] if not d["expected"]]:
        i, j = odd[0]["cells"][0]
        a, b = found["cells"][i], found["cells"][j]
        sentences.append(
            f"{name_of(a)} at {a['budget']} and {name_of(b)} at {b['budget']} gave the same pixels by different "
            "arithmetic: the pictures have converged, or an option has no effect."
        )
    return sentences


def missing(found: dict[str, Any]) -> str | None:
    """Of what results.json has, what was asked for and could not be made, the first of it; None if all is there."""
    failed = [cell for cell in found["cells"] if cell["status"] == "failed"]
    if failed:
        reasons = sorted({cell["reason"] for cell in failed if cell["reason"]})
        return f"{len(failed)} of {len(found['cells'])} cells failed: {'; '.join(reasons)[:500]}"
    if reasons := _unmeasured(found):
        of = numbered(len(reasons), "setting")
        return f"the pictures of {of} could not be measured: {'; '.join(sorted(set(reasons)))}"[:500]
    if reason := found["reference"]["reason"]:
        return f"a reference could not be made: {reason}"
    return None


def _unmeasured(found: dict[str, Any]) -> list[str]:
    """Why schedulers' pictures could not be measured against the data, one reason for each."""
    return [row["reason"] for row in (found["distribution"] or {"rows": ()})["rows"] if row["reason"]]
