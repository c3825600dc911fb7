"""File formats, each an object in a file of its own, and the runtimes that load them."""
