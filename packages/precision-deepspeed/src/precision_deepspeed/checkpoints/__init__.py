"""What a checkpoint of an engine holds, how it is written and read, and how it becomes the values of another engine.

names      which parameter is which
pickles    DeepSpeed's files, opened without executing anything
saved      their values, parameter by parameter, whatever stage and number of ranks wrote them
placing    those copied to the flat tensors of another engine
export     those as plain state dicts
folder     fabric.save and fabric.load
"""

from precision_deepspeed.checkpoints.export import (
    consolidated_optimizer_state_dict,
    consolidated_state_dict,
    read_plain,
)
from precision_deepspeed.checkpoints.names import describe
from precision_deepspeed.checkpoints.placing import Fragment, fill
from precision_deepspeed.checkpoints.saved import Saved

__all__ = [
    "Fragment",
    "Saved",
    "consolidated_optimizer_state_dict",
    "consolidated_state_dict",
    "describe",
    "fill",
    "read_plain",
]
