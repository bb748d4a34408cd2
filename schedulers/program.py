"""A solver's run as a table of numbers: one fused update for each evaluation.

Each state of a run is a weighted sum of earlier states, outputs and noises. The weights depend only on the points. So
the solver runs once on symbols, and the loop inside a pipeline only adds up. A solver that does something else with
its tensors (a learned variance) has no such table and runs as a generator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from schedulers.noise import Point
from schedulers.prediction import Denoised, Pair
from schedulers.solver import Steps

# ("x", i) the state at evaluation i, ("y", i) its output, ("u", i) that without the prompt, ("z", k) noise number k
Key = tuple[str, int]


class Sum:
    """Σ weight·symbol, with the operations that solvers apply to states: +, −, and products with numbers."""

    __slots__ = ("weights",)

    def __init__(self, weights: dict[Key, float]) -> None:
        self.weights = weights

    def __add__(self, other: Any) -> Any:
        if isinstance(other, Sum):
            weights = dict(self.weights)
            for key, w in other.weights.items():
                weights[key] = weights.get(key, 0.0) + w
            return Sum(weights)
        return self if isinstance(other, (int, float)) and other == 0 else NotImplemented

    def __mul__(self, factor: Any) -> Any:
        if not isinstance(factor, (int, float)):
            return NotImplemented
        return Sum({key: w * factor for key, w in self.weights.items()})

    def __sub__(self, other: Any) -> Any:
        return self + other * -1.0

    def __rsub__(self, other: Any) -> Any:
        return self * -1.0 + other

    def __truediv__(self, divisor: Any) -> Any:
        return self * (1 / divisor)

    def __neg__(self) -> Any:
        return self * -1.0

    __radd__, __rmul__ = __add__, __mul__


class Program:
    """A run: for each evaluation its point, the noises drawn after it, and the weights of the next state.

    `done_with` lists the values that no later evaluation needs.
    """

    def __init__(self, run: Callable[[Any, Any], Steps], pair: str | Pair, cfg_pp: bool = False) -> None:
        """Record run(x, noise). Raises TypeError or AttributeError for a solver that is not linear in its tensors."""
        self.points: list[Point] = []
        self.draws: list[list[tuple[Key, Point, Point]]] = []
        self.updates: list[list[tuple[Key, float]]] = []
        drawn: list[tuple[Key, Point, Point]] = []
        count = 0

        def noise(p: Point, q: Point) -> Sum:
            nonlocal count
            drawn.append((("z", count), p, q))
            count += 1
            return Sum({drawn[-1][0]: 1.0})

        steps = run(Sum({("x", 0): 1.0}), noise)
        x, p = next(steps)
        running = True
        while running:
            i = len(self.points)
            drawn.clear()  # noise before the first evaluation belongs to a state that the caller makes
            without = Sum({("u", i): 1.0}) if cfg_pp else None
            d = Denoised(Sum({("x", i): 1.0}), Sum({("y", i): 1.0}), p, pair, without=without)
            self.points.append(p)
            try:
                x, p = steps.send(d)
            except StopIteration as stop:
                x, running = stop.value, False
            self.draws.append(list(drawn))
            self.updates.append([(key, w) for key, w in (x + Sum({})).weights.items() if w != 0])
        last: dict[Key, int] = {}
        for i, update in enumerate(self.updates):
            values = [("x", i), ("y", i), ("u", i), *(key for key, _, _ in self.draws[i])]
            last |= dict.fromkeys([*values, *(key for key, _ in update)], i)
        self.done_with = [[key for key, at in last.items() if at == i] for i in range(len(self.points))]

    def advance(
        self, i: int, values: dict[Key, Any], x: Any, y: Any, u: Any, noise: Callable[[Point, Point], Any]
    ) -> Any:
        """The state after evaluation i, from its state x, output y, and output without the prompt u.

        `values` keeps what later evaluations need.
        """
        values |= {("x", i): x, ("y", i): y, ("u", i): u}
        for key, p, q in self.draws[i]:
            values[key] = noise(p, q)  # drawn even if unused, so that the generator advances as in the native loop
        (key, w), *rest = self.updates[i]
        total = values[key] * w
        for key, w in rest:
            total.add_(values[key], alpha=w)
        for key in self.done_with[i]:
            del values[key]
        return total
