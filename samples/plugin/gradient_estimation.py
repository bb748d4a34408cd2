"""Gradient estimation, Permenter and Yuan 2023 (2306.04848): Euler with ε extrapolated from its last change."""

from schedulers import solver


@solver(
    order=1,
    grid="karras",
    reference="Permenter and Yuan 2023 (2306.04848), algorithm 2",
    formula="x' = first + (γ − 1)·(σ' − α'ρ)·(ε − ε₋), ₋ the step before",
)
def gradient_estimation(x, grid, noise, *, gamma: float = 2.0):
    """Extrapolate ε from its change since the last step."""
    previous = None
    for p, q in grid.pairs():
        d = yield x, p
        x = q.alpha * d.x0 + q.sigma * d.eps
        if previous is not None and q.sigma != 0:
            x = x + (d.eps - previous) * ((gamma - 1) * (q.sigma - q.alpha * p.rho))
        previous = d.eps
    return x
