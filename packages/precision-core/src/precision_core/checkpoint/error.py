"""What a checkpoint that cannot be used raises, the key that is the format's own, and the format's number."""

RESERVED = "__precision__"
"""The key of a checkpoint's top-level dict that holds its version, policy, precision state and random generators."""

FORMAT_VERSION = 2
"""Of files and folders. 1: folders had no `chunks.json`, files were the same."""


class CheckpointError(ValueError):
    """A checkpoint that is damaged, foreign, or does not fit what it is loaded into; nothing was changed."""
