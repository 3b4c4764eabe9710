"""One table of settings that are refused: each gets one line that says what is allowed.

Most rows are tried in this process, as the command tries them before any work; `RUNS` are tried
with the command itself.
"""

import re

import pytest
from conftest import run_train
from disks import SHORT, make_folder

# Overrides, and a pattern for the line.
ALONE = [
    ("theta=1.5", "theta must be a number strictly between 0 and 1.*got 1.5"),
    ("theta=0", "theta must be .* between 0 and 1.*got 0"),
    ("theta=1.0", "theta must be .* between 0 and 1.*got 1.0"),
    ("theta=-0.5", "theta must be .* between 0 and 1.*got -0.5"),
    ("theta=nan", "theta must be .* between 0 and 1.*got nan"),
    ("theta=abc", "theta must be a number.*got abc"),
    ("theta=true", "theta must be a number.*got True"),
    ("theta=null", "theta must be a number.*got None"),
    ("theta=[]", r"theta must be .* list.*got \[\]"),
    ("theta=[0.5,0.2]", r"strictly increasing list.*'theta=\[0.3,0.6\]'.*got \[0.5, 0.2\]"),
    ("theta=[0.5,0.5]", "strictly increasing list"),
    ("theta=[0.5,x]", "strictly increasing list"),
    ("theta=[0.5,[0.6]]", "strictly increasing list"),
    ("theta={a:1}", "theta must be a number"),
    ("theta=0.9999999999", "theta must leave room for each class.*got 0.9999999999"),
    ("theta=[0.5,0.50000000001]", "theta must leave room for each class"),
    ("data.batch_size=0", "data.batch_size must be a whole number of at least 1, got 0"),
    ("data.image_size=0", "data.image_size must be a whole number of at least 1, got 0"),
    ("data.val_size=0", "data.val_size must be a whole number of at least 1, got 0"),
    ("data.test_size=-1", "data.test_size must be a whole number of at least 1, got -1"),
    ("data.eval_batch_size=0", "data.eval_batch_size must be .* at least 1, got 0"),
    ("data.num_workers=-1", "data.num_workers must be a whole number of at least 0, got -1"),
    ("data.dims=4", "data.dims must be 2 or 3, got 4"),
    ("data.noise=-0.1", "data.noise must be a number of at least 0, got -0.1"),
    ("data.theta_spread=inf", "data.theta_spread must be a number of at least 0, got inf"),
    ("data.low=nan", "data.low must be a finite number, got nan"),
    ("data.high=-inf", "data.high must be a finite number, got -inf"),
    ("data=folder", r"^data=folder needs data.root=<folder of images>$"),
    ("threads=0", "threads must be a whole number of at least 1, or auto, got 0"),
    ("threads=many", "threads must be a whole number of at least 1, or auto, got many"),
    ("seed=-1", "seed must be a whole number of at least 0, got -1"),
    ("seed=9223372036854775808", r"seed must be less than 2\^63"),
    ("optimizer.lr=-1", "optimizer.lr must be a number greater than 0, got -1"),
    ("optimizer.lr=0", "optimizer.lr must be a number greater than 0, got 0"),
    ("optimizer.lr=x", "optimizer.lr must be a number greater than 0, got x"),
    ("optimizer.lr=inf", "optimizer.lr must be a number greater than 0, got inf"),
    ("optimizer.momentum=x optimizer=sgd", "optimizer.momentum must be a number, got 'x'"),
    ("optimizer.betas=[2,3]", "optimizer: .*betas?"),
    ("optimizer._target_=torch.optim.Atom", "optimizer._target_=torch.optim.Atom cannot be import"),
    ("probe.every_n_steps=-1", "probe.every_n_steps must be .* at least 0, got -1"),
    ("trainer.max_steps=0", "trainer.max_steps must be a whole number of at least 1, got 0"),
    ("trainer.max_steps=1.5", "trainer.max_steps must be a whole number .* got 1.5"),
    ("trainer.max_steps=true", "trainer.max_steps must be a whole number .* got True"),
    ("trainer.val_check_interval=0", "trainer.val_check_interval must be .* at least 1, got 0"),
    ("trainer.accumulate_grad_batches=0", "trainer.accumulate_grad_batches must be .* got 0"),
    ("watch=[]", r"watch must name at least one loss, got \[\]"),
    ("watch=[dise]", "watch: there is no loss 'dise'; known are .*cce.*dice"),
    ("watch=[3]", "watch: there is no loss 3; known are"),
    ("~loss", "loss must be one of .*cce.*dice"),
    ("loss=[dice,cce]", "loss must be one of .*cce.*dice"),
    ("model.widths=[]", r"model.widths must name .* at least one level, got \[\]"),
    ("model.widths=[8,-1]", "each of model.widths must be a whole number of at least 1, got -1"),
    ("model.widths=8", "model.widths must be a list, got 8"),
    ("data.image_size=33", r"divisible by 4, got \(33, 33\); change data.image_size"),
    ("model=convnet model.width=0", "model.width must be a whole number of at least 1, got 0"),
    ("model._target_=no.such.Net", "model._target_=no.such.Net cannot be imported: .*no"),
    ("model._target_=torch.nn.ReLU", "model: "),
    ("loss._target_=no.such", "loss dice._target_=no.such cannot be imported"),
    ("loss._target_=torch.nn.Identity", "loss dice: "),
    ("+loss.smooth=1", "loss dice: .*smooth"),
    # What Hydra refuses.
    ("loss=dise", "^there is no loss=dise; loss is one of cce,.* dice,.*dice_fg"),
    ("data.imagesize=3", "^there is no data.imagesize; data has .*image_size,"),
    ("modl=unet", "^there is no modl; the config has theta, seed, "),
    ("trainer.max_stepz=3", "^there is no trainer.max_stepz; trainer has max_steps,"),
    ("data.batch_size=two", "data.batch_size must be a whole number of at least 1, got two"),
    ("theta", "Error parsing override 'theta'"),
    ("loss=null", "a group, such as loss or model, takes the name of one of its files"),
    ("model=null", "a group, such as loss or model, takes the name of one of its files"),
    ("optimizer=null", "a group, such as loss or model, takes the name of one of its files"),
    ("experiment=1", "a group, such as loss or model, takes the name of one of its files"),
]

