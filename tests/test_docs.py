"""The README files and the comments in YAML, against the files and commands that they name.

And the packages of pyproject.toml, against the imports, and its version, against the other files
that name it.
"""

import ast
import importlib.util
import inspect
import re
import shlex
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from urllib.parse import unquote

import hydra
import pytest
import yaml
from conftest import ROOT
from disks import make_folder
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from losswatch.config.quoting import quoted
from losswatch.losses import CrossEntropy, Dice
from losswatch.report import losses

FOLDERS = ("conf", "outputs/article", "outputs/demo", "scripts", "src", "tests")
PAGES = [*ROOT.glob("*.md"), *(page for f in FOLDERS for page in (ROOT / f).rglob("*.md"))]
EXPERIMENTS = sorted((ROOT / "conf/experiment").glob("*.yaml"))
PLUGINS = {
    "hydra/launcher=joblib": "hydra_joblib_launcher",
    "hydra.launcher.outer=joblib": "hydra_joblib_launcher",
    "+hydra/launcher@hydra.launcher.outer=submitit_slurm": "hydra_submitit_launcher",
    "experiment=optuna": "hydra_optuna_sweeper",
}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def read(path: str | Path) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def test_readme_is_short():
    assert len(read("README.md").splitlines()) <= 200
    assert len(read("CONTRIBUTING.md").splitlines()) <= 40


# --- Links ---------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The fragments that GitHub gives to a page's headings."""
    prose = re.sub(r"^```.*?^```", "", read(page), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", prose, flags=re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings
    }


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    broken = []
    for angled, plain in re.findall(r"\]\((?:<([^>]+)>|([^)\s]+))\)", read(page)):
        link = unquote(angled or plain)
        if re.match(r"\w+:", link):  # another site
            continue
        path, _, fragment = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (fragment and fragment not in anchors(target)):
            broken.append(link)
    assert not broken


def test_files_named_in_the_text_exist():
    """`losses/dice.py` and the like; a file that the reader is to make is followed by ", new"."""
    files = [name(path) for f in FOLDERS for path in (ROOT / f).rglob("*.py")] + ["train.py"]
    named = {
        (name(page), file)
        for page in PAGES
        for file in re.findall(r"`((?:\w+/)*\w+\.py)`(?!, new)", read(page))
    }
    assert {
        (page, file) for page, file in named if not any(f"/{f}".endswith(f"/{file}") for f in files)
    } == set()


def test_every_test_file_is_on_its_page():
    page = read("tests/README.md")
    assert [
        file
        for path in ROOT.glob("tests/**/test_*.py")
        if f"`{(file := path.relative_to(ROOT / 'tests').as_posix())}`" not in page
    ] == []


def test_anchors_are_githubs():
    assert "what-a-sweep-costs" in anchors(ROOT / "src/losswatch/sweep/README.md")
    assert "dice" not in anchors(ROOT / "README.md")


# --- Commands ------------------------------------------------------------------------------------


def commands() -> list[str]:
    """Every command that a page or a comment in YAML shows."""
    lines = []
    for page in PAGES:
        for block in re.findall(r"^```\n(.*?)^```", read(page), flags=re.MULTILINE | re.DOTALL):
            lines += block.splitlines()
        lines += re.findall(r"`((?:python|pytest) [^`]+)`", read(page))
    for file in (ROOT / "conf").rglob("*.yaml"):
        lines += re.findall(r"^#   (python .+)$", read(file), flags=re.MULTILINE)
    return sorted({part.strip() for line in lines for part in line.split("&&")})


def arguments(program: str) -> list[str]:
    """What follows `program` in each of the commands."""
    pattern = re.compile(rf"(?:srun \S+ )?{re.escape(program)} ([^…]+)")
    found = [match[1] for match in map(pattern.fullmatch, commands()) if match]
    return [line for line in found if "..." not in line]


def test_the_commands_are_found():
    assert "-m loss=dice,cce theta=0.05,0.5,0.95" in arguments("python train.py")
    assert "-m experiment=symmetry compile=true" in arguments("python train.py")
    assert {"benchmark.py probe", "reproduce.py"} <= {
        c.split("/")[1] for c in commands() if "scripts/" in c
    }


@pytest.mark.parametrize("line", arguments("python train.py"))
def test_a_command_composes(compose, line, tmp_path, monkeypatch):
    """train.py accepts each command; of a sweep, its first and last run compose, and the last
    passes the checks."""
    given = shlex.split(re.sub(r"<(\w+)>", r"\1", line))
    for plugin in {PLUGINS[argument] for argument in given if argument in PLUGINS}:
        if importlib.util.find_spec(f"hydra_plugins.{plugin}") is None:
            pytest.skip(f"{plugin} is not installed")
    if "--config-dir" in given:
        pytest.skip("names a folder of the reader's own")
    if "data=folder" in given:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        make_folder(tmp_path / "nuclei", size=(70, 70))
    first, last = ends([quoted(argument) for argument in given if argument[:1] != "-"])
    compose(*first)
    compose(*last).plan()


