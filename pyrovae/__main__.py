"""``python -m pyrovae``: the ``pyrovae`` command."""

from pyrovae.cli.main import main

if __name__ == "__main__":
    main()
