"""A checkpoint made with other LoGo settings: said before torch lists keys."""

from typing import Any

from logo_plugin.adapters.solo.options import PREFIX


def check_checkpoint(model: Any, checkpoint: dict[str, Any]) -> None:
    """Compares LoGo's parameters in a checkpoint with those of a model.

    Raises:
        RuntimeError: If they differ, saying in what.
    """
    saved, here = _of_logo(checkpoint["state_dict"]), _of_logo(model.state_dict())
    if saved == here:
        return
    if not saved:
        what = "the checkpoint was made without LoGo's affinity or local predictor, and this run has added them"
    elif not here:
        what = "the checkpoint was made with LoGo, and this run is without its affinity and local predictor"
    else:
        before, now = _settings(saved), _settings(here)
        differing = [name for name in before if name in now and before[name] != now[name]]
        if not differing:  # the method's own widths: torch names them
            return
        was, now_is = (", ".join(f"{PREFIX}{name}={each[name]}" for name in differing) for each in (before, now))
        what = f"LoGo is set differently, in the checkpoint {was}, in this run {now_is}"
    raise RuntimeError(
        f"{what}. To resume, set method= and method_kwargs.logo as in the args.json beside the checkpoint. To start a "
        "new run from its weights, load them yourself: model.load_state_dict(weights, strict=False), with weights = "
        'torch.load(PATH)["state_dict"] without the entries whose names begin with "logo".'
    )


def _of_logo(state: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(value.shape) for name, value in state.items() if name.startswith(("logo.", "logo_local_predictor."))
    }


def _settings(shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """The options that decide which parameters there are, read from their shapes."""
    first = shapes.get("logo.affinity.mlp.0.weight")
    found: dict[str, Any] = {
        "affinity": "learned" if first else "cosine or false",
        "local_predictor": str(any(name.startswith("logo_local_predictor.") for name in shapes)).lower(),
    }
    if first:
        found["affinity_hidden_dim"] = first[0]
        found["affinity_norm"] = "batch" if "logo.affinity.mlp.1.running_mean" in shapes else "layer"
    return found
