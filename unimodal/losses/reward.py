"""Learning from rewards: what scores better than its siblings becomes likelier."""

from torch import Tensor

from unimodal.layers import at_least_float32
from unimodal.losses.numerics import mean_over_real


def self_critical_loss(log_probs: Tensor, mask: Tensor, rewards: Tensor) -> Tensor:
    """Policy gradient of K captions that a model drew for each image, each against the mean reward of the others (self-critical sequence
    training, Rennie et al. 2017, arXiv 1612.00563; with the other draws as the baseline, Luo 2020, arXiv 2003.09971); a scalar.

    | Inputs    | Shape     | Meaning                                                  |
    |-----------|-----------|----------------------------------------------------------|
    | log_probs | [B, K, L] | what the model gives each drawn token, with gradient     |
    | mask      | [B, K, L] | True on drawn tokens, the end of the caption among them  |
    | rewards   | [B, K]    | of each caption; only differences within an image matter |

    The value says nothing, its gradient is what counts. Averaged over the real tokens of the global batch.
    Raises ValueError on shapes that do not fit, and for fewer than two captions of an image.
    """
    if log_probs.dim() != 3 or mask.shape != log_probs.shape or rewards.shape != log_probs.shape[:2]:
        raise ValueError(
            f"Got log_probs {tuple(log_probs.shape)}, mask {tuple(mask.shape)} and rewards {tuple(rewards.shape)}; "
            "expected [B, K, L], [B, K, L] and [B, K]."
        )
    draws = rewards.shape[1]
    if draws < 2:
        raise ValueError(f"Got {draws} caption of each image; its baseline is the others, so draw at least 2.")
    rewards = at_least_float32(rewards)
    others = (rewards.sum(1, keepdim=True) - rewards) / (draws - 1)
    advantage = (rewards - others)[..., None]  # [B, K, 1]
    return mean_over_real(-(advantage * at_least_float32(log_probs) * mask).sum(), mask)
