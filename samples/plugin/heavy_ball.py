"""Heavy ball, Wizadwongsa et al. 2023 (2307.11118): euler with a moving average of ε."""

from schedulers import solver


@solver(order=1, grid="karras", reference="Wizadwongsa et al. 2023 (2307.11118), heavy ball of order 1")
def heavy_ball(x, grid, noise, *, beta: float = 0.8):
    """v ← (1 − β)·v + β·ε, x' = first-order step + (v − ε)·(σ' − α'·σ/α)."""
    v = None
    for p, q in grid.pairs():
        d = yield x, p
        x = q.alpha * d.x0 + q.sigma * d.eps
        if v is not None and q.sigma != 0:
            v = v * (1 - beta) + d.eps * beta
            x = x + (v - d.eps) * (q.sigma - q.alpha * p.rho)
        else:
            v = d.eps
    return x
