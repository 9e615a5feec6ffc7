"""What a checkpoint that cannot be used raises, and the key that is the format's own."""

RESERVED = "__precision__"
"""The key of a checkpoint's top-level dict that holds its version, policy, precision state and random generators."""


class CheckpointError(ValueError):
    """A checkpoint that is damaged, foreign, or does not fit what it is loaded into; nothing was changed."""
