import torch

# These models are tiny: a second thread only waits for the first, and on a busy machine for much longer than that.
torch.set_num_threads(1)
