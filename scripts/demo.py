"""Two demonstrations on real images: which loss works there?

    pip install -e ".[images,joblib]"
    python scripts/demo.py nuclei     one microscope image with 125 nuclei; 3 minutes on two cores
    python scripts/demo.py brain      one brain, regions of different sizes; 10 minutes

Each fetches its data from a package (`pip download stardist`, `apt-get download mricron-data`),
writes it to a folder, sweeps losses and seeds, and writes a table and a picture to
outputs/demo/<name>/README.md. Figures and the comparison of losses are in outputs/demo-<name>/.
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
from losswatch.files import replace_file
from losswatch.report.runs import loss_order, read_runs
from losswatch.report.tables import markdown_table

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

COMMON = [
    "data=folder", f"loss={','.join(LOSSES)}", f"watch=[{','.join(LOSSES)}]", "seed=0,1,2",
    "optimizer.lr=3e-3", "trainer.accelerator=cpu",
    "trainer.val_check_interval=100", "probe.every_n_steps=10", "data.num_workers=0",
    "hydra/launcher=joblib", "trainer.enable_progress_bar=false",
]  # fmt: skip
# What the masks' values mean, for each condition: its name and data.classes.
NUCLEI = {"nuclei": "{background:0,nucleus:rest}"}
BRAIN = {
    "putamen, 0.2 %": "{background:rest,region:1}",
    "grey matter, 20 %": "{background:rest,region:[1,2]}",
    "all but grey matter, 80 %": "{background:[1,2],region:rest}",
    "all but putamen, 99.8 %": "{background:1,region:rest}",
}
# Without batch norm, as in the part of the study where foreground-only Dice fails.
VOLUMES = [
    "data.patch_size=24", "data.batch_size=2", "data.flip=false", "model.batch_norm=false",
    "trainer.max_steps=200",
]  # fmt: skip


def sweep(folder: Path, data: Path, settings: list[str]) -> pd.DataFrame:
    """Train all runs that are not done, and return the table of all runs."""
    train = [sys.executable, str(ROOT / "train.py"), "-m", *COMMON, *settings]
    subprocess.run([*train, f"data.root={data}", f"hydra.sweep.dir={folder}"], check=True)
    return read_runs(folder)


# --- Reports -------------------------------------------------------------------------------------

TEXT = """# {title}

`python scripts/demo.py {name}`: five losses x three seeds{times}, in {minutes:.0f} minutes on
two cores. Dice on the validation image, mean over the two classes; mean and range of three seeds.

{table}

![Dice by loss, a point for each seed](dice.png)

{verdict}

One image, or two halves of one, does not show that a network generalises: the table shows which
loss learns, not how good the network would be on other images.
"""


def write_report(name: str, title: str, runs: pd.DataFrame, verdict: str) -> None:
    """Write outputs/demo/<name>/README.md and its picture."""
    out = ROOT / "outputs" / "demo" / name
    out.mkdir(parents=True, exist_ok=True)
    losses, conditions = loss_order(runs["loss"].unique()), runs["condition"].unique()
    figure = Figure(figsize=(3.5 + 1.4 * len(conditions), 3.6), layout="constrained")
    axes = figure.add_subplot(ylabel="Dice")
    for i, loss in enumerate(losses):
        part = runs[runs["loss"] == loss]
        places = [list(conditions).index(c) + 0.12 * (i - 2) for c in part["condition"]]
        axes.plot(places, part["dice"], "o", color=f"C{i}", alpha=0.7, label=loss)
    axes.set_xticks(range(len(conditions)), [c.replace(", ", "\n") for c in conditions])
    axes.set_ylim(0, 1.02)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    figure.savefig(out / "dice.png", dpi=120)
    cells = runs.pivot_table(
        index="condition", columns="loss", values="dice", sort=False,
        aggfunc=lambda x: f"{x.mean():.3f} ({x.min():.3f} to {x.max():.3f})",
    )[losses]  # fmt: skip
    text = TEXT.format(
        title=title, name=name, table=markdown_table(cells.reset_index()), verdict=verdict,
        times=f" x {len(conditions)} sizes" if len(conditions) > 1 else "",
        minutes=runs["seconds"].sum() / 120,
    )  # fmt: skip
    replace_file(out / "README.md", text.encode())


def verdict(runs: pd.DataFrame) -> str:
    """Tell which losses learn nothing: with one class everywhere, Dice is at most 0.5."""
    lines = []
    best = runs.groupby(["condition", "loss"], sort=False)["dice"].max().unstack()
    for condition, row in best.iterrows():
        stuck = [str(loss) for loss, dice in row.items() if dice < 0.6]
        if len(stuck) == len(row):
            lines.append(f"- {condition}: no loss learns in so few steps.")
        elif stuck:
            lines.append(
                f"- {condition}: {', '.join(stuck)} fails for all seeds, the others learn."
            )
        else:
            lines.append(f"- {condition}: every loss learns.")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=["nuclei", "brain"])
    name = parser.parse_args().name
    folder = ROOT / "outputs" / f"demo-{name}"
    data = folder.with_name(f"demo-{name}-data")
    fetch, conditions, more, title = {
        "nuclei": (fetch_nuclei, NUCLEI, ["trainer.max_steps=300"], "Nuclei"),
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
    write_report(name, title, runs, verdict(runs))
    print(f"outputs/demo/{name}/README.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
