"""Whether plots can be drawn."""


def require_matplotlib() -> None:
    """ImportError with the command that installs matplotlib, if it is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError as error:
        message = "the plot needs matplotlib; run `pip install 'peft-lrqat[demo]'`"
        raise ImportError(message) from error
