"""Killed in mid-epoch and resumed: how many of the next 20 steps equal an uninterrupted run, bit for bit?

    python benchmarks/resume.py             # Linux: the runs are forked; about 5 minutes of CPU time
    python benchmarks/resume.py --only moco
    SOLO_LEARN_ROOT=... python benchmarks/resume.py --only solo     # its main_pretrain.py, resumed by its AutoResumer
    python benchmarks/resume.py --only stable     # stable-pretraining's Manager, if it is installed

Each run trains on tiles of photographs, 16 batches an epoch, with a checkpoint after step 8. It is killed (SIGKILL)
in step 11, between backward and optimizer, and resumed in a new process up to step 28, in the next epoch. A step counts
as equal if its loss is, to the last bit; "all" that the final weights are, too. The same without LoGo stands beside.

The cures are below: `Batches` and `ResumableLoader` (data), `SeedEachStep` (what the step itself draws) and
`keep_bank`, `keep_covariance`, `KeepTau` (state of lightly's losses and of solo-learn that is in no checkpoint).
"""

import argparse
import functools
import hashlib
import importlib.util
import logging
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from lightly.loss import NegativeCosineSimilarity, NTXentLoss
from torch.utils.data import DataLoader, Dataset

from logo_plugin import LoGoLearner, MultiCropCollate, wrap

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import hosts
import solo_clone
from photos import tiles

IMAGES, BATCH = 64, 4
SAVED, KILLED, STEPS = 8, 11, 28


class Batches:
    """The batches of a run, each the same whenever it is made: its images come from (seed, epoch) alone.

    Gives (number of the batch, index of the image): the first seeds the image's crops.
    """

    def __init__(self, images, batch_size, seed=0):
        self.images, self.batch_size, self.seed = images, batch_size, seed
        self.done = 0  # batches, since the start of training

    def __len__(self):
        return self.images // self.batch_size

    def __iter__(self):
        epoch, first = divmod(self.done, len(self))
        generator = torch.Generator().manual_seed(hash((self.seed, epoch)))
        order = torch.randperm(self.images, generator=generator).tolist()
        for i in range(first, len(self)):
            images = order[i * self.batch_size : (i + 1) * self.batch_size]
            yield [(epoch * len(self) + i, image) for image in images]


class SeededImages(Dataset):
    """Seeds the worker for each batch; what its collate draws follows from that."""

    def __init__(self, images, seed=0):
        self.images, self.seed = images, seed

    def __getitems__(self, keys):
        torch.manual_seed(hash((self.seed, keys[0][0])))
        return [self.images[i] for _, i in keys]


class ResumableLoader(DataLoader):
    """A DataLoader that goes on with the batch after the last one given; Lightning saves and loads its state."""

    def __init__(self, images, batch_size, seed=0, **options):
        self.batches = Batches(len(images), batch_size, seed)
        super().__init__(SeededImages(images, seed), batch_sampler=self.batches, **options)

    def __iter__(self):
        for batch in super().__iter__():
            self.batches.done += 1
            yield batch

    def state_dict(self):
        return {"done": self.batches.done}

    def load_state_dict(self, state):
        self.batches.done = state["done"]


class SeedEachStep(pl.Callback):
    """What a step draws (the affinity's noise and negatives, dropout) follows from its number: no state to save.

    What a shuffling loader with workers draws follows from the epoch's, which is enough if checkpoints end epochs.
    """

    def __init__(self, seed=0):
        self.seed = seed

    def on_train_epoch_start(self, trainer, pl_module):
        torch.manual_seed(hash((self.seed, trainer.current_epoch)))

    def on_load_checkpoint(self, trainer, pl_module, checkpoint):
        torch.manual_seed(hash((self.seed, checkpoint["epoch"] + 1)))  # before its epoch starts, the loader draws

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.manual_seed(hash((self.seed, trainer.global_rank, trainer.current_epoch, batch_idx)))


def keep_bank(memory_bank):
    """Puts lightly's memory bank into the state_dict: criterion.memory_bank of MoCo, memory_bank of NNCLR."""
    for name in ("bank", "bank_ptr"):
        memory_bank.register_buffer(name, getattr(memory_bank, name))  # persistent, which lightly's are not


