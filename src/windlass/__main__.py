"""``python -m windlass``."""

from windlass.cli import run

run()
