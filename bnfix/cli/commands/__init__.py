"""One file a command: a function named like the file, ``ORDER`` in the help, ``EPILOG``, ``NEEDS_ARGUMENTS``."""
