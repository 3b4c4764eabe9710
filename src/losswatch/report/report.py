"""What a sweep left on disk, as data frames, tables and figures.

Nothing here trains or needs torch: a sweep is its folders, `<sweep>/<run>/` with TensorBoard event
files and `result.json`, on whatever machine they lie; a folder of sweeps is read like one of them.
Their contents are data: never executed, and stripped of markup and control characters wherever they
are shown. A run whose files are damaged is named in a warning and does not stop the others.
"""

import json
import logging
import os
import re
import stat
import struct
from collections.abc import Iterable, Iterator
from itertools import combinations, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import yaml
from google.protobuf.message import DecodeError
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.types_pb2 import DT_DOUBLE, DT_FLOAT, DT_HALF
from tensorboard.util.tensor_util import make_ndarray

from losswatch.files import replace_file

log = logging.getLogger(__name__)

# The tags of what is observed while training.
WATCHED = ("loss/", "grad_norm/", "grad_cosine/")
LENGTH = struct.Struct("<Q")  # of a record in an event file

# Where `read_runs` finds a run's settings in its record, and what they are called in tables.
SETTINGS = {
    "loss": "choices.loss",
    "theta": "config.theta",
    "optimizer": "choices.optimizer",
    "lr": "config.optimizer.lr",
    "model": "choices.model",
    "batch_norm": "config.model.batch_norm",
    "seed": "config.seed",
}
# Losses in the order, and so the colours, in which tables and figures show them: the study's first.
KNOWN_LOSSES = ["cce", "dice_fg", "dice", "dice_fg_square", "dice_square"]
METRICS = ["accuracy", "dice", "iou"]
OUTCOMES = [*METRICS, "seconds", "status", "error"]
LABELS = {
    "theta": "θ",
    "optimizer": "optimiser",
    "batch_norm": "BN",
    "accuracy": "accuracy",
    "dice": "Dice",
    "iou": "IoU",
}
STATUS_STYLES = {
    "done": "green",
    "failed": "bold red",
    "stopped": "yellow",
    "unfinished": "yellow",
}

# The types of a run's record, each part of which may be missing or null, and bounds far beyond any
# run's: what a stranger wrote could keep a reader busy for hours.
NUMBER = (int, float)
RECORD_TYPES: dict[str, tuple[type, ...]] = {
    "status": (str,),
    "error": (str,),
    "seconds": NUMBER,
    "overrides": (list,),
    "choices": (dict,),
    **{f"choices.{group}": (str,) for group in ("loss", "optimizer", "model")},
    "config": (dict,),
    "metrics": (dict,),
    **{f"metrics.{stage}/{name}": NUMBER for stage in ("val", "test") for name in METRICS},
}
RECORD_DEPTH, RECORD_KEYS = 32, 1000
JSON_BYTES, YAML_BYTES = 2**20, 2**17  # YAML is read far more slowly


# --- Reading -------------------------------------------------------------------------------------


def read_scalars(run_dir: str | Path) -> pd.DataFrame:
    """The scalars in a run's event files: a row per step (int64), a column per tag.

    NaN stands where a tag has no value at a step. Where a run was resumed, the later file replaces
    all that the earlier ones hold from the first step that it observed on; so does a restart marked
    within a file. A value written twice counts as last written.

    Which file is later: a file that begins at a step which the others have yet to reach comes after
    them, whatever its clock said, since it continues them. The clock decides between files that
    could both come next, such as two attempts that began at the same step.

    A torn end and a file that cannot be read are left out with a warning. The frame is empty where
    there are no scalars.
    """
    columns: dict[str, dict[int, float]] = {}
    read = map(_read_events, sorted(Path(run_dir).glob("events.out.tfevents.*")))
    for file in _in_order([file for file in read if file]):
        if file.marked is not None:
            _forget(columns, file.marked)
        # Metrics alone are no restart: a finished run that is looked at again writes them too.
        if file.observed is not None:  # a step is observed before it is taken, validated after it
            watched = {t: c for t, c in columns.items() if t.startswith(WATCHED)}
            _forget(watched, file.observed)
            _forget(columns, file.observed + 1)
        for tag, column in file.columns.items():
            columns.setdefault(tag, {}).update(column)

    frame = pd.DataFrame({tag: pd.Series(c, dtype=np.float64) for tag, c in columns.items() if c})
    frame.index = pd.Index(frame.index, dtype=np.int64, name="step")
    return frame.sort_index()