def keep_covariance(tico_loss, features):
    """Puts the moving covariance of lightly's TiCoLoss into the state_dict; zeros are what it starts with."""
    del tico_loss.C
    tico_loss.register_buffer("C", torch.zeros(features, features))


class KeepTau(pl.Callback):
    """solo-learn's EMA factor, which follows a cosine, goes on where it was; by itself it is `base_tau` for a step."""

    def on_train_start(self, trainer, pl_module):
        if trainer.global_step:
            pl_module.momentum_updater.update_tau(trainer.global_step, trainer.estimated_stepping_batches)


def lightning_run(make, logo, cures, folder, part):
    """One run of a LightningModule; writes the loss of each step, and in the end the digest of the weights."""
    pl.seed_everything(0, verbose=False)
    model = make()
    if "state" in cures and isinstance(model, hosts.MoCo):
        keep_bank(model.criterion.memory_bank)
    if "state" in cures and isinstance(model, hosts.TiCo):
        keep_covariance(model.criterion, 16)
    model = wrap(model, affinity="learned", local_weight=0.1) if logo else model
    record = Record(folder / part, KILLED if part == "killed" else None)
    trainer = saving_trainer(pl, folder, [record, *[SeedEachStep()] * ("steps" in cures)], checkpoints=folder / part)
    resumed = folder / "killed" / f"step={SAVED}.ckpt" if part == "resumed" else None
    trainer.fit(model, loader("data" in cures, logo, num_workers=2), ckpt_path=resumed)
    record.digest(model)


def saving_trainer(lightning, folder, callbacks, checkpoints=None):
    """A quiet Trainer with a checkpoint every few steps; `lightning` is pytorch_lightning or lightning.pytorch."""
    checkpoint = lightning.callbacks.ModelCheckpoint(
        checkpoints, filename="{step}", every_n_train_steps=SAVED, save_top_k=-1
    )
    return lightning.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        devices=1,
        callbacks=[*callbacks, checkpoint],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )


class Record(pl.Callback):
    def __init__(self, file, kill_at=None):
        file.mkdir()
        self.file, self.kill_at = file / "losses", kill_at

    def on_after_backward(self, trainer, pl_module):
        self.before_step(trainer.global_step + 1)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.after_step(trainer.global_step, outputs["loss"])

    def before_step(self, number):
        if number == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def after_step(self, number, loss):
        with self.file.open("a") as file:
            file.write(f"{number} {float(loss).hex()}\n")

    def digest(self, model):
        weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
        with self.file.open("a") as file:
            file.write(f"weights {hashlib.sha256(weights).hexdigest()}\n")


def solo_run(method, logo, cures, folder, part):
    """main_pretrain.py of the clone, the same command each time; a checkpoint at each end of an epoch, of 4 steps."""
    methods, _ = solo_clone.import_solo()
    record = Record(folder / part, KILLED if part == "killed" else None)
    callbacks = [record, *[SeedEachStep()] * ("steps" in cures), *[KeepTau()] * ("state" in cures)]
    # main_pretrain.py takes no callbacks; in a copy of it, one puts them into its list.
    methods.BaseMethod.configure_callbacks = lambda model: callbacks
    methods.BaseMethod.on_train_end = lambda model: record.digest(model)
    os.chdir(folder / ("whole" if part == "whole" else "killed"))
    for i, (image, label) in enumerate(tiles(4 * BATCH)):
        os.makedirs(f"data/{label}", exist_ok=True)
        image.save(f"data/{label}/{i}.png")
    options = ("method_kwargs.logo.affinity=learned", "method_kwargs.logo.local_weight=0.1")
    overlay = [f"+logo={method}", "augmentations=logo_cifar", *options]
    sizes = {"proj_hidden_dim": 24, "proj_output_dim": 16, "pred_hidden_dim": 24, "queue_size": 64}
    sys.argv = [
        *("main_pretrain.py", "--config-path", f"{solo_clone.ROOT}/scripts/pretrain/cifar", "--config-name", method),
        *(overlay if logo else []),
        *("accelerator=cpu", "devices='1'", "strategy=auto", "precision=32", "sync_batchnorm=False"),
        *("data.format=image_folder", "data.dataset=custom", "data.train_path=data", "data.val_path=null"),
        *("data.num_workers=2", f"optimizer.batch_size={BATCH}", "checkpoint.dir=checkpoints", "wandb.enabled=False"),
        *("backbone.name=resnet_small", f"max_epochs={STEPS // 4}", "+enable_progress_bar=False"),
        *(f"++method_kwargs.{key}={size}" for key, size in sizes.items()),
    ]
    runpy.run_path(f"{solo_clone.ROOT}/main_pretrain.py", run_name="__main__")


