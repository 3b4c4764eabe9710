"""The end of a sweep: the table of its runs, what they show in words, and what to do next."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from losswatch.config.quoting import resume_command
from losswatch.text import nearby


def show_table(folder: Path) -> bool:
    """Write summary.csv and print how a sweep's runs ended; return whether all are done.

    Raises:
        OSError: the summary cannot be written, or the table cannot be printed. One failure does
            not prevent the other of the two.
    """
    # Imported late: it takes a second, and train.py imports this file at its start.
    from losswatch.report.runs import read_runs
    from losswatch.report.tables import print_summary, write_summary
    from losswatch.report.words import in_words

    failure = None
    try:
        runs = write_summary(folder)
    except OSError as error:
        runs, failure = read_runs(folder), error
    all_done = bool((runs.status == "done").all())
    places = {"Summary": nearby(folder / "summary.csv")}
    script = Path(sys.argv[0]).parent / "scripts/report.py"  # of a checkout, beside train.py
    if script.is_file():
        places["Report"] = shlex.join(["python", str(script), nearby(folder)])
    places["Browse"] = shlex.join(["tensorboard", "--logdir", nearby(folder)])
    if not all_done:
        places["Resume"] = resume_command("hydra.sweep.dir", nearby(folder))
    # If the output is not a terminal, rich would fold the table at 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 160)
    with console.capture() as printed:  # if the pipe is closed, rich would end the process
        console.print()
        print_summary(console, runs)
        console.print()
        sentences = in_words(runs)
        for sentence in sentences:
            console.print(Text(sentence))
        if sentences:
            console.print()
        for name, place in places.items():  # the terminal breaks long lines, so they can be copied
            console.print(Text.assemble((name.ljust(9), "bold"), place), soft_wrap=True)
    print(printed.get(), end="", flush=True)
    if failure:
        raise failure
    return all_done
