"""MLflow's limits on the length of a value, and cutting to them so that it is seen and said."""

LONGEST_PARAM = 6000
LONGEST_RUN_TAG = 8000
LONGEST_VERSION_TAG = 5000  # what servers of the last years take; the newest take more
LONGEST_DESCRIPTION = 4900


class Cutter:
    """Cuts values that are too long, and remembers which."""

    def __init__(self) -> None:
        self._cut: dict[str, None] = {}

    def __call__(self, name: str, value: str, longest: int) -> str:
        """`value`, or its beginning with a note of how long it was."""
        if len(value) <= longest:
            return value
        self._cut[name] = None
        return fitted(value, longest)

    def take(self) -> tuple[str, ...]:
        """Names of what was cut since the last call."""
        taken = tuple(self._cut)
        self._cut.clear()
        return taken


def fitted(value: str, longest: int) -> str:
    """A text that is no longer than `longest` characters and, where it is cut, says so at its end."""
    if len(value) <= longest:
        return value
    note = f" … (cut: {len(value)} characters in all)"
    return value[: longest - len(note)] + note
