"""Where tables and messages go."""

from rich.console import Console

WIDTH_OF_A_FILE = 110  # characters; a terminal has a width of its own, a file or pipe has none


def make_console() -> Console:
    """Standard output: as wide as the terminal, or wide enough for the project's tables."""
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH_OF_A_FILE
    return console
