"""How far a training is, as Lightning's Trainer knows it. Lightning is not imported."""

import math
import warnings
from typing import Any

from logo_plugin.losses import LoGoLoss


def follow_trainer(model: Any) -> None:
    """Tells an annealed repulsion how far the model's Trainer is, if it has one that knows where it ends."""
    logo: LoGoLoss = model.logo
    if not logo.anneal_repulsion:
        return
    if logo._told_by_trainer:  # which may have been another one, in a fit before
        logo._progress_known = False
    try:
        trainer = model.trainer
        done = [trainer.global_step / trainer.max_steps] if trainer.max_steps > 0 else []
        for timer in (callback for callback in trainer.callbacks if hasattr(callback, "time_remaining")):  # max_time
            if (left := timer.time_remaining()) is not None:
                done.append(timer.time_elapsed() / max(timer.time_elapsed() + left, 1e-9))
        if (trainer.max_epochs or -1) > 0:
            within, batches = trainer.fit_loop.batch_idx, trainer.num_training_batches
            if batches == math.inf and trainer.current_epoch:  # a stream: as long as it was
                before = trainer.fit_loop.epoch_loop.batch_progress.total.ready - within - 1
                batches = before / trainer.current_epoch
            elif batches == math.inf and trainer.max_epochs == 1 and not done:
                warnings.warn(
                    "the data have no length and max_epochs=1, so nothing says how far the training is, and LoGo's "
                    "repulsion keeps its whole strength. Give Trainer(max_steps=...), or anneal_repulsion=False.",
                    stacklevel=2,
                )
            done.append((trainer.current_epoch + min(within / max(batches, 1), 1.0)) / trainer.max_epochs)
    except (AttributeError, RuntimeError, TypeError):  # no Trainer, or Fabric's stand-in for one
        return
    if done:
        logo.anneal(min(max(done), 1.0))  # the first limit ends it; min_epochs may let it go on
        logo._told_by_trainer = True