class EventFile(NamedTuple):
    """The scalars of an event file, and what says where it belongs among the others."""

    columns: dict[str, dict[int, float]]
    begun: float  # by the clock
    first: int  # step: of what is observed, where anything is
    following: int  # step that would come after its last
    observed: int | None  # first step observed
    marked: int | None  # first step of a marked restart


def _read_events(path: Path) -> EventFile | None:
    """An event file's scalars; None if it holds none and marks no restart."""
    columns: dict[str, dict[int, float]] = {}
    begun = marked = None
    try:
        for event in _events(path):
            if isinstance(event, Block):
                for tag, values in event.values.items():
                    _record(columns, tag, event.steps, values)
                continue
            if begun is None:
                begun = event.wall_time
            if event.session_log.status == SessionLog.START:
                marked = event.step if marked is None else min(marked, event.step)
                _forget(columns, event.step)
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    scalar = value.simple_value
                elif value.HasField("tensor") and _is_scalar(value.tensor):
                    scalar = make_ndarray(value.tensor).item()
                else:  # an image, HParams, a layout
                    continue
                _record(columns, value.tag, [event.step], [scalar])
    except OSError as error:
        log.warning("%s: left out, cannot be read (%s)", printable(path), _reason(error))
    except (ValueError, OverflowError) as error:  # a tensor's bytes do not fit its type
        log.warning("%s: damaged; the rest is left out (%s)", printable(path), _reason(error))
    columns = {tag: column for tag, column in columns.items() if column}
    if begun is None or not (columns or marked is not None):
        return None
    observed = min((min(c) for t, c in columns.items() if t.startswith(WATCHED)), default=None)
    starts = [step for step in (observed, marked) if step is not None]
    first = min(starts or map(min, columns.values()))
    last = max(map(max, columns.values()), default=first)
    ends = sorted(max(columns.values(), key=len, default={first: 0.0}))[-2:]
    following = last + (ends[-1] - ends[0] or 1)
    return EventFile(columns, begun, first, following, observed, marked)


def _in_order(files: list[EventFile]) -> Iterator[EventFile]:
    """The files one after another, by the rule of `read_scalars`."""
    waiting = sorted(files, key=lambda file: file.begun)
    reached = min((file.first for file in files), default=0)
    while waiting:
        ready = (file for file in waiting if file.first <= reached)
        # Where a stretch is missing no file continues the others: the next one by its steps then.
        file = next(ready, None) or min(waiting, key=lambda file: file.first)
        waiting.remove(file)
        reached = max(reached, file.following)
        yield file


def _forget(columns: dict[str, dict[int, float]], step: int) -> None:
    """Drop what columns hold from a step on."""
    for column in columns.values():
        for stale in [s for s in column if s >= step]:
            del column[stale]


def _record(
    columns: dict[str, dict[int, float]], tag: str, steps: list[int], values: list[float]
) -> None:
    """Add a tag's values at increasing steps."""
    column = columns.setdefault(tag, {})
    if steps[0] == 0 and any(column):  # that is, after a later step
        steps, values = steps[1:], values[1:]  # HParams: final metrics, repeated as if at step 0
    column.update(zip(steps, values, strict=True))


class Block(NamedTuple):
    """Events in a row that differ in nothing but time, step and values."""

    steps: list[int]  # increasing
    values: dict[str, list[float]]