# After `experiment=smoke`.
SMOKE = [
    ("loss._target_=foreign.Detached", "loss dice: its value has no gradient by the logits"),
    ("loss._target_=foreign.Constant", "loss dice: its value has no gradient by the logits"),
    ("loss._target_=foreign.Whole", "loss dice must return a floating-point scalar.*int64"),
    ("loss._target_=foreign.Vector", r"must return a floating-point scalar.*\(2, 16, 16\)"),
    ("loss._target_=foreign.InPlace", "loss dice changes the logits in place"),
    ("loss._target_=foreign.InPlaceTarget", "loss dice changes the target in place"),
    ("loss._target_=foreign.Forgetful", "loss dice gives another value .* buffers"),
    ("loss._target_=foreign.half_loss +loss._partial_=true", "loss dice: .* make a .*Module"),
    ("loss._target_=collections.OrderedDict", "loss dice: .* make a .*Module, it makes a OrderedD"),
    ("model._target_=foreign.AllFrozen", "model: no parameter requires a gradient"),
    ("model._target_=foreign.Lazy", "model: 0.weight has no size before the first batch"),
    ("model._target_=foreign.NoGrad", "model: its logits carry no gradient"),
    ("model._target_=foreign.Pair", "model must return one tensor .*, it returns a tuple"),
    ("model._target_=foreign.Named", "model must return one tensor .*, it returns a dict"),
    ("model=unet data.image_size=4 data.batch_size=1", "model: Expected more than 1 value per cha"),
    ("++optimizer.betas=[.5,.9,.3]", "optimizer.betas must be a shorter list, got"),
    ("data.high=1e300", "data.high must be a finite number"),
    ("data.high=3e38 data.low=-3e38", "high - low must be a finite number"),
    ("data.high=3e38", "model: its logits are not finite at the first step"),
    ("trainer.gradient_clip_val=nan", "trainer.gradient_clip_val must be .* at least 0, got nan"),
    ("trainer.gradient_clip_val=-1", "trainer.gradient_clip_val must be .* at least 0, got -1"),
    ("optimizer._target_=torch.nn.Linear", "optimizer"),
    ("optimizer._target_=foreign.scheduled", "make a torch.optim.Optimizer, .* a tuple$"),
]

