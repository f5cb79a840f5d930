"""How far a training is, as Lightning's Trainer knows it. Lightning is not imported."""

import math
from typing import Any

from logo_plugin.losses import LoGoLoss


def follow_trainer(model: Any) -> None:
    """Tells an annealed repulsion how far the model's Trainer is, if it has one that knows where it ends."""
    logo: LoGoLoss = model.logo
    if not logo.anneal_repulsion:
        return
    try:
        trainer = model.trainer
        done = [trainer.global_step / trainer.max_steps] if trainer.max_steps > 0 else []
        if (trainer.max_epochs or -1) > 0:
            batches = trainer.num_training_batches
            within = trainer.fit_loop.batch_idx / batches if batches < math.inf else 0.0
            done.append((trainer.current_epoch + within) / trainer.max_epochs)
    except (AttributeError, RuntimeError, TypeError):  # no Trainer, or Fabric's stand-in for one
        return
    if done:
        logo.anneal(min(max(done), 1.0))  # the first limit ends it; min_epochs may let it go on
