"""The error of checkpoints, the key that the format reserves, and the format's version."""

RESERVED = "__precision__"
"""Key in a checkpoint's top-level dict: format version, policy, precision state, random generators' states."""

FORMAT_VERSION = 2
"""Of files and folders. 1: folders had no `chunks.json`, files were the same."""


class CheckpointError(ValueError):
    """A checkpoint is damaged, not one of `Fabric.save`, or does not match the live objects; these were not changed."""