# After a smoke run of twelve steps and three validations.
QUICK = [
    ("+note=1", "^unknown setting note; the config has theta, seed, "),
    *((f"~{key}", f"^{key} was removed from the config, ") for key in ("tags", "mode", "trainer")),
    ("~model.in_channels", r"^~model.in_channels: \${form.in_channels} is known only once a run "),
    ("+model.in_channels=1", r"^\+model.in_channels=1: the setting is there already"),
    ("+form.channels=1", "^unknown setting form; losswatch sets the values of "),
    ("+data.x=1", "^unknown setting data.x; data has .*image_size, "),
    ("+probe.x=1", "^unknown setting probe.x; probe has every_n_steps, cosines"),
    ("+trainer.x=1", "^trainer: .* unexpected keyword argument 'x'"),
    ("+trainer.logger=true", "^trainer.logger is set by losswatch; loggers are chosen by logger="),
    ("trainer.max_epochs=0", "^trainer.max_epochs must be a whole number of at least 1, got 0"),
    (
        "+callbacks=early",
        "^there is no callbacks=early; callbacks is one of best, early_stopping, ",
    ),
    ("logger=tensorbord", "^there is no logger=tensorbord; logger is one of csv, mlflow, "),
    ("loss.alhpa=0.3", "^loss dice: .*alhpa"),
    ("metric=val/dise", "^metric=val/dise is not a metric of the validation, which has val/di"),
    ("callbacks=[best] callbacks.best.save_top_k=many", "^callbacks.best.save_top_k must be "),
    ("callbacks=[best,nosuch]", "^there is no callbacks=nosuch; --help lists those of callbacks"),
    ("scheduler=cosine scheduler.T_max=x", "^scheduler.T_max must be a whole number, got 'x'"),
    ("trainer.max_epochs=3", "^trainer.max_epochs=3 needs training batches that can be counted, "),
    ("trainer.max_epochs=1.5", "^trainer.max_epochs must be a whole number of at least 1, got 1.5"),
    ("scheduler=cosine scheduler.T_max=0", "^scheduler: "),
    ("scheduler=cosine +scheduler.x=1", "^scheduler: .*'x'"),
    ("scheduler=one_cycle scheduler.total_steps=10", "^scheduler.total_steps=10 ends before "),
    ("+scheduler.x=1", "^unknown setting scheduler.x; choose a scheduler, such as "),
    ("+logger.x=1", "^logger.x needs a _target_, the class that makes it"),
    ("+callbacks.x=1", "^callbacks.x needs a _target_, the class that makes it"),
    (
        "callbacks=best callbacks.best.monitor=val/x",
        "^callbacks: the ModelCheckpoint monitors val/x",
    ),
    (
        "callbacks=best callbacks.best.save_top_k=3",
        "^callbacks: with save_top_k=3 each checkpoint ",
    ),
    (
        "callbacks=best callbacks.best.save_top_k=3 callbacks.best.filename='{epoch}'",
        "^callbacks: with save_top_k=3 each checkpoint needs a name of its own",
    ),
    (
        "callbacks=best callbacks.best.filename='{step:03}'",
        "^callbacks: filename={step:03} gives checkpoints the names of the run's own, step=",
    ),
    (
        "callbacks=best callbacks.best.filename='{step'",
        "^callbacks: filename={step makes no name: ",
    ),
    (
        "callbacks=best +callbacks.x=${callbacks.best}",
        "^callbacks: two of them write best.ckpt to ",
    ),
    (
        "callbacks=best +callbacks.best.every_n_epochs=2",
        "^callbacks.best.every_n_epochs has no use: ",
    ),
    (
        "callbacks=early_stopping callbacks.early_stopping.monitor=val_loss",
        "^callbacks: the EarlySt",
    ),
    ("scheduler=cosine optimizer.weight_decay=-1", "^optimizer: Invalid weight_decay value: -1"),
    (
        "+trainer.reload_dataloaders_every_n_epochs=1",
        "^trainer.reload_dataloaders_every_n_epochs is ",
    ),
    (
        "data.batches=4 trainer.max_epochs=2000000000",
        "^trainer.max_steps must be less than 2.31, got",
    ),
    ("+trainer.barebones=true", "^trainer.barebones is set by losswatch; a run has loggers, "),
    ("+trainer.limit_val_batches=0", "^trainer.limit_val_batches must be more than 0, got 0: "),
    (
        "+trainer.limit_val_batches=0.3",
        "^trainer.limit_val_batches=0.3 of 2 is less than one batch; ",
    ),
    ("+trainer.limit_test_batches=0.3", "^trainer.limit_test_batches=0.3 of 2 is less than one "),
    ("+trainer.min_epochs=2", "^trainer.min_epochs is set by losswatch; a training is one epoch; "),
    (
        "data.batches=3 trainer.max_epochs=100000000000",
        "^trainer.max_epochs must be less than 2.31,",
    ),
]

