"""Writes the report of the atlas: numbers of the runs, in the template report.md.j2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from common.template import fill
from landscape import disputes, figures, foreseen, outcomes
from landscape.first_step import foresee
from landscape.sweeps import EMPTY, LOSSES, NOISE, REMEDIES
from landscape.trained import answers
from losswatch.doctor.findings import COLLAPSE, COLLAPSE_WITH_NORM
from losswatch.files import replace_file
from losswatch.report.style import save
from losswatch.report.tables import csv_text

TEMPLATE = Path(__file__).with_name("report.md.j2")
NORM = {False: "no batch norm", True: "batch norm"}


def write_report(runs: Path, out: Path, real: Mapping[str, Path]) -> None:
    """Write report.md, summary.csv and figures/ into `out`.

    Args:
        runs: the folder of the sweeps.
        real: sweeps on real images, by title; those that are there are judged, too.

    Raises:
        FileNotFoundError: a sweep has no finished runs.
        OSError: nothing can be written into `out`.
    """
    (out / "figures").mkdir(parents=True, exist_ok=True)
    ends = {n: outcomes.read_sweep(runs / n) for n in ("map", "unet", "rates", "three")}
    remedies = {
        name: outcomes.read_sweep(runs / "remedies" / name.replace(" ", "-")) for name in REMEDIES
    }
    # What is the same in all runs of a sweep is no column of theirs.
    unsure = {
        n: answers(runs / n, outcomes.read_sweep(runs / n).assign(**task))
        for n, task in {"noise": NOISE, "empty": EMPTY}.items()
    }
    for title, at in real.items():
        with suppress(FileNotFoundError):
            ends[title] = outcomes.read_sweep(at)
    places = {name: runs / name for name in ends} | dict(real)
    for name in ends:
        ends[name] = pd.concat([ends[name], foresee(places[name], ends[name])], axis=1)
    everything = {**ends, **unsure, **{f"remedies: {n}": r for n, r in remedies.items()}}
    values = {
        **_map(ends, out),
        **_rescues(remedies, out),
        **_forecast(ends, real, out),
        **_volumes(unsure["noise"], out),
        **_thresholds(unsure["noise"], out),
        **_empty(unsure["empty"], out),
        **_ranking(ends),
        **_effort([r for n, r in everything.items() if n not in real]),
    }
    replace_file(out / "report.md", fill(TEMPLATE, **values))
    table = pd.concat([r.assign(sweep=name) for name, r in everything.items()])
    left = ("sweep", "run", "status", "error", "findings", "optimizer")
    columns = ["sweep", *(c for c in table if c not in left)]
    replace_file(out / "summary.csv", csv_text(table[columns], float_format="%.5g"))


# --- The values of the template's sections -------------------------------------------------------


def _map(ends: Mapping[str, pd.DataFrame], out: Path) -> dict[str, Any]:
    panels, seeds = {}, {}
    for name, title in (("map", "plain network"), ("unet", "U-Net")):
        for normed, runs in ends[name].groupby("batch_norm"):
            panel = f"{title}, {NORM[bool(normed)]}"
            panels[panel] = outcomes.share_table(runs, LOSSES)
            seeds[panel] = runs["seed"].nunique()
    save(figures.draw_map(panels, seeds), out / "figures" / "collapse.png")
    never = sorted(
        loss
        for loss in ends["unet"]["loss"].unique()
        if not any(runs.loc[runs["loss"] == loss, "collapsed"].any() for runs in
                   (ends["map"], ends["unet"]))
    )  # fmt: skip
    return {
        "dying": {title: outcomes.dying(ends[name]) for name, title in
                  (("map", "Plain network"), ("unet", "U-Net"))},
        "never": never,
        "seeds": ends["map"]["seed"].nunique(),
    }  # fmt: skip


def _rescues(remedies: Mapping[str, pd.DataFrame], out: Path) -> dict[str, Any]:
    shares = outcomes.rescue_shares(remedies)
    seeds = remedies["none"]["seed"].nunique()
    save(figures.draw_rescues(shares, seeds), out / "figures" / "remedies.png")
    return {"rescues": outcomes.rescues(remedies)}


def _forecast(
    ends: Mapping[str, pd.DataFrame], real: Mapping[str, Path], out: Path
) -> dict[str, Any]:
    groups = forecast_groups(ends) | {title: ends[title] for title in real if title in ends}
    name = foreseen.choose(groups["plain, first half"])
    judged = foreseen.judge(groups, name)
    said = foreseen.judge_doctor(groups)
    threshold = float(judged["threshold"].iloc[0])
    save(figures.draw_scores(groups, name, threshold), out / "figures" / "forecast.png")
    areas = foreseen.compare_scores(groups)
    areas[areas.columns[1:]] = areas[areas.columns[1:]].map(
        lambda v: "–" if np.isnan(v) else f"{v:.3f}"
    )
    return {
        "score": name,
        "threshold": f"{threshold:.3g}",
        "judged": _judged_table(judged),
        "said": pd.DataFrame(
            {
                "": said["group"],
                "found": _of(said["found"], said["collapsed"]),
                "false alarms": _of(said["false alarms"], said["runs"] - said["collapsed"]),
            }
        ),
        "quiet": [foreseen.quiet_threshold(r) for _, r in ends["map"].groupby("batch_norm")],
        "doctor": [f"{COLLAPSE:g}", f"{COLLAPSE_WITH_NORM:g}"],
        "areas": areas,
        "three": int(ends["three"]["collapsed"].sum()),
        "missing": [title for title in real if title not in ends],
    }


def forecast_groups(ends: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """The runs on which the score is fixed, and those on which it is judged, by title."""
    plain = ends["map"][~ends["map"]["batch_norm"].astype(bool)]
    first = foreseen.is_first_half(plain)
    groups = {
        "plain, first half": plain[first],
        "plain, other half": plain[~first],
        "plain, batch norm": ends["map"][ends["map"]["batch_norm"].astype(bool)],
    }
    for normed, runs in ends["unet"].groupby("batch_norm"):
        groups[f"U-Net, {NORM[bool(normed)]}"] = runs
    for rate, runs in ends["rates"].groupby("lr"):
        groups[f"plain, learning rate {rate:g}"] = runs
    return {**groups, "plain, three classes": ends["three"]}


def _of(counts: pd.Series, totals: pd.Series) -> list[str]:
    return [f"{count} of {total}" for count, total in zip(counts, totals, strict=True)]


def _judged_table(judged: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame({
        "": judged["group"],
        "collapsed": _of(judged["collapsed"], judged["runs"]),
        "area under ROC": [area.text() for area in judged["area"]],
        "found": _of(judged["found"], judged["collapsed"]),
        "false alarms": _of(judged["false alarms"], judged["runs"] - judged["collapsed"]),
        "expected share": [f"{x:.2f}" for x in judged["expected"]],
        "observed": [f"{x:.2f}" for x in judged["observed"]],
        "verdict": judged["verdict"],
    })  # fmt: skip


def _volumes(noise: pd.DataFrame, out: Path) -> dict[str, Any]:
    table = disputes.volumes(noise)
    save(figures.draw_volumes(table), out / "figures" / "volume.png")
    text = pd.DataFrame({
        "loss": table["loss"], "θ": table["theta"], "τ": table["tau"],
        "true": [f"{v:.4f}" for v in table["true"]],
        "predicted by theory": [f"{v:.4f}" for v in table["wanted"]],
        "one class": _of(table["constant"], table["runs"]),
        "measured on the others": [i.text(4) for i in table["measured"]],
        "within 0.01": ["yes" if h else "no" for h in table["holds"]],
    })  # fmt: skip
    holds = table.groupby("loss", sort=False)["holds"].agg(["sum", "size"])
    text_holds = ", ".join(f"{loss} {r['sum']} of {r['size']}" for loss, r in holds.iterrows())
    return {"volumes": text, "volumes_hold": text_holds}


def _thresholds(noise: pd.DataFrame, out: Path) -> dict[str, Any]:
    table = disputes.thresholds(noise)
    save(figures.draw_thresholds(table), out / "figures" / "thresholds.png")
    intervals = ["half", "best", "soft", "soft - half", "soft - best"]
    text = table[["theta", "tau"]].rename(columns={"theta": "θ", "tau": "τ"})
    text["possible"] = [f"{v:.3f}" for v in table["possible"]]
    titles = [
        "CE at 1/2",
        "CE at D*/2",
        "soft Dice",
        "soft Dice − CE at 1/2",
        "soft Dice − CE at D*/2",
    ]
    for column, title in zip(intervals, titles, strict=True):
        digits = 3 if column in intervals[:3] else 4
        text[title] = [i.text(digits) for i in table[column]]
    won = {}
    for column, key in (("soft - half", "half"), ("soft - best", "best")):
        sides = [disputes.side(interval) for interval in table[column]]
        means = [interval.value for interval in table[column]]
        won[key] = {"better": sides.count(1), "worse": sides.count(-1), "even": sides.count(0),
                    "largest": f"{max(means):.4f}", "smallest": f"{min(means):.4f}"}  # fmt: skip
    return {"thresholds": text, "won": won, "cells": len(table)}


def _empty(empty: pd.DataFrame, out: Path) -> dict[str, Any]:
    table = disputes.empty_images(empty)
    save(figures.draw_empty(table), out / "figures" / "empty.png")
    text = pd.DataFrame({
        "sums over": table["over"], "smoothing": [f"{s:g}" for s in table["smooth"]],
        "predicted by theory": [f"{v:.4f}" for v in table["wanted"]],
        "one class": _of(table["constant"], table["runs"]),
        "measured on the others": [i.text(4) for i in table["measured"]],
        "within 0.01": ["yes" if h else "no" for h in table["holds"]],
        "slope on an empty image": ["–" if np.isnan(s) else f"{s:.2g}" for s in table["slope"]],
    })  # fmt: skip
    pulled = table.loc[(table["over"] == "sample") & (table["constant"] > 0), "smooth"]
    return {
        "empty": text,
        "empty_hold": f"{int(table['holds'].sum())} of {len(table)}",
        "empty_task": EMPTY,
        "pulled": [f"{s:g}" for s in pulled],
    }


def _ranking(ends: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    table, concordance = outcomes.ranking(ends["map"])
    few, few_concordance = outcomes.ranking(pd.concat([ends["map"], ends["unet"]]))
    return {
        "ranking": table, "w": f"{concordance['w']:.2f}", "w_p": f"{concordance['p']:.1g}",
        "conditions": concordance["conditions"],
        "ranking_both": few, "w_both": f"{few_concordance['w']:.2f}",
        "conditions_both": few_concordance["conditions"],
    }  # fmt: skip


def _effort(sweeps: Sequence[pd.DataFrame]) -> dict[str, Any]:
    seconds = sum(runs["seconds"].sum() for runs in sweeps)
    return {"runs": f"{sum(map(len, sweeps)):,}", "hours": f"{seconds / 3600:.1f}"}
