"""Text that is sent as it grows: how much of a whole has been sent, with the blank lines that join its messages."""


class GrownText:
    """What has been sent of a text that `harmony.parsed.Parsed` joins of several messages.

    Attributes:
        length: characters sent so far, the blank lines between messages included.
    """

    def __init__(self):
        self.length = 0
        self._message: int | None = None

    def feed(self, message: int, text: str) -> str:
        """What to send when `text` has come of the message with this index."""
        joint = "\n\n" if self.length and message != self._message else ""
        self._message = message
        self.length += len(joint) + len(text)
        return joint + text

    def rest(self, whole: str | None) -> str:
        """What to send at the end, when the whole is known."""
        left = (whole or "")[self.length :]
        self.length += len(left)
        return left
