"""File formats, each an object in its own file, and the runtimes that load them."""
