"""stable-pretraining: `model` is the adapter, `batches` and `methods` are what it knows of the host."""
