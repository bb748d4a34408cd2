"""What a comparison shows, in sentences, and what it lacks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from diffgen.errors import DiffgenError

from .ranks import BELOW, by_setting, rankable
from .results import Results, RowResult
from .tables import name_of, numbered, with_interval

MOST_NAMED = 4  # schedulers that are tied with the best


def verdict(results: Results) -> Iterator[str]:
    """What the figures show, a sentence for each budget and setting, and what they cannot show."""
    if results.reference.kind == "none":
        yield "There is no reference, so nothing is ranked: compare the pictures and the seconds."
    several = len(results.axes.prompts) > 1 or len(results.axes.guidance) > 1
    for (budget, prompt, guidance), rows in by_setting(results.rows).items():
        where = f" ({prompt!r}, guidance {guidance:g})" if several else ""
        if rankable(rows):
            yield f"At {numbered(budget, 'evaluation')}{where} {_best(rankable(rows))}."
    yield from _limits(results)
    yield from _failures(results)
    if unexpected := [d for d in results.duplicates if not d.expected]:
        a, b = (results.cells[i] for i in unexpected[0].cells[0])
        yield (
            f"{name_of(a)} at {a.budget} and {name_of(b)} at {b.budget} gave the same pixels by different arithmetic: "
            "the pictures have converged, or an option has no effect."
        )


def _best(rows: Sequence[RowResult]) -> str:
    """Which of the ranked rows is best, and which are tied with it."""
    best = rows[0]
    assert best.error is not None
    if best.error.n < 2:
        return f"{name_of(best)} is nearest to the reference ({best.error.mean:.3g}), but one seed is too few to rank"
    tied = [name_of(row) for row in rows[1:] if row.rank == 1]
    if tied and len(tied) == len(rows) - 1:
        return (
            f"the {len(rows)} schedulers are statistically tied over {best.error.n} seeds; {name_of(best)} has the "
            f"lowest mean error, {with_interval(best.error)}"
        )
    text = f"{name_of(best)} is nearest to the reference: {with_interval(best.error)}"
    if tied:
        text += f"; statistically tied: {', '.join(tied[:MOST_NAMED])}"
        text += f" and {len(tied) - MOST_NAMED} more" if len(tied) > MOST_NAMED else ""
    return text


def _limits(results: Results) -> Iterator[str]:
    """What is not ranked, and why."""
    floor = results.reference.error
    if floor and any(row.error is not None and row.error.mean < BELOW * floor for row in results.rows):
        yield f"Errors below {BELOW * floor:.2g} share a rank: the reference itself is accurate to about {floor:.2g}."
    if own := sorted({f"{name_of(row)} at {row.budget}" for row in results.rows if row.is_reference}):
        yield f"The reference itself is not ranked: {', '.join(own)}."
    if stochastic := sorted({row.label for row in results.rows if row.stochastic}):
        if len(stochastic) == 1:
            yield f"{stochastic[0]} draws noise: it has no fixed solution to measure against, so it is not ranked."
        else:
            names = f"{', '.join(stochastic[:-1])} and {stochastic[-1]}"
            yield f"{names} draw noise: they have no fixed solution to measure against, so they are not ranked."


def _failures(results: Results) -> Iterator[str]:
    if reasons := _unmeasured(results):
        yield f"The pictures of {numbered(len(reasons), 'scheduler')} could not be measured: {reasons[0]}."
    cells = results.cells
    if failed := [cell for cell in cells if cell.status == "failed"]:
        yield (
            f"{len(failed)} of {len(cells)} cells failed: {failed[0].reason}. A scheduler with a failed cell is not "
            "ranked."
        )
    if missing := sum(cell.status == "missing" for cell in cells):
        yield (f"{missing} of {len(cells)} cells are not made yet. A scheduler with a missing cell is not ranked.")
    if reason := results.reference.reason:
        yield f"A reference could not be computed: {reason}."


def failure(results: Results) -> DiffgenError | None:
    """The first thing that was requested and could not be made, with its exit code; None if there is no such thing."""
    message = _failure(results)
    if message is None:
        return None
    error = DiffgenError(message)
    if len(results.codes) == 1:  # everything failed in the same way
        (error.code,) = results.codes
    return error


def _failure(results: Results) -> str | None:
    failed = [cell for cell in results.cells if cell.status == "failed"]
    if failed:
        reasons = sorted({cell.reason for cell in failed if cell.reason})
        return f"{len(failed)} of {len(results.cells)} cells failed: {'; '.join(reasons)[:500]}"
    if reasons := _unmeasured(results):
        settings = numbered(len(reasons), "setting")
        return f"the pictures of {settings} could not be measured: {'; '.join(sorted(set(reasons)))}"[:500]
    if results.reference.reason:
        return f"a reference could not be computed: {results.reference.reason}"
    return None


def _unmeasured(results: Results) -> list[str]:
    """Why pictures could not be measured against the data, one reason for each setting."""
    return [] if results.distribution is None else [row.reason for row in results.distribution.rows if row.reason]
