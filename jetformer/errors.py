"""Error messages."""


def one_line(error: BaseException) -> str:
    """Returns the message of an error as one line, or the name of its class if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__