def _events(path: Path) -> Iterator[Any]:
    """The events of a file up to its end, or to the first torn record; the first one never a Block.

    A record is its length (uint64), a checksum of that, the event, a checksum of the event. The
    checksums are not verified: in Python that would take ten times as long as all the rest.
    """
    data = _read(path)
    spans = [(12, -16)]  # where each event begins and how long it is, after one that is none
    position = 0
    try:
        while position < len(data):
            (size,) = LENGTH.unpack_from(data, position)
            if size == 0 or position + 16 + size > len(data):
                break
            spans.append((position + 12, size))
            position += 16 + size
    except struct.error:
        pass
    try:
        for size, stretch in groupby(spans[1:], key=itemgetter(1)):
            starts = [start for start, _ in stretch]
            position = starts[0] - 12
            block = _block(data, starts, size) if len(starts) > 8 and position else None
            if block:
                yield block
                continue
            for start in starts:
                position = start - 12
                yield Event.FromString(data[start : start + size])
        position = spans[-1][0] + spans[-1][1] + 4
        torn = position < len(data)
    except DecodeError:
        torn = True
    if torn:
        log.warning("%s: torn at byte %d; what follows is left out", printable(path), position)


def _block(data: bytes, starts: list[int], size: int) -> Block | None:
    """Events of one size in a row as a Block, hundreds of times as fast; None if they are not one.

    The first event says where the step and the values lie. Nothing else may differ, the time aside.
    """
    places = _layout(data[starts[0] : starts[0] + size])
    if places is None:
        return None
    step, tags = places
    rows = np.ndarray((len(starts), size), np.uint8, data, starts[0], (size + 16, 1))
    same = np.ones(size, bool)
    same[1:9] = same[step] = False
    for place in tags.values():
        same[place : place + 4] = False
    more = rows[:, step] >> 7  # a varint: seven bits a byte, the eighth set in all but the last
    if (rows[:, same] != rows[0, same]).any() or (more != more[0]).any():
        return None
    digits = (rows[:, step] & 0x7F).astype(np.int64)
    steps = (digits << 7 * np.arange(digits.shape[1])).sum(1)
    if (np.diff(steps) <= 0).any():
        return None
    values = {
        tag: rows[:, i : i + 4].copy().view("<f4")[:, 0].astype(float).tolist()
        for tag, i in tags.items()
    }
    return Block(steps.tolist(), values)


def _layout(event: bytes) -> tuple[slice, dict[str, int]] | None:
    """Where an event holds its step, and each tag's float; None if it holds anything else.

    Protocol buffers: a field is its number and type in one byte, then a length where it needs one.
    """

    def varint(i: int) -> tuple[int, int]:
        end = i
        while event[end] & 0x80:
            end += 1
        return sum((event[j] & 0x7F) << 7 * (j - i) for j in range(i, end + 1)), end + 1

    try:
        if event[0] != 0x09 or event[9] != 0x10:  # wall_time (double), step (varint)
            return None
        step, i = varint(10)
        places = slice(10, i)
        length, start = varint(i + 1)
        if event[i] != 0x2A or start + length != len(event) or step >= 2**62:  # summary, the last
            return None
        tags: dict[str, int] = {}
        while start < len(event):
            length, i = varint(start + 1)
            end = i + length
            name, j = varint(i + 1)
            # value (message): tag (text), simple_value (float)
            if (event[start], event[i], event[j + name]) != (0x0A, 0x0A, 0x15):
                return None
            tag = event[j : j + name].decode()
            if j + name + 5 != end or tag in tags:
                return None
            tags[tag] = end - 4
            start = end
    except (IndexError, UnicodeDecodeError):
        return None
    return (places, tags) if start == len(event) and tags else None


def _is_scalar(tensor: Any) -> bool:
    """Whether a tensor in an event is one floating-point number (half, float or double)."""
    return tensor.dtype in (DT_HALF, DT_FLOAT, DT_DOUBLE) and all(
        d.size == 1 for d in tensor.tensor_shape.dim
    )


