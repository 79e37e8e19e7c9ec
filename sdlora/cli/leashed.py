"""``python -m sdlora.cli.leashed``: the ``sdlora`` command, stopped when its standard input ends; see ``sweeps.leash``."""

from ..sweeps.leash import hold
from . import main

if __name__ == "__main__":
    hold()
    main()
