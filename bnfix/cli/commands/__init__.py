"""One file a command: a function named like the file, ``ORDER`` in the help and ``EPILOG``."""
