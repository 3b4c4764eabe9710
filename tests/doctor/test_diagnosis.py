"""Findings of runs: said at the start and at the end, in result.json, the table, TensorBoard and
the command `losswatch diagnose`."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import ROOT, run_python, run_train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from losswatch import Observer, Watch, WatchHandler
from losswatch.disk.curves import read_signs
from losswatch.disk.result import Result
from losswatch.doctor.findings import Finding
from losswatch.presets import CONF, list_losses, load_loss
from losswatch.report import diagnosis
from losswatch.report.diagnosis import FOUND, findings_of, print_findings
from losswatch.watch.doctor import kind_of, terms_of

COLLAPSE = (
    "model=convnet", "model.batch_norm=false", "theta=0.05", "data.image_size=16",
    "data.val_size=8", "data.test_size=8", "trainer.max_steps=120",
    "trainer.val_check_interval=120", "optimizer.lr=0.01", "watch=[dice_fg,dice_square]",
)  # fmt: skip


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A run that collapses and one that does not, as a stack and one by one."""
    folder = tmp_path_factory.mktemp("doctor")
    done = {}
    for launcher in ("basic", "fused"):
        done[launcher] = run_train(
            "-m", "loss=dice_fg,dice_square", *COLLAPSE, f"hydra/launcher={launcher}",
            f"hydra.sweep.dir={launcher}", cwd=folder,
        )  # fmt: skip
    return folder, done


def runs(folder):
    return {Result.read(path.parent).choices["loss"]: path.parent
            for path in folder.glob("*/result.json")}  # fmt: skip


@pytest.mark.parametrize("launcher", ["basic", "fused"])
def test_a_collapse_is_named_in_every_place(sweep, launcher, capsys):
    folder, done = sweep
    output = done[launcher].stdout + done[launcher].stderr
    assert "collapsed (step" in output
    if launcher == "basic":
        assert "losswatch: collapse-ahead (step 0): dice_fg pulls all pixels" in output
    found = runs(folder / launcher)
    result = json.loads((found["dice_fg"] / "result.json").read_text())
    [collapsed, *_] = result["findings"]
    assert collapsed["name"] == "collapsed" and 0 <= collapsed["step"] < 100
    assert "Every pixel is predicted as foreground since step" in collapsed["text"]
    assert set(collapsed) == {"name", "step", "text", "remedy"}
    assert json.loads((found["dice_square"] / "result.json").read_text())["findings"] == []

    runs_of = pd.read_csv(folder / launcher / "summary.csv").set_index("loss")
    summary = runs_of["findings"]
    assert summary["dice_fg"].split()[0] == "collapsed" and pd.isna(summary["dice_square"])
    # What the validation shows without the doctor comes first: in the run's line, the table, words.
    assert runs_of["verdict"]["dice_fg"] == "constant: foreground"
    assert re.search(r"val Dice 0\.4\d+, IoU 0\.4\d+, constant: foreground in .*dice_fg", output)
    assert re.search(r"val Dice 0\.\d+, IoU 0\.\d+, accuracy 0\.\d+ in .*dice_square", output)
    assert re.search(r"(?m)^dice_fg .* done +constant: foreground$", output)
    assert "\nloss=dice_fg predicts foreground everywhere.\n" in output

    with pytest.raises(SystemExit) as status:
        print_findings([str(found["dice_fg"])])
    assert status.value.code == FOUND == 3
    assert "collapsed, since step" in capsys.readouterr().out
    print_findings([str(found["dice_square"])])
    assert "nothing found" in capsys.readouterr().out

    events = EventAccumulator(str(found["dice_fg"]))
    events.Reload()
    [tag] = [t for t in events.Tags()["tensors"] if t.startswith("findings")]
    texts = [e.tensor_proto.string_val[0].decode() for e in events.Tensors(tag)]
    assert any(text.startswith("collapsed") for text in texts)


