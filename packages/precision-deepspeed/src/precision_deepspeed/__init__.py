"""precision-deepspeed: DeepSpeed's ZeRO as a strategy of precision-core, and the plugin that is native to it."""

from precision_deepspeed.checkpoints import consolidated_optimizer_state_dict as consolidated_optimizer_state_dict
from precision_deepspeed.checkpoints import consolidated_state_dict as consolidated_state_dict
from precision_deepspeed.config import deepspeed_config as deepspeed_config
from precision_deepspeed.plugin import DeepSpeedPrecision as DeepSpeedPrecision
from precision_deepspeed.strategy import DeepSpeedStrategy as DeepSpeedStrategy
