"""Errors that speak to the user: what is wrong, where, and what to do next.

The command line prints `str(error)` on one line and exits with 1; `--debug` shows the traceback.
Everything the project raises on purpose is a `HierMemError`.
"""

from __future__ import annotations


class HierMemError(Exception):
    """Base of all errors of this project.

    `what` says what is wrong and where; `hint` what to do next.
    """

    def __init__(self, what: str, hint: str = "") -> None:
        self.what = what
        self.hint = hint
        super().__init__(f"{what.rstrip('.')}. {hint}" if hint else what)


class FileError(HierMemError):
    """A file cannot be read: it is missing, damaged, or has a line that is not what it should be."""


class ArgumentError(HierMemError):
    """An argument of a function is of the wrong type, or out of its bounds."""


class CheckpointError(HierMemError):
    """A source checkpoint is missing, damaged, of an unknown kind, or has keys left over or missing."""


class AssetError(HierMemError):
    """Public weights that a command needs are neither in the cache nor to be had from any source."""


class AnchorError(HierMemError):
    """An anchor cannot be loaded, or its architecture cannot carry memories."""


class ChatTemplateError(AnchorError):
    """An anchor's chat template refuses a conversation, or fails on it. The cause is what the template raised."""


class BankError(HierMemError):
    """A bank on disk is missing, damaged, or of another format version."""


class AnchorMismatchError(BankError):
    """A bank was made for another anchor than the one it is to be attached to."""


class CorpusError(HierMemError):
    """What is to be learnt is missing, has none of the fields named, or is too little."""


class NothingToLearnError(CorpusError):
    """No file of a corpus can be read, or none has a text."""


class TeacherError(HierMemError):
    """A teacher's server cannot be reached, or what a teacher writes is not what was asked for."""


class SettingsError(HierMemError):
    """A file of settings cannot be read, has a setting that is not known, or one of the wrong type."""


class TaskError(HierMemError):
    """A task that a model is to be tested on is not known, or its file has a row that is no example."""


class HubError(HierMemError):
    """The model hub cannot be reached, does not have what was asked for, or refuses."""


class OutputError(HierMemError):
    """An output could not be written: it exists already, or the disk is full."""


class MissingDependencyError(HierMemError):
    """An optional package is needed; the hint names the extra that brings it."""


class VerificationError(HierMemError):
    """A converted model differs from its source by more than the stated bound."""


class CoreMLError(HierMemError):
    """A Core ML package is damaged, or its program contradicts its own declarations."""


class CoreAIError(HierMemError):
    """A Core AI asset cannot be opened or run, or is not what its folder's manifest says."""


def first_line(error: object) -> str:
    """The first line of what somebody else's error says; the name of its type where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
