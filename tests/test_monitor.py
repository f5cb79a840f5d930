"""LoGoMonitor in real runs of both Lightnings, read back from the loggers' files."""

import csv
import importlib.util
import pickle
import sys

import hosts
import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from hosts import wrap_learned as wrap
from lightly.loss import NegativeCosineSimilarity
from lightning.pytorch.loggers import CSVLogger
from photos import tiles
from PIL import Image
from torch.utils.data import DataLoader, Subset

from logo_plugin import LoGoLoss, LoGoMonitor, LoGoTerms, MultiCropCollate, MultiCropTransform, diagnose

pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning_fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:You are trying to `self.log:UserWarning"),
    pytest.mark.filterwarnings("ignore:Experiment logs directory:UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
BOTH = pytest.mark.parametrize("library", [pytorch_lightning, lightning.pytorch], ids=lambda x: x.__name__)
NAMES = [
    "logo/local_local_similarity", "logo/other_image_similarity", "logo/embedding_std", "logo/effective_rank",
    "logo/affinity_accuracy",
]  # fmt: skip


def make(library=pytorch_lightning, **options):
    """BYOL as a user of this Lightning writes it."""

    class BYOL(hosts.SGD, hosts.Momentum, library.LightningModule):
        forward, training_step = hosts.BYOL.forward, hosts.BYOL.training_step

        def __init__(self):
            super().__init__()
            parts = hosts.PlainBYOL()
            self.backbone, self.projection_head = parts.backbone, parts.projection_head
            self.prediction_head, self.criterion = parts.prediction_head, NegativeCosineSimilarity()
            self.copy_momentum()

    return wrap(BYOL(), **options)


def fit(model, library=pytorch_lightning, *, images=12, epochs=1, collate=None, loader=None, ckpt_path=None, **options):
    """Three steps of four images an epoch."""
    options = {"logger": False, "enable_checkpointing": False, "log_every_n_steps": 1, **options}
    trainer = library.Trainer(
        max_epochs=epochs, accelerator="cpu", devices=1, enable_progress_bar=False, enable_model_summary=False,
        **options,
    )  # fmt: skip
    collate = collate or MultiCropCollate.cifar10(local_size=16)
    loader = loader or DataLoader(tiles(images), batch_size=4, collate_fn=collate)
    trainer.fit(model, loader, ckpt_path=ckpt_path)
    return trainer


def rows(logger):
    with open(f"{logger.log_dir}/metrics.csv") as file:
        return [row for row in csv.DictReader(file) if row.get("logo/embedding_std")]


@BOTH
def test_a_run(library, tmp_path):
    logger = library.loggers.CSVLogger(tmp_path)
    model = make(library)
    fit(model, library, epochs=2, logger=logger, callbacks=[LoGoMonitor(images=3)])
    found = rows(logger)
    assert [int(row["step"]) for row in found] == list(range(6))
    last = diagnose(model.logo_local_proj, model.logo.affinity)
    assert {name: float(found[-1][name]) for name in NAMES} == pytest.approx({f"logo/{k}": v for k, v in last.items()})
    with open(f"{logger.log_dir}/metrics.csv") as file:
        terms = [row["step"] for row in csv.DictReader(file) if row["logo/local_local"]]
    assert terms == [row["step"] for row in found]  # the adapter's, once, on the same steps
    pictures = sorted(path.name for path in (tmp_path / "lightning_logs/version_0/logo_crops").iterdir())
    assert pictures == ["epoch_0000.png", "epoch_0001.png"]


@pytest.mark.parametrize("used", ["lightning.pytorch", "pytorch_lightning"])
def test_with_one_lightning_installed(used, tmp_path, monkeypatch):
    """Based on the Callback of the one, it serves the Trainer of either."""
    (other,) = {"lightning.pytorch", "pytorch_lightning"} - {used}
    monkeypatch.setitem(sys.modules, other, None)  # import raises ModuleNotFoundError
    monitor = imported_again().LoGoMonitor
    monkeypatch.undo()
    assert monitor.__mro__[1].__module__.startswith(used)
    for library in (pytorch_lightning, lightning.pytorch):
        logger = CSVLogger(tmp_path, name=library.__name__)
        fit(make(library), library, images=4, logger=logger, callbacks=[monitor()])
        assert len(rows(logger)) == 1


def imported_again():
    spec = importlib.util.find_spec("logo_plugin.adapters.lightning")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_lightning(monkeypatch):
    for name in ("lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ModuleNotFoundError, match="LoGoMonitor needs Lightning: pip install lightning"):
        imported_again()


def test_intervals(tmp_path):
    logger = CSVLogger(tmp_path)
    monitor = LoGoMonitor(every_n_steps=2, crops_every_n_epochs=2)
    fit(make(), epochs=3, logger=logger, log_every_n_steps=50, callbacks=[monitor])
    assert [int(row["step"]) for row in rows(logger)] == [1, 3, 5, 7]
    pictures = sorted(path.name for path in (tmp_path / "lightning_logs/version_0/logo_crops").iterdir())
    assert pictures == ["epoch_0000.png", "epoch_0002.png"]


def test_one_measurement_per_accumulated_step(tmp_path):
    logger = CSVLogger(tmp_path)
    fit(make(), images=16, logger=logger, accumulate_grad_batches=2, callbacks=[LoGoMonitor()])
    assert [int(row["step"]) for row in rows(logger)] == [0, 1]


def test_training_is_the_same_with_and_without():
    weights = []
    for callbacks in ([], [LoGoMonitor()]):
        torch.manual_seed(0)
        model = make()
        fit(model, callbacks=callbacks)
        weights.append(model.state_dict())
    assert not any("proj" in name and "logo" in name for name in weights[0])
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def test_plain_multi_crop(tmp_path):
    logger = CSVLogger(tmp_path)
    fit(make(affinity=None), images=4, logger=logger, callbacks=[LoGoMonitor()])
    (row,) = rows(logger)
    assert all(row[name] for name in NAMES[:-1])
    assert NAMES[-1] not in row


def test_no_logger_and_dummy_logger():
    fit(make(), images=4, callbacks=[LoGoMonitor()])
    fit(make(), images=4, callbacks=[LoGoMonitor()], fast_dev_run=True)


def test_resume(tmp_path):
    checkpoint = str(tmp_path / "last.ckpt")
    first = fit(make(), callbacks=[LoGoMonitor()])
    first.save_checkpoint(checkpoint)
    logger = CSVLogger(tmp_path)
    fit(make(), epochs=2, ckpt_path=checkpoint, logger=logger, callbacks=[LoGoMonitor()])
    assert [int(row["step"]) for row in rows(logger)] == [3, 4, 5]
    fit(make(), epochs=2, ckpt_path=checkpoint)  # nor does a checkpoint need the monitor


class Transformed(list):
    def __init__(self, samples, transform):
        super().__init__(samples)
        self.transform = transform

    def __getitem__(self, n):
        image, target = super().__getitem__(n)
        return self.transform(image), target


@pytest.mark.parametrize("made", ["in workers", "on the device", "by the dataset", "by a subset's dataset"])
def test_picture_shows_the_crops(made, tmp_path):
    """Without augmentation: the pixels of the photographs, white around smaller crops, a word over each kind."""
    options = {
        "global_size": 48, "local_size": 24, "global_scale": (1, 1), "ratio": (1, 1), "flip_p": 0, "jitter_p": 0,
        "grayscale_p": 0, "blur_p": 0, "mean": (0.1, 0.5, 0.9), "std": (0.1, 0.2, 0.3),
    }  # fmt: skip
    collate = MultiCropCollate(**options, defer="augment" if made == "on the device" else None)
    loader = DataLoader(tiles(4), batch_size=4, collate_fn=collate)
    if made == "by the dataset":
        loader = DataLoader(Transformed(tiles(4), MultiCropTransform(**options)), batch_size=4)
    if made == "by a subset's dataset":
        dataset = Transformed(tiles(6), MultiCropTransform(**options))
        loader = DataLoader(Subset(Subset(dataset, range(5)), range(4)), batch_size=4)
    fit(make(), loader=loader, logger=CSVLogger(tmp_path), callbacks=[LoGoMonitor(images=2)])
    picture = Image.open(tmp_path / "lightning_logs/version_0/logo_crops/epoch_0000.png")
    assert picture.size == (2 + 4 * 50, 14 + 2 + 2 * 50)
    headings, picture = picture.crop((0, 0, 202, 14)), picture.crop((0, 14, 202, 116))
    inks = [ink(headings.crop((left, 0, left + 100, 14))) for left in (0, 100)]
    assert inks[0] > inks[1] > 0  # "global" is the longer word
    for row, (photograph, _) in enumerate(tiles(2)):
        for column in (0, 1):
            corner = (2 + 50 * column, 2 + 50 * row)
            shown = picture.crop((*corner, corner[0] + 48, corner[1] + 48))
            difference = torch.tensor(list(shown.tobytes())) - torch.tensor(list(photograph.tobytes()))
            assert difference.abs().max() <= 1
    local = picture.crop((102, 2, 150, 50))
    assert set(local.crop((0, 0, 48, 12)).tobytes()) == {255}
    assert set(local.crop((12, 12, 36, 36)).tobytes()) != {255}


def ink(image):
    return sum(value < 128 for value in image.convert("L").tobytes())


def test_the_headings_follow_global_crops(tmp_path):
    """With four of six views global one word is over four columns, the other over two."""
    collate = MultiCropCollate(global_crops=4, local_crops=2, global_size=48, local_size=24)
    model = wrap(hosts.FastSiam(), global_crops=4)
    fit(model, images=4, collate=collate, logger=CSVLogger(tmp_path), callbacks=[LoGoMonitor(images=1)])
    picture = Image.open(tmp_path / "lightning_logs/version_0/logo_crops/epoch_0000.png")
    inks = [ink(picture.crop((left, 0, left + 50, 14))) for left in range(0, 300, 50)]
    assert [bool(found) for found in inks] == [False, True, True, False, True, True]


def test_tensorboard(tmp_path):
    logger = pytorch_lightning.loggers.TensorBoardLogger(tmp_path)
    fit(make(), logger=logger, callbacks=[LoGoMonitor(images=2)])
    found = {}
    for path in tmp_path.rglob("events.*"):
        for event in read_events(path):
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value))
    for name in NAMES:
        assert [step for step, _ in found[name]] == [0, 1, 2]
    ((step, value),) = found["logo/crops"]
    assert step == 0
    assert (value.image.width, value.image.height) == (2 + 4 * 34, 14 + 2 + 2 * 34)


def read_events(path):
    """Records are: length (8 bytes), its checksum (4), a message, its checksum (4)."""
    from tensorboardX.proto.event_pb2 import Event

    content = path.read_bytes()
    while content:
        length = int.from_bytes(content[:8], "little")
        yield Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]


class NumbersOnly(CSVLogger):
    """A logger without a folder of its own."""

    log_dir = None

    @property
    def experiment(self):
        return None

    def log_hyperparams(self, params=None):
        pass  # stable-pretraining, where it is installed, gives every model some

    def log_metrics(self, metrics, step=None):
        self.found = metrics

    def save(self):
        pass


def test_a_logger_that_takes_no_picture(tmp_path):
    logger = NumbersOnly(tmp_path)
    with pytest.warns(UserWarning, match="no way to give NumbersOnly a picture") as caught:
        fit(make(lightning.pytorch), lightning.pytorch, epochs=2, logger=logger, callbacks=[LoGoMonitor()])
    assert sum("picture" in str(warning.message) for warning in caught) == 1
    fit(make(lightning.pytorch), lightning.pytorch, logger=logger, callbacks=[LoGoMonitor(crops_every_n_epochs=None)])


def test_a_model_that_is_not_wrapped():
    with pytest.raises(TypeError, match=r"BYOL is not wrapped: use wrap\(model\), or one of the logo_\* methods"):
        fit(hosts.BYOL(), callbacks=[LoGoMonitor()])
    own = hosts.BYOL()
    own.logo = LoGoLoss(affinity="cosine")
    with pytest.raises(TypeError, match="BYOL is not wrapped"):
        fit(own, callbacks=[LoGoMonitor()])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps must be a positive integer or None, got 0"),
        ({"crops_every_n_epochs": 0.5}, "crops_every_n_epochs must be a positive integer or None, got 0.5"),
        ({"images": None}, "images must be a positive integer, got None"),
        ({"images": True}, "images must be a positive integer, got True"),
        ({"nonfinite": "stop"}, r"nonfinite must be one of \('warn', 'raise', 'ignore'\), got 'stop'"),
        ({"warn_collapse": 1}, "warn_collapse must be True or False, got 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        LoGoMonitor(**options)


def test_it_pickles():
    assert pickle.loads(pickle.dumps(LoGoMonitor(images=3))).images == 3


class Poison(lightning.pytorch.Callback):
    """The criterion gives nan in one step, as a bad batch does under a GradScaler: the weights stay."""

    def __init__(self, batch):
        self.batch = batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.logo.local_weight = float("nan") if trainer.global_step == self.batch else 1e-4

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_term_that_is_not_finite_is_named_with_its_step(accumulate):
    """In a run whose interval, 50, is not reached; and once."""
    callbacks = [Poison(1), LoGoMonitor()]
    with pytest.warns(UserWarning, match="nan or infinite since step 1: LoGo's total.") as caught:
        fit(make(lightning.pytorch), lightning.pytorch, images=16, epochs=2, callbacks=callbacks,
            accumulate_grad_batches=accumulate, log_every_n_steps=50)  # fmt: skip
    assert sum("nan or infinite" in str(warning.message) for warning in caught) == 1


def test_a_resumed_run_names_its_own_step(tmp_path):
    checkpoint = str(tmp_path / "last.ckpt")
    fit(make(lightning.pytorch), lightning.pytorch).save_checkpoint(checkpoint)
    callbacks = [Poison(3), LoGoMonitor()]
    with pytest.warns(UserWarning, match="nan or infinite since step 3: LoGo's total."):
        fit(make(lightning.pytorch), lightning.pytorch, epochs=2, ckpt_path=checkpoint, callbacks=callbacks)


def test_it_may_end_the_run_or_keep_silent():
    with pytest.raises(RuntimeError, match=r"nan or infinite since step 2: LoGo's total\..*stops a run there"):
        fit(make(lightning.pytorch), lightning.pytorch, callbacks=[Poison(2), LoGoMonitor(nonfinite="raise")])
    fit(make(lightning.pytorch), lightning.pytorch, callbacks=[Poison(2), LoGoMonitor(nonfinite="ignore")])


def test_no_step_waits_for_the_device():
    """Nothing is read between two measurements: on the meta device reading would raise."""
    monitor, term = LoGoMonitor(), torch.zeros((), device="meta")
    for _ in range(3):
        monitor._watch(LoGoTerms(*[term] * 5))


def test_a_collapse_warns_once_with_advice():
    model = make(lightning.pytorch)
    last = model.projection_head.layers[-1]
    with torch.no_grad():
        last.weight.mul_(1e-6)
        if last.bias is None:
            last.bias = torch.nn.Parameter(torch.ones(len(last.weight)))
        last.bias.fill_(1.0)
    model.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.0)
    with pytest.warns(UserWarning, match=r"embedding_std was below 0\.1 10 times in a row.*affinity=None") as caught:
        fit(model, lightning.pytorch, epochs=8, callbacks=[LoGoMonitor()])
    assert sum("collapsed" in str(warning.message) for warning in caught) == 1
    fit(model, lightning.pytorch, epochs=3, callbacks=[LoGoMonitor()])  # nine measurements
    fit(model, lightning.pytorch, epochs=5, callbacks=[LoGoMonitor(warn_collapse=False)])


def test_stochastic_weight_averaging_finishes():
    """It ends with an epoch of BatchNorm without momentum, the mean of all batches."""
    callbacks = [lightning.pytorch.callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)]
    model = make(lightning.pytorch)
    fit(model, lightning.pytorch, epochs=3, callbacks=callbacks)
    assert model.logo.affinity.mlp[1].running_mean.abs().max() > 0
    assert all(value.isfinite().all() for value in model.state_dict().values())
