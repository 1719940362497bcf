"""One file a format; :func:`bnfix.formats.recognition.formats` finds them by walking this package."""