def read_runs(sweep_dir: str | Path) -> pd.DataFrame:
    """A row per run of a sweep: its settings, then its validation metrics, time and status.

    Runs may lie deeper, so that a folder of sweeps is read as one. Settings are run (its folder in
    `sweep_dir`), loss, theta, optimizer, lr, model, batch_norm, seed and every other key whose
    override differs between the runs; a list of thetas is given as text. Control characters in
    text are replaced.

    A run without `result.json` is still running or was killed: "unfinished". So is, with a warning,
    a run whose `result.json` cannot be read or holds what no run writes. Left out with a warning
    are folders that cannot be listed, names that are not UTF-8, and links to folders: they would
    count runs twice, or lead in circles.

    Raises FileNotFoundError for a folder that does not exist or holds no runs.
    """
    sweep = Path(sweep_dir)
    if not sweep.is_dir():
        raise FileNotFoundError(f"no such folder: {sweep}")
    folders = list(_run_folders(sweep))
    if not folders:
        raise FileNotFoundError(f"holds no runs: {sweep}")
    records = [_read_record(folder) for folder in folders]

    given = [_parse_overrides(record.get("overrides") or []) for record in records]
    known = {*SETTINGS, "optimizer.lr", "model.batch_norm", "run", *OUTCOMES}
    others = [
        key
        for key in dict.fromkeys(key for overrides in given for key in overrides)
        if key not in known and len({overrides.get(key) for overrides in given}) > 1
    ]
    rows = []
    for folder, record, overrides in zip(folders, records, given, strict=True):
        row: dict[str, Any] = {"run": folder.relative_to(sweep).as_posix()}
        row |= {name: _plain(_get(record, place)) for name, place in SETTINGS.items()}
        for key in others:  # the resolved value says more than the text of the override
            value = _get(record, f"config.{key}")
            if value is None or isinstance(value, dict):
                value = _get(record, f"choices.{key}") or overrides.get(key)
            row[key] = _plain(value)
        # A run of mode=test has no validation.
        stage = "test" if _get(record, "config.mode") == "test" else "val"
        row |= {name: _number(_get(record, f"metrics.{stage}/{name}")) for name in METRICS}
        row["seconds"] = _number(_get(record, "seconds"))
        row["status"] = _plain(_get(record, "status"))
        row["error"] = _plain(_get(record, "error"))
        rows.append(row)
    return pd.DataFrame(rows)


def _run_folders(sweep: Path) -> Iterator[Path]:
    waiting = [sweep]
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: _natural(entry.name))
            run = folder != sweep and _is_run(entry.name for entry in entries)
            below = [] if run else [Path(entry) for entry in entries if _is_folder(entry)]
        except OSError as error:
            log.warning("%s: left out, cannot be listed (%s)", printable(folder), _reason(error))
            continue
        waiting += reversed(below)
        if run:
            yield folder


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder to be read; a warning names a link to one, and a name not UTF-8."""
    if entry.is_symlink():
        if os.path.isdir(entry):
            log.warning("%s: left out, a link", printable(entry.path))
        return False
    if not entry.is_dir():
        return False
    try:
        entry.name.encode()
    except UnicodeEncodeError:
        log.warning("%s: left out, its name is not UTF-8", printable(entry.path))
        return False
    return True


def _is_run(names: Iterable[str]) -> bool:
    """Whether a folder that holds these files is a run's."""
    return any(
        name in ("result.json", ".hydra") or name.startswith("events.out.tfevents.")
        for name in names
    )


def _read_record(run_dir: Path) -> dict[str, Any]:
    """A run's `result.json`, or what its configuration alone tells where there is none."""
    path = run_dir / "result.json"
    try:
        return _checked(json.loads(_read(path, JSON_BYTES)))
    except FileNotFoundError:
        pass
    except (OSError, ValueError, OverflowError, RecursionError) as error:
        log.warning("%s: unreadable, counted as unfinished (%s)", printable(path), _reason(error))
    path = run_dir / ".hydra"
    try:
        return _checked({
            "status": "unfinished",
            "overrides": _read_yaml(path / "overrides.yaml"),
            "choices": _get(_read_yaml(path / "hydra.yaml"), "hydra.runtime.choices"),
            "config": _read_yaml(path / "config.yaml"),
        })  # fmt: skip
    except ValueError as error:
        log.warning("%s: unreadable, settings left out (%s)", printable(path), _reason(error))
        return {"status": "unfinished"}


