"""Two demonstrations on real images: which loss fails there, and why?

    pip install -e ".[images]"
    python scripts/demo.py nuclei     one microscope image with 125 nuclei; 3 to 6 minutes
    python scripts/demo.py brain      one brain, regions of different sizes; 8 to 20 minutes

The times are for two cores. Each fetches its data from a package (`pip download stardist`,
`apt-get download mricron-data`), writes it to a folder, sweeps losses and seeds, and writes a table
and pictures to outputs/demo/<name>/README.md. Figures and the comparison of losses are in
outputs/demo-<name>/.
"""

import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import tifffile
from matplotlib.figure import Figure

from losswatch.data.reading import read
from losswatch.disk.curves import read_curves
from losswatch.files import replace_file
from losswatch.report.runs import loss_order, read_runs
from losswatch.report.tables import finding_table, markdown_table

ROOT = Path(__file__).parents[1]
LOSSES = ("cce", "dice", "dice_fg", "dice_square", "dice_ce_nnunet")

PUTAMEN = 73  # its label in the atlas (AAL) on the left side; on the right side it is one higher


# --- Data ----------------------------------------------------------------------------------------


def fetch_nuclei(folder: Path) -> None:
    """The image of the stardist package: its left half trains, the right half validates and tests.

    The image is from the Data Science Bowl 2018.
    """
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", place]
        subprocess.run([*command, "stardist"], check=True)
        [package] = Path(place).iterdir()
        is_wheel = package.suffix == ".whl"
        with zipfile.ZipFile(package) if is_wheel else tarfile.open(package) as archive:
            archive.extractall(place)
        image, mask = (
            tifffile.imread(next(Path(place).rglob(f"{name}2d.tif"))) for name in ("img", "mask")
        )
    parts = {"train": (slice(None), slice(0, 256)), "val": (slice(0, 256), slice(256, None)),
             "test": (slice(256, None), slice(256, None))}  # fmt: skip
    for split, part in parts.items():
        for kind, array in (("images", image), ("masks", mask)):
            (folder / split / kind).mkdir(parents=True, exist_ok=True)
            tifffile.imwrite(folder / split / kind / "nuclei.tif", array[part])


def fetch_brain(folder: Path) -> None:
    """The brain and the atlas of Debian's mricron-data, every second voxel.

    The left half trains. The right half, mirrored, validates. In the masks 1 is the putamen and 2
    any other region of the atlas, the grey matter.
    """
    with tempfile.TemporaryDirectory() as place:
        subprocess.run(["apt-get", "download", "-qq", "mricron-data"], cwd=place, check=True)
        [package] = Path(place).glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", package, place], check=True)
        brain, atlas = (
            read(next(Path(place).rglob(f"{name}.nii.gz")), is_mask=True).array[0]
            for name in ("ch2", "aal")
        )
    middle = brain.shape[0] // 2
    sides = {"train": slice(0, middle, 2), "val": slice(-1, middle, -2)}
    for split, side in sides.items():
        labels = atlas[side, ::2, ::2].astype(np.uint8)
        mask = np.where(labels == PUTAMEN + (split == "val"), 1, 2 * (labels > 0)).astype(np.uint8)
        for kind, array in (("images", brain[side, ::2, ::2]), ("masks", mask)):
            (folder / split / kind).mkdir(parents=True, exist_ok=True)
            image = nibabel.Nifti1Image(array.astype(np.uint8), np.diag([2, 2, 2, 1]))
            nibabel.save(image, folder / split / kind / "brain.nii.gz")


# --- Sweeps --------------------------------------------------------------------------------------

# Without batch norm, as in the part of the study where foreground-only Dice fails.
COMMON = [
    "data=folder", f"loss={','.join(LOSSES)}", f"watch=[{','.join(LOSSES)}]", "seed=0,1,2",
    "optimizer.lr=3e-3", "model.batch_norm=false", "trainer.accelerator=cpu",
    "probe.every_n_steps=10", "data.num_workers=0", "trainer.enable_progress_bar=false",
]  # fmt: skip
# What the masks' values mean, for each condition: its name, with the share of foreground in the
# images that train, and data.classes.
NUCLEI = {
    "nuclei, 22 %": "{background:0,region:rest}",
    "all but nuclei, 78 %": "{background:rest,region:0}",
}
BRAIN = {
    "putamen, 0.2 %": "{background:rest,region:1}",
    "grey matter, 20 %": "{background:rest,region:[1,2]}",
    "all but grey matter, 80 %": "{background:[1,2],region:rest}",
    "all but putamen, 99.8 %": "{background:1,region:rest}",
}
IMAGE = ["trainer.max_steps=150", "trainer.val_check_interval=50"]
VOLUMES = [
    "data.patch_size=24", "data.batch_size=2", "data.flip=false",
    "trainer.max_steps=200", "trainer.val_check_interval=100",
]  # fmt: skip


