"""FlowRL: match the distribution of rewards instead of maximising them.

Zhu et al., 2025 (arXiv:2509.15207), equation 6: GFlowNets' trajectory balance, with the group-normalised reward, the
length-normalised log-probs, the reference as prior and a learned partition function.

Legend: S scored tokens, B completions.
"""

from tuneloop.algorithms.advantages import group_normalised
from tuneloop.algorithms.correction import importance_weights
from tuneloop.algorithms.settings import AlgorithmSettings
from tuneloop.algorithms.types import Algorithm, LossInputs, LossOutputs


def flowrl_loss(inputs: LossInputs, settings: AlgorithmSettings) -> LossOutputs:
    """mean_i w_i d_i^2, d = log Z(x) + L_policy - beta r - L_ref, with L the mean log-prob of the completion's tokens.

    The weight w is the completion's ratio pi / pi_old, without gradient: `flow_weight` "clip" holds it within
    1 - clip_low and 1 + clip_high, as the paper; "cap" below `flow_weight_cap`, as public code. The minimum does not
    depend on who sampled, so the engine's numerics need no correction; `correction = "sequence"` adds its weight.

    Args:
        inputs: tokens of one micro-batch; the advantage of a completion's tokens is its normalised reward r.

    Returns:
        The loss (scalar); completion sums `flow/residual` (|d|) and `flow/log_z`.
    """
    assert inputs.reference_logprobs_S is not None
    assert inputs.log_z_B is not None
    ratio_B = inputs.sum_B(inputs.logprobs_S.detach() - inputs.old_logprobs_S).exp()
    if settings.flow_weight == "clip":
        weight_B = ratio_B.clamp(1.0 - settings.clip_low, 1.0 + settings.clip_high)
    else:
        weight_B = ratio_B.clamp(max=settings.flow_weight_cap)
    clipped = float(((weight_B != ratio_B) * inputs.lengths_B).sum())
    correction_S, sums = importance_weights(inputs, settings)
    weight_B = weight_B * inputs.mean_B(correction_S)
    gap_B = inputs.mean_B(inputs.logprobs_S - inputs.reference_logprobs_S)
    delta_B = inputs.log_z_B + gap_B - settings.flow_beta * inputs.mean_B(inputs.advantages_S)
    loss = (weight_B * delta_B.square()).sum() / inputs.completion_total
    metrics = {"flow/residual": float(delta_B.detach().abs().sum()), "flow/log_z": float(inputs.log_z_B.detach().sum())}
    return LossOutputs(loss, {"clip/share": clipped, **sums}, metrics)


FLOWRL = Algorithm(group_normalised, flowrl_loss, heads=("log_z_B",), needs_reference=True, learns_from_all=True)