def stable_run(name, logo, cures, folder, part):
    """stable-pretraining's Manager with one of its forwards or method classes and the callbacks that belong to it."""
    import lightning.pytorch
    import stable_hosts
    import stable_pretraining as spt

    optim = {"optimizer": {"type": "SGD", "lr": 0.06, "momentum": 0.9}, "scheduler": "ConstantLR"}
    torch.manual_seed(0)
    model = stable_hosts.host(name, optim=optim)
    model = wrap(model, affinity="learned", local_weight=0.1) if logo else model
    record = Record(folder / part, KILLED if part == "killed" else None)
    added = [record, spt.callbacks.TeacherStudentCallback(), *[SeedEachStep()] * ("steps" in cures)]
    if name == "nnclr":
        added.append(spt.callbacks.queue.OnlineQueue(key=stable_hosts.QUEUE, queue_length=32, dim=16))
    spt.set(cache_dir=str(folder / part))  # the Manager makes a folder there for the run, checkpoints included
    trainer = saving_trainer(lightning.pytorch, folder, added)
    resumed = str(next((folder / "killed").rglob(f"step={SAVED}.ckpt"))) if part == "resumed" else None
    data = spt.data.DataModule(train=loader("data" in cures, logo, named=True, num_workers=2))
    spt.Manager(trainer=trainer, module=model, data=data, seed=0, ckpt_path=resumed)()
    record.digest(model)


def loop_run(make, logo, cures, folder, part):
    """The same in a loop of one's own, which saves what PyTorch's tutorial saves, or with `cures` all that there is."""
    torch.manual_seed(0)
    model, step, criterion = make(logo)
    if "state" in cures and isinstance(criterion, NTXentLoss):
        keep_bank(criterion.memory_bank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06, momentum=0.9)
    batches = loader("data" in cures, logo)
    saved, record, number = (
        folder / "killed" / "last.pt",
        Record(folder / part, KILLED if part == "killed" else None),
        0,
    )
    if part == "resumed":
        state = torch.load(saved)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        number = state["step"]
        if "state" in cures:
            criterion.load_state_dict(state["criterion"])
        if "data" in cures:
            batches.load_state_dict(state["batches"])
        if "steps" in cures:
            torch.set_rng_state(state["rng"])
    while number < STEPS:
        for views, _ in batches:
            loss = step(model, views)
            optimizer.zero_grad()
            loss.backward()
            record.before_step(number + 1)
            optimizer.step()
            number += 1
            record.after_step(number, loss)
            if number % SAVED == 0:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": number}
                state["rng"] = torch.get_rng_state()
                if criterion is not None:
                    state["criterion"] = criterion.state_dict()
                if "data" in cures:
                    state["batches"] = batches.state_dict()
                torch.save(state, folder / part / "new.pt")
                os.replace(folder / part / "new.pt", folder / part / "last.pt")  # never half a file under this name
            if number == STEPS:
                break
    record.digest(model)


def loader(resumable, logo, named=False, **options):
    options["collate_fn"] = MultiCropCollate.cifar10(local_crops=2 if logo else 0)
    images = tiles(IMAGES)
    if named:
        images = [{"image": image, "label": label} for image, label in images]
    if resumable:
        return ResumableLoader(images, BATCH, **options)
    return DataLoader(images, BATCH, shuffle=True, drop_last=True, **options)


def call(model, views):
    return model(views)


