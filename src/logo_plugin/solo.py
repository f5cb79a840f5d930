"""Runs a solo-learn script with LoGo's methods known to it: `python -m logo_plugin.solo main_knn.py ...`.

`main_pretrain.py` and `main_linear.py` need no runner, Hydra finds LoGo there. `main_knn.py` and
`main_umap.py` do. Both move everything to a GPU; here they run on the CPU where there is none.
"""

import runpy
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class _OnCPU(TorchFunctionMode):
    """Answers `.cuda()` and `.to("cuda:0")` with the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.cuda:
            return args[0]
        if func is Tensor.to:
            args = tuple("cpu" if str(arg).startswith("cuda") else arg for arg in args)
        return func(*args, **(kwargs or {}))


def main(arguments: list[str]) -> None:
    """Runs `arguments[0]`, a script of a solo-learn clone, with the rest as its command line.

    Args:
        arguments: Path of the script, then what it is to be given.

    Raises:
        SystemExit: If there is no such script, or no solo-learn beside it.
    """
    if not arguments or not Path(arguments[0]).is_file():
        raise SystemExit(
            f"usage: python -m logo_plugin.solo SCRIPT [ARGUMENT ...]\n"
            f"SCRIPT must be a script of your solo-learn clone such as main_knn.py, got {arguments[:1]}."
        )
    sys.argv = list(arguments)
    sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
    try:
        import logo_plugin.adapters.solo  # noqa: F401  (registers the methods)
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error}. `python -m logo_plugin solo` says what is missing.") from error
    if torch.cuda.is_available():
        runpy.run_path(arguments[0], run_name="__main__")
    else:
        print("logo_plugin.solo: no GPU found, running on the CPU.", file=sys.stderr)
        with _OnCPU():
            runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
