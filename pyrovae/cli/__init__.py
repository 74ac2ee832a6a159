"""The ``pyrovae`` command: its subcommands, run folders and reports."""
