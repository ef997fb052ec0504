"""The errors a user of qsun may have to handle.

Every message names the argument or the file, what was found and what is expected.  Wrong arguments of
ordinary functions raise `ValueError` or `TypeError`; the classes here are for what the caller cannot know
beforehand: the contents of a checkpoint, whether two modules fit, and what became of a request.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "IncompatibleModule",
    "MissingKV",
    "OutOfCacheBlocks",
    "QsunError",
    "RequestError",
    "SharedPartsWarning",
    "UnsupportedModel",
]


class QsunError(Exception):
    """Base of every error that qsun itself defines."""


class CheckpointError(QsunError):
    """A checkpoint is damaged, incomplete or contradicts itself; the message names file and tensor."""


class UnsupportedModel(CheckpointError):
    """A checkpoint is sound but asks for something that is not implemented.  The message names that thing."""


class IncompatibleModule(QsunError):
    """A prefill module does not fit the decode module.  The message tells both values."""


class RequestError(QsunError, ValueError):
    """A request is refused on submission: empty or too long prompt, unknown model, token id out of range."""


class OutOfCacheBlocks(QsunError):
    """The block pool cannot supply the blocks that were asked for."""


class MissingKV(QsunError):
    """The keys and values of a request's prompt are not there, so it cannot be answered."""


class SharedPartsWarning(UserWarning):
    """A prefill module brings an embedding or lm_head of its own that differs from the decode module's.

    Both belong to the decode module and are frozen, so the prefill module's are ignored.
    """
