"""One family of solvers a file; importing this package registers them all. No solver needs torch."""

from . import adaptive, euler, few_step, heun, multistep, restart, unipc  # noqa: F401