def test_a_stack_and_a_single_run_see_the_same_batches(sweep):
    folder, _ = sweep
    one, stacked = (
        read_signs(runs(folder / launcher)["dice_square"]) for launcher in ("basic", "fused")
    )
    assert list(stacked.index) == [0, 5, 10, 20, 50, 100, 119]
    first = sorted(set(one.columns) & set(stacked.columns))
    first = [c for c in first if c.startswith(("sign/", "answer/")) and "ends_in" not in c]
    both = one.index.intersection(stacked.index)[:4]
    np.testing.assert_allclose(
        one.loc[both, first].to_numpy(), stacked.loc[both, first].to_numpy(), rtol=2e-3, atol=2e-3
    )


def test_the_command(sweep, tmp_path):
    folder, _ = sweep
    run = runs(folder / "basic")["dice_fg"]
    done = run_train("diagnose", str(run), cwd=tmp_path, status=3)
    assert "collapsed, since step" in done.stdout and not done.stderr
    done = run_train("diagnose", "nowhere", str(folder), cwd=tmp_path, status=2)
    lines = done.stderr.splitlines()
    assert lines[0] == "nowhere: there is no such folder" and "holds no run" in lines[1]
    assert "usage: losswatch diagnose" in run_train("diagnose", cwd=tmp_path, status=2).stdout


def test_a_damaged_record_is_one_line(sweep, tmp_path, capsys):
    folder, _ = sweep
    run = shutil.copytree(runs(folder / "basic")["dice_fg"], tmp_path / "run")
    (run / "signs.json").write_text("{")
    print_findings([str(run)])
    assert findings_of(run, "dice_fg") == []
    (run / "signs.f32").unlink()
    with pytest.raises(SystemExit) as status:
        print_findings([str(run)])
    assert status.value.code == 2
    assert "holds no signs" in capsys.readouterr().err


def test_a_report_names_it_beside_the_marked_curve(sweep, tmp_path):
    folder, _ = sweep
    copy = shutil.copytree(folder / "basic", tmp_path / "basic")
    run_python(str(ROOT / "scripts/report.py"), str(copy), cwd=tmp_path)
    report = (copy / "report.md").read_text()
    part = report[report.index("## What is wrong") : report.index("## Figures")]
    assert "| collapsed |" in part and "Every pixel is predicted as foreground" in part
    assert "curves.png" in part and "dice_square" not in part


@pytest.mark.parametrize(
    "findings, line",
    [
        (["a"], "a finding is of type str"),
        ([{"name": 1}], "a finding's name is of type int"),
        ([{"name": "a", "step": "b", "text": "", "remedy": ""}], "a finding's step is of type str"),
    ],
)
def test_damaged_findings_are_told(findings, line):
    with pytest.raises(ValueError, match=line):
        Result.of({"status": "failed", "findings": findings})


@pytest.mark.parametrize("name", list_losses())
def test_a_preset_s_file_tells_its_kind(name):
    node = yaml.safe_load((CONF / "loss" / f"{name}.yaml").read_text())
    assert diagnosis._kind_of(node) == kind_of(load_loss(name))


def test_the_terms_of_a_sum():
    nodes = {name: yaml.safe_load((CONF / "loss" / f"{name}.yaml").read_text())
             for name in ("dice", "cce", "dice_fg", "dice_cce")}  # fmt: skip
    assert diagnosis._terms_of(nodes, "dice_cce") == ("dice", "cce")
    losses = {name: load_loss(name) for name in nodes}
    assert terms_of(losses, "dice_cce") == ("dice", "cce")
    assert diagnosis._terms_of(nodes, "dice") == terms_of(losses, "dice") == ()