# After a short run on a folder of images, which is {root}.
FOLDER = [
    ("theta=0.5", "theta=0.5 belongs to data=random alone; remove it$"),
    ("data.root=nowhere", "data: data.root=nowhere: there is no such folder$"),
    ("~data.root", "^data.*root"),
    ("data.flip=perhaps", "data.flip must be true or false, got 'perhaps'"),
    ("data.image_size=3", "image_size"),
    ("data.batch_size=0", "data.batch_size must be at least 1"),
    ("data.patch_size=15", "model: .*(size|15)"),
]

TABLE = {
    "": ALONE,
    "experiment=smoke": SMOKE,
    "experiment=smoke trainer.max_steps=12 trainer.val_check_interval=4": QUICK,
    " ".join([*SHORT, "data.root={root}"]): FOLDER,
}
ROWS = [
    pytest.param(start.split(), overrides.split(), message, id=overrides)
    for start, rows in TABLE.items()
    for overrides, message in rows
]


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """A folder with five images."""
    return make_folder(tmp_path_factory.mktemp("refused") / "a", 5)


@pytest.mark.parametrize("start, overrides, message", ROWS)
def test_refused_in_one_line(refusal, root, start, overrides, message):
    line = refusal(*(part.replace("{root}", str(root)) for part in start), *overrides)
    assert re.search(message, line), line


RUNS = {
    "loss=dise": "there is no loss=dise; loss is one of cce,.* dice,.*dice_fg",
    "-m loss=dice,dise": "there is no loss=dise; loss is one of cce,.* dice,.*dice_fg",
    "-m trainer.max_stepz=3,4": "there is no trainer.max_stepz; trainer has max_steps,",
    "theta": "Error parsing override 'theta'",
    "--cfg job --resolve": r"\${form.in_channels} is known only once a run has started; --resolve",
    "experiment=smoke theta=1.5": r"theta must be a number strictly between 0 and 1.*got 1\.5",
}


@pytest.mark.parametrize("arguments", RUNS)
def test_the_command_refuses_in_one_line(tmp_path, arguments):
    """A sweep says nothing else; a run is named before."""
    done = run_train(*arguments.split(), cwd=tmp_path, status=2)
    *begun, line = (done.stdout + done.stderr).splitlines()
    assert re.match(f"losswatch: .*{RUNS[arguments]}", line)
    assert not begun or (begun == [f"run: {arguments}"] and "-m" not in arguments)
    assert not list(tmp_path.glob("outputs/*/*/.hydra")) or begun
    assert not list(tmp_path.rglob("events.out.*")) and not list(tmp_path.rglob("result.json"))
