"""``python -m sdlora.cli``."""

from . import main

main()
