"""Makes `method=logo_byol` and `+logo=byol` known to solo-learn; does nothing in any other Hydra app."""

import importlib.util
import sys
import warnings
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class LoGoSearchPathPlugin(SearchPathPlugin):
    """Registers the LoGo methods and adds their config groups, when solo-learn is what runs."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Called by Hydra once per run, after solo-learn's scripts have imported their methods."""
        if "solo.methods" not in sys.modules:
            return
        try:
            import logo_plugin.adapters.solo

            _offer_refused(logo_plugin.adapters.solo.REFUSED)
        except Exception as error:  # whatever is wrong with LoGo, the user's plain method=byol must run
            warnings.warn(
                f"LoGo is not available ({type(error).__name__}: {error}); solo-learn's own methods work as "
                "before. `python -m logo_plugin solo` says what does not fit.",
                stacklevel=1,
            )
        # Also after a failure: an unknown +logo=byol would be a plain key to Hydra, and stock BYOL would train.
        spec = importlib.util.find_spec("logo_plugin")
        if spec is not None and spec.origin is not None:
            search_path.append("logo-plugin", f"file://{Path(spec.origin).parent / 'conf'}")


def _offer_refused(refused: dict[type, str]) -> None:
    """+logo=swav is to say why there is no such thing: its method=logo_swav is refused with the reason."""
    from hydra.core.config_store import ConfigStore

    names = {cls: name for name, cls in sys.modules["solo.methods"].METHODS.items()}
    for method in refused:
        node = {"method": f"logo_{names[method]}"}
        ConfigStore.instance().store(group="logo", name=names[method], package="_global_", node=node)
