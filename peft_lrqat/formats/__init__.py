"""File formats and the runtimes that load them."""
