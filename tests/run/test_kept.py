"""mode=test and mode=predict take network, losses and data from the run that `checkpoint` names."""

import os
import shutil
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ENVIRONMENT, read_result, run_folders, run_train
from PIL import Image

from losswatch import task
from losswatch.config.errors import ConfigError
from losswatch.config.quoting import quoted
from losswatch.disk.checkpoint import to_keep
from losswatch.disk.checkpoint_files import find_checkpoint
from losswatch.run import train as ordinary

THEIRS = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, channels_in, channels_out, width, act, kind):
        assert kind == "plain"
        conv = nn.Conv2d(channels_in, width, 3, padding=1)
        super().__init__(conv, act, nn.Conv2d(width, channels_out, 1))

class Loss(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, logits, target):
        return self.weight * nn.functional.cross_entropy(logits, target)

def make(**arguments):
    return Net(kind="plain", act=nn.ReLU(), **arguments)
"""
FILES = {
    "model/theirs.yaml": "_target_: theirs.Net\nchannels_in: ${form.in_channels}\n"
    "channels_out: ${form.channels}\nwidth: 3\nkind: plain\nact: {_target_: torch.nn.ELU}\n",
    "model/made.yaml": "_target_: theirs.make\nchannels_in: ${form.in_channels}\n"
    "channels_out: ${form.channels}\nwidth: 3\n",
    "loss/weighted.yaml": "_target_: theirs.Loss\nweight: 3\n",
}
SMALL = [
    "experiment=smoke", "trainer.max_steps=4", "trainer.val_check_interval=4", "data.val_size=4",
    "data.test_size=6", "data.eval_batch_size=6",
]  # fmt: skip
LIBRARIES = {"smp_unet": "segmentation_models_pytorch", "monai_unet": "monai"}
MODELS = ["theirs", "made", *(model for model, name in LIBRARIES.items() if find_spec(name))]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A sweep s over networks with losses of somebody else, and a single run; who tests reads."""
    cwd = tmp_path_factory.mktemp("kept")
    for name, text in FILES.items():
        (cwd / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (cwd / "mine" / name).write_text(text)
    (cwd / "theirs.py").write_text(THEIRS)
    path = os.pathsep.join([str(cwd), os.environ.get("PYTHONPATH", "")])
    env = ENVIRONMENT | {"PYTHONPATH": path}
    run_train(
        "-m", "--config-dir", "mine", *SMALL, f"model={','.join(MODELS)}", "loss=weighted",
        "loss.weight=2", "watch=[cce,dice,weighted]", "theta=[0.3,0.6]", "seed=3",
        "hydra.sweep.dir=outputs/s", cwd=cwd, env=env,
    )  # fmt: skip
    run_train(
        *SMALL, "model=convnet", "model.batch_norm=true", "model.width=2", "loss=dice_tversky",
        "loss.beta=0.9", "data.low=-1", "hydra.run.dir=outputs/t/loss=tversky,seed=0", cwd=cwd,
    )  # fmt: skip
    return SimpleNamespace(cwd=cwd, env=env, one=cwd / "outputs/t/loss=tversky,seed=0")


def scores_of(folder):
    """The test metrics of a run's result."""
    metrics = read_result(folder)["metrics"]
    return {name: value for name, value in metrics.items() if name.startswith("test/")}


def test_the_checkpoint_alone_names_the_run(runs):
    """Its own metrics again, for the runs of two sweeps, by paths without quotes."""
    places = [f"outputs/s/model={name}" for name in MODELS if name != "made"]
    places.append("outputs/t/loss=tversky,seed=0")
    before = set(run_folders(runs.cwd).values())
    run_train("-m", "mode=test", f"checkpoint={','.join(places)}", cwd=runs.cwd, env=runs.env)
    found = {folder.name: folder for folder in set(run_folders(runs.cwd).values()) - before}
    assert found.keys() == {f"test_{place.split('/')[-1]}" for place in places}
    for place in places:
        run, test = runs.cwd / place, found[f"test_{place.split('/')[-1]}"]
        assert (
            scores_of(test) == pytest.approx(scores_of(run), rel=1e-5) and len(scores_of(run)) > 5
        )
        kept, wanted = read_result(test), read_result(run)
        assert [kept["choices"][k] for k in ("loss", "model")] == [
            wanted["choices"][k] for k in ("loss", "model")
        ]
        for key in ("theta", "seed", "watch", "loss", "model", "data"):
            assert kept["config"][key] == wanted["config"][key]


def test_runs_of_one_name_in_two_sweeps(runs):
    """The names of their tests are unique, and begin with that of the run."""
    shutil.copytree(runs.one, runs.cwd / "outputs/u" / runs.one.name)
    places = [f"outputs/{sweep}/{runs.one.name}" for sweep in "tu"]
    run_train(
        "-m", "mode=test", f"checkpoint={','.join(places)}", "theta=0.3,0.5",
        "hydra.sweep.dir=outputs/v", cwd=runs.cwd,
    )  # fmt: skip
    results = [read_result(file.parent) for file in runs.cwd.glob("outputs/v/*/result.json")]
    assert {(r["config"]["checkpoint"], r["config"]["theta"]) for r in results} == {
        (place, theta) for place in places for theta in (0.3, 0.5)
    }
    assert all(
        result["run"].startswith(f"test_{runs.one.name},theta={result['config']['theta']}-")
        for result in results
    )


def test_a_file_and_a_network_made_by_a_function(runs, refusal, monkeypatch):
    """A file in the run's folder works, too. Only a file of the user's may name a function."""
    before = set(run_folders(runs.cwd).values())
    made = "checkpoint=outputs/s/model=made/checkpoints/step=4.ckpt"
    monkeypatch.chdir(runs.cwd)
    monkeypatch.syspath_prepend(runs.cwd)
    assert refusal("mode=test", made) == (
        "checkpoint: its model is made by theirs.make, which is not a class of modules; "
        "give its file again, by --config-dir <folder> and model=made"
    )
    given = ["--config-dir", "mine", "mode=test", made, "model=made"]
    assert "test Dice" in run_train(*given, cwd=runs.cwd, env=runs.env).stderr
    [test] = {
        f for f in set(run_folders(runs.cwd).values()) - before if (f / "result.json").exists()
    }
    assert test.name == "test_model=made,step=4,model=made"
    assert scores_of(test) == pytest.approx(scores_of(runs.cwd / "outputs/s/model=made"), rel=1e-5)


@pytest.fixture
def plan_test(runs, compose, monkeypatch):
    """plan_test(checkpoint, ...) -> the settings of its test in this process."""
    monkeypatch.chdir(runs.cwd)
    monkeypatch.syspath_prepend(runs.cwd)

    def plan(place, *overrides):
        return compose("mode=test", quoted(f"checkpoint={place}"), *overrides).plan().settings

    return plan


def test_what_the_command_gives_wins(runs, plan_test):
    settings = plan_test(runs.one, "theta=0.9", "data.image_size=20", "seed=7")
    assert (settings.theta, settings.data["thresholds"], settings.seed) == (0.9, 0.9, 7)
    assert (settings.data["image_size"], settings.data["low"], settings.data["seed"]) == (20, -1, 7)
    assert settings.loss["beta"] == 0.9 and settings.model["width"] == 2
    settings = plan_test(runs.one, "loss=cce", "watch=[dice]")
    assert (settings.trained, [*settings.losses]) == ("cce", ["dice", "cce"])
    settings = plan_test(runs.one, "++loss.beta=0.2")
    assert (settings.trained, settings.loss["beta"]) == ("dice_tversky", 0.2)
    settings = plan_test(runs.one, "model=convnet", "model.bn_momentum=0.3")
    assert (settings.model["width"], settings.model["bn_momentum"]) == (2, 0.3)


def test_another_network_is_refused_before_any_work(runs, plan_test):
    with pytest.raises(ConfigError, match=r"absent there and .* it was trained with .*ConvNet"):
        plan_test(runs.one, "model=unet")
    with pytest.raises(ConfigError, match=r"is \(2, 1, 3, 3\) there and \(3, 1, 3, 3\) in this"):
        plan_test(runs.one, "model=convnet", "model.width=3")


@pytest.mark.parametrize(
    "change, said",
    [
        ({"model": {"_target_": "os.system", "command": "x"}}, "its model is made by os.system"),
        ({"model": {"_target_": "torch.nn.Sequential", "_args_": [{"_target_": "os.getcwd"}]}},
         "its model is made by os.getcwd"),
        ({"model": {"_target_": "torch.fx.graph_module.reduce_graph_module"}},
         "its model is made by torch.fx.graph_module.reduce_graph_module"),
        ({"data": {"_target_": "subprocess.Popen"}}, "its data is made by subprocess.Popen"),
        ({"model": {"_target_": "torch.nn.Identity", "x": "${oc.env:HOME}"}},
         r"its model refers to \$\{oc.env:HOME\}"),
    ],
)  # fmt: skip
def test_a_file_names_modules_and_no_other_code(runs, compose, change, said):
    """Somebody else may have written it."""
    content = find_checkpoint(str(runs.one))
    content["losswatch"]["config"] |= change
    with pytest.raises(ConfigError, match=said):
        compose("mode=test", "checkpoint=x").settings(recall=lambda _: to_keep(content))


@pytest.mark.parametrize("change", ["losses", "trained"])
def test_a_loss_of_a_file_is_a_module(runs, compose, change):
    content = find_checkpoint(str(runs.one))
    name = {"losses": "cce", "trained": "dice_tversky"}[change]
    content["losswatch"]["losses"][name] = {"_target_": "os.system"}
    with pytest.raises(ConfigError, match="its losses is made by os.system"):
        compose("mode=test", "checkpoint=x").settings(recall=lambda _: to_keep(content))


def test_a_checkpoint_without_losses_and_choices(runs, compose):
    """As earlier versions wrote it: network and data are the run's, the losses the command's."""
    content = find_checkpoint(str(runs.one))
    del content["losswatch"]["losses"], content["losswatch"]["choices"]
    settings = compose("mode=test", "checkpoint=x").settings(recall=lambda _: to_keep(content))
    assert settings.model["width"] == 2 and settings.trained == "dice"
    assert settings.job.choices["model"] is None


def test_bad_places_get_one_line(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(runs.cwd)
    names = ", ".join(f"model={name}" for name in sorted(MODELS))
    with pytest.raises(ConfigError) as raised:
        find_checkpoint("outputs/s")
    assert str(raised.value) == (
        "checkpoint=outputs/s: it is not the folder of a run; it holds the runs of a sweep: "
        + names
    )
    with pytest.raises(ConfigError, match=r"^checkpoint=no,such: there is no such file or run fol"):
        find_checkpoint("no,such")
    run = tmp_path / "run"
    shutil.copytree(runs.one, run)
    [file] = run.glob("checkpoints/*.ckpt")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(
        ConfigError, match="the run holds no readable checkpoint; .*step=4.ckpt can"
    ):
        find_checkpoint(str(run))
    file.unlink()
    with pytest.raises(ConfigError, match="the run holds no readable checkpoint$"):
        find_checkpoint(str(run))


def test_paths_with_commas(tmp_path, monkeypatch):
    """A text that exists is one path. If it names several that exist, they are swept."""
    monkeypatch.chdir(tmp_path)
    for name in ("a,b", "a", "c=1,d=2", "it's"):
        (tmp_path / name).mkdir()
    assert quoted("checkpoint=a,b") == "checkpoint='a,b'"
    assert quoted("checkpoint=a,c=1,d=2") == "checkpoint='a','c=1,d=2'"
    assert quoted("checkpoint=a,b,it's") == r"checkpoint='a,b','it\'s'"
    assert quoted("checkpoint=a,e") == "checkpoint='a,e'"  # there is no e
    assert quoted("checkpoint='a','b'") == "checkpoint='a','b'"
    assert quoted("resume=a,c=1,d=2") == "resume='a,c=1,d=2'"


def test_a_folder_of_images(tmp_path, compose, monkeypatch):
    """Its settings are the run's, the text among them; a prediction names its own images."""
    generator = np.random.default_rng(0)
    for i in range(6):
        mask = (generator.random((20, 20)) > 0.5).astype(np.uint8)
        for kind, array in (("img", mask * 200), ("lab", mask)):
            (tmp_path / "a" / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(tmp_path / "a" / kind / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    given = ["trainer.accelerator=cpu", "trainer.enable_progress_bar=false"]
    plan = compose(
        "data=folder", "data.root=a", "data.images=img", "data.masks=lab", "data.patch_size=16",
        "data.num_workers=0", "data.classes={background:0,cell:1}", "data.target=sigmoid",
        "model=convnet", "loss=dice_ce_monai", "trainer.max_steps=4", *given,
        "trainer.val_check_interval=4",
    ).plan(tmp_path / "outputs/s/run")  # fmt: skip
    plan.folder.mkdir(parents=True)
    trained = task.train(plan).metrics
    of_test = compose("mode=test", "checkpoint=outputs/s/run", *given).plan(tmp_path / "test")
    tested = ordinary.test(of_test).metrics
    wanted = {name: value for name, value in trained.items() if name.startswith("test/")}
    assert tested == pytest.approx(wanted, rel=1e-5)
    assert {"test/dice/cell", "test/loss/dice_ce_monai"} <= wanted.keys()
    found, config = of_test.settings, plan.settings
    assert (found.data, found.theta) == (config.data | {"axes": found.data["axes"]}, None)
    run_train("mode=predict", "checkpoint=outputs/s/run", "data.root=a/img", given[0], cwd=tmp_path)
    [(name, predicted)] = run_folders(tmp_path).items()
    assert name.split(",")[0] == "predict_run"
    masks = {path.name: path for path in (predicted / "predictions").iterdir()}
    assert len(masks) == 6
    written = [*(tmp_path / "test" / "predictions").iterdir()]
    assert written
    for path in written:
        with Image.open(path) as one, Image.open(masks[path.name]) as other:
            np.testing.assert_array_equal(one, other)
