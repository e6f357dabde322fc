"""The dtypes of features."""

import torch

#: The dtypes that features may have.
FEATURE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