def sweep(folder: Path, data: Path, settings: list[str]) -> pd.DataFrame:
    """Train all runs that are not done, and return the table of all runs."""
    train = [sys.executable, str(ROOT / "train.py"), "-m", *COMMON, *settings]
    subprocess.run([*train, f"data.root={data}", f"hydra.sweep.dir={folder}"], check=True)
    return read_runs(folder)


# --- Reports -------------------------------------------------------------------------------------

TEXT = """# {title}

`python scripts/demo.py {name}`: 5 losses x 3 seeds x {count} regions as the foreground, without
batch norm. Dice on the validation image, mean over the two classes; mean and range of three seeds.

{table}

![Dice by loss, a point for each seed](dice.png)

{verdict}

One image, or two halves of one, does not show that a network generalises: the table shows which
loss learns, not how good the network would be on other images.

## Why

{why}
"""

WHY_NUCLEI = """This is all that losswatch found in the {count} runs with *{condition}*:

{table}

It advises:

> {remedy}

The table of Dice has two of these, the squared denominator (`dice_square`) and added cross entropy
(`dice_ce_nnunet`). Both learn.

![The loss that trains and its gradient norm, a line for each run](why.png)

The value of `dice_fg` looks like those of the other losses. Its gradient norm does not.

The best constant answer is the reason. Suppose that the network gives each pixel the same
probability p of foreground, and let f be the share of foreground. Foreground-only Dice (`dice_fg`)
is then 1 − 2fp / (f + p). It falls all the way to p = 1, so the best constant answer is *all
foreground*. With f = 0.78 its value is 1 − 1.56 / 1.78 = 0.12, which looks like success. But at
p = 1 the softmax has no slope, p(1 − p) = 0: no gradient reaches the weights, and the run stays
there. Cross entropy and Dice over both classes are lowest at p = f. There the slope is
f(1 − f) = 0.17, and the network can learn to tell the pixels apart.

With f = 0.22 *all foreground* is the best constant answer, too, but the network is not driven there
first. At p = 1/2 the pull on all pixels alike is f / ((1 − f)(f + 1/2)) times the pull that
separates the classes. This is 0.4 with f = 0.22, and 2.8 with f = 0.78.
[The study's report](../../article/report.md) derives it, and
[the doctor](../../../src/losswatch/doctor/README.md) measures it at the first batch."""

WHY_BRAIN = """[The nuclei](../nuclei/README.md#why) show why foreground-only Dice (`dice_fg`) fails
where most pixels are foreground."""


def by_loss(runs: pd.DataFrame) -> list[tuple[str, str, pd.DataFrame]]:
    """The losses in the order in which they are shown: name, colour and runs of each."""
    names = loss_order(runs["loss"].unique())
    return [(name, f"C{i}", runs[runs["loss"] == name]) for i, name in enumerate(names)]


def draw_dice(runs: pd.DataFrame) -> Figure:
    """Dice by loss in each condition, a point for each run."""
    conditions = list(runs["condition"].unique())
    figure = Figure(figsize=(3.5 + 1.4 * len(conditions), 3.6), layout="constrained")
    axes = figure.add_subplot(ylabel="Dice")
    for i, (loss, colour, part) in enumerate(by_loss(runs)):
        places = [conditions.index(c) + 0.12 * (i - 2) for c in part["condition"]]
        axes.plot(places, part["dice"], "o", color=colour, alpha=0.7, label=loss)
    axes.set_xticks(range(len(conditions)), [c.replace(", ", "\n") for c in conditions])
    axes.set_ylim(0, 1.02)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    return figure


