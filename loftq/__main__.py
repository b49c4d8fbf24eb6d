"""``python -m loftq``: the command line, where no script of it is installed."""

from .cli import app

if __name__ == "__main__":
    app()