def ends(given: list[str]) -> list[list[str]]:
    """The overrides of the first and the last run of a grid."""
    parsed = OverridesParser.create().parse_overrides(given)
    runs = [list(given), list(given)]
    for i, override in enumerate(parsed):
        if override.is_choice_sweep():
            choices = list(override.sweep_string_iterator())
            for run, choice in zip(runs, (choices[0], choices[-1]), strict=True):
                run[i] = f"{override.get_key_element()}={choice}"
    return runs


def test_scripts_and_test_files_of_commands_exist():
    paths = {path for line in commands() for path in re.findall(r"(?:scripts|tests)/\w+\.py", line)}
    assert paths and all((ROOT / path).is_file() for path in paths)


# --- Settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_says_what_it_costs_and_reaches(path):
    text = read(path)
    assert re.search(r"^# Costs: \S+", text, flags=re.MULTILINE)
    assert re.search(r"^# Reaches\b.*: ?\S+", text, flags=re.MULTILINE)
    assert f"experiment={path.stem}" in text


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiments_grid_composes(compose, path):
    """The command in the file is among those of `test_a_command_composes`; this is its grid."""
    assert any(f"experiment={path.stem}" in line.split() for line in arguments("python train.py"))
    compose()  # registers the schema and opens conf
    given = [f"experiment={path.stem}"]
    if path.stem == "optuna":  # which searches intervals
        return
    config = hydra.compose("config", overrides=given, return_hydra_config=True)
    grid = OmegaConf.select(config, "hydra.sweeper.params") or {}
    for overrides in ends([*given, *(f"{key}={value}" for key, value in grid.items())]):
        compose(*overrides)


def test_every_setting_has_its_comment():
    """In the files of losses, models and optimisers, and in config.yaml above its section hydra."""
    files = [
        f for kind in ("loss", "model", "optimizer") for f in (ROOT / "conf" / kind).glob("*.yaml")
    ]
    for text in [*map(read, files), read("conf/config.yaml").partition("\nhydra:")[0]]:
        for line in text.splitlines():
            setting = re.match(r" *[a-z]\w*: .*", line)
            assert not setting or "#" in line or line.startswith("  low: "), line


# --- Losses --------------------------------------------------------------------------------------


def test_the_table_of_losses_is_what_the_script_prints():
    rows = losses.loss_rows()
    assert {row.name for row in rows} == {path.stem for path in (ROOT / "conf/loss").glob("*.yaml")}
    assert all(row.formula and row.advice for row in rows)
    assert losses.markdown(rows) in read("conf/loss/README.md")


@pytest.mark.parametrize("cls", [Dice, CrossEntropy])
def test_every_knob_is_explained_with_its_default(cls):
    section = read("conf/loss/README.md").partition(f"## The knobs of {cls.__name__}\n")[2]
    table = dict(
        re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", section.partition("\n## ")[0], re.MULTILINE)
    )
    knobs = inspect.signature(cls).parameters
    defaults = {knob: OmegaConf.create(f"value: {text}").value for knob, text in table.items()}
    assert defaults == {knob: parameter.default for knob, parameter in knobs.items()}


# --- Packages ------------------------------------------------------------------------------------

# The benchmarks measure these where they are installed, and an example is skipped without its own.
PEERS = {"nnunetv2", "segmentation_models_pytorch", "transformers"}


def imports(tree: ast.AST, at_start: bool) -> Iterator[str]:
    """The modules that code imports; `at_start`: as soon as it is imported itself."""
    for node in ast.iter_child_nodes(tree):
        if at_start and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if at_start and isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
        yield from imports(node, at_start)


def test_the_citation_and_the_changelog_are_of_this_version():
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    project = tomllib.loads(read("pyproject.toml"))["project"]
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["title"] == project["name"] and citation["abstract"] == project["description"]
    assert citation["version"] == project["version"] and citation["license"] == project["license"]
    assert f"Copyright (c) 2026 {citation['authors'][0]['name']}\n" in read("LICENSE")
    [newest, *_] = re.findall(r"^## ([\d.]+)", read("CHANGELOG.md"), flags=re.MULTILINE)
    assert newest == project["version"]


def test_all_packages_that_are_imported_are_declared():
    """What the library imports at its start is a dependency; the rest may be one of an extra."""
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    project = tomllib.loads(read("pyproject.toml"))["project"]

    def distributions(requirements) -> set[str]:
        names = {re.match(r"[\w.-]+", requirement)[0] for requirement in requirements}
        return {re.sub(r"[-_.]+", "-", name).lower() for name in names}

    required = distributions(project["dependencies"])
    extras = distributions(r for extra in project["optional-dependencies"].values() for r in extra)
    providers = packages_distributions()
    library = [ROOT / "train.py", *(ROOT / "src").rglob("*.py")]
    scripts = [*(ROOT / "scripts").rglob("*.py")]
    packages = {path.parent.name for path in scripts}
    ours = {path.stem for path in scripts} | {"losswatch", "hydra_plugins"} | packages
    missing = {}
    for path in [*library, *scripts]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        cases = [(True, required)] if path in library else []
        for at_start, declared in [*cases, (False, required | extras)]:
            for module in imports(tree, at_start):
                top = module.partition(".")[0]
                found = distributions(providers.get(top, [top]))
                if not ({top} & (sys.stdlib_module_names | ours | PEERS) or found & declared):
                    missing[top] = name(path)
    assert not missing