def _checked(record: Any) -> dict[str, Any]:
    """The record, if it is one that a run could have written.

    Raises:
        ValueError, OverflowError: it is not; with the reason.
    """
    if not isinstance(record, dict) or not record.get("status"):
        raise ValueError("not an object with a status")
    if _deeper(record, RECORD_DEPTH):
        raise ValueError(f"nested more than {RECORD_DEPTH} levels deep")
    for place, types in RECORD_TYPES.items():
        value = _get(record, place)
        if value is not None and type(value) not in types:  # a bool is no number here
            raise ValueError(f"{place} is of type {type(value).__name__}")
        if value is not None and types == NUMBER:
            float(value)  # an integer can be too large
    overrides = record.get("overrides") or []
    if not all(isinstance(override, str) for override in overrides):
        raise ValueError("overrides are not all text")
    if len(_parse_overrides(overrides)) > RECORD_KEYS:
        raise ValueError(f"more than {RECORD_KEYS} overrides")
    return record


def _deeper(tree: Any, levels: int) -> bool:
    below = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return levels == 0 or any(_deeper(part, levels - 1) for part in below)


def _read(path: Path, most: float = float("inf")) -> bytes:
    """A file's content.

    Raises:
        OSError: it cannot be read, is larger than `most` bytes, or is a pipe or a device, from
            which reading might never end.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError("not an ordinary file")
    if status.st_size > most:
        raise OSError(f"larger than {most} bytes")
    return path.read_bytes()


class AliasFreeLoader(yaml.SafeLoader):
    """Hydra writes no aliases, and a few nested ones expand to more than a memory holds."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("aliases are not read")
        return super().compose_node(parent, index)


def _read_yaml(path: Path) -> Any:
    """A YAML file's content; None if there is no such file: killed before it was written.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return yaml.load(_read(path, YAML_BYTES), AliasFreeLoader)
    except FileNotFoundError:
        return None
    except Exception as error:  # PyYAML lets its conversions' errors through, of any type
        raise ValueError(f"{path.name}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """An error in one short line; of the system's the reason alone, for the path is known."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return printable(" ".join((text or type(error).__name__).split())[:200])


def _get(tree: Any, place: str) -> Any:
    """The value at a dotted place in nested dicts, None where there is none.

    >>> _get({"model": {"batch_norm": True}}, "model.batch_norm"), _get({"model": 3}, "model.lr")
    (True, None)
    """
    for key in place.split("."):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _parse_overrides(overrides: Iterable[str]) -> dict[str, str]:
    """What each key was set to, printable; the keys of a mapping count one by one.

    >>> _parse_overrides(["loss=dice", "+note=a=b", "data={low:1,high:0}"])
    {'loss': 'dice', 'note': 'a=b', 'data.low': '1', 'data.high': '0'}
    """
    given: dict[str, str] = {}
    for override in overrides:
        key, _, value = printable(override).lstrip("+~").partition("=")
        inner = re.findall(r"[{,]\s*([\w.]+)\s*:([^,{}]*)", value) if value[:1] == "{" else []
        given |= {f"{key}.{name}": text.strip() for name, text in inner} or {key: value}
    return given


def _plain(value: Any) -> bool | int | float | str | None:
    return value if isinstance(value, bool | int | float | None) else printable(value)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else np.nan


def _natural(name: str) -> list[tuple[float, str]]:
    """A sort key under which 2 stands before 10.

    >>> sorted(["seed=10", "seed=2", "a"], key=_natural)
    ['a', 'seed=2', 'seed=10']
    """
    parts = re.split(r"(\d+(?:\.\d+)?)", name)
    return [(float(p), "") if i % 2 else (-1.0, p) for i, p in enumerate(parts)]


# --- Tables --------------------------------------------------------------------------------------