def learner(method, logo):
    options = {} if method == "byol" else {"queue_size": 64}
    options |= {"momentum": 0.9, "hidden_dim": 24, "output_dim": 16, "affinity": "learned", "local_weight": 0.1}
    model = LoGoLearner(hosts.small_backbone(), method, image_size=(32,), **options)
    return model, call, None


def plain(method, logo):
    cls, criterion = {
        "byol": (hosts.PlainBYOL, NegativeCosineSimilarity()),
        "moco": (hosts.PlainMoCo, NTXentLoss(temperature=0.1, memory_bank_size=(64, 16))),
    }[method]
    model = wrap(cls(), criterion=criterion, affinity="learned", local_weight=0.1) if logo else cls()
    return model, functools.partial(plain_step, criterion, logo), criterion


def plain_step(criterion, logo, model, views):
    model.update()
    return model(views) if logo else model.host_loss(criterion, *views)


LIGHTNING = {"byol": hosts.BYOL, "moco": hosts.MoCo, "simclr": hosts.SimCLR, "tico": hosts.TiCo}
LOOPS = {f"loop {m}": functools.partial(plain, m) for m in ("byol", "moco")} | {
    f"learner {m}": functools.partial(learner, m) for m in ("byol", "moco")
}
SOLO = {f"solo-learn {m}": m for m in ("byol", "simsiam", "mocov2plus", "nnclr")}
STABLE = {f"stable-pretraining {m}": m for m in ("byol", "SimSiam", "MoCov2", "nnclr")}
LEVELS = {"as is": (), "data": ("data",), "steps": ("data", "steps"), "state": ("data", "steps", "state")}


def forked(run, *arguments):
    process = multiprocessing.get_context("fork").Process(target=quiet, args=(run, *arguments))
    process.start()
    process.join()
    return process.exitcode


def quiet(run, *arguments):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    run(*arguments)


def compare(run, make, logo, cures):
    """Equal steps after resuming, of 20, and whether the final weights are; or that the host could not resume."""
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for part in ("whole", "killed", "resumed"):
            code = forked(run, make, logo, cures, Path(folder), part)
            if part == "resumed" and code == 1:
                return "does not resume"
            if code != (-signal.SIGKILL if part == "killed" else 0):
                raise RuntimeError(f"the {part} run of {make} ended with {code}")
            files[part] = (Path(folder) / part / "losses").read_text().split("\n")[:-1]
    whole, resumed = files["whole"][SAVED:], files["resumed"]
    if files["killed"] != files["whole"][: KILLED - 1]:
        raise RuntimeError("two runs from the start differ: there is something that no seed reaches")
    if [line.split()[0] for line in whole] != [line.split()[0] for line in resumed]:
        raise RuntimeError(f"the resumed run made other steps: {resumed}")
    equal = sum(a == b for a, b in zip(whole[:-1], resumed[:-1], strict=True))
    return f"{equal}{', all' if whole[-1] == resumed[-1] else ''}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="rows whose name holds this")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, Lightning {pl.__version__}; steps of {STEPS - SAVED} equal after resuming\n")
    print("| | as is | + `ResumableLoader` | + `SeedEachStep` | + host's own state kept |\n|---|---|---|---|---|")
    runs = {name: lightning_run for name in LIGHTNING} | {name: loop_run for name in LOOPS}
    if solo_clone.ROOT:
        solo_clone.import_solo()
        runs |= {name: solo_run for name in SOLO}
    if importlib.util.find_spec("stable_pretraining"):
        runs |= {name: stable_run for name in STABLE}
    for name, make in (LIGHTNING | LOOPS | SOLO | STABLE).items():
        if name not in runs or arguments.only not in name:
            continue
        for logo in (False, True):
            if name.startswith("learner") and not logo:
                continue
            has_state = name in ("moco", "loop moco", "tico", "solo-learn byol", "solo-learn mocov2plus")
            cells = []
            for level, cures in LEVELS.items():
                if (level == "state" and not has_state) or (level == "data" and name in SOLO):
                    cells.append("-")
                    continue
                cells.append(compare(runs[name], make, logo, cures))
            print(f"| {name}, {'LoGo' if logo else 'stock'} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
