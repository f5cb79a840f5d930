"""One module per host framework; each is imported only when asked for."""
