"""Every exception that miDiscover raises on purpose.

MiDiscoverError             one or two sentences for a person; the command line prints them
├── UserError               the input is wrong: names it, what is wrong, what would be right (exit code 2)
│   ├── ConfigError         YAML or flags
│   ├── ModelError          a language model, a hook, a tokenizer
│   ├── CorpusError         a text source
│   ├── StoreError          a store that can't be reached, read or written as configured
│   │   └── StoreFailedError   one that was, until its disk was full or its server stayed away (exit code 1)
│   ├── TrackingError       the tracking database
│   │   └── TrackingRefusedError   it answers, and does not take what it was told
│   └── NotFoundError       an id that names nothing
├── ConflictError           two writers committed different bytes under one name (exit code 1)
├── CorruptError            stored bytes do not match their manifest (exit code 1)
└── StageError              a stage could not finish although its input was right (exit code 1)
"""


class MiDiscoverError(Exception):
    """Base of all errors with a message that is fit to be shown to a user."""

    exit_code = 1


class UserError(MiDiscoverError):
    """The caller's input is wrong; nothing was written."""

    exit_code = 2


class ConfigError(UserError):
    """A setting is unknown, of the wrong type or out of range."""


class ModelError(UserError):
    """A language model, hook or tokenizer is not there or does not fit."""


class CorpusError(UserError):
    """A text source is not there, is empty, or holds no text."""


class StoreError(UserError):
    """A store address is incomplete, or the store does not answer."""


class StoreFailedError(StoreError):
    """A store that was in use failed: its disk is full, its server stayed away. Running again continues."""

    exit_code = 1


class TrackingError(UserError):
    """The tracking database is not configured or does not answer."""


class TrackingRefusedError(TrackingError):
    """The tracking database takes this entry neither now nor later; others it takes."""


class NotFoundError(UserError):
    """An id or a unique prefix of one names nothing in this store."""


class ConflictError(MiDiscoverError):
    """Different bytes are already committed under this name."""


class CorruptError(MiDiscoverError):
    """Stored bytes differ from what their manifest promises."""


class StageError(MiDiscoverError):
    """A stage ended without its result; running it again continues."""
