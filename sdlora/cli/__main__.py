"""``python -m sdlora.cli``: the same as the ``sdlora`` command."""

from . import main

main()