def test_watch_says_it_in_the_log_and_in_tensorboard(tmp_path, caplog):
    import pytorch_lightning as pl
    from pytorch_lightning.loggers import TensorBoardLogger

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Softmax(1))
            self.loss = nn.CrossEntropyLoss()

        def training_step(self, batch, _):
            return self.loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    images = torch.randn(8, 1, 8, 8)
    data = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(images, (images[:, 0] > 0).long()), batch_size=4
    )
    watch = Watch(["cce", "dice"], criterion="loss", every_n_steps=1, diagnose=True)
    logger = TensorBoardLogger(tmp_path, name=None, version="")
    trainer = pl.Trainer(
        max_epochs=2, logger=logger, callbacks=[watch], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(Module(), data)
    assert [finding.name for finding in watch.findings()][:1] == ["activation-twice"]
    said = [r.getMessage() for r in caplog.records if "activation-twice" in r.getMessage()]
    assert len(said) == 1 and said[0].startswith("losswatch: activation-twice (step 0)")
    logger.experiment.flush()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    [text] = events.Tensors("findings/text_summary")[-1].tensor_proto.string_val
    assert Finding.of_lines(text.decode())[0][:2] == ("activation-twice", 0)


def test_the_last_text_in_tensorboard_holds_all_findings(monkeypatch):
    """TensorBoard's fast loader drops a text when one of an earlier or the same step follows."""
    written = []
    doctor = Observer(["cce"], nn.Conv2d(1, 2, 1), trained="cce").doctor
    late, early = Finding("floor", 90, "Low.", "Wait."), Finding("scale", 3, "Large.", "Less.")
    writer = SimpleNamespace(add_text=lambda *args: written.append(args))
    for step, found in ((100, [late]), (110, [late]), (120, [early, late])):
        doctor.kept.append((step, torch.zeros(0)))
        monkeypatch.setattr(doctor, "findings", lambda is_over, found=found: found)
        doctor.say([writer])
    assert [(tag, step) for tag, _, step in written] == [("findings", 100), ("findings", 120)]
    assert Finding.of_lines(written[-1][1]) == [
        Finding("floor", 90, "Low. Wait.", ""), Finding("scale", 3, "Large. Less.", "")
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*jit:DeprecationWarning")
@pytest.mark.parametrize("kind", ["Watch", "WatchHandler"])
def test_a_first_batch_that_cannot_be_watched_is_diagnosed(kind, caplog):
    """Masks of 0 and 255: nothing is watched, and the reason is named."""
    net = nn.Conv2d(1, 1, 1)
    images = torch.randn(4, 1, 8, 8)
    masks = 255.0 * (images > 0)
    criterion = nn.BCEWithLogitsLoss()
    if kind == "Watch":
        import pytorch_lightning as pl

        class Module(pl.LightningModule):
            def __init__(self):
                super().__init__()
                self.net, self.loss = net, criterion

            def training_step(self, batch, _):
                return self.loss(self.net(batch[0]), batch[1])

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)

        watch = Watch(
            ["cce", "dice"], criterion="loss", every_n_steps=1, diagnose=True, activation="sigmoid"
        )
        data = torch.utils.data.DataLoader([(x, y) for x, y in zip(images, masks, strict=True)])
        trainer = pl.Trainer(
            max_epochs=1, logger=False, callbacks=[watch], enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
        )  # fmt: skip
        trainer.fit(Module(), data)
    else:
        from ignite.engine import Engine

        watch = WatchHandler(
            ["cce", "dice"], every_n_steps=1, diagnose=True, activation="sigmoid", network=net
        )

        def step(engine, _):
            output = net(images)
            engine.state.output = {"pred": output, "label": masks}
            engine.fire_event("loss_completed")
            criterion(output, masks).backward()
            return engine.state.output

        engine = Engine(step)
        engine.register_events("loss_completed")
        watch.attach(engine)
        engine.run([0, 1, 2], max_epochs=1)
    [finding] = watch.findings()
    assert (finding.name, finding.step) == ("labels-outside", 0) and "255" in finding.text
    said = [r.getMessage() for r in caplog.records if "labels-outside" in r.getMessage()]
    assert len(said) == 1
