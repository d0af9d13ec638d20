"""How much better a completion was than its group.

Legend: N prompts, G completions a prompt.
"""

import torch


def grpo_advantages(rewards_NG: torch.Tensor) -> torch.Tensor:
    """(R - mean of the group) / (sample standard deviation of the group + 1e-6); shape (N, G).

    Shao et al., 2024 (arXiv:2402.03300), section 4.1.2. A group whose rewards are all equal gets exactly zero.
    """
    centred = rewards_NG - rewards_NG.mean(-1, keepdim=True)
    spread = rewards_NG.std(-1, keepdim=True)
    equal = (rewards_NG == rewards_NG[:, :1]).all(-1, keepdim=True)
    return torch.where(equal, 0.0, centred / (spread + 1e-6))