def write_summary(sweep_dir: str | Path) -> pd.DataFrame:
    """Write `summary.csv`, a row per run as `read_runs` gives them, and return the rows."""
    runs = read_runs(sweep_dir)
    replace_file(Path(sweep_dir) / "summary.csv", csv_text(runs))
    return runs


def csv_text(cells: pd.DataFrame, **options: Any) -> str:
    """A frame as CSV, with `options` of pandas; `csv_escape` for its names and texts."""
    cells = cells.copy()
    for name in cells.select_dtypes(exclude=["number", "bool"]):
        values = [csv_escape(v) if isinstance(v, str) else v for v in cells[name]]
        cells[name] = pd.Series(values, cells.index, dtype=object)
    header = [csv_escape(str(name)) for name in cells]
    return cells.to_csv(index=False, header=header, **options)


def csv_escape(text: str) -> str:
    """Text that a spreadsheet shows as it stands and does not compute.

    >>> [csv_escape(text) for text in ("dice", "-1e-3", "=1+1", " @SUM(A1)", "-x")]
    ['dice', '-1e-3', "'=1+1", "' @SUM(A1)", "'-x"]
    """
    text = printable(text)
    number = re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", text, re.IGNORECASE | re.ASCII)
    return f"'{text}" if re.match(r"\s*[=+@＝＋－＠-]", text) and not number else text


def summary_table(runs: pd.DataFrame) -> Table:
    """The table printed at the end of a sweep, a row per run."""
    columns = ["loss", "theta", "optimizer", "batch_norm"]
    columns += [c for c in swept(runs) if c not in columns]
    columns += [*METRICS, "seconds", "status"]
    columns += ["error"] if runs["error"].notna().any() else []
    digits = {**dict.fromkeys(METRICS, 4), "seconds": 1}
    shown = pd.DataFrame(
        {LABELS.get(c, c): [show(v, digits.get(c)) for v in runs[c]] for c in columns}
    )
    return rich_table(shown)


def compare_losses(runs: pd.DataFrame) -> pd.DataFrame:
    """How the training losses differ, pair by pair, over runs that share everything but the loss.

    A row per pair: `loss`, `other`, `pairs` (matched and done), and for accuracy and Dice the mean
    of loss − other with its 95 % interval (`_low`, `_high`; paired t, NaN below two pairs). Matched
    runs of several θ, networks or optimisers are taken as one sample: the interval then says how
    far the sign holds over the sweep, not within a cell.
    """
    done = runs[runs["status"] == "done"]
    settings = [done[c].map(repr) for c in done if c not in ("run", "loss", *OUTCOMES)]
    cells = done.groupby([*settings, done["loss"]])[["accuracy", "dice"]].mean().unstack("loss")
    rows = []
    for loss, other in combinations(loss_order(done["loss"].dropna().unique()), 2):
        row: dict[str, Any] = {"loss": loss, "other": other}
        for metric in ("accuracy", "dice"):
            difference = (cells[metric][loss] - cells[metric][other]).dropna()
            pairs = len(difference)
            margin = t_quantile(pairs - 1) * difference.sem() if pairs > 1 else np.nan
            mean = difference.mean()
            row |= {"pairs": pairs, metric: mean}
            row |= {f"{metric}_low": mean - margin, f"{metric}_high": mean + margin}
        rows.append(row)
    return pd.DataFrame(rows)


def loss_order(names: Iterable[str]) -> list[str]:
    """
    >>> loss_order(["tversky", "dice", "boundary", "cce"])
    ['cce', 'dice', 'boundary', 'tversky']
    """
    unknown = len(KNOWN_LOSSES)
    rank = {name: i for i, name in enumerate(KNOWN_LOSSES)}
    return sorted(names, key=lambda name: (rank.get(name, unknown), name))


