"""One family of solvers a file; importing this package registers them all. No solver needs torch."""

from . import euler, multistep  # noqa: F401
