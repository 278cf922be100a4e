"""The error that people can mend; every error class of this project derives from it."""


class GptossError(ValueError):
    """Input that cannot be taken, or files or devices that are not what is needed. One fault per line.

    Commands print each line and exit with code 2. A ValueError that is not one of these is a bug, and keeps its
    traceback.
    """
