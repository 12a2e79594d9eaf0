# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can act on. Each names the value, what it conflicts with, and the way out."""


class ConfigurationError(ValueError):
    """A setting is out of range, or two settings contradict each other."""


class DatasetError(ValueError):
    """The preference data cannot be used as it is."""


class MediaAccessError(DatasetError):
    """A file of the preference data cannot be read, which is not its fault: no permission, or no answer of a disk."""


class BackboneError(ValueError):
    """The model is of a kind that no adapter knows, or its configuration is not supported."""


class NumericalError(RuntimeError):
    """A computation gave NaN or infinity. It comes while running: the model or a pair is at fault."""


class RewardError(RuntimeError):
    """A scorer failed, or answered what is no score. It comes while running: the scorer is at fault."""


class StudyError(ValueError):
    """A human study, its samples or its answers cannot be used as they are."""


class AnswerError(StudyError):
    """An answer of a rater is none that the study takes: another's assignment, an unknown choice."""


class StorageError(RuntimeError):
    """A file cannot be written: no space is left, say. It comes while running."""


class CheckpointError(StorageError):
    """A checkpoint could not be written. It comes while running: the disk is at fault."""


class Preempted(SystemExit):
    """Training was asked to stop (SIGTERM), has saved a checkpoint, and leaves with status `Preempted.STATUS`.

    Args:
        checkpoint: The folder to resume from.
        step: Optimiser steps done.
    """

    STATUS = 75
    """EX_TEMPFAIL of sysexits.h: not an error, the user is asked to try again later."""

    def __init__(self, checkpoint: str, step: int):
        super().__init__(self.STATUS)
        self.checkpoint = checkpoint
        self.step = step

    def __str__(self) -> str:
        return (
            f"SIGTERM: stopped after step {self.step} and saved {self.checkpoint}, from which "
            "`resume_from_checkpoint=True` continues."
        )


class RoundsPreempted(Preempted):
    """A run of rounds was asked to stop (SIGTERM), and leaves as [`Preempted`] does.

    Args:
        folder: Of the run.
    """

    def __init__(self, folder: str):
        super().__init__(folder, 0)
        self.folder = folder

    def __str__(self) -> str:
        return f"SIGTERM: stopped. What is done is kept in {self.folder}, and the same command continues."


EXPECTED_ERRORS = (
    BackboneError,
    ConfigurationError,
    DatasetError,
    NumericalError,
    RewardError,
    StorageError,
    StudyError,
)
"""What a command explains in one line, without a traceback, and leaves with status 2."""