def draw_training(folder: Path, runs: pd.DataFrame, title: str) -> Figure:
    """The loss that trains and its gradient norm over the steps, a line for each run."""
    figure = Figure(figsize=(8.5, 3.4), layout="constrained")
    panels = figure.subplots(1, 2)
    panels[0].set(xlabel="step", ylabel="loss that trains")
    panels[1].set(xlabel="step", ylabel="its gradient norm", yscale="log", ylim=(1e-11, 1e2))
    for axes, kind in zip(panels, ("loss", "grad_norm"), strict=True):
        for loss, colour, part in by_loss(runs):
            for run in part["run"]:
                curve = read_curves(folder / run)[f"{kind}/{loss}"].dropna()
                axes.plot(curve, color=colour, linewidth=1, label=loss)
    lines, names = panels[0].get_legend_handles_labels()
    one_each = dict(zip(names, lines, strict=True))
    figure.legend(one_each.values(), one_each, loc="outside right upper", fontsize="small")
    figure.suptitle(title)
    return figure


def write_report(name: str, title: str, runs: pd.DataFrame, why: str) -> None:
    """Write outputs/demo/<name>/README.md and its picture of Dice."""
    out = ROOT / "outputs" / "demo" / name
    draw_dice(runs).savefig(out / "dice.png", dpi=120)
    cells = runs.pivot_table(
        index="condition", columns="loss", values="dice", sort=False,
        aggfunc=lambda x: f"{x.mean():.3f} ({x.min():.3f} to {x.max():.3f})",
    )[loss_order(runs["loss"].unique())]  # fmt: skip
    text = TEXT.format(
        title=title, name=name, table=markdown_table(cells.reset_index()), verdict=verdict(runs),
        count=len(cells), why=why,
    )  # fmt: skip
    replace_file(out / "README.md", text.encode())


def verdict(runs: pd.DataFrame) -> str:
    """Tell which runs learn nothing: with one class everywhere, Dice is at most 0.5."""
    lines = []
    for condition, part in runs.groupby("condition", sort=False):
        stuck = part.loc[part["dice"] < 0.6, "loss"].value_counts(sort=False)
        fail = [f"{loss} fails with {count} of 3 seeds" for loss, count in stuck.items()]
        if len(stuck) == len(LOSSES) and (stuck == 3).all():
            lines.append(f"- {condition}: no loss learns in so few steps.")
        elif fail:
            lines.append(f"- {condition}: {', '.join(fail)}. All other runs learn.")
        else:
            lines.append(f"- {condition}: every loss learns.")
    return "\n".join(lines)


def explain_nuclei(folder: Path, runs: pd.DataFrame) -> str:
    """Draw why.png of the last condition; its runs are in `folder`. Returns the text of `Why`."""
    condition = runs["condition"].iloc[-1]
    runs = runs[runs["condition"] == condition]
    out = ROOT / "outputs" / "demo" / "nuclei"
    draw_training(folder, runs, condition).savefig(out / "why.png", dpi=120)
    found = runs[["run", "loss", "seed"]].merge(finding_table(folder, runs), on="run")
    cells = found[["loss", "seed", "name", "step", "text"]].astype(str)
    return WHY_NUCLEI.format(
        count=len(runs), condition=condition, table=markdown_table(cells),
        remedy=" ".join(found["remedy"].unique()),
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=["nuclei", "brain"])
    name = parser.parse_args().name
    folder = ROOT / "outputs" / f"demo-{name}"
    data = folder.with_name(f"demo-{name}-data")
    fetch, conditions, more, title = {
        "nuclei": (fetch_nuclei, NUCLEI, IMAGE, "Nuclei, and what is the foreground"),
        "brain": (fetch_brain, BRAIN, VOLUMES, "A brain, and the size of the region"),
    }[name]
    if not data.exists():
        fetch(data)
    tables = []
    for condition, classes in conditions.items():
        place = folder / re.sub(r"\W+", "_", condition)
        tables.append(sweep(place, data, [*more, f"data.classes={classes}"]))
        tables[-1]["condition"] = condition
    runs = pd.concat(tables)
    report = [sys.executable, str(ROOT / "scripts/report.py"), str(folder)]
    subprocess.run(report, check=True, stdout=subprocess.DEVNULL)
    (ROOT / "outputs" / "demo" / name).mkdir(parents=True, exist_ok=True)
    write_report(name, title, runs, explain_nuclei(place, runs) if name == "nuclei" else WHY_BRAIN)
    print(f"outputs/demo/{name}/README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
