"""Found by Hydra; see `search_path`."""