def t_quantile(freedom: int, confidence: float = 0.95) -> float:
    """The t with P(|T| <= t) = confidence, for T of Student's distribution.

    With T = √ν·tan φ the density is proportional to cos(φ)^(ν−1), which is summed up to φ.

    >>> [round(t_quantile(freedom), 3) for freedom in (1, 2, 8, 100)]
    [12.706, 4.303, 2.306, 1.984]
    """
    step = np.pi / 2 / 200_000
    phi = np.arange(200_001) * step
    below = np.concatenate([[0], np.cos(phi[:-1] + step / 2) ** (freedom - 1)]).cumsum()
    return float(np.sqrt(freedom) * np.tan(np.interp(confidence * below[-1], below, phi)))


def comparison_table(comparison: pd.DataFrame) -> pd.DataFrame:
    """`compare_losses` in words, ready for `rich_table` or `markdown_table`."""
    rows = []
    for pair in comparison.to_dict("records"):
        row = {
            "losses": f"{show(pair['loss'])} − {show(pair['other'])}",
            "pairs": str(pair["pairs"]),
        }
        for metric in ("accuracy", "dice"):
            mean, low, high = (pair[metric + end] for end in ("", "_low", "_high"))
            text = "–" if np.isnan(mean) else f"{mean:+.4f}"
            text += "" if np.isnan(low) else f" ({low:+.4f} to {high:+.4f})"
            row[f"{LABELS[metric]} (95 % interval)"] = text
        rows.append(row)
    return pd.DataFrame(rows)


def cell_table(runs: pd.DataFrame) -> pd.DataFrame:
    """A row of text per setting: its runs, and each metric's mean and range over those done."""
    columns = ["loss", *(c for c in swept(runs) if c != "seed")]
    rows = []
    for values, cell in runs.groupby([runs[c].map(show) for c in columns], sort=False):
        row = {LABELS.get(c, c): value for c, value in zip(columns, values, strict=True)}
        done = cell[cell["status"] == "done"]
        row["runs"] = f"{len(cell)}" if len(done) == len(cell) else f"{len(done)} of {len(cell)}"
        for metric in METRICS:
            known = done[metric].dropna()
            text = f"{known.mean():.4f}" if len(known) else "–"
            text += f" ({known.min():.4f} to {known.max():.4f})" if len(known) > 1 else ""
            row[LABELS[metric]] = text
        rows.append(row)
    return pd.DataFrame(rows)


def swept(runs: pd.DataFrame) -> list[str]:
    """The settings, the loss aside, that differ between runs."""
    settings = [c for c in runs if c not in ("run", "loss", *OUTCOMES)]
    return [c for c in settings if runs[c].nunique(dropna=False) > 1]


def show(value: Any, digits: int | None = None) -> str:
    r"""A value as people read it, on one line and without control characters.

    >>> show(0.05), show(0.12345, 2), show(True), show(float("nan")), show("a\x1b[31m\nb")
    ('0.05', '0.12', 'on', '–', 'a�[31m�b')
    """
    if value is None or value != value:
        return "–"
    if isinstance(value, bool | np.bool_):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:g}" if digits is None else f"{value:.{digits}f}"
    return printable(value)


def printable(value: object) -> str:
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(value))


def rich_table(cells: pd.DataFrame) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in cells:
        numbers = cells[name].str.fullmatch(r"[-–+.\d]+( \(.*\))?").all()
        table.add_column(
            Text(printable(name)), justify="right" if numbers else "left", overflow="fold"
        )
    for row in cells.itertuples(index=False):
        # As Text, because a string would be read as markup.
        table.add_row(*(Text(c, STATUS_STYLES.get(c, "")) for c in row))
    return table


def markdown_table(cells: pd.DataFrame) -> str:
    lines = [list(cells), ["---"] * len(cells.columns), *cells.itertuples(index=False)]
    return "\n".join("| " + " | ".join(map(markdown_escape, line)) + " |" for line in lines)


def markdown_escape(text: str) -> str:
    r"""Text that Markdown shows as it stands.

    >>> markdown_escape("a|b <img> `x` [95 %]")
    'a\\|b \\<img\\> \\`x\\` \\[95 %\\]'
    """
    return re.sub(r"([\\`*\[\]<>|&])", r"\\\1", printable(text))
