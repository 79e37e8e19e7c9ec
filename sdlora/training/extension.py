"""More steps for a run that is there already: finished, half-done, or extended before.

An extension changes no step that was planned before it. Its own steps follow the schedule of the whole, longer run, so a
cosine that had fallen to 0 goes on from where that of the longer run is. The optimizer's state and what is drawn go on as if
the run had been that long from the start; with a constant schedule the result is the same.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import ResumeError
from ..files import printable
from .checkpoint import RunFolder, RunIdentity, run_of
from .plan import RunPlan


def continued(plan: RunPlan, *, extend: int | None) -> RunPlan:
    """``plan`` with the length of the run that is there already, and ``extend`` steps more.

    An extension that was interrupted goes on, with or without the same ``extend``. A run that differs from ``plan`` is left
    to those who read its state; they list the differences.

    Raises:
        ResumeError: there is no run, or another extension is not finished, or the last state of a finished run is gone.
    """
    output = Path(plan.config.output.path)
    folder = RunFolder(output, plan.identity)
    made, half = run_of(output), folder.half_done()
    unfinished = half is not None and (made is None or len(half.extended) > len(made.extended))
    run = half if unfinished else made
    if run is None:
        if extend is None or output.exists():
            return plan
        raise ResumeError(f"{printable(output)}: there is no run to extend yet; start it without --extend")
    known = _with_length_of(plan, run)
    if extend is None or known.identity.differences(run.anywhere()):
        return known
    if unfinished and run.extended:
        if run.extended[-1] != extend:
            raise ResumeError(
                f"{printable(output)}: its extension by {run.extended[-1]} steps is not finished; run the command without "
                "--extend to finish it, then extend it again"
            )
        return known
    if not unfinished and half is None and not _kept(folder, run):
        raise ResumeError(
            f"{printable(output)}: the state after its last step was not kept, so it cannot go on; train "
            f"{known.steps + extend} steps from the start (train.steps={known.steps + extend} --restart), or start another "
            "run from its weights with lora.start_from"
        )
    return known.with_length(known.length.planned, (*run.extended, extend))


def _with_length_of(plan: RunPlan, run: RunIdentity) -> RunPlan:
    """``plan`` with the extensions of ``run``, and where ``plan`` states no length, with its length too."""
    try:
        planned = run.planned if plan.length_by_images else plan.length.planned
    except (ValueError, KeyError):
        planned = plan.length.planned
    return plan.with_length(planned, run.extended)


def _kept(folder: RunFolder, run: RunIdentity) -> bool:
    last = folder.last_state()
    return last is not None and not run.anywhere().differences(last.anywhere()) and last.extended == run.extended
