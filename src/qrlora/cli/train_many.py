"""`qrlora train-many JOBS.yaml`: many trainings on one loaded model."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from qrlora.cli._options import say
from qrlora.cli.train import split_arguments
from qrlora.errors import QrloraError

if TYPE_CHECKING:
    from qrlora.training import Job, JobResult

USAGE = """usage: qrlora train-many JOBS.yaml [--any.key value ...]

JOBS.yaml has the keys of `qrlora train` that all jobs share, output_dir among them, and jobs: a list in which each has
a name and its own keys, instance_data_dir and instance_prompt mostly. Options win over both. All is checked before
anything is trained. Each job gets the folder output_dir/NAME; beside them lie summary.json, contact.png and pictures/.
Run again, finished jobs stay as they are, and interrupted ones continue exactly. Exit codes: 0 all done, 1 some jobs
failed (the others are done), 2 bad input (nothing was trained), 130 and 143 stopped.
"""


def run(arguments: Sequence[str]) -> None:
    """Parse, check, train, and show what came out."""
    if any(argument in ("-h", "--help") for argument in arguments):
        print(USAGE)
        return
    file, overrides = split_arguments(arguments)
    if file is None:
        raise QrloraError("name the list of trainings: qrlora train-many JOBS.yaml (see --help).")
    from qrlora.blend.contact import check_contact, draw_contact
    from qrlora.training import (
        Interrupted,
        JobsFailed,
        check_on_model,
        check_summary,
        load_for_series,
        read_series,
        train_series,
    )
    from qrlora.training.memory import enough_to

    series = read_series(file, overrides)
    check_summary(series.output)
    check_contact(series)
    model = load_for_series(series)
    check_on_model(series, model)

    def announce(number: int, job: "Job") -> None:
        say(f"job {number} of {len(series.jobs)}: {job.name}")

    try:
        results = train_series(series, model, on_job=announce)
    except Interrupted as stop:
        stop.args = (f"stopped at step {stop.step}; saved in {stop.checkpoint}; the same command goes on from there.",)
        raise
    say("\n".join(table(results)))  # before anything else can fail
    with enough_to("draw the contact sheet", series.jobs[0].config.memory):
        print(draw_contact(series, results, model))
    if any(result.status == "failed" for result in results):
        raise JobsFailed(results, series.output / "summary.json")


def table(results: "Sequence[JobResult]") -> list[str]:
    """One line a job: how it ended, steps, loss, seconds, and the file or what was wrong."""
    width = max(len(result.name) for result in results)
    lines = [f"{'job':<{width}}  {'':<8}  {'steps':>6}  {'loss':>7}  {'s':>7}"]
    for result in results:
        loss = "" if result.loss is None else f"{result.loss:.4f}"
        numbers = f"{result.steps:>6}  {loss:>7}  {result.seconds:>7.1f}"
        lines.append(f"{result.name:<{width}}  {result.status:<8}  {numbers}  {result.error or result.adapter}")
    return lines
