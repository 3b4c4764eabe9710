"""Every private or internal name of a library that this project uses, and what for.

tests/test_compat.py has a test for each: it fails when a new version moves or changes the name.

The libraries are imported inside the functions: they are slow to import, and each module that
imports this one needs only one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hydra._internal.callbacks import Callbacks
    from hydra.core.config_loader import ConfigLoader
    from hydra.core.utils import JobReturn

# --- Hydra ---------------------------------------------------------------------------------------

# How the ValueError begins that Hydra raises for `loss=null`, where a group needs the name of one
# of its files. It has no class of its own, and its text does not help a user.
NOT_A_CHOICE = "Config group override"


def split_grid(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of each run of a grid, in the order in which Hydra's basic sweeper runs them.

    Used to check all runs before the first one starts. Hydra calls `split_arguments` later, and
    offers no public way to ask for its result.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_overrides(list(overrides))
    [batch] = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    return batch


@contextmanager
def skip_validation(is_checked: Callable[[], bool]) -> Iterator[None]:
    """While this is open, a sweeper does not compose its runs once more if `is_checked()`.

    Hydra's sweepers compose each run only to see whether that is possible, which takes 70 ms a run.
    The patched method is that of the base class: Hydra loads its plugins from their files, so the
    class of the sweeper in use is another one than the class that an import gives.
    """
    from hydra.plugins.sweeper import Sweeper

    validate = Sweeper.validate_batch_is_legal

    def validate_unless_checked(sweeper: Sweeper, batch: Sequence[Sequence[str]]) -> None:
        if not is_checked():
            validate(sweeper, batch)

    Sweeper.validate_batch_is_legal = validate_unless_checked  # type: ignore
    try:
        yield
    finally:
        Sweeper.validate_batch_is_legal = validate  # type: ignore[method-assign]


def config_loader() -> ConfigLoader:
    """What Hydra composes configs with: it also lists the files of a group, and the search path.

    `hydra.compose` alone gives neither the `hydra` section of a sweep's run nor these lists.
    """
    from hydra.core.global_hydra import GlobalHydra

    return GlobalHydra.instance().config_loader()


def no_callbacks() -> Callbacks:
    """An empty set of callbacks, for jobs around which none of ours are to be called."""
    from hydra._internal.callbacks import Callbacks

    return Callbacks()


def job_error(job: JobReturn) -> Exception:
    """The error of a failed job. The public `return_value` would print a line, and raise it."""
    return job._return_value
