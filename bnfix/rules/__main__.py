"""``python -m bnfix.rules``: the pages in ``bnfix/docs/rules`` anew, out of the docstrings."""

from bnfix.rules.pages import write

if __name__ == "__main__":
    write()
