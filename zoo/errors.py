"""Every failure a user can meet. The command line catches `ZooError` once, at the top."""

from __future__ import annotations


class ZooError(Exception):
    """A failure told as: what went wrong, what was found, what was expected, what to try next.

    `what` is one sentence naming the file, layer or key; the other three are optional single lines.
    """

    def __init__(
        self,
        what: str,
        *,
        saw: str | None = None,
        expected: str | None = None,
        try_: str | None = None,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.saw = saw
        self.expected = expected
        self.try_ = try_

    def __str__(self) -> str:
        lines = [self.what]
        if self.saw:
            lines.append(f"  saw:   {self.saw}")
        if self.expected:
            lines.append(f"  want:  {self.expected}")
        if self.try_:
            lines.append(f"  try:   {self.try_}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.saw, self.expected, self.try_)


def _rebuild(
    cls: type[ZooError], what: str, saw: str | None, expected: str | None, try_: str | None
) -> ZooError:
    return cls(what, saw=saw, expected=expected, try_=try_)


class UsageError(ZooError):
    """The command was called in a way that cannot work; exit code 2."""


class RecipeError(UsageError):
    """A recipe that does not parse or does not say something possible."""


class SourceError(ZooError):
    """A base model that cannot be found, read or recognised."""


class FormatError(ZooError):
    """A file that is not what its name says: truncated, inconsistent or hostile."""


class PatternError(ZooError):
    """A sparsity pattern or quantization group that does not fit a layer."""


class CalibrationError(ZooError):
    """Calibration text that is missing or too short."""


class NumericsError(ZooError):
    """NaN or infinity where a number must be."""


class StoreError(ZooError):
    """The content-addressed store cannot be read or written."""


class RegistryError(ZooError):
    """The registry is missing, read-only, locked, or of another schema version."""


class HubError(ZooError):
    """A Hub or zoo server that cannot be reached, refuses, or sends what it should not."""


class Lost(ZooError):
    """One of several processes is gone, or they lost each other; the same may succeed a little later."""


class Stopped(ZooError):
    """Ended by a signal; exit code 128 + its number, as shells have it."""

    def __init__(self, what: str, signal: int) -> None:
        super().__init__(what)
        self.signal = signal

    def __reduce__(self) -> tuple[object, ...]:
        return Stopped, (self.what, self.signal)


def last_line(error: BaseException) -> str:
    """What another library's error says, in a line: its type and its last words."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1].strip()[:300]}" if lines else type(error).__name__
