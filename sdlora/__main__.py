"""``python -m sdlora``: the same as the ``sdlora`` command."""

from .cli import main

main()
